"""A summary in GitHub's Markdown, for a pull request or an issue.

Text of the record is shown as text: nothing in it becomes a link, a picture, HTML, a mention, a reference to an
issue, mathematics, or another cell of a table. What Markdown itself reads is escaped. What GitHub looks for
afterwards, in the text of the rendered page (`@name`, `#1`, web addresses), is split by a zero-width space, written as
an entity so that it can be seen in the source.
"""

from __future__ import annotations

import re

from audit.record import Finding, Outcome, Record
from reports import words
from reports.faces.parts import NAME, NOT_ADVICE, controls, digest, line

_SPLIT = "&#8203;"
_MARKS = str.maketrans(
    {character: f"\\{character}" for character in "\\`*_[]|~!"}
    | {"&": "&amp;", "<": "&lt;", ">": "&gt;", "$": "<span>$</span>", "@": f"@{_SPLIT}", "#": f"\\#{_SPLIT}"}
)
_ADDRESS = re.compile(r"(?i)(?=://)|(?<=www)(?=\.)|(?<=GH)(?=-\d)")
_OPENS = re.compile(r"^([-+=]|\d+(?=[.)](?:\s|$)))")


def escaped(text: str, limit: int = 2_000) -> str:
    """`text` on one line, as text and nothing else, wherever Markdown takes a run of text."""
    text = line(text, limit).translate(_MARKS)
    text = _ADDRESS.sub(_SPLIT, text)
    return _OPENS.sub(lambda match: f"\\{match[1]}" if match[1] in "-+=" else f"{match[1]}{_SPLIT}", text)


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table. Cells are Markdown already."""
    every = [columns, ["---"] * len(columns), *rows]
    return [*(f"| {' | '.join(cells)} |" for cells in every), ""]


def render_markdown(record: Record) -> str:
    """The summary."""
    label, plain = words.LABELS[record.verdict.label]
    target = record.models.get("target")
    about = escaped(record.case.name, NAME) or "an audit without a name"
    lines = [
        f"## Unlearning audit: {label}",
        "",
        f"**{plain}**",
        "",
        escaped(record.verdict.statement),
        "",
        f"- Case: {about}",
        f"- Target: {escaped(target.name, NAME)}, {target.parameters:,} parameters" if target else "- Target: none",
        f"- False-positive rate: {escaped(words.error_rate(record.verdict.false_positive_rate))}",
        f"- Power: {escaped(words.power(record.verdict.power))}",
        "",
    ]
    rows = [
        [f"**{answer.title}**", words.MARKS[answer.mark][0], escaped(answer.line)] for answer in words.answers(record)
    ]
    lines += table(["question", "answer", "why"], rows)
    lines += _findings("What was found", [f for f in record.findings if f.verdict is Outcome.EVIDENCE], fold=False)
    rest = [finding for finding in record.findings if finding.verdict is not Outcome.EVIDENCE]
    lines += _findings("Silent and inconclusive", rest, fold=True)
    if record.not_run:
        state = {True: "crashed", False: "not run"}
        rows = [[escaped(n.instrument, NAME), state[n.failed], escaped(n.reason, 400)] for n in record.not_run]
        lines += ["### What did not run", "", *table(["instrument", "state", "reason"], rows)]
    if record.verdict.limits:
        lines += ["### Limits", "", *(f"- {escaped(text)}" for text in record.verdict.limits), ""]
    tool = escaped(f"{record.tool.name} {record.tool.version}", NAME)
    lines.append(f"{NOT_ADVICE} Made by {tool} from a record with SHA-256 `{digest(record)}`.")
    return "\n".join(lines) + "\n"


def _findings(title: str, findings: list[Finding], *, fold: bool) -> list[str]:
    if not findings:
        return []
    columns = ["question", "statistic", "estimate [95 % CI]", "threshold", "p adj.", "controls", "says"]
    rows = table(columns, [_row(finding) for finding in findings])
    if fold:
        return [f"<details><summary>{title} ({len(findings)})</summary>", "", *rows, "</details>", ""]
    return [f"### {title}", "", *rows]


def _row(finding: Finding) -> list[str]:
    numbers = f"{words.number(finding.estimate, *finding.ci95)} {words.interval(finding.ci95, finding.estimate)}"
    says = words.MARKS[words.mark_of(finding)][0]
    reason = f": {escaped(finding.reason, 400)}" if finding.reason else ""
    return [
        finding.question.value,
        f"{escaped(finding.statistic, 400)} ({escaped(finding.split, NAME)}; {escaped(finding.id, NAME)})",
        escaped(f"{numbers} {finding.unit}", NAME),
        f"{words.number(finding.null_value)} ± {words.number(finding.threshold)}",
        words.p_value(finding.p_adjusted) if finding.p_adjusted is not None else "–",
        escaped(controls(finding), 600) or "none",
        f"{says}{reason}",
    ]
