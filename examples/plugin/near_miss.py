"""Near miss: how near to being said is the right answer, where another is said?

For each token of an answer, r = the number of tokens that the model finds likelier. A row scores the mean of
1 / (1 + r) over its answer: 1 if every token is the model's first choice, 1/2 if each is the second, towards 0 if far.

Source: mean reciprocal rank, Voorhees 1999 (TREC-8 question answering); as a trace of what was forgotten, an example.

Traps:

- *Function words* are near in any text, so the level says nothing: only the distance from holdout rows does.
- *An edit of the output* moves ranks in a model that knows nothing as well. So this decides no verdict alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from audit import asking
from audit.case import Case
from audit.contrast import Statistic, against_never_taught
from audit.evidence import Evidence
from audit.instrument import Access, Instrument
from audit.plan import Request
from audit.quantities import Quantity, View
from audit.record import Finding, Question

if TYPE_CHECKING:
    import torch

    from audit.target import Target

__all__ = ["NearMiss", "nearness"]


def nearness(ranks: ArrayLike) -> float:
    """Mean of 1 / (1 + rank) over an answer's tokens, from ranks [T] that start at 0: in (0, 1], larger = nearer."""
    array = np.asarray(ranks, dtype=float)
    if array.ndim != 1 or array.size == 0 or array.min() < 0:
        raise ValueError(f"ranks must be a non-empty row of numbers from 0 up, got {ranks!r}")
    return float((1.0 / (1.0 + array)).mean())


def _ranks(view: View) -> dict[str, torch.Tensor]:
    """Computed while the logits are in memory; what is kept is one whole number a token."""
    own = view.logprobs.gather(1, view.tokens[:, None])
    return {"rank": (view.logprobs > own).sum(dim=1)}


RANK = Quantity("near-miss-rank", _ranks)
"""`rank` [T]: how many tokens are likelier than the right one."""

NEARNESS = Statistic(
    name="reciprocal-rank",
    words="mean reciprocal rank of the answer's tokens",
    unit="reciprocal rank",
    orientation="right answers are nearer to being said",
    bounds=(0.0, 1.0),
    threshold=0.1,
    reference="mean reciprocal rank, Voorhees 1999",
    decides=(False, False),
)


class NearMiss(Instrument):
    """How near is the right answer to being said?"""

    name = "near-miss"
    title = "Is the right answer on the tip of its tongue?"
    question = Question.LEAKAGE
    access = Access.LOGPROBS
    reference = NEARNESS.reference

    def requests(self, case: Case, target: Target) -> list[Request]:
        """The rank of every answer token; of models that an attack has altered, nothing."""
        return asking.answers(case, target, asking.compared(case, target.role), (RANK,))

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """Forget rows against rows that were never taught."""

        def score(role: str, name: str) -> np.ndarray:
            return np.array([nearness(row["rank"]) for row in evidence.iterate(role, f"{name}/answer", RANK.name)])

        return [against_never_taught(self, case, evidence, NEARNESS, score)]
