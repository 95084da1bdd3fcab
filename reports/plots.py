"""A finding's figure as SVG: the same figure gives the same bytes.

Matplotlib draws with stand-in colours, which are then replaced by CSS variables with fallbacks: inlined in
the report, a plot follows its light or dark page; saved alone, it has the light page's colours. Style
attributes become presentation attributes, so the report's content policy can forbid inline style.
Identifiers carry a prefix, so many plots live in one page. Type stays text, laid out with the font that
Matplotlib brings along.

Matplotlib is imported on the first call only: it costs most of a second.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import re
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from audit.record import Figure, Series
from reports.escape import one_line, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH, _HEIGHT = 520, 310
_INK, _GRID, _PLATE = "#0a0b01", "#0a0b02", "#0a0b03"
_PAINT = {
    _INK: "var(--plot-ink, #3b4450)",
    _GRID: "var(--plot-grid, #d9dde2)",
    _PLATE: "var(--plot-plate, #ffffff)",
    "#0a0b11": "var(--plot-target, #1d4f91)",
    "#0a0b12": "var(--plot-control, #a34a00)",
    "#0a0b13": "var(--plot-reference, #56655d)",
}


@dataclass(frozen=True)
class _Look:
    """How a series' role is drawn: colour, dash and marker, so that colour is never the only carrier."""

    color: str
    dash: Any
    markers: str


_LOOKS = {
    "target": _Look("#0a0b11", "-", "oDPv"),
    "control": _Look("#0a0b12", (0, (5, 2)), "sX<p"),
    "reference": _Look("#0a0b13", (0, (1, 1.5)), "^*>d"),
}

_STYLE: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 12,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "palimpsest",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 12,
    "legend.handlelength": 2.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
# Where the process runs, not how a plot looks: never reset from Matplotlib's defaults.
_LEAVE = re.compile(r"backend|interactive|toolbar|timezone|webagg|tk\.|docstring|date\.epoch|savefig\.directory")


def draw(figure: Figure, prefix: str = "") -> str:
    """The figure as an `<svg>` element with its text alternative, safe to inline.

    Args:
        figure: `profile` (lines with bands over x), `distribution` (x holds the values; drawn as step
            histograms on common bins) or `bars` (points with error bars); any other kind is a profile.
        prefix: put before every identifier; unique within a page. By default, from the figure's digest.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    prefix = prefix or "f" + hashlib.sha256(figure.model_dump_json().encode()).hexdigest()[:8]
    rc: Any = {key: value for key, value in mpl.rcParamsDefault.items() if not _LEAVE.search(key)} | _STYLE
    buffer = io.BytesIO()
    with warnings.catch_warnings(), mpl.rc_context(rc):
        warnings.simplefilter("ignore")  # glyphs that the layout font lacks: the page's font may have them
        canvas = Canvas(figsize=(_WIDTH / 72, _HEIGHT / 72))
        FigureCanvasSVG(canvas)
        rows = math.ceil((len(figure.series) + len(figure.reference_lines)) / 2)
        top = max(0.5, 1 - (14 + 20 * rows) / _HEIGHT)
        axes = canvas.add_axes((0.12, 0.165, 0.86, top - 0.165))
        {"distribution": _histograms, "bars": _bars}.get(figure.kind, _lines)(axes, figure.series)
        place = axes.axvline if figure.kind == "distribution" else axes.axhline
        straight = [
            place(value, color=_INK, linewidth=1.1, linestyle=(0, (6, 2 + index, 1, 2)), label=_short(name))
            for index, (name, value) in enumerate(sorted(figure.reference_lines.items()))
            if _real(value) is not None
        ]
        if figure.ticks:
            axes.set_xticks(range(len(figure.ticks)), [one_line(name, 16) for name in figure.ticks])
        axes.margins(y=0.09)
        if not axes.has_data():
            axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", va="center")
        axes.set_xlabel(one_line(figure.x_label, 70))
        axes.set_ylabel(one_line(figure.y_label, 40))
        _legend(axes, straight)
        canvas.savefig(buffer, format="svg", metadata={"Date": None})
    return _inline(buffer.getvalue(), prefix, figure)


def _legend(axes: Axes, straight: list[Any]) -> None:
    """Above the axes: series, then reference lines; sixteen at most, for the table has them all."""
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda index: handles[index] in straight)[:16]
    if order:
        axes.legend(
            [handles[index] for index in order],
            [labels[index] for index in order],
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            ncols=2,
            borderaxespad=0.2,
            labelspacing=0.35,
        )


def _short(text: str) -> str:
    """A label for the legend, which would leave out one that begins with an underscore."""
    text = one_line(text, 38)
    return f" {text}" if text.startswith("_") else text or "unnamed"


def _looks(series: list[Series]) -> list[tuple[_Look, str, bool]]:
    """For each series its look, its marker, and whether the marker is hollow (every second one of a role)."""
    seen: dict[str, int] = {}
    looks = []
    for one in series:
        role = one.role if one.role in _LOOKS else "reference"
        index = seen[role] = seen.get(role, -1) + 1
        looks.append((_LOOKS[role], _LOOKS[role].markers[index % 4], index % 2 == 1))
    return looks


def _points(series: Series) -> list[tuple[float, float, float | None, float | None]]:
    """(x, y, lo, hi) wherever x and y are numbers that can be drawn."""
    count = min(len(series.x), len(series.y))
    lows = (series.lo or [None] * count) + [None] * count
    highs = (series.hi or [None] * count) + [None] * count
    points = []
    for x, y, lo, hi in zip(series.x, series.y, lows, highs, strict=False):
        if _real(x) is not None and (y := _real(y)) is not None:
            points.append((x, y, _real(lo), _real(hi)))
    return points


def _real(value: float | None) -> float | None:
    return value if value is not None and abs(value) < 1e100 else None


def _lines(axes: Axes, series: list[Series]) -> None:
    from matplotlib.ticker import MaxNLocator

    for one, (look, marker, hollow) in zip(series, _looks(series), strict=True):
        points = _points(one)
        xs = [point[0] for point in points]
        band = [(x, lo, hi) for x, _, lo, hi in points if lo is not None and hi is not None]
        if band:
            axes.fill_between(
                [x for x, _, _ in band],
                [lo for _, lo, _ in band],
                [hi for _, _, hi in band],
                color=look.color,
                alpha=0.16,
                linewidth=0,
            )
        axes.plot(
            xs,
            [point[1] for point in points],
            color=look.color,
            linestyle=look.dash,
            linewidth=1.6,
            marker=marker,
            markersize=4.5,
            markevery=max(1, len(points) // 24),
            markerfacecolor=_PLATE if hollow else look.color,
            label=_short(one.label),
        )
    if all(x == int(x) for one in series for x in one.x if _real(x) is not None):
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))


def _histograms(axes: Axes, series: list[Series]) -> None:
    """Share of each series' values per bin. Common bins, fewer where a series is small."""
    values = [[x for x in one.x if _real(x) is not None] for one in series]
    everything = [x for one in values for x in one]
    low, high = (min(everything), max(everything)) if everything else (0.0, 1.0)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    count = min(30, max(6, math.isqrt(min((len(one) for one in values if one), default=1)) * 2))
    edges = [low + (high - low) * index / count for index in range(count + 1)]
    for one, xs, (look, _, hollow) in zip(series, values, _looks(series), strict=True):
        shares = [0.0] * count
        for x in xs:
            shares[min(count - 1, int((x - low) / (high - low) * count))] += 1 / len(xs)
        style = {"color": look.color, "linestyle": look.dash, "label": f"{_short(one.label)} (n = {len(xs)})"}
        axes.stairs(shares, edges, linewidth=1.2 if hollow else 1.8, **style)
        if look is _LOOKS["target"]:
            axes.stairs(shares, edges, fill=True, color=look.color, alpha=0.13)


def _bars(axes: Axes, series: list[Series]) -> None:
    """Points with error bars, moved apart a little so that series do not hide each other."""
    xs = sorted({x for one in series for x in one.x if _real(x) is not None})
    gap = min((right - left for left, right in itertools.pairwise(xs)), default=1.0)
    step = 0.5 * gap / max(1, len(series))
    for index, (one, (look, marker, hollow)) in enumerate(zip(series, _looks(series), strict=True)):
        points = _points(one)
        moved = [point[0] + (index - (len(series) - 1) / 2) * step for point in points]
        below = [0.0 if lo is None else max(0.0, y - lo) for _, y, lo, _ in points]
        above = [0.0 if hi is None else max(0.0, hi - y) for _, y, _, hi in points]
        axes.errorbar(
            moved,
            [point[1] for point in points],
            yerr=[below, above],
            color=look.color,
            linestyle="none",
            marker=marker,
            markersize=5.5,
            markerfacecolor=_PLATE if hollow else look.color,
            capsize=3.5,
            linewidth=1.4,
            label=_short(one.label),
        )


def _inline(drawn: bytes, prefix: str, figure: Figure) -> str:
    """Only the `<svg>` element, without inline style, outside references, or identifiers that nothing uses.

    By the tree, not by text: a label may hold anything that looks like an attribute.
    """
    root = ElementTree.fromstring(drawn)
    used = {reference for element in root.iter() for reference in _references(element)}
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = dict(element.attrib)
        element.attrib.clear()
        for name, value in [*attributes.items(), *_declarations(attributes.pop("style", ""))]:
            name = name.rpartition("}")[2]
            if name in _DROPPED or (name == "id" and value not in used):
                continue
            if name == "id":
                value = f"{prefix}-{value}"
            elif name in _POINTERS:
                value = value.replace("#", f"#{prefix}-")
            element.set(name, _PAINT.get(value, value))
        if element.tag not in ("text", "tspan"):
            element.text = None
        element.tail = None
    for parent in list(root.iter()):
        for extra in [child for child in parent if child.tag in ("metadata", "style")]:
            parent.remove(extra)
    label = shown(figure.alt, 1000) or "no description"
    root.attrib.clear()
    root.attrib.update({"class": "plot", "role": "img", "aria-label": label})
    root.attrib.update({"viewBox": f"0 0 {_WIDTH} {_HEIGHT}", "font-family": "system-ui, sans-serif"})
    root.attrib.update({"stroke-linejoin": "round", "stroke-linecap": "butt"})
    return ElementTree.tostring(root, encoding="unicode")


_POINTERS = ("href", "clip-path")
_DROPPED = ("style", "font-family")


def _references(element: ElementTree.Element) -> list[str]:
    """The identifiers that an element points to."""
    values = (value for name, value in element.items() if name.endswith(_POINTERS))
    return [value.removeprefix("url(").strip("#)") for value in values]


def _declarations(style: str) -> list[tuple[str, str]]:
    """A style attribute's declarations, to stand as presentation attributes."""
    pairs = (declaration.partition(":") for declaration in style.split(";") if ":" in declaration)
    return [(name.strip(), value.strip()) for name, _, value in pairs]
