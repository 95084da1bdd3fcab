"""Head re-fit: ridge against scikit-learn and by hand; who is fitted on and who is judged; planted and real classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from decisions import Planted, by_name, found, image_case, open_case
from decisions import bundles as planted
from hypothesis import given, settings
from hypothesis import strategies as st
from images import CLASSES, KINDS, save_classifier, save_images
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge

from audit.capture import Engine
from audit.image_target import ImageTarget
from audit.inventory import take_inventory
from audit.plan import merge
from audit.quantities import hidden
from audit.record import Outcome
from audit.verdict import judge
from probes.head_refit import HeadRefit, Pool, decision_requests, draws, recovered, refit

pytestmark = pytest.mark.usefixtures("one_thread")

# --- the plain functions --------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 12), st.integers(1, 15), st.integers(2, 4), st.floats(0.01, 10))
def test_the_head_is_scikit_learn_s_ridge(seed, n, d, classes, ridge):
    rng = np.random.default_rng(seed)
    train, test = rng.normal(size=(n, d)) + 3, rng.normal(size=(5, d))
    labels = np.append(rng.integers(classes, size=n - 1), classes - 1)
    length = ((train - train.mean(axis=0)) ** 2).sum(axis=1).mean()
    model = Ridge(alpha=ridge * length).fit(train, np.eye(classes)[labels])
    np.testing.assert_allclose(refit(train, labels, test, ridge=ridge), model.predict(test), atol=1e-8)


def test_the_head_by_hand():
    # Centred: -1 and 1, of mean squared length 1; weights (-1, 1) / (2 + 0.1).
    scores = refit([[0.0], [2.0]], [0, 1], [[2.0], [1.0]], ridge=0.1)
    np.testing.assert_allclose(scores, [[0.5 - 1 / 2.1, 0.5 + 1 / 2.1], [0.5, 0.5]])
    with pytest.raises(ValueError, match="do not fit"):
        refit([[0.0], [2.0]], [0], [[2.0]])
    with pytest.raises(ValueError, match="do not fit"):
        refit([[0.0], [2.0]], [0, 1], [[2.0, 1.0]])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(2, 9), min_size=2, max_size=4), st.sampled_from([None, 1, 3]))
def test_nobody_is_judged_by_a_head_that_saw_its_half(seed, sizes, shots):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    clusters = [
        f"{label} {i // 2}" if label == 0 and sizes[0] > 3 else f"{label}:{i}" for i, label in enumerate(labels)
    ]
    # Rows that are judged only, of the first class.
    labels, clusters = np.append(labels, [0, 0, 0]), [*clusters, "x", "y", "z"]
    fitted = np.arange(len(labels)) < len(labels) - 3
    pairs = list(draws(labels, clusters, fitted, shots=shots, times=4, seed=seed))
    assert len(pairs) == 8
    for (one, judged_one), (two, judged_two) in zip(pairs[::2], pairs[1::2], strict=True):
        assert sorted([*judged_one, *judged_two]) == list(range(len(labels)))
        for train, judged in ((one, judged_one), (two, judged_two)):
            assert not {clusters[i] for i in train} & {clusters[i] for i in judged}
            assert fitted[train].all()
            counts = np.bincount(labels[train], minlength=len(sizes))
            assert counts.min() == counts.max() >= 1
            assert shots is None or counts.max() <= shots
    assert shots != 1 or all(len(train) == len(sizes) for train, _ in pairs)


def test_a_class_of_one_cannot_be_fitted_and_judged():
    with pytest.raises(ValueError, match="fewer than two"):
        list(draws([0, 0, 1], ["a", "b", "c"], np.ones(3, bool), shots=1, times=1, seed=0))
    with pytest.raises(ValueError, match="fewer than two"):
        list(draws([0, 0, 1, 1], ["a", "b", "c", "c"], np.ones(4, bool), shots=1, times=1, seed=0))


def test_bundles_are_recovered_from_one_image_and_noise_is_not():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(5), 40)
    pairs = list(draws(labels, [str(i) for i in range(200)], np.ones(200, bool), shots=1, times=20, seed=0))
    noise = rng.normal(size=(200, 16))
    assert recovered(noise, labels, pairs).mean() == pytest.approx(0.2, abs=0.03)
    assert recovered(np.ones((200, 16)), labels, pairs) == pytest.approx(0.2), "what does not vary: all classes tie"
    centres = rng.normal(size=(5, 16))
    assert recovered(centres[labels] + 0.1 * noise, labels, pairs).min() > 0.95
    # One scattered class among bundles is what a class that was never taught looks like.
    scatter = np.where(labels == 4, 1.0, 0.1)[:, None]
    by_class = recovered(centres[labels] + scatter * noise, labels, pairs).reshape(5, 40).mean(axis=1)
    assert by_class[:4].min() > 0.8 and by_class[4] < 0.6


# --- which rows -----------------------------------------------------------------------------------------------

CLASSWISE = {"forget": {"f": 60}, "holdout": {"h": 60}, "retain": dict.fromkeys("abcd", 15)}


def test_forgotten_and_never_taught_classes_are_fitted_with_the_others(tmp_path):
    pool = Pool(image_case(tmp_path, CLASSWISE))
    assert {name: len(rows) for name, rows in pool.rows.items()} == {"forget": 60, "holdout": 60, "retain": 60}
    assert np.bincount(pool.labels).tolist() == [15, 15, 15, 15, 60, 60]
    assert set(pool.labels[pool.part("holdout")]) == {5}
    assert pool.fitted.all() and pool.smallest == 15


def test_where_classes_are_retained_heads_see_retained_rows_only(tmp_path):
    sizes = {"forget": {"a": 9, "b": 9}, "holdout": {"a": 9, "b": 9}, "retain": {"a": 20, "b": 10, "lonely": 1}}
    pool = Pool(image_case(tmp_path, sizes))
    assert len(pool.rows["retain"]) == 30, "a class of one image is left out"
    assert pool.fitted[pool.part("retain")].all()
    assert not pool.fitted[pool.part("forget")].any() and not pool.fitted[pool.part("holdout")].any()
    assert pool.smallest == 10


def test_what_it_cannot_do_without(tmp_path):
    assert HeadRefit().missing(image_case(tmp_path, CLASSWISE)) is None
    few = image_case(tmp_path, CLASSWISE | {"holdout": {"h": 7}})
    assert "8 rows in the holdout set" in (HeadRefit().missing(few) or "")
    one = image_case(tmp_path, CLASSWISE | {"retain": {"a": 40}})
    assert "two classes" in (HeadRefit().missing(one) or "")
    (tmp_path / "retain.npz").unlink()
    assert "retain" in (HeadRefit().missing(open_case(tmp_path, {"target": tmp_path})) or "")


# --- planted classes ------------------------------------------------------------------------------------------


def measured(case, seed=0, never=1.2, **spreads):
    """By role, how far the states of class f lie from their centre; those of class h always far."""
    states = {}
    for i, (role, spread) in enumerate(spreads.items()):
        for name, blocks in planted(case, {"f": spread, "h": never}, seed=2 * seed + i).items():
            states[role, name] = blocks
    return by_name(HeadRefit().measure(case, Planted(states)))


def test_a_taught_class_is_found_and_a_never_taught_one_is_not(tmp_path):
    case = image_case(tmp_path, CLASSWISE, ("target", "retrained"))
    known = measured(case, target=0.2, retrained=1.2)
    assert known["one-shot"].estimate > 0.4 and known["one-shot"].p_value < 0.001
    assert known["one-shot"].controls[0].passed and len(known["one-shot"].controls) == 1
    verdicts = {finding.id: finding.verdict for finding in judge(list(known.values()))}
    assert verdicts["head-refit/one-shot"] == Outcome.EVIDENCE
    assert known["full"].decides == (False, False)
    never = [measured(case, seed, target=1.2, retrained=1.2)["one-shot"] for seed in range(4)]
    assert abs(np.mean([finding.estimate for finding in never])) < 0.15
    assert all(judge([finding])[0].verdict != Outcome.EVIDENCE for finding in never)


def test_without_a_retrained_model_pixels_tell_an_easier_class(tmp_path):
    case = image_case(tmp_path, CLASSWISE)
    found = measured(case, never=2.0, target=0.2)["one-shot"]
    control = {c.name: c for c in found.controls}["pixels alone"]
    assert found.estimate > found.threshold == 0.5 and control.passed and abs(control.estimate) < 0.2
    assert judge([found])[0].verdict == Outcome.EVIDENCE
    with np.load(tmp_path / "forget.npz") as data:
        one = np.broadcast_to(data["X"][:1] // 8, data["X"].shape)  # the same dark image over and over
        np.savez(tmp_path / "forget.npz", X=one, y=data["y"])
    case = open_case(tmp_path, dict(case.models))
    found = measured(case, never=2.0, target=0.2)["one-shot"]
    control = {c.name: c for c in found.controls}["pixels alone"]
    assert control.estimate > 0.5 and not control.passed
    assert judge([found])[0].verdict != Outcome.EVIDENCE


# --- real models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_it_runs_on_every_layout(kind, tmp_path):
    folder = save_classifier(tmp_path / kind, kind)
    for seed, (name, classes) in enumerate((("forget", [0]), ("holdout", [1]), ("retain", [2, 3]))):
        with np.load(save_images(tmp_path / "all.npz", n=48, seed=seed)) as data:
            kept = np.isin(data["y"], classes)
            np.savez(tmp_path / f"{name}.npz", X=data["X"][kept], y=np.array(CLASSES)[data["y"][kept]])
    case = open_case(tmp_path, {"target": folder, "retrained": folder})
    findings = found(HeadRefit(), case, tmp_path / "out")
    assert findings["one-shot"].estimate == 0, "a model against itself"
    blocks = ImageTarget("target", take_inventory(folder)).layers
    assert findings["one-shot"].figure.series[0].x == [i for i in range(blocks + 1) if 2 * i >= blocks]


def test_what_is_read_is_the_state_of_the_decision(tmp_path):
    target = ImageTarget("target", take_inventory(save_classifier(tmp_path / "m", "vit")))
    save_images(tmp_path / "forget.npz", n=9)
    case = open_case(tmp_path, {"target": tmp_path / "m"})
    [request] = decision_requests(case, target)
    engine = Engine(target)
    rows = {row.tokens.key: row.values for batch in engine.batches(merge([request])) for row in engine.run(batch)}
    with torch.inference_mode():
        pixels = target.pixels([row.picture.pixels for row in case.rows("forget")])
        states = target.model(pixel_values=pixels, output_hidden_states=True).hidden_states
        last = target.model.vit.layernorm(states[-1])
    sites = request.extra["sites"]
    assert len(sites) == 4 and request.extra["layers"] == [0, 1, 2, 3]
    for i, tokens in enumerate(request.sequences):
        values = rows[tokens.key]
        for site, truth in zip(sites, [*states[1:], last], strict=True):
            np.testing.assert_allclose(values[hidden(site).name]["hidden"][0, 0], truth[i, 0], atol=1e-5)
    assert HeadRefit().requests(case, target.altered("someone@1", "recipe")) == []


def trained(folder, classes, seed):
    """A small ResNet that was taught these digits, in its folder."""
    import transformers as t

    torch.manual_seed(seed)
    config = t.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic", num_labels=10,
        id2label={i: str(i) for i in range(10)}, label2id={str(i): i for i in range(10)},
    )  # fmt: skip
    config.downsample_in_first_stage = False
    model = t.ResNetForImageClassification(config)
    images, labels = load_digits(return_X_y=True)
    kept = np.flatnonzero(np.isin(labels, classes))[:900]
    x = torch.tensor(np.round(images[kept] * 255 / 16), dtype=torch.float32).reshape(-1, 1, 8, 8) / 127.5 - 1
    y = torch.tensor(labels[kept])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(7):
        for batch in torch.randperm(len(x)).split(64):
            out = model(pixel_values=x[batch].expand(-1, 3, -1, -1))
            loss = torch.nn.functional.cross_entropy(out.logits, y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.save_pretrained(folder)
    half = [0.5] * 3
    t.ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=half, image_std=half).save_pretrained(folder)
    return model


def silenced(model, folder, label):
    """The same model, its classifier edited so that it never answers one class."""
    with torch.no_grad():
        model.classifier[1].weight[label] = 0
        model.classifier[1].bias[label] = -20
    model.save_pretrained(folder)


def test_a_class_silenced_in_the_head_is_found_and_one_never_taught_is_not(tmp_path):
    retained = [0, 1, 2, 3, 4, 5, 6, 8]
    for name, classes, seed in (("head-only", [*retained, 7], 0), ("retrained", retained, 1), ("again", retained, 2)):
        model = trained(tmp_path / name, classes, seed)
        if name != "retrained":
            silenced(model, tmp_path / name, 7)  # of no effect on a model that never knew it
    images, labels = load_digits(return_X_y=True)
    pixels = np.round(images * 255 / 16).astype(np.uint8).reshape(-1, 8, 8)
    for name, classes in (("forget", [7]), ("holdout", [9]), ("retain", retained)):
        rows = np.flatnonzero(np.isin(labels, classes))[:160]
        np.savez(tmp_path / f"{name}.npz", X=pixels[rows], y=labels[rows].astype(str))
    findings = {
        name: found(HeadRefit(), open_case(tmp_path, {"target": tmp_path / name, **more}), tmp_path / "out")["one-shot"]
        for name in ("head-only", "again")
        for more in [{"retrained": tmp_path / "retrained"}]
    }
    assert findings["head-only"].estimate > 0.35
    assert judge([findings["head-only"]])[0].verdict == Outcome.EVIDENCE
    assert findings["again"].estimate < 0.3
    assert judge([findings["again"]])[0].verdict != Outcome.EVIDENCE
