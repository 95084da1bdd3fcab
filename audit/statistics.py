"""Intervals, permutation tests, multiplicity and power: every number a finding quotes is computed here.

    >>> known, unseen = [1.0, 1.0, 0.0, 1.0] * 5, [0.0, 0.0, 1.0, 0.0] * 5
    >>> who = [f"author {i // 2}" for i in range(20)]
    >>> estimate = two_sample(known, unseen, who, who, bounds=(0, 1), seed=0)
    >>> estimate.value, estimate.n
    (0.5, 20)

Rows belong to **clusters** (an author with 20 questions, a person with 6 attributes), and only clusters are
independent: everything below resamples, flips or relabels whole clusters. Treating rows as independent makes
every interval too narrow and every p-value too small. A mean is a mean of rows, so a cluster weighs as much
as it has rows. Cluster labels (numbers or strings) are local to their group: the same label in both groups
means two different clusters. Where the *same* clusters occur on both sides, pair them and use `one_sample`.

Conventions, for all functions: rows are arrays of shape `[n]` (`[n, L]` for columns), clusters `[n]`; `seed`
is an int or a `numpy.random.Generator`, and the same seed gives the same numbers; intervals are 95 % and
tests two-sided; empty, misshapen, non-finite or out-of-bounds input raises a `ValueError` that names the
argument.

**Intervals** are cluster-bootstrap percentile intervals, expanded for few clusters by Student's t with
Welch's degrees of freedom (Hesterberg, "What teachers should know about the bootstrap", 2015); where so few
clusters need a tail beyond the bootstrap's reach, the t interval itself. A bootstrap cannot see what did not
occur: where at most two clusters differ from a bound, or all are alike, it is widened by Wilson's interval
with n = clusters. Without `bounds` such data say nothing about unseen values, and the interval is (-inf,
inf).

**Tests** are permutation tests, exact where at most 10,000 relabellings exist, else 9,999 random ones with
the +1 of Phipson & Smyth (2010). They are exact where clusters are exchangeable.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special
from scipy.stats import rankdata

from audit.arrays import finite

FloatArray = NDArray[np.float64]

Bounds = tuple[float, float]
Seed = int | np.random.Generator

LEVEL = 0.95
BOOTSTRAPS = 2_000
PERMUTATIONS = 9_999
EXACT_UP_TO = 10_000
_CHUNK = 200_000  # cells of a random array held at once: few enough to stay in cache
_FEW = 2  # up to so many clusters away from a bound, a bootstrap's spread is not to be trusted
_AT_BOUND = 1e-6  # as a part of the range: a cluster mean nearer than this lies at the bound


@dataclass(frozen=True)
class Estimate:
    """One statistic with its 95 % interval and two-sided p-value (None: nothing was tested).

    `n`: independent clusters used, both groups together. `smallest_p`: the smallest p-value that so few
    clusters can give (1 where nothing was tested); above the wanted level, no effect however large is seen.
    """

    value: float
    lo: float
    hi: float
    p_value: float | None
    n: int
    smallest_p: float


@dataclass(frozen=True)
class MaxEstimate(Estimate):
    """The column with the largest absolute difference; the price of having chosen it is in interval and p.

    `best`: its index. `per_column`: every column, all with simultaneous intervals and adjusted p-values.
    """

    best: int
    per_column: list[Estimate]


# --- proportions -------------------------------------------------------------------------------------------


def wilson(successes: float, n: float, level: float = LEVEL) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927); both may be fractional. n = 0 gives (0, 1)."""
    _check_counts(successes, n, level)
    if n == 0:
        return 0.0, 1.0
    z2 = float(special.ndtri((1 + level) / 2)) ** 2
    share = successes / n
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    lo = 0.0 if successes == 0 else max(0.0, centre - half)
    return lo, 1.0 if successes == n else min(1.0, centre + half)


def clopper_pearson(k: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Exact interval of a proportion, never below its level (Clopper & Pearson 1934). n = 0 gives (0, 1)."""
    _check_counts(k, n, level)
    tail = (1 - level) / 2
    lo = 0.0 if k == 0 else float(special.betaincinv(k, n - k + 1, tail))
    return lo, 1.0 if k == n else float(special.betaincinv(k + 1, n - k, 1 - tail))


# --- means and differences ---------------------------------------------------------------------------------


def mean_estimate(x: ArrayLike, clusters: ArrayLike, *, bounds: Bounds | None = None, seed: Seed) -> Estimate:
    """Mean of the rows `x`, with an interval and no test. `bounds`: the least and greatest possible value."""
    group = _group(x, clusters, "x", "clusters", bounds=bounds)
    lo, hi, _ = _one_interval(group, group.bootstrap(_rng(seed)), 0, bounds, LEVEL)
    return Estimate(float(group.mean[0]), lo, hi, None, group.size, 1.0)


def one_sample(d: ArrayLike, clusters: ArrayLike, *, seed: Seed, bounds: Bounds | None = None) -> Estimate:
    """Mean of paired differences `d` [n], tested against 0 by flipping the sign of whole clusters.

    `bounds` are those of a difference: (-1, 1) for a difference of two accuracies.
    Null: each cluster's differences are as likely with the opposite sign (Fisher 1935).
    """
    group, rng = _group(d, clusters, "d", "clusters", bounds=bounds), _rng(seed)
    value = float(group.mean[0])
    lo, hi, _ = _one_interval(group, group.bootstrap(rng), 0, bounds, LEVEL)
    exact = group.size <= math.floor(math.log2(EXACT_UP_TO))
    floor = 2.0 ** (1 - min(group.size, 1000))
    total = group.counts.sum()
    drawn = (np.abs(signs @ group.sums[:, 0]) / total for signs in _signs(group.size, exact, rng))
    tolerance = 1e-10 * float(np.abs(group.cluster_means).max())
    p, smallest = _p_value(drawn, np.array([abs(value)]), tolerance, exact, floor)
    return Estimate(value, lo, hi, float(p[0]), group.size, smallest)


def two_sample(
    a: ArrayLike,
    b: ArrayLike,
    a_clusters: ArrayLike,
    b_clusters: ArrayLike,
    *,
    seed: Seed,
    bounds: Bounds | None = None,
) -> Estimate:
    """mean(a) - mean(b), tested by relabelling whole clusters.

    `bounds` are those of a value in `a` or `b`, e.g. (0, 1). Where a group is degenerate at a bound the
    interval is combined from the two groups' own by MOVER (Zou & Donner 2008). The test is of Welch's t, the
    difference over its standard error by clusters: exact if the clusters of both groups come from one
    distribution, and right for many clusters if only their means are equal (Janssen 1997; Chung & Romano
    2013). The plain difference is not: 10 scattered clusters against 60 tight ones reject 3 times in 10.
    With equally many clusters of equal size the two tests are the same.
    """
    one = _group(a, a_clusters, "a", "a_clusters", bounds=bounds)
    two = _group(b, b_clusters, "b", "b_clusters", bounds=bounds)
    rng = _rng(seed)
    lo, hi = _difference_interval(one, two, one.bootstrap(rng), two.bootstrap(rng), 0, bounds, LEVEL)
    p, smallest = _relabelling_p(one, two, rng)
    value = float(one.mean[0] - two.mean[0])
    return Estimate(value, lo, hi, float(p[0]), one.size + two.size, smallest)


def max_over_columns(
    A: ArrayLike,
    B: ArrayLike,
    A_clusters: ArrayLike,
    B_clusters: ArrayLike,
    *,
    seed: Seed,
    bounds: Bounds | None = None,
) -> MaxEstimate:
    """The column (layer) of `A` [n_a, L] and `B` [n_b, L] whose means differ most, with the choice paid for.

    The p-value of every column refers its studentized |difference| (as in `two_sample`) to the permutation
    distribution of the largest one (Westfall & Young 1993, single step; one relabelling serves all columns),
    and the intervals form a simultaneous band, so whichever column is quoted, "best of L" is accounted for.
    `best` has the largest |difference|. The band is as wide for a quiet column as the noisiest one needs.
    """
    one = _group(A, A_clusters, "A", "A_clusters", ndim=2, bounds=bounds)
    two = _group(B, B_clusters, "B", "B_clusters", ndim=2, bounds=bounds)
    if one.sums.shape[1] != two.sums.shape[1]:
        raise ValueError(f"B has {two.sums.shape[1]} columns, A has {one.sums.shape[1]}")
    rng = _rng(seed)
    value = one.mean - two.mean
    draws_a, draws_b = one.bootstrap(rng), two.bootstrap(rng)
    half = float(np.quantile(np.abs(draws_a - draws_b - value).max(axis=1), LEVEL))
    variances = np.stack([draws_a.var(axis=0), draws_b.var(axis=0)])
    sizes = np.array([one.size, two.size])
    half *= max(_reach(v, sizes, LEVEL) for v in variances.T) / float(special.ndtri((1 + LEVEL) / 2))
    p, smallest = _relabelling_p(one, two, rng)
    columns = []
    for j, difference in enumerate(value):
        lo, hi = float(difference) - half, float(difference) + half
        level = 1 - (1 - LEVEL) / len(value)  # a degenerate column's own interval, at Bonferroni's level
        if any(_one_interval(g, w, j, bounds, level)[2] for g, w in ((one, draws_a), (two, draws_b))):
            own = _difference_interval(one, two, draws_a, draws_b, j, bounds, level)
            lo, hi = min(lo, own[0]), max(hi, own[1])
        if bounds is not None:
            lo, hi = max(lo, bounds[0] - bounds[1]), min(hi, bounds[1] - bounds[0])
        columns.append(Estimate(float(difference), lo, hi, float(p[j]), one.size + two.size, smallest))
    best = int(np.abs(value).argmax())
    c = columns[best]
    return MaxEstimate(c.value, c.lo, c.hi, c.p_value, c.n, c.smallest_p, best, columns)


def resampled(
    statistic: Callable[[FloatArray], FloatArray], n: int, *, bounds: Bounds | None = None, seed: Seed
) -> Estimate:
    """Any statistic of n clusters, with an interval and no test.

    `statistic` maps weights [b, n], how often each cluster counts, to values [b], NaN where there is none; the value is
    that of weights of one. A value that no resample changes is widened like a mean that none does.
    """
    if n < 1:
        raise ValueError("n must be at least 1")
    value = float(statistic(np.ones((1, n)))[0])
    if not math.isfinite(value):
        return Estimate(math.nan, math.nan, math.nan, None, n, 1.0)
    draws = np.concatenate([statistic(weights) for weights in _resamples(n, _rng(seed))])
    draws = draws[np.isfinite(draws)]
    lo, hi = _interval(value, draws, draws.var(keepdims=True), [n], LEVEL)
    least, most = bounds or (-math.inf, math.inf)
    if np.ptp(draws) <= 1e-9 * np.abs(draws).max():
        lo, hi = least, most
        if bounds is not None:
            share = float(np.clip((value - least) / (most - least), 0, 1))
            lo, hi = (least + end * (most - least) for end in wilson(share * n, n))
    # A skewed statistic's resamples may all lie on one side of it.
    return Estimate(value, max(least, min(lo, value)), min(most, max(hi, value)), None, n, 1.0)


def detectable(
    a: ArrayLike,
    b: ArrayLike,
    a_clusters: ArrayLike,
    b_clusters: ArrayLike,
    *,
    alpha: float = 0.01,
    power: float = 0.8,
    seed: Seed,
    bounds: Bounds | None = None,
) -> float:
    """Smallest |mean(a) - mean(b)| that `two_sample` would call significant at `alpha` with this `power`.

    (t[1 - alpha/2] + t[power]) times the standard error of the difference, each group's by its own cluster
    bootstrap, so that neither an effect that is there nor an unequal spread misleads it; t by Welch. In the
    units of the rows. `inf` where no effect can be detected or no claim of power is possible: too few
    clusters for `alpha`, or no variation at all and no `bounds`. A result beyond the range of the values
    means the same.
    """
    for name, share in (("alpha", alpha), ("power", power)):
        if not 0 < share < 1:
            raise ValueError(f"{name} must lie between 0 and 1, got {share}")
    one = _group(a, a_clusters, "a", "a_clusters", bounds=bounds)
    two = _group(b, b_clusters, "b", "b_clusters", bounds=bounds)
    rng = _rng(seed)
    n = one.size + two.size
    exact, floor = _split_count(n, one.size)
    if min(one.size, two.size) < 2 or max(floor, 0 if exact else 1 / (PERMUTATIONS + 1)) > alpha:
        return math.inf
    draws = [g.bootstrap(rng) for g in (one, two)]
    variances = np.array([w.var() for w in draws])
    sizes = np.array([one.size, two.size])
    sides = [_one_interval(g, w, 0, bounds, LEVEL) for g, w in zip((one, two), draws, strict=True)]
    if any(widened for _, _, widened in sides):
        if bounds is None:
            return math.inf
        z = float(special.ndtri((1 + LEVEL) / 2))
        variances = np.maximum(variances, [((hi - lo) / (2 * z)) ** 2 for lo, hi, _ in sides])
    needed = sum(_reach(variances, sizes, level) for level in (1 - alpha, 2 * power - 1))
    return float(needed * math.sqrt(variances.sum()))


# --- ranks -------------------------------------------------------------------------------------------------


def auc(positive: ArrayLike, negative: ArrayLike) -> float:
    """P(positive > negative) + P(equal) / 2 over all pairs of rows (Mann & Whitney 1947)."""
    pos, neg = finite(positive, "positive", 1), finite(negative, "negative", 1)
    ranks = rankdata(np.concatenate([pos, neg]))
    wins = ranks[: len(pos)].sum() - len(pos) * (len(pos) + 1) / 2
    return float(wins / (len(pos) * len(neg)))


def auc_two_sample(
    positive: ArrayLike,
    negative: ArrayLike,
    pos_clusters: ArrayLike,
    neg_clusters: ArrayLike,
    *,
    seed: Seed,
) -> Estimate:
    """AUC of two sets of scores, tested against 0.5 by relabelling whole clusters (rank sums).

    Null: the clusters of both sets come from one distribution. Very unequal spread in sets of very unequal
    size can be rejected even where the AUC is 0.5; then trust the interval.

    Near 0 or 1 the bootstrap's interval is widened by Wilson's with n = the smaller number of clusters: that
    is AUC (1 - AUC) / n, the largest variance an AUC can have (Birnbaum & Klose 1957). Needs 8 bytes for each
    pair of a positive and a negative cluster.
    """
    pos = _group(positive, pos_clusters, "positive", "pos_clusters")
    neg = _group(negative, neg_clusters, "negative", "neg_clusters")
    rng = _rng(seed)
    wins = np.empty((pos.size, neg.size))  # of each positive cluster over each negative one, in pairs of rows
    for j in range(neg.size):
        rival = np.sort(neg.rows[neg.index == j])
        beaten = np.searchsorted(rival, pos.rows, "left") + np.searchsorted(rival, pos.rows, "right")
        wins[:, j] = np.bincount(pos.index, beaten / 2, pos.size)
    pairs = np.outer(pos.counts, neg.counts)
    value = float(wins.sum() / pairs.sum())
    lo, hi = _auc_interval(value, wins, pairs, rng)

    cells = np.concatenate([pos.index, pos.size + neg.index])
    ranks = np.bincount(cells, rankdata(np.concatenate([pos.rows, neg.rows])))
    counts = np.concatenate([pos.counts, neg.counts])

    def distance(mask: FloatArray) -> FloatArray:
        size = mask @ counts
        won = mask @ ranks - size * (size + 1) / 2
        return np.asarray(np.abs(won / (size * (counts.sum() - size)) - 0.5))

    n = pos.size + neg.size
    exact, floor = _split_count(n, pos.size)
    drawn = (distance(mask) for mask in _splits(n, pos.size, exact, rng))
    p, smallest = _p_value(drawn, np.array([abs(value - 0.5)]), 1e-10, exact, floor)
    return Estimate(value, lo, hi, float(p[0]), n, smallest)


def tpr_at_fpr(positive: ArrayLike, negative: ArrayLike, fpr: float = 0.01) -> float:
    """Largest share of positives above a threshold that at most `fpr` of the negatives pass (Carlini 2022).

    With fewer than 1 / `fpr` negatives no false positive is allowed at all, and the figure says little.
    """
    pos, neg = finite(positive, "positive", 1), finite(negative, "negative", 1)
    if not 0 <= fpr <= 1:
        raise ValueError(f"fpr must lie in [0, 1], got {fpr}")
    allowed = math.floor(fpr * len(neg) + 1e-9)
    return 1.0 if allowed >= len(neg) else float((pos > np.sort(neg)[::-1][allowed]).mean())


# --- directions ---------------------------------------------------------------------------------------------


def principal_axes(rows: ArrayLike, k: int = 1) -> tuple[FloatArray, FloatArray]:
    """The k lines [k, d] along which rows [n, d] vary most, of unit length, and the standard deviations along them [k].

    Right singular vectors of the rows less their mean. The sign is that of the largest loading, made positive. Raises
    `ValueError` where k is not between 1 and min(n - 1, d).
    """
    x = np.asarray(rows, dtype=np.float64)
    if x.ndim != 2 or not 1 <= k <= min(len(x) - 1, x.shape[1]):
        raise ValueError(f"k = {k} directions of states of shape {x.shape}")
    x = x - x.mean(0)
    wide = len(x) < x.shape[1]  # the smaller Gram matrix has the same singular values
    values, vectors = np.linalg.eigh(x @ x.T if wide else x.T @ x)
    axes = vectors[:, : -k - 1 : -1].T
    if wide:
        axes = axes @ x
        axes /= np.maximum(np.linalg.norm(axes, axis=1, keepdims=True), np.finfo(float).tiny)
    largest = np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1)
    deviations = np.sqrt(np.maximum(values[: -k - 1 : -1], 0) / (len(x) - 1))
    return np.asarray(axes * np.where(largest < 0, -1.0, 1.0)), np.asarray(deviations)


# --- multiplicity ------------------------------------------------------------------------------------------


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values adjusted for their number (Holm 1979), in their order. None stays None and is not counted."""
    tested = np.array([p for p in p_values if p is not None])
    if not ((tested >= 0) & (tested <= 1)).all():
        raise ValueError("p_values must lie in [0, 1]")
    order = np.argsort(tested, kind="stable")
    raised = tested[order] * np.arange(len(tested), 0, -1)
    adjusted = np.empty(len(tested))
    adjusted[order] = np.minimum(np.maximum.accumulate(raised), 1.0)
    values = iter(adjusted.tolist())
    return [None if p is None else next(values) for p in p_values]


# --- clusters ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """Rows summed by cluster: all that a mean needs. C clusters, L columns."""

    rows: FloatArray  # [n] or [n, L]
    index: NDArray[np.intp]  # [n], each row's cluster
    sums: FloatArray  # [C, L]
    counts: FloatArray  # [C]

    @property
    def size(self) -> int:
        return len(self.counts)

    @property
    def mean(self) -> FloatArray:
        return np.asarray(self.sums.sum(axis=0) / self.counts.sum())

    @property
    def cluster_means(self) -> FloatArray:
        return self.sums / self.counts[:, None]

    def bootstrap(self, rng: np.random.Generator) -> FloatArray:
        """Means [BOOTSTRAPS, L] of resampled clusters."""
        return np.concatenate([(w @ self.sums) / (w @ self.counts)[:, None] for w in _resamples(self.size, rng)])


def _rng(seed: Seed) -> np.random.Generator:
    return np.random.default_rng(seed)


def _check_counts(successes: float, n: float, level: float) -> None:
    if not (math.isfinite(n) and 0 <= successes <= n):
        raise ValueError(f"successes must lie between 0 and n, got {successes} of {n}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")


def cluster_index(clusters: ArrayLike, n: int, name: str) -> NDArray[np.intp]:
    """Each row's cluster as a number from 0 on, [n]. A missing label (None, NaN) is a `ValueError`."""
    labels = np.asarray(clusters)
    if labels.shape != (n,):
        raise ValueError(f"{name} must have shape ({n},), got {labels.shape}")
    if labels.dtype.kind not in "biufSU":
        if any(label is None or label != label for label in labels):
            raise ValueError(f"{name} has missing labels")
        labels = np.array([f"{type(label).__name__}:{label}" for label in labels])
    if labels.dtype.kind == "f" and np.isnan(labels).any():
        raise ValueError(f"{name} has missing labels")
    return np.asarray(np.unique(labels, return_inverse=True)[1], dtype=np.intp)


def halves(clusters: ArrayLike, seed: int) -> NDArray[np.bool_]:
    """Which rows belong to one half of the clusters, drawn by seed: whole clusters, [n]."""
    names = np.unique(clusters)
    return np.isin(clusters, np.random.default_rng(seed).permutation(names)[: len(names) // 2])


def dealt(clusters: ArrayLike, groups: int, seed: Seed) -> NDArray[np.intp]:
    """To which of some groups, of equally many clusters, each row's cluster was dealt: [n]."""
    names, place = np.unique(clusters, return_inverse=True)
    return np.asarray((np.random.default_rng(seed).permutation(len(names)) % groups)[place], dtype=np.intp)


def jackknife_error(without: ArrayLike) -> float:
    """Standard error of a number from what it is without each of k groups, [k]; infinite without groups."""
    values = np.asarray(without, dtype=np.float64)
    k = len(values)
    return math.sqrt((k - 1) / k * float(((values - values.mean()) ** 2).sum())) if k else math.inf


def _group(
    x: ArrayLike,
    clusters: ArrayLike,
    name: str,
    clusters_name: str,
    *,
    ndim: int = 1,
    bounds: Bounds | None = None,
) -> _Group:
    rows = finite(x, name, ndim)
    index = cluster_index(clusters, len(rows), clusters_name)
    if bounds is not None:
        if not (np.isfinite(bounds).all() and bounds[0] < bounds[1]):
            raise ValueError(f"bounds must be two finite numbers, the lower first, got {bounds}")
        slack = 1e-9 * (bounds[1] - bounds[0])  # a mean of float32 may end a hair beyond 1
        if rows.min() < bounds[0] - slack or rows.max() > bounds[1] + slack:
            raise ValueError(f"{name} has values outside bounds {bounds}")
        rows = rows.clip(*bounds)
    counts = np.bincount(index).astype(np.float64)
    columns = rows.reshape(len(rows), -1).T
    sums = [np.bincount(index, column) for column in columns]
    return _Group(rows, index, np.stack(sums, axis=1, dtype=np.float64), counts)


# --- the bootstrap -----------------------------------------------------------------------------------------


def _resamples(size: int, rng: np.random.Generator) -> Iterator[FloatArray]:
    """How often each of `size` clusters occurs in each resample: chunks [b, size], BOOTSTRAPS rows in all."""
    step = max(1, _CHUNK // size)
    for start in range(0, BOOTSTRAPS, step):
        b = min(step, BOOTSTRAPS - start)
        cells = rng.integers(0, size, (b, size)) + size * np.arange(b)[:, None]
        yield np.bincount(cells.ravel(), minlength=b * size).reshape(b, size).astype(np.float64)


def _reach(variances: FloatArray, sizes: NDArray[np.int_], level: float) -> float:
    """Bootstrap SDs that an interval must reach: Welch's t times its shortfall, sqrt(C / (C - 1))."""
    total = variances.sum()
    if total <= 0:
        return 0.0
    free = np.maximum(sizes - 1, 1)
    unbiased = variances * sizes / free
    df = unbiased.sum() ** 2 / (unbiased**2 / free).sum()
    return float(math.sqrt(unbiased.sum() / total) * special.stdtrit(df, (1 + level) / 2))


def _interval(value: float, draws: FloatArray, variances: FloatArray, sizes: Sequence[int], level: float) -> Bounds:
    """Expanded percentile interval; `variances` and `sizes` are those of the independent groups."""
    reach = _reach(variances, np.array(sizes), level)
    tail = float(special.ndtr(-reach))
    if tail * len(draws) < 1:  # the bootstrap has no quantile so far out
        half = reach * math.sqrt(variances.sum())
        return value - half, value + half
    lo, hi = np.quantile(draws, [tail, 1 - tail])
    return float(lo), float(hi)


def _one_interval(
    group: _Group, draws: FloatArray, j: int, bounds: Bounds | None, level: float
) -> tuple[float, float, bool]:
    """Interval of column j's mean, and whether the bootstrap alone would have been too narrow."""
    value, means, n = float(group.mean[j]), group.cluster_means[:, j], group.size
    lo, hi = _interval(value, draws[:, j], draws[:, j].var(keepdims=True), [n], level)
    flat = bool(n == 1 or np.ptp(means) <= 1e-9 * np.abs(means).max())
    if bounds is None:
        return (-math.inf, math.inf, True) if flat else (lo, hi, False)
    least, most = bounds
    share = (means - least) / (most - least)
    away = int(min((share > _AT_BOUND).sum(), (share < 1 - _AT_BOUND).sum()))
    if away <= _FEW:
        low, high = wilson(float(np.clip((value - least) / (most - least), 0, 1)) * n, n, level)
        lo, hi = min(lo, least + low * (most - least)), max(hi, least + high * (most - least))
    if flat and away:  # alike, but not at a bound: a share of clusters as large as this may be anything else
        unseen = wilson(0, n - 1, level)[1]
        lo, hi = min(lo, value - unseen * (value - least)), max(hi, value + unseen * (most - value))
    return max(lo, least), min(hi, most), flat or away <= _FEW


def _difference_interval(
    one: _Group, two: _Group, a: FloatArray, b: FloatArray, j: int, bounds: Bounds | None, level: float
) -> Bounds:
    """Interval of column j's difference of means; `a` and `b` are the groups' bootstrap means."""
    first, second = float(one.mean[j]), float(two.mean[j])
    lo_a, hi_a, widened_a = _one_interval(one, a, j, bounds, level)
    lo_b, hi_b, widened_b = _one_interval(two, b, j, bounds, level)
    if widened_a or widened_b:  # MOVER
        down = math.hypot(first - lo_a, hi_b - second)
        return first - second - down, first - second + math.hypot(hi_a - first, second - lo_b)
    variances = np.array([a[:, j].var(), b[:, j].var()])
    lo, hi = _interval(first - second, a[:, j] - b[:, j], variances, [one.size, two.size], level)
    return (lo, hi) if bounds is None else (max(lo, bounds[0] - bounds[1]), min(hi, bounds[1] - bounds[0]))


def _auc_interval(value: float, wins: FloatArray, pairs: FloatArray, rng: np.random.Generator) -> Bounds:
    """`wins` and `pairs`: pairs of rows won, and all, of each positive with each negative cluster, [P, N]."""
    p, q = (np.concatenate(list(_resamples(size, rng))) for size in wins.shape)
    draws = ((p @ wins) * q).sum(axis=1) / ((p @ pairs) * q).sum(axis=1)
    alone = [w @ wins.sum(axis=axis) / (w @ pairs.sum(axis=axis)) for w, axis in ((p, 1), (q, 0))]
    variances = np.array([side.var() for side in alone])  # each side's share of the variance
    lo, hi = _interval(value, draws, variances, wins.shape, LEVEL)
    if 0 < value < 1:  # percentiles lag behind the skewness of an AUC near 1: t on the logit scale as well
        half = _reach(variances, np.array(wins.shape), LEVEL) * math.sqrt(variances.sum()) / (value * (1 - value))
        lo = min(lo, float(special.expit(special.logit(value) - half)))
        hi = max(hi, float(special.expit(special.logit(value) + half)))
    away = min(int(cells.any(axis=axis).sum()) for cells in (wins > 0, wins < pairs) for axis in (0, 1))
    if away <= _FEW or hi - lo <= 1e-9:
        n = min(wins.shape)
        low, high = wilson(value * n, n)
        lo, hi = min(lo, low), max(hi, high)
    return max(lo, 0.0), min(hi, 1.0)


# --- permutations ------------------------------------------------------------------------------------------


def _split_count(n: int, k: int) -> tuple[bool, float]:
    """Whether all ways to pick k of n clusters can be tried, and the smallest p-value if they were."""
    ways = math.comb(n, k)
    return ways <= EXACT_UP_TO, (2 if 2 * k == n else 1) / ways  # in halves, each split has its mirror image


def _splits(n: int, k: int, exact: bool, rng: np.random.Generator) -> Iterator[FloatArray]:
    """Masks [b, n] that put k of n clusters into the first group: every one, or PERMUTATIONS random ones."""
    step = max(1, _CHUNK // n)
    if exact:
        few = min(k, n - k)
        picks = itertools.combinations(range(n), few)
        while chunk := list(itertools.islice(picks, step)):
            mask = np.zeros((len(chunk), n))
            mask[np.arange(len(chunk))[:, None], np.array(chunk)] = 1
            yield mask if few == k else 1 - mask
        return
    for start in range(0, PERMUTATIONS, step):
        mask = np.zeros((min(step, PERMUTATIONS - start), n))
        mask[:, :k] = 1
        yield rng.permuted(mask, axis=1)


def _signs(n: int, exact: bool, rng: np.random.Generator) -> Iterator[FloatArray]:
    """Signs [b, n] of n clusters: every combination, or PERMUTATIONS random ones."""
    if exact:
        bits = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        yield 1 - 2 * bits.astype(np.float64)
        return
    step = max(1, _CHUNK // n)
    for start in range(0, PERMUTATIONS, step):
        yield rng.choice([-1.0, 1.0], (min(step, PERMUTATIONS - start), n))


def _p_value(
    drawn: Iterator[FloatArray],
    observed: FloatArray,
    tolerance: float | FloatArray,
    exact: bool,
    floor: float,
) -> tuple[FloatArray, float]:
    """Share of relabellings at least as extreme as `observed` [L], and the smallest p-value attainable."""
    count, extreme = 0, np.zeros(len(observed))
    for chunk in drawn:
        count += len(chunk)
        extreme += (chunk[:, None] >= observed - tolerance).sum(axis=0)
    if exact:
        return extreme / count, floor
    return np.maximum((extreme + 1) / (count + 1), floor), max(floor, 1 / (count + 1))


def _relabelling_p(one: _Group, two: _Group, rng: np.random.Generator) -> tuple[FloatArray, float]:
    """p-values [L] of differences of means, against the largest studentized |difference| of any column."""
    sums, counts = np.concatenate([one.sums, two.sums]), np.concatenate([one.counts, two.counts])
    sums = sums - counts[:, None] * (sums.sum(axis=0) / counts.sum())  # for precision: the mean has no say
    moments = np.column_stack([sums, sums**2, sums * counts[:, None], counts, counts**2])
    columns = sums.shape[1]
    # Where a split leaves no variance at all, the difference itself decides: nothing is divided by zero.
    tiny = (1e-4 * np.abs(sums / counts[:, None]).max(axis=0)) ** 2 + np.finfo(float).tiny

    def side(total: FloatArray, k: int) -> tuple[FloatArray, FloatArray]:
        """Mean and its squared standard error by cluster residuals, [b, L], of a group of k clusters."""
        s, s2, sn = (total[:, i * columns : (i + 1) * columns] for i in range(3))
        n, n2 = total[:, -2:-1], total[:, -1:]
        mean = s / n
        squares = np.maximum(s2 - 2 * mean * sn + mean**2 * n2, 0)
        return mean, squares / n**2 * (k / max(k - 1, 1))

    def studentized(mask: FloatArray) -> FloatArray:
        total = mask @ moments
        (mean_a, var_a), (mean_b, var_b) = side(total, one.size), side(moments.sum(axis=0) - total, two.size)
        return np.asarray(np.abs(mean_a - mean_b) / np.sqrt(var_a + var_b + tiny))

    n = one.size + two.size
    observed = studentized((np.arange(n) < one.size)[None].astype(np.float64))[0]
    exact, floor = _split_count(n, one.size)
    drawn = (studentized(mask).max(axis=1) for mask in _splits(n, one.size, exact, rng))
    return _p_value(drawn, observed, 1e-7 * observed, exact, floor)
