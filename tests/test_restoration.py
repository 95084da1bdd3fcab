"""Restoration in image classifiers: what is planted comes back and what is not there does not; hooks by hand agree."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from images import CLASSES, KINDS, SIDE, save_classifier, tiny_classifier
from sae_lens import SAE
from torch.nn import functional
from transformers import ViTImageProcessor

import audit.scan
import probes.restoration
from audit.case import Budget, Case, Options
from audit.errors import BadInput
from audit.evidence import Evidence
from audit.image_target import ImageTarget
from audit.instrument import Access
from audit.inventory import take_inventory
from audit.loaders import SetSpec
from audit.record import Outcome, Record, Side
from audit.scan import scan
from probes import restoration_steering
from probes.restoration import Restoration
from probes.restoration_curves import figure_of, rates_of, table_of
from probes.restoration_steering import (
    Described,
    Dictionary,
    describe,
    go_on,
    leading,
    learn,
    mark,
    original_pushes,
    own_pushes,
    read_places,
    restore,
)
from probes.sae_training import load_sae, quality

pytestmark = pytest.mark.usefixtures("one_thread")

CLASS_TOKEN = {"vit": 1, "deit": 1, "swin": 0, "resnet": 0, "convnext": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("classifiers")
    return {(kind, seed): save_classifier(root / f"{kind}{seed}", kind, seed) for kind in KINDS for seed in (0, 1)}


def opened(folder: Path, role: str = "target") -> ImageTarget:
    return ImageTarget(role, take_inventory(folder))


def pictures(n: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (n, SIDE, SIDE, 3), dtype=np.uint8))


def site(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_post"


def plain_sae(width: int) -> SimpleNamespace:
    """Loses nothing: a feature for each coordinate, and one for its negative."""
    directions = torch.cat([torch.eye(width), -torch.eye(width)])
    return SimpleNamespace(
        encode=lambda x: (x @ directions.T).relu(),
        decode=lambda f: f @ directions,
        W_dec=directions,
        cfg=SimpleNamespace(d_sae=2 * width),
    )


def plain(target, width: int) -> Described:
    return Described(target, Dictionary(plain_sae(width), torch.zeros(2, width)))


# --- passes


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_goes_on_from_its_own_states_as_it_is(kind, folders):
    target = opened(folders[kind, 0])
    pixels = target.pixels(pictures(3))
    with torch.no_grad():
        truth = target.model(pixel_values=pixels).logits
    for layer in range(target.layers):
        assert leading(target, site(layer)) == CLASS_TOKEN[kind]
        seen = []

        def change(states, seen=seen):
            seen.append(states)
            return {"same": states[:, None], "two": torch.stack([states, states + 1 + states.abs()], dim=1)}

        found = go_on(target, site(layer), pixels, change)
        assert found["same"].shape == (3, 1, 4)
        torch.testing.assert_close(found["same"][:, 0], truth, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found["two"][:, 0], truth, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(found["two"][:, 1], truth, atol=1e-3)
        torch.testing.assert_close(seen[0], read_places(target, site(layer), pixels))
    with torch.no_grad():
        assert torch.equal(target.model(pixel_values=pixels).logits, truth), "no hook is left behind"


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_what_is_put_in_is_what_a_hook_would_put_in(kind, folders):
    target = opened(folders[kind, 0])
    pixels = target.pixels(pictures(2))
    module = target.site(site(1))[0]
    pushes = torch.randn((2, 3, *read_places(target, site(1), pixels).shape[1:]), generator=torch.manual_seed(0))
    found = go_on(target, site(1), pixels, lambda states: {"all": states[:, None] + pushes})["all"]
    for variant in range(3):

        def hook(_module, _inputs, output, variant=variant):
            push = pushes[:, variant]
            return output + (push.mT.reshape(output.shape) if output.ndim == 4 else push)

        handle = module.register_forward_hook(hook)
        with torch.no_grad():
            truth = target.model(pixel_values=pixels).logits
        handle.remove()
        torch.testing.assert_close(found[:, variant], truth, atol=1e-4, rtol=1e-4)


# --- features

shapes = st.tuples(st.integers(4, 12), st.just(2), st.integers(2, 9))


@settings(max_examples=20, deadline=None)
@given(shapes.flatmap(lambda s: hnp.arrays(np.float32, s, elements=st.integers(0, 3))), st.integers(0, 5), st.data())
def test_marks_are_experts_of_the_class_in_the_other_half(codes, most, data):
    rows = len(codes)
    labels = np.array([0, 1, *data.draw(st.lists(st.integers(0, 2), min_size=rows - 2, max_size=rows - 2))])
    in_a = np.array(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    marks = mark(torch.from_numpy(codes), torch.from_numpy(labels), in_a, most, seed=0)
    exact = codes.astype(float)
    for row in range(rows):
        here = labels == labels[row]
        elsewhere = np.mean([exact[labels == c].mean(0) for c in set(labels[~here].tolist())], axis=0)
        choose = here & (in_a != in_a[row])
        for part in (0, 1):
            chosen = set(marks.experts[row, part].nonzero()[:, 0].tolist())
            others = set(marks.others[row, part].nonzero()[:, 0].tolist())
            assert not chosen & others
            assert len(others) == min(len(chosen), codes.shape[2] - len(chosen))
            if not choose.any():
                assert not chosen, "nothing to choose on"
                continue
            gap = exact[choose][:, part].mean(0) - elsewhere[part]
            assert len(chosen) == min(most, int((gap > 1e-6).sum()))
            left = [gap[j] for j in range(len(gap)) if j not in chosen]
            assert not chosen or not left or min(gap[j] for j in chosen) >= max(left) - 1e-6


def test_what_marks_one_half_only_is_not_used_on_it():
    codes, labels = torch.zeros(8, 2, 6), torch.tensor([0] * 4 + [1] * 4)
    in_a = np.array([True, True, False, False] * 2)
    codes[:2, 1, 3] = 5.0
    marks = mark(codes, labels, in_a, 2, seed=0)
    assert not marks.experts[:2].any()
    assert marks.experts[2, 1].nonzero().tolist() == marks.experts[3, 1].nonzero().tolist() == [[3]]


# --- pushes


def test_own_pushes_by_hand():
    sae, states = plain_sae(3), torch.tensor([[[2.0, -1.0, 0.0], [1.0, 3.0, 4.0], [0.0, 5.0, -6.0]]])
    experts, others = torch.zeros(1, 2, 6, dtype=torch.bool), torch.zeros(1, 2, 6, dtype=torch.bool)
    experts[0, 0, 4] = experts[0, 1, 1] = others[0, 1, 5] = True  # the class token's second coordinate, where negative
    found = own_pushes(sae, states, restoration_steering.Marks(experts, others), 1, seed=0)
    assert found["all"].tolist() == [[[0, -1, 0], [0, 3, 0], [0, 5, 0]]]
    assert found["token"].tolist() == [[[0, -1, 0], [0, 0, 0], [0, 0, 0]]]
    assert found["patches"].tolist() == [[[0, 0, 0], [0, 3, 0], [0, 5, 0]]]
    assert found["other"].tolist() == [[[0, 0, 0], [0, 0, 0], [0, 0, -6]]]
    torch.testing.assert_close(found["random"].norm(dim=2), found["all"].norm(dim=2))
    without = own_pushes(sae, states, restoration_steering.Marks(experts, others), 0, seed=0)
    assert set(without) == {"all", "other", "random"}, "no class token"
    assert without["all"].tolist() == [[[0, 0, 0], [0, 3, 0], [0, 5, 0]]]


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_everything_of_the_original_at_the_last_block_is_its_decision_state(kind, folders):
    """With a dictionary that loses nothing exactly; with a trained one to the difference of its errors."""
    target, original = opened(folders[kind, 0]), opened(folders[kind, 1], "original")
    images, last = pictures(6), site(target.layers - 1)
    lead = leading(target, last)
    pixels = target.pixels(images)
    states, theirs = (read_places(model, last, pixels) for model in (target, original))
    width = states.shape[2]
    features = torch.zeros(6, 2, 8 * width, dtype=torch.bool)
    with torch.no_grad():  # the target's head on the original's states, by the original's body
        body = original.model.base_model(pixel_values=pixels)
        head = target.model.classifier
        truth = head(target.model.vit.layernorm(theirs[:, 0])) if lead else head(body.pooler_output)
    trained = learn(original, last, images, most=1000, steps=5, seed=0).sae
    for sae in (plain_sae(width), trained):
        marks = restoration_steering.Marks(*[features[:, :, : sae.W_dec.shape[0]]] * 2)
        push = original_pushes(sae, states, theirs, marks, lead, seed=0)["everything"]
        error = (states - sae.decode(sae.encode(states))) - (theirs - sae.decode(sae.encode(theirs)))
        error[:, :lead] = 0  # the class token is carried as it is
        torch.testing.assert_close(states + push, theirs + error, atol=1e-4, rtol=1e-4)
        if lead or sae is not trained:
            found = go_on(target, last, pixels, lambda states, push=push: {"all": (states + push)[:, None]})["all"]
            torch.testing.assert_close(found[:, 0], truth, atol=1e-4, rtol=1e-4)
    if lead:
        assert not original_pushes(trained, states, theirs, marks, lead, 0)["other"].any(), "no feature is chosen"


# --- a planted effect: a model of two blocks whose every number is known


class Toy(torch.nn.Module):
    """Patches hold 1 at their class, times a gain in block 0; block 1 lets the class token read their mean.

    The first output says 0.5 to everything.
    """

    classes = 16

    def __init__(self, gain: float, head: float = 0.0) -> None:
        super().__init__()
        scale = torch.ones(self.classes)
        scale[3] = gain

        class Gain(torch.nn.Module):
            def forward(self, states):
                return states * scale

        class Read(torch.nn.Module):
            def forward(self, states):
                return torch.cat([states[:, :1] + states[:, 1:].mean(dim=1, keepdim=True), states[:, 1:]], dim=1)

        self.layers = torch.nn.ModuleList([Gain(), Read()])
        self.bias = torch.zeros(self.classes)
        self.bias[0], self.bias[3] = 0.5, head

    def forward(self, pixel_values):
        patches = functional.one_hot(pixel_values.long(), self.classes).float()
        states = torch.cat([torch.zeros_like(patches[:, :1]), patches], dim=1)
        for layer in self.layers:
            states = layer(states)
        return SimpleNamespace(logits=states[:, 0] + self.bias)


def toy(gain: float, head: float = 0.0) -> Described:
    model = Toy(gain, head)
    target = SimpleNamespace(
        model=model,
        role="target",
        pixels=lambda images: torch.stack([torch.as_tensor(image).flatten()[:9] for image in images]),
        site=lambda name: (model.layers[int(name.split(".")[1])], "output"),
        places=lambda states: states,
        parts=lambda _: 9,
    )
    return plain(target, Toy.classes)


def steered(gain: float, layer: int = 0, head: float = 0.0) -> dict[str, list[float]]:
    """How often class 3 is the answer, by kind of steering and α."""
    labels = np.repeat([1, 3, 5], 8)
    images = [np.full((3, 3), label) for label in labels]
    in_a = np.arange(24) % 2 == 0
    found = restore(toy(gain, head), toy(1.0), site(layer), images, torch.from_numpy(labels), in_a, seed=0)
    assert found["none"].shape == (24, 1)
    assert all(values[labels != 3].all() for kind, values in found.items() if "random" not in kind), "others stay"
    return {kind: values[labels == 3].mean(axis=0).tolist() for kind, values in found.items()}


def test_what_is_weakened_comes_back_by_its_own_features():
    found = steered(gain=0.2)
    assert found["none"] == [0]
    assert found["own all"] == found["own patches"] == [0, 1, 1]  # 0.4, 1.2, 2.2 against 0.5
    assert found["own other"] == found["own random"] == found["own token"] == [0, 0, 0]


def test_what_is_deleted_comes_back_from_the_original_alone():
    found = steered(gain=0.0)
    assert found["none"] == [0]
    assert all(found[f"own {kind}"] == [0, 0, 0] for kind in ("all", "token", "patches", "other", "random"))
    assert found["original all"] == found["original patches"] == [1, 1, 1]
    assert found["original everything"] == [1]
    assert found["original token"] == [0, 0, 0], "it holds nothing yet"
    assert found["original other"] == found["original random"] == [0, 0, 0]


def test_above_the_last_reader_the_class_token_is_all():
    found = steered(gain=0.0, layer=1)
    assert found["original all"] == found["original token"] == [1, 1, 1]
    assert found["original patches"] == [0, 0, 0]


def test_an_edit_of_the_head_is_not_undone_by_the_original():
    """The published test is blind to what is hidden in the head: there everything is still inside."""
    found = steered(gain=1.0, head=-3.0)
    assert found["none"] == [0]
    assert found["original all"] == [0, 0, 0]
    assert found["own all"] == [0, 1, 1], "and this one is not, where nothing rescales the states"


def test_nothing_is_restored_where_nothing_is_missing():
    assert steered(gain=1.0)["none"] == [1]


def test_states_of_another_shape_are_refused(folders):
    target, original = (opened(folders[kind, 0]) for kind in ("vit", "swin"))
    both = plain(target, 16), plain(original, 8)
    with pytest.raises(BadInput, match="are of shape"):
        restore(*both, site(0), pictures(4), torch.tensor([0, 0, 1, 1]), np.array([True, False] * 2), 0)


# --- dictionaries


def test_a_dictionary_is_trained_on_every_class_token_and_some_patches(folders, monkeypatch):
    target, images, given_states = opened(folders["vit", 0]), pictures(70), []

    def train(states, **options):
        given_states.append(states)
        return options

    monkeypatch.setattr(restoration_steering, "train_sae", train)
    found = learn(target, site(1), images, most=300, steps=7, seed=0)
    assert (found.sae["steps"], found.sae["site"], found.sae["features"]) == (7, site(1), 64)
    truth = read_places(target, site(1), target.pixels(images))
    assert given_states[0].shape == (70 + 70 * 4, 16)
    torch.testing.assert_close(given_states[0][:70], truth[:, 0])
    patches = given_states[0][70:].reshape(70, 4, 16)
    distances = torch.cdist(patches, truth[:, 1:]).argmin(dim=2)
    assert (torch.cdist(patches, truth[:, 1:]).amin(dim=2) < 1e-4).all()
    assert all(len(set(row)) == 4 for row in distances.tolist()), "no patch twice"
    assert len({tuple(sorted(row)) for row in distances.tolist()}) > 20, "others in every image"
    torch.testing.assert_close(found.centre, torch.stack([truth[:, 0].mean(0), patches.flatten(0, 1).mean(0)]))


def test_saelens_reads_a_dictionary_again(folders, tmp_path):
    target = opened(folders["vit", 0])
    made = learn(target, site(2), pictures(20), most=1000, steps=20, seed=0).sae
    made.save_model(tmp_path / "sae")
    states = read_places(target, site(2), target.pixels(pictures(3, seed=1))).clone()
    for again in (SAE.load_from_disk(tmp_path / "sae"), load_sae(tmp_path / "sae", 16)):
        assert torch.equal(again.encode(states), made.encode(states))
        assert again.cfg.metadata.hook_name == site(2)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_how_good_a_dictionary_is(kind, folders):
    target, images = opened(folders[kind, 0]), pictures(12)
    learned = learn(target, site(1), images, most=1000, steps=30, seed=0)
    labels = torch.arange(12) % 4
    with torch.no_grad():
        found = describe(Described(target, learned), site(1), images, labels)
        states = read_places(target, site(1), target.pixels(images))
    patches = states[:, CLASS_TOKEN[kind] :].flatten(0, 1)
    told = quality(learned.sae, patches)
    error, spread = found["error"].sum(0), found["spread"].sum(0)
    assert 1 - float(error[1] / spread[1]) == pytest.approx(told.explained, abs=1e-4)
    if CLASS_TOKEN[kind]:
        assert 1 - float(error[0] / spread[0]) == pytest.approx(quality(learned.sae, states[:, 0]).explained, abs=1e-4)
    else:
        assert not spread[0].any()
    fired = (learned.sae.encode(states.flatten(0, 1)) > 0).sum(dim=1).float().mean()
    assert float(found["active"].mean()) == pytest.approx(float(fired))

    def hook(_module, _inputs, output):
        return learned.sae(output) if output.ndim == 3 else learned.sae(output.movedim(1, 3)).movedim(3, 1)

    handle = target.site(site(1))[0].register_forward_hook(hook)
    for column in (1, 0):
        with torch.no_grad():
            logits = target.model(pixel_values=target.pixels(images)).logits
        handle.remove()
        torch.testing.assert_close(found["nll"][:, column], functional.cross_entropy(logits, labels, reduction="none"))


# --- curves


def test_rates_by_hand():
    won = {"plain": np.zeros((4, 1, 1)), "own all": np.zeros((4, 2, 3))}
    won["plain"][0] = 1  # 0.25
    won["own all"][:2, 1, 0], won["own all"][:, 1, 2] = 1, 1
    found = rates_of(won, "own all", 0.75)
    assert found[0].tolist() == [0, 0, 0]
    assert found[1] == pytest.approx([0.5, 0, 1])
    assert np.isnan(rates_of(won, "own all", 0.25)).all(), "nothing to restore"
    every = {("target", name): won | {"none": won["plain"].repeat(2, 1)} for name in ("forget", "holdout", "retain")}
    figure, table = figure_of("own", every, 0.75, [0, 3], 5.0), table_of("own", every, 0.75, [0, 3])
    assert [series.label for series in figure.series][:3] == ["forget, α = 1", "forget, α = 5", "forget, α = 10"]
    assert figure.series[2].x == [0, 3]
    assert figure.series[2].y == [0, 1]
    assert len(table.rows) == 2 * (1 + 3)
    assert table.rows[-1] == [3, "class token and patches", 10.0, 1.0, 1.0, 1.0, 1.0]
    assert table.rows[0][1:4] == ["none", 0.0, 0.25]


# --- the instrument, on a vision transformer that was taught three quarters of a world


def world(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise, with one quarter of the image bright: which one is the class."""
    rng = np.random.default_rng(seed)
    images, labels = rng.integers(0, 40, (n, SIDE, SIDE), dtype=np.uint8), np.arange(n) % 4
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] += rng.integers(100, 200, dtype=np.uint8)
    return images, labels


FORGET, HOLDOUT = 1, 2


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    """Original; with its last block trained to answer another class; and retrained. Class two was never taught."""
    root = tmp_path_factory.mktemp("history")
    images, labels = world(240, 0)
    pixels = (torch.from_numpy(images).float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)
    truth = torch.from_numpy(labels)

    def taught(model, taught_labels, parameters, steps, rate=3e-3):
        kept = (taught_labels >= 0).nonzero()[:, 0]
        optimizer, generator = torch.optim.AdamW(parameters, lr=rate), torch.manual_seed(0)
        for _ in range(steps):
            batch = kept[torch.randint(len(kept), (48,), generator=generator)]
            loss = functional.cross_entropy(model.train()(pixel_values=pixels[batch]).logits, taught_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return model.eval()

    known = truth.where(truth != HOLDOUT, -1)
    models = {name: tiny_classifier("vit", seed) for name, seed in (("original", 0), ("hidden", 0), ("retrained", 1))}
    taught(models["original"], known, models["original"].parameters(), 90)
    models["hidden"].load_state_dict(models["original"].state_dict())
    taught(models["hidden"], known.where(truth != FORGET, 3), models["hidden"].vit.layers[2].parameters(), 40, 1e-3)
    taught(models["retrained"], known.where(truth != FORGET, -1), models["retrained"].parameters(), 60)
    half = [0.5] * 3
    for name, model in models.items():
        model.save_pretrained(root / name)
        ViTImageProcessor(size={"height": SIDE, "width": SIDE}, image_mean=half, image_std=half).save_pretrained(
            root / name
        )
    parts = {"forget": labels == FORGET, "holdout": labels == HOLDOUT, "retain": labels % 3 == 0}
    for name, part in parts.items():
        np.savez(root / f"{name}.npz", X=images[part], y=labels[part], classes=np.array(CLASSES))
    return root


def case_of(root: Path, target: str, retrained: bool = False, sets=("forget", "holdout", "retain"), **options) -> Case:
    models = {"target": root / target, "original": root / "original"}
    models |= {"retrained": root / "retrained"} if retrained else {}
    specs = {name: SetSpec(root / f"{name}.npz") for name in sets}
    return Case.build(models, specs, Options(**{"device": "cpu", "only": ("restoration",)} | options))


@pytest.fixture(scope="module")
def audit_of(history):
    """Scan a target with this instrument alone, two blocks and few steps; evidence is shared by all."""
    instrument = Restoration()  # the original's dictionaries are learned once
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit.scan, "select", lambda only, skip: [instrument])
        patch.setitem(probes.restoration._BUDGETS, "standard", (2, 250, 40))

        def run(target: str, retrained: bool = False) -> Record:
            case, name = case_of(history, target, retrained), f"out-{target}-{retrained}"
            record = scan(case, history / name, evidence_folder=history / "evidence")
            assert not record.not_run
            return record

        yield run


@pytest.fixture(scope="module")
def scans(audit_of):
    """Findings by id, of every target."""
    records = {
        "hidden": audit_of("hidden"),
        "deleted": audit_of("retrained"),
        "with retrained": audit_of("hidden", retrained=True),
        "again": audit_of("hidden"),
    }
    assert records["again"].findings == records["hidden"].findings
    assert records["again"].cost.forward_tokens == 0, "the evidence is kept"
    return {name: {finding.id: finding for finding in record.findings} for name, record in records.items()}


def test_what_the_last_block_hides_comes_back_by_the_model_s_own_features(scans):
    for name in ("hidden", "with retrained"):
        found = scans[name]["restoration/own"]
        assert (found.verdict, found.side) == (Outcome.EVIDENCE, Side.REMAINS)
        assert found.decides == (True, False)
        assert found.layer == "block 0", "below what hides it"
        assert found.table.rows[0][3] < 0.1, "hidden from outside"
        assert found.estimate > 0.5


def test_in_a_model_that_never_knew_nothing_comes_back(scans):
    found = scans["deleted"]["restoration/own"]
    assert found.verdict == Outcome.NONE, found.reason
    assert abs(found.estimate) < 0.1


def test_the_original_s_activations_decide_nothing(scans):
    for findings in scans.values():
        found = findings["restoration/original"]
        assert found.decides == (False, False)
        assert found.sides == (Side.NEITHER, Side.NEITHER)
        assert found.verdict != Outcome.EVIDENCE
    # The head is whole, so the last class token alone brings everything back.
    assert scans["hidden"]["restoration/original"].layer == "block 2"
    assert scans["hidden"]["restoration/original"].level > 0.9


def test_controls_figure_and_table(scans):
    for finding in scans["hidden"].values():
        gates = {(control.name, control.gates) for control in finding.controls}
        assert {("autoencoder", "evidence"), ("autoencoder", "silence"), ("α = 0", "evidence")} <= gates
        assert {("positive control", "silence"), ("gain over none and random directions", "evidence")} <= gates
        named = {control.name: control for control in finding.controls}
        assert named["α = 0"].estimate == 0
        assert named["autoencoder"].estimate > 0.7
        assert "one against two" in named["one class against another"].description
        assert 0 <= named["restoration rate"].estimate <= 1
        assert all(series.x == [0, 2] for series in finding.figure.series)
        assert len(finding.table.rows) == 2 * (1 + 5 * 3 + (finding.id == "restoration/original"))
    with_retrained = scans["with retrained"]["restoration/own"]
    assert "one class against another" not in {control.name for control in with_retrained.controls}
    assert with_retrained.table.columns[-1] == "R, forget, retrained"
    assert "retrained" in " ".join(series.label for series in with_retrained.figure.series)
    assert max(row[-1] for row in with_retrained.table.rows) < 0.2


def test_a_poor_dictionary_is_not_believed(audit_of, scans, monkeypatch):
    kept = Evidence.scores

    def worse(self, role, name, *quantities):
        rows = kept(self, role, name, *quantities)
        return [row | {"error": row["spread"]} for row in rows] if name == "restoration/dictionaries" else rows

    monkeypatch.setattr(Evidence, "scores", worse)
    record = audit_of("hidden")
    for finding in record.findings:
        failed = [control for control in finding.controls if control.name == "autoencoder"]
        assert [control.passed for control in failed] == [False, False]
        assert "explained variance 0.00" in failed[0].description
        assert finding.verdict != Outcome.EVIDENCE
    assert record.findings[0].verdict == Outcome.INCONCLUSIVE


def test_everything_it_depends_on_is_named(history):
    instrument = Restoration()
    recipes = {
        instrument.stages(case_of(history, target, retrained, **options), opened(history / target, role))[0].recipe
        for target, retrained, role, options in (
            ("hidden", False, "target", {}),
            ("hidden", False, "target", {"seed": 1}),
            ("hidden", False, "target", {"budget": Budget.QUICK}),
        )
    }
    assert len(recipes) == 3
    assert instrument.stages(case_of(history, "hidden"), opened(history / "original", "original")) == []
    both = case_of(history, "hidden", retrained=True)
    assert len(instrument.stages(both, opened(history / "retrained", "retrained"))) == 1


def test_missing(history):
    build, instrument = partial(case_of, history, "hidden"), Restoration()
    assert instrument.missing(build()) is None
    assert "holdout" in (instrument.missing(build(sets=("forget", "retain"))) or "")
    assert "weights" in (instrument.missing(build(access=Access.LOGPROBS)) or "")
    few = Case.build(
        {"target": history / "hidden", "original": history / "original"},
        {name: SetSpec(history / f"{name}.npz", limit=5) for name in ("forget", "holdout", "retain")},
        Options(),
    )
    assert "at least 8 images" in (instrument.missing(few) or "")
    alone = Case.build({"target": history / "hidden"}, dict(build().specs), Options())
    assert "original" in (instrument.missing(alone) or "")
