"""The findings of audits as Markdown, for `docs/studies.md`: `python -m benchmarks.table OUT [OUT …]`."""

from __future__ import annotations

import sys
from pathlib import Path

from audit.record import Record
from reports.words import interval, number, p_value


def table(record: Record) -> str:
    """Verdict, cost and one row a finding."""
    sets = ", ".join(f"{name} {entry.count} rows" for name, entry in record.case.sets.items())
    seconds, tokens = record.cost.seconds, record.cost.forward_tokens
    lines = [
        f"**`{record.verdict.label}`**: {'; '.join(record.verdict.reasons)}. {sets}. {seconds:.0f} s, "
        f"{tokens} forward tokens, peak {record.cost.peak_memory_bytes / 2**30:.1f} GiB.",
        "",
        "| finding | estimate [95 % CI] | n | p adjusted | says |",
        "|---|---|---|---|---|",
    ]
    for f in record.findings:
        says = f.verdict.value if f.verdict.value != "evidence" else f"evidence: {f.side.value}"
        estimate = f"{number(f.estimate, *f.ci95)} {interval(f.ci95, f.estimate)}"
        lines.append(f"| {f.id} | {estimate} | {f.n} | {p_value(f.p_adjusted)} | {says} |")
    lines += [f"\nNot run: {n.instrument} ({n.reason})" for n in record.not_run]
    return "\n".join(lines)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"### {name}\n\n{table(Record.read(Path(name)))}\n")
