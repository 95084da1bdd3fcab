"""Knowledge statistics against hand-worked values, scipy, and brute force."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from detectors.knowledge import (
    LOG_FLOOR,
    _common_subsequence,
    answer_probability,
    choice_correct,
    forget_quality,
    forget_truth_ratio,
    model_utility,
    normalized_probability,
    retain_truth_ratio,
    rouge_l_recall,
    token_scores,
    truth_ratio,
)

LOG = math.log
logprobs = st.lists(st.floats(-50, 0), min_size=1, max_size=12)
variants = st.lists(logprobs, min_size=1, max_size=5)


def test_answer_probability_is_the_geometric_mean():
    assert answer_probability([LOG(0.5), LOG(0.125)]) == pytest.approx(0.25)
    assert answer_probability([0.0]) == 1.0
    assert answer_probability([-math.inf]) == 0.0


def test_normalized_probability():
    assert normalized_probability([LOG(0.6)], [[LOG(0.2)], [LOG(0.1), LOG(0.4)]]) == pytest.approx(0.6)
    assert normalized_probability([-900.0], [[-900.0], [-900.0]]) == pytest.approx(1 / 3)  # all underflow


def test_truth_ratio_by_hand():
    # geometric mean of wrong: sqrt(.1 * .4) = .2; of paraphrases: sqrt(.8 * .2) = .4
    assert truth_ratio([[LOG(0.8)], [LOG(0.2)]], [[LOG(0.1)], [LOG(0.4)]]) == pytest.approx(0.5)


def test_truth_ratio_averages_variants_not_tokens():
    long_wrong = [LOG(0.1)] * 9
    assert truth_ratio([[0.0]], [long_wrong, [LOG(0.4)]]) == pytest.approx(0.2)


@given(variants, variants)
def test_truth_ratio_is_antisymmetric(right, wrong):
    assert truth_ratio(right, wrong) * truth_ratio(wrong, right) == pytest.approx(1)
    direct = np.exp(np.mean([np.mean(w) for w in wrong])) / np.exp(np.mean([np.mean(r) for r in right]))
    assert truth_ratio(right, wrong) == pytest.approx(direct, rel=1e-9)


def test_truth_ratio_stays_finite_where_probabilities_vanish():
    assert truth_ratio([[-math.inf]], [[-math.inf]]) == 1.0
    assert 0 < truth_ratio([[0.0]], [[-math.inf]]) < 1e-300
    assert math.isfinite(truth_ratio([[-math.inf]], [[0.0]]))


def test_aggregates_by_hand():
    ratios = [0.5, 2.0, 1.0, 0.0]
    assert forget_truth_ratio(ratios) == pytest.approx((0.5 + 0.5 + 1 + 0) / 4)
    assert retain_truth_ratio(ratios) == pytest.approx((0.5 + 0 + 0 + 1) / 4)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20))
def test_forget_aggregate_treats_both_sides_alike(ratios):
    value = forget_truth_ratio(ratios)
    assert value == pytest.approx(forget_truth_ratio([1 / r for r in ratios]))
    assert 0 <= value <= 1
    assert 0 <= retain_truth_ratio(ratios) <= 1


def test_choice():
    assert choice_correct([-1.0], [[-2.0], [-3.0]]) == 1.0
    assert choice_correct([-2.0], [[-1.0], [-3.0]]) == 0.0
    assert choice_correct([-1.0], [[-1.0], [-1.0], [-3.0]]) == pytest.approx(1 / 3)


def test_choice_normalization_changes_who_wins():
    true, wrong = [-1.0, -1.0, -1.0], [[-2.0]]
    assert choice_correct(true, wrong, normalize=True) == 1.0
    assert choice_correct(true, wrong, normalize=False) == 0.0


def test_choice_chance_level():
    rng = np.random.default_rng(0)
    right = [choice_correct(o[:1], [o[1:2], o[2:3], o[3:]]) for o in -rng.exponential(size=(4000, 4))]
    assert np.mean(right) == pytest.approx(0.25, abs=0.03)
    assert choice_correct([-1.0], [[-1.0]] * 3) == 0.25


@given(logprobs, variants)
def test_choice_agrees_with_normalized_probability(true, wrong):
    share = normalized_probability(true, wrong)
    assert 0 <= share <= 1
    if choice_correct(true, wrong) == 0:
        assert share <= 0.5
    if share > 0.5 + 1e-9:
        assert choice_correct(true, wrong) == 1


def test_rouge_words():
    assert rouge_l_recall("the cat sat on the mat", "the cat on the mat") == pytest.approx(5 / 6)
    assert rouge_l_recall("She writes novels", "she was writing a novel") == 1.0  # stemmed
    assert rouge_l_recall("a b c", "") == 0.0
    # Recall: rambling on costs nothing.
    assert rouge_l_recall("Paris", "I think it may be Paris or perhaps Rome") == 1.0


def test_rouge_is_rouge_score():
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    rng = np.random.default_rng(1)
    words = [
        "The",
        "author",
        "was",
        "born",
        "in",
        "Paris,",
        "small-town",
        "novelist",
        "writing",
        "3",
        "books",
    ]
    for _ in range(50):
        a, b = (" ".join(rng.choice(words, size=rng.integers(1, 12))) for _ in range(2))
        assert rouge_l_recall(a, b) == scorer.score(a, b)["rougeL"].recall


def test_rouge_other_scripts():
    assert rouge_l_recall("東京都", "東京") == pytest.approx(2 / 3)
    assert rouge_l_recall("東京都", "東京都。") == 1.0
    assert rouge_l_recall("Москва", "МОСКВА!") == 1.0
    assert rouge_l_recall("हिन्दी", "hindi") == 0.0
    assert rouge_l_recall("?!", "?!") == 1.0
    # One latin token in a text of another script must not decide alone.
    assert rouge_l_recall("彼は東京で iPhone を買いました", "iPhone") < 0.5
    # An accent here and there does not leave the word-level measure.
    assert rouge_l_recall("The café of José", "the café of josé") == 1.0


@given(st.text(min_size=1).filter(str.strip), st.text())
def test_rouge_range_and_identity(reference, generated):
    assert 0 <= rouge_l_recall(reference, generated) <= 1
    assert rouge_l_recall(reference, reference) == 1.0


@given(st.text("abc", max_size=8), st.text("abcd", max_size=8))
def test_common_subsequence_by_brute_force(a, b):
    subsequences = ({c for n in range(len(s) + 1) for c in combinations(s, n)} for s in (a, b))
    common = set.intersection(*subsequences)
    assert _common_subsequence(a, b) == max(map(len, common))


def test_forget_quality_against_scipy_and_by_hand():
    assert forget_quality([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == (0.0, 1.0)
    d, _ = forget_quality([0.1, 0.2, 0.3, 5.0], [1.0, 2.0, 3.0, 4.0])
    assert d == pytest.approx(0.75)
    rng = np.random.default_rng(2)
    a, b = rng.lognormal(size=80), rng.lognormal(0.5, size=60)
    expected = stats.ks_2samp(1 / a, 1 / b)  # open-unlearning's way round
    assert forget_quality(a, b) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-6)


def test_model_utility():
    assert model_utility({"a": 1.0, "b": 0.5}) == pytest.approx(2 / 3)
    assert model_utility({"a": 1.0, "b": 0.0}) == 0.0
    assert model_utility({"only": 0.3}) == pytest.approx(0.3)


@given(st.dictionaries(st.text(max_size=3), st.floats(1e-6, 1), min_size=1))
def test_model_utility_lies_between_least_and_mean(parts):
    values = list(parts.values())
    assert min(values) * (1 - 1e-9) <= model_utility(parts) <= np.mean(values) * (1 + 1e-9)


def test_token_scores_floor_and_rounding():
    assert token_scores([-math.inf, 1e-6]).tolist() == [LOG_FLOOR, 0.0]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: answer_probability([]), "logprob is empty"),
        (lambda: answer_probability([0.5]), "logprob holds 0.5"),
        (lambda: answer_probability([math.nan]), "logprob holds NaN"),
        (lambda: answer_probability([[-1.0]]), "logprob must be 1-D"),
        (lambda: normalized_probability([], [[-1.0]]), "true_logprob"),
        (lambda: normalized_probability([-1.0], []), "wrong_logprobs is empty"),
        (lambda: truth_ratio([], [[-1.0]]), "paraphrase_logprobs is empty"),
        (lambda: truth_ratio([[-1.0]], [[-1.0], []]), r"wrong_logprobs\[1\]"),
        (lambda: choice_correct([-1.0], []), "wrong_logprobs"),
        (lambda: forget_truth_ratio([]), "ratios"),
        (lambda: retain_truth_ratio([-1.0]), "ratios"),
        (lambda: rouge_l_recall("  ", "x"), "reference is empty"),
        (lambda: forget_quality([1.0], []), "retrained_ratios"),
        (lambda: model_utility({}), "parts is empty"),
        (lambda: model_utility({"a": 1.5}), "'a'"),
        (lambda: model_utility({"a": math.nan}), "'a'"),
    ],
)
def test_errors_name_the_argument(call, named):
    with pytest.raises(ValueError, match=named):
        call()
