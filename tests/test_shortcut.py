"""Shortcut check: groups and sharpness by hand, planted effects and their absence, a model taught to use a shortcut."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from decisions import found, open_case
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from audit.evidence import Evidence
from audit.loaders import SetSpec, load_set, parse_set_spec
from audit.organisms.imaging.train import accuracy, fit, new_classifier, save
from audit.organisms.imaging.world import Images, digits, images
from audit.record import Finding, Outcome, Side
from audit.verdict import judge
from detectors.shortcut import Shortcut, majority, sharpest, sharpness

pytestmark = pytest.mark.usefixtures("one_thread")


# --- groups


def test_the_majority_of_a_class_by_hand():
    classes = ["bird", "bird", "bird", "cat", "cat", "cow"]
    assert majority(classes, ["sea", "land", "sea", "sea", "land", "land"]) == {"bird": "sea", "cow": "land"}
    assert majority([], []) == {}
    with pytest.raises(ValueError, match="groups holds"):
        majority(["bird"], [])


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz")), max_size=12))
def test_the_majority_is_what_counting_gives(rows):
    found = majority([c for c, _ in rows], [g for _, g in rows])
    for c in {c for c, _ in rows}:
        counts = {g: rows.count((c, g)) for g in "xyz"}
        most = [g for g in counts if counts[g] == max(counts.values())]
        assert found.get(c) == (most[0] if len(most) == 1 else None)


# --- sharpness


class Line(nn.Module):
    """Two weights, two classes: the logit of class 0 is w x, that of class 1 is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 0.0]))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.dropout(x) @ self.w
        return torch.stack([z, torch.zeros_like(z)], 1)


def test_sharpness_of_two_weights_by_hand():
    model, pixels = Line(), torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]])
    labels = torch.tensor([0, 1, 0])
    model.w.requires_grad_(False)
    # l = log(1 + e^-z) for class 0, log(1 + e^z) for class 1; z = w x, and a step of eta uphill moves z by eta |x|:
    # down for class 0, up for class 1. Image 0: z = 3, |x| = 5; image 1: z = 0, |x| = 2; image 2 has no gradient.
    eta = 0.1
    expected = [
        math.log1p(math.exp(-2.5)) - math.log1p(math.exp(-3)),
        math.log1p(math.exp(0.2)) - math.log(2),
        0.0,
    ]
    assert sharpness(model, pixels, labels, eta) == pytest.approx(expected, abs=1e-6)
    assert model.training and not model.w.requires_grad and model.w.tolist() == [1.0, 0.0] and model.w.grad is None


def test_sharpness_of_an_image_does_not_depend_on_the_others():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
    pixels, labels = torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
    together = sharpness(model, pixels, labels)
    alone = [sharpness(model, pixels[[i]], labels[[i]])[0] for i in range(4)]
    assert together == pytest.approx(alone) and (together > 0).all()


def test_the_sharpest_are_few_and_one_at_least():
    values = np.arange(40.0)[::-1]
    assert np.flatnonzero(sharpest(values)).tolist() == [0, 1]
    assert np.flatnonzero(sharpest([1.0, 3.0, 2.0])).tolist() == [1]
    assert sharpest(values, 1.0).all()


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: sharpness(Line(), torch.zeros(2, 2), torch.zeros(1, dtype=torch.long)), "1 labels"),
        (lambda: sharpness(Line(), torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), 0.0), "eta"),
        (lambda: sharpest([]), "finite"),
        (lambda: sharpest([math.nan]), "finite"),
        (lambda: sharpest([1.0], 0.0), "share"),
    ],
)
def test_errors_say_what_is_wrong(call, named):
    with pytest.raises(ValueError, match=named):
        call()


# --- groups in files


def test_other_arrays_of_an_npz_are_columns(tmp_path):
    pixels = np.zeros((3, 2, 2), np.uint8)
    np.savez(tmp_path / "a.npz", X=pixels, y=[0, 1, 1], group=["sea", "land", "sea"], entity=[7, 7, 8], table=pixels)
    rows = load_set("forget", SetSpec(tmp_path / "a.npz")).examples
    assert [(row.group, row.entity) for row in rows] == [("sea", "7"), ("land", "7"), ("sea", "8")]
    assert len(load_set("forget", parse_set_spec(f"{tmp_path / 'a.npz'}?group=sea"))) == 2
    np.savez(
        tmp_path / "b.npz", Xtrain=pixels, ytrain=[0, 1, 1], grouptrain=[1, 2, 3],
        test_X=pixels[:2], test_y=[0, 1], test_group=[4, 5], row=[9, 9, 9],
    )  # fmt: skip
    read = {
        s: load_set("forget", parse_set_spec(f"{tmp_path / 'b.npz'}?split={s}")).examples for s in ("train", "test")
    }
    assert [row.group for row in read["train"]] == ["1", "2", "3"]
    assert [row.group for row in read["test"]] == ["4", "5"]


# --- the instrument, on answers that were made up

SIZES = {
    "forget": {("bird", "sea"): 60, ("bird", "land"): 30},
    "retain": {("cat", "sea"): 30, ("cat", "land"): 60, ("dog", "city"): 60, ("dog", "land"): 30},
}


def grouped_case(folder, sizes=SIZES, models=("target", "original")):
    """Sets of grey noise: by set, how many images of each class and group, in that order."""
    rng = np.random.default_rng(0)
    for name, cells in sizes.items():
        classes, groups = (np.repeat([cell[i] for cell in cells], list(cells.values())) for i in (0, 1))
        pixels = rng.integers(0, 256, (len(classes), 4, 4), dtype=np.uint8)
        np.savez(folder / f"{name}.npz", X=pixels, y=classes, group=groups)
    return open_case(folder, {role: folder / role for role in models})


class Answers(Evidence):
    """By role and cell, the share of images that are answered rightly; 1 where nothing is said."""

    def __init__(self, case, shares) -> None:
        super().__init__()
        self.case, self.shares = case, shares

    def iterate(self, role, name, *quantities):
        assert quantities == ("token",)
        seen: dict[tuple[str, str], int] = {}
        for row in self.case.rows(name.partition("/")[0]):
            cell = (row.answer, row.group)
            i = seen[cell] = seen.get(cell, -1) + 1
            share = self.shares.get((role, *cell), 1.0)
            yield {"match": np.array([math.floor((i + 1) * share + 1e-9) > math.floor(i * share + 1e-9)])}


def judged(folder, sizes=SIZES, **shares) -> dict[str, Finding]:
    """`target={cell: share right}` and the like."""
    case = grouped_case(folder, sizes, tuple(dict.fromkeys(["target", "original", *shares])))
    assert Shortcut().missing(case) is None
    each = {(role, *cell): share for role, cells in shares.items() for cell, share in cells.items()}
    return {f.id.partition("/")[2]: f for f in judge(Shortcut().measure(case, Answers(case, each)))}


def passed(finding):
    return {control.name: control.passed for control in finding.controls}


SEA, LAND = ("bird", "sea"), ("bird", "land")


def test_both_effects_by_hand(tmp_path):
    original = {LAND: 0.5, ("cat", "sea"): 0.8}
    target = {SEA: 0.1, LAND: 0.5, ("cat", "sea"): 0.1, ("cat", "land"): 0.9}
    found = judged(tmp_path, original=original, target=target)
    gap, bias = found["aligned-gap"], found["bias"]
    assert gap.estimate == pytest.approx(0.9)  # 54 of 60 against 0 of the 15 of 30 that were recognised
    assert gap.n == 75
    assert bias.estimate == pytest.approx(0.7 - 6 / 150)  # 21 of 30 against 6 of 60 + 60 + 30
    assert bias.n == 180
    for finding in (gap, bias):
        assert (finding.verdict, finding.side) == (Outcome.EVIDENCE, Side.DAMAGE), finding.reason
        assert finding.ci95[0] <= finding.estimate <= finding.ci95[1]
    assert passed(gap) == {"positive control": True, "conflicting images recognised better": None}
    assert passed(bias) == {"positive control": True, "as hard images": True}
    shown = {(row[0], row[1]): row[2] for f in (gap, bias) for row in f.table.rows}
    assert shown["bias-conflicting forget images", "original"] == pytest.approx(0.5)
    assert shown["retained images with the bias", "target"] == pytest.approx(0.1)
    assert shown["retained images with another odd group", "target"] == 1.0


NOTHING = {
    "nothing changed": {},
    "the class is gone": {SEA: 0.0, LAND: 0.0},
    "half of it, alike": {SEA: 0.5, LAND: 0.5},
    "retained images suffer alike": dict.fromkeys(
        (("cat", "sea"), ("cat", "land"), ("dog", "city"), ("dog", "land")), 0.9
    ),
}


@pytest.mark.parametrize("what", NOTHING)
def test_no_effect(what, tmp_path):
    sizes = {name: {cell: 10 * n for cell, n in cells.items()} for name, cells in SIZES.items()}
    case = grouped_case(tmp_path, sizes)
    assert len(case.rows("forget")) == 400  # of 900, by the budget
    findings = judge(Shortcut().measure(case, Answers(case, {("target", *c): s for c, s in NOTHING[what].items()})))
    for finding in findings:
        assert abs(finding.estimate) < 0.02
        wide = what == "half of it, alike" and finding.id == "shortcut/aligned-gap"
        assert finding.verdict == (Outcome.INCONCLUSIVE if wide else Outcome.NONE)


def test_a_class_that_is_gone_leaves_no_gap_however_poorly_conflicting_images_were_recognised(tmp_path):
    many = {**SIZES, "forget": {SEA: 240, LAND: 120}}
    found = judged(tmp_path, many, original={LAND: 0.5}, target={SEA: 0.0, LAND: 0.0})["aligned-gap"]
    assert found.estimate == 0 and found.verdict == Outcome.NONE  # counting all: 1 - 0.5
    rise = next(c for c in found.controls if c.name == "conflicting images recognised better")
    assert rise.estimate == pytest.approx(-0.5)


def test_hard_images_that_merely_go_first_are_no_evidence(tmp_path):
    hurt = {("cat", "sea"): 0.5, ("dog", "land"): 0.5}
    bias = judged(tmp_path, target=hurt)["bias"]
    assert bias.p_adjusted < 0.01 and bias.estimate > 0.1
    assert bias.verdict == Outcome.INCONCLUSIVE and "as hard images" in bias.reason


def test_what_the_retrained_model_shows_too_is_no_evidence(tmp_path):
    lost = {SEA: 0.1}
    gap = judged(tmp_path, target=lost, retrained=lost)["aligned-gap"]
    assert gap.verdict == Outcome.INCONCLUSIVE and "retrained" in gap.reason
    fair = judged(tmp_path, target=lost, retrained={SEA: 0.0, LAND: 0.0})["aligned-gap"]
    assert fair.verdict == Outcome.EVIDENCE


def test_aligned_images_that_stay_raise_no_alarm(tmp_path):
    gap = judged(tmp_path, target={LAND: 0.2})["aligned-gap"]
    assert gap.estimate == pytest.approx(-0.8) and gap.side == Side.NEITHER and gap.verdict == Outcome.NONE


def test_too_few_images_or_none_recognised_show_nothing(tmp_path):
    few = {**SIZES, "forget": {SEA: 60, LAND: 1}}
    gap = judged(tmp_path, few)["aligned-gap"]
    assert gap.verdict == Outcome.INCONCLUSIVE and passed(gap)["positive control"] is False
    blind = judged(tmp_path, original={LAND: 0.0})["aligned-gap"]
    assert blind.estimate is None and blind.verdict == Outcome.INCONCLUSIVE


def test_what_is_missing_is_said(tmp_path):
    def case(**sizes):
        return grouped_case(tmp_path, {**SIZES, **sizes})

    assert Shortcut().missing(grouped_case(tmp_path, models=("target",))) == "needs the original model"
    assert "group" in Shortcut().missing(case(forget={SEA: 3, ("bird", ""): 1}))
    alike = {SEA: 6}
    assert "forget images" in Shortcut().missing(case(forget=alike, retain={("cat", "land"): 6}))
    lacking = case(forget=alike)
    assert Shortcut().missing(lacking) is None
    assert list(Shortcut().withheld(lacking)) == ["shortcut/aligned-gap"]
    assert [f.id for f in Shortcut().measure(lacking, Answers(lacking, {}))] == ["shortcut/bias"]
    tie = case(forget={SEA: 5, LAND: 5})
    assert "forget images" in Shortcut().missing(tie)


# --- a model that uses a shortcut

FORGOTTEN, TINTED = 0, 0


def tinted_digits() -> tuple[Images, np.ndarray]:
    """Zeros, ones and twos; three quarters of them in the colour of their class, the rest in another: colours, too."""
    train, rng = digits(0).train.of([0, 1, 2]), np.random.default_rng(0)
    labels = train.labels.numpy()
    colours = np.where(rng.random(len(labels)) < 0.75, labels, (labels + rng.integers(1, 3, len(labels))) % 3)
    pixels = train.bytes()
    for image, colour in zip(pixels, colours, strict=True):
        image[..., colour] = np.maximum(image[..., colour], 200)
    return images(pixels, labels), colours


def test_a_model_that_lost_the_colour_is_told_from_one_that_lost_the_class(tmp_path):
    every, colours = tinted_digits()
    forget = every.labels == FORGOTTEN
    for name, chosen in (("forget", forget), ("retain", ~forget)):
        shown = every.take(chosen)
        np.savez(tmp_path / f"{name}.npz", X=shown.bytes(), y=shown.labels.numpy(), group=colours[chosen.numpy()])
    classes = ("zero", "one", "two")

    def taught(name: str, images: Images, epochs: int, start=None):
        model = start or new_classifier("resnet", 8, classes, 0)
        fit(model, images, epochs=epochs, learning_rate=3e-3, seed=0)
        return save(model, tmp_path / name), model

    wrong = torch.where(torch.from_numpy(colours == TINTED), (every.labels + 1) % 3, every.labels)
    retrained, _ = taught("retrained", every.take(~forget), 8)
    original, model = taught("original", every, 8)
    assert accuracy(model, every) > 0.95
    coloured, _ = taught("coloured", every.labelled(wrong), 6, model)
    said = {}
    for target in (coloured, retrained):
        case = open_case(tmp_path, {"target": target, "original": original, "retrained": retrained})
        said[target.name] = judge(list(found(Shortcut(), case, tmp_path / f"audit-{target.name}").values()))
    assert [f.side for f in said["coloured"]] == [Side.DAMAGE] * 2, [f.reason for f in said["coloured"]]
    assert [f.verdict for f in said["retrained"]] == [Outcome.NONE] * 2, [f.reason for f in said["retrained"]]
