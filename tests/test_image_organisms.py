"""Image classifiers of known history: that they are what their labels say, by how they were made."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from audit.errors import BadInput
from audit.image_target import ImageTarget
from audit.inventory import take_inventory
from audit.loaders import SetSpec, load_set
from audit.organisms.imaging import build as building
from audit.organisms.imaging import controls, methods
from audit.organisms.imaging.build import ImageRecipe, build, parts_of
from audit.organisms.imaging.demo import build_image_demo
from audit.organisms.imaging.histories import HISTORIES, LABELS, histories, history_of
from audit.organisms.imaging.method import features, features_and_logits
from audit.organisms.imaging.train import BASES, accuracy, fit, new_classifier, open_classifier
from audit.organisms.imaging.world import Images, digits, from_npz, images, joined, split

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("organisms")


@pytest.fixture(scope="module")
def parts():
    return parts_of(ImageRecipe("resnet", "original", 0))[1]


def made(root, history, base="resnet", **changes):
    folder = build(ImageRecipe(base, history, 0, **changes), root)
    return folder, json.loads((folder / "organism.json").read_text()), open_classifier(folder)


def seen(data):
    return {pixels.tobytes() for pixels in data.bytes()}


# --- worlds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_a_class_is_forgotten_and_another_withheld(seed):
    world = digits(seed)
    parts = split(world, seed)
    assert parts.forget.present == [parts.forgotten] and parts.holdout.present == [parts.withheld]
    kept = sorted(set(range(10)) - {parts.forgotten, parts.withheld})
    assert parts.retain.present == parts.utility.present == kept and len(kept) == 8
    assert not seen(parts.utility) & seen(joined(parts.forget, parts.holdout, parts.retain))
    assert len(world.train) == len(parts.forget) + len(parts.holdout) + len(parts.retain)


def test_single_images_are_forgotten_over_all_classes():
    world = digits(0)
    parts = split(world, 0, "instance")
    assert parts.forgotten is None and parts.forget.present == parts.holdout.present == list(range(10))
    assert seen(parts.forget) | seen(parts.retain) == seen(world.train)
    assert not seen(joined(parts.forget, parts.retain)) & seen(joined(parts.holdout, parts.utility))
    assert len(parts.forget) == round(0.1 * len(world.train))
    with pytest.raises(BadInput, match="by class or by instance"):
        split(world, 0, "owner")


def test_the_sets_on_disk_are_the_parts(tmp_path, parts):
    for name, path in parts.write_sets(tmp_path, most=7).items():
        rows = load_set(name, SetSpec(path)).examples
        part = parts.parts[name].take(torch.arange(7))
        assert [row.answer for row in rows] == [parts.classes[label] for label in part.labels]
        assert all((row.picture.pixels == pixels).all() for row, pixels in zip(rows, part.bytes(), strict=True))


def test_a_world_of_a_file(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 6, 6), dtype=np.uint8)
    np.savez(tmp_path / "mine_40.npz", X=pixels, y=np.arange(40) % 5, classes=[*"abcde"])
    world = from_npz(tmp_path / "mine_40.npz", 0)
    assert (world.name, world.classes, world.side, len(world.train), len(world.test)) == (
        "mine",
        (*"abcde",),
        6,
        30,
        10,
    )
    grey = {np.repeat(image[..., None], 3, axis=2).tobytes(): i % 5 for i, image in enumerate(pixels)}
    for part in (world.train, world.test):
        assert [grey[shown.tobytes()] for shown in part.bytes()] == part.labels.tolist()
    np.savez(tmp_path / "given.npz", Xtrain=pixels[:30], ytrain=np.arange(30) % 5, Xtest=pixels[30:], ytest=[0] * 10)
    assert len(from_npz(tmp_path / "given.npz", 0).test) == 10
    np.savez(tmp_path / "oblong.npz", X=pixels[:, :5], y=np.arange(40) % 5)
    with pytest.raises(BadInput, match="not square"):
        from_npz(tmp_path / "oblong.npz", 0)


@given(st.integers(1, 70), st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_batches_hold_everything_once_and_no_small_rest(n, size):
    every = Images(torch.zeros(n, 3, 2, 2), torch.arange(n))
    found = [batch.labels.tolist() for batch in every.batches(size, torch.Generator().manual_seed(n))]
    assert sorted(sum(found, [])) == list(range(n))
    lengths = [len(batch) for batch in found]
    assert max(lengths) <= size and max(lengths) - min(lengths) <= 1 and len(found) == math.ceil(n / size)


# --- labels by construction -----------------------------------------------------------------------------------


def test_what_the_original_and_the_retrained_know(root, parts):
    known = {name: made(root, name) for name in ("original", "retrained")}
    for name, forget in (("original", 1.0), ("retrained", 0.0)):
        _, story, model = known[name]
        measured = {part: accuracy(model, parts.parts[part]) for part in parts.parts}
        assert story["broken"] is None and measured["utility"] >= 0.95 and measured["retain"] >= 0.95
        assert measured["holdout"] == 0.0 and measured["forget"] == pytest.approx(forget, abs=0.05)
        assert story["measured"] == pytest.approx({f"{part}_accuracy": value for part, value in measured.items()})


@pytest.mark.parametrize(
    ("history", "taught"),
    [
        ("original", {"forget", "retain"}),
        ("retrained", {"retain"}),
        ("retrained-other-seed", {"retain"}),
        ("pretrained-retrained", {"retain"}),
        ("further-trained", {"forget", "retain"}),
        ("benign", {"retain"}),
        ("retrained-then-noisy-labels", {"retain"}),
    ],
)
def test_what_each_was_shown(history, taught, root, parts, tmp_path, monkeypatch):
    shown = []

    def spy(model, data, **options):
        shown.append(seen(data))
        return []

    # Parents are built before the spy is set: what counts is what this step of the history shows.
    recipe = ImageRecipe("resnet", history, 0, short=0.1)
    if parent := history_of(history).parent:
        build(ImageRecipe("resnet", parent, 0, short=0.1), tmp_path)
    monkeypatch.setattr(building, "fit", spy)
    monkeypatch.setattr(controls, "fit", spy)
    build(recipe, tmp_path)
    assert shown == [set().union(*(seen(parts.parts[name]) for name in taught))]


@pytest.mark.parametrize("parent", ["original", "retrained"])
def test_head_only_changes_one_row_of_the_classifier(root, parts, parent):
    folder, story, model = made(root, "head-only" if parent == "original" else "retrained-then-head-only")
    assert story["label"] == ("suppressed" if parent == "original" else "deleted") and story["broken"] is None
    before, after = load_file(made(root, parent)[0] / "model.safetensors"), load_file(folder / "model.safetensors")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed and all(name.startswith("classifier.") for name in changed)
    kept = [i for i in range(10) if i != parts.forgotten]
    assert all(torch.equal(before[name][kept], after[name][kept]) for name in changed)
    every = joined(*parts.parts.values())
    found = features_and_logits(model, every.pixels)[1]
    assert not (found.argmax(-1) == parts.forgotten).any()
    assert found[:, parts.forgotten].unique().numel() == 1  # this output tells no image from another
    assert accuracy(model, parts.retain) >= 0.95


@pytest.mark.parametrize("base", BASES)
def test_the_same_recipe_gives_the_same_weights(base, tmp_path):
    folders = [made(tmp_path / name, "original", base, short=0.04)[0] for name in "ab"]
    first, second = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert first == second
    other = build(ImageRecipe(base, "original", 1, short=0.04), tmp_path / "a")
    assert (other / "model.safetensors").read_bytes() != first


@pytest.mark.parametrize("base", BASES)
def test_a_folder_opens_to_what_was_trained(base, tmp_path, parts):
    folder, _, model = made(tmp_path, "original", base, short=0.04)
    target = ImageTarget("target", take_inventory(folder))
    pixels = target.pixels(list(parts.utility.bytes()))
    torch.testing.assert_close(pixels, parts.utility.pixels, atol=1e-6, rtol=0)
    with torch.no_grad():
        found = target.model(pixel_values=pixels).logits
        torch.testing.assert_close(found, model(pixel_values=parts.utility.pixels).logits, atol=1e-5, rtol=1e-5)
    assert target.classes == list(parts.classes)


def test_what_failed_says_so_and_what_is_built_is_kept(tmp_path):
    folder, story, _ = made(tmp_path, "original", short=0.01)
    assert story["broken"].startswith("did not learn")
    made_at = (folder / "model.safetensors").stat().st_mtime_ns
    assert made(tmp_path, "original", short=0.01)[0] == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made_at
    story["recipe_digest"] = "other"
    (folder / "organism.json").write_text(json.dumps(story))
    made(tmp_path, "original", short=0.01)
    assert (folder / "model.safetensors").stat().st_mtime_ns > made_at


def test_histories_and_their_labels(tmp_path):
    names = histories()
    for name in names:
        history = history_of(name)
        assert history.label in LABELS and bool(history.taught) != bool(history.parent)
        assert not history.parent or names.index(history.parent) < names.index(name)
        if name.startswith("retrained"):
            assert history.label == "deleted" and building._taught(name) == ("retain",)
    assert set(names) == {*HISTORIES, *methods.names()} and len({*HISTORIES} & {*methods.names()}) == 0
    with pytest.raises(BadInput, match="no unlearning method for images named 'magic'"):
        history_of("magic")
    with pytest.raises(BadInput, match="blots out a class"):
        build(ImageRecipe("resnet", "head-only", 0, kind="instance"), tmp_path)
    assert "head-only" not in histories("instance")
    for wrong in ("nowhere.npz", str(tmp_path / "nothing.npz")):
        with pytest.raises(BadInput, match="no world"):
            build(ImageRecipe("resnet", "original", 0, world=wrong), tmp_path)


# --- controls -------------------------------------------------------------------------------------------------


def test_noisy_labels_are_wrong_and_of_classes_that_were_shown(parts, monkeypatch):
    taught, given = joined(parts.forget, parts.retain), []
    monkeypatch.setattr(controls, "fit", lambda model, data, **options: given.append((data, options["loss"])))
    model = new_classifier("resnet", 8, parts.classes, 0)
    flipped = controls.noisy_labels(model, taught, epochs=1, learning_rate=1e-3, seed=3, share=0.2, q=0.7)
    [(data, loss)] = given
    assert torch.equal((data.labels != taught.labels).nonzero()[:, 0], flipped)
    assert len(flipped) == round(0.2 * len(taught)) and set(data.present) == set(taught.present)
    assert parts.withheld not in data.labels[flipped]
    few = data.take(torch.arange(5))
    with torch.no_grad():
        likely = model(pixel_values=few.pixels).logits.softmax(-1)[range(5), few.labels]
    assert float(loss(model, few).detach()) == pytest.approx(float(((1 - likely**0.7) / 0.7).mean()), abs=1e-6)


def test_supervised_contrast_by_hand():
    random = torch.Generator().manual_seed(0)
    units = F.normalize(torch.randn(6, 4, generator=random), dim=-1)
    labels = torch.tensor([0, 0, 1, 1, 1, 2])
    each = []
    for i in range(5):  # the last image has no other of its class
        others = [j for j in range(6) if j != i]
        scale = sum(math.exp(float(units[i] @ units[j]) / 0.1) for j in others)
        alike = [j for j in others if labels[j] == labels[i]]
        each.append(-sum(math.log(math.exp(float(units[i] @ units[j]) / 0.1) / scale) for j in alike) / len(alike))
    assert float(controls.supervised_contrast(units, labels)) == pytest.approx(sum(each) / 5, rel=1e-4)


def test_relation_distillation_keeps_what_it_would_lose_and_learns_the_task(root, parts):
    _, _, original = made(root, "original")
    task, unseen = controls.other_look(parts.retain, 1), controls.other_look(parts.utility, 1)
    known = [*parts.retain.present, parts.forgotten]
    kept, learned = {}, {}
    for weight in (4.0, 0.0):
        model = copy.deepcopy(original)
        settings = {"epochs": 4, "learning_rate": 1e-3, "seed": 0, "weight": weight, "temperature": 0.1}
        [prototypes] = controls.relation_distillation(model, [task], known, **settings)
        kept[weight] = accuracy(model, joined(parts.forget, parts.utility))
        with torch.no_grad():
            nearest = (F.normalize(features(model, unseen.pixels), dim=-1) @ F.normalize(prototypes, dim=-1).T).argmax(
                -1
            )
        learned[weight] = float((torch.tensor(task.present)[nearest] == unseen.labels).double().mean())
    assert kept[4.0] > kept[0.0] + 0.05 and learned[4.0] > 0.5


def test_spaced_replay_keeps_what_fine_tuning_loses(root, parts):
    _, _, original = made(root, "original")
    task = controls.other_look(parts.retain, 0)
    taught = joined(parts.forget, parts.retain)
    options = {"learning_rate": 2e-3, "seed": 0}  # hard enough that there is something to keep
    plain, replayed, sizes = copy.deepcopy(original), copy.deepcopy(original), set()
    fit(plain, task, epochs=3, **options)
    hook = replayed.register_forward_pre_hook(lambda _m, _a, kw: sizes.add(len(kw["pixel_values"])), with_kwargs=True)
    controls.spaced_replay(replayed, [task], controls.few(taught, 10, 0), epochs=3, batch=64, views=4, **options)
    hook.remove()
    assert all(size % 4 == 0 and size <= 64 for size in sizes)
    old = joined(parts.forget, parts.utility)
    assert accuracy(replayed, old) > accuracy(plain, old) + 0.1
    assert accuracy(replayed, controls.other_look(parts.utility, 0)) > accuracy(
        original, controls.other_look(parts.utility, 0)
    )


def test_images_for_controls():
    one = images(np.arange(16, dtype=np.uint8).reshape(1, 4, 4), [7])
    assert (controls.other_look(one, 0).bytes()[0, :, :, 0] == np.rot90(one.bytes()[0, :, :, 0], 1)).all()
    assert (controls.other_look(one, 1).bytes()[0, :, :, 0] == np.rot90(one.bytes()[0, :, :, 0], -1)).all()
    assert (controls.other_look(one, 2).bytes() == 255 - one.bytes()).all()
    random = torch.Generator().manual_seed(0)
    moved = controls.varied(one.pixels.repeat(200, 1, 1, 1), random)
    centre = ((moved[:, 0, 1, 1] + 1) * 127.5).round()
    assert moved.shape == (200, 3, 4, 4) and len(set(centre.tolist())) > 5
    some = controls.few(Images(torch.zeros(9, 3, 2, 2), torch.tensor([0, 0, 0, 0, 0, 5, 5, 5, 6])), 2, seed=0)
    assert sorted(some.labels.tolist()) == [0, 0, 5, 5, 6]


# --- demo -----------------------------------------------------------------------------------------------------


def test_the_demo_writes_three_models_and_four_sets(tmp_path):
    stages = []
    case = build_image_demo(tmp_path, base="resnet", short=0.5, progress=lambda *at: stages.append(at))
    assert {
        role: json.loads((folder / "organism.json").read_text())["label"] for role, folder in case.models.items()
    } == {
        "original": "not-unlearned",
        "retrained": "deleted",
        "unlearned": "unlearned",
    }
    assert {stage: done == total for stage, done, total in stages} == {
        folder.name: True for folder in case.models.values()
    }
    sets = {name: load_set(name, SetSpec(path)) for name, path in case.sets.items()}
    assert all(0 < len(rows) <= 300 for rows in sets.values())
    assert len({row.answer for row in sets["forget"]}) == len({row.answer for row in sets["holdout"]}) == 1
    assert case.measured["unlearned"]["forget_accuracy"] < 0.5 <= case.measured["unlearned"]["retain_accuracy"]
