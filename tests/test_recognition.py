"""Recognition and utility of image classifiers: against each model's own forward pass, and planted effects."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from digit_models import captured, digit_case, parts, taught
from hypothesis import given
from hypothesis import strategies as st

from audit.case import Case, Options
from audit.organisms.imaging.train import all_logits, open_classifier
from audit.record import Finding, Outcome, Side
from audit.verdict import judge
from detectors.image_utility import ImageUtility
from detectors.recognition import Recognition, called, decided, like_with_like

pytestmark = pytest.mark.usefixtures("one_thread")


def answered(history: str, name: str = "forget", limit: int = 120) -> np.ndarray:
    """What a class-wise model calls the images of a set, by its own forward pass."""
    images = parts("class").parts[name].take(torch.arange(min(limit, len(parts("class").parts[name]))))
    return all_logits(open_classifier(taught("class", history)), images).argmax(1).numpy()


def found(case: Case, instrument: Recognition | ImageUtility) -> dict[str, Finding]:
    return {f.id.split("/")[1]: f for f in judge(instrument.measure(case, captured(case, instrument)))}


@given(st.lists(st.integers(0, 4), min_size=1, max_size=20))
def test_called_counts(numbers):
    assert called(numbers, 5).tolist() == [numbers.count(i) / len(numbers) for i in range(5)]


@pytest.mark.parametrize("numbers", [[], [5], [-1], [[0]]])
def test_called_refuses(numbers):
    with pytest.raises(ValueError, match="answered"):
        called(numbers, 5)


def test_what_is_decided_is_the_model_s_own_decision():
    case = digit_case("class", target="original")
    evidence = captured(case, Recognition())
    truth = answered("original")
    own = decided(evidence, "target", "forget", "token", "match")
    assert own.tolist() == (truth == parts("class").forget.labels.numpy()[: len(truth)]).tolist()
    drill = Recognition().examples(case, evidence)
    names = parts("class").classes
    assert [drill[row.id]["generated"] for row in case.rows("forget")] == [names[i] for i in truth]
    for row, right in zip(case.rows("forget"), own, strict=True):
        sure, of_right = drill[row.id]["probability of what is answered"], drill[row.id]["probability"]
        assert (sure == pytest.approx(of_right, rel=1e-5)) == bool(right)


def test_a_class_that_is_answered_and_one_that_is_not():
    kept = found(digit_case("class", target="original", retrained="retrained"), Recognition())
    assert kept["accuracy"].verdict == Outcome.EVIDENCE
    assert kept["accuracy"].side == Side.REMAINS
    assert kept["accuracy"].estimate == pytest.approx(
        np.mean(answered("original") == parts("class").forgotten)
        - np.mean(answered("retrained") == parts("class").forgotten)
    )
    for hidden in ("head-only", "retrained"):  # nothing comes out of either: silence here is no deletion
        silent = found(digit_case("class", target=hidden), Recognition())
        assert silent["accuracy"].estimate == 0
        assert silent["accuracy"].verdict == Outcome.NONE


def test_the_table_and_figure_are_the_confusion():
    case = digit_case("class", target="head-only", original="original", retrained="retrained")
    right = found(case, Recognition())["accuracy"]
    assert right.table is not None
    assert right.figure is not None
    shares = {(model, name): share for model, of, name, share, *_ in right.table.rows if of == "forget"}
    for role, history in (("target", "head-only"), ("original", "original"), ("retrained", "retrained")):
        truth = answered(history)
        assert shares[role, "their own class"] == pytest.approx(np.mean(truth == parts("class").forgotten))
        for i, name in enumerate(parts("class").classes):
            assert shares.get((role, name), 0) == pytest.approx(np.mean(truth == i))
    target = next(series for series in right.figure.series if series.label.endswith("target"))
    assert target.y == sorted(target.y, reverse=True)
    assert [shares["target", name] for name in right.figure.ticks] == target.y


def test_whom_it_is_compared_with_decides_what_it_decides():
    by_class, single = (digit_case(kind, target="original") for kind in ("class", "instance"))
    assert (like_with_like(by_class), like_with_like(single)) == (False, True)
    assert not like_with_like(digit_case("instance", without=("holdout",), target="original"))
    assert found(by_class, Recognition())["accuracy"].decides == (True, False)
    right = found(single, Recognition())["accuracy"]
    assert right.decides == (True, True)
    controls = [[c.name for c in f.controls] for f in (found(by_class, Recognition())["accuracy"], right)]
    assert "one class against another" in controls[0]
    assert "one class against another" not in controls[1]
    with_retrained = found(digit_case("class", target="original", retrained="retrained"), Recognition())
    assert "one class against another" not in [c.name for c in with_retrained["accuracy"].controls]


# --- utility


def test_damage_is_seen_and_its_absence():
    broken = found(digit_case("class", target="untaught", original="original"), ImageUtility())
    assert set(broken) == {"retain", "utility"}
    for finding in broken.values():
        assert (finding.verdict, finding.side) == (Outcome.EVIDENCE, Side.DAMAGE)
    kept = found(digit_case("class", target="head-only", original="original"), ImageUtility())
    for name, finding in kept.items():
        truth = parts("class").parts[name].labels.numpy()[:120]
        loss = np.mean(answered("head-only", name) == truth) - np.mean(answered("original", name) == truth)
        assert finding.estimate == pytest.approx(loss)
        assert abs(finding.estimate) < 0.05
        assert finding.side != Side.DAMAGE


def test_utility_needs_something_to_compare_with():
    assert "original" in (ImageUtility().missing(digit_case("class", target="original")) or "")
    case = digit_case("class", without=("retain", "utility"), target="original", original="original")
    assert "retain, neighbor, utility" in (ImageUtility().missing(case) or "")
    empty = Case("empty", {"target": taught("class", "original")}, {}, {}, Options())
    assert "forget" in (Recognition().missing(empty) or "")
