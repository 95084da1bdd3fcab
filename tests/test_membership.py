"""Membership scores: by hand, against open-unlearning's formulas on raw logits, orientation, properties."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from detectors import membership
from detectors.membership import (
    loss_score,
    min_k,
    min_k_plus_plus,
    privleak,
    privleak_bounds,
    recall,
    reference_ratio,
    zlib_score,
)

logprobs = st.lists(st.floats(-50, 0), min_size=1, max_size=30)
fractions = st.floats(0.01, 1)
areas = st.floats(0, 1)


def captured(rng, length, vocabulary=50):
    """What a capture holds of one random example: logprob, mean, variance; and the full table."""
    logits = rng.normal(0, 2, size=(length, vocabulary))
    table = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    logprob = table[np.arange(length), rng.integers(vocabulary, size=length)]
    mean = (np.exp(table) * table).sum(axis=1)
    variance = (np.exp(table) * table**2).sum(axis=1) - mean**2
    return logprob, mean, variance


def test_by_hand():
    logprob = [-1.0, -2.0, -3.0, -4.0, -5.0]
    assert loss_score(logprob) == -3.0
    assert min_k(logprob, 0.2) == -5.0
    assert min_k(logprob, 0.4) == -4.5
    assert min_k(logprob, 0.39) == -5.0  # int() rounds down
    assert min_k(logprob, 1.0) == -3.0
    assert zlib_score(logprob, "abc") == -3.0 / len(zlib.compress(b"abc"))
    assert recall([-1.0, -1.0], [-2.0, -1.0]) == 1.5
    assert reference_ratio([-1.0, -2.0], [-3.0, -2.0]) == 1.0


def test_min_k_plus_plus_by_hand():
    # z: (-1+2)/1 = 1; (-6+2)/2 = -2; (-2+2)/4 = 0
    args = [-1.0, -6.0, -2.0], [-2.0] * 3, [1.0, 4.0, 16.0]
    assert min_k_plus_plus(*args, k=0.2) == -2.0
    assert min_k_plus_plus(*args, k=0.7) == -1.0
    assert min_k_plus_plus(*args, k=1.0) == pytest.approx(-1 / 3)


@pytest.mark.parametrize("length", [1, 4, 5, 37])
@pytest.mark.parametrize("k", [0.1, 0.2, 0.4])
def test_equal_to_open_unlearning_up_to_sign(length, k):
    logprob, mean, variance = captured(np.random.default_rng(length), length)
    count = max(1, int(len(logprob) * k))
    loss_like = -np.mean(sorted(logprob)[:count])
    assert min_k(logprob, k) == pytest.approx(-loss_like)
    z = (logprob - mean) / np.sqrt(np.clip(variance, 1e-6, None))
    loss_like = -np.mean(sorted(z)[:count])
    assert min_k_plus_plus(logprob, mean, variance, k) == pytest.approx(-loss_like)


def test_min_k_plus_plus_where_the_model_is_certain():
    assert min_k_plus_plus([0.0], [0.0], [0.0]) == 0.0
    assert math.isfinite(min_k_plus_plus([-20.0], [-1e-8], [-1e-12]))


@given(logprobs, fractions, fractions)
def test_min_k_properties(logprob, k, larger):
    k, larger = sorted((k, larger))
    assert min_k(logprob, k) <= min_k(logprob, larger) + 1e-9
    assert min_k(logprob, 1.0) == pytest.approx(loss_score(logprob))
    assert min(logprob) - 1e-9 <= min_k(logprob, k) <= loss_score(logprob) + 1e-9
    assert min_k(logprob[::-1], k) == pytest.approx(min_k(logprob, k))


@given(logprobs)
def test_neutral_values(logprob):
    assert recall(logprob, logprob) == 1.0
    assert reference_ratio(logprob, logprob) == 0.0
    ones = np.ones(len(logprob))
    assert min_k_plus_plus(logprob, 0 * ones, ones) == pytest.approx(min_k(logprob))


def test_recall_where_the_model_is_certain():
    assert recall([0.0, 0.0], [0.0, 0.0]) == 1.0
    assert math.isfinite(recall([0.0], [-3.0]))


def test_zlib_takes_any_text():
    for text in ("東京で", "🙂" * 500, "a", "\udcff"):
        assert -1.0 < zlib_score([-1.0], text) < 0.0


def test_every_score_is_larger_for_members():
    """Members: likelier, and losing more under a foreign prefix; the AUC is open-unlearning's."""
    rng = np.random.default_rng(7)
    scores: dict[str, list[float]] = {name: [] for name in membership.ATTACKS}
    member = np.repeat([True, False], 150)
    for is_member in member:
        logprob, mean, variance = captured(rng, int(rng.integers(1, 30)))
        reference = logprob - rng.exponential(0.1, size=logprob.shape)
        if is_member:
            logprob = logprob / 3
        scores["loss"].append(loss_score(logprob))
        scores["zlib"].append(zlib_score(logprob, "some text of equal length"))
        scores["min_k"].append(min_k(logprob))
        scores["min_k_plus_plus"].append(min_k_plus_plus(logprob, mean, variance))
        scores["recall"].append(recall(logprob, 3 * logprob if is_member else 1.1 * logprob))
        scores["reference"].append(reference_ratio(logprob, reference))
    for name, values in scores.items():
        area = roc_auc_score(member, values)
        assert area > 0.75, name
        assert roc_auc_score(~member, -np.array(values)) == pytest.approx(area)  # labels holdout 1, loss-like


def test_privleak_by_hand():
    assert privleak(0.5).value == 0.0
    assert privleak(1.0).value == -100.0  # nothing forgotten
    assert privleak(0.0).value == 100.0  # over-unlearned
    assert privleak(0.4, 0.6).value == pytest.approx(50.0)
    assert privleak(0.4, 0.6)[1:] == (-100.0, pytest.approx(150.0), "")


def test_privleak_is_muse():
    """MUSE states it on the AUC that has holdout positive: (AUC - AUC_retrain) / AUC_retrain."""
    theirs, retrained = 0.9, 0.4772
    assert privleak(1 - theirs, 1 - retrained).value == pytest.approx(100 * (theirs - retrained) / retrained)


@given(areas, areas)
def test_privleak_within_bounds(auc, reference):
    result = privleak(auc, reference)
    assert (result.lower, result.upper) == privleak_bounds(reference)
    if 1 - reference < 0.05:
        assert math.isnan(result.value)
        assert "already separates" in result.reason
    else:
        assert result.reason == ""
        assert result.lower - 1e-9 <= result.value <= result.upper + 1e-9
        assert result.upper <= 1900 + 1e-6
        unlearning = ((1 - auc) - (1 - reference)) / (1 - reference + 1e-10) * 100
        assert result.value == pytest.approx(unlearning, abs=1e-5)


def test_privleak_margin():
    assert privleak_bounds(1.0) == (-100.0, math.inf)
    assert privleak(0.5, 0.95).reason == ""
    refused = privleak(0.0, 0.981)  # the case that gave 5215 elsewhere
    assert math.isnan(refused.value)
    assert refused.upper > 5000


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: loss_score([]), "logprob is empty"),
        (lambda: zlib_score([], "x"), "logprob is empty"),
        (lambda: zlib_score([-1.0], ""), "text is empty"),
        (lambda: min_k([]), "logprob is empty"),
        (lambda: min_k([-1.0], 0.0), "k is 0.0"),
        (lambda: min_k([-1.0], 40), "k is 40"),
        (lambda: min_k_plus_plus([], [], []), "logprob is empty"),
        (lambda: min_k_plus_plus([-1.0], [-1.0, -1.0], [1.0]), "mean has shape"),
        (lambda: min_k_plus_plus([-1.0], [-1.0], []), "variance has shape"),
        (lambda: min_k_plus_plus([-1.0], [-1.0], [math.nan]), "variance is not finite"),
        (lambda: recall([-1.0], [-1.0, -1.0]), "logprob_prefixed"),
        (lambda: recall([], []), "logprob_plain is empty"),
        (lambda: reference_ratio([-1.0], [-1.0, -1.0]), "logprob_reference"),
        (lambda: privleak(1.2), "auc is 1.2"),
        (lambda: privleak(0.5, -0.1), "auc_reference"),
        (lambda: privleak_bounds(math.nan), "auc_reference"),
    ],
)
def test_errors_name_the_argument(call, named):
    with pytest.raises(ValueError, match=named):
        call()
