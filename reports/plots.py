"""A finding's figure as SVG: the same figure gives the same bytes, on any machine.

    from reports.plots import draw

    svg = draw(finding.figure)

Drawn here, as the interval rows of `forest` are. Three kinds of plot need no plotting library: one would take seconds
for a report, and its next version would draw other bytes from the same record. Colours are CSS variables with
fallbacks: inlined in the report, a plot follows its light or dark page; saved alone, it has the light page's colours.
No inline style, no identifier, no reference.

A series is told by its marker and its dashes as well as by its colour.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import escape

from audit.record import Figure, Series
from reports.escape import one_line, shown
from reports.forest import tick_text, ticks

_WIDTH, _HEIGHT, _RIGHT = 520, 240, 506  # of the whole, of the axes alone, and their right end
_LETTER = 7.0  # mean width of a letter at 12 units, in a wide face
_INK, _GRID, _PLATE = "var(--plot-ink, #3b4450)", "var(--plot-grid, #d9dde2)", "var(--plot-plate, #ffffff)"
_MOST = 16  # entries of a legend; the table beside the figure has them all

Point = tuple[float, float]


@dataclass(frozen=True)
class _Role:
    """How series of one role are drawn: markers are outlines around a point, every second series has them hollow."""

    color: str
    dash: str
    markers: tuple[str, str, str]


_ROLES = {
    "target": _Role(
        "var(--plot-target, #1d4f91)",
        "",
        (
            "m-3.4 0a3.4 3.4 0 1 0 6.8 0a3.4 3.4 0 1 0-6.8 0z",  # circle
            "m0-4.6 4.6 4.6-4.6 4.6-4.6-4.6z",  # diamond
            "m-4.2-3.4h8.4l-4.2 7.4z",  # triangle, down
        ),
    ),
    "control": _Role(
        "var(--plot-control, #a34a00)",
        "7 3",
        (
            "m-3.2-3.2h6.4v6.4h-6.4z",  # square
            "m-3.8-3.8h7.6l-7.6 7.6h7.6z",  # hourglass
            "m-4 0 7.4-4.2v8.4z",  # triangle, left
        ),
    ),
    "reference": _Role(
        "var(--plot-reference, #56655d)",
        "1.6 2.4",
        (
            "m0-4 4.2 7.4h-8.4z",  # triangle, up
            "m-1.5-4h3v2.5h2.5v3h-2.5v2.5h-3v-2.5h-2.5v-3h2.5z",  # cross
            "m4 0-7.4-4.2v8.4z",  # triangle, right
        ),
    ),
}


@dataclass
class _Drawn:
    """One series in the figure's own units, ready to be placed."""

    label: str
    role: _Role
    marker: str
    hollow: bool
    lines: list[list[Point]] = field(default_factory=list)
    areas: list[list[Point]] = field(default_factory=list)
    bars: list[tuple[float, float, float]] = field(default_factory=list)
    markers: list[Point] = field(default_factory=list)

    def points(self) -> list[Point]:
        """Everything that has to lie inside the axes."""
        ends = [(x, end) for x, *pair in self.bars for end in pair]
        return [*itertools.chain(*self.lines, *self.areas), *ends, *self.markers]


@dataclass(frozen=True)
class _Axes:
    """Where the figure's units lie on the page."""

    left: float
    top: float
    xs: tuple[float, float]
    ys: tuple[float, float]

    def x(self, value: float) -> float:
        """Rightwards, in units of the page."""
        return self.left + (_RIGHT - self.left) * (value - self.xs[0]) / (self.xs[1] - self.xs[0])

    def y(self, value: float) -> float:
        """Downwards."""
        return self.top + _HEIGHT * (self.ys[1] - value) / (self.ys[1] - self.ys[0])

    def path(self, points: Sequence[Point]) -> str:
        """`M x y x y …`, to a tenth of a unit."""
        return "M" + " ".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)


def draw(figure: Figure) -> str:
    """The figure as an `<svg>` element with its text alternative, safe to inline.

    Args:
        figure: `profile` (lines with bands over x), `distribution` (x holds the values; drawn as step
            histograms on common bins) or `bars` (points with error bars); any other kind is a profile.
    """
    histogram = figure.kind == "distribution"
    series = {"distribution": _histograms, "bars": _bars}.get(figure.kind, _lines)(figure.series)
    straight = [(name, value) for name, value in sorted(figure.reference_lines.items()) if _real(value) is not None]

    points = [point for one in series for point in one.points()]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    (xs if histogram else ys).extend(value for _, value in straight)
    x_range, y_range = _range(xs, 0.03), _range(ys, 0.07)
    if histogram:
        y_range = (0.0, y_range[1])
    whole = all(x == int(x) for one in figure.series for x in one.x if _real(x) is not None)

    y_ticks = [(value, tick_text(value, *y_range)) for value in ticks(*y_range)]
    if figure.ticks:
        x_ticks = [(float(at), one_line(name, 16)) for at, name in enumerate(figure.ticks)]
    else:
        whole &= not histogram
        x_ticks = [(value, tick_text(value, *x_range)) for value in ticks(*x_range)]
        if whole:  # layers and steps
            x_ticks = [(value, f"{int(value):,}".replace("-", "−")) for value, _ in x_ticks if value == int(value)]
    x_ticks = [(value, text) for value, text in x_ticks if x_range[0] <= value <= x_range[1]]

    legend, top = _legend(series, [name for name, _ in straight])
    left = 34 + _LETTER * max((len(text) for _, text in y_ticks), default=0)
    axes = _Axes(left, top + 6, x_range, y_range)
    below, bottom = _names(axes, x_ticks, tilted=_crowded(axes, x_ticks))
    height = bottom + 26

    parts = [*_grid(axes, x_ticks, y_ticks), *below]
    parts += [_straight(axes, value, index, upright=histogram) for index, (_, value) in enumerate(straight)]
    parts += [_placed(one, axes) for one in series]
    if not points:
        parts.append(_text((left + _RIGHT) / 2, axes.top + _HEIGHT / 2, "no values"))
    parts.append(_text((left + _RIGHT) / 2, height - 7, one_line(figure.x_label, 70)))
    parts.append(_text(-(axes.top + _HEIGHT / 2), 13, one_line(figure.y_label, 36), turn=-90))
    return (
        f'<svg class="plot" role="img" aria-label="{escape(shown(figure.alt, 1000) or "no description")}" '
        f'viewBox="0 0 {_WIDTH} {height:.0f}" font-family="system-ui, sans-serif" font-size="12" '
        f'stroke-linejoin="round">{"".join([*parts, *legend])}</svg>'
    )


# --- from a figure's series to what is drawn ----------------------------------------------------------------


def _named(series: list[Series]) -> list[_Drawn]:
    """A look for each series, by its role and its place among those of that role."""
    seen: dict[str, int] = {}
    named = []
    for one in series:
        role = one.role if one.role in _ROLES else "reference"
        index = seen[role] = seen.get(role, -1) + 1
        label = one_line(one.label, 70) or "unnamed"
        named.append(_Drawn(label, _ROLES[role], _ROLES[role].markers[index % 3], index % 2 == 1))
    return named


def _real(value: float | None) -> float | None:
    """A number that can be drawn, or None."""
    return value if value is not None and abs(value) < 1e100 else None


def _values(series: Series) -> list[tuple[float, float | None, float | None, float | None]]:
    """(x, y, lo, hi) wherever x can be drawn."""
    rows = itertools.zip_longest(series.x, series.y, series.lo or [], series.hi or [])
    return [(x, *map(_real, rest)) for x, *rest in rows if _real(x) is not None]  # type: ignore[misc]


def _runs(points: list[tuple[float, float] | None]) -> list[list[Point]]:
    """Cut at what is missing: a line that jumps over a gap would show what nobody measured."""
    groups = itertools.groupby(points, key=lambda point: point is None)
    return [[point for point in group if point is not None] for missing, group in groups if not missing]


def _lines(series: list[Series]) -> list[_Drawn]:
    drawn = _named(series)
    for one, look in zip(series, drawn, strict=True):
        values = _values(one)
        look.lines = _runs([None if y is None else (x, y) for x, y, _, _ in values])
        known = [point for run in look.lines for point in run]
        look.markers = known[:: max(1, len(known) // 24)]
        for full, group in itertools.groupby(values, key=lambda value: None not in value):
            band = [(x, lo, hi) for x, _, lo, hi in group if lo is not None and hi is not None]
            if full and band:
                look.areas.append([(x, hi) for x, _, hi in band] + [(x, lo) for x, lo, _ in reversed(band)])
    return drawn


def _histograms(series: list[Series]) -> list[_Drawn]:
    """Share of each series' values per bin. Common bins, fewer where a series is small."""
    values = [[x for x in one.x if _real(x) is not None] for one in series]
    everything = [x for one in values for x in one]
    low, high = (min(everything), max(everything)) if everything else (0.0, 1.0)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    count = min(30, max(6, math.isqrt(min((len(one) for one in values if one), default=1)) * 2))
    edges = [low + (high - low) * index / count for index in range(count + 1)]
    drawn = _named(series)
    for xs, look in zip(values, drawn, strict=True):
        look.label += f" (n = {len(xs)})"
        shares = [0.0] * count
        for x in xs:
            shares[min(count - 1, int((x - low) / (high - low) * count))] += 1 / len(xs)
        if xs:
            steps = [(edge, share) for index, share in enumerate(shares) for edge in edges[index : index + 2]]
            outline = [(low, 0.0), *steps, (high, 0.0)]
            look.lines = [outline]
            look.areas = [outline] if look.role is _ROLES["target"] else []
    return drawn


def _bars(series: list[Series]) -> list[_Drawn]:
    """Points with error bars, moved apart a little so that series do not hide each other."""
    xs = sorted({x for one in series for x in one.x if _real(x) is not None})
    gap = min((right - left for left, right in itertools.pairwise(xs)), default=1.0)
    drawn = _named(series)
    for index, (one, look) in enumerate(zip(series, drawn, strict=True)):
        aside = (index - (len(series) - 1) / 2) * 0.5 * gap / max(1, len(series))
        for x, y, lo, hi in _values(one):
            if y is not None:
                look.markers.append((x + aside, y))
                look.bars.append((x + aside, y if lo is None else lo, y if hi is None else hi))
    return drawn


# --- on the page --------------------------------------------------------------------------------------------


def _range(values: list[float], margin: float) -> tuple[float, float]:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    pad = margin * (high - low) or max(abs(low) * 0.1, 0.1)
    return low - pad, high + pad


def _placed(one: _Drawn, axes: _Axes) -> str:
    """A series: band below, then line or error bars, then markers."""
    area = "".join(f"{axes.path(points)}Z" for points in one.areas)
    line = "".join(axes.path(points) for points in one.lines)
    bars = "".join(
        f"M{axes.x(x):.1f} {axes.y(lo):.1f}V{axes.y(hi):.1f}" + "".join(
            f"M{axes.x(x) - 4:.1f} {axes.y(end):.1f}h8" for end in (lo, hi)
        )
        for x, lo, hi in one.bars
    )  # fmt: skip
    return _group(one, area, line, bars, "".join(axes.path([point]) + one.marker for point in one.markers))


def _group(one: _Drawn, area: str, line: str, bars: str, markers: str) -> str:
    dash = f' stroke-dasharray="{one.role.dash}"' if one.role.dash else ""
    width = 1.3 if one.hollow else 1.8
    inside = f' fill="{_PLATE}"' if one.hollow else ""
    parts = [
        f'<path d="{area}" stroke="none" fill-opacity=".15"/>' if area else "",
        f'<path d="{line}" fill="none" stroke-width="{width}"{dash}/>' if line else "",
        f'<path d="{bars}" fill="none" stroke-width="1.4"/>' if bars else "",
        f'<path d="{markers}" stroke-width="1.2"{inside}/>' if markers else "",
    ]
    return f'<g stroke="{one.role.color}" fill="{one.role.color}">{"".join(parts)}</g>'


def _straight(axes: _Axes, value: float, index: int, *, upright: bool) -> str:
    """A reference line across the axes."""
    way = (
        f"M{axes.x(value):.1f} {axes.top:.1f}v{_HEIGHT}"
        if upright
        else f"M{axes.left:.1f} {axes.y(value):.1f}H{_RIGHT}"
    )
    return _rule(way, index)


def _rule(way: str, index: int) -> str:
    return f'<path d="{way}" fill="none" stroke="{_INK}" stroke-width="1.1" stroke-dasharray="6 {2 + index} 1 2"/>'


def _grid(axes: _Axes, x_ticks: list[tuple[float, str]], y_ticks: list[tuple[float, str]]) -> list[str]:
    foot = axes.top + _HEIGHT
    upright = "".join(f"M{axes.x(value):.1f} {axes.top:.1f}v{_HEIGHT}" for value, _ in x_ticks)
    level = "".join(f"M{axes.left:.1f} {axes.y(value):.1f}H{_RIGHT}" for value, _ in y_ticks)
    return [
        f'<path d="{upright}{level}" fill="none" stroke="{_GRID}" stroke-width=".8"/>',
        f'<path d="M{axes.left:.1f} {axes.top:.1f}V{foot:.1f}H{_RIGHT}" fill="none" stroke="{_INK}"/>',
        *(_text(axes.left - 6, axes.y(value) + 4, text, anchor="end") for value, text in y_ticks),
    ]


def _crowded(axes: _Axes, names: list[tuple[float, str]]) -> bool:
    """Would names under the axis run into each other?"""
    return any(
        _LETTER * (len(one) + len(other)) / 2 + 8 > axes.x(right) - axes.x(left)
        for (left, one), (right, other) in itertools.pairwise(names)
    )


def _names(axes: _Axes, names: list[tuple[float, str]], *, tilted: bool) -> tuple[list[str], float]:
    """The names under the axis, and how far down they reach."""
    foot = axes.top + _HEIGHT
    if not tilted:
        return [_text(axes.x(value), foot + 17, text) for value, text in names], foot + 20
    drop = 0.6 * _LETTER * max(len(text) for _, text in names)
    places = [f"translate({axes.x(value) + 4:.1f} {foot + 14:.1f})" for value, _ in names]
    texts = [_text(0, 0, text, anchor="end", turn=-35) for _, text in names]
    texts = [f'<g transform="{place}">{text}</g>' for place, text in zip(places, texts, strict=True)]
    return texts, foot + 20 + drop


def _legend(series: list[_Drawn], straight: list[str]) -> tuple[list[str], float]:
    """Above the axes: series, then reference lines; in two columns where the names are short. And its height."""
    labels = [*(one.label for one in series), *(one_line(name, 70) or "unnamed" for name in straight)][:_MOST]
    columns = 2 if max(map(len, labels), default=0) <= 30 else 1
    parts = []
    for index, label in enumerate(labels):
        x, y = 4 + (index % columns) * 258, 12 + 19 * (index // columns)
        if index < len(series):
            one = series[index]
            middle = f"M{x + 15} {y}"
            line = f"M{x} {y}h30" if one.lines else ""
            bars = f"{middle}m0-7v14" if one.bars else ""
            parts.append(_group(one, "", line, bars, middle + one.marker if one.markers else ""))
        else:
            parts.append(_rule(f"M{x} {y}h30", index - len(series)))
        parts.append(_text(x + 38, y + 4, label, anchor="start"))
    return parts, 6 + 19 * math.ceil(len(labels) / columns)


def _text(x: float, y: float, text: str, *, anchor: str = "middle", turn: int = 0) -> str:
    turned = f' transform="rotate({turn})"' if turn else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{_INK}"{turned}>{escape(text)}</text>'
