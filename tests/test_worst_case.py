"""Worst-case forget sets: the projection against brute force, planted images chosen, the gap there and absent."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from digit_models import captured, scratch, taught
from digit_models import digit_case as any_case
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from attacks.selection import _descend_by_sign, project_capped_simplex, select
from attacks.worst_case import METHODS, Recipe, WorstCase, unlearn
from audit.case import Case, Options
from audit.image_target import ImageTarget
from audit.inventory import take_inventory
from audit.loaders import SetSpec
from audit.organisms.imaging.train import accuracy, fit, new_classifier, save
from audit.organisms.imaging.world import Images, Split, images, joined
from audit.record import Finding, Outcome, Question
from audit.verdict import judge

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = tuple("abcdefgh")


# --- the projection


vectors = st.lists(st.floats(-5, 5), min_size=1, max_size=7)


def digit_case(*names: str, **given) -> Case:
    """A case of digits in which this attack is asked for by name."""
    case = any_case(*names, **given)
    return replace(case, options=replace(case.options, only=("worst-case",)))


@settings(max_examples=60, deadline=None)
@given(vectors, st.data())
def test_no_corner_lies_beyond_the_projection(w, data):
    """x is the nearest point of a convex set iff (w - x)(y - x) <= 0 for all its corners y: 0 and 1, m of them 1."""
    m = data.draw(st.integers(0, len(w)))
    x = project_capped_simplex(w, m)
    assert x.sum() == pytest.approx(m, abs=1e-9)
    assert x.min() >= 0 and x.max() <= 1
    for ones in itertools.combinations(range(len(w)), m):
        corner = np.isin(np.arange(len(w)), ones).astype(float)
        assert (np.array(w) - x) @ (corner - x) <= 1e-9


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(-2, 2), min_size=2, max_size=5), st.floats(0.1, 0.9))
def test_the_projection_is_that_of_a_general_solver(w, share):
    m = share * len(w)
    found = minimize(
        lambda x: ((x - w) ** 2).sum(),
        np.full(len(w), share),
        jac=lambda x: 2 * (x - w),
        bounds=[(0, 1)] * len(w),
        constraints={"type": "eq", "fun": lambda x: x.sum() - m, "jac": lambda x: np.ones(len(w))},
        method="SLSQP",
        options={"ftol": 1e-12},
    )
    assert project_capped_simplex(w, m) == pytest.approx(found.x, abs=1e-4)


@given(vectors, st.floats(0, 1), st.floats(-100, 100))
def test_a_common_shift_changes_nothing_and_order_stays(w, share, shift):
    m = share * len(w)
    x = project_capped_simplex(w, m)
    assert project_capped_simplex(np.array(w) + shift, m) == pytest.approx(x, abs=1e-9)
    assert project_capped_simplex(x, m) == pytest.approx(x, abs=1e-9)
    assert (np.diff(x[np.argsort(w, kind="stable")]) >= -1e-12).all()


def test_by_hand():
    assert project_capped_simplex([3.0, 0.5, 0.1, -9.0], 2) == pytest.approx([1.0, 0.7, 0.3, 0.0])


@pytest.mark.parametrize(("w", "m"), [([], 0), ([[0.5]], 1), ([np.nan], 1), ([0.5], 2), ([0.5], -1)])
def test_what_cannot_be_projected(w, m):
    with pytest.raises(ValueError, match=r"^[wm] must"):
        project_capped_simplex(w, m)


# --- the choice


@cache
def planted() -> Split:
    """Noise under random labels, which can be known by heart only, and images whose class is plain to see.

    The latter are 15 of the 30 forget images and 75 of the 120 retained: without any 30 of them, others still teach it.
    """
    rng = np.random.default_rng(0)
    noise = images(rng.integers(0, 256, (110, 8, 8)), rng.integers(0, 8, 110))
    labels = rng.integers(0, 8, 90)
    pixels = rng.integers(0, 30, (90, 8, 8))
    for image, label in zip(pixels, labels, strict=True):
        row, column = divmod(label, 2)
        image[2 * row : 2 * row + 2, 4 * column : 4 * column + 4] += 220
    easy = images(pixels, labels)

    def part(plain: slice, hard: slice) -> Images:
        return joined(*(each.take(torch.arange(len(each))[s]) for each, s in ((easy, plain), (noise, hard))))

    forget, retain = part(slice(15), slice(15)), part(slice(15, 90), slice(15, 60))
    unseen = noise.take(torch.arange(60, 110))
    return Split(CLASSES, None, None, forget, unseen, retain, unseen)


@cache
def folder():
    model = new_classifier("resnet", 8, CLASSES, 0)
    fit(model, joined(planted().forget, planted().retain), epochs=25, learning_rate=3e-3, seed=0)
    return save(model, scratch() / "planted")


@cache
def case() -> Case:
    sets = planted().write_sets(scratch() / "sets-planted")
    specs = {name: SetSpec(sets[name]) for name in ("forget", "retain", "utility")}
    return Case.build(
        {"target": folder()}, specs, Options.parse({"device": "cpu", "budget": "quick", "only": ["worst-case"]}, "test")
    )


def test_the_same_seed_chooses_the_same_and_leaves_the_model_as_it_was():
    model = ImageTarget("target", take_inventory(folder())).model.requires_grad_(True)
    pool = joined(planted().forget, planted().retain)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.random.get_rng_state()
    found, again, other = (select(model, pool, 60, seed=seed, rounds=1, epochs=1) for seed in (0, 0, 1))
    assert found.weights.sum() == pytest.approx(60)
    assert len(found.chosen) == 60
    assert found.weights[found.chosen].min() >= np.delete(found.weights, found.chosen).max()
    assert not model.training
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert np.array_equal(again.chosen, found.chosen)
    assert np.array_equal(again.weights, found.weights)
    assert not np.array_equal(other.weights, found.weights)
    for m in (0, len(pool)):
        with pytest.raises(ValueError, match="m must lie"):
            select(model, pool, m, seed=0)


def test_an_image_that_is_left_out_is_not_taught():
    """Labels of images left out are of no account at the lower level, those of the others are."""
    pool = planted().retain
    left = (torch.arange(len(pool)) >= 40).float()

    def weights(relabelled: slice) -> list[torch.Tensor]:
        labels, model = pool.labels.clone(), new_classifier("resnet", 8, CLASSES, 1)
        labels[relabelled] = (labels[relabelled] + 1) % len(CLASSES)
        _descend_by_sign(model, pool.labelled(labels), left, 1, 32, 1e-3, 0)
        return list(model.parameters())

    asis, without, within = (weights(which) for which in (slice(0), slice(40), slice(40, 60)))
    assert all(torch.equal(a, b) for a, b in zip(asis, without, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(asis, within, strict=True))


def test_what_is_unlearned_is_unlearned():
    """Noise cannot be taught by the rest: a model from nothing knows nothing of it, wrong labels leave less."""
    pool = planted().retain
    forget, rest = pool.take(torch.arange(75, 105)), pool.take(torch.arange(75))
    recipe = Recipe(10, 5e-3, 15, 3e-3, 1e-3)
    left = {}
    for method in METHODS:
        model = ImageTarget("target", take_inventory(folder())).model.requires_grad_(True)
        assert accuracy(model, forget) > 0.9
        unlearn(model, method, forget, rest, recipe, seed=0)
        left[method] = accuracy(model, forget)
    assert left["retrained"] < 0.6
    assert left["random-labels"] < 0.6


# --- the instrument


@cache
def found_in(kind: str) -> tuple[Case, list[str], Finding, dict]:
    of = case() if kind == "planted" else digit_case("noise", limit=30, target="retrained", original="original")
    evidence = captured(of, WorstCase())
    [finding] = judge(WorstCase().measure(of, evidence))
    return of, evidence.roles, finding, WorstCase().examples(of, evidence)


def controls(finding: Finding) -> dict:
    return {control.name: control for control in finding.controls}


def test_a_planted_gap_is_measured_and_decides_nothing():
    of, roles, finding, drill = found_in("planted")
    assert finding.id == "worst-case/gap"
    assert finding.question == Question.UTILITY
    assert finding.estimate > 0.15
    assert finding.ci95[0] > 0
    assert finding.verdict != Outcome.EVIDENCE
    assert finding.decides == (False, False)
    made = controls(finding)
    lo, hi = made["spread of random subsets"].ci95
    chosen_mean = made["spread of random subsets"].estimate + finding.estimate
    assert made["spread of random subsets"].passed == (not lo <= chosen_mean <= hi)
    assert made["room above random subsets"].passed
    # No trace of these very images: the rest teaches them to a model from nothing too, and the control says it.
    assert made["gap, retrained"].estimate > 0.15
    assert "without the original" in made
    assert made["what was chosen"].n == 30
    assert len(roles) == 1 + 1 + (1 + 5) + 2 * (1 + 2)
    assert set(drill) == {row.id for row in of.rows("forget")}
    chosen = [values["forgotten worst"] for values in drill.values()]
    assert sum(chosen) == round(30 * made["what was chosen"].estimate)
    assert np.mean(chosen[:15]) > np.mean(chosen[15:]) + 0.15


def test_without_a_plant_there_is_less_of_it_and_the_original_is_asked():
    """Noise alone: what is left of one image after unlearning is left of another."""
    _, roles, finding, _ = found_in("noise")
    assert {role.split("+")[0] for role in roles} == {"original"}
    assert abs(controls(finding)["gap, retrained"].estimate) < 0.2
    assert finding.estimate < found_in("planted")[2].estimate
    assert "without the original" not in controls(finding)


def test_it_says_what_it_lacks():
    assert "retain" in (WorstCase().missing(digit_case("noise", without=("retain",), target="original")) or "")
    assert "at least 20" in (WorstCase().missing(digit_case("noise", limit=5, target="original")) or "")
    assert WorstCase().missing(case()) is None


def test_stages_and_cost_need_no_weights():
    target = ImageTarget("target", take_inventory(folder()))
    stages = WorstCase().stages(case(), target)
    assert len({stage.name for stage in stages}) == len({stage.recipe for stage in stages}) == 13
    assert stages[0].name == "worst-case-selected"
    assert "9 models unlearn for 10 epochs on 120 images, 3 are trained from nothing for 40" in WorstCase().cost(
        case(), target
    )
    assert target._model is None
    with_original = digit_case("noise", target="retrained", original="original")
    other = ImageTarget("target", take_inventory(taught("noise", "retrained")))
    assert WorstCase().stages(with_original, other) == []
    assert WorstCase().requests(with_original, other) == []
    assert WorstCase().requests(case(), target.altered("shadow-0", "x")) == []
