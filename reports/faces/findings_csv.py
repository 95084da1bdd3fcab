"""CSV of the findings: one row a finding, with its interval, controls and verdict.

A spreadsheet runs a cell that begins with `=`, `+`, `-` or `@` as a formula, and text of a record can come from a
model or a plug-in. Such text gets an apostrophe in front (OWASP, "CSV Injection"), also behind a semicolon or a tab,
where a spreadsheet of another locale would begin a new cell. Numbers are this file's own, with all their digits.
UTF-8 without a mark, RFC 4180 lines.
"""

from __future__ import annotations

import csv
import io
import re

from audit.record import Finding, Record
from reports.faces.parts import controls, line

_FORMULA = re.compile(r"(^|[;\t])(\s*)(?=[=+\-@\uff1d\uff0b\uff0d\uff20])")


def render_csv(record: Record) -> str:
    """The table, header included."""
    out = io.StringIO()
    writer = csv.DictWriter(out, _COLUMNS, quoting=csv.QUOTE_NONNUMERIC)
    writer.writeheader()
    writer.writerows(_row(finding) for finding in record.findings)
    return out.getvalue()


def _row(finding: Finding) -> dict[str, str | int | float | None]:
    values = finding.row() | {"controls": controls(finding)}
    return {name: _cell(values[name]) for name in _COLUMNS}


def _cell(value: str | int | float | None) -> str | int | float | None:
    return guarded(value) if isinstance(value, str) else value


_COLUMNS = (
    *("id", "question", "instrument", "statistic", "split", "layer"),
    *("estimate", "ci95_low", "ci95_high", "bound", "unit", "n", "null_value", "threshold", "p_value", "p_adjusted"),
    *("verdict", "side", "controls_passed", "controls_failed", "controls", "reason"),
    *("larger_means", "null_hypothesis", "reference"),
)


def guarded(text: str) -> str:
    """`text` on one line, which no spreadsheet takes for a formula."""
    return _FORMULA.sub(r"\1\2'", line(text))
