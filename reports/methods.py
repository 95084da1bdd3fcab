"""Method cards: what each instrument does and cannot tell, for a reader who is no engineer.

The record holds an instrument's name and what it measured. What it *is* stands here, for the project's own, in
`templates/methods.toml`; of a third party's the report has its findings' own words.
"""

from __future__ import annotations

import functools
import tomllib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from audit.record import Finding, NotRun
from reports.words import MARKS, mark_of


class Method(NamedTuple):
    """One instrument on one question: what it is, and what came of it. `marks`: key and count, alarms first."""

    name: str
    title: str
    plain: str
    blind: str
    sources: list[str]
    marks: list[tuple[str, int]]
    not_run: list[NotRun]


@functools.cache
def described() -> dict[str, dict[str, str]]:
    """By instrument: `title`, `plain` (what it does) and `blind` (what it cannot tell)."""
    return tomllib.loads((Path(__file__).parent / "templates" / "methods.toml").read_text("utf-8"))


def methods(findings: Sequence[Finding], not_run: Sequence[NotRun]) -> list[Method]:
    """A card for every instrument that was asked for on one question, in the order of the record."""
    names = dict.fromkeys([finding.instrument for finding in findings] + [row.instrument for row in not_run])
    return [
        _method(
            name,
            [finding for finding in findings if finding.instrument == name],
            [row for row in not_run if row.instrument == name],
        )
        for name in names
    ]


def _method(name: str, findings: list[Finding], not_run: list[NotRun]) -> Method:
    counts = Counter(mark_of(finding) for finding in findings)
    text = described().get(name) or _foreign(findings)
    return Method(
        name,
        text["title"],
        text["plain"],
        text["blind"],
        list(dict.fromkeys(finding.reference for finding in findings)),
        [(key, counts[key]) for key in MARKS if counts[key]],
        not_run,
    )


def _foreign(findings: list[Finding]) -> dict[str, str]:
    """Of an instrument that this report does not know: what its findings say that they measured."""
    measured = "; ".join(dict.fromkeys(f"{f.statistic} (larger means: {f.orientation})" for f in findings))
    return {
        "title": "An instrument of a third party",
        "plain": f"This report has no description of it. It measured: {measured}." if findings else
        "This report has no description of it.",
        "blind": "Not known to this report.",
    }  # fmt: skip
