"""The subsets of a worst-case audit: which there are, what is left of them, and the controls of the comparison.

See `attacks.worst_case` for what it is about.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray
from scipy import special

from audit.case import Case
from audit.evidence import Evidence
from audit.loaders import Example
from audit.quantities import TOKEN
from audit.record import Control
from audit.statistics import Estimate, mean_estimate, two_sample
from detectors.recognition import decided, like_with_like

__all__ = [
    "BOUNDS", "METHODS", "NAME", "SELECTED", "THRESHOLD", "WORST", "Known", "by_name", "controls", "host", "images",
    "plan", "size", "unseen_set",
]  # fmt: skip

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

NAME = "worst-case"
METHODS = ("fine-tune", "random-labels", "retrained")
"""How a subset is unlearned: the first is what the choice is made against, the last what never taught it."""
SELECTED = "selected"
WORST = "worst"
THRESHOLD = 0.1
BOUNDS = (-1.0, 1.0)

_SUBSETS = {"quick": 5, "standard": 8, "thorough": 20}
_BESIDE = 2  # random subsets that the other methods unlearn
_SHARE = 5  # at most a fifth of the pool is chosen


def host(case: Case) -> str:
    """The model that is asked which of its training images would be forgotten worst."""
    return "original" if "original" in case.models else "target"


def unseen_set(case: Case) -> str | None:
    """A set of images that the model was not trained on, of classes that it was taught."""
    if "utility" in case.sets:
        return "utility"
    return "holdout" if "holdout" in case.sets and like_with_like(case) else None


def images(case: Case) -> tuple[Example, ...]:
    """The images to choose from; forget images first."""
    return case.rows("forget") + case.rows("retain")


def size(case: Case) -> int:
    """Images to choose: as many as are to be forgotten, at most a fifth of all."""
    return min(len(case.rows("forget")), len(images(case)) // _SHARE)


def by_name(case: Case, chosen: Indices) -> dict[str, Indices]:
    """The chosen subset, and all random ones."""
    n, m = len(images(case)), size(case)
    return {WORST: chosen} | {
        str(i): np.sort(np.random.default_rng([case.options.seed, i]).permutation(n)[:m])
        for i in range(_SUBSETS[case.options.budget.value])
    }


def plan(case: Case) -> list[tuple[str, str]]:
    """(method, subset) of every model that is made."""
    count = _SUBSETS[case.options.budget.value]
    return [
        (method, subset)
        for method in METHODS
        for subset in (WORST, *map(str, range(count if method == METHODS[0] else _BESIDE)))
    ]


class Known:
    """What models know of the chosen subset and of random ones: `known` of every image, and its cluster."""

    def __init__(self, case: Case, evidence: Evidence) -> None:
        self.case, self.evidence, self.host = case, evidence, host(case)
        kept = evidence.scores(f"{self.host}+{NAME}-{SELECTED}", f"{NAME}/selection")[0]
        self.weights: Floats = kept["weight"][0]
        self.chosen: Indices = np.flatnonzero(kept["chosen"][0])
        self._clusters = np.array(case.clusters(images(case)))

    def runs(self, method: str, kind: str) -> list[tuple[str, Indices]]:
        """(role, subset) of the chosen subset, or of all random ones; `before` unlearning all under one role."""
        subsets = by_name(self.case, self.chosen)
        if method == "before":
            return [(self.host, subset) for name, subset in subsets.items() if (name == WORST) == (kind == WORST)]
        return [
            (f"{self.host}+{NAME}-{method}-{name}", subsets[name])
            for each, name in plan(self.case)
            if each == method and (name == WORST) == (kind == WORST)
        ]

    def means(self, method: str) -> list[float]:
        """Mean of every random subset."""
        return [float(self._values(*run).mean()) for run in self.runs(method, "random")]

    def of(self, method: str, kind: str) -> tuple[Floats, list[str]]:
        """Values of all images of these subsets, and their clusters: an image in two random subsets has one."""
        runs = self.runs(method, kind)
        values = np.concatenate([self._values(*run) for run in runs])
        return values, [str(who) for _, subset in runs for who in self._clusters[subset]]

    def gap(self, method: str) -> Estimate:
        """The chosen subset against random ones."""
        (a, c), (b, d) = self.of(method, WORST), self.of(method, "random")
        return two_sample(a, b, c, d, bounds=BOUNDS, seed=self.case.options.seed)

    def accuracy(self, method: str, kind: str) -> float:
        """Share of the images of these subsets that are called what they are."""
        return float(np.mean([self._decided(role, "match")[subset].mean() for role, subset in self.runs(method, kind)]))

    def probability(self, method: str, kind: str) -> Floats:
        """Of the right class, unseen images left out of account."""
        runs = self.runs(method, kind)
        return np.concatenate([np.exp(self._decided(role, "logprob")[subset]) for role, subset in runs])

    def _values(self, role: str, subset: Indices) -> Floats:
        unseen = unseen_set(self.case)
        base = float(np.exp(decided(self.evidence, role, unseen, TOKEN.name, "logprob")).mean()) if unseen else 0.0
        return np.asarray(np.exp(self._decided(role, "logprob")[subset]) - base)

    def _decided(self, role: str, key: str) -> Floats:
        return np.concatenate([decided(self.evidence, role, name, TOKEN.name, key) for name in ("forget", "retain")])


def controls(known: Known) -> list[Control]:
    """What a gap between chosen and random subsets is read against."""
    return [_spread(known), _room(known), *(_beside(known, method) for method in METHODS[1:]), _who(known)]


def _spread(known: Known) -> Control:
    """Where one more random subset would lie: what runs of unlearning differ by, the interval over images ignores."""
    means = known.means(METHODS[0])
    worst = float(known.of(METHODS[0], WORST)[0].mean())
    reach = float(special.stdtrit(len(means) - 1, 0.975) * np.std(means, ddof=1) * np.sqrt(1 + 1 / len(means)))
    middle = float(np.mean(means))
    return Control(
        name="spread of random subsets",
        description=f"mean of {len(means)} random subsets (standard deviation {np.std(means, ddof=1):.3f}), and where "
        f"one more would be expected (Student's t): the chosen one, at {worst:.3f}, must lie outside",
        estimate=middle,
        ci95=(middle - reach, middle + reach),
        n=len(means),
        passed=abs(worst - middle) > reach,
        gates="evidence",
    )


def _room(known: Known) -> Control:
    """Could any subset be forgotten worse than random ones are?"""
    missing = 1 - known.probability(METHODS[0], "random")
    left = mean_estimate(missing, known.of(METHODS[0], "random")[1], bounds=(0.0, 1.0), seed=known.case.options.seed)
    return Control(
        name="room above random subsets",
        description="probability of the right class that random subsets lack after unlearning: where they are known as "
        "before, none can be forgotten worse",
        estimate=left.value,
        ci95=(left.lo, left.hi),
        n=left.n,
        passed=left.value >= THRESHOLD,
        gates="silence",
    )


def _beside(known: Known, method: str) -> Control:
    """The same gap by another method."""
    gap = known.gap(method)
    words = {
        "random-labels": "the same gap where a subset is unlearned by random labels, which it was not chosen against",
        "retrained": "the same gap in models trained from nothing without the subset: so much of it is no trace of the "
        "images, the others teach it",
    }
    return Control(name=f"gap, {method}", description=words[method], estimate=gap.value, ci95=(gap.lo, gap.hi), n=gap.n)


def _who(known: Known) -> Control:
    """Which images were chosen: classes, and how many of those that are to be forgotten."""
    pool, forget = images(known.case), len(known.case.rows("forget"))
    classes = Counter(pool[i].answer for i in known.chosen).most_common(8)
    m, own = len(known.chosen), int((known.chosen < forget).sum())
    listed = ", ".join(f"{name} {count}" for name, count in classes)
    return Control(
        name="what was chosen",
        description=f"{own} of the {m} chosen images are in the forget set ({m * forget / len(pool):.1f} expected by "
        f"chance); by class: {listed}",
        estimate=own / m,
        n=m,
    )
