"""Statistics against independent ground truth: SciPy, scikit-learn, brute force, and simulated worlds."""

from __future__ import annotations

import doctest
import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve

import audit.statistics
from audit.controls import bag_of_words_auc, grouped_folds
from audit.statistics import (
    auc,
    auc_two_sample,
    clopper_pearson,
    detectable,
    holm,
    max_over_columns,
    mean_estimate,
    one_sample,
    resampled,
    tpr_at_fpr,
    two_sample,
    wilson,
)

Rows = tuple[np.ndarray, np.ndarray]


def correlated(rng, sizes, spread=1.0, mean=0.0) -> Rows:
    """Normal rows that share their cluster's own offset, of SD `spread`."""
    clusters = np.repeat(np.arange(len(sizes)), sizes)
    return mean + (spread * rng.standard_normal(len(sizes)))[clusters] + rng.standard_normal(len(clusters)), clusters


def binary(rng, clusters, rows, rate, concentration=2.0) -> Rows:
    rates = rng.beta(rate * concentration, (1 - rate) * concentration, clusters)
    index = np.repeat(np.arange(clusters), rows)
    return (rng.random(len(index)) < rates[index]).astype(float), index


def below(rejections: int, runs: int, alpha: float) -> bool:
    """Fewer rejections than 999 in 1,000 valid tests would show."""
    return rejections <= stats.binom.ppf(0.999, runs, alpha)


ragged = st.integers(0, 2**32 - 1).map(
    lambda seed: (
        lambda rng: (
            *correlated(rng, rng.integers(1, 6, rng.integers(2, 9))),
            *correlated(rng, rng.integers(1, 6, rng.integers(2, 9))),
        )
    )(np.random.default_rng(seed))
)
few = settings(max_examples=40, deadline=None)


# --- proportions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k, n", [(0, 1), (1, 1), (0, 20), (20, 20), (3, 20), (499, 1000)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_proportion_intervals_equal_scipys(k, n, level):
    truth = stats.binomtest(k, n)
    for ours, method in ((wilson, "wilson"), (clopper_pearson, "exact")):
        reference = truth.proportion_ci(level, method)
        assert ours(k, n, level) == pytest.approx((reference.low, reference.high), abs=1e-9)


def test_proportion_intervals_at_the_ends():
    assert wilson(0, 0) == clopper_pearson(0, 0) == (0.0, 1.0)
    for interval in (wilson, clopper_pearson):
        assert interval(0, 30)[0] == 0.0 and 0.05 < interval(0, 30)[1] < 0.2
        assert interval(30, 30)[1] == 1.0 and 0.8 < interval(30, 30)[0] < 0.95
    assert wilson(0.5, 20)[0] > 0
    for bad in ((-1, 3), (4, 3), (math.nan, 3)):
        with pytest.raises(ValueError, match="successes"):
            wilson(*bad)


# --- permutation tests against SciPy and brute force -------------------------------------------------------


def test_two_sample_equals_scipys_exact_test_of_means():
    rng = np.random.default_rng(1)
    for _ in range(5):
        a, b = rng.normal(0.8, 1, 6), rng.normal(0, 1, 6)
        ours = two_sample(a, b, range(6), range(6), seed=0)
        exact = stats.permutation_test((a, b), lambda x, y: abs(x.mean() - y.mean()), alternative="greater")
        assert ours.p_value == pytest.approx(exact.pvalue, abs=1e-12)
        assert ours.smallest_p == 2 / math.comb(12, 6) and ours.n == 12
        assert ours.value == pytest.approx(a.mean() - b.mean())


def test_two_sample_equals_scipys_exact_test_of_welchs_t():
    rng = np.random.default_rng(2)
    for _ in range(2):
        a, b = rng.normal(1, 2, 4), rng.normal(0, 1, 9)
        ours = two_sample(a, b, list("wxyz"), range(9), seed=0)

        def t(x, y):
            return abs(stats.ttest_ind(x, y, equal_var=False).statistic)

        exact = stats.permutation_test((a, b), t, alternative="greater", vectorized=False)
        assert ours.p_value == pytest.approx(exact.pvalue, abs=1e-12)
        assert ours.smallest_p == 1 / math.comb(13, 4)


def brute_force_t(groups):
    """Welch's t of means of rows with cluster-robust standard errors; each group a list of clusters' rows."""
    means, variances = [], []
    for group in groups:
        rows = np.concatenate(group)
        residuals = np.array([(rows_of_one - rows.mean()).sum() for rows_of_one in group])
        means.append(rows.mean())
        variances.append((residuals**2).sum() / len(rows) ** 2 * len(group) / (len(group) - 1))
    return abs(means[0] - means[1]) / math.sqrt(sum(variances))


def test_ragged_clusters_equal_brute_force():
    rng = np.random.default_rng(3)
    for sizes_a, sizes_b in (([1, 4, 2], [3, 1, 5, 2]), ([2, 2, 7, 1], [6, 1, 1, 3])):
        a, ca = correlated(rng, sizes_a, mean=1)
        b, cb = correlated(rng, sizes_b)
        pool = [a[ca == c] for c in range(len(sizes_a))] + [b[cb == c] for c in range(len(sizes_b))]
        k, everyone = len(sizes_a), set(range(len(pool)))
        splits = [(set(s), everyone - set(s)) for s in itertools.combinations(range(len(pool)), k)]
        t = np.array([brute_force_t([[pool[i] for i in side] for side in split]) for split in splits])
        u = np.array([auc(*(np.concatenate([pool[i] for i in side]) for side in split)) for split in splits])
        assert two_sample(a, b, ca, cb, seed=0).p_value == pytest.approx((t >= t[0] - 1e-6 * t[0]).mean())
        area = auc_two_sample(a, b, ca, cb, seed=0)
        assert area.p_value == pytest.approx((abs(u - 0.5) >= abs(u[0] - 0.5) - 1e-9).mean())
        assert area.value == pytest.approx(u[0])


def test_sign_flips_equal_scipy_and_brute_force():
    rng = np.random.default_rng(4)
    d = rng.normal(0.5, 1, 9)
    exact = stats.permutation_test(
        (d,), lambda x: abs(x.mean()), permutation_type="samples", alternative="greater", vectorized=False
    )
    ours = one_sample(d, range(9), seed=0)
    assert ours.p_value == pytest.approx(exact.pvalue) and ours.smallest_p == 2 / 2**9
    d, clusters = correlated(rng, [1, 4, 2, 3], mean=0.7)
    flips = [abs((d * np.array(signs)[clusters]).mean()) for signs in itertools.product([1, -1], repeat=4)]
    assert one_sample(d, clusters, seed=0).p_value == np.mean(np.array(flips) >= flips[0] - 1e-12)


def test_many_rows_agree_with_asymptotic_tests():
    rng = np.random.default_rng(5)
    a, b = rng.normal(0.25, 1, 120), rng.normal(0, 1.5, 150)
    welch = stats.ttest_ind(a, b, equal_var=False)
    ours = two_sample(a, b, range(120), range(150), seed=0)
    assert ours.p_value == pytest.approx(welch.pvalue, abs=0.015)
    assert (ours.lo, ours.hi) == pytest.approx(tuple(welch.confidence_interval()), abs=0.05)
    area = auc_two_sample(a, b, range(120), range(150), seed=0)
    assert area.p_value == pytest.approx(stats.mannwhitneyu(a, b).pvalue, abs=0.015)
    t = stats.ttest_1samp(a, 0)
    alone = one_sample(a, range(120), seed=0)
    assert alone.p_value == pytest.approx(t.pvalue, abs=0.005)
    assert (alone.lo, alone.hi) == pytest.approx(tuple(t.confidence_interval()), abs=0.03)


def test_max_over_columns_equals_brute_force():
    rng = np.random.default_rng(6)
    A, B = rng.normal(0.6, 1, (5, 3)), rng.normal(0, 1, (4, 3)) * [1, 3, 1]
    ours = max_over_columns(A, B, range(5), range(4), seed=0)
    pool = np.concatenate([A, B])
    null = []
    for split in itertools.combinations(range(9), 5):
        rest = [i for i in range(9) if i not in split]
        null.append(np.abs(stats.ttest_ind(pool[list(split)], pool[rest], equal_var=False).statistic))
    null = np.array(null)  # [126, 3]; the first split is the observed one
    expected = [(null.max(axis=1) >= null[0, j] * (1 - 1e-6)).mean() for j in range(3)]
    assert [c.p_value for c in ours.per_column] == pytest.approx(expected)
    difference = A.mean(axis=0) - B.mean(axis=0)
    assert ours.best == np.abs(difference).argmax() and ours.value == pytest.approx(difference[ours.best])
    assert ours.p_value == ours.per_column[ours.best].p_value and ours.n == 9
    alone = two_sample(A[:, 0], B[:, 0], range(5), range(4), seed=0)
    single = max_over_columns(A[:, :1], B[:, :1], range(5), range(4), seed=0)
    assert single.p_value == alone.p_value


# --- type-I error ------------------------------------------------------------------------------------------


def test_no_test_over_rejects_correlated_rows_and_a_row_level_test_would():
    rng, runs, alpha = np.random.default_rng(7), 250, 0.05
    ours = np.zeros(3, dtype=int)
    by_row = np.zeros(3, dtype=int)
    for _ in range(runs):
        (a, ca), (b, cb) = correlated(rng, [8] * 7), correlated(rng, [8] * 6)
        ours += [
            e.p_value <= alpha
            for e in (
                two_sample(a, b, ca, cb, seed=rng),
                auc_two_sample(a, b, ca, cb, seed=rng),
                one_sample(a, ca, seed=rng),
            )
        ]
        by_row += [
            test.pvalue <= alpha for test in (stats.ttest_ind(a, b), stats.mannwhitneyu(a, b), stats.ttest_1samp(a, 0))
        ]
    assert all(below(r, runs, alpha) for r in ours), ours
    assert not any(below(r, runs, 4 * alpha) for r in by_row), by_row  # so this test can fail


def test_unequal_spread_in_unequal_groups_is_not_called_a_difference():
    rng, runs = np.random.default_rng(8), 100
    rejections = plain = 0
    for _ in range(runs):
        (a, ca), (b, cb) = correlated(rng, [3] * 10, 2.0), correlated(rng, [3] * 60, 0.3)
        rejections += two_sample(a, b, ca, cb, seed=rng).p_value <= 0.05
        pool = np.concatenate([a, b]).reshape(70, 3).mean(axis=1)
        shuffled = rng.permuted(np.tile(pool, (200, 1)), axis=1)
        null = np.abs(shuffled[:, :10].mean(axis=1) - shuffled[:, 10:].mean(axis=1))
        plain += (null >= abs(a.mean() - b.mean())).mean() <= 0.05
    assert below(rejections, runs, 0.07), rejections
    assert not below(plain, runs, 0.15), plain


def test_choosing_the_best_layer_is_paid_for():
    rng, runs, layers = np.random.default_rng(9), 80, 12
    rejections = covered = naive = 0
    clusters = np.repeat(np.arange(7), 4)
    for _ in range(runs):
        A, B = (np.stack([correlated(rng, [4] * 7)[0] for _ in range(layers)], axis=1) for _ in range(2))
        found = max_over_columns(A, B, clusters, clusters, seed=rng)
        rejections += found.p_value <= 0.05
        covered += all(c.lo <= 0 <= c.hi for c in found.per_column)
        j = found.best
        naive += two_sample(A[:, j], B[:, j], clusters, clusters, seed=rng).p_value <= 0.05
    assert below(rejections, runs, 0.05), rejections
    assert covered >= 70
    assert not below(naive, runs, 0.1), naive


def test_max_over_columns_finds_the_planted_layer():
    rng = np.random.default_rng(10)
    A, B = rng.normal(size=(60, 8)), rng.normal(size=(80, 8))
    A[:, 5] += 1.5
    clusters = np.repeat(np.arange(20), 3), np.repeat(np.arange(20), 4)
    found = max_over_columns(A, B, *clusters, seed=0)
    assert found.best == 5 and found.p_value == found.smallest_p == 1e-4 and 0.5 < found.lo < 1.5 < found.hi + 0.5
    assert len(found.per_column) == 8 and min(c.p_value for i, c in enumerate(found.per_column) if i != 5) > 0.01


# --- coverage ----------------------------------------------------------------------------------------------


def mean_of_normals(rng):
    return mean_estimate(*correlated(rng, rng.integers(1, 9, 12), mean=3), seed=rng), 3


def mean_of_four_clusters(rng):
    return mean_estimate(*correlated(rng, [5] * 4), seed=rng), 0


def mean_of_answers(rng):
    return mean_estimate(*binary(rng, 20, 8, 0.3), bounds=(0, 1), seed=rng), 0.3


def paired(rng):
    return one_sample(*correlated(rng, [5] * 16, mean=1), seed=rng), 1


def difference(rng):
    (a, ca), (b, cb) = correlated(rng, [6] * 10, 2, 1), correlated(rng, rng.integers(1, 9, 25), 0.5)
    return two_sample(a, b, ca, cb, seed=rng), 1


def difference_of_answers(rng):
    (a, ca), (b, cb) = binary(rng, 15, 8, 0.7), binary(rng, 20, 8, 0.2)
    return two_sample(a, b, ca, cb, bounds=(0, 1), seed=rng), 0.5


def area(rng):
    (a, ca), (b, cb) = correlated(rng, [4] * 12, 1, 2), correlated(rng, [4] * 20, 1, 0)
    return auc_two_sample(a, b, ca, cb, seed=rng), stats.norm.cdf(1)


@pytest.mark.parametrize(
    "world",
    [
        mean_of_normals,
        mean_of_four_clusters,
        mean_of_answers,
        paired,
        difference,
        difference_of_answers,
        area,
    ],
    ids=lambda world: world.__name__,
)
def test_intervals_cover_the_truth(world):
    rng, runs = np.random.default_rng(11), 300
    hits = sum(e.lo <= truth <= e.hi for e, truth in (world(rng) for _ in range(runs)))
    assert 0.90 <= hits / runs <= 0.99, hits / runs


def test_intervals_of_rows_taken_as_independent_would_not_cover():
    rng = np.random.default_rng(12)
    hits = 0
    for _ in range(100):
        x, _ = correlated(rng, [8] * 12)
        e = mean_estimate(x, range(len(x)), seed=rng)
        hits += e.lo <= 0 <= e.hi
    assert hits < 80


@pytest.mark.parametrize("rate", [0.005, 0.02])
def test_rare_answers_keep_the_interval_honest(rate):
    rng = np.random.default_rng(13)
    found = [mean_estimate(*binary(rng, 20, 5, rate, 0.5), bounds=(0, 1), seed=rng) for _ in range(200)]
    assert np.mean([e.lo <= rate <= e.hi for e in found]) >= 0.93
    assert min(e.hi for e in found) > 0.1  # 20 clusters cannot say more


# --- degenerate data ---------------------------------------------------------------------------------------

WHO = np.repeat(np.arange(20), 5)
ZEROS, ONES = np.zeros(100), np.ones(100)


def test_a_mean_at_a_bound_gets_wilsons_interval():
    for x, k in ((ZEROS, 0), (ONES, 20)):
        e = mean_estimate(x, WHO, bounds=(0, 1), seed=0)
        assert (e.lo, e.hi) == pytest.approx(wilson(k, 20)) and e.p_value is None
    e = mean_estimate(4 * ONES, WHO, bounds=(2, 4), seed=0)
    assert (e.lo, e.hi) == pytest.approx((2 + 2 * wilson(20, 20)[0], 4))


def test_one_row_off_the_bound_does_not_collapse_the_interval():
    x = ZEROS.copy()
    x[0] = 1
    assert mean_estimate(x, WHO, bounds=(0, 1), seed=0).hi > wilson(0, 20)[1]


def test_differences_of_degenerate_groups():
    e = two_sample(ONES, ZEROS, WHO, WHO, bounds=(0, 1), seed=0)
    width = 1 - wilson(20, 20)[0]
    assert (e.value, e.hi) == (1, 1) and e.lo == pytest.approx(1 - math.hypot(width, width))
    assert e.p_value == e.smallest_p == 1e-4
    e = two_sample(ZEROS, ZEROS, WHO, WHO, bounds=(0, 1), seed=0)
    assert e.value == 0 and e.lo == pytest.approx(-width) and e.hi == pytest.approx(width) and e.p_value == 1
    e = one_sample(ZEROS, WHO, bounds=(-1, 1), seed=0)
    assert -0.2 < e.lo < -0.1 and 0.1 < e.hi < 0.2 and e.p_value == 1
    A, B = np.stack([ONES, ZEROS], axis=1), np.stack([ZEROS, ZEROS], axis=1)
    e = max_over_columns(A, B, WHO, WHO, bounds=(0, 1), seed=0)
    assert e.best == 0 and 0.5 < e.lo < 0.8 and e.hi == 1 and e.per_column[1].lo < -0.1 < 0.1 < e.per_column[1].hi


def test_without_bounds_or_with_one_cluster_nothing_is_known():
    assert mean_estimate(ONES, WHO, seed=0).hi == math.inf
    x = np.random.default_rng(0).random(20)
    one = mean_estimate(x, ["only"] * 20, seed=0)
    assert (one.lo, one.hi, one.n) == (-math.inf, math.inf, 1)
    one = mean_estimate(x, ["only"] * 20, bounds=(0, 1), seed=0)
    assert one.lo < 0.1 and one.hi > 0.9
    pair = two_sample(x, x + 5, ["a"] * 20, ["b"] * 20, seed=0)
    assert pair.p_value == pair.smallest_p == 1 and pair.lo == -math.inf
    assert one_sample(x, ["a"] * 20, seed=0).p_value == 1


def test_perfect_and_absent_separation():
    for sign, low, high in ((1, 0.7, 1.0), (-1, 0.0, 0.3)):
        e = auc_two_sample(sign * ONES, ZEROS, WHO, WHO, seed=0)
        assert e.value == (sign + 1) / 2 and low < e.hi - e.lo + low <= high and e.p_value == 1e-4
        assert e.lo <= e.value <= e.hi and e.hi - e.lo > 0.1
    e = auc_two_sample(ZEROS, ZEROS, WHO, WHO, seed=0)
    assert e.value == 0.5 and e.p_value == 1 and e.lo < 0.4 < 0.6 < e.hi
    e = auc_two_sample([2, 3], [1, 0], ["x", "x"], ["y", "y"], seed=0)  # one cluster each: nothing is shown
    assert e.value == 1 and e.p_value == e.smallest_p == 1 and e.lo < 0.3


# --- ranks -------------------------------------------------------------------------------------------------

scores = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=30)


@given(scores, scores)
@few
def test_auc_is_sklearns_and_scipys_and_antisymmetric(pos, neg):
    truth = roc_auc_score([1] * len(pos) + [0] * len(neg), pos + neg)
    assert auc(pos, neg) == pytest.approx(truth)
    assert auc(pos, neg) == pytest.approx(stats.mannwhitneyu(pos, neg).statistic / len(pos) / len(neg))
    assert auc(pos, neg) + auc(neg, pos) == pytest.approx(1)
    assert auc(np.exp(pos), np.exp(neg)) == pytest.approx(auc(pos, neg))
    clusters = np.arange(len(pos)) % 7, np.arange(len(neg)) % 5
    assert auc_two_sample(pos, neg, *clusters, seed=0).value == pytest.approx(truth)


@given(scores, scores, st.sampled_from([0.0, 0.01, 0.05, 0.1, 0.29, 0.5, 1.0]))
@few
def test_tpr_at_fpr_is_read_off_the_roc_curve(pos, neg, fpr):
    false, true, _ = roc_curve([1] * len(pos) + [0] * len(neg), pos + neg, drop_intermediate=False)
    assert tpr_at_fpr(pos, neg, fpr) == pytest.approx(true[false <= fpr + 1e-12].max())


# --- properties --------------------------------------------------------------------------------------------


@given(ragged)
@few
def test_properties_on_ragged_clusters(data):
    a, ca, b, cb = data
    e = two_sample(a, b, ca, cb, seed=0)
    assert e.value == pytest.approx(a.mean() - b.mean()) and e.n == len(set(ca)) + len(set(cb))
    assert e.lo <= e.value <= e.hi and 0 < e.smallest_p <= e.p_value <= 1
    back = two_sample(b, a, cb, ca, seed=0)
    assert back.value == pytest.approx(-e.value)
    if math.comb(e.n, len(set(ca))) <= 10_000:
        assert back.p_value == pytest.approx(e.p_value)
        moved = two_sample(10 + 3 * a, 10 + 3 * b, ca, cb, seed=0)
        assert moved.p_value == pytest.approx(e.p_value)
    assert two_sample(a, b, ca, cb, seed=0) == e  # the same seed, the same numbers
    order = np.random.default_rng(0).permutation(len(a))
    names = np.array([f"person {c}" for c in ca])
    again = two_sample(a[order], b, names[order], cb, seed=0)
    assert (again.value, again.lo, again.hi, again.p_value) == pytest.approx((e.value, e.lo, e.hi, e.p_value))
    u = auc_two_sample(a, b, ca, cb, seed=0)
    assert 0 <= u.lo <= u.value <= u.hi <= 1 and u.smallest_p <= u.p_value
    d = one_sample(a, ca, seed=0)
    assert d.lo <= d.value <= d.hi and d.smallest_p <= d.p_value <= 1
    bounds = (min(a.min(), b.min()), max(a.max(), b.max()) + 0.1)
    inside = two_sample(a, b, ca, cb, bounds=bounds, seed=0)
    assert abs(np.array([inside.lo, inside.hi])).max() <= bounds[1] - bounds[0] + 1e-9


@given(st.lists(st.none() | st.floats(0, 1), max_size=12))
@few
def test_holm_equals_its_definition(p_values):
    adjusted = holm(p_values)
    tested = sorted(p for p in p_values if p is not None)
    steps = np.maximum.accumulate([min(1.0, (len(tested) - i) * p) for i, p in enumerate(tested)])
    for p, q in zip(p_values, adjusted, strict=True):
        assert (p is None) == (q is None)
        if p is not None:
            assert q == pytest.approx(steps[len(tested) - 1 - tested[::-1].index(p)]) and q >= p


def test_holm_leaves_out_what_was_not_tested():
    assert holm([0.01, None, 0.04]) == pytest.approx([0.02, None, 0.04])
    assert holm([]) == [] and holm([None]) == [None]
    with pytest.raises(ValueError, match="p_values"):
        holm([0.1, math.nan])


# --- power -------------------------------------------------------------------------------------------------


def test_the_detectable_difference_is_detected_with_the_power_claimed():
    rng = np.random.default_rng(14)

    def groups(shift):
        return (*correlated(rng, [4] * 12, 1, shift), *correlated(rng, [4] * 25, 0.5))

    sizes = [
        detectable(a, b, ca, cb, alpha=0.05, power=0.8, seed=rng) for a, ca, b, cb in (groups(0) for _ in range(60))
    ]
    shift = float(np.median(sizes))
    found = [two_sample(a, b, ca, cb, seed=rng).p_value <= 0.05 for a, ca, b, cb in (groups(shift) for _ in range(150))]
    assert 0.68 <= np.mean(found) <= 0.9
    a, ca, b, cb = groups(0)
    args = (ca, cb)
    assert detectable(a + 100, b, *args, seed=0) == pytest.approx(detectable(a, b, *args, seed=0))
    assert detectable(a, b, *args, power=0.95, seed=0) > detectable(a, b, *args, power=0.8, seed=0)


def test_no_power_is_claimed_where_there_is_none():
    rng = np.random.default_rng(15)
    x = rng.random(3)
    assert detectable(x, x, range(3), range(3), alpha=0.01, seed=0) == math.inf  # 20 splits: p is at least 0.1
    assert detectable(ZEROS, ZEROS, WHO, WHO, seed=0) == math.inf
    assert 0.1 < detectable(ZEROS, ZEROS, WHO, WHO, bounds=(0, 1), seed=0) < 0.4


# --- the controls ------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(2, 6))
@few
def test_folds_never_split_a_cluster(seed, k):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 7, rng.integers(8, 20))
    clusters = np.repeat(np.arange(len(sizes)), sizes)
    labels = (clusters % 2).astype(str)
    folds = grouped_folds(clusters, labels, k, seed=seed)
    assert sorted(np.concatenate([test for _, test in folds])) == list(range(len(clusters)))
    for train, test in folds:
        assert not set(clusters[train]) & set(clusters[test])
        assert set(labels[train]) == set(labels)
        assert len(train) + len(test) == len(clusters)
    assert all(
        np.array_equal(x[1], y[1]) for x, y in zip(folds, grouped_folds(clusters, labels, k, seed=seed), strict=True)
    )


def test_bag_of_words_tells_topics_apart_and_alike_texts_not():
    rng = np.random.default_rng(16)
    words = [f"word{i}" for i in range(60)]

    def texts(vocabulary):
        return [" ".join(rng.choice(vocabulary, 8)) for _ in range(48)]

    who = np.repeat(np.arange(12), 4)
    apart = bag_of_words_auc(texts(words[:40]), texts(words[20:]), who, who, seed=0)
    assert apart.value > 0.9 and apart.lo > 0.7 and apart.p_value < 0.001 and apart.n == 24
    alike = [bag_of_words_auc(texts(words), texts(words), who, who, seed=i).value for i in range(8)]
    assert 0.4 < np.mean(alike) < 0.6


def test_bag_of_words_does_not_learn_the_clusters():
    """Each author has words of its own: a row-wise split would look perfect, authors apart show nothing."""
    rng = np.random.default_rng(17)
    who = np.repeat(np.arange(10), 6)
    a, b = ([f"{side}{c} {side}{c}x filler{rng.integers(9)}" for c in who] for side in "ab")
    assert bag_of_words_auc(a, b, range(60), range(60), seed=0).value > 0.95  # the leak
    assert bag_of_words_auc(a, b, who, who, seed=0).value < 0.75


def test_bag_of_words_at_the_edges():
    few_clusters = bag_of_words_auc(["a b"] * 6, ["c d"] * 6, [0, 0, 1, 1, 2, 2], range(6), seed=0)
    assert math.isnan(few_clusters.value) and few_clusters.p_value is None and few_clusters.n == 9
    assert bag_of_words_auc(["", "?"] * 4, ["!"] * 8, range(8), range(8), seed=0).value == 0.5
    with pytest.raises(ValueError, match="texts_a"):
        bag_of_words_auc([], ["x"], [], [0], seed=0)
    with pytest.raises(ValueError, match="single cluster"):
        grouped_folds([0, 0, 1, 2], [0, 0, 1, 1], seed=0)


# --- input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda: mean_estimate([], [], seed=0), "x is empty"),
        (lambda: mean_estimate([[1.0]], [0], seed=0), "x must have 1 dim"),
        (lambda: mean_estimate([1, math.nan], [0, 1], seed=0), "x has NaN"),
        (lambda: mean_estimate([1, 2], [0], seed=0), "clusters must have shape"),
        (lambda: mean_estimate([1, 2], [0, math.nan], seed=0), "clusters has missing"),
        (lambda: mean_estimate([1, 2], ["a", None], seed=0), "clusters has missing"),
        (lambda: mean_estimate([1, 2], [0, 1], bounds=(0, 1), seed=0), "x has values outside"),
        (lambda: mean_estimate([1, 2], [0, 1], bounds=(3, 1), seed=0), "bounds must"),
        (lambda: one_sample([math.inf], [0], seed=0), "d has NaN or inf"),
        (lambda: two_sample([1], [], [0], [], seed=0), "b is empty"),
        (lambda: two_sample([1], [1], [0], [0, 1], seed=0), "b_clusters"),
        (lambda: auc([], [1]), "positive is empty"),
        (lambda: auc_two_sample([1], [math.nan], [0], [0], seed=0), "negative has NaN"),
        (lambda: tpr_at_fpr([1], [1], 2), "fpr"),
        (
            lambda: max_over_columns(np.ones((2, 3)), np.ones((2, 2)), [0, 1], [0, 1], seed=0),
            "B has 2 columns",
        ),
        (lambda: detectable([1], [1], [0], [0], alpha=0, seed=0), "alpha"),
        (lambda: clopper_pearson(1, 2, 1.0), "level"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()


def test_resampled_is_the_mean_s_interval_for_a_mean():
    x = np.random.default_rng(3).normal(size=25)
    found = resampled(lambda w: (w @ x) / w.sum(axis=1), 25, seed=5)
    by_mean = mean_estimate(x, np.arange(25), seed=5)
    assert (found.value, found.lo, found.hi) == pytest.approx((by_mean.value, by_mean.lo, by_mean.hi))
    assert (found.n, found.p_value, found.smallest_p) == (25, None, 1.0)
    ones = resampled(lambda w: (w @ np.ones(7)) / w.sum(axis=1), 7, bounds=(0, 1), seed=5)
    assert (ones.value, ones.hi) == (1.0, 1.0)
    assert ones.lo == pytest.approx(wilson(7, 7)[0]), "what no resample changes may still be otherwise"
    unbounded = resampled(lambda w: np.full(len(w), 2.0), 7, seed=5)
    assert (unbounded.lo, unbounded.hi) == (-math.inf, math.inf)


def test_resampled_covers_a_ratio_of_sums():
    rng, hits = np.random.default_rng(4), 0
    for i in range(200):
        size = rng.integers(1, 20, 30).astype(float)
        part = size * rng.beta(2, 3, 30)  # true ratio 0.4
        found = resampled(lambda w, p=part, s=size: (w @ p) / (w @ s), 30, bounds=(0, 1), seed=i)
        assert found.lo <= found.value <= found.hi
        hits += found.lo <= 0.4 <= found.hi
    assert hits / 200 > 0.9


def test_resampled_without_a_value_says_nothing():
    assert math.isnan(resampled(lambda w: np.full(len(w), np.nan), 3, seed=0).value)
    half = resampled(lambda w: np.where(w[:, 0] > 0, 0.5 + 0.1 * w[:, 1], np.nan), 3, bounds=(0, 1), seed=0)
    assert 0 <= half.lo <= half.value <= half.hi <= 1, "resamples without a value are left out"
    with pytest.raises(ValueError, match="n must be"):
        resampled(lambda w: w[:, 0], 0, seed=0)


def test_integer_and_text_labels_of_one_list_stay_apart():
    mixed = np.array([1, "1", 1, "1"], dtype=object)
    assert mean_estimate([1, 2, 3, 4], mixed, seed=0).n == 2


def test_the_docstrings_example_holds():
    assert doctest.testmod(audit.statistics).failed == 0


def test_a_large_permutation_test_is_fast():
    rng = np.random.default_rng(18)
    (a, ca), (b, cb) = correlated(rng, [20] * 100), correlated(rng, [20] * 100)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        two_sample(a, b, ca, cb, seed=0)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3  # about 0.05 on one idle core
