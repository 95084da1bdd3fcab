"""Membership on images: epsilon by hand and by brute force, honest where the published one is not, planted members."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from digit_models import captured, digit_case
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from audit.case import Case
from audit.quantities import View
from audit.record import Finding, Outcome, Side
from audit.verdict import judge
from detectors.image_membership import (
    LOG_ODDS,
    ImageMembership,
    class_control,
    epsilon,
    honest_epsilon,
    worst_case_epsilon,
)
from detectors.recognition import decided

pytestmark = pytest.mark.usefixtures("one_thread")
rates = st.floats(0, 1)


# --- epsilon


def test_epsilon_by_hand():
    assert epsilon(0.1, 0.2, 0.0) == pytest.approx(math.log(0.9 / 0.2))
    assert epsilon(0.3, 0.1, 0.0) == pytest.approx(math.log(0.9 / 0.3))
    assert epsilon(0.1, 0.2) == pytest.approx(math.log((0.9 - 1e-5) / 0.2))
    assert epsilon(0.0, 0.5, 0.0) == pytest.approx(math.log(2))
    assert epsilon(0.0, 0.0) == math.inf
    assert epsilon([0.5, 1.0, 0.0, 1.0], [0.5, 0.0, 1.0, 1.0]).tolist() == [0, 0, 0, 0]


@given(rates, rates, rates, rates)
def test_epsilon_falls_with_either_rate_and_is_symmetric(fpr, fnr, more_fpr, more_fnr):
    here = epsilon(fpr, fnr)
    assert here >= 0
    assert here == epsilon(fnr, fpr)
    assert epsilon(max(fpr, more_fpr), max(fnr, more_fnr)) <= here
    assert epsilon(fpr, 1 - fpr) <= 1e-12  # a guess


def test_the_threshold_of_the_finding_is_an_auc_of_0_6():
    apart = math.sqrt(2) * norm.ppf(0.6)
    cuts = np.linspace(-3, 3, 2001)
    worst = epsilon(norm.sf(cuts), norm.cdf(cuts - apart), 0.0).max()
    assert 1 - 2**-worst == pytest.approx(0.18, abs=0.002)


scores = st.lists(st.integers(-3, 3), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(scores, scores)
def test_the_worst_case_is_the_worst_of_all(members, others):
    found = worst_case_epsilon(members, others)
    values = sorted({*members, *others})
    best = 0.0
    for cut in [values[0] - 1, *values]:
        for sign in (1, -1):
            fpr = np.mean([sign * x > sign * cut if sign > 0 else x <= cut for x in others])
            fnr = 1 - np.mean([x > cut if sign > 0 else x <= cut for x in members])
            best = max(best, float(epsilon(fpr, fnr)))
    assert found.epsilon == pytest.approx(best)
    a, b = (found.members(np.array(x, float)[:, None]) for x in (members, others))
    assert (found.fnr, found.fpr) == pytest.approx(((~a).mean(), b.mean()))


def test_the_worst_of_several_scores():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2, 40, 2))
    noise[0, :, 1] -= 3  # members lie lower in the second score
    found = worst_case_epsilon(*noise)
    assert (found.score, found.above) == (1, False)
    assert found.epsilon == worst_case_epsilon(noise[0][:, 1], noise[1][:, 1]).epsilon


def test_nothing_there_is_a_leak_by_the_published_figure_and_none_by_the_honest_one():
    rng = np.random.default_rng(1)
    trials = [rng.normal(size=(2, 100, 2)) for _ in range(200)]
    assert min(worst_case_epsilon(a, b).epsilon for a, b in trials) > 0.05
    honest = [honest_epsilon(a, b, seed=i) for i, (a, b) in enumerate(trials)]
    assert np.mean([j.lo > 0 for j in honest]) <= 0.05
    assert np.mean([j.p_value <= 0.05 for j in honest]) <= 0.08


def test_the_interval_holds_the_epsilon_of_the_chosen_test():
    rng = np.random.default_rng(2)
    inside = []
    for seed in range(200):
        j = honest_epsilon(rng.normal(1, 1, 100), rng.normal(0, 1, 100), seed=seed)
        cut = j.test.threshold
        assert j.test.above
        truth = epsilon(norm.sf(cut), norm.cdf(cut - 1))
        inside.append(j.lo <= truth <= j.hi)
        assert j.lo <= j.epsilon <= j.hi
    assert np.mean(inside) >= 0.95


def test_what_parts_cleanly_has_a_quality_and_an_interval():
    j = honest_epsilon(np.arange(100) + 1000.0, np.arange(100.0), seed=0)
    assert j.epsilon == j.hi == math.inf
    assert j.quality[0] == j.quality[1] == 0
    assert 0 < j.quality[2] < 0.2
    assert j.p_value < 1e-20


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: epsilon(1.1, 0.0), "fpr"),
        (lambda: epsilon(0.1, math.nan), "fnr"),
        (lambda: worst_case_epsilon([], [1.0]), "members"),
        (lambda: worst_case_epsilon([1.0], [math.nan]), "others"),
        (lambda: worst_case_epsilon([[1.0, 2.0]], [1.0]), "scores"),
        (lambda: honest_epsilon([1.0], [1.0, 2.0], seed=0), "1 members and 2 others"),
    ],
)
def test_errors_say_what_is_wrong(call, named):
    with pytest.raises(ValueError, match=named):
        call()


# --- scores


def test_log_odds_where_float32_has_no_digit_left():
    logits = torch.tensor([[60.0, 0.0, -1.0], [1.0, 2.0, 0.5], [-80.0, 3.0, 3.0]])
    right = torch.tensor([0, 1, 0])
    view = View(logits, right, {}, [()] * 3, lambda state: state, lambda state: state)
    exact = []
    for row, i in zip(logits.double().tolist(), right.tolist(), strict=True):
        others = [x for j, x in enumerate(row) if j != i]
        exact.append(row[i] - math.log(math.fsum(math.exp(x) for x in others)))
    assert LOG_ODDS.compute(view)["log_odds"].tolist() == pytest.approx(exact, rel=1e-12)
    assert view.logprobs[0, 0] == 0  # of which no order could be made


# --- the instrument


def found(case: Case) -> dict[str, Finding]:
    return {f.id.split("/")[1]: f for f in judge(ImageMembership().measure(case, captured(case, ImageMembership())))}


def test_members_are_told_and_strangers_are_not():
    case = digit_case("noise", target="original", retrained="retrained")
    for name, finding in found(case).items():
        assert (finding.verdict, finding.side) == (Outcome.EVIDENCE, Side.REMAINS), name
        assert {c.name: c.passed for c in finding.controls}["retrained model"] is True
    for name, finding in found(digit_case("noise", target="retrained")).items():
        assert finding.verdict != Outcome.EVIDENCE, name
    blind = found(digit_case("noise", target="untaught"))
    assert all({c.name: c.passed for c in f.controls}["positive control"] is False for f in blind.values())


def test_the_auc_is_that_of_scikit_learn_and_of_the_loss():
    case = digit_case("noise", target="original")
    evidence = captured(case, ImageMembership())
    finding = next(f for f in ImageMembership().measure(case, evidence) if f.id.endswith("confidence"))
    member = np.repeat([1, 0], [len(case.rows("forget")), len(case.rows("holdout"))])
    for quantity, key in (("log-odds", "log_odds"), ("token", "logprob")):
        rows = np.concatenate([decided(evidence, "target", name, quantity, key) for name in ("forget", "holdout")])
        assert finding.estimate == pytest.approx(roc_auc_score(member, rows), abs=1e-3)


def test_the_table_shows_the_published_figure_beside_the_honest_one():
    worst = found(digit_case("noise", target="original", retrained="retrained"))["worst-case"]
    assert worst.table is not None
    rows = {(row[0], row[1]): row for row in worst.table.rows}
    assert set(rows) == {(model, how) for model in ("target", "retrained") for how in ("peeking", "honest")}
    assert rows["retrained", "peeking"][5] > 0
    assert rows["retrained", "honest"][6] == 0
    assert rows["target", "honest"][6] > 0.5
    assert worst.estimate == pytest.approx(2.0 ** -rows["target", "honest"][5])


def test_one_class_against_another_is_no_membership():
    alone = found(digit_case("class", target="original"))["confidence"]
    assert alone.estimate > 0.9
    assert alone.verdict == Outcome.INCONCLUSIVE
    assert "class mix" in alone.reason
    single = class_control(digit_case("instance", target="original"))
    assert (single.passed, single.gates) == (True, "evidence")
    whole = class_control(digit_case("class", target="original", retrained="retrained"))
    assert (whole.estimate, whole.passed, whole.gates) == (1.0, False, "evidence")  # of which it cures nothing
