"""Findings as rows of a forest plot: estimate, interval, null value and threshold zone, as inline SVG.

Horizontal positions are percentages and there is no `viewBox`, so the row stretches with the page while its
type keeps its size, on paper and on a telephone alike. Style comes from the page's stylesheet, by class.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from markupsafe import Markup, escape

from audit.record import Finding
from reports.words import interval, number, setting

_TOP, _LANE, _FOOT = 20, 42, 22
_UNDER = 16  # for the second null value's label, where two audits have one each


def forest(finding: Finding) -> Markup:
    """The row as an `<svg>` with a text alternative; a sentence where nothing can be drawn."""
    return _forest([("", "", finding)])


def forest_pair(a: tuple[str, Finding], b: tuple[str, Finding]) -> Markup:
    """Two audits' rows of one quantity on one axis, A above B; each (key of its mark, finding)."""
    return _forest([("A", *a), ("B", *b)])


def _forest(rows: list[tuple[str, str, Finding]]) -> Markup:
    """Rows of (name, mark, finding) over one axis."""
    if all(finding.estimate is None and finding.ci95 == (None, None) for _, _, finding in rows):
        return Markup('<p class="quiet">No estimate, so no row to draw.</p>')
    findings = [finding for _, _, finding in rows]
    known = [value for finding in findings for value in _values(finding) if value is not None]
    if not all(math.isfinite(value) and abs(value) < 1e100 for value in known):
        return Markup('<p class="quiet">This row cannot be drawn: a value is out of range.</p>')
    low, high = _domain(known)

    def at(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.2f}%"

    axis = _TOP + _LANE * len(rows)
    parts, alts = [], []
    for index, (name, mark, finding) in enumerate(rows):
        top = _TOP + _LANE * index
        row = Markup("").join(_row(finding, at, top, top + _LANE, first=index == 0))
        parts.append(Markup('<g class="edge-{}">{}</g>').format(mark, row) if mark else row)
        if name:
            parts.append(Markup('<text class="lane" x="0" y="{}">{}</text>').format(top + _LANE // 2 + 4, name))
        alts.append((f"{name}: " if name else "") + _alternative(finding))
    nulls = [finding.null_value for finding in findings]
    parts.append(_label("null-label", nulls[0], low, high, _TOP - 8, f"null {setting(nulls[0])}"))
    height = axis + _FOOT
    if len(set(nulls)) > 1:
        parts.append(_label("null-label", nulls[1], low, high, height + _UNDER - 6, f"null of B {setting(nulls[1])}"))
        height += _UNDER
    parts.append(_line("axis", "0%", "100%", axis, axis))
    for tick in ticks(low, high):
        parts += [
            _line("axis", at(tick), at(tick), axis, axis + 4),
            _label("tick", tick, low, high, axis + 18, tick_text(tick, low, high)),
        ]
    return Markup('<svg class="forest" role="img" aria-label="{}" width="100%" height="{}">{}</svg>').format(
        " ".join(alts), height, Markup("").join(parts)
    )


def _values(finding: Finding) -> tuple[float | None, ...]:
    return (*_zone(finding), finding.null_value, *finding.ci95, finding.estimate)


def _zone(finding: Finding) -> tuple[float, float]:
    return finding.null_value - finding.threshold, finding.null_value + finding.threshold


def _row(finding: Finding, at: Callable[[float], str], top: int, bottom: int, *, first: bool) -> list[Markup]:
    """Zone, null value, interval and estimate between two heights; the first row's null value reaches its label."""
    (lo, hi), (left, right), middle = finding.ci95, _zone(finding), (top + bottom) // 2
    width = f"{float(at(right)[:-1]) - float(at(left)[:-1]):.2f}%"
    parts = [
        Markup('<rect class="zone" x="{}" y="{}" width="{}" height="{}"/>').format(at(left), top, width, bottom - top)
    ]
    parts += [_line("zone-edge", at(edge), at(edge), top, bottom) for edge in (left, right)]
    parts.append(_line("null", at(finding.null_value), at(finding.null_value), top - 4 * first, bottom))
    if (lo, hi) != (None, None):
        parts.append(_line("ci", "0%" if lo is None else at(lo), "100%" if hi is None else at(hi), middle, middle))
        parts += [_line("ci", at(end), at(end), middle - 7, middle + 7) for end in (lo, hi) if end is not None]
    if finding.estimate is not None:
        parts.append(
            Markup('<svg x="{}" y="{}" overflow="visible"><path class="estimate" d="M0-7 7 0 0 7-7 0Z"/></svg>').format(
                at(finding.estimate), middle
            )
        )
    return parts


def _alternative(finding: Finding) -> str:
    left, right = _zone(finding)
    return (
        f"Estimate {number(finding.estimate, *finding.ci95)}, 95 % interval "
        f"{interval(finding.ci95, finding.estimate)}; null value {setting(finding.null_value)}, "
        f"threshold zone {setting(left)} to {setting(right)}."
    )


def _domain(known: list[float]) -> tuple[float, float]:
    low, high = min(known), max(known)
    pad = 0.08 * (high - low) or max(abs(low) * 0.1, 1e-6)
    return low - pad, high + pad


def ticks(low: float, high: float) -> list[float]:
    """Three to seven round values inside the domain."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= 7)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def tick_text(tick: float, low: float, high: float) -> str:
    """The value of a tick, with the decimals that the domain asks for."""
    if abs(tick) < (high - low) * 1e-9:
        return "0"
    if not 1e-4 <= high - low < 1e7:
        return f"{tick:.2g}"
    return f"{tick:,.{max(0, 1 - math.floor(math.log10(high - low)))}f}".replace("-", "−")


def _line(style: str, x1: str, x2: str, y1: int, y2: int) -> Markup:
    return Markup('<line class="{}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(style, x1, x2, y1, y2)


def _label(style: str, value: float, low: float, high: float, y: int, text: str) -> Markup:
    """Text centred on `value`, or turned inwards near an edge, so that nothing is clipped."""
    share = (value - low) / (high - low)
    edge = 0.03 if style == "tick" else 0.1
    anchor = "start" if share < edge else "end" if share > 1 - edge else "middle"
    return Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>').format(
        style, f"{100 * share:.2f}%", y, anchor, escape(text)
    )
