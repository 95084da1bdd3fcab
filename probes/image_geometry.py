"""Geometry of an image classifier: whose states do its decisions have, and do neighbours carry the class?

What is measured: the state of an image's decision (the class token's, or the mean over places) after every block and
before the classifier, compared with the original's and the retrained model's, as `probes.geometry` does with prompts:

    `image-geometry/cka`         linear CKA(target, original), debiased, on retain rows minus on forget rows
    `image-geometry/knn`         are most of the 5 nearest images (cosine) of the row's own class?
    `image-geometry/agreement`   H-LR: harmonic mean of AGL and AGR, each a product of 1 - |gap to the retrained model|

Nearest images are looked for among equally many of every class, the forgotten and the never-taught one too, for no
retained image has the forgotten class; where the retain set has a row's class (instance-wise forgetting), among
retained images alone. States are centred on these, and an image is never its own neighbour.

Source: "Are We Truly Forgetting?" (Kim et al. 2025, arXiv 2503.06991): CKA with the retrained model, 5 nearest by
cosine, AGL, AGR and H-LR, of which the formula was not at hand and is reconstructed; CKA: Kornblith et al. 2019 (arXiv
1905.00414), debiased as Song et al. 2012, since the average over batches that was published is biased upwards.

Traps:

- *CKA is provenance, never evidence of knowledge.* An edit of the classifier moves no state: its CKA with the original
  is 1, with or without the class inside; two models retrained alike are far apart. UDS (arXiv 2605.24614): AUC .65.
- *k-NN decides nothing either.* A class that was never taught lies together as well; by how much depends on the class
  and the training seed, and among small classifiers of known history the ranges of taught and never taught overlap.
- *A state that is nearly the same for all rows* (a class token in the first blocks) has neighbours by rounding.
- *Agreement has no null*: two models retrained alike disagree too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from audit.arrays import alike
from audit.case import Case
from audit.contrast import Statistic
from audit.evidence import Evidence
from audit.instrument import Access, Instrument
from audit.loaders import Example
from audit.plan import Request
from audit.record import Finding, Question
from audit.statistics import FloatArray
from probes.head_refit import Decisions, Pool, decision_requests, too_few
from probes.similarity import K, knn_transfer, linear_cka
from probes.view import KIM, View, findings, references

if TYPE_CHECKING:
    from audit.image_target import ImageTarget

__all__ = ["ImageGeometry", "balanced", "knn_transfer", "linear_cka"]

KNN = Statistic(
    "knn", "k-NN transfer: most of the 5 nearest images have the right class", "accuracy",
    "images of the class lie together more often", (0.0, 1.0), 0.3, KIM, (False, False),
)  # fmt: skip


class ImageGeometry(Instrument):
    """How far did the states of decisions move, and do images of the class still lie together?"""

    name = "image-geometry"
    title = "How far did its states move?"
    question = Question.REPRESENTATION
    access = Access.WEIGHTS
    sets = ("forget", "retain")
    modality = "image"
    reference = f"{KIM}; Kornblith et al. 2019, arXiv 1905.00414"

    def missing(self, case: Case) -> str | None:
        """Needs a model to compare with, and rows enough for a shape."""
        alone = None if references(case) else "needs the original or the retrained model to compare states with"
        return super().missing(case) or alone or too_few(case)

    def withheld(self, case: Case) -> dict[str, str]:
        """k-NN transfer needs images of every class."""
        reason = _nothing_to_transfer(case)
        return super().withheld(case) | ({f"{self.name}/knn": reason} if reason else {})

    def requests(self, case: Case, target: ImageTarget) -> list[Request]:
        """The decision of every image and its state, block by block."""
        return [] if "+" in target.role else decision_requests(case, target)

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """What moved; which images lie together; what agrees with the retrained model."""
        return findings(self, _DecisionView(case, evidence), KNN)


class _DecisionView(View):
    """States of the decisions, and the classes of their neighbours."""

    place = "the decision"
    answered = "the right class answered"
    axis = "after block (last: before the classifier)"
    end = "before the classifier"

    def __init__(self, case: Case, evidence: Evidence) -> None:
        super().__init__(case, evidence)
        pool = self._pool = Pool(case)
        self._decisions = Decisions(pool, evidence)
        self.layers = self._decisions.layers
        self._nearby = balanced(pool.labels, pool.fitted, case.options.seed)
        carried = _nothing_to_transfer(case) is None
        self.transferred = {name: range(len(rows)) for name, rows in pool.rows.items()} if carried else None

    def rows(self, name: str) -> tuple[Example, ...]:
        return self._pool.rows[name]

    def right(self, role: str, name: str) -> FloatArray:
        return self._decisions.right(role, name)

    def _states(self, role: str, name: str) -> Sequence[NDArray[np.floating[Any]]]:
        return self._decisions.states(role, name)

    def _transfer(self, role: str, name: str) -> FloatArray:
        pool, near, here = self._pool, self._nearby, self._pool.part(name)
        clusters = np.array(pool.clusters)
        own = clusters[here][:, None] == clusters[near]
        columns = []
        for j, test in enumerate(self.states(role, name)):
            train = self._decisions.all_states(role, j)[near]
            middle = train.mean(axis=0)
            labels = pool.labels[near], pool.labels[here]
            columns.append(knn_transfer(train - middle, labels[0], test - middle, labels[1], excluded=own))
        return np.stack(columns, axis=1)


def balanced(labels: NDArray[np.intp], fitted: NDArray[np.bool_], seed: int) -> NDArray[np.intp]:
    """As many of the rows `fitted` [n] of every class in `labels` [n] as the smallest class has; sorted indices."""
    alike(np.asarray(labels), np.asarray(fitted), "labels", "fitted")
    if not np.any(fitted):
        raise ValueError("fitted names no row")
    rng = np.random.default_rng(seed)
    rows = [np.flatnonzero(fitted & (labels == label)) for label in np.unique(labels[fitted])]
    size = min(map(len, rows))
    return np.sort(np.concatenate([rng.choice(some, size, replace=False) for some in rows]))


def _nothing_to_transfer(case: Case) -> str | None:
    smallest = Pool(case).smallest
    return None if smallest > K else f"needs more than {K} images of every class, one has {smallest}"
