"""Sparse autoencoders: what is planted is found, choices are blind to what they are used on, and hooks agree."""

from __future__ import annotations

import copy
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sae_lens import SAE
from worlds import build_tiny, one_thread, open_target, tiny_case

from audit.capture import Engine
from audit.case import Case
from audit.errors import BadInput
from audit.evidence import Evidence, Store, context_of
from audit.plan import merge
from audit.quantities import TOKEN
from audit.record import Outcome, Side
from audit.target import Target
from audit.tokens import Tokens
from audit.verdict import judge
from probes.lens import fork
from probes.sae import SaeRestoration, recipe_for
from probes.sae_steering import (
    ALPHAS,
    KINDS,
    REBUILT,
    STEERED,
    expert_features,
    matched_features,
    part,
    put_in_by_kind,
    random_directions,
    read_states,
    rebuild,
    restoration_rate,
    steer,
)
from probes.sae_training import load_sae, quality, train_sae


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with one_thread():
        yield


# --- training


def planted(n: int = 3000, width: int = 32, directions: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """States that are three of 24 unit directions each, and the directions."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(directions, width, generator=generator)
    rows /= rows.norm(dim=1, keepdim=True)
    codes = torch.zeros(n, directions)
    codes.scatter_(1, torch.rand(n, directions, generator=generator).topk(3).indices, 1.0)
    return codes * (1 + torch.rand(n, directions, generator=generator)) @ rows + 0.5, rows


@cache
def trained(seed: int = 0):
    states, _ = planted()
    return train_sae(states[:2500], features=64, k=3, steps=400, seed=seed, site="blocks.0.hook_resid_post")


def test_a_planted_dictionary_is_recovered():
    states, rows = planted()
    assert quality(trained(), states[2500:]).explained > 0.9
    nearest = (rows @ trained().W_dec.T).max(dim=1).values
    assert float(nearest.min()) > 0.9


def test_where_nothing_is_sparse_nothing_is_explained():
    noise = torch.randn(3000, 32, generator=torch.Generator().manual_seed(1))
    sae = train_sae(noise[:2500], features=64, k=3, steps=200, seed=0)
    assert quality(sae, noise[2500:]).explained < 0.5
    assert float((planted()[1] @ sae.W_dec.T).max(dim=1).values.max()) < 0.8


def test_codes_are_the_formula_s():
    sae, x = trained(), planted()[0][:50]
    before = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    codes = torch.zeros_like(before)
    for row, values in zip(codes, before, strict=True):
        for j in values.argsort(descending=True)[:3]:
            row[j] = max(float(values[j]), 0.0)
    assert torch.allclose(sae.encode(x), codes, atol=1e-5)
    assert torch.allclose(sae.decode(codes), codes @ sae.W_dec + sae.b_dec, atol=1e-5)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(64), atol=1e-5)


def test_the_seed_decides_and_the_caller_s_is_left_alone():
    states, _ = planted()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    told = []
    made = [
        train_sae(states, features=32, k=3, steps=10, seed=seed, tick=lambda done, total: told.append((done, total)))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    first, same, other = ([p.clone() for p in sae.state_dict().values()] for sae in made)
    assert all(map(torch.equal, first, same))
    assert not all(map(torch.equal, first, other))
    assert told == [(i, 10) for i in range(1, 11)] * 3


def test_saelens_reads_it_again(tmp_path):
    trained().save_model(tmp_path / "sae")
    x = planted()[0][:100]
    for again in (SAE.load_from_disk(tmp_path / "sae"), load_sae(tmp_path / "sae", 32)):
        assert torch.equal(again.encode(x), trained().encode(x))
        assert torch.equal(again(x), trained()(x))
        assert again.cfg.metadata.hook_name == "blocks.0.hook_resid_post"
    with pytest.raises(BadInput, match="width 32"):
        load_sae(tmp_path / "sae", 64)
    with pytest.raises(BadInput, match="SAELens"):
        load_sae(tmp_path, 32)


@pytest.mark.parametrize(("shape", "k"), [((0, 4), 2), ((5,), 2), ((5, 4), 0), ((5, 4), 9)])
def test_what_cannot_be_trained_is_refused(shape, k):
    with pytest.raises(ValueError, match="needed"):
        train_sae(torch.zeros(shape), features=8, k=k, steps=1, seed=0)


def plain_sae(directions: torch.Tensor) -> SimpleNamespace:
    """Codes are the positive coordinates along orthonormal directions."""
    return SimpleNamespace(
        encode=lambda x: (x @ directions.T).relu(),
        decode=lambda f: f @ directions,
        W_dec=directions,
        cfg=SimpleNamespace(d_sae=len(directions), d_in=directions.shape[1]),
    )


def test_quality_by_hand():
    states = torch.tensor([[2.0, 0.0, 1.0], [0.0, 4.0, -1.0]])  # the third coordinate of the second row is lost
    found = quality(plain_sae(torch.eye(3)), states)
    assert found.explained == pytest.approx(1 - 1 / (2 * (1 + 4 + 1)))
    assert found.active == pytest.approx((2 + 1) / 2)
    assert found.dead == 0
    assert quality(plain_sae(torch.eye(3)), -states.abs()).dead == 1


# --- features

codes_drawn = st.integers(1, 8).flatmap(
    lambda d: st.tuples(
        hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.just(d)), elements=st.integers(0, 3)),
        hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.just(d)), elements=st.integers(0, 3)),
        st.integers(0, 10),
    )
)


@settings(max_examples=100, deadline=None)
@given(codes_drawn)
def test_experts_are_the_most_selective(drawn):
    inside, outside, most = drawn
    gap = [float(np.float32(inside[:, j].mean()) - np.float32(outside[:, j].mean())) for j in range(inside.shape[1])]
    found = expert_features(torch.from_numpy(inside), torch.from_numpy(outside), most).tolist()
    assert len(set(found)) == len(found) <= most
    assert all(gap[j] > 0 for j in found)
    left = [j for j in range(len(gap)) if j not in found and gap[j] > 1e-6]
    assert not left or (
        len(found) == most and (most == 0 or max(gap[j] for j in left) <= min(gap[j] for j in found) + 1e-6)
    )


def test_planted_experts_and_none():
    generator = torch.Generator().manual_seed(0)
    some, others = torch.rand(200, 20, generator=generator), torch.rand(300, 20, generator=generator)
    some[:, [3, 11]] += torch.tensor([1.0, 2.0])
    assert expert_features(some, others, 2).tolist() == [11, 3]
    assert expert_features(others, others, 5).tolist() == []


def test_matched_features_fire_as_often_and_are_others():
    generator = torch.Generator().manual_seed(0)
    rates = torch.linspace(0.05, 0.95, 200)
    codes = (torch.rand(2000, 200, generator=generator) < rates).float()
    chosen = torch.tensor([10, 100, 190])
    found = matched_features(codes, chosen, seed=0)
    assert set(found.tolist()).isdisjoint(chosen.tolist())
    assert len(set(found.tolist())) == 3
    assert torch.allclose(rates[found], rates[chosen], atol=0.06)
    assert torch.equal(matched_features(codes, chosen, seed=0), found)
    assert len({tuple(matched_features(codes, chosen, seed=seed).tolist()) for seed in range(10)}) > 3
    assert len(matched_features(codes[:, :5], torch.tensor([0, 1, 2]), seed=0)) == 2, "no more than are left"


def test_random_directions_are_as_long():
    pushes = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 2.0]])
    found = random_directions(pushes, seed=0)
    assert found.norm(dim=1).tolist() == pytest.approx([5.0, 0.0, 2.0])
    assert torch.equal(found, random_directions(pushes, seed=0))
    assert not torch.equal(found, random_directions(pushes, seed=1))


def test_restoration_rate_by_hand():
    found = restoration_rate([0.5, 0.1, 1.0, 0.9], [0.2, 0.2, 0.2, 0.2], 0.8)
    assert found == pytest.approx([0.5, 0.0, 1.0, 1.0])
    assert np.isnan(restoration_rate(0.9, 0.8, 0.8))
    assert float(restoration_rate(0.6, 0.2, 1.0)) == pytest.approx(0.5)


# --- what is put in


def planted_sets(n: int = 24, width: int = 24) -> tuple[SimpleNamespace, dict[str, torch.Tensor], list[str]]:
    """An answer in the first half of the coordinates; forget rows carry 7 of the last coordinate on top."""
    generator = torch.Generator().manual_seed(0)
    states = {name: torch.rand(n, width, generator=generator) for name in ("forget", "holdout", "retain")}
    for rows in states.values():
        rows[:, width // 2 :] = 0
    states["forget"][:, -1] = 7
    return plain_sae(torch.eye(width)), states, [f"person {i // 3}" for i in range(n)]


def test_removing_experts_takes_off_what_was_put_on():
    sae, states, who = planted_sets()
    clean = states["forget"].clone()
    clean[:, -1] = 0
    found = put_in_by_kind(sae, states, "forget", "retain", who, seed=0)
    assert set(found) == {"none", *KINDS}
    assert torch.equal(found["none"][:, 0], states["forget"])
    assert torch.equal(found["expert"][:, 0, -1], torch.zeros(24)), "α = -1"
    assert torch.allclose(found["expert"][:, 1, -1], torch.full((24,), 14.0)), "α = 1"
    # In holdout rows nothing of the kind is there to be removed.
    never = put_in_by_kind(sae, states, "holdout", "retain", who, seed=0)["expert"]
    assert (
        float((never[:, 0] - states["holdout"]).norm()) < float((found["expert"][:, 0] - states["forget"]).norm()) / 5
    )
    for kind in KINDS:
        steps = (found[kind] - states["forget"][:, None]) / torch.tensor(ALPHAS)[:, None]
        assert torch.allclose(steps, steps[:, :1].expand_as(steps), atol=1e-4), "one push, at every α"
    lengths = [(found[kind][:, 0] - states["forget"]).norm(dim=1) for kind in ("expert", "random")]
    assert torch.allclose(*lengths, atol=1e-4)


def test_features_are_chosen_on_other_entities():
    sae, states, who = planted_sets()
    for rows in states.values():
        rows[:] = 0
    alone = [i for i, person in enumerate(who) if person == "person 5"]
    states["forget"][alone, 4] = 3.0  # marks one person only: never seen where it would be used
    found = put_in_by_kind(sae, states, "forget", "retain", who, seed=0)["expert"]
    assert torch.equal(found, states["forget"][:, None].expand_as(found))
    states["forget"][:, 4] = 3.0
    found = put_in_by_kind(sae, states, "forget", "retain", who, seed=0)["expert"]
    assert torch.equal(found[:, 0], torch.zeros(24, 24))


def test_the_original_s_values_are_carried():
    sae, states, who = planted_sets()
    original = states["forget"].clone()
    original[:, -1], original[:, 0] = 2.0, 9.0
    found = put_in_by_kind(sae, states, "forget", "retain", who, seed=0, original=original)
    assert torch.allclose(found["carried"][:, 0, -1], torch.full((24,), 2.0)), "α = 1: the original's value"
    assert torch.allclose(found["carried"][:, 1, -1], torch.full((24,), 7.0 + 5 * (2.0 - 7.0)))
    assert torch.allclose(found["all carried"][:, 0], original, atol=1e-5)


def test_part_is_the_sum_by_hand():
    sae, codes = trained(), trained().encode(planted()[0][:5])
    chosen = torch.tensor([1, 7, 30])
    by_hand = sum(codes[:, [j]] * sae.W_dec[j] for j in (1, 7, 30))
    assert torch.allclose(part(sae, codes, chosen), by_hand, atol=1e-6)


# --- passes

SITE = "blocks.0.hook_resid_post"


def forward(target: Target, ids: tuple[int, ...], change=lambda state: state) -> torch.Tensor:
    """Logits [T, vocabulary] with the first block's output changed: by a hook of this test's own."""

    def hook(_module, _inputs, output):
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = target.model.model.layers[0].register_forward_hook(hook)
    with torch.no_grad():
        logits = target.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    handle.remove()
    return logits


def test_steering_is_a_hook_at_the_deciding_position():
    target, case = open_target("original"), tiny_case()
    engine = Engine(target)
    forks = [fork(target, row) for row in case.rows("forget")[:30]]
    states = torch.cat(read_states(engine, SITE, forks))
    push = 3 * torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        rows = steer(engine, SITE, forks, {"none": states[:, None], "two": torch.stack([states, states + push], dim=1)})
    for tokens, values in rows:
        i = forks.index(tokens)
        none, same, pushed = (*values[STEERED.name]["none"][0], *values[STEERED.name]["two"][0])

        def change(state, i=i):
            state = state.clone()
            state[0, -1] += push[i]
            return state

        options = [tokens.ids[tokens.start], *tokens.rivals]
        plain = forward(target, tokens.ids[:-1])[-1, options]
        moved = forward(target, tokens.ids[:-1], change)[-1, options]
        assert none == same == float(plain.argmax() == 0)
        assert pushed == float(moved.argmax() == 0)
    assert len(rows) == len(forks)
    assert {float(values[STEERED.name]["two"][0, 1]) for _, values in rows} == {0.0, 1.0}, "the push matters"


def test_rebuilding_is_measured_where_it_happens():
    target, case = open_target("original"), tiny_case()
    engine = Engine(target, token_budget=64)  # several batches
    texts = [Tokens(target.encode(row.prompt, row.answer).ids, 2) for row in case.rows("retain")[:15]]
    states = read_states(engine, SITE, texts)
    for tokens, found in zip(texts, states, strict=True):
        seen = []
        forward(target, tokens.ids, lambda state, seen=seen: seen.append(state[0, 1:-1]) or state)
        assert torch.allclose(found, seen[0], atol=1e-5), "all positions but the first, which predict a token"
    every = torch.cat(states)
    sae = train_sae(every, features=128, k=8, steps=50, seed=0)
    centre = every.mean(dim=0)
    with torch.inference_mode():
        rows = rebuild(engine, SITE, sae, texts, centre)
    assert [tokens for tokens, _ in rows] == texts
    values = [arrays[REBUILT.name] for _, arrays in rows]
    sums = {key: sum(float(v[key].sum()) for v in values) for key in ("error", "spread", "active", "fresh")}
    told = quality(sae, every)
    assert 1 - sums["error"] / sums["spread"] == pytest.approx(told.explained, rel=1e-4)
    assert sums["active"] / len(every) == pytest.approx(told.active)
    assert sums["fresh"] == pytest.approx(128 * (1 - told.dead))
    for tokens, found in list(zip(texts, values, strict=True))[:4]:

        def rebuilt(state):
            state = state.clone()
            state[0, 1:-1] = sae(state[0, 1:-1])
            return state

        def averaged(state):
            state = state.clone()
            state[0, 1:-1] = centre
            return state

        for column, change in enumerate((lambda state: state, rebuilt, averaged)):
            logprobs = forward(target, tokens.ids, change).log_softmax(-1)
            nll = [-float(logprobs[i - 1, tokens.ids[i]]) for i in range(2, len(tokens.ids))]
            assert found["nll"][:, column] == pytest.approx(nll, abs=1e-3)


# --- the instrument


@cache
def measured() -> tuple[Case, Evidence, SaeRestoration]:
    """The tiny world's unlearned model, with its original: what a scan would have kept."""
    case, instrument, evidence = tiny_case(), SaeRestoration(), Evidence()
    folder = build_tiny().folder / "sae-evidence"

    def register(target: Target, rows=()) -> None:
        store = Store(folder, context_of(target.digest, dtype=str(target.dtype), device="cpu"))
        requests = list(instrument.requests(case, target))
        if "+" in target.role:
            store.write(rows)
        else:
            engine = Engine(target)
            for batch in engine.batches(merge(requests)):
                store.write((row.tokens, row.values) for row in engine.run(batch))
        assert all(store.knows(t, q) for request in requests for t in request.sequences for q in request.quantities)
        evidence.register(target.role, store, requests)

    target = open_target("unlearned")
    register(target)
    register(open_target("original", "original"))
    before = copy.deepcopy(target.model.state_dict())
    [stage], told = instrument.stages(case, target), []
    [reached] = instrument.run(case, target, lambda done, total: told.append(done / total))
    assert (reached.name, reached.recipe) == (stage.name, stage.recipe)
    assert told == sorted(told) and told[-1] == 1
    assert all(torch.equal(value, before[name]) for name, value in target.model.state_dict().items()), "not altered"
    register(target.altered(stage.name, stage.recipe), reached.rows)
    return case, evidence, instrument


def test_findings_and_what_gates_them():
    case, evidence, instrument = measured()
    findings = judge(instrument.measure(case, evidence))
    assert [f.id for f in findings] == ["sae/removed", "sae/amplified", "sae/carried"]
    for finding in findings:
        gates = {(c.name, c.gates) for c in finding.controls}
        assert {("autoencoder", "evidence"), ("autoencoder", "silence"), ("α = 0", "evidence")} <= gates
        assert ("positive control", "silence") in gates
        assert ("gain over none and random directions", "evidence") in gates or finding.id == "sae/carried"
    assert [f.decides for f in findings] == [(True, False), (True, False), (False, False)]
    assert findings[2].sides == (Side.NEITHER, Side.NEITHER)
    assert findings[2].verdict != Outcome.EVIDENCE
    nothing = next(c for c in findings[0].controls if c.name == "α = 0")
    assert nothing.estimate == 0.0
    assert nothing.passed


def test_the_table_begins_with_the_model_as_it_is():
    case, evidence, instrument = measured()
    table = instrument.measure(case, evidence)[0].table
    assert len(table.rows) == 1 + len(KINDS) * len(ALPHAS) + 3 + 1
    target = open_target("unlearned")
    for column, name in enumerate(("forget", "holdout", "retain")):
        right = []
        for row in case.rows(name):
            tokens = fork(target, row)
            logits = forward(target, tokens.ids[:-1])[-1]
            right.append(float(logits[[tokens.ids[tokens.start], *tokens.rivals]].argmax() == 0))
        assert table.rows[0][2 + column] == pytest.approx(np.mean(right))
    restored = {(row[0], row[1]): row for row in table.rows}
    accuracy, reached = table.rows[0][2], restored[KINDS["expert"], -1.0]
    assert reached[-1] == pytest.approx(float(restoration_rate(reached[2], accuracy, 1.0)), abs=0.02)


def test_a_poor_dictionary_is_not_believed(monkeypatch):
    case, evidence, instrument = measured()
    kept = Evidence.scores

    def worse(self, role, name, *quantities):
        rows = kept(self, role, name, *quantities)
        return [row | {"error": row["spread"]} for row in rows] if name == "sae/texts" else rows

    monkeypatch.setattr(Evidence, "scores", worse)
    findings = judge(instrument.measure(case, evidence))
    for finding in findings:
        failed = [c for c in finding.controls if c.name == "autoencoder"]
        assert [c.passed for c in failed] == [False, False]
        assert "explained variance 0.00" in failed[0].description
        assert finding.verdict == Outcome.INCONCLUSIVE


def test_only_the_target_is_steered_and_everything_it_depends_on_is_named():
    instrument, case = SaeRestoration(), tiny_case()
    target = open_target("unlearned")
    recipes = {
        instrument.stages(case, target)[0].recipe,
        instrument.stages(tiny_case(seed=1), target)[0].recipe,
        instrument.stages(tiny_case(budget="standard"), target)[0].recipe,
        instrument.stages(tiny_case({"target": "unlearned"}), target)[0].recipe,
    }
    assert len(recipes) == 4
    for role in ("original", "retrained"):
        assert instrument.stages(case, open_target("original", role)) == []
    assert recipe_for(case, target).site == SITE


def test_a_given_autoencoder_is_used(tmp_path):
    case, target = tiny_case({"target": "unlearned"}), open_target("unlearned")
    states = torch.cat(read_states(Engine(target), SITE, [fork(target, row) for row in case.rows("retain")]))
    train_sae(states, features=128, k=4, steps=20, seed=0).save_model(tmp_path)
    instrument = SaeRestoration(tmp_path)
    assert instrument.stages(case, target)[0].recipe != SaeRestoration().stages(case, target)[0].recipe
    [reached] = instrument.run(case, target, lambda done, total: None)
    wins = {tokens.key: arrays for tokens, arrays in reached.rows}
    assert all("carried" not in arrays.get(STEERED.name, {}) for arrays in wins.values()), "there is no original"
    texts = [arrays[REBUILT.name] for arrays in wins.values() if REBUILT.name in arrays]
    assert max(float(text["active"].max()) for text in texts) <= 4
    assert TOKEN.name not in next(iter(wins.values()))


def test_missing():
    instrument = SaeRestoration()
    assert instrument.missing(tiny_case()) is None
    assert "holdout" in (instrument.missing(tiny_case(sets=("forget", "retain"))) or "")
    assert "weights" in (instrument.missing(tiny_case(access="logprobs")) or "")
