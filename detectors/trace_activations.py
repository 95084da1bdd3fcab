"""Trace in activations: was this model unlearned, or only edited, or neither?

What is measured: the states after five blocks, evenly spaced from the first to the last, where answers begin, in the
target and in the original. How far they moved at each depth, in how common and how many directions, and on forget
prompts rather than others, is summed up in numbers (`detectors.fingerprint.state_features`) and judged by a classifier
trained on models of known history. A second finding is the published setting: how well a classifier on all these
states tells the target from its original on prompts that it did not see; it says that the model was edited, no more.

Source: Chen et al. 2025 (arXiv 2506.14003), appendix B (pre-logit activations).

Traps:

- *Edited is not unlearned*, and the others of `trace-logits`.
- *Kinship.* States of models that were not trained from one another cannot be compared: a model taught anew from other
  random numbers moved everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from audit.arrays import alike, finite
from audit.case import Case
from audit.controls import grouped_folds
from audit.evidence import Arrays, Evidence
from audit.instrument import Access, Instrument
from audit.plan import Request
from audit.quantities import hidden
from audit.record import Control, Finding, Question, Side
from audit.statistics import mean_estimate
from detectors.fingerprint import Features, Floats, coherence, inverse_stable_rank, state_features
from detectors.tracing import (
    NULL,
    SOURCE,
    Use,
    asked_sets,
    beginnings,
    is_edit_of_original,
    predictive_p,
    rows_of,
    trace_findings,
)

if TYPE_CHECKING:
    from audit.target import Target

__all__ = ["TraceActivations", "coherence", "inverse_stable_rank", "state_features", "told_apart"]

DEPTHS = 5


def depths(layers: int) -> list[int]:
    """Five blocks from the first to the last; some twice where there are fewer."""
    return [int(i) for i in np.linspace(0, layers - 1, DEPTHS).round()]


def told_apart(a: ArrayLike, b: ArrayLike, clusters: Sequence[str], *, seed: int) -> NDArray[np.bool_]:
    """Which of the 2 n states a linear classifier tells right that saw neither their prompts nor their entities.

    Args:
        a, b: states [n, width] of the same n prompts in two models.
        clusters: the entity of every prompt.

    Returns:
        [2 n], first those of `a`.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    one, two = finite(a, "a", 2), finite(b, "b", 2)
    alike(one, two, "a", "b")
    x, y = np.concatenate([one, two]), np.repeat([0, 1], len(one))
    right = np.zeros(len(x), dtype=bool)
    # Folds by entity, so that no prompt is in training as one model's and in the test as the other's.
    for train, test in grouped_folds(np.tile(clusters, 2), y, seed=seed):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
        right[test] = model.fit(x[train], y[train]).predict(x[test]) == y[test]
    return right


class TraceActivations(Instrument):
    """Do inner states bear the marks of unlearning?"""

    name = "trace-activations"
    title = "Was it unlearned, by its inner states?"
    question = Question.TRACE
    access = Access.WEIGHTS
    sets = ("retain",)
    roles = ("original",)
    watches = ("trace",)
    reference = SOURCE

    def requests(self, case: Case, target: Target) -> list[Request]:
        """The states where answers begin, by set."""
        if not (is_edit_of_original(target.role) or target.role == "original"):
            return []
        sites = tuple(f"blocks.{i}.hook_resid_post" for i in sorted(set(depths(target.layers))))
        return [
            Request(f"trace/{name}", beginnings(case, target, name), (hidden(*sites),), {"layers": target.layers})
            for name in asked_sets(case)
        ]

    def features(self, case: Case, evidence: Evidence, role: str, use: Use) -> Features:  # noqa: ARG002
        """The numbers of one role, from the rows to use of every set."""
        here, there = (
            {name: _states(evidence, one, name, kept) for name, kept in use.items()} for one in (role, "original")
        )
        return state_features(here, there)

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """The fingerprint on irrelevant prompts and on all, and how well the target is told from its original."""
        rows = {name: rows_of(case, name) for name in asked_sets(case)}
        found = trace_findings(self, case, evidence, "fingerprint in inner states", rows, self.features)
        return [*found, self._edited(case, evidence)]

    def told_apart(self, case: Case, evidence: Evidence, role: str) -> NDArray[np.bool_]:
        """Whose states, of a role or of the original, are told right: see the plain function; prompts of all sets."""

        def states(one: str) -> Floats:
            rows = [
                values["hidden"][0].ravel() for name in asked_sets(case) for values in _captured(evidence, one, name)
            ]
            return np.stack(rows).astype(np.float64)

        return told_apart(states("original"), states(role), _clusters(case), seed=case.options.seed)

    def _edited(self, case: Case, evidence: Evidence) -> Finding:
        """The published setting: the target against its original, on prompts held out."""
        clusters = _clusters(case)
        right = self.told_apart(case, evidence, "target").astype(float)
        estimate = mean_estimate(right, clusters * 2, bounds=(0.0, 1.0), seed=case.options.seed)
        nulls = [
            float(self.told_apart(case, evidence, role).mean()) for role in evidence.roles if role.startswith(NULL)
        ]
        p = predictive_p(estimate.value, nulls)
        return Finding(
            id=f"{self.name}/edited",
            instrument=self.name,
            question=self.question,
            statistic="accuracy with which states are told from the original's on prompts held out",
            split="all prompts, target against original",
            estimate=estimate.value,
            ci95=(estimate.lo, estimate.hi),
            n=estimate.n,
            unit="accuracy",
            orientation="more clearly another model than the original; any edit does that",
            null="an ordinary fine-tune of the original, as large and in the same places, is told as well",
            null_value=float(np.mean(nulls)) if nulls else 0.5,
            p_value=p,
            smallest_p=None if p is None else 0.0,
            threshold=0.1,
            decides=(False, False),
            sides=(Side.NEITHER, Side.NEITHER),
            controls=[
                Control(
                    name="matched null",
                    description="accuracy for ordinary fine-tunes of the original that change it as much",
                    estimate=float(np.mean(nulls)) if nulls else None,
                    n=len(nulls),
                    passed=p is not None,
                    gates="evidence",
                ),
                Control(
                    name="positive control",
                    description="the matched fine-tunes were edited: they should be told from the original too",
                    estimate=float(np.mean(nulls)) if nulls else None,
                    n=len(nulls),
                    passed=bool(nulls) and float(np.mean(nulls)) > 0.6,
                    gates="silence",
                ),
            ],
            reference=SOURCE,
        )


def _clusters(case: Case) -> list[str]:
    """The entities of the prompts of all sets, set after set."""
    return [f"{name}/{who}" for name in asked_sets(case) for who in case.clusters(rows_of(case, name))]


def _captured(evidence: Evidence, role: str, name: str) -> Iterator[Arrays]:
    asked = evidence.quantities(role, f"trace/{name}")
    return evidence.iterate(role, f"trace/{name}", next(q.name for q in asked if q.name.startswith("hidden:")))


def _states(evidence: Evidence, role: str, name: str, kept: NDArray[np.bool_]) -> NDArray[Any]:
    """States [positions, depths, width] of the rows that are kept."""
    layers = evidence.extra(role, f"trace/{name}")["layers"]
    blocks = sorted(set(depths(layers)))
    columns = [blocks.index(block) for block in depths(layers)]
    found = zip(_captured(evidence, role, name), kept, strict=True)
    return np.concatenate([values["hidden"][:, columns] for values, keep in found if keep])
