"""A snippet for a Hugging Face model card: evaluation results as front matter (`model-index`), and a short section.

Paste the front matter into the card's own, and the section below it. Strings are written as JSON, which YAML reads as
it is; findings without an estimate are left out of the index, which knows no missing value, and not out of the section.
"""

from __future__ import annotations

import json

from audit.record import Finding, Outcome, Question, Record
from reports import words
from reports.faces.markdown import escaped, table
from reports.faces.parts import NAME, NOT_ADVICE, digest, line, source_url


def render_model_card(record: Record) -> str:
    """Front matter and section."""
    return "\n".join(["---", *_front_matter(record), "---", "", *_section(record)]) + "\n"


def _text(text: str, limit: int = NAME) -> str:
    """A YAML scalar. What YAML forbids in a string `line` has made visible."""
    return json.dumps(line(text, limit), ensure_ascii=False)


def _front_matter(record: Record) -> list[str]:
    target = record.models.get("target")
    groups: dict[tuple[Question, str], list[Finding]] = {}
    for finding in record.findings:
        if finding.estimate is not None:
            groups.setdefault((finding.question, finding.split), []).append(finding)
    lines = ["model-index:", f"- name: {_text(target.name if target else record.case.name)}"]
    lines.append("  results:" if groups else "  results: []")
    for (question, split), findings in groups.items():
        lines += [
            "  - task:",
            '      type: "unlearning-audit"',
            f"      name: {_text('Unlearning audit: ' + question.value)}",
            "    dataset:",
            '      type: "unlearning-audit"',
            f"      name: {_text(split or record.case.name)}",
            "    metrics:",
        ]
        for finding in findings:
            lines += _metric(finding)
    return lines


def _metric(finding: Finding) -> list[str]:
    low, high = (json.dumps(end) for end in finding.ci95)
    lines = [
        f"    - type: {_text(finding.id)}",
        f"      name: {_text(finding.statistic)}",
        f"      value: {json.dumps(finding.estimate)}",
        "      args:",
        f"        ci95: [{low}, {high}]",
        f"        unit: {_text(finding.unit)}",
        f"        verdict: {_text(finding.verdict.value)}",
        f"        side: {_text(finding.side.value)}",
    ]
    url = source_url(finding)
    return lines if url is None else [*lines, f"        source: {_text(url)}"]


def _section(record: Record) -> list[str]:
    label, plain = words.LABELS[record.verdict.label]
    seen = sum(finding.verdict is Outcome.EVIDENCE for finding in record.findings)
    lines = [
        "## Unlearning audit",
        "",
        f"**{label}.** {plain}",
        "",
        escaped(record.verdict.statement),
        "",
        *table(
            ["question", "answer", "why"],
            [[answer.asked, words.MARKS[answer.mark][1], escaped(answer.line)] for answer in words.answers(record)],
        ),
        f"{words.plural(len(record.findings), 'finding')}, {seen} with evidence; "
        f"{words.plural(len(record.not_run), 'instrument')} did not run. "
        f"False-positive rate: {escaped(words.error_rate(record.verdict.false_positive_rate))} "
        f"Power: {escaped(words.power(record.verdict.power))}",
        "",
    ]
    if record.verdict.limits:
        lines += ["What this audit does not show:", "", *(f"- {escaped(text)}" for text in record.verdict.limits), ""]
    tool = escaped(f"{record.tool.name} {record.tool.version}", NAME)
    return [*lines, f"{NOT_ADVICE} Made by {tool} from a record with SHA-256 `{digest(record)}`."]
