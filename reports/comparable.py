"""Whether two audits may be compared: in what they themselves differ, and which rows that touches.

A record does not list every set or model that an instrument uses. So a finding that names what differs, in what it
compares or in its controls, is touched surely, and every other perhaps.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TypeVar

from audit.record import Finding, Record, SetEntry
from reports import words
from reports.comparison import Caveat, Mismatch

_ELSEWHERE = ("seed", "device", "dtype", "only", "skip", "memory", "allow")
"""Options that the record holds in its environment or its limits too, or that choose instruments unchanged."""
_Item = TypeVar("_Item")


def mismatches(a: Record, b: Record) -> Iterator[Mismatch]:
    """All in which two audits differ, save in the model under audit."""
    for name, x, y in paired(a.case.sets, b.case.sets):
        if x is None or y is None or x.digest != y.digest:
            yield _named(f"{name} set", name, _set_words(x), _set_words(y))
    for role, left, right in paired(a.models, b.models):
        if role != "target" and left and right and left.digest != right.digest:
            yield _named(f"{role} model", role, left.digest[:12], right.digest[:12])
        elif role != "target" and not (left and right):
            touches = "findings that use it are measured otherwise or missing, and say so one by one"
            yield _row(f"{role} model", "given" if left else "none", "given" if right else "none", touches)
    everything = [
        ("seed", str(a.environment.seed), str(b.environment.seed)),
        ("tool version", f"{a.tool.name} {a.tool.version}", f"{b.tool.name} {b.tool.version}"),
        ("schema version", a.schema_version, b.schema_version),
    ]
    options = paired(a.case.options, b.case.options)
    everything += [
        (f"option {name}", _option(one), _option(other)) for name, one, other in options if name not in _ELSEWHERE
    ]
    for what, one, other in everything:
        if one != other:
            touches = "every finding and every example"
            yield Mismatch(what=what, a=one, b=other, refuses=True, touches=touches, scope="all")
    if a.verdict.profile != b.verdict.profile:
        yield Mismatch(
            what="reference profile",
            a=a.verdict.profile or "none fits",
            b=b.verdict.profile or "none fits",
            refuses=False,
            touches="no estimate; the verdict, and the outcomes of findings marked ‘fitted threshold’",
            scope="verdict",
        )
    for what in ("only", "skip"):
        one, other = (_option(record.case.options.get(what)) for record in (a, b))
        if one != other:
            touches = "which instruments ran, and over how many findings a p-value is adjusted"
            yield _row(f"instruments: {what}", one, other, touches)
    one, other = (_option(record.case.options.get("memory")) for record in (a, b))
    if one != other:
        touches = "which attacks ran; every number a little, about as much as the numeric noise of the audits"
        yield _row("memory", one, other, touches)
    one, other = (", ".join(sorted(_unknown(x, y))) or "none" for x, y in ((b, a), (a, b)))
    if one != other:
        touches = "the findings of those; whatever their versions say, the tools were not quite the same"
        yield _row("instruments unknown", one, other, touches)
    for what in ("device", "dtype", "threads", "platform", "python"):
        one, other = (str(getattr(record.environment, what)) for record in (a, b))
        if one != other:
            yield _row(what, one, other, "every number a little, about as much as the numeric noise of the audits")
    for name, before, after in paired(a.environment.packages, b.environment.packages):
        if before != after:
            yield _row(f"package {name}", before or "none", after or "none", "every number perhaps, and rarely by much")


def _named(what: str, name: str, a: str, b: str) -> Mismatch:
    touches = f"findings that name {name}; perhaps others, for a record does not list all that an instrument uses"
    return Mismatch(what=what, a=a, b=b, refuses=True, touches=touches, scope="named", name=name)


def _row(what: str, a: str, b: str, touches: str) -> Mismatch:
    return Mismatch(what=what, a=a, b=b, refuses=False, touches=touches, scope="none")


def _set_words(entry: SetEntry | None) -> str:
    return "none" if entry is None else f"{words.plural(entry.count, 'row')}, SHA-256 {entry.digest[:12]}"


def _option(value: str | int | float | bool | None) -> str:
    return "not set" if value in (None, "") else str(value)


def caveats(rows: Iterable[Mismatch], a: Finding | None, b: Finding | None) -> list[Caveat]:
    """What the mismatches take from one finding."""
    found = []
    texts = [text for finding in (a, b) if finding for text in _speaks_of(finding)]
    for row in rows:
        if row.scope == "all":
            found.append(Caveat(what=row.what))
        elif row.scope == "named":
            word = re.compile(rf"(?<!\w){re.escape(row.name)}(?!\w)")
            found.append(Caveat(what=row.what, sure=any(word.search(text) for text in texts)))
    return found


def _speaks_of(finding: Finding) -> Iterator[str]:
    yield finding.split
    for control in finding.controls:
        yield control.name
        yield control.description


def example_caveats(rows: Iterable[Mismatch]) -> list[Caveat]:
    """Examples are forget rows, so another forget set touches them surely."""
    named = {"all": True, "named": False}
    return [Caveat(what=row.what, sure=named[row.scope] or row.name == "forget") for row in rows if row.scope in named]


def unasked(instrument: str, record: Record) -> bool:
    """Whether the audit was told to leave this instrument out."""
    only, skip = (str(record.case.options.get(name) or "").split(",") for name in ("only", "skip"))
    return instrument in skip or (only != [""] and instrument not in only)


def _unknown(had: Record, lacks: Record) -> set[str]:
    """Instruments of one audit that the other neither ran, nor says why not, nor was told to leave out."""
    told = {finding.instrument for finding in lacks.findings} | {row.instrument for row in lacks.not_run}
    return {f.instrument for f in had.findings if f.instrument not in told and not unasked(f.instrument, lacks)}


def paired(a: dict[str, _Item], b: dict[str, _Item]) -> Iterator[tuple[str, _Item | None, _Item | None]]:
    """Both mappings by name, in an order that neither decides."""
    for name in sorted({*a, *b}):
        yield name, a.get(name), b.get(name)
