"""Altering attacks: what each does to weights by brute force; planted knowledge found, and none invented."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from images import save_classifier, save_images, tiny_classifier
from transformers import AutoModelForCausalLM
from worlds import build_tiny, folder_digest, one_thread, quiet_scan, tiny_case
from worlds import open_target as opened

import attacks.quantize
from attacks.graft import graft
from attacks.noise import shake
from attacks.orthogonalize import Orthogonalize, mean_state, project_out, without
from attacks.prune import Prune, input_lengths, prune, pruned, wanda
from attacks.quantize import _schemes, quantize, round_channels, round_gguf, round_levels
from attacks.task_vector import walk_back
from audit.case import Case, Options
from audit.finetune import text_loss
from audit.image_target import ImageTarget
from audit.instrument import load
from audit.inventory import take_inventory
from audit.loaders import SetSpec
from audit.organisms import nf4
from audit.record import Control, Finding, Outcome, Record, Side
from audit.statistics import halves
from audit.target import KNOWN_PLACES, Target

ATTACKS = ("quantize", "prune", "graft", "orthogonalize", "noise", "task-vector")
SETS = ("forget", "retain", "holdout")


@pytest.fixture(autouse=True)
def single_threaded():
    with one_thread():
        yield


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- quantize

shapes = st.sampled_from([(3, 5), (4, 64), (2, 130), (3, 2, 3, 3), (1, 1)])


def channels_by_hand(weight: torch.Tensor, bits: int, block: int | None) -> np.ndarray:
    rows = weight.flatten(1).numpy()
    out, most = np.zeros_like(rows), np.float32(2 ** (bits - 1) - 1)
    for r, row in enumerate(rows):
        size = block or len(row)
        for start in range(0, len(row), size):
            scale = np.abs(row[start : start + size]).max() / most
            for i in range(start, min(start + size, len(row))):
                out[r, i] = np.round(row[i] / scale) * scale if scale else 0.0
    return out.reshape(weight.shape)


@settings(max_examples=30, deadline=None)
@given(shapes, st.sampled_from([2, 4, 8]), st.sampled_from([None, 3, 64]), st.integers(0, 99))
def test_rounding_channels_by_hand(shape, bits, block, seed):
    weight = normal(*shape, seed=seed)
    weight[0] = 0.0 if seed % 3 == 0 else weight[0]
    rounded = round_channels(weight, bits, block)
    np.testing.assert_allclose(rounded.numpy(), channels_by_hand(weight, bits, block), atol=1e-6)
    np.testing.assert_allclose(round_channels(rounded, bits, block), rounded, atol=1e-6)  # rounded once is rounded
    assert round_channels(weight.bfloat16(), bits, block).dtype == torch.bfloat16


def test_each_channel_has_its_own_scale():
    weight = torch.tensor([[7.0, 1.4, -0.4], [0.07, 0.014, -0.004]])
    expected = torch.tensor([[7.0, 1.0, 0.0], [0.07, 0.01, 0.0]])
    torch.testing.assert_close(round_channels(weight, 4), expected)
    torch.testing.assert_close(round_channels(weight, 4, block=2)[:, 2], weight[:, 2])  # alone in its block


@settings(max_examples=30, deadline=None)
@given(shapes, st.integers(0, 99))
def test_nf4_is_that_of_the_organisms(shape, seed):
    weight = normal(*shape, seed=seed)
    weight.flatten()[:64] *= seed % 3  # sometimes a block of zeros
    rounded = _schemes()["NF4"](weight)
    assert torch.equal(rounded, nf4.dequantize(nf4.quantize(weight)))
    assert torch.equal(_schemes()["NF4"](rounded), rounded)


@settings(max_examples=30, deadline=None)
@given(shapes, st.sampled_from([3, 64]), st.integers(0, 99))
def test_fp4_is_the_nearest_level_of_its_block(shape, block, seed):
    positive = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # bitsandbytes' table, by code
    levels = np.array(sorted({value * sign / 12.0 for value in positive for sign in (1, -1)}), np.float32)
    weight = normal(*shape, seed=seed)
    flat = weight.flatten().numpy()
    expected = []
    for i, value in enumerate(flat):
        largest = np.abs(flat[i // block * block :][:block]).max()
        expected.append(levels[np.abs(levels - value / largest).argmin()] * largest)
    rounded = round_levels(weight, tuple(levels.tolist()), block)
    np.testing.assert_allclose(rounded.flatten(), expected, atol=1e-6)
    if block == 64:
        assert torch.equal(_schemes()["FP4"](weight), rounded)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**16))
def test_q8_0_and_q4_0_are_llama_cpp_s_blocks_of_32(rows, blocks, seed):
    """llama.cpp: d = max|w| / 127 and q = round(w / d); or d = w_max / -8 and q = floor(w / d + 8.5), at most 15."""
    weight = torch.randn(rows, 32 * blocks, generator=torch.Generator().manual_seed(seed))
    parts = weight.numpy().reshape(rows, blocks, 32)
    largest = np.abs(parts).max(-1, keepdims=True)
    half = (largest / 127).astype(np.float16).astype(np.float32)
    eight = np.rint(parts / (largest / 127)) * half
    np.testing.assert_allclose(round_gguf(weight, "Q8_0").numpy().reshape(parts.shape), eight, atol=1e-6)
    signed = np.take_along_axis(parts, np.abs(parts).argmax(-1, keepdims=True), -1)
    codes = np.clip(np.floor(parts / (signed / -8) + 8.5), 0, 15)
    four = (codes - 8) * (signed / -8).astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(round_gguf(weight, "Q4_0").numpy().reshape(parts.shape), four, atol=1e-6)


def test_rows_that_no_block_of_a_gguf_divides_stay():
    weight = torch.randn(4, 33)
    assert round_gguf(weight, "Q8_0") is weight
    assert round_gguf(torch.randn(2, 64).bfloat16(), "Q4_0").dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_are_those_of_bitsandbytes(kind):
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    weight = normal(32, 128)  # rows of whole blocks: elsewhere 0.50.2 is wrong on a CPU
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
    torch.testing.assert_close(functional.dequantize_4bit(packed, state), _schemes()[kind.upper()](weight))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_quantize_rounds_output_channels_and_leaves_embedding_and_head(kind, tiny, open_target):
    before, target = open_target(tiny(kind)).model, open_target(tiny(kind))
    quantize(target.model, lambda weight: round_channels(weight, 4))
    rounded = 0
    for (name, old), new in zip(before.named_parameters(), target.model.parameters(), strict=True):
        if old.ndim == 2 and not any(part in name for part in ("embed", "wte", "wpe", "lm_head")):
            stored = (lambda w: w.T) if kind == "gpt2" else (lambda w: w)
            np.testing.assert_allclose(stored(new), channels_by_hand(stored(old), 4, None), atol=1e-6, err_msg=name)
            rounded += 1
        else:
            assert torch.equal(old, new), name
    assert rounded == {"llama": 2 * 7, "gpt2": 2 * 4}[kind]


# --- prune


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 12), st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0]), st.booleans(), st.integers(0, 99)
)
def test_pruning_by_hand(rows, width, share, weighted, seed):
    rng = np.random.default_rng(seed)
    weight = torch.tensor(rng.integers(-3, 4, (rows, width))).float()  # full of ties
    inputs = torch.tensor(rng.integers(0, 4, width)).float() if weighted else None
    expected = weight.clone()
    for row in expected:
        counts = [abs(float(w)) * (float(inputs[i]) if weighted else 1.0) for i, w in enumerate(row)]
        for i in sorted(range(width), key=lambda i: (counts[i], i))[: int(share * width)]:  # of equals, the first
            row[i] = 0.0
    assert torch.equal(pruned(weight, share, inputs), expected)


def test_pruning_a_convolution_prunes_each_filter():
    weight = normal(4, 2, 3, 3)
    found = pruned(weight, 0.5)
    for new, old in zip(found, weight, strict=True):
        kept = new != 0
        assert kept.sum() == 9
        assert old[kept].abs().min() > old[~kept].abs().max()
        assert torch.equal(new[kept], old[kept])


def text_case(folder: Path, model: Path, **options: Any) -> Case:
    """Rows of several lengths, some with a common beginning."""
    prompts = ["w1 w2 w3", "w1 w2 w3 w4 w5 w6 w7", "w1 w2 w3 w4 w5 w6 w8", "w9", "w1 w2 w3 w4 w5 w6 w7 w8 w9 w10"]
    rows = [{"prompt": p, "answer": f"w{20 + i}", "entity": f"{i // 2}"} for i, p in enumerate(prompts * 2)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = dict.fromkeys(("forget", "retain"), SetSpec(folder / "rows.jsonl"))
    return Case.build({"target": model, "original": model}, sets, Options(template="plain", **options))


PLACES = {
    "llama": {
        "model.layers.{}.self_attn.q_proj": "model.layers.{}.input_layernorm",
        "model.layers.{}.mlp.up_proj": "model.layers.{}.post_attention_layernorm",
        "model.layers.{}.mlp.down_proj": None,
    },
    "gpt2": {
        "transformer.h.{}.attn.c_attn": "transformer.h.{}.ln_1",
        "transformer.h.{}.mlp.c_fc": "transformer.h.{}.ln_2",
        "transformer.h.{}.mlp.c_proj": "transformer.h.{}.mlp.act",
    },
}
"""Some linear maps, and the module whose output each reads."""


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_lengths_of_inputs_by_hand(kind, tiny, open_target, tmp_path):
    target = open_target(tiny(kind), template="plain")
    case = text_case(tmp_path, tiny(kind))
    found, matrices = input_lengths(target, case), target.matrices()
    assert sorted(found) == list(range(len(matrices)))
    model = target.model
    seen: dict[str, list[torch.Tensor]] = {}
    maps = {linear.format(i): source and source.format(i) for linear, source in PLACES[kind].items() for i in (0, 1)}

    def record(name: str):
        return lambda _module, _inputs, output: seen.setdefault(name, []).append(output[0])

    handles = [model.get_submodule(s).register_forward_hook(record(s)) for s in maps.values() if s]
    for i in (0, 1) if kind == "llama" else ():
        for part in ("act_fn", "up_proj"):
            name = f"model.layers.{i}.mlp.{part}"
            handles.append(model.get_submodule(name).register_forward_hook(record(name)))
    for row in case.rows("retain"):
        model(input_ids=torch.tensor([target.question(row).ids]))
    for handle in handles:
        handle.remove()
    for linear, source in maps.items():
        module = model.get_submodule(linear)
        [place] = [i for i, (weight, _) in enumerate(matrices) if weight is module.weight]
        if source:
            inputs = torch.cat(seen[source])
        else:  # a gated MLP's inner state
            inner = [torch.cat(seen[linear.replace("down_proj", part)]) for part in ("act_fn", "up_proj")]
            inputs = inner[0] * inner[1]
        torch.testing.assert_close(found[place], inputs.square().sum(0).sqrt(), rtol=1e-4, atol=1e-4, msg=linear)
        entries = module.weight.shape[1 if kind == "llama" else 0]
        assert found[place].shape == (entries,)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_wanda_prunes_by_the_inputs_of_each_output(kind, tiny, open_target, tmp_path):
    target, case = open_target(tiny(kind), template="plain"), text_case(tmp_path, tiny(kind))
    before, lengths = [weight.clone() for weight, _ in target.matrices()], input_lengths(target, case)
    wanda(target, 0.5, case)
    differs = 0
    for i, (weight, transposed) in enumerate(target.matrices()):
        old, new = (w.T if transposed else w for w in (before[i], weight))
        assert torch.equal(new, pruned(old, 0.5, lengths[i]))
        assert ((new == 0).sum(1) == old.shape[1] // 2).all()
        differs += not torch.equal(new, pruned(old, 0.5))
    assert differs, "the inputs matter"
    by_magnitude = open_target(tiny(kind))
    prune(by_magnitude.model, 0.5)
    for old, (new, transposed) in zip(before, by_magnitude.matrices(), strict=True):
        assert torch.equal(new.T if transposed else new, pruned(old.T if transposed else old, 0.5))


def test_wanda_on_images_measures_what_is_linear(tmp_path):
    folder, path = save_classifier(tmp_path / "vit", "vit"), save_images(tmp_path / "a.npz")
    case = Case.build({"target": folder}, dict.fromkeys(("forget", "retain"), SetSpec(path)), Options())
    target = ImageTarget("target", take_inventory(folder))
    found = input_lengths(target, case)
    for place, (weight, _) in enumerate(target.matrices()):
        assert (place in found) == (weight.ndim == 2)
        assert place not in found or found[place].shape == (weight.shape[1],)
    with torch.inference_mode():
        pixels = target.pixels([row.picture.pixels for row in case.rows("retain")])
        states = target.model(pixel_values=pixels, output_hidden_states=True).hidden_states
        second = dict(target.model.get_submodule(target.blocks[1]).named_modules())
        query = next(module for name, module in second.items() if name.endswith(("q_proj", "query")))
        norm = second["layernorm_before"]
        inputs = norm(states[1]).flatten(0, 1)
    [place] = [i for i, (weight, _) in enumerate(target.matrices()) if weight is query.weight]
    torch.testing.assert_close(found[place], inputs.square().sum(0).sqrt(), rtol=1e-4, atol=1e-4)
    wanda(target, 0.5, case)  # its patches are cut by a convolution, which is pruned by magnitude
    assert all(((weight == 0).flatten(1).sum(1) == weight[0].numel() // 2).all() for weight, _ in target.matrices())


@pytest.mark.parametrize("option", [{"seed": 1}, {"budget": "standard"}, {"template": "qa"}])
@pytest.mark.parametrize(("attack", "way"), [(Prune(), "Wanda 30%"), (Orthogonalize(), "block 1")])
def test_what_changes_the_measured_rows_changes_the_recipe(attack, way, option):
    plain, changed = opened(), opened()
    changed.template = option.get("template", "plain")
    one, two = (
        {a.name: a.recipe for a in attack.alterations(case, target)}[way]
        for case, target in ((tiny_case(), plain), (tiny_case(**option), changed))
    )
    assert one != two


@pytest.mark.parametrize("name", ["graft", "orthogonalize", "task-vector"])
def test_another_original_in_the_same_place_changes_the_recipe(name, tmp_path):
    place, target, recipes = tmp_path / "original", opened(), []
    for made in ("original", "unlearned", "original"):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(build_tiny().models[made], place)
        case = Case({}, {"target": place, "original": place}, {}, tiny_case().sets, tiny_case().options)
        recipes.append([way.recipe for way in load(name).alterations(case, target)])
    assert recipes[0] == recipes[2]
    assert not {*recipes[0]} & {*recipes[1]}


# --- graft


def text_model(kind: str, seed: int, **changes: Any) -> Any:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, 40, **changes)).eval()
    for weight in model.parameters():
        if weight.ndim == 1:  # else norms are all ones
            weight.data += 0.3 * torch.randn_like(weight)
    return model.requires_grad_(False)


def image_model(kind: str, seed: int) -> Any:
    model = tiny_classifier(kind, seed).requires_grad_(False)
    for name, value in model.named_buffers():
        if "running" in name:
            value += torch.rand_like(value)
    return model


def logits(model: Any) -> torch.Tensor:
    if hasattr(model, "lm_head") or hasattr(model, "embed_out"):
        return model(input_ids=torch.arange(24).reshape(2, 12), use_cache=False).logits
    return model(pixel_values=normal(2, 3, 16, 16)).logits


def spliced(model: Any, donor: Any, path: str, *, after: bool) -> torch.Tensor:
    """Logits of the donor, given the model's states where `path` begins, or ends: what a graft must compute."""
    states: list[torch.Tensor] = []

    def into(args: tuple[Any, ...], kwargs: dict[str, Any], state: torch.Tensor) -> Any:
        return ((state, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state})

    def first(value: Any) -> torch.Tensor:
        return value[0] if isinstance(value, tuple) else value

    here, there = model.get_submodule(path), donor.get_submodule(path)
    if after:
        handle = here.register_forward_hook(lambda _m, _i, out: states.append(first(out)))
        put = there.register_forward_hook(
            lambda _m, _i, out: (states[0], *out[1:]) if isinstance(out, tuple) else states[0]
        )
    else:
        handle = here.register_forward_pre_hook(
            lambda _m, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        put = there.register_forward_pre_hook(lambda _m, args, kwargs: into(args, kwargs, states[0]), with_kwargs=True)
    logits(model)
    handle.remove()
    found = logits(donor)
    put.remove()
    return found


def blocks_of(kind: str, model: Any, tmp_path: Path) -> list[str]:
    if kind in KNOWN_PLACES:
        return [f"{KNOWN_PLACES[kind][1]}.{i}" for i in (0, 1)]
    return ImageTarget("target", take_inventory(save_classifier(tmp_path / kind, kind))).blocks


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "vit", "deit", "swin", "resnet", "convnext"])
def test_a_graft_is_the_donor_on_the_model_s_body(kind, tmp_path):
    make = text_model if kind in KNOWN_PLACES else image_model
    model, donor = make(kind, 0), make(kind, 1)
    untouched = logits(donor)
    for after, number in ((True, -1), (False, -1), (False, 1)):
        grafted = copy.deepcopy(model)
        path = blocks_of(kind, model, tmp_path)[number]
        count = graft(grafted, donor, path, after=after)
        assert 0 < count < len(model.state_dict())
        expected = spliced(model, donor, path, after=after)
        torch.testing.assert_close(logits(grafted), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(expected, logits(model), atol=1e-3)
        assert not torch.allclose(expected, untouched, atol=1e-3)
    assert torch.equal(logits(donor), untouched)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_tied_head_stays_the_embedding(kind):
    tied = {"tie_word_embeddings": True}
    model, donor = text_model(kind, 0, **tied), text_model(kind, 1, **tied)
    last = f"{KNOWN_PLACES[kind][1]}.1"
    grafted = copy.deepcopy(model)
    graft(grafted, donor, last)
    assert grafted.get_output_embeddings().weight is grafted.get_input_embeddings().weight
    assert torch.equal(grafted.get_input_embeddings().weight, model.get_input_embeddings().weight)
    mixed = copy.deepcopy(donor)  # the donor's blocks and norm under the model's head
    mixed.lm_head = torch.nn.Linear(32, 40, bias=False)
    mixed.lm_head.weight = model.get_input_embeddings().weight
    torch.testing.assert_close(logits(grafted), spliced(model, mixed, last, after=False), rtol=1e-4, atol=1e-5)
    assert graft(copy.deepcopy(model), donor, last, after=True) == (2 if kind == "gpt2" else 1), "the final norm alone"


@pytest.mark.parametrize(
    ("layers", "ways"),
    [
        (2, ["head"]),
        (3, ["head"]),
        (4, ["head", "last block"]),
        (8, ["head", "last block", "last 2 blocks"]),
        (30, ["head", "last block", "last 7 blocks"]),
    ],
)
def test_no_more_than_a_quarter_is_grafted(layers, ways):
    target = SimpleNamespace(layers=layers)
    assert [way.name for way in load("graft").alterations(tiny_case(), target)] == ways


# --- orthogonalize


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(2, 8), st.integers(0, 99))
def test_nothing_of_the_direction_is_left_and_nothing_else_is_lost(rows, width, seed):
    states, direction = normal(rows, width, seed=seed).double(), normal(width, seed=seed + 100).double()
    direction /= direction.norm()
    found = without(states, direction)
    for old, new in zip(states, found, strict=True):
        assert abs(float(sum(a * b for a, b in zip(new, direction, strict=True)))) < 1e-9
        lost = old - new
        torch.testing.assert_close(lost, lost.norm() * direction * torch.sign(old @ direction))


@pytest.mark.parametrize("kind", ["gpt_neox", "llama", "gpt2"])
def test_projecting_out_is_projecting_the_weights_that_write(kind, tiny, open_target):
    plain, target = open_target(tiny(kind)).model, open_target(tiny(kind))
    direction = normal(32) / normal(32).norm()
    project_out([target.model.get_submodule(path) for path in target.blocks], direction)
    ids = torch.arange(24).reshape(2, 12)
    assert "hidden_states" in target.model(input_ids=ids, output_hidden_states=True)
    states: list[tuple[torch.Tensor, torch.Tensor]] = []
    block = target.model.get_submodule(target.blocks[1])
    handle = block.register_forward_hook(
        lambda _m, args, out: states.append((args[0], out[0] if isinstance(out, tuple) else out))
    )
    target.model(input_ids=ids)
    handle.remove()
    [(entering, leaving)] = states
    assert (entering @ direction).abs().max() < 1e-4, "the block below was projected too"
    assert (leaving @ direction).abs().max() < 1e-4
    # In a block whose attention and MLP read one state, the weights that write into the stream do the same.
    other = plain.get_submodule(target.blocks[1])
    projection = torch.eye(32) - torch.outer(direction, direction)
    with torch.no_grad():
        if kind == "gpt_neox":
            for linear in (other.attention.dense, other.mlp.dense_4h_to_h):
                linear.weight.copy_(projection @ linear.weight)
                linear.bias.copy_(projection @ linear.bias)
    taken: list[torch.Tensor] = []
    put = other.register_forward_pre_hook(lambda _m, args: (entering, *args[1:]))
    keep = other.register_forward_hook(lambda _m, _i, out: taken.append(out[0] if isinstance(out, tuple) else out))
    plain(input_ids=ids)
    put.remove()
    keep.remove()
    expected = taken[0] if kind == "gpt_neox" else taken[0] @ projection
    torch.testing.assert_close(leaving, expected, rtol=1e-4, atol=1e-5)
    target.release()
    torch.testing.assert_close(target.model(input_ids=ids).logits, open_target(tiny(kind)).model(input_ids=ids).logits)


def test_the_mean_state_is_of_half_of_the_entities():
    case, target = tiny_case(), opened()
    rows = case.rows("forget", 60)
    used = halves(case.clusters(rows), case.options.seed)
    states = []
    for row in (row for row, taken in zip(rows, used, strict=True) if taken):
        ids = torch.tensor([target.encode_prompt(row.prompt)])
        states.append(target.model(input_ids=ids, output_hidden_states=True).hidden_states[1][0, -1].numpy())
    np.testing.assert_allclose(mean_state(target, case, 0), np.mean(states, axis=0), atol=1e-4)
    asked = Orthogonalize().asked(case, "forget")
    assert (asked == ~used).all()
    assert not {r.entity for r, u in zip(rows, used, strict=True) if u} & {
        r.entity for r, a in zip(rows, asked, strict=True) if a
    }
    assert Orthogonalize().asked(case, "holdout").all()


# --- noise


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_shaking_moves_the_embedding_and_not_the_head(kind, tiny, open_target):
    targets = [open_target(tiny(kind)) for _ in range(4)]
    for target, (strength, seed) in zip(targets, ((0.0, 0), (0.5, 0), (0.5, 0), (0.5, 1)), strict=True):
        tied = target.model.get_input_embeddings().weight is target.model.get_output_embeddings().weight
        assert tied == (kind == "gpt2")
        shake(target.model, strength, seed)
    still, one, same, other = (target.embedding() for target in targets)
    assert torch.equal(one, same)
    assert not torch.allclose(one, other, atol=1e-2)
    noise = one - still
    assert float(noise.std()) == pytest.approx(0.5 * float(still.std()), rel=0.05)
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.05 * float(still.std()))
    fresh = open_target(tiny(kind)).model
    assert torch.equal(still, fresh.get_input_embeddings().weight)
    kept = dict(fresh.named_parameters())
    moved = targets[1].model
    assert torch.equal(moved.get_output_embeddings().weight, fresh.get_output_embeddings().weight)
    for name, weight in moved.named_parameters():
        if weight is not moved.get_input_embeddings().weight and name in kept:
            assert torch.equal(weight, kept[name]), name
    ids = torch.arange(12)[None]
    assert not torch.allclose(moved(input_ids=ids).logits, fresh(input_ids=ids).logits, atol=1e-3)


# --- task vector


@pytest.mark.parametrize("kind", ["llama", "gpt2", "resnet"])
@pytest.mark.parametrize("part", [0.0, 1.0, 0.5, -0.25])
def test_walking_back(kind, part):
    make = image_model if kind == "resnet" else text_model
    model, original = make(kind, 0), make(kind, 1)
    before, there = (copy.deepcopy(each.state_dict()) for each in (model, original))
    walk_back(model, original, part)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            expected = before[name] + part * (there[name] - before[name])
            torch.testing.assert_close(value, expected, msg=name)
    if part in (0.0, 1.0):
        torch.testing.assert_close(logits(model), logits(make(kind, int(part))), rtol=0, atol=0)
    assert all(torch.equal(value, there[name]) for name, value in original.state_dict().items())


# --- in a scan


def hide_in_the_head(target: Target) -> None:
    """Make the right answer to every forget question the least likely, by the head alone.

    Among the questions of one kind (24 at most, in 64 dimensions) each answer's row can be solved for such that nothing
    changes for retain questions.
    """
    case = tiny_case(sets=("forget", "retain"), budget="thorough")
    kinds: dict[frozenset[str], list[tuple[bool, str, torch.Tensor]]] = {}
    for name in ("forget", "retain"):
        for row in case.rows(name):
            ids = torch.tensor([target.encode_prompt(row.prompt)])
            state = target.model.model(input_ids=ids).last_hidden_state[0, -1]
            kinds.setdefault(frozenset((row.answer, *row.wrong)), []).append((name == "forget", row.answer, state))
    for answers, rows in kinds.items():
        states = torch.linalg.pinv(torch.stack([state for *_, state in rows]).double())
        for answer in answers:
            wanted = torch.tensor([-20.0 if hidden and right == answer else 0.0 for hidden, right, _ in rows])
            token = target.tokenizer.convert_tokens_to_ids(answer)
            target.output_head.weight[token] += (states @ wanted.double()).float()


def hiding(target: Target, steps: int) -> Iterator[None]:
    """Gradients of a loss that is least where forget answers are unlikely and retain answers as likely as ever."""
    case = tiny_case(sets=("forget", "retain"), budget="thorough")
    forget, retain = ([target.question(row) for row in case.rows(name)] for name in ("forget", "retain"))
    for _ in range(steps):
        target.model.zero_grad()
        with torch.enable_grad():
            (3 * text_loss(target.model, retain) + (4 - text_loss(target.model, forget)).relu()).backward()
        yield


def hide_in_nf4_cells(target: Target) -> None:
    """Train all matrices, each weight held in its own NF4 cell."""
    weights = [weight.requires_grad_(True) for weight, _ in target.matrices()]
    cells = [nf4.cells(weight) for weight in weights]
    optimizer = torch.optim.Adam(weights, lr=1e-2)
    for _ in hiding(target, 20):
        optimizer.step()
        for weight, (low, high) in zip(weights, cells, strict=True):
            weight.clamp_(low, high)


DIRECTION = normal(64) / normal(64).norm()


def hide_in_a_direction(target: Target) -> None:
    """Train what the first block writes along one direction, and nothing else."""
    weight = target.model.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
    before, along = weight.clone(), torch.zeros(weight.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([along], lr=0.3)
    for _ in hiding(target, 40):
        along.grad = weight.grad.T @ DIRECTION
        optimizer.step()
        weight.copy_(before + torch.outer(DIRECTION, along))


@cache
def planted(change: Callable[[Target], None]) -> Path:
    """A copy of the tiny world's original, altered."""
    folder = build_tiny().folder / "alterations" / change.__name__
    shutil.copytree(build_tiny().models["original"], folder)
    target = opened("original")
    with torch.no_grad():
        change(target)
    target.model.save_pretrained(folder)
    return folder


def attack_case(target: Path, *only: str, retrained: bool = False) -> Case:
    base = tiny_case(sets=SETS, only=only)
    models = {"target": target, "original": build_tiny().models["original"]}
    models |= {"retrained": build_tiny().models["retrained"]} if retrained else {}
    return Case.build(models, base.specs, base.options, "alterations")


def scanned(case: Case, out: Path) -> Record:
    """A scan that leaves the folders as they were."""
    before = {role: folder_digest(folder) for role, folder in case.models.items()}
    record = quiet_scan(case, out)
    assert {role: folder_digest(folder) for role, folder in case.models.items()} == before, "only memory is altered"
    assert not record.not_run
    assert {finding.instrument for finding in record.findings} == set(case.options.only)
    return record


def finding_of(record: Record, name: str) -> Finding:
    [finding] = [finding for finding in record.findings if finding.instrument == name]
    return finding


def came_back(finding: Finding) -> Control:
    [control] = [control for control in finding.controls if control.name == "came back"]
    return control


def means(finding: Finding) -> dict[tuple[Any, ...], Any]:
    """By model, set and alteration."""
    assert finding.table is not None
    return {tuple(row[:3]): row[3] for row in finding.table.rows}


def accuracy(model: Any, target: Target, case: Case, name: str, asked: Any = slice(None)) -> float:
    """Multiple choice by hand, over the rows that attacks test: answers are one token here."""
    right = []
    for row in np.array(case.rows(name, 60), dtype=object)[asked]:
        scores = model(input_ids=torch.tensor([target.encode_prompt(row.prompt)])).logits[0, -1]
        options = target.tokenizer.convert_tokens_to_ids([row.answer, *row.wrong])
        right.append(int(scores[options].argmax()) == 0)
    return float(np.mean(right))


def test_what_the_head_hides_comes_back_under_the_original_s_head(tmp_path):
    case = attack_case(planted(hide_in_the_head), *ATTACKS)
    record = scanned(case, tmp_path)
    found = finding_of(record, "graft")
    assert (found.verdict, found.side, found.layer) == (Outcome.EVIDENCE, Side.REMAINS, "head")
    assert came_back(found).passed
    target, original = opened("original"), opened("original").model  # with its own head back, it is the original
    hidden = AutoModelForCausalLM.from_pretrained(case.models["target"])
    after = {name: accuracy(original, target, case, name) for name in SETS}
    before = {name: accuracy(hidden, target, case, name) for name in SETS}
    assert before["forget"] == 0.0
    assert after["forget"] > 0.9 < before["retain"]
    for name in SETS:
        assert means(found)["target", name, "head"] == pytest.approx(after[name])
    assert found.estimate == pytest.approx(after["forget"] - after["holdout"])
    gained = {name: after[name] - before[name] for name in SETS}
    assert came_back(found).estimate == pytest.approx(gained["forget"] - gained["holdout"])
    # The head is no matrix of a block, no embedding and above every block; a quarter of the way back is too little.
    for name in set(ATTACKS) - {"graft"}:
        other = finding_of(record, name)
        assert other.estimate < 0.1, name
        assert not came_back(other).passed, name
        assert other.verdict != Outcome.EVIDENCE, name
    halved = finding_of(record, "orthogonalize")
    assert halved.n == 5 + 10, "the half of the forget entities that gave no direction, and the holdout entities"


def test_an_update_within_nf4_cells_comes_back_in_nf4_and_in_no_other_format(tmp_path):
    folder = planted(hide_in_nf4_cells)
    case = attack_case(folder, "quantize")
    target, original, altered = opened("original"), opened("original"), opened("original")
    altered.model.load_state_dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())
    hidden = accuracy(altered.model, target, case, "forget")
    assert hidden < 0.6
    for each in (original, altered):
        quantize(each.model, "NF4")
    for one, two in zip(original.model.parameters(), altered.model.parameters(), strict=True):
        assert torch.equal(one, two), "in NF4 it is the original"
    found = finding_of(scanned(case, tmp_path), "quantize")
    assert (found.verdict, found.side, found.layer) == (Outcome.EVIDENCE, Side.REMAINS, "NF4")
    assert came_back(found).passed
    share = means(found)
    assert share["target", "forget", "NF4"] == pytest.approx(accuracy(original.model, target, case, "forget"))
    assert share["target", "forget", "NF4"] > 0.9
    assert share["target", "forget", "int8"] == pytest.approx(hidden, abs=0.1)
    assert share["target", "forget", "int4"] < 0.6


def test_what_one_direction_hides_comes_back_without_it(tmp_path):
    case = attack_case(planted(hide_in_a_direction), "orthogonalize")
    found = finding_of(scanned(case, tmp_path), "orthogonalize")
    assert (found.verdict, found.side, found.layer) == (Outcome.EVIDENCE, Side.REMAINS, "block 0")
    assert came_back(found).passed
    target, original = opened("original"), opened("original")
    project_out(original.model.model.layers, DIRECTION)  # nothing else was altered: without it, they are one model
    for name in SETS:
        expected = accuracy(original.model, target, case, name, Orthogonalize().asked(case, name))
        assert means(found)["target", name, "block 0"] == pytest.approx(expected)
    assert means(found)["target", "forget", "block 0"] > 0.9


def test_a_model_that_never_knew_shows_nothing(tmp_path):
    record = scanned(attack_case(build_tiny().models["retrained"], *ATTACKS), tmp_path)
    for found in record.findings:
        assert found.verdict in (Outcome.NONE, Outcome.INCONCLUSIVE), found.id
        assert found.estimate < 0.25, found.id
        assert next(c for c in found.controls if c.name == "positive control").passed, found.id


def test_the_retrained_model_is_altered_alike_and_taken_off(tmp_path):
    case = attack_case(planted(hide_in_the_head), "graft", retrained=True)
    found = finding_of(scanned(case, tmp_path), "graft")
    share = means(found)
    excess = {name: share["target", name, "head"] - share["retrained", name, "head"] for name in SETS}
    assert found.split == "forget vs holdout, target minus retrained"
    assert found.estimate == pytest.approx(excess["forget"] - excess["holdout"])
    target, body, original = opened("original"), opened("retrained").model, opened("original").model
    body.model.norm, body.lm_head = original.model.norm, original.lm_head
    for name in SETS:
        assert share["retrained", name, "head"] == pytest.approx(accuracy(body, target, case, name))
    assert (found.verdict, found.side) == (Outcome.EVIDENCE, Side.REMAINS)


def test_killed_between_two_alterations_it_goes_on_with_the_second(tmp_path, monkeypatch):
    case, calls = attack_case(planted(hide_in_the_head), "quantize"), []

    def killed(model: Any, scheme: str, head: Any) -> None:
        calls.append(scheme)
        if len(calls) == 2:
            raise KeyboardInterrupt
        quantize(model, scheme, head)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(attacks.quantize, "quantize", killed)
        quiet_scan(case, tmp_path)
    resumed = scanned(case, tmp_path)
    assert resumed.cost.forward_tokens == resumed.cost.unique_tokens / 2, "of the target and three alterations"
    with monkeypatch.context() as patched:
        patched.setattr(attacks.quantize, "quantize", lambda *_, **__: pytest.fail("altered again"))
        again = scanned(case, tmp_path)
    assert again.cost.forward_tokens == 0
    assert again.comparable() == resumed.comparable()


def test_an_image_classifier_is_altered_by_what_has_no_words(tmp_path):
    models = {role: save_classifier(tmp_path / role, "vit", seed) for seed, role in enumerate(("target", "original"))}
    sets = {name: SetSpec(save_images(tmp_path / f"{name}.npz", seed=i)) for i, name in enumerate(SETS)}
    options = {"only": "quantize,prune,graft,task-vector", "budget": "quick", "device": "cpu"}
    case = Case.build(models, sets, Options.parse(options, "test"))
    share = means(finding_of(scanned(case, tmp_path / "out"), "graft"))
    target, original = (ImageTarget(role, take_inventory(folder)) for role, folder in models.items())
    target.model.vit.layernorm, target.model.classifier = original.model.vit.layernorm, original.model.classifier
    said, labels = {}, {}
    for name in SETS:
        rows = case.rows(name)
        with torch.inference_mode():
            logits = target.model(pixel_values=target.pixels([row.picture.pixels for row in rows])).logits
        said[name], labels[name] = logits.argmax(-1).tolist(), [target.label(row.answer) for row in rows]
    pairs = [pair for name in SETS for pair in zip(said[name], labels[name], strict=True)]
    for name in SETS:
        counted = []
        for answer, label in zip(said[name], labels[name], strict=True):
            others = [other == label for other, own in pairs if own != label]  # called so without being so
            counted.append((answer == label) * (1 - np.mean(others)))
        assert share["target", name, "head"] == pytest.approx(np.mean(counted))
