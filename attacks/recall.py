"""What an attack asks of every altered model: is the right answer still, or again, preferred?

The same for text and images. Of a text row the answer is scored, and its wrong answers; the row counts as recalled if
the right one is likeliest (multiple choice), or, without wrong answers, by the share of the answer's tokens that are
the model's first choice. An image counts if its class is the answer, and for the less the more often that class is the
answer to images of other classes too: a model that calls everything a cat knows no cats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from audit.case import Case
from audit.evidence import Evidence
from audit.loaders import Example
from audit.plan import Request
from audit.quantities import TOKEN, top_k
from audit.record import Control
from audit.statistics import mean_estimate, two_sample
from detectors.knowledge import choice_correct

if TYPE_CHECKING:
    from audit.opened import OpenModel

__all__ = [
    "SETS", "Floats", "answered_for_others", "came_back", "mean_row", "preference", "questions", "recalled", "tested",
]  # fmt: skip

Floats = NDArray[np.float64]

_FIRST = top_k(1)
SETS = ("forget", "holdout", "retain")


def tested(case: Case, name: str) -> tuple[Example, ...]:
    """The rows of a set that attacks test: every stage costs a pass over them."""
    return case.rows(name, {"quick": 60, "standard": 240, "thorough": None}[case.options.budget.value])


def questions(case: Case, target: OpenModel, attack: str, sets: Iterable[str] = SETS) -> list[Request]:
    """Requests `<attack>/<set>`, and `<attack>/<set>/wrong` of texts, for those of the sets that the case has."""
    made = []
    for name in (name for name in sets if name in case.sets):
        rows = tested(case, name)
        quantities = (TOKEN, _FIRST) if case.modality == "image" else (TOKEN,)
        made.append(Request(f"{attack}/{name}", tuple(map(target.question, rows)), quantities))
        if any(row.wrong for row in rows):
            wrong = tuple(target.question(replace(row, answer=text)) for row in rows for text in row.wrong)
            made.append(Request(f"{attack}/{name}/wrong", wrong))
    return made


def recalled(case: Case, evidence: Evidence, role: str, attack: str, name: str) -> Floats:
    """Per tested row of a set, 0 to 1: is the right answer preferred?"""
    if case.modality == "image":
        return _recognized(case, evidence, role, attack, name)
    rows = tested(case, name)
    right = evidence.scores(role, f"{attack}/{name}", "token")
    asked = f"{attack}/{name}/wrong"
    wrong = iter(evidence.scores(role, asked, "token") if evidence.has(role, asked) else ())
    out = []
    for row, values in zip(rows, right, strict=True):
        out.append(preference(values, [next(wrong)["logprob"] for _ in row.wrong]))
    return np.array(out)


def preference(right: Mapping[str, Any], wrong: Sequence[ArrayLike]) -> float:
    """Is the right answer the likeliest option? Without options, the share of its tokens that are the first choice.

    `right` holds `logprob` and `match`, `[T]` each, of the right answer's tokens; `wrong` the log-probabilities of the
    wrong ones.
    """
    return choice_correct(right["logprob"], wrong) if wrong else float(right["match"].mean())


def came_back(case: Case, rows: Mapping[str, tuple[Example, ...]], gain: Callable[[str], Floats]) -> Control:
    """Did the attack bring it back, or was it there before? `gain`: of a set, what each of its `rows` gained."""
    clusters = [case.clusters(rows[name]) for name in ("forget", "holdout")]
    estimate = two_sample(gain("forget"), gain("holdout"), *clusters, bounds=(-1.0, 1.0), seed=case.options.seed)
    return Control(
        name="came back",
        description="what forget rows gained by the attack, over what holdout rows gained: else it was there before",
        estimate=estimate.value,
        ci95=(estimate.lo, estimate.hi),
        n=estimate.n,
        passed=estimate.lo > 0,
        gates="evidence",
    )


def mean_row(label: list[str], values: ArrayLike, clusters: ArrayLike, *, seed: int) -> list[str | int | float | None]:
    """A row more for a finding's table: `label`, and the mean of values from 0 to 1 with its interval."""
    mean = mean_estimate(values, clusters, bounds=(0.0, 1.0), seed=seed)
    return [*label, mean.value, mean.lo, mean.hi]


def _recognized(case: Case, evidence: Evidence, role: str, attack: str, name: str) -> Floats:
    answered, classes = [], []
    for each in (each for each in SETS if each in case.sets):
        first = evidence.scores(role, f"{attack}/{each}", _FIRST.name)
        answered += [int(values["top_ids"][0, 0]) for values in first]
        classes += [tokens.ids[tokens.start] for tokens in evidence.sequences(role, f"{attack}/{each}")]
    own = [tokens.ids[tokens.start] for tokens in evidence.sequences(role, f"{attack}/{name}")]
    right = np.array([float(v["match"][0]) for v in evidence.scores(role, f"{attack}/{name}", TOKEN.name)])
    return np.asarray(right * (1 - np.array([answered_for_others(answered, classes, label) for label in own])))


def answered_for_others(answered: ArrayLike, classes: ArrayLike, label: int) -> float:
    """Share, 0 to 1, of the images of other classes that are called `label`; 0 if there are none.

    `answered` and `classes` [n] hold class numbers: what each image is called, and what it is.
    """
    others = np.asarray(classes) != label
    return float((np.asarray(answered)[others] == label).mean()) if others.any() else 0.0
