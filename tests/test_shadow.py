"""Shadow models: scores by brute force, halves that are halves, new weights, and planted members found."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from digit_models import captured, digit_case, taught
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from attacks.shadow import (
    Shadow,
    average_probability,
    lira_scores,
    random_halves,
    recipe_for,
    renew,
    rmia_scores,
)
from audit.case import Case
from audit.evidence import Evidence
from audit.image_target import ImageTarget
from audit.inventory import take_inventory
from audit.organisms.imaging.train import open_classifier
from audit.record import Finding, Outcome, Side
from audit.verdict import judge

pytestmark = pytest.mark.usefixtures("one_thread")


# --- scores


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(2, 5), st.integers(0, 10**6))
def test_lira_by_brute_force(n, half, seed):
    rng = np.random.default_rng(seed)
    f, shadows = rng.normal(size=n), rng.normal(size=(n, 2 * half))
    inside = random_halves(np.arange(n), 2 * half, seed)
    outside = [shadows[i][~inside[i]] for i in range(n)]
    for fewest, spread in (
        (1, [np.std(x, ddof=1) for x in outside]),
        (32, [math.sqrt(sum(((x - x.mean()) ** 2).sum() for x in outside) / (n * (half - 1)))] * n),
    ):
        truth = [norm.logcdf(f[i], outside[i].mean(), spread[i]) for i in range(n)]
        assert lira_scores(f, shadows, inside, fewest) == pytest.approx(truth, rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 10), st.integers(1, 10), st.sampled_from([0.5, 1.0, 2.0]), st.integers(0, 10**6))
def test_rmia_by_brute_force(n, m, gamma, seed):
    rng = np.random.default_rng(seed)
    p, q, p_z, q_z = rng.uniform(0.01, 1, n), rng.uniform(0.01, 1, n), rng.uniform(0.01, 1, m), rng.uniform(0.01, 1, m)
    truth = [np.mean([(p[i] / q[i]) / (p_z[j] / q_z[j]) > gamma for j in range(m)]) for i in range(n)]
    assert rmia_scores(*map(np.log, (p, q, p_z, q_z)), gamma).tolist() == truth


def test_the_average_weighs_in_and_out_alike():
    p = np.array([[0.9, 0.1, 0.3], [0.2, 0.4, 0.6], [0.5, 0.7, 0.9]])
    inside = np.array([[True, False, False], [False, False, False], [True, True, True]])
    assert np.exp(average_probability(np.log(p), inside)) == pytest.approx([(0.9 + 0.2) / 2, 0.4, 0.7])
    assert math.isfinite(average_probability(np.array([[-1e9]]), np.array([[False]]))[0])


def test_an_image_that_is_hard_for_all_is_no_stranger():
    """Three images on which models that never saw them are at -5, 0 and 5; the target is 2 surer of the hardest."""
    shadows = np.array([[-5.5, -4.5], [-0.5, 0.5], [4.5, 5.5]])
    found = lira_scores([-3.0, 0.0, 5.0], shadows, np.zeros((3, 2), bool))
    assert found[0] > found[1]
    assert found[1] == found[2] == pytest.approx(math.log(0.5))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: lira_scores([0.0], [[0.0, 1.0]], [[True, True]]), "seen by every model"),
        (lambda: lira_scores([0.0], [[0.0, 1.0]], [[True, False]]), "no spread"),
        (lambda: lira_scores([0.0, 1.0], [[0.0, 1.0]], [[False, False]]), "target"),
        (lambda: lira_scores([0.0], [0.0], [False]), "shadows"),
        (lambda: average_probability([[0.0]], [[True, False]]), "inside"),
        (lambda: rmia_scores([0.0], [0.0], [], []), "z_target is empty"),
        (lambda: rmia_scores([0.0], [0.0], [0.0], [0.0], 0.0), "gamma"),
    ],
)
def test_errors_say_what_is_wrong(call, named):
    with pytest.raises(ValueError, match=named):
        call()


# --- halves and weights


@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=20), st.sampled_from([2, 4, 8]), st.integers(0, 9))
def test_every_cluster_is_seen_by_half_of_the_models(clusters, models, seed):
    inside = random_halves(clusters, models, seed)
    assert (inside.sum(axis=1) == models // 2).all()
    for name in set(clusters):
        assert len({tuple(row) for row, c in zip(inside, clusters, strict=True) if c == name}) == 1
    assert np.array_equal(inside, random_halves(clusters, models, seed))


def test_models_are_given_different_images():
    inside = random_halves(np.arange(400), 4, 0)
    assert np.abs(np.corrcoef(inside.T) + 1 / 3).max(where=~np.eye(4, dtype=bool), initial=0) < 0.15
    assert abs(inside.mean(axis=0) - 0.5).max() < 0.1


def test_new_weights_are_those_of_a_new_model():
    model = open_classifier(taught("noise", "original"))
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    renew(model, 3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(3)
    fresh = type(model)(model.config).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in model.state_dict().items())
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    renew(model, 4)
    assert any(not torch.equal(value, weights[name]) for name, value in model.state_dict().items())


# --- the attack


def evidence_and_findings(case: Case) -> tuple[Evidence, dict[str, Finding]]:
    evidence = captured(case, Shadow())
    return evidence, {f.id.split("/")[1]: f for f in judge(Shadow().measure(case, evidence))}


def test_members_are_found():
    case = digit_case("noise", target="original")
    evidence, findings = evidence_and_findings(case)
    assert [role for role in evidence.roles if "+" in role] == [f"target+shadow-{i}" for i in range(4)]
    for finding in findings.values():
        assert (finding.verdict, finding.side) == (Outcome.EVIDENCE, Side.REMAINS)
        assert finding.estimate > 0.9
        controls = {c.name: c for c in finding.controls}
        assert all(c.passed for c in controls.values() if c.gates)
        rate = controls["TPR at 1 % FPR"]
        assert rate.ci95[0] <= rate.estimate <= rate.ci95[1]
    drill = Shadow().examples(case, evidence)
    assert set(drill) == {row.id for row in case.rows("forget")}
    named = np.mean([row["treated as a member"] for row in drill.values()])
    assert named == next(c for c in findings["lira"].controls if c.name.startswith("TPR")).estimate
    assert all(0 <= row[score] <= 1 for row in drill.values() for score in ("LiRA", "RMIA"))


def test_strangers_are_not():
    _, findings = evidence_and_findings(digit_case("noise", target="retrained"))
    for finding in findings.values():
        assert finding.verdict != Outcome.EVIDENCE
        assert finding.ci95[0] < 0.5 < finding.ci95[1]
        # And it would have found some: those that this model was taught, and the shadows' own.
        controls = {c.name: c.passed for c in finding.controls}
        assert controls["positive control"]
        assert controls["shadow models' own members"]


def test_without_population_images_the_holdout_s_stand_in():
    case = digit_case("noise", without=("utility", "retain"), target="original")
    _, findings = evidence_and_findings(case)
    assert findings["rmia"].estimate > 0.8


def test_it_is_about_single_images_and_says_so():
    assert Shadow().missing(digit_case("instance", target="original")) is None
    assert "every forgotten class" in (Shadow().missing(digit_case("class", target="original")) or "")


def test_stages_and_cost_need_no_weights():
    case = digit_case("noise", target="original")
    target = ImageTarget("target", take_inventory(taught("noise", "original")))
    stages = Shadow().stages(case, target)
    assert len({stage.name for stage in stages}) == len({stage.recipe for stage in stages}) == 4
    assert "4 models from nothing, 40 epochs on 90 images each" in Shadow().cost(case, target)
    assert recipe_for(case, target).models == 4
    assert target._model is None
    other = ImageTarget("original", take_inventory(taught("noise", "original")))
    assert Shadow().stages(case, other) == []
    assert Shadow().requests(case, target.altered("relearn@5", "x")) == []
    assert Shadow().requests(case, target.altered("shadow-0", "x"))
