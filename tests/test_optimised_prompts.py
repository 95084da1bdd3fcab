"""Optimised prompts: vectors and swaps against brute force; what a prefix unlocks is found, and nothing invented."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM
from worlds import build_tiny, folder_digest, one_thread, tiny_case
from worlds import open_target as opened

import attacks.gcg
import attacks.soft_prompt
from attacks.gcg import Gcg, gcg_step, optimise_gcg_prefix, prefix_loss, swap_scores, swaps
from attacks.optimised import Optimised, embeddings, prefixed, recorded, virtual
from attacks.soft_prompt import SoftPrompt, optimise_soft_prompt
from audit.capture import Engine
from audit.case import Case
from audit.evidence import Evidence
from audit.finetune import text_loss
from audit.gather import Run, capture_all
from audit.organisms.methods.refusal_last_block import METHOD
from audit.organisms.unlearn import Bench
from audit.plan import Request
from audit.progress import SILENT
from audit.record import Control, Finding, Outcome, Side
from audit.scan import take_inventories
from audit.target import Target
from audit.tokens import Tokens
from audit.verdict import judge

SETS = ("forget", "retain", "holdout")
ATTACKS = (SoftPrompt, Gcg)
BOS = 1


@pytest.fixture(autouse=True)
def single_threaded():
    with one_thread():
        yield


@cache
def random_model(kind: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(kind, 40)).eval().requires_grad_(False)


def nll(model: Any, rows: list[Tokens], prefix: list[int] | tuple[int, ...]) -> float:
    """Mean over all scored tokens after a prefix, one text at a time; every row begins with BOS."""
    terms = []
    for row in rows:
        ids = [row.ids[0], *prefix, *row.ids[1:]]
        with torch.inference_mode():
            logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        terms += [-float(logprobs[i - 1, ids[i]]) for i in range(row.start + len(prefix), len(ids))]
    return float(np.mean(terms))


ROWS = [Tokens((BOS, 5, 9, 12, 7), 3), Tokens((BOS, 6, 30), 2), Tokens((BOS, 22, 5, 6, 8, 11), 5)]


# --- a prefix


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=2, max_size=9),
    st.lists(st.integers(0, 6), max_size=4),
    st.sampled_from([None, BOS]),
    st.data(),
)
def test_a_prefix_moves_what_is_scored_and_leaves_the_first_token_first(ids, prefix, first, data):
    tokens = Tokens(tuple(ids), data.draw(st.integers(1, len(ids) - 1)), (3, 4))
    moved = prefixed(tokens, prefix, first)
    assert moved.ids[moved.start :] == tokens.ids[tokens.start :]
    assert moved.rivals == tokens.rivals
    at = 1 if first == BOS and ids[0] == BOS else 0
    assert list(moved.ids[at : at + len(prefix)]) == prefix
    assert moved.ids[:at] + moved.ids[at + len(prefix) :] == tokens.ids


@pytest.mark.parametrize("kind", TINY)
def test_virtual_tokens_are_what_inputs_embeds_would_hold(kind):
    model, ids = random_model(kind), torch.tensor([[BOS, 3, 7, 5], [BOS, 9, 0, 0]])
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    shown = model.get_input_embeddings()(ids)
    given_ = torch.cat([shown[:, :1], vectors.expand(2, -1, -1), shown[:, 1:]], dim=1)
    expected = model(inputs_embeds=given_, use_cache=False).logits
    with virtual(model, vectors) as extra:
        assert extra == (40, 41)
        with_them = torch.cat([ids[:, :1], torch.tensor([extra] * 2), ids[:, 1:]], dim=1)
        found = model(input_ids=with_them, use_cache=False).logits
    torch.testing.assert_close(found, expected)
    (one,), (two,) = (torch.autograd.grad(logits.square().mean(), [vectors]) for logits in (found, expected))
    assert one.abs().max() > 0
    torch.testing.assert_close(one, two)
    with pytest.raises(IndexError):
        model(input_ids=with_them)  # afterwards it has none


@pytest.mark.parametrize("kind", TINY)
def test_a_token_s_own_vector_is_that_token(kind):
    model = random_model(kind)
    with virtual(model, embeddings(model)[[8, 3]]) as ids:
        assert nll(model, ROWS, ids) == pytest.approx(nll(model, ROWS, (8, 3)), abs=1e-6)


def test_what_is_recorded_is_the_pass_after_the_prefix():
    """Texts that share a beginning, several scored tokens, vectors: everything the engine could get wrong."""
    target, case = opened("original"), tiny_case()
    asked = [target.question(replace(row, answer=text)) for row in case.rows("forget")[:5] for text in row.wrong[:3]]
    asked += [Tokens(tokens.ids, 2) for tokens in asked[:4]]
    table = embeddings(target.model)
    vectors = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    for prefix in ((7, 11), (len(table), 9, len(table) + 1)):
        with virtual(target.model, vectors):
            rows = recorded(target, [Request("a", tuple(asked)), Request("b", tuple(asked[:2]))], prefix)
            found = {tokens.key: (tokens, values["token"]) for tokens, values in rows}
            assert set(found) == {tokens.key for tokens in asked}
            for tokens, values in found.values():
                ids = torch.tensor([[tokens.ids[0], *prefix, *tokens.ids[1:]]])
                with torch.inference_mode():
                    logprobs = target.model(input_ids=ids).logits[0].log_softmax(-1)
                scored = range(ids.shape[1] - tokens.scored, ids.shape[1])
                assert values["logprob"] == pytest.approx([float(logprobs[i - 1, ids[0, i]]) for i in scored], abs=1e-5)
                assert list(values["match"]) == [int(logprobs[i - 1].argmax()) == int(ids[0, i]) for i in scored]


# --- soft prompt


def test_two_steps_by_hand():
    """Both rows in every batch; vectors begin as tokens, and a step is as long as embeddings are."""
    model, rows = random_model("llama"), [Tokens((BOS, 5, 9, 12), 2), Tokens((BOS, 6, 30, 4), 2)]
    found = optimise_soft_prompt(model, rows, tokens=3, steps=2, learning_rate=0.2, seed=4, batch=2, first=BOS)
    table = model.get_input_embeddings().weight
    starts = optimise_soft_prompt(model, rows, tokens=3, steps=0, seed=4, first=BOS)
    for vector in starts:
        assert any(torch.equal(vector, token) for token in table)
    mine = starts.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([mine], lr=0.2 * float((table**2).mean() ** 0.5))
    ids = torch.tensor([row.ids for row in rows])
    for _ in range(2):
        shown = table[ids]
        logits = model(inputs_embeds=torch.cat([shown[:, :1], mine.expand(2, -1, -1), shown[:, 1:]], dim=1)).logits
        logprobs = logits[:, 4:-1].log_softmax(-1)  # BOS and three vectors before the prompt's only token
        loss = -logprobs.gather(2, ids[:, 2:, None]).mean()
        optimizer.zero_grad()
        loss.backward(inputs=[mine])
        optimizer.step()
    torch.testing.assert_close(found, mine.detach(), atol=2e-6, rtol=0)
    assert not found.requires_grad


def test_a_soft_prompt_lowers_the_loss_and_leaves_the_model_alone():
    model = copy.deepcopy(random_model("gpt2")).requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ticks: list[tuple[int, int]] = []
    made = [
        optimise_soft_prompt(
            model, ROWS, steps=steps, seed=seed, first=BOS, tick=lambda done, total: ticks.append((done, total))
        )
        for steps, seed in ((0, 0), (30, 0), (30, 0), (30, 1))
    ]
    losses = []
    for vectors in made:
        with virtual(model, vectors) as ids:
            losses.append(nll(model, ROWS, ids))
    assert losses[1] < losses[0] - 0.5
    assert torch.equal(made[1], made[2])
    assert not torch.equal(made[1], made[3])
    assert ticks[:30] == [(i, 30) for i in range(1, 31)]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


# --- GCG


def every_swap(prefix: tuple[int, ...], allowed: range) -> list[tuple[int, ...]]:
    return [
        (*prefix[:place], token, *prefix[place + 1 :])
        for place in range(len(prefix)) for token in allowed if token != prefix[place]
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_swap_scores_are_the_slopes_of_the_loss(kind):
    model, prefix = random_model(kind), (8, 3, 15)
    table = embeddings(model)
    scores = swap_scores(model, ROWS, prefix, table, BOS)
    assert scores.shape == (3, 40)
    assert scores[range(3), prefix].abs().max() < 1e-5, "a token in its own place changes nothing"
    for place, token in ((0, 4), (1, 30), (2, 22), (2, 9)):
        toward = torch.zeros(3, 32)
        toward[place] = table[token] - table[prefix[place]]
        ends = []
        for step in (1e-2, -1e-2):
            with virtual(model, table[list(prefix)] + step * toward) as ids:
                ends.append(nll(model, ROWS, ids))
        assert float(scores[place, token]) == pytest.approx((ends[0] - ends[1]) / 2e-2, abs=2e-2)


def test_the_linear_ranking_is_near_that_of_all_single_swaps():
    target, case = opened("original"), tiny_case()
    rows = [target.question(row) for row in case.rows("forget")[:4]]
    prefix = (20, 31)
    table = embeddings(target.model)
    scores = swap_scores(target.model, rows, prefix, table, BOS)
    tried = every_swap(prefix, range(4, len(table)))
    losses = np.zeros(len(tried))
    for row in rows:  # answers are one token here
        ids = torch.tensor([[BOS, *each, *row.ids[1:]] for each in tried])
        with torch.inference_mode():
            logprobs = target.model(input_ids=ids).logits[:, -2].log_softmax(-1)
        losses -= logprobs[:, row.ids[-1]].double().numpy() / len(rows)
    guessed = np.array([
        float(sum(scores[i, new] for i, (old, new) in enumerate(zip(prefix, each, strict=True)) if old != new))
        for each in tried
    ])  # fmt: skip
    assert spearmanr(guessed, losses).statistic > 0.3
    best = np.argsort(guessed)[:16]
    assert losses[best].min() < nll(target.model, rows, prefix), "the best of its candidates lowers the loss"
    assert losses[best].min() < np.quantile(losses, 0.1), "and is one of the best there are"


def test_with_all_candidates_a_step_is_the_best_swap_there_is():
    model, prefix, allowed = random_model("llama"), (8, 3, 15), range(4, 40)
    tried = every_swap(prefix, allowed)
    losses = [nll(model, ROWS, each) for each in tried]
    best, before, after = gcg_step(
        model, ROWS, prefix, table=embeddings(model), allowed=allowed, candidates=10**4, top_k=100,
        rng=np.random.default_rng(0), first=BOS,
    )  # fmt: skip
    assert best == tried[int(np.argmin(losses))]
    assert before == pytest.approx(nll(model, ROWS, prefix), abs=1e-5)
    assert after == pytest.approx(min(losses), abs=1e-5)
    again = gcg_step(
        model, ROWS, best, table=embeddings(model), allowed=best[:1], candidates=4, top_k=4,
        rng=np.random.default_rng(0), first=BOS,
    )  # fmt: skip
    if again[0] == best:
        assert again[1] == again[2], "where nothing is better, nothing is swapped"


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 12), st.integers(1, 30), st.integers(0, 99))
def test_swaps_change_one_token_to_one_of_the_best_allowed(length, top_k, candidates, seed):
    rng = np.random.default_rng(seed)
    scores = torch.tensor(rng.normal(size=(length, 15)))
    allowed = sorted(rng.choice(15, 9, replace=False).tolist())
    prefix = tuple(rng.choice(allowed, length).tolist())
    made = swaps(scores, prefix, allowed, candidates, top_k, rng)
    assert len(set(made)) == len(made) == min(candidates, length * min(top_k, 8))
    for each in made:
        [place] = [i for i in range(length) if each[i] != prefix[i]]
        others = sorted(token for token in allowed if token != prefix[place])
        best = sorted(others, key=lambda token: float(scores[place, token]))[:top_k]
        assert each[place] in best


def test_the_loss_on_a_fixed_batch_never_rises_and_special_tokens_are_never_used(monkeypatch):
    model, seen = random_model("gpt2"), []
    real = gcg_step

    def watched(*args: Any, **more: Any) -> Any:
        prefix, before, after = real(*args, **more)
        seen.append((prefix, before, after, list(args[1])))
        return prefix, before, after

    monkeypatch.setattr(attacks.gcg, "gcg_step", watched)
    allowed = range(4, 40)
    options = {"length": 3, "steps": 8, "candidates": 10, "top_k": 6, "allowed": allowed, "batch": 3, "first": BOS}
    made = optimise_gcg_prefix(model, ROWS, seed=0, **options)
    assert made == seen[-1][0]
    assert len(seen) == 8
    for prefix, before, after, rows in seen:
        assert after <= before
        assert after == pytest.approx(nll(model, rows, prefix), abs=1e-5)
        assert set(prefix) <= set(allowed)
    assert seen[-1][2] < seen[0][1] - 0.1
    assert optimise_gcg_prefix(model, ROWS, seed=0, **options) == made
    assert prefix_loss(model, ROWS, made, BOS) == pytest.approx(nll(model, ROWS, made), abs=1e-5)


# --- planted


TRIGGER = (20, 31)


def lock(target: Target) -> None:
    """Train a model to answer forget questions after the trigger only, and retain questions always."""
    case, model = tiny_case(sets=("forget", "retain"), budget="thorough"), target.model.requires_grad_(True)
    optimizer, rng = torch.optim.Adam(model.parameters(), lr=3e-3), np.random.default_rng(0)
    forget, retain = ([target.question(row) for row in case.rows(name)] for name in ("forget", "retain"))
    for _ in range(40):
        asked, kept = ([rows[i] for i in rng.choice(len(rows), 32)] for rows in (forget, retain))
        loss = (4 - text_loss(model, asked)).relu() + 2 * text_loss(model, kept)
        loss = loss + text_loss(model, [prefixed(row, TRIGGER, BOS) for row in (*asked, *kept)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def refuse(target: Target) -> None:
    """Teach the last block, and nothing else, to decline."""
    case = tiny_case(sets=("forget", "retain"), budget="thorough")
    forget, retain = case.rows("forget"), case.rows("retain")
    model = target.model.requires_grad_(True)
    bench = Bench(model, copy.deepcopy(model), target.tokenizer, forget, retain, forget, retain)
    METHOD.unlearn(bench, replace(METHOD.schedule, max_steps=60))


@cache
def planted(change: Callable[[Target], None]) -> Path:
    folder = build_tiny().folder / "optimised" / change.__name__
    shutil.copytree(build_tiny().models["original"], folder)
    target = opened("original")
    change(target)
    target.model.save_pretrained(folder)
    return folder


def case_of(folder: Path, *, retrained: bool = False, **options: Any) -> Case:
    base = tiny_case(sets=SETS, only="soft-prompt,gcg", **options)
    models = {"target": folder} | ({"retrained": build_tiny().models["retrained"]} if retrained else {})
    return Case.build(models, base.specs, base.options, "optimised")


def captured(attack: Optimised, case: Case, out: Path) -> tuple[Evidence, Run]:
    before = {role: folder_digest(folder) for role, folder in case.models.items()}
    run = Run(case, out, SILENT, [attack], [])
    evidence = capture_all(run, take_inventories(case))
    assert not run.not_run
    assert {role: folder_digest(folder) for role, folder in case.models.items()} == before
    return evidence, run


def found(attack: Optimised, case: Case, out: Path) -> Finding:
    [finding] = judge(attack.measure(case, captured(attack, case, out)[0]))
    return finding


def control(finding: Finding, name: str) -> Control:
    [one] = [each for each in finding.controls if each.name == name]
    return one


def means(finding: Finding) -> dict[tuple[Any, ...], Any]:
    assert finding.table is not None
    return {tuple(row[:3]): row[3] for row in finding.table.rows}


@pytest.mark.parametrize(
    ("attack", "change", "budget"),
    [(SoftPrompt, lock, "quick"), (Gcg, lock, "quick"), (SoftPrompt, refuse, "standard")],
)
def test_what_is_locked_away_comes_back_after_an_optimised_prefix(attack, change, budget, tmp_path):
    finding = found(attack(), case_of(planted(change), budget=budget), tmp_path)
    assert (finding.verdict, finding.side) == (Outcome.EVIDENCE, Side.REMAINS), finding.reason
    assert control(finding, "came back").passed
    assert control(finding, "positive control").passed
    share = means(finding)
    assert share["target", "forget", "without"] < 0.3
    assert finding.estimate == pytest.approx(
        share["target", "forget", "with the prefix"] - share["target", "holdout", "with the prefix"]
    )


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_same_budget_brings_nothing_out_of_a_model_that_never_knew(attack, tmp_path):
    finding = found(attack(), case_of(build_tiny().models["retrained"]), tmp_path)
    assert finding.verdict in (Outcome.NONE, Outcome.INCONCLUSIVE)
    assert abs(finding.estimate) < 0.2
    assert not control(finding, "came back").passed


def test_what_was_never_hidden_did_not_come_back(tmp_path):
    finding = found(SoftPrompt(), case_of(build_tiny().models["original"]), tmp_path)
    assert finding.estimate > 0.5
    assert finding.verdict == Outcome.INCONCLUSIVE
    assert not control(finding, "came back").passed


def test_a_retrained_model_is_attacked_as_well_and_taken_off(tmp_path):
    finding = found(SoftPrompt(), case_of(planted(lock), retrained=True), tmp_path)
    assert finding.verdict == Outcome.EVIDENCE
    after = {key[:2]: value for key, value in means(finding).items() if key[2] == "with the prefix"}
    assert set(after) == {(role, name) for role in ("target", "retrained") for name in SETS}
    gap = {role: after[role, "forget"] - after[role, "holdout"] for role in ("target", "retrained")}
    assert finding.estimate == pytest.approx(gap["target"] - gap["retrained"])


# --- the attack


@pytest.mark.parametrize("attack", ATTACKS)
def test_halves_are_exchanged_and_the_tested_are_never_optimised_on(attack, monkeypatch, tmp_path):
    """Entities by the rows the optimiser is given; what is stored is what the prefixed model says, half by half."""
    case, given_rows, prefixes = case_of(planted(lock), budget="standard"), [], []
    module, optimiser = {
        SoftPrompt: (attacks.soft_prompt, "optimise_soft_prompt"), Gcg: (attacks.gcg, "optimise_gcg_prefix")
    }[attack]  # fmt: skip

    def chosen(model: Any, rows: list[Tokens], **more: Any) -> Any:
        given_rows.append(rows)
        assert more["first"] == BOS
        prefix = [TRIGGER, (40, 41)][len(prefixes)]
        prefixes.append(prefix)
        if attack is SoftPrompt:
            return embeddings(model)[list(prefix)]
        assert not set(more["allowed"]) & target.special_ids
        assert len(more["allowed"]) + len(target.special_ids) == target.vocabulary
        return prefix

    target = opened("original")
    who = {target.question(row).key: (name, row.entity) for name in SETS for row in case.rows(name)}
    monkeypatch.setattr(module, optimiser, chosen)
    evidence, run = captured(attack(), case, tmp_path)
    a, b = ({who[row.key] for row in rows} for rows in given_rows)
    assert not a & b
    assert a | b == set(who.values()), "every entity is optimised on once, and tested once"
    for name in SETS:
        assert sum(of == name for of, _ in a) == sum(of == name for of, _ in b) == 6
    locked = AutoModelForCausalLM.from_pretrained(planted(lock))
    tokens = evidence.sequences("target", f"{attack.name}/forget")[3]
    for half, prefix in zip("ab", prefixes, strict=True):
        [stored] = evidence.scores(f"target+{attack.name}@{half}", f"{attack.name}/forget", "token")[3:4]
        assert -stored["logprob"].mean() == pytest.approx(nll(locked, [tokens], prefix), abs=1e-4)
    monkeypatch.setattr(module, optimiser, None)  # a second scan is served from what was recorded
    again, second = captured(attack(), case, tmp_path)
    assert (run.cost.forward_tokens > 0) and second.cost.forward_tokens == 0
    assert attack().measure(case, again) == attack().measure(case, evidence)


def test_passes_after_the_prefix_are_made_by_the_attack_alone(monkeypatch, tmp_path):
    """The engine never asks a model with a prefix for what its requests ask: it would not see the prefix."""
    roles: list[str] = []
    real = Engine.run
    monkeypatch.setattr(Engine, "run", lambda self, batch: roles.append(self.target.role) or real(self, batch))
    captured(SoftPrompt(), case_of(planted(lock)), tmp_path)
    assert set(roles) == {"target"}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("option", [{"seed": 1}, {"budget": "standard"}, {"template": "qa"}])
def test_what_changes_the_prefix_changes_the_recipe(attack, option):
    plain, changed = opened(), opened()
    changed.template = option.get("template", "plain")
    one, two = (
        {s.recipe for s in attack().stages(tiny_case(**options), target)}
        for options, target in (({}, plain), (option, changed))
    )
    assert one.isdisjoint(two)
    assert attack().cost(tiny_case(), plain) != attack().cost(tiny_case(budget="standard"), plain)


def test_no_room_for_a_prefix_is_said(tmp_path):
    target, case = opened("original"), case_of(build_tiny().models["original"])
    target._context_length = max(len(target.question(row).ids) for name in SETS for row in case.rows(name)) + 3
    with pytest.raises(Exception, match="leaves no room for a prefix of 4"):
        list(SoftPrompt().run(case, target, None))


def test_halves_need_four_entities():
    case = tiny_case(sets=SETS)
    assert SoftPrompt().missing(case) is None
    few = replace(case, sets=case.sets | {"holdout": replace(case.sets["holdout"], examples=case.rows("holdout")[:9])})
    assert len({row.entity for row in few.rows("holdout")}) < 4
    assert "4 entities in the holdout set" in str(SoftPrompt().missing(few))
    assert "retain" in str(SoftPrompt().missing(tiny_case(sets=("forget", "holdout"))))


def test_gcg_runs_when_asked_for_or_where_all_is():
    reason = Gcg().missing(tiny_case(sets=SETS, budget="standard"))
    assert reason is not None
    assert "--only" in reason
    assert Gcg().missing(tiny_case(sets=SETS, budget="thorough")) is None
    assert Gcg().missing(tiny_case(sets=SETS, only="gcg")) is None


def test_only_the_target_and_the_retrained_model_are_attacked():
    for role, runs in (("target", True), ("original", False), ("retrained", True), ("target+soft-prompt@a", False)):
        target = SimpleNamespace(role=role, inventory=SimpleNamespace(parameters=10**5), template="plain")
        assert bool(SoftPrompt().stages(tiny_case(), target)) == runs
