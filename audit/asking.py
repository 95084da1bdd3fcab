"""What most instruments ask of an example: its answer scored, its options scored, its prompt continued.

The requests carry the same names whoever makes them, so that one pass serves all.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from audit.case import Case
from audit.evidence import Evidence
from audit.loaders import Example
from audit.plan import Generate, Request
from audit.quantities import TOKEN, Quantity

if TYPE_CHECKING:
    from audit.target import Target

Floats = NDArray[np.float64]

COMPARED = ("forget", "holdout", "retain")
"""The sets that a leakage detector compares."""


def compared(case: Case, role: str) -> list[str]:
    """Which of those sets the case has, and this role is asked about: all of them."""
    return [name for name in COMPARED if name in case.sets] if "+" not in role else []


def answers(
    case: Case, target: Target, sets: Iterable[str], quantities: tuple[Quantity, ...] = (TOKEN,)
) -> list[Request]:
    """Score every row's answer: request `<set>/answer`."""
    return [
        Request(f"{name}/answer", tuple(target.encode(r.prompt, r.answer) for r in case.rows(name)), quantities)
        for name in sets
    ]


def options(case: Case, target: Target, sets: Iterable[str]) -> list[Request]:
    """Score every row's paraphrases and wrong answers: requests `<set>/paraphrase` and `<set>/wrong`."""
    made: list[Request] = []
    for name in sets:
        rows = case.rows(name)
        for kind, texts in (
            ("paraphrase", [r.paraphrases for r in rows]),
            ("wrong", [r.wrong for r in rows]),
        ):
            encoded = tuple(target.encode(r.prompt, t) for r, ts in zip(rows, texts, strict=True) for t in ts)
            made.append(Request(f"{name}/{kind}", encoded))
    return made


def continuations(case: Case, target: Target, sets: Iterable[str]) -> list[Generate]:
    """Continue every row's prompt, or the first half of a plain passage: request `<set>/continued`."""
    made: list[Generate] = []
    length = new_tokens(case)
    for name in sets:
        prompts = []
        for row in continued_rows(case, name):
            if row.prompt:
                prompts.append(target.encode_prompt(row.prompt, room=length))
            else:
                prompts.append(target.encode_opening(row.answer))
        made.append(Generate(f"{name}/continued", tuple(prompts), length))
    return made


def unprompted(case: Case) -> str | None:
    """Why a case cannot be asked: a passage has no question. None if every compared row has a prompt."""
    rows = (row for name in COMPARED if name in case.sets for row in case.rows(name))
    return None if all(row.prompt for row in rows) else "needs a prompt in every row"


def continued_rows(case: Case, name: str) -> tuple[Example, ...]:
    """The rows whose prompts are continued: generation costs a pass a token, so fewer than are scored."""
    return case.rows(name, {"quick": 40, "standard": 120, "thorough": None}[case.options.budget.value])


def new_tokens(case: Case) -> int:
    """Length of a continuation: enough for the forget set's longest answer, up to what the budget allows."""
    longest = max(len(row.answer) for row in case.rows("forget"))
    limit = {"quick": 32, "standard": 48, "thorough": 128}[case.options.budget.value]
    # Four characters a token is usual; a small vocabulary needs more, a word-level one fewer.
    return int(min(limit, max(4, longest // 2)))


def expected_continuation(row: Example) -> str:
    """What a verbatim continuation would say: the answer, or the second half of a plain passage."""
    if row.prompt:
        return row.answer
    words = row.answer.split()
    return " ".join(words[len(words) // 2 :])


def logprobs(evidence: Evidence, role: str, request: str) -> list[Any]:
    """Per sequence of a request, the log-probabilities of its scored tokens."""
    return [values["logprob"] for values in evidence.iterate(role, request, "token")]


def grouped(case: Case, evidence: Evidence, role: str, name: str, kind: str) -> list[list[Any]]:
    """Per row, the log-probabilities of each paraphrase or wrong answer (`kind`)."""
    flat = logprobs(evidence, role, f"{name}/{kind}")
    field = {"paraphrase": "paraphrases", "wrong": "wrong"}[kind]
    bounds = accumulate((len(getattr(row, field)) for row in case.rows(name)), initial=0)
    return [flat[a:b] for a, b in pairwise(bounds)]
