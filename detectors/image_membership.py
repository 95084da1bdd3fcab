"""Membership inference on images: do a classifier's decisions tell forgotten images from images never seen?

**Orientation: every score is LARGER for a LIKELIER MEMBER.** Of the decision on an image of class y, with class
probabilities p:

=============  ===========================================================  =====================================
confidence     log p_y - log(1 - p_y), the log-odds of the right class      Carlini et al. 2022, arXiv 2112.03570
entropy        sum of p log p, the negative entropy: the label has no say   Salem et al. 2019, arXiv 1806.01246
=============  ===========================================================  =====================================

The loss (Yeom et al. 2018) is -log p_y: it orders images as the confidence does, so its AUC is the confidence's and is
not reported twice. AUC of forget images against holdout images; and the **worst case** over both scores, all
thresholds and both directions: with FPR the share of holdout images taken for members and FNR the share of forget
images that are not,

    epsilon = max(0, min(log(1 - d - FPR) - log FNR, log(1 - d - FNR) - log FPR)),   d = 1e-5
    forgetting quality = 2^-epsilon, 1 where nothing is given away, 0 where everything is

Source: the papers in the table; worst case as in the Unlearning Comparator (arXiv 2508.12730), after the bounds on
epsilon of Kairouz et al. 2015 (arXiv 1311.0776).

Traps:

- *The largest of many epsilons is never 0.* The published figure takes, of all thresholds, the one at which these very
  images look worst, and point estimates of rare errors: on models that saw neither set it reports leaks. Here score,
  threshold and direction are chosen on one half of the images and judged on the other, with Clopper-Pearson intervals
  for both rates. The published figure stands beside it, for comparison.
- *Epsilon is infinite where the two sets part cleanly*, however few they are; 2^-epsilon stays a number.
- *Two classes are no members and non-members.* Where forget and holdout differ in their classes, whatever tells these
  apart "finds members". Only a retrained model, attacked alike, shows how much of it is membership.
- *Confident models say the same of all*: float32 rounds 1 - p to 0. The log-odds are computed from logits.
- *A model that does not overfit gives nothing away*, and being silent about forgotten images is then no merit: the
  retained images are the positive control.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from audit.asking import compared
from audit.case import ROLES, Case
from audit.contrast import ALPHA, Score, Statistic, against_never_taught
from audit.controls import SAW_NEITHER, SEPARABLE, retrained_control
from audit.evidence import Evidence
from audit.instrument import Instrument
from audit.plan import Request
from audit.quantities import MOMENTS, TOKEN, Quantity, View
from audit.record import Control, Finding, Question, Side, Table
from audit.statistics import LEVEL, clopper_pearson, cluster_index, halves
from detectors.recognition import decided, decisions

if TYPE_CHECKING:
    import torch

    from audit.image_target import ImageTarget

__all__ = ["LOG_ODDS", "ImageMembership", "Judged", "Worst", "epsilon", "honest_epsilon", "worst_case_epsilon"]

Floats = NDArray[np.float64]

DELTA = 1e-5
_COMPARATOR = "Unlearning Comparator (arXiv 2508.12730)"
_THRESHOLD = 0.18
"""What forgetting quality falls short of 1 by where scores are normal and their AUC is 0.6: the effect that counts in
the other findings."""

_ORIENTATION = "forget images look more like training data than holdout images do"
CONFIDENCE = Statistic(
    "confidence", "how sure the model is of the right class (log-odds)", "log-odds", _ORIENTATION,
    None, 0.1, "Carlini et al. 2022, arXiv 2112.03570", (False, False),
)  # fmt: skip
ENTROPY = Statistic(
    "entropy", "how sure the model is of any class (negative entropy)", "nats", _ORIENTATION,
    None, 0.1, "Salem et al. 2019, arXiv 1806.01246", (False, False),
)  # fmt: skip


def _log_odds(view: View) -> dict[str, torch.Tensor]:
    logits, right = view.logits.double(), view.tokens[:, None]
    others = logits.scatter(1, right, -math.inf).logsumexp(1)
    return {"log_odds": logits.gather(1, right)[:, 0] - others}


LOG_ODDS = Quantity("log-odds", _log_odds)
"""`log_odds` of the scored token or class, log p - log(1 - p), shape [T]: exact where p is 1 to the last digit."""


# --- worst case ---------------------------------------------------------------------------------------------


def epsilon(fpr: ArrayLike, fnr: ArrayLike, delta: float = DELTA) -> Floats:
    """max(0, min(log(1-d-FPR) - log FNR, log(1-d-FNR) - log FPR)), nats: 0 where a guess does as well.

    Rates in [0, 1], of any shapes that fit together. Infinite where both rates are 0; falls as either rate grows.
    Raises ValueError outside [0, 1].
    """
    rates = [np.asarray(rate, np.float64) for rate in (fpr, fnr)]
    if any(not ((rate >= 0) & (rate <= 1)).all() for rate in rates) or not 0 <= delta <= 1:
        raise ValueError("fpr, fnr and delta must lie in [0, 1]")
    with np.errstate(divide="ignore"):
        log = [np.log(rate) for rate in rates]
        rest = [np.log(np.maximum(1 - delta - rate, 0)) for rate in rates]
    with np.errstate(invalid="ignore"):  # -inf - -inf: no image of either kind is told apart
        both = np.minimum(rest[0] - log[1], rest[1] - log[0])
    return np.asarray(np.maximum(np.nan_to_num(both, nan=0.0, posinf=math.inf, neginf=-math.inf), 0.0))


@dataclass(frozen=True)
class Worst:
    """A threshold test for membership: an image is taken for a member if its score is above (or, not `above`, below).

    Attributes:
        score: column of the scores it looks at.
        epsilon, fpr, fnr: on the images it was chosen on.
    """

    score: int
    threshold: float
    above: bool
    epsilon: float
    fpr: float
    fnr: float

    def members(self, scores: Floats) -> NDArray[np.bool_]:
        """Which of the images [n, scores] it takes for members, [n]."""
        column = scores[:, self.score]
        return np.asarray(column > self.threshold if self.above else column < self.threshold)


def worst_case_epsilon(members: ArrayLike, others: ArrayLike, delta: float = DELTA) -> Worst:
    """The test with the largest epsilon over all scores, thresholds and both directions, as published: peeking.

    `members` [n, scores] and `others` [m, scores], or [n] and [m] for a single score. Thresholds lie midway between
    neighbouring values. Raises ValueError if either is empty or not finite, or they have different scores.
    """
    a, b = _scores(members, "members"), _scores(others, "others")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"others have {b.shape[1]} scores, members {a.shape[1]}")
    best: Worst | None = None
    for column in range(a.shape[1]):
        values = np.unique(np.concatenate([a[:, column], b[:, column]]))
        cuts = np.append((values[:-1] + values[1:]) / 2, values[-1])  # the last: nobody lies above
        below = [np.searchsorted(np.sort(x[:, column]), cuts, "right") / len(x) for x in (a, b)]
        for above in (True, False):
            fnr, fpr = (below[0], 1 - below[1]) if above else (1 - below[0], below[1])
            found = epsilon(fpr, fnr, delta)
            i = int(found.argmax())
            if best is None or found[i] > best.epsilon:
                best = Worst(column, float(cuts[i]), above, float(found[i]), float(fpr[i]), float(fnr[i]))
    assert best is not None, "there is at least one score"
    return best


@dataclass(frozen=True)
class Judged:
    """A test for membership on images that it was not chosen on.

    Attributes:
        test: what was chosen on the other half.
        epsilon, lo, hi: estimate and 95 % interval, from those of the two rates.
        fpr, fnr: each with its own (rate, lo, hi), at 97.5 %, so that both hold at once with 95 %.
        p_value: that the test takes forget and holdout images for members equally often (Fisher, two-sided).
        smallest_p: the least that so few images can give.
        n: images it was judged on.
    """

    test: Worst
    epsilon: float
    lo: float
    hi: float
    fpr: tuple[float, float, float]
    fnr: tuple[float, float, float]
    p_value: float
    smallest_p: float
    n: int

    @property
    def quality(self) -> tuple[float, float, float]:
        """2^-epsilon and its interval: 1 where nothing is given away."""
        return 2.0**-self.epsilon, 2.0**-self.hi, 2.0**-self.lo


def honest_epsilon(members: ArrayLike, others: ArrayLike, *, seed: int, delta: float = DELTA) -> Judged:
    """The worst case without peeking: chosen on one half of the images, judged on the other.

    Shapes [n, scores] and [m, scores], or [n] and [m], as in `worst_case_epsilon`; rows are independent. Raises
    ValueError as it does, and for fewer than two rows.
    """
    from scipy import stats

    a, b = _scores(members, "members"), _scores(others, "others")
    if min(len(a), len(b)) < 2:
        raise ValueError(f"{len(a)} members and {len(b)} others: each must give an image to choose on and one to judge")
    first = [halves(np.arange(len(x)), seed) for x in (a, b)]
    test = worst_case_epsilon(a[first[0]], b[first[1]], delta)
    missed, taken = ~test.members(a[~first[0]]), test.members(b[~first[1]])
    level = 1 - (1 - LEVEL) / 2
    fnr, fpr = ((float(x.mean()), *clopper_pearson(int(x.sum()), len(x), level)) for x in (missed, taken))
    at, hi, lo = (float(epsilon(x, y, delta)) for x, y in zip(fpr, fnr, strict=True))
    table = [[(~missed).sum(), missed.sum()], [taken.sum(), (~taken).sum()]]
    n, k = len(missed) + len(taken), len(missed)
    smallest = (2 if 2 * k == n else 1) / math.comb(n, k)
    p = float(stats.fisher_exact(table).pvalue)
    return Judged(test, at, lo, hi, fpr, fnr, p, min(smallest, p), n)


def _scores(x: ArrayLike, name: str) -> Floats:
    rows = np.asarray(x, np.float64)
    rows = rows[:, None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or not rows.size:
        raise ValueError(f"{name} must be a non-empty array of rows (and scores), got shape {np.shape(x)}")
    if not np.isfinite(rows).all():
        raise ValueError(f"{name} has NaN or infinite scores")
    return rows


# --- instrument ---------------------------------------------------------------------------------------------


class ImageMembership(Instrument):
    """Do decisions tell forgotten images from images never seen?"""

    name = "image-membership"
    title = "Do decisions give away what it was trained on?"
    question = Question.LEAKAGE
    modality = "image"
    sets = ("forget", "holdout")
    reference = f"{_COMPARATOR}, and the attack of each finding"

    def missing(self, case: Case) -> str | None:
        """Halves need two units a set."""
        reason = super().missing(case)
        if reason is None and any(len(set(case.clusters(case.rows(name)))) < 2 for name in self.sets):
            return "needs two images of forget and of holdout set at least, to choose on the one and judge on the other"
        return reason

    def requests(self, case: Case, target: ImageTarget) -> list[Request]:
        """The decisions with their log-odds and entropy."""
        return decisions(case, target, compared(case, target.role), (TOKEN, MOMENTS, LOG_ODDS))

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """An AUC for each score, and the worst case over both."""

        def confidence(role: str, name: str) -> Floats:
            return decided(evidence, role, name, LOG_ODDS.name, "log_odds")

        def entropy(role: str, name: str) -> Floats:
            return decided(evidence, role, name, MOMENTS.name, "mean")

        def both(role: str, name: str) -> Floats:
            """Columns of scores, a row for every independent unit."""
            rows = np.stack([confidence(role, name), entropy(role, name)], axis=1)
            index = cluster_index(case.clusters(case.rows(name)), len(rows), "clusters")
            return np.stack([np.bincount(index, column) for column in rows.T], axis=1) / np.bincount(index)[:, None]

        contrast = partial(against_never_taught, self, case, evidence, auc=True, subtract=False)
        classes = class_control(case)
        return [
            *(
                contrast(statistic, score, extra=[classes, *retrained_control(case, score)])
                for statistic, score in ((CONFIDENCE, confidence), (ENTROPY, entropy))
            ),
            self._worst(case, evidence, both, classes),
        ]

    def _worst(self, case: Case, evidence: Evidence, score: Score, classes: Control) -> Finding:
        """Forgetting quality by the worst test that could be chosen without peeking."""
        names = (CONFIDENCE.name, ENTROPY.name)
        roles = [role for role in ROLES if role in case.models]
        judged = {role: honest_epsilon(score(role, "forget"), score(role, "holdout"), seed=case.options.seed)
                  for role in roles}  # fmt: skip
        rows: list[list[str | int | float | None]] = []
        for role in roles:
            naive, honest = worst_case_epsilon(score(role, "forget"), score(role, "holdout")), judged[role]
            for how, test, at in (("peeking", naive, naive), ("honest", honest.test, honest)):
                interval = (honest.lo, honest.hi) if at is honest else (None, None)
                fpr, fnr = (honest.fpr[0], honest.fnr[0]) if at is honest else (naive.fpr, naive.fnr)
                quality = 2.0**-at.epsilon
                side = "above" if test.above else "below"
                taken = f"{names[test.score]} {side} {test.threshold:.3g}"
                rows.append([role, how, taken, fpr, fnr, at.epsilon, *interval, quality])
        found = judged["target"]
        value, lo, hi = found.quality
        return Finding(
            id=f"{self.name}/worst-case",
            instrument=self.name,
            question=self.question,
            statistic="forgetting quality 2^-epsilon, by the worst threshold on confidence or entropy, chosen on one "
            "half and judged on the other",
            split="forget vs holdout",
            estimate=value,
            ci95=(lo, hi),
            n=found.n,
            unit="quality",
            orientation="forget and holdout images are harder to tell apart (1: not at all)",
            null="the test takes forget and holdout images for members equally often",
            null_value=1.0,
            p_value=found.p_value,
            smallest_p=found.smallest_p,
            threshold=_THRESHOLD,
            decides=(False, False),
            sides=(Side.NEITHER, Side.REMAINS if found.test.above else Side.BEYOND),
            noise=max(evidence.noise.values(), default=0.0),
            controls=[_known(case, score), classes, *_unseen(judged)],
            reference=f"{_COMPARATOR}; bounds by Clopper & Pearson 1934",
            table=Table(
                columns=["model", "how", "member if", "FPR", "FNR", "epsilon", "95 % from", "to", "quality"], rows=rows
            ),
        )


def class_control(case: Case) -> Control:
    """Do forget and holdout differ in their classes? Then what tells classes apart tells the sets apart.

    A retrained model does not mend that: two of them, from other initial weights, are unsure of other classes.
    """
    from scipy import stats

    forget, holdout = ([row.answer for row in case.rows(name)] for name in ("forget", "holdout"))
    classes = sorted({*forget, *holdout})
    counts = np.array([[rows.count(name) for name in classes] for rows in (forget, holdout)])
    shares = counts / counts.sum(axis=1, keepdims=True)
    distance = float(np.abs(shares[0] - shares[1]).sum() / 2)
    unlike = distance > SEPARABLE and len(classes) > 1 and float(stats.chi2_contingency(counts).pvalue) <= ALPHA
    return Control(
        name="class mix",
        description="share of forget images whose class the holdout set would have to exchange to be like it (must "
        "stay near 0)",
        estimate=distance,
        n=int(counts.sum()),
        passed=not unlike,
        gates="evidence",
    )


def _known(case: Case, score: Score) -> Control:
    """Does the worst case see images that were trained on? Compared with the same never-taught ones."""
    for role, name in (("target", "retain"), ("original", "forget")):
        if role in case.models and name in case.sets:
            found = honest_epsilon(score(role, name), score(role, "holdout"), seed=case.options.seed)
            words = f"{name} images in the {role} (trained on) against holdout images in it (unseen)"
            seen = found.p_value <= ALPHA and 1 - found.quality[0] >= _THRESHOLD
            return _control("positive control", words, found, passed=seen, gates="silence")
    words = "none at hand: needs a retain set or the original model"
    return Control(name="positive control", description=words, passed=False, gates="silence")


def _unseen(judged: dict[str, Judged]) -> list[Control]:
    """The worst case in the retrained model: is there anything to find where nothing was taught?"""
    if "retrained" not in judged:
        return []
    found = judged["retrained"]
    fair = found.lo == 0 or 1 - found.quality[0] < _THRESHOLD
    return [_control("retrained model", SAW_NEITHER, found, passed=fair, gates="evidence")]


def _control(name: str, words: str, found: Judged, *, passed: bool, gates: Literal["evidence", "silence"]) -> Control:
    value, lo, hi = found.quality
    return Control(name=name, description=words, estimate=value, ci95=(lo, hi), n=found.n, passed=passed, gates=gates)
