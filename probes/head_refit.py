"""Head re-fit: does a fresh linear head find the forgotten class in the frozen states, and from how few images?

What is measured: the state of an image's decision (the class token's, or the mean over places) after every block of the
upper half, and what enters the classifier. On it a new linear head for *all* classes is fitted, the forgotten and the
never-taught (holdout) one among them, with equally many images a class: ridge regression on one-hot labels. A class
that was taught lies in one narrow bundle of states: a single image of it tells the others. Hence two numbers a row:

    one-shot   fitted on one image a class; how often is the row's class the highest of all? Mean over 30 draws
    full       fitted on as many as the smallest class has; mean over 5 draws

Images are dealt into halves within their class; a row is judged only by heads fitted on the other half. Where the
retain set has a row's class (instance-wise forgetting), heads are fitted on retain rows alone.

Source: linear probes of unlearned classifiers: "Are We Truly Forgetting?" (Kim et al. 2025, arXiv 2503.06991) and "An
Illusion of Unlearning?" (arXiv 2604.08271); that taught classes collapse to a point: Papyan et al. 2020 (arXiv
2008.08186), and that they are then learned from few images: Galanti et al. 2022 (arXiv 2112.15121). One shot instead of
all is this project's choice, from what told apart models of known history.

Traps:

- *Any class is partly separable*, taught or not: good features of nine digits serve for the tenth. With all images a
  fresh head recovers .44 to .88 of a class that a small ResNet was never taught, and from two seeds of the same
  retraining numbers that differ by up to .4. So the full fit is shown and decides nothing; one image tells more.
- *Rows are not models, nor classes.* The interval is that of rows. Two models retrained alike differed by up to .2 in
  one-shot recall (.32 in lower blocks, which are not read for that reason): the threshold is half as much again, .3.
- *One class against one other* is a comparison of two classes. Without a retrained model nothing cancels: of two
  classes that were never taught one was found more often by up to .34, so the threshold is .5 there. `pixels alone`
  says how much easier the forgotten class is without any model; it did not foresee that .34: passing it proves little.
- *An edit of the whole network on the forget rows* teaches a little of which images belong together, even to a model
  that never knew them: see the page.
- *Silence is not deletion*: states may have been scattered, and relearned in a few steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from audit.arrays import finite
from audit.case import Case
from audit.contrast import Statistic, against_never_taught
from audit.evidence import Evidence
from audit.instrument import Access, Instrument
from audit.loaders import Example
from audit.plan import Request
from audit.quantities import TOKEN, hidden
from audit.record import Control, Finding, Question
from audit.statistics import FloatArray, halves
from probes.lens import read_layers

if TYPE_CHECKING:
    from audit.image_target import ImageTarget

__all__ = ["Decisions", "HeadRefit", "Pool", "decision_requests", "draws", "recovered", "refit", "too_few"]

Pair = tuple[NDArray[np.intp], NDArray[np.intp]]
Pairs = Sequence[Pair]

SETS = ("forget", "holdout", "retain")
ALONE = 0.5
"""Threshold without a retrained model, where one class is compared with another and nothing cancels."""

RIDGE = 0.1
"""Penalty, in units of the mean squared length of the centred states."""

ONE_SHOT_DRAWS = 30
FULL_DRAWS = 5
_FEWEST_ROWS = 8
_MOST_ROWS = 1000
_THUMBNAIL = 16
_SOURCE = "Kim et al. 2025, arXiv 2503.06991; Galanti et al. 2022, arXiv 2112.15121"

ONE_SHOT = Statistic(
    "one-shot", "fresh linear head on frozen states, fitted on one image a class: the right class is highest",
    "accuracy", "a single image of the class tells the others more often", (0.0, 1.0), 0.3, _SOURCE,
)  # fmt: skip
FULL = Statistic(
    "full", "fresh linear head on frozen states, fitted on half of the images: the right class is highest",
    "accuracy", "the class is recovered from frozen states more often", (0.0, 1.0), 0.3, _SOURCE, (False, False),
)  # fmt: skip


# --- plain functions ----------------------------------------------------------------------------------------


def refit(train: ArrayLike, labels: ArrayLike, test: ArrayLike, *, ridge: float = RIDGE) -> FloatArray:
    """Scores [m, classes] of a fresh linear head for the states `test` [m, d].

    Args:
        train, labels: states [n, d] and their classes [n], numbered from 0.
        ridge: penalty on the weights, not on the offset, in units of the mean squared length of the centred `train`.

    Least squares on one-hot labels, with an offset. Raises `ValueError` where shapes do not fit.
    """
    a, b, codes = finite(train, "train", 2), finite(test, "test", 2), np.asarray(labels)
    if a.shape[1] != b.shape[1] or len(codes) != len(a):
        raise ValueError(f"train {a.shape}, labels {codes.shape} and test {b.shape} do not fit each other")
    middle = a.mean(axis=0)
    a, b = a - middle, b - middle
    wanted = np.eye(int(codes.max()) + 1)[codes]
    offset = wanted.mean(axis=0)
    penalty = ridge * float((a**2).sum(axis=1).mean()) + np.finfo(float).tiny
    if len(a) <= a.shape[1]:  # as many unknowns as rows; the head is the same
        weights = a.T @ np.linalg.solve(a @ a.T + penalty * np.eye(len(a)), wanted - offset)
    else:
        weights = np.linalg.solve(a.T @ a + penalty * np.eye(a.shape[1]), a.T @ (wanted - offset))
    return np.asarray(b @ weights + offset)


def draws(
    labels: ArrayLike, clusters: Sequence[str], fitted: NDArray[np.bool_], *, shots: int | None, times: int, seed: int
) -> Iterator[Pair]:
    """(rows to fit on, rows to judge), two pairs a draw: every row is judged once a draw, by the other half's head.

    Args:
        labels: classes of the rows [n].
        clusters: [n]; the clusters of a class are dealt into halves whole.
        fitted: [n], rows that may be fitted on.
        shots: rows a class to fit on; None, or more than there are: as many as the smallest class has in that half.

    Raises `ValueError` for a class of fewer than two clusters that may be fitted on.
    """
    codes, names = np.asarray(labels), np.asarray(clusters)
    first = np.zeros(len(codes), bool)
    for label in np.unique(codes):
        for side in (fitted, ~fitted):
            rows = np.flatnonzero((codes == label) & side)
            first[rows] = halves(names[rows], seed)
    pools = [[np.flatnonzero((codes == c) & fitted & half) for c in np.unique(codes)] for half in (first, ~first)]
    if min(len(rows) for pool in pools for rows in pool) == 0:
        raise ValueError("labels: a class has fewer than two clusters that may be fitted on")
    rng = np.random.default_rng(seed)
    for _ in range(times):
        for pool, judged in zip(pools, (~first, first), strict=True):
            smallest = min(len(rows) for rows in pool)
            size = smallest if shots is None else min(shots, smallest)
            chosen = [rng.choice(rows, size, replace=False) for rows in pool]
            yield np.concatenate(chosen), np.flatnonzero(judged)


def recovered(states: ArrayLike, labels: ArrayLike, pairs: Pairs) -> FloatArray:
    """How often each row's class is the highest of a fresh head's scores, [n] in [0, 1]; ties share 1.

    `states` [n, d], `labels` [n] numbered from 0, `pairs` as `draws` gives them.
    """
    x, codes = np.asarray(states, np.float64), np.asarray(labels)
    right, judged = np.zeros(len(x)), np.zeros(len(x))
    for train, test in pairs:
        scores = refit(x[train], codes[train], x[test])
        ahead = scores == scores.max(axis=1, keepdims=True)
        right[test] += ahead[np.arange(len(test)), codes[test]] / ahead.sum(axis=1)
        judged[test] += 1
    return np.asarray(right / judged)


# --- the states of decisions --------------------------------------------------------------------------------


def decision_requests(case: Case, target: ImageTarget) -> list[Request]:
    """The decision of every image, and its state after every block (at most 12) and before the classifier."""
    layers = read_layers(target.layers)
    sites = (*(f"blocks.{i}.hook_resid_post" for i in layers), "ln_final.hook_in")
    wanted = (TOKEN, *(hidden(site) for site in sites))  # one site each: stages differ in width
    shown = {name: tuple(target.show(row) for row in case.rows(name, _MOST_ROWS)) for name in _sets(case)}
    extra = {"sites": sites, "layers": [*layers, target.layers]}
    return [Request(f"decisions/{name}", shown[name], wanted, extra) for name in shown]


class Pool:
    """The images of a case whose class can be fitted, sets one after the other.

    Attributes:
        rows: by set.
        labels: classes of all rows, numbered from 0, [n].
        fitted: rows that may be fitted on: those of the retain set, and of classes that it lacks, [n].
        clusters: units of independence of all rows.
        smallest: fewest rows of a class that may be fitted on.
    """

    def __init__(self, case: Case) -> None:
        every = {name: case.rows(name, _MOST_ROWS) for name in _sets(case)}
        classes = {name: np.array([row.answer for row in rows]) for name, rows in every.items()}
        alone = {name: ~np.isin(classes[name], classes["retain"]) | (name == "retain") for name in every}
        labels = np.concatenate([classes[name][alone[name]] for name in every])
        owners = np.concatenate([np.array(case.clusters(rows))[alone[name]] for name, rows in every.items()])
        known, counts = np.unique(labels, return_counts=True)
        several = np.array([len(np.unique(owners[labels == label])) > 1 for label in known])
        known, self.smallest = known[several], int(min(counts[several], default=0))
        self.kept = {name: np.isin(classes[name], known) for name in every}
        self.rows = {
            name: tuple(row for row, kept in zip(rows, self.kept[name], strict=True) if kept)
            for name, rows in every.items()
        }
        self.labels = np.searchsorted(known, np.concatenate([classes[name][self.kept[name]] for name in every]))
        self.fitted = np.concatenate([alone[name][self.kept[name]] for name in every])
        self.clusters = [cluster for rows in self.rows.values() for cluster in case.clusters(rows)]

    def part(self, name: str) -> slice:
        """Where a set's rows lie among all."""
        sizes = [len(rows) for rows in self.rows.values()]
        at = list(self.rows).index(name)
        return slice(sum(sizes[:at]), sum(sizes[: at + 1]))


class Decisions:
    """What `decision_requests` recorded of the images of a pool.

    Attributes:
        layers: blocks that were read; the last number, one more than there are, stands for what enters the classifier.
    """

    def __init__(self, pool: Pool, evidence: Evidence) -> None:
        self.pool, self._evidence = pool, evidence
        self.layers: list[int] = evidence.extra("target", "decisions/forget")["layers"]
        self.states = cache(self._states)

    def _states(self, role: str, name: str) -> list[FloatArray]:
        """By block [rows, width]; a model of another depth than the target's is read at the same shares of its own."""
        sites: tuple[str, ...] = self._evidence.extra(role, f"decisions/{name}")["sites"]
        places = np.linspace(0, len(sites) - 1, len(self.layers)).round().astype(int)
        return [self._column(role, name, hidden(sites[place]).name, "hidden") for place in places]

    def right(self, role: str, name: str) -> FloatArray:
        """Does the model itself answer the class? [rows]."""
        return self._column(role, name, TOKEN.name, "match")

    def _column(self, role: str, name: str, quantity: str, key: str) -> FloatArray:
        rows = [arrays[key][0] for arrays in self._evidence.iterate(role, f"decisions/{name}", quantity)]
        values = np.array(rows, dtype=np.float64)[self.pool.kept[name]]
        return values[:, 0] if key == "hidden" else values

    def all_states(self, role: str, column: int) -> FloatArray:
        """Of all rows, [n, width]."""
        return np.concatenate([self.states(role, name)[column] for name in self.pool.rows])


def _sets(case: Case) -> list[str]:
    return [name for name in SETS if name in case.sets]


def too_few(case: Case) -> str | None:
    """Why the sets cannot be fitted and judged, if they cannot."""
    pool = Pool(case)
    few = [name for name, rows in pool.rows.items() if len(rows) < _FEWEST_ROWS]
    if few:
        return f"needs at least {_FEWEST_ROWS} rows in the {few[0]} set, of classes with two rows or more"
    classes = len(np.unique(pool.labels[pool.part("retain")]))
    return None if classes > 1 else "needs retain rows of two classes at least"


# --- the instrument -----------------------------------------------------------------------------------------


class HeadRefit(Instrument):
    """Does a fresh linear head find the forgotten class in the frozen states?"""

    name = "head-refit"
    title = "Does a fresh head find the class again?"
    question = Question.REPRESENTATION
    access = Access.WEIGHTS
    sets = ("forget", "retain")
    modality = "image"
    reference = _SOURCE

    def missing(self, case: Case) -> str | None:
        """Needs rows to fit on and rows to judge, of several classes."""
        return super().missing(case) or too_few(case)

    def requests(self, case: Case, target: ImageTarget) -> list[Request]:
        """The decision of every image and its state, block by block."""
        return [] if "+" in target.role else decision_requests(case, target)

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """The block of the upper half at which the forget set exceeds the never-taught control most."""
        decisions = Decisions(Pool(case), evidence)
        return [
            self._compared(case, evidence, decisions, statistic, shots, times)
            for statistic, shots, times in ((ONE_SHOT, 1, ONE_SHOT_DRAWS), (FULL, None, FULL_DRAWS))
        ]

    def _compared(
        self,
        case: Case,
        evidence: Evidence,
        decisions: Decisions,
        statistic: Statistic,
        shots: int | None,
        times: int,
    ) -> Finding:
        pool, layers, seed = decisions.pool, decisions.layers, case.options.seed
        pairs = list(draws(pool.labels, pool.clusters, pool.fitted, shots=shots, times=times, seed=seed))
        upper = [j for j, layer in enumerate(layers) if 2 * layer >= layers[-1]]

        @cache
        def scores(role: str) -> FloatArray:
            return np.stack([recovered(decisions.all_states(role, j), pool.labels, pairs) for j in upper], axis=1)

        def score(role: str, name: str) -> FloatArray:
            return scores(role)[pool.part(name)]

        axis = ("after block (last: before the classifier)", [float(layers[j]) for j in upper])
        extra = []
        if "retrained" not in case.models:
            statistic = replace(statistic, threshold=ALONE)
            extra = [_pixels_alone(pool, pairs)]
        return against_never_taught(self, case, evidence, statistic, score, columns=axis, rows=pool.rows, extra=extra)


def _pixels_alone(pool: Pool, pairs: Pairs) -> Control:
    """How much easier than the holdout rows are the forget rows without any model?"""
    thumbnails = np.stack([_thumbnail(row) for rows in pool.rows.values() for row in rows])
    found = recovered(thumbnails, pool.labels, pairs)
    excess = None
    if "holdout" in pool.rows:
        excess = float(found[pool.part("forget")].mean() - found[pool.part("holdout")].mean())
    return Control(
        name="pixels alone",
        description="a head fitted on the pixels, forget rows minus holdout rows: without a retrained model only this "
        "tells an easier class from a taught one",
        estimate=excess,
        n=len(found),
        passed=excess is not None and excess < ONE_SHOT.threshold,
        gates="evidence",
    )


def _thumbnail(row: Example) -> FloatArray:
    from PIL import Image

    assert row.picture is not None, "an image case"
    side = (_THUMBNAIL, _THUMBNAIL)
    return np.asarray(Image.fromarray(row.picture.pixels).resize(side), np.float64).ravel() / 255
