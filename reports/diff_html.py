"""Two audits side by side as one self-contained HTML file, in the style and under the policy of the report.

    from reports.diff import compare
    from reports.diff_html import write_diff

    write_diff(compare(Record.read(a), Record.read(b)), Path("audit-diff"))

From question to instrument to finding by `<details>`, without a script; then example by example. Nothing is drawn but
rows of a forest plot. Equal comparisons give equal bytes.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from audit.record import Control, Finding, Question, write_atomically
from reports import words
from reports.comparison import Comparison, FindingPair, QuestionPair, Relation
from reports.forest import forest, forest_pair
from reports.html import MAX_EXAMPLES, grouped, in_order, render


class Line(NamedTuple):
    """One line of a finding's table: what A has, and what B has."""

    name: str
    a: str
    b: str


class Row(NamedTuple):
    """One finding as the page draws it. `anchor` comes from its place, never from the record's text."""

    anchor: str
    pair: FindingPair
    marks: tuple[str, str]
    drawn: list[tuple[str, Markup]]
    lines: list[Line]
    controls: list[tuple[str, Control | None, Control | None]]


class Group(NamedTuple):
    """One instrument's findings on one question."""

    instrument: str
    rows: list[Row]
    changed: int


class Chapter(NamedTuple):
    """One question, and its instruments."""

    pair: QuestionPair
    groups: list[Group]


def render_diff(comparison: Comparison) -> str:
    """The whole page as one string; byte-identical for equal comparisons."""
    chapters = _chapters(comparison)
    rows = [row for chapter in chapters for group in chapter.groups for row in group.rows]
    shown = comparison.examples[:MAX_EXAMPLES]
    audits = (("A", comparison.a), ("B", comparison.b))
    return render(
        "diff.html.j2",
        ("report.css", "diff.css"),
        images=any(row and row.image for pair in shown for row in (pair.a, pair.b)),
        c=comparison,
        audits=audits,
        chapters=chapters,
        changed=[row for row in rows if row.pair.changed and row.pair.relation is not Relation.ONE],
        both=sum(row.pair.relation is not Relation.ONE for row in rows),
        total=len(rows),
        groups=grouped(shown),
        hidden_examples=len(comparison.examples) - len(shown),
        answers={key: sum(pair.answers == key for pair in comparison.examples) for key in ("same", "differ")},
        refusing=[row.what for row in comparison.mismatches if row.refuses],
        models=in_order(comparison.models),
        sets=in_order(comparison.sets),
    )


def write_diff(comparison: Comparison, out: Path) -> Path:
    """Render and write atomically as `diff.html` in the folder `out`, which is made if need be."""
    page = out / "diff.html"
    write_atomically(page, render_diff(comparison).encode())
    return page


def _chapters(comparison: Comparison) -> list[Chapter]:
    rows: dict[Question, list[Row]] = {question: [] for question in Question}
    for index, pair in enumerate(comparison.findings, start=1):
        rows[pair.question].append(_row(pair, f"finding-{index}"))
    chapters = []
    for answered in comparison.questions:
        ordered = sorted(rows[answered.a.question], key=lambda row: row.pair.instrument)
        groups = [(name, list(each)) for name, each in groupby(ordered, key=lambda row: row.pair.instrument)]
        chapters.append(
            Chapter(answered, [Group(name, each, sum(r.pair.changed for r in each)) for name, each in groups])
        )
    return chapters


def _row(pair: FindingPair, anchor: str) -> Row:
    a, b = pair.a, pair.b
    marks = tuple("untested" if finding is None else words.mark_of(finding) for finding in (a, b))
    drawn = [(name, forest(finding)) for name, finding in (("A", a), ("B", b)) if finding]
    if a and b and pair.relation is not Relation.OTHERWISE:
        drawn = [("A and B", forest_pair((marks[0], a), (marks[1], b)))]
    return Row(anchor, pair, (marks[0], marks[1]), drawn, _lines(a, b), _controls(a, b))


def _lines(a: Finding | None, b: Finding | None) -> list[Line]:
    """What a reader compares; lines that are empty in both are left out."""
    one, other = _values(a), _values(b)
    lines = [Line(name, one.get(name, ""), other.get(name, "")) for name in one or other]
    return [Line(name, x or "–", y or "–") for name, x, y in lines if x or y]


def _values(finding: Finding | None) -> dict[str, str]:
    if finding is None:
        return {}
    above, below = finding.fitted or (None, None)
    return {
        "Estimate": f"{words.number(finding.estimate, *finding.ci95)} {finding.unit}".rstrip(),
        "95 % interval": words.interval(finding.ci95, finding.estimate),
        "On the target’s forget rows alone": "" if finding.level is None else words.number(finding.level),
        "Compares": finding.split,
        "Layer or step": finding.layer or "",
        "Independent units (n)": words.cell(finding.n),
        "Null value": words.setting(finding.null_value),
        "Threshold": words.setting(finding.threshold),
        "Fitted threshold above, below": ""
        if above is None or below is None
        else f"{words.setting(above)}, {words.setting(below)}",
        "p, adjusted": words.p_value(finding.p_adjusted),
        "What is computed": finding.statistic,
        "Larger means": finding.orientation,
        "Null hypothesis": finding.null,
        "Why it says so": finding.reason,
    }


def _controls(a: Finding | None, b: Finding | None) -> list[tuple[str, Control | None, Control | None]]:
    one, other = ({c.name: c for c in finding.controls} if finding else {} for finding in (a, b))
    return [(name, one.get(name), other.get(name)) for name in dict.fromkeys([*one, *other])]
