"""Fingerprints: numbers against hand-worked values, and a classifier that must fail where there is nothing to find."""

from __future__ import annotations

import gzip
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier

from detectors.fingerprint import (
    SETS,
    STILL,
    Classifier,
    Table,
    coherence,
    entropy,
    held_out_scores,
    inverse_stable_rank,
    kl_divergence,
    logit_features,
    read_table,
    state_features,
    write_table,
)
from detectors.tracing import in_words, predictive_p


def distributions(rng: np.random.Generator, n: int = 12, v: int = 7) -> np.ndarray:
    logits = rng.normal(size=(n, v)) * 2
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def test_divergence_and_entropy_by_hand():
    half, quarter = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    assert kl_divergence(half, quarter)[0] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert kl_divergence(half, half)[0] == 0
    assert entropy(half)[0] == pytest.approx(math.log(2))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.integers(2, 8), st.integers(0, 10**6))
def test_divergence_and_entropy_equal_scipys(n, v, seed):
    rng = np.random.default_rng(seed)
    p, q = distributions(rng, n, v), distributions(rng, n, v)
    np.testing.assert_allclose(kl_divergence(p, q), stats.entropy(np.exp(p), np.exp(q), axis=1), atol=1e-9)
    np.testing.assert_allclose(entropy(p), stats.entropy(np.exp(p), axis=1), atol=1e-9)


def test_shape_of_shifts_by_hand():
    same = np.array([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]])
    assert coherence(same) == pytest.approx(1.0)
    assert coherence([[1.0, 0.0], [-1.0, 0.0]]) == 0.0
    line = np.outer([1.0, -1.0, 2.0, -2.0], [3.0, 4.0])
    assert inverse_stable_rank(line) == pytest.approx(1.0)
    cross = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert inverse_stable_rank(cross) == pytest.approx(0.5)
    # Wide and tall go through different Gram matrices.
    wide = np.random.default_rng(0).normal(size=(5, 40))
    values = np.linalg.svd(wide - wide.mean(0), compute_uv=False) ** 2
    assert inverse_stable_rank(wide) == pytest.approx(values[0] / values.sum())
    tall = np.random.default_rng(0).normal(size=(40, 5))
    values = np.linalg.svd(tall - tall.mean(0), compute_uv=False) ** 2
    assert inverse_stable_rank(tall) == pytest.approx(values[0] / values.sum())


def test_an_unmoved_model_has_no_shift():
    rng = np.random.default_rng(0)
    same = {name: distributions(rng) for name in SETS}
    features = logit_features(same, same, {name: np.zeros(12, int) for name in SETS})
    assert features["retain.kl"] == pytest.approx(math.log(1e-9))
    for key in ("entropy", "first", "flipped", "least", "coherence", "rank", "skew", "right"):
        assert features[f"retain.{key}"] == 0
    assert features["forget-retain.kl"] == 0


def test_what_moved_is_seen_where_it_moved():
    rng = np.random.default_rng(0)
    original = {name: distributions(rng, 40) for name in ("forget", "retain")}
    pushed = original["forget"].copy()
    pushed[np.arange(40), pushed.argmax(1)] -= 8.0  # the first choice is pushed down
    pushed -= np.log(np.exp(pushed).sum(1, keepdims=True))
    target = {"forget": pushed, "retain": original["retain"]}
    right = {name: rows.argmax(1) for name, rows in original.items()}
    features = logit_features(target, original, right)
    assert features["forget.flipped"] == 1
    assert features["forget.right"] == features["forget.first"] < -3
    assert features["retain.flipped"] == 0
    assert features["forget-retain.kl"] > 10


def test_states_that_turned_have_moved_and_those_that_grew_are_longer():
    rng = np.random.default_rng(0)
    states = rng.normal(size=(30, 2, 16))
    moved = states.copy()
    moved[:, 1] *= 3
    features = state_features({"retain": moved}, {"retain": states})
    assert features["retain.1.longer"] == pytest.approx(math.log(3))
    assert features["retain.1.moved"] == pytest.approx(math.log(2))
    assert features["retain.0.moved"] == pytest.approx(math.log(1e-9))
    shifted = states + np.ones(16)
    assert state_features({"retain": shifted}, {"retain": states})["retain.0.coherence"] == pytest.approx(1.0)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_rounding_of_other_batches_is_no_movement_and_a_small_edit_is(seed):
    rng = np.random.default_rng(seed)
    states = {name: rng.normal(size=(30, 2, 16)) for name in ("retain", "holdout")}
    edited = {name: a + np.array([0.0, 0.3])[:, None] * rng.normal(size=a.shape) for name, a in states.items()}
    in_other_batches = {name: b * (1 + 1e-7 * rng.normal(size=b.shape)) for name, b in edited.items()}
    assert state_features(in_other_batches, states) == pytest.approx(state_features(edited, states), abs=1e-5)
    slightly = {name: a + 1e-4 * rng.normal(size=a.shape) for name, a in states.items()}
    assert state_features(slightly, states)["retain.0.moved"] == pytest.approx(math.log(1e-4), abs=0.5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_neither_the_order_of_words_nor_of_prompts_matters(seed):
    rng = np.random.default_rng(seed)
    a, b = distributions(rng), distributions(rng)
    words, prompts = rng.permutation(7), rng.permutation(12)
    here = logit_features({"retain": b}, {"retain": a})
    there = logit_features({"retain": b[prompts][:, words]}, {"retain": a[prompts][:, words]})
    assert here == pytest.approx(there, rel=1e-6, abs=1e-6)


# --- the classifier -----------------------------------------------------------------------------------------


def planted(effect: float, seed: int = 0, histories: int = 8, families: int = 3) -> Table:
    """Half of the histories unlearned; each history and each family has an offset of its own."""
    rng = np.random.default_rng(seed)
    names = [f"h{i}" for i in range(2 * histories)]
    of_history = {h: rng.normal(size=4) for h in names}
    of_family = {f: rng.normal(size=4) for f in range(families)}
    rows = [(h, f) for h in names for f in range(families)]
    y = np.array([int(h[1:]) < histories for h, _ in rows])
    x = np.array([of_history[h] + of_family[f] for h, f in rows]) + rng.normal(size=(len(rows), 4)) * 0.3
    x[:, 0] += effect * y
    return Table(tuple("abcd"), x, y, tuple(h for h, _ in rows), tuple(str(f) for _, f in rows))


def test_a_planted_difference_is_found_on_histories_and_families_held_out():
    table = planted(6.0)
    assert roc_auc_score(table.unlearned, held_out_scores(table, "abcd")) > 0.95


def test_permuted_labels_give_chance():
    found = []
    for seed in range(12):
        table = planted(0.0, seed)
        found.append(roc_auc_score(table.unlearned, held_out_scores(table, "abcd")))
    assert 0.3 < np.mean(found) < 0.6


def test_split_by_row_a_history_would_give_its_label_away():
    """Why histories are held out: the same data without any effect, split by row."""
    table = planted(0.0)
    centred = np.concatenate([table.values[np.array(table.families) == f] for f in "012"])
    centred -= np.repeat([centred[i * 16 : (i + 1) * 16].mean(0) for i in range(3)], 16, axis=0)
    labels = np.concatenate([table.unlearned[np.array(table.families) == f] for f in "012"])
    by_row = cross_val_predict(KNeighborsClassifier(1), centred, labels, cv=KFold(12, shuffle=True, random_state=0))
    assert np.mean(by_row == labels) > 0.85


def test_no_model_is_judged_by_its_own_history_or_family():
    table = planted(6.0)
    loud = replace(table, values=table.values.copy())
    mine = [i for i, h in enumerate(table.histories) if h == "h0"]
    loud.values[mine, 0] -= 100.0
    scores, before = held_out_scores(loud, "abcd"), held_out_scores(table, "abcd")
    # h0's judges never saw it, so what was done to h0 moves its own scores by its own features alone.
    classifiers_same = [i for i in range(len(scores)) if table.histories[i] == "h0"]
    assert all(scores[i] < before[i] for i in classifiers_same)
    quiet = replace(table, unlearned=table.unlearned.copy())
    quiet.unlearned[mine] = False  # its label must not matter to itself
    np.testing.assert_allclose(held_out_scores(quiet, "abcd")[mine], before[mine])


def test_contributions_sum_to_the_score():
    table = planted(2.0)
    classifier = Classifier.fitted(table, ("a", "c", "not in the table"))
    features = {"a": 0.3, "c": -1.0, "not in the table": 5.0}
    assert classifier.names == ("a", "c")
    intercept = float(classifier.model[-1].intercept_[0])
    assert sum(classifier.contributions(features).values()) + intercept == pytest.approx(classifier.score(features))
    assert sum(p for _, p in classifier.alike(features, most=100)) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="none of these"):
        Classifier.fitted(table, ("z",))


def test_a_score_is_not_led_beyond_what_is_known():
    classifier = Classifier.fitted(planted(2.0), "abcd")
    far, farther = ({"a": x, "b": 0.0, "c": 0.0, "d": 0.0} for x in (1e3, 1e6))
    assert classifier.score(far) == classifier.score(farther)


def test_what_did_not_move_was_not_unlearned():
    rng = np.random.default_rng(0)
    same = {name: distributions(rng) for name in SETS}
    still = logit_features(same, same)
    table = planted(2.0)
    names = (*table.names, *still)
    wide = replace(
        table, names=names, values=np.hstack([table.values, rng.normal(size=(len(table.values), len(still)))])
    )
    classifier = Classifier.fitted(wide, tuple(still))
    assert classifier.score(still) == STILL
    assert classifier.score(still | {"retain.kl": -3.0}) > STILL


def test_a_table_comes_back_as_it_was_written(tmp_path):
    table = planted(1.0)
    for name in ("one.gz", "two.gz"):
        write_table(table, tmp_path / name)
    assert (tmp_path / "one.gz").read_bytes() == (tmp_path / "two.gz").read_bytes()
    back = read_table(tmp_path / "one.gz")
    np.testing.assert_allclose(back.values, table.values, rtol=1e-4)
    assert (back.names, back.histories, back.families) == (table.names, table.histories, table.families)
    assert gzip.decompress((tmp_path / "one.gz").read_bytes())[:1] == b"{"


def test_the_shipped_table_tells_unlearned_from_edited():
    table = read_table()
    logits = [n for n in table.names if n.startswith("retain.") and n.count(".") == 1]
    assert logits
    assert {"original", "benign", "int4", "continual", "matched-retain"} <= set(table.histories)
    assert not table.unlearned[[h == "original" or h.startswith("matched-") for h in table.histories]].any()
    assert len({h for h, y in zip(table.histories, table.unlearned, strict=True) if y}) >= 20
    everything = [n for n in table.names if n.split(".")[0] in (*SETS, "forget-retain") and n.count(".") == 1]
    assert roc_auc_score(table.unlearned, held_out_scores(table, everything)) > 0.9


def test_one_more_draw_of_a_normal_law():
    draws = [0.0, 1.0, 2.0]
    t = (4.0 - 1.0) / (1.0 * math.sqrt(4 / 3))
    assert predictive_p(4.0, draws) == pytest.approx(stats.t.sf(t, 2))
    assert predictive_p(1.0, draws) == pytest.approx(0.5)
    assert predictive_p(4.0, draws[:2]) is None
    rng = np.random.default_rng(0)
    false = [predictive_p(x[0], x[1:]) <= 0.05 for x in rng.normal(size=(4000, 7))]
    assert 0.04 < np.mean(false) < 0.06


def test_every_feature_of_the_table_has_a_phrase():
    for name in read_table().names:
        words = in_words(name)
        assert "prompts" in words
        assert "." not in words.replace("...", "")
