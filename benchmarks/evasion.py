"""Evasive organisms: what each question says of a model that was made to pass a test, and what the verdict is.

    python -m benchmarks.evasion --root bench --seeds 0 --budget quick
    python -m benchmarks.evasion --root bench --seeds 0 --only consistency --histories original,retrained,npo

Builds and scans as `audit bench` does, and keeps its rows; prints one Markdown table. With `--only` the verdict is that
of these instruments alone.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")

if TYPE_CHECKING:
    from audit.bench.rows import Row
    from audit.record import Question

HISTORIES = (
    "evades-benchmark", "evades-strings", "evades-remind", "evades-probes", "evades-logprobs", "evades-answers",
)  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """One line an organism: who found knowledge, by question; what contradicts itself; the verdict."""
    from audit.record import Question

    asked = (Question.LEAKAGE, Question.REPRESENTATION, Question.RECOVERY)
    lines = [
        f"| organism | is | access | {' | '.join(q.value for q in asked)} | drawn | greedy | flat | verdict |",
        "|---|---|---|" + "---|" * (len(asked) + 4),
    ]
    for row in rows:
        cells = [row.name, row.broken or row.label, row.access, *(_found(row, question) for question in asked)]
        cells += [_measured(row, f"consistency/{name}") for name in ("drawn", "greedy", "flat")]
        lines.append(f"| {' | '.join(cells)} | {row.verdict.value if row.verdict else '–'} |")
    return "\n".join(lines)


def _found(row: Row, question: Question) -> str:
    """The instruments whose evidence of remaining knowledge decides; in brackets those whose evidence does not."""
    from audit.record import Outcome, Side

    group = [f for f in row.findings if f.question == question]
    left = [f for f in group if f.verdict == Outcome.EVIDENCE and f.side == Side.REMAINS]
    decide = dict.fromkeys(f.instrument for f in left if f.decides[0 if f.side == f.sides[0] else 1])
    hint = dict.fromkeys(f.instrument for f in left if f.instrument not in decide)
    said = [*decide, *(f"({name})" for name in hint)]
    return ", ".join(said) or ("no evidence" if group else "–")


def _measured(row: Row, identity: str) -> str:
    from audit.record import Outcome

    found = next((f for f in row.findings if f.id == identity), None)
    if found is None or found.estimate is None:
        return "–"
    lo, hi = (0.0 if end is None else end for end in found.ci95)
    mark = "**" if found.verdict == Outcome.EVIDENCE else ""
    return f"{mark}{found.estimate:.2f}{mark} [{lo:.2f}, {hi:.2f}] {found.verdict.value}"


def main() -> None:
    """Build, scan and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evasion")
    parser.add_argument("--root", type=Path, default=Path("bench"))
    parser.add_argument("--base", default="llama")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--budget", default="quick")
    parser.add_argument("--histories", default=",".join(HISTORIES))
    parser.add_argument("--only", default="")
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    from audit.bench.rows import run
    from audit.organisms.recipes import Recipe

    wanted = [
        Recipe(given.base, history, int(seed))
        for seed in given.seeds.split(",")
        for history in given.histories.split(",")
    ]
    only = [name for name in given.only.split(",") if name]
    print(table(run(wanted, given.root, budget=given.budget, workers=given.workers, only=only)))


if __name__ == "__main__":
    main()
