"""REMIND: neighbours by brute force, features by hand, and a classifier that finds a planted effect only."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from sklearn.metrics import roc_auc_score

from detectors.remind import (
    DISTANCE_FLOOR,
    FEATURES,
    classify,
    classify_score,
    multiclass_auc,
    nearest_tokens,
    perturb,
    remind_features,
    score_features,
)

CLASSES = np.array(["forget", "holdout", "retain"])
seeds = st.integers(0, 2**32 - 1)


# --- nearest tokens


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_nearest_tokens_by_brute_force(dtype, chunk):
    embedding = np.random.default_rng(0).normal(size=(60, 8)).astype(dtype)
    wanted, barred = [5, 3, 5, 59, 0], {0, 1, 17}
    ids, distances = nearest_tokens(embedding, wanted, k=6, exclude=barred, chunk=chunk)
    exact = cdist(embedding.astype(float), embedding.astype(float), "cosine")
    for row, token in enumerate(wanted):
        order = [v for v in np.argsort(exact[token], kind="stable") if v != token and v not in barred][:6]
        assert ids[row].tolist() == order
        assert distances[row] == pytest.approx(exact[token, order], abs=1e-6)
    assert ids.shape == distances.shape == (5, 6)


def test_nearest_tokens_ignores_length_and_breaks_ties_by_id():
    embedding = np.array([[1.0, 0], [5, 0], [2, 0], [0, 1], [-1, 0]])
    ids, distances = nearest_tokens(embedding, [0], k=4)
    assert ids.tolist() == [[1, 2, 3, 4]]
    assert distances.tolist() == [[0, 0, 1, 2]]


def test_nearest_tokens_with_untrained_rows():
    embedding = np.zeros((3000, 4), dtype=np.float32)
    embedding[:3] = np.eye(3, 4)
    ids, distances = nearest_tokens(embedding, [0, 2999], k=3)
    assert ids.tolist() == [[1, 2, 3], [0, 1, 2]]
    assert (distances == 1).all()


def test_nearest_tokens_tells_near_duplicates_apart_in_single_precision():
    base = np.random.default_rng(1).normal(size=64)
    step = np.random.default_rng(2).normal(size=64)
    embedding = np.stack([base, base + 3e-4 * step, base + 1e-4 * step, base + 2e-4 * step, -base])
    ids, _ = nearest_tokens(embedding.astype(np.float32), [0], k=3)
    assert ids.tolist() == [[2, 3, 1]]


def test_nearest_tokens_takes_all_there_are_and_no_more():
    embedding = np.random.default_rng(3).normal(size=(6, 3))
    ids, _ = nearest_tokens(embedding, [2], k=4, exclude={0})
    assert sorted(ids[0].tolist()) == [1, 3, 4, 5]
    assert nearest_tokens(embedding, [], k=2)[0].shape == (0, 2)


# --- perturbations


def neighborhood(rng, length, k, vocabulary=1000):
    ids = rng.integers(vocabulary, size=length).tolist()
    candidates = np.stack([rng.choice([v for v in range(vocabulary) if v != t], size=k, replace=False) for t in ids])
    return ids, candidates, rng.uniform(0.1, 1, size=(length, k))


@given(seeds, st.integers(1, 12), st.integers(1, 6), st.integers(1, 20), st.floats(0.05, 1))
def test_perturb_properties(seed, length, k, n, fraction):
    rng = np.random.default_rng(seed)
    ids, candidates, steps = neighborhood(rng, length, k, vocabulary=30)
    allowed = sorted(rng.choice(length, size=rng.integers(1, length + 1), replace=False).tolist())
    texts, distances = perturb(ids, allowed, candidates[allowed], steps[allowed], n=n, fraction=fraction, rng=rng)
    count = max(1, round(fraction * len(allowed)))
    assert len(texts) == len(distances) == n
    for text, distance in zip(texts, distances, strict=True):
        changed = [p for p in range(length) if text[p] != ids[p]]
        assert len(text) == length
        assert len(changed) == count
        assert set(changed) <= set(allowed)
        chosen = [steps[p][candidates[p].tolist().index(text[p])] for p in changed]
        assert distance == pytest.approx(np.sqrt(np.square(chosen).sum()))
    possible = int(np.prod(range(len(allowed), len(allowed) - count, -1), dtype=float))
    possible = possible // int(np.prod(range(1, count + 1), dtype=float)) * k**count
    assert len(set(texts)) == min(n, possible)


def test_one_token_text_repeats_only_once_exhausted():
    texts, distances = perturb([7], [0], [[1, 2, 3]], [[0.1, 0.2, 0.3]], n=5, rng=np.random.default_rng(0))
    assert set(texts) == {(1,), (2,), (3,)}
    assert len(texts) == 5
    assert all(d == pytest.approx(t[0] / 10) for t, d in zip(texts, distances, strict=True))


def test_perturb_never_returns_the_original():
    # The neighbour list holds the token itself, at both positions, and nothing else at the second.
    texts, _ = perturb([7, 8], [0, 1], [[7, 1], [8, 8]], [[0, 0.1], [0, 0]], n=4, rng=np.random.default_rng(0))
    assert texts == [(1, 8)] * 4


def test_perturb_is_reproducible_and_spreads():
    rng = np.random.default_rng(4)
    ids, candidates, steps = neighborhood(rng, 10, 20)
    allowed = range(10)
    one, two, other = (
        perturb(ids, allowed, candidates, steps, n=300, rng=np.random.default_rng(s))[0] for s in (1, 1, 2)
    )
    assert one == two
    assert one != other
    changes = np.mean(np.array(one) != np.array(ids), axis=0)
    assert changes == pytest.approx(np.full(10, 0.3), abs=0.1)


# --- features


def test_features_by_hand():
    got = dict(zip(FEATURES, remind_features(2.0, [4.0, 1.0, 3.0], [2.0, 0.5, 1.0]), strict=True))
    # inc = 2, -1, 1; g = 1, 2, 1; sorted by distance L = 1, 3, 4, whose steps are 2, 1
    assert got == pytest.approx(
        {
            "original_loss": 2.0,
            "mean_neighbor_loss": 8 / 3,
            "max_neighbor_loss": 4.0,
            "min_neighbor_loss": 1.0,
            "loss_variance": 14 / 9,
            "loss_std": np.sqrt(14 / 9),
            "increment_variance": 14 / 9,
            "mean_gradient": 4 / 3,
            "max_gradient": 2.0,
            "gradient_variance": 2 / 9,
            "loss_volatility": 0.5,
            "local_curvature": 2 * (2 / 4 - 1 / 0.25 + 1) / 3,
            "mean_loss_increment": 2 / 3,
            "max_loss_increment": 2.0,
            "min_loss_increment": -1.0,
        }
    )
    assert len(FEATURES) == len(set(FEATURES)) == 15


def test_curvature_of_a_parabola_is_its_second_derivative():
    d = np.linspace(0.1, 2, 20)
    features = remind_features(1.0, 1.0 + 0.5 * 3.0 * d**2, d)
    assert features[FEATURES.index("local_curvature")] == pytest.approx(3.0)


def test_one_neighbour_and_no_distance():
    features = dict(zip(FEATURES, remind_features(1.0, [1.5], [0.0]), strict=True))
    assert features["loss_variance"] == features["loss_volatility"] == 0
    assert features["mean_gradient"] == pytest.approx(0.5 / DISTANCE_FLOOR)
    assert features["local_curvature"] == pytest.approx(1.0 / DISTANCE_FLOOR**2)


@given(seeds, st.integers(1, 30))
def test_features_properties(seed, n):
    rng = np.random.default_rng(seed)
    loss0, losses, distances = rng.exponential(), rng.exponential(size=n), rng.choice([0.0, 0.2, 0.5, 0.9], n)
    features = remind_features(loss0, losses, distances)
    order = rng.permutation(n)
    assert remind_features(loss0, losses[order], distances[order]) == pytest.approx(features)
    assert np.isfinite(features).all()
    named = dict(zip(FEATURES, features, strict=True))
    assert named["increment_variance"] == pytest.approx(named["loss_variance"])  # one number twice
    assert named["loss_std"] ** 2 == pytest.approx(named["loss_variance"])
    assert named["mean_loss_increment"] == pytest.approx(named["mean_neighbor_loss"] - loss0)
    # Shifting all losses alike moves levels only.
    shifted = dict(zip(FEATURES, remind_features(loss0 + 1, losses + 1, distances), strict=True))
    levels = FEATURES[:4]
    assert shifted == pytest.approx({f: v + (f in levels) for f, v in named.items()}, abs=1e-6)


# --- classification


def landscape(rng, depth, n=15):
    """One text's features in a dent of the given depth."""
    distances = rng.uniform(0.3, 1.0, size=n)
    loss0 = rng.normal(2, 0.3)
    return remind_features(loss0, loss0 + depth * distances**2 + rng.normal(0, 0.3, n), distances)


def texts(rng, depths, per_class=60):
    """Texts of three classes, in clusters of three, with a shift common to each cluster."""
    labels = np.repeat(CLASSES, per_class)
    clusters = np.arange(3 * per_class) // 3
    depth = dict(zip(CLASSES, depths, strict=True))
    shift = rng.normal(0, 0.05, size=per_class)
    return (
        np.array([landscape(rng, depth[y] + shift[c]) for y, c in zip(labels, clusters, strict=True)]),
        labels,
        clusters,
    )


@pytest.mark.parametrize("model", ["logistic", "forest"])
def test_planted_effect_and_its_absence(model):
    rng = np.random.default_rng(5)
    features, labels, clusters = texts(rng, (0.5, 0.0, 1.2))
    found = classify(features, labels, clusters, seed=0, model=model)
    assert found.shape == (180, 3)
    assert found.sum(axis=1) == pytest.approx(np.ones(180))
    assert multiclass_auc(found, labels) > 0.8
    features, labels, clusters = texts(rng, (0.5, 0.5, 0.5))
    nothing = classify(features, labels, clusters, seed=0, model=model)
    assert multiclass_auc(nothing, labels) == pytest.approx(0.5, abs=0.12)


def test_permuted_labels_give_chance():
    rng = np.random.default_rng(6)
    features, labels, clusters = texts(rng, (0.5, 0.0, 1.2))
    areas = []
    for _ in range(8):
        permuted = np.repeat(rng.permutation(labels[::3]), 3)  # clusters stay whole
        areas.append(multiclass_auc(classify(features, permuted, clusters, folds=3), permuted))
    assert np.mean(areas) == pytest.approx(0.5, abs=0.06)


def test_no_row_is_judged_by_its_own_cluster():
    """Clusters carry a fingerprint that gives the label away, but nothing that generalises."""
    rng = np.random.default_rng(7)
    labels = np.repeat(rng.permutation(np.repeat(CLASSES, 20)), 6)
    clusters = np.repeat(np.arange(60), 6)
    features = rng.normal(size=(60, 30))[clusters] + rng.normal(0, 0.01, size=(360, 30))
    whole = multiclass_auc(classify(features, labels, clusters, model="forest"), labels)
    broken = multiclass_auc(classify(features, labels, np.arange(360), model="forest"), labels)
    assert whole < 0.65
    assert broken > 0.95


@pytest.mark.parametrize("function", [classify, classify_score])
def test_nothing_is_fitted_on_the_judged_rows(function):
    """Row 0 goes astray. Its fold's classifier was trained without it, so its fold-mates must not notice."""
    rng = np.random.default_rng(8)
    rows, labels, clusters = texts(rng, (0.5, 0.0, 1.2), per_class=30)
    rows = rows if function is classify else rows[:, FEATURES.index("mean_loss_increment")]
    before = function(rows, labels, clusters, folds=3)
    rows = rows.copy()
    rows[0] += 100.0
    after = function(rows, labels, clusters, folds=3)
    untouched = (before == after).all(axis=1)
    assert 20 <= untouched.sum() <= 45  # a third of 90
    assert not untouched[0]


def test_classify_is_reproducible_and_follows_np_unique():
    features, labels, clusters = texts(np.random.default_rng(9), (0.5, 0.0, 1.2), per_class=24)
    one, two = (classify(features, labels, clusters, seed=3, model="forest") for _ in range(2))
    assert (one == two).all()
    for j, name in enumerate(CLASSES):
        assert roc_auc_score(labels == name, one[:, j]) > 0.6
    # Fewer clusters than folds: as many folds as there are.
    few = classify(features, labels, np.arange(72) // 12, folds=5)
    assert multiclass_auc(few, labels) > 0.6


# --- baselines of one number


@given(seeds, st.integers(1, 30), st.booleans())
def test_one_raw_score_has_macro_auc_one_half_by_identity(seed, per_class, ties):
    """Whatever the score: at equal class sizes the three one-against-the-rest AUCs sum to 3/2."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(CLASSES, per_class)
    score = np.repeat([0.0, 5.0, 1.0], per_class) + rng.normal(size=3 * per_class)
    score = score.round() if ties else score
    assert multiclass_auc(np.tile(score[:, None], 3), labels) == pytest.approx(0.5)


def test_the_same_classifier_frees_the_baseline():
    rng = np.random.default_rng(10)
    labels, clusters = np.repeat(CLASSES, 100), np.arange(300)
    score = np.repeat([0.0, 5.0, 2.5], 100) + rng.normal(0, 0.5, size=300)  # perfectly separable
    for model in ("logistic", "forest"):
        assert multiclass_auc(classify_score(score, labels, clusters, model=model), labels) > 0.97
    noise = rng.normal(size=300)
    assert multiclass_auc(classify_score(noise, labels, clusters), labels) == pytest.approx(0.5, abs=0.1)


def test_score_features():
    features = score_features(np.arange(10.0), bins=5)
    assert features.shape == (10, 8)
    z = (np.arange(10) - 4.5) / np.arange(10).std()
    assert features[:, :3] == pytest.approx(np.column_stack([z, z**2, z**3]))
    assert features[:, 3:].sum(axis=0).tolist() == [2, 2, 2, 2, 2]
    far = score_features([1e9, -1e9], reference=np.arange(10.0))
    assert far[:, 0].tolist() == [5, -5]
    assert far[0, -1] == far[1, 3] == 1
    assert np.isfinite(score_features([3.0] * 4)).all()


@given(seeds, st.integers(2, 40))
def test_score_features_treat_rows_alike_given_a_reference(seed, n):
    rng = np.random.default_rng(seed)
    score, reference = rng.normal(size=n), rng.normal(size=20)
    assert score_features(score[:1], reference) == pytest.approx(score_features(score, reference)[:1])


def test_multiclass_auc_against_sklearn():
    rng = np.random.default_rng(11)
    labels = rng.choice(CLASSES, size=90)
    probabilities = rng.dirichlet(np.ones(3), size=90)
    expected = roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
    assert multiclass_auc(probabilities, labels) == pytest.approx(expected)
    assert multiclass_auc(labels[:, None] == CLASSES, labels) == 1.0


# --- errors

E2, RNG = np.eye(4), np.random.default_rng(0)
ONES, FOUR = np.ones((4, 2)), np.arange(4)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: nearest_tokens(np.zeros((0, 3)), [], k=1), "embedding"),
        (lambda: nearest_tokens(E2, [4], k=1), "token_ids"),
        (lambda: nearest_tokens(E2, [-1], k=1), "token_ids"),
        (lambda: nearest_tokens(E2, [0], k=1, exclude={9}), "exclude"),
        (lambda: nearest_tokens(E2, [0], k=4), "k is 4"),
        (lambda: nearest_tokens(E2, [0], k=3, exclude={1}), "k is 3"),
        (lambda: nearest_tokens(E2 * np.nan, [0], k=1), "embedding is not finite"),
        (lambda: perturb([1], [], np.zeros((0, 1)), np.zeros((0, 1)), rng=RNG), "allowed is empty"),
        (lambda: perturb([1], [1], [[2]], [[0.1]], rng=RNG), "allowed"),
        (lambda: perturb([1], [0], [[2]], [[0.1, 0.2]], rng=RNG), "distances"),
        (lambda: perturb([1], [0], [[1]], [[0.0]], rng=RNG), "no token other"),
        (lambda: perturb([1], [0], [[2]], [[0.1]], fraction=0.0, rng=RNG), "fraction"),
        (lambda: remind_features(1.0, [], []), "losses"),
        (lambda: remind_features(1.0, [1.0], [1.0, 2.0]), "distances"),
        (lambda: remind_features(np.nan, [1.0], [1.0]), "loss0"),
        (lambda: remind_features(1.0, [1.0], [-1.0]), "negative"),
        (lambda: score_features([]), "score"),
        (lambda: score_features([1.0], []), "reference"),
        (lambda: classify([], [], []), "features"),
        (lambda: classify(ONES * np.inf, FOUR, FOUR), "features is not finite"),
        (lambda: classify(ONES, [0, 1], FOUR), "labels has shape"),
        (lambda: classify(ONES, FOUR, [0]), "clusters has shape"),
        (lambda: classify(ONES, [0, 0, 0, 0], FOUR), "single class"),
        (lambda: classify(ONES, [0, 0, 1, 1], [0, 0, 1, 2]), "one cluster"),
        (lambda: classify(ONES, [0, 0, 1, 1], FOUR, folds=1), "folds is 1"),
        (lambda: classify(ONES, [0, 0, 1, 1], FOUR, model="svm"), "model is 'svm'"),
        (lambda: classify_score([], [], []), "score"),
        (lambda: multiclass_auc(ONES, [0, 0, 0, 0]), "labels"),
        (lambda: multiclass_auc(ONES, [0, 1, 2, 2]), "probabilities"),
    ],
)
def test_errors_name_the_argument(call, named):
    with pytest.raises(ValueError, match=named):
        call()
