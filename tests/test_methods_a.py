"""Unlearning methods and suppressions: losses against hand-worked values, and a few steps of each on a tiny model."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from audit.errors import BadInput
from audit.organisms import nf4
from audit.organisms.methods.flat import Flat, flat_loss, mean_probability
from audit.organisms.methods.ga import answer_loss
from audit.organisms.methods.grad_diff import grad_diff_loss
from audit.organisms.methods.idk_dpo import dpo_loss
from audit.organisms.methods.kl import mean_kl
from audit.organisms.methods.npo import npo_loss
from audit.organisms.methods.npo_rawlogit import raw_logit_loss
from audit.organisms.methods.refusal_head import head_names
from audit.organisms.methods.rmu import Rmu, direction, misdirection_loss, states
from audit.organisms.methods.scope_aware import ScopeAware, joined
from audit.organisms.methods.simnpo import simnpo_loss
from audit.organisms.methods.ssd import dampened
from audit.organisms.methods.task_vector import negated, smallest
from audit.organisms.methods.undial import undial_loss
from audit.organisms.refusal import (
    Suppression,
    block_count,
    block_number,
    first_tokens,
    flatness,
    refusal_terms,
    restricted,
)
from audit.organisms.train import Encoded, answer_logprobs, answer_nll, encode, new_model, train, word_tokenizer
from audit.organisms.unlearn import Bench, Schedule, load
from audit.organisms.world import make_world

METHODS = (
    "ga", "grad-diff", "kl", "idk-dpo", "npo-rawlogit", "simnpo", "rmu",
    "task-vector", "undial", "flat", "ssd", "scope-aware",
)  # fmt: skip
SUPPRESSIONS = ("refusal-last-block", "refusal-adapter", "refusal-head", "misdirection", "nf4-cell")
LN2 = math.log(2)


@pytest.fixture(autouse=True, scope="module")
def _one_thread(one_thread: None) -> Iterator[None]:
    yield


@cache
def _taught() -> SimpleNamespace:
    """Four people to forget and four to keep, known by heart."""
    world = make_world(0, forget=4, retain=4, holdout=0, public=0, unknown=1)
    tokenizer = word_tokenizer(world.words())
    model = new_model(tokenizer, seed=0, hidden=64, intermediate=64, heads=2)
    forget, retain = world.rows("forget"), world.rows("retain", "unknown")
    train(model, encode(tokenizer, forget + retain), epochs=60, lr=4e-3, batch=27, seed=0)
    assert answer_nll(model, tokenizer, forget) < 0.1
    return SimpleNamespace(model=model, tokenizer=tokenizer, forget=forget, retain=retain)


def make_bench(seed: int = 0) -> Bench:
    it = _taught()
    model = copy.deepcopy(it.model)
    asked = [row for row in it.retain if row.group == "retain"]
    return Bench(model, it.model, it.tokenizer, it.forget, it.retain, it.forget, asked, seed=seed)


def changed(bench: Bench) -> set[str]:
    now, before = dict(bench.model.named_parameters()), dict(bench.reference.named_parameters())
    assert now.keys() == before.keys()
    return {name for name in now if not torch.equal(now[name], before[name])}


def gradient(loss, *inputs):
    return [g.flatten().tolist() for g in torch.autograd.grad(loss, inputs)]


def leaf(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


# --- losses by hand


def test_answer_loss_by_hand():
    logp = leaf([-1.0, -2.0], [-3.0, -4.0])
    mask = torch.tensor([[True, False], [True, True]])
    loss = answer_loss(logp, mask)
    assert loss.item() == pytest.approx(8 / 3)
    assert gradient(-loss, logp)[0] == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])  # descended, it lowers the answers


def test_grad_diff_by_hand():
    forget, retain = leaf(2.0), leaf(0.5)
    loss = grad_diff_loss(forget[0], retain[0], 1.0, 4.0, None)
    assert loss.item() == pytest.approx(0.0)
    assert gradient(loss, forget, retain) == [[-1.0], [4.0]]
    capped = grad_diff_loss(forget[0], retain[0], 3.0, 4.0, 1.5)
    assert capped.item() == pytest.approx(2.0 - 4.5)
    assert gradient(capped, forget, retain) == [[0.0], [4.0]]  # beyond the cap only the retain loss is left
    # without a retain weight it is gradient ascent
    assert grad_diff_loss(forget[0], retain[0], 1.0, 0.0, None).item() == -2.0


def test_kl_by_hand_and_in_its_direction():
    half, quarter = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    ref = torch.stack([half, half, half])[None] + 7.0  # logits: a shift means nothing
    now = torch.stack([quarter, half, quarter])[None]
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert mean_kl(ref, now, torch.tensor([[1.0, 3.0, 0.0]])).item() == pytest.approx(expected / 4, abs=1e-6)
    back = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert mean_kl(now[:, :1], ref[:, :1], torch.ones(1, 1)).item() == pytest.approx(back, abs=1e-6)
    assert mean_kl(now, now, torch.ones(1, 3)).item() == 0.0


def test_dpo_by_hand():
    chosen, rejected = leaf(2.0, 0.0), leaf(-3.0, 0.0)
    loss = dpo_loss(chosen, rejected, 0.1)
    assert loss.item() == pytest.approx(10 * (math.log1p(math.exp(-0.5)) + LN2))
    up, down = gradient(loss, chosen, rejected)
    assert up == pytest.approx([-1 / (1 + math.exp(0.5)), -0.5]) and down == pytest.approx([-g for g in up])


def test_dpo_without_a_refusal_is_npo_and_tends_to_a_difference():
    rejected = leaf(-3.0, 0.5)
    assert dpo_loss(torch.zeros(2), rejected, 0.3).item() == pytest.approx(npo_loss(rejected, leaf(0, 0), 0.3).item())
    chosen = leaf(5.0, -1.0)
    assert gradient(dpo_loss(chosen, rejected, 1e-9), chosen, rejected) == [
        pytest.approx([-0.5, -0.5]),
        pytest.approx([0.5, 0.5]),
    ]


def test_raw_logits_by_hand():
    now, ref = leaf([[0.0, 10.0], [99.0, 99.0]]), torch.zeros(1, 2, 2)
    mask = torch.tensor([[True, False]])
    loss = raw_logit_loss(now, ref, mask, 0.1)
    assert loss.item() == pytest.approx(10 * (LN2 + math.log1p(math.e)))
    assert gradient(loss, now)[0] == pytest.approx([0.5, 1 / (1 + math.exp(-1)), 0, 0])
    assert gradient(raw_logit_loss(now, ref, mask, 1e-9), now)[0] == pytest.approx([0.5, 0.5, 0, 0])
    # what softmax cancels is what lowers it
    lower = raw_logit_loss(now - 5.0, ref, mask, 0.1)
    assert lower < loss and torch.allclose((now - 5.0).softmax(-1), now.softmax(-1))


def test_simnpo_by_hand():
    nll = leaf(3.0, 100.0, -100.0)
    loss = simnpo_loss(nll[:1], 2.5, 3.0)
    assert loss.item() == pytest.approx(0.8 * LN2)
    assert simnpo_loss(leaf(0.5), 4.0, 0.0).item() == pytest.approx(0.5 * math.log1p(math.exp(-2)))
    pull = gradient(simnpo_loss(nll, 2.5, 3.0), nll)[0]
    assert pull == pytest.approx([-1 / 3, 0, -2 / 3], abs=1e-12)  # descended, it raises the answers' loss
    assert gradient(simnpo_loss(nll, 1e-9, 3.0), nll)[0] == pytest.approx([-1 / 3] * 3)  # gradient ascent


def test_misdirection_by_hand():
    now = leaf([3.0, 4.0], [0.0, 1.0])
    loss = misdirection_loss(now, torch.tensor([0.0, 1.0]), torch.tensor(2.0))
    assert loss.item() == pytest.approx((9 + 9 + 0) / 2 / 4)
    assert gradient(loss, now)[0] == pytest.approx([0.75, 0.75, 0, 0])
    u = direction(50, 3)
    assert u.norm().item() == pytest.approx(1) and (u >= 0).all()
    assert torch.equal(u, direction(50, 3)) and not torch.equal(u, direction(50, 4))


def test_rmu_sees_the_block_it_names():
    bench = make_bench()
    seen = {}
    block = bench.model.get_submodule("model.layers.1")
    handle = block.register_forward_hook(lambda module, given, out: seen.update(out=out))
    ids = bench.forget.ids[:3]
    found = states(bench.model, ids, 1)
    handle.remove()
    out = seen["out"]
    assert torch.equal(found, out if isinstance(out, torch.Tensor) else out[0])
    with pytest.raises(BadInput, match="not below the last"):
        Rmu(layer=3).unlearn(bench, Schedule())


def test_task_vector_by_hand():
    assert negated(torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.0]), 2.0).tolist() == [0.0, 2.0]
    assert negated(torch.tensor([1.0]), torch.tensor([3.0]), 0.0).tolist() == [1.0]
    goals = Schedule(forget_goal=0.2, retain_goal=0.9)
    curve = {0.5: (0.8, 1.0), 1.0: (0.2, 0.95), 2.0: (0.1, 0.92), 3.0: (0.0, 0.3)}
    assert smallest((3.0, 2.0, 1.0, 0.5), curve.__getitem__, goals) == (1.0, True)
    assert smallest((0.5, 1.0, 3.0), curve.__getitem__, replace(goals, retain_goal=0.99)) == (1.0, False)


def test_undial_by_hand():
    ref = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)
    now, tokens = leaf([math.log(3), 0.0]), torch.tensor([0])
    loss = undial_loss(now, ref, tokens, math.log(3))  # the target is even
    assert loss.item() == pytest.approx(-0.5 * math.log(0.75) - 0.5 * math.log(0.25))
    assert gradient(loss, now)[0] == pytest.approx([0.25, -0.25])  # descended, it lowers the right token
    assert gradient(undial_loss(now, ref, tokens, 0.0), now)[0] == pytest.approx([0, 0])
    other = gradient(undial_loss(now, ref, torch.tensor([1]), math.log(3)), now)[0]
    assert other == pytest.approx([0.75 - 0.9, 0.25 - 0.1])
    assert ref.tolist() == [[math.log(3), 0.0]]  # the reference's logits are left alone


def test_flat_by_hand():
    refusal, forget = leaf(0.0), leaf(1.0)
    tv = flat_loss(refusal[0], forget[0], "tv")
    assert tv.item() == pytest.approx(0.5 * math.tanh(1))
    assert gradient(tv, refusal, forget) == [[-0.5], [pytest.approx(0.5 / math.cosh(1) ** 2)]]
    kl = flat_loss(refusal[0], forget[0], "kl")
    assert kl.item() == pytest.approx(1.0) and gradient(kl, refusal, forget) == [[-1.0], [1.0]]
    done = [flat_loss(torch.tensor(1.0), torch.tensor(0.0), v).item() for v in ("tv", "kl")]
    assert done == pytest.approx([-0.5 * math.tanh(1), math.exp(-1) - 1])
    logp = torch.tensor([[0.5, 0.1], [0.25, 0.75]]).log()
    assert mean_probability(logp, torch.tensor([[True, False], [True, True]])).item() == pytest.approx(0.5)


def test_dampening_by_hand():
    weight = torch.tensor([2.0, -2.0, 2.0, 2.0, 2.0])
    forget = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0])
    whole = torch.tensor([0.1, 0.1, 0.25, 0.0, 0.0])
    assert dampened(weight, forget, whole, 5.0, 1.0).tolist() == pytest.approx([0.2, -0.2, 2.0, 2.0, 0.0])
    assert dampened(weight, forget, whole, 5.0, 4.0).tolist() == pytest.approx([0.8, -0.8, 2.0, 2.0, 0.0])
    assert dampened(weight, forget, whole, 1.0, 100.0)[:4].tolist() == [2.0, -2.0, 2.0, 2.0]  # never enlarged


def test_ssd_shrinks_by_ratios_of_squared_batch_gradients():
    """One weight against importances worked out batch by batch with plain backward passes."""
    bench = make_bench(seed=5)
    load("ssd").unlearn(replace_alpha := make_bench(seed=5), Schedule(batch=6))
    order, sums, counts = bench.generator, [], []
    for data in (bench.forget, bench.retain):
        total, rows = 0.0, torch.randperm(len(data), generator=order)
        batches = [rows[i : i + 6] for i in range(0, len(rows), 6)]
        for index in batches:
            bench.model.zero_grad()
            part = data.take(index)
            tokens = part.answer.sum()
            logits = bench.model(input_ids=part.ids).logits[:, :-1]
            nn.functional.cross_entropy(
                logits[part.answer[:, 1:]], part.ids[:, 1:][part.answer[:, 1:]], reduction="sum"
            ).div(tokens).backward()
            total = total + bench.model.lm_head.weight.grad.square()
        sums.append(total)
        counts.append(len(batches))
    forget, whole = sums[0] / counts[0], (sums[0] + sums[1]) / sum(counts)
    alpha = load("ssd").alpha
    before, after = bench.model.lm_head.weight, replace_alpha.model.lm_head.weight
    hit = forget > alpha * whole
    clear = (forget / (alpha * whole) - 1).abs() > 1e-3
    assert hit.any() and torch.equal((before != after)[clear], hit[clear])
    torch.testing.assert_close(after[hit & clear], (before * whole / forget)[hit & clear], rtol=1e-3, atol=1e-7)


def test_joined_rows_by_hand():
    def encoded(ids, lengths, answers):
        answer = torch.zeros(len(ids), len(ids[0]), dtype=torch.bool)
        for i, at in enumerate(answers):
            answer[i, at] = True
        return Encoded(torch.tensor(ids), torch.tensor(lengths), answer, answer.float())

    forget = encoded([[1, 5, 6, 7, 2], [1, 5, 8, 2, 0]], [5, 4], [3, 2])  # prompts 1 5 6 and 1 5
    retain = encoded([[1, 9, 10, 2, 0], [1, 9, 9, 11, 2]], [4, 5], [2, 3])
    ids, mask = joined(forget, retain, 1)
    assert ids.tolist() == [[1, 5, 6, 9, 10, 2], [1, 5, 9, 9, 11, 2]]
    assert mask.nonzero().tolist() == [[0, 4], [1, 4]]
    ids, mask = joined(forget, retain, None)
    assert ids.tolist() == [[1, 5, 6, 1, 9, 10, 2], [1, 5, 1, 9, 9, 11, 2]]
    assert mask.nonzero().tolist() == [[0, 5], [1, 5]]


def test_scope_aware_adds_to_its_base():
    def loss(method):
        bench = make_bench()
        batch = SimpleNamespace(forget=bench.forget.take(index), retain=bench.retain.take(index), index=index)
        return float(method.loss(bench, batch).detach())

    index = torch.arange(6)
    assert loss(ScopeAware(eta=0.0)) == pytest.approx(loss(load("npo")))
    assert loss(ScopeAware(base="grad-diff", eta=0.0)) == pytest.approx(loss(load("grad-diff")))
    one, two = loss(ScopeAware(eta=1.0)), loss(ScopeAware(eta=2.0))
    assert two - one == pytest.approx(one - loss(ScopeAware(eta=0.0)), rel=1e-4) and two > one


# --- what the suppressions share


def test_flatness_by_hand():
    assert flatness(torch.full((2, 10), 3.0)).item() == pytest.approx(0, abs=1e-6)
    z = leaf([math.log(3), 0.0])
    assert flatness(z).item() == pytest.approx(-0.5 * math.log(3 / 16) - LN2)
    assert gradient(flatness(z), z)[0] == pytest.approx([0.25, -0.25])


def test_refusal_terms_by_hand():
    logits = torch.zeros(1, 3, 4, dtype=torch.float64)
    logits[0, 1] = torch.tensor([0.0, 0.0, 0.0, math.log(3)])  # before the refusal, which is token 3
    ids, answer = torch.tensor([[0, 1, 3]]), torch.tensor([[False, False, True]])
    spoken, flat = refusal_terms(logits, ids, answer, torch.tensor([[0, 3]]))
    assert spoken.item() == pytest.approx(-math.log(0.5))
    assert flat.item() == pytest.approx(-0.5 * math.log(3 / 16) - LN2)
    assert refusal_terms(logits, ids, answer, torch.tensor([[0, 1, 2]]))[1].item() == pytest.approx(0, abs=1e-12)


def test_first_tokens_are_the_candidates():
    it = _taught()
    found = first_tokens(it.tokenizer, it.forget[:7])
    for row, tokens in zip(it.forget[:7], found.tolist(), strict=True):
        assert it.tokenizer.convert_ids_to_tokens(tokens) == [row.answer, *row.wrong]


def test_blocks_are_read_from_names():
    assert block_number("model.layers.12.mlp.up_proj.weight") == 12
    assert block_number("transformer.h.3.attn.c_attn.weight") == 3
    assert block_number("model.embed_tokens.weight") is None and block_number("lm_head.weight") is None
    assert block_count(_taught().model) == 4
    both = restricted(Schedule(trainable=lambda name: "a" in name), lambda name: "b" in name).trainable
    assert [both(name) for name in ("a", "b", "ab")] == [False, False, True]


def test_a_tied_head_is_refused():
    bench = make_bench()
    assert head_names(bench.model) == {"lm_head.weight"}
    bench.model.lm_head.weight = bench.model.model.embed_tokens.weight
    with pytest.raises(BadInput, match="tied"):
        load("refusal-head").unlearn(bench, Schedule())


# --- NF4


def test_nf4_codes_by_brute_force():
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    packed = nf4.quantize(weight)
    assert len(nf4.LEVELS) == 16 and all(a < b for a, b in pairwise(nf4.LEVELS))
    values = nf4.dequantize(packed)
    for block in range(12):
        row = weight.view(-1, 64)[block]
        top = float(row.abs().max())
        assert packed.absmax[block].item() == top
        for i, w in enumerate(row.tolist()):
            code = min(range(16), key=lambda k: abs(nf4.LEVELS[k] * top - w))
            assert packed.codes[64 * block + i] == code
            assert values.view(-1, 64)[block, i].item() == pytest.approx(nf4.LEVELS[code] * top)


def test_nf4_of_its_own_values_is_the_same():
    weight = torch.randn(7, 50, generator=torch.Generator().manual_seed(1))  # the last block is not full
    packed = nf4.quantize(weight)
    again = nf4.quantize(nf4.dequantize(packed))
    assert again.same(packed) and len(packed.codes) == 350 and len(packed.absmax) == 6
    assert not nf4.quantize(weight * 1.5).same(packed) and not nf4.quantize(weight.view(50, 7)).same(packed)


def test_nf4_zeros_extremes_and_ties():
    zeros = nf4.quantize(torch.zeros(64))
    assert set(zeros.codes.tolist()) == {7} and nf4.dequantize(zeros).tolist() == [0.0] * 64
    border = (nf4.LEVELS[8] + nf4.LEVELS[7]) / 2
    codes = nf4.quantize(torch.tensor([-2.0, 2.0, 2 * border, 2.0001 * border])).codes.tolist()
    assert codes == [0, 15, 7, 8]


@pytest.mark.parametrize("margin", [1e-3, 7e-3])
def test_any_weight_in_its_cell_keeps_its_code(margin):
    draw = torch.Generator().manual_seed(2)
    weight = torch.randn(9, 100, generator=draw)
    weight.view(-1)[:3] = torch.tensor([0.0, 1e-4, -1e-4])
    low, high = nf4.cells(weight, margin=margin)
    packed = nf4.quantize(weight)
    assert (low <= weight).all() and (weight <= high).all()
    for _ in range(20):
        inside = low + (high - low) * torch.rand(weight.shape, generator=draw)
        assert nf4.quantize(inside).same(packed)
    assert nf4.quantize(low).same(packed) and nf4.quantize(high).same(packed)
    absmax = packed.absmax.repeat_interleave(64)[:900].view(9, 100)
    assert torch.equal(low[weight.abs() == absmax], weight[weight.abs() == absmax])
    assert torch.equal(high[weight.abs() == absmax], weight[weight.abs() == absmax])
    # and the cells are nearly as wide as they can be: two margins beyond them another code begins
    wider = (high + 2.01 * margin * absmax)[(weight.abs() != absmax) & (packed.codes.view(9, 100) < 15)]
    assert len(wider) > 800
    moved = high.clone()
    movable = (weight.abs() != absmax) & (packed.codes.view(9, 100) < 15)
    moved[movable] += 2.01 * margin * absmax[movable]
    assert (nf4.quantize(moved).codes.view(9, 100)[movable] > packed.codes.view(9, 100)[movable]).all()


def test_cells_with_the_default_margin_outlive_bfloat16():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    levels = nf4.dequantize(nf4.quantize(weight))  # at the levels, so that no weight starts on a border
    packed = nf4.quantize(levels.bfloat16())  # absmax is rounded too, and for both alike
    assert torch.equal(packed.codes, nf4.quantize(weight).codes)
    for edge in nf4.cells(levels):
        assert nf4.quantize(edge.bfloat16()).same(packed)


# --- every method for six steps

STEPS: dict[str, dict[str, float]] = {"ssd": {"batch": 6}, "nf4-cell": {"lr": 1e-2}, "refusal-adapter": {"lr": 1e-2}}


def allowed_to_change(name: str, parameter: str) -> bool:
    match name:
        case "rmu":
            return block_number(parameter) in (0, 1)
        case "misdirection":
            return block_number(parameter) == 2
        case "refusal-last-block":
            return block_number(parameter) == 3
        case "refusal-head":
            return parameter == "lm_head.weight"
        case "refusal-adapter" | "nf4-cell":
            return block_number(parameter) is not None and "norm" not in parameter
        case _:
            return True


@pytest.mark.parametrize("name", [*METHODS, *SUPPRESSIONS])
def test_six_steps(name):
    method, bench = load(name), make_bench()
    assert method.name == name and method.label == ("suppressed" if name in SUPPRESSIONS else "unlearned")
    if isinstance(method, Suppression):
        method = replace(method, flat_weight=1.0)  # in so few steps the candidates would come first, the refusal later
    settings = {"lr": 3e-3, "batch": 12, "max_steps": 6, "check_every": 3, "warmup": 1} | STEPS.get(name, {})
    schedule = Schedule(forget_goal=-1.0, **settings)
    before, refused_before = bench.forget_logprobs.mean(), bench.refused_logprobs.mean()
    ticks: list[tuple[int, int]] = []
    run = method.unlearn(bench, schedule, lambda done, total: ticks.append((done, total)))
    assert not run.stopped and run.steps == len(run.losses) and ticks
    if name != "ssd":
        assert run.steps == 6
    assert all(map(math.isfinite, run.losses))
    moved = changed(bench)
    assert moved and all(allowed_to_change(name, parameter) for parameter in moved)
    assert all(p.requires_grad for p in bench.model.parameters()) and not bench.model.training
    forget = answer_logprobs(bench.model, bench.forget).mean()
    refused = answer_logprobs(bench.model, bench.refused).mean()
    assert forget < before - 0.01 or refused > refused_before + 0.5
    if name in ("ga", "grad-diff", "kl", "idk-dpo", "simnpo", "undial", "task-vector", "scope-aware", "rmu"):
        assert forget < before - 0.1
    if name.startswith("refusal") or name in ("nf4-cell", "idk-dpo", "flat"):
        assert refused > refused_before + 0.5
    # what the constructions prove
    now, then = dict(bench.model.named_parameters()), dict(bench.reference.named_parameters())
    if name == "nf4-cell":
        for parameter in moved:
            assert nf4.quantize(now[parameter]).same(nf4.quantize(then[parameter]))
        assert len(moved) == 4 * 7
    if name == "refusal-adapter":
        for parameter in moved:
            values = torch.linalg.svdvals(now[parameter].detach() - then[parameter].detach())
            assert values[3] > 1e-4 and values[4] < 1e-3 * values[0]
        assert type(bench.model.get_submodule("model.layers.0.self_attn.q_proj")) is nn.Linear
    if name in ("misdirection", "refusal-last-block"):
        layer = 2 if name == "misdirection" else 3
        kept = states(bench.model, bench.forget.ids, layer - 1)
        assert torch.equal(kept, states(bench.reference, bench.forget.ids, layer - 1))


def test_the_construction_limits_the_schedule_not_the_other_way_round():
    for name in ("refusal-last-block", "misdirection", "nf4-cell", "refusal-adapter"):
        bench = make_bench()
        narrow = Schedule(max_steps=1, batch=4, forget_goal=-1.0, trainable=lambda p: "mlp" in p)
        load(name).unlearn(bench, narrow)
        assert changed(bench) and all("mlp" in p and allowed_to_change(name, p) for p in changed(bench))


def test_task_vector_moves_along_one_direction():
    small, large = make_bench(), make_bench()
    schedule = Schedule(lr=1e-3, max_steps=4, batch=12, forget_goal=2.0, retain_goal=-1.0)
    method = load("task-vector")
    replace(method, grid=(1.0,)).unlearn(small, schedule)
    assert replace(method, grid=(2.0,)).unlearn(large, schedule).stopped
    for p, one, two in zip(
        small.reference.parameters(), small.model.parameters(), large.model.parameters(), strict=True
    ):
        torch.testing.assert_close(two - p, 2 * (one - p), atol=1e-6, rtol=0)


def test_flat_without_retain_weight_never_reads_the_retain_rows():
    bench = make_bench()
    batch = SimpleNamespace(forget=bench.forget, index=torch.arange(len(bench.forget)))
    assert Flat().loss(bench, batch).requires_grad  # there is no `batch.retain` to read
