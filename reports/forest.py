"""A finding as one row of a forest plot: estimate, interval, null value and threshold zone, as inline SVG.

Horizontal positions are percentages and there is no `viewBox`, so the row stretches with the page while its
type keeps its size, on paper and on a telephone alike. Style comes from the page's stylesheet, by class.
"""

from __future__ import annotations

import math

from markupsafe import Markup, escape

from audit.record import Finding
from reports.words import interval, number, setting

_TOP, _AXIS, _HEIGHT = 20, 62, 84
_MIDDLE = (_TOP + _AXIS) // 2


def forest(finding: Finding) -> Markup:
    """The row as an `<svg>` with a text alternative; a sentence where nothing can be drawn."""
    lo, hi = finding.ci95
    if finding.estimate is None and (lo, hi) == (None, None):
        return Markup('<p class="quiet">No estimate, so no row to draw.</p>')
    zone = (finding.null_value - finding.threshold, finding.null_value + finding.threshold)
    known = [value for value in (*zone, finding.null_value, lo, hi, finding.estimate) if value is not None]
    if not all(math.isfinite(value) and abs(value) < 1e100 for value in known):
        return Markup('<p class="quiet">This row cannot be drawn: a value is out of range.</p>')
    low, high = _domain(known)

    def at(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.2f}%"

    parts = [
        Markup('<rect class="zone" x="{}" y="{}" width="{}" height="{}"/>').format(
            at(zone[0]), _TOP, f"{100 * (zone[1] - zone[0]) / (high - low):.2f}%", _AXIS - _TOP
        )
    ]
    parts += [_line("zone-edge", at(edge), at(edge), _TOP, _AXIS) for edge in zone]
    parts += [
        _line("axis", "0%", "100%", _AXIS, _AXIS),
        _line("null", at(finding.null_value), at(finding.null_value), _TOP - 4, _AXIS),
        _label("null-label", finding.null_value, low, high, _TOP - 8, f"null {setting(finding.null_value)}"),
    ]
    for tick in _ticks(low, high):
        parts += [
            _line("axis", at(tick), at(tick), _AXIS, _AXIS + 4),
            _label("tick", tick, low, high, _AXIS + 18, _tick_text(tick, low, high)),
        ]
    if (lo, hi) != (None, None):
        parts.append(_line("ci", "0%" if lo is None else at(lo), "100%" if hi is None else at(hi), _MIDDLE, _MIDDLE))
        parts += [_line("ci", at(end), at(end), _MIDDLE - 7, _MIDDLE + 7) for end in (lo, hi) if end is not None]
    if finding.estimate is not None:
        parts.append(
            Markup('<svg x="{}" y="{}" overflow="visible"><path class="estimate" d="M0-7 7 0 0 7-7 0Z"/></svg>').format(
                at(finding.estimate), _MIDDLE
            )
        )
    alt = (
        f"Estimate {number(finding.estimate, lo, hi)}, "
        f"95 % interval {interval(finding.ci95, finding.estimate)}; null value "
        f"{setting(finding.null_value)}, threshold zone {setting(zone[0])} to {setting(zone[1])}."
    )
    return Markup('<svg class="forest" role="img" aria-label="{}" width="100%" height="{}">{}</svg>').format(
        alt, _HEIGHT, Markup("").join(parts)
    )


def _domain(known: list[float]) -> tuple[float, float]:
    low, high = min(known), max(known)
    pad = 0.08 * (high - low) or max(abs(low) * 0.1, 1e-6)
    return low - pad, high + pad


def _ticks(low: float, high: float) -> list[float]:
    """Three to seven round values inside the domain."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= 7)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _tick_text(tick: float, low: float, high: float) -> str:
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
