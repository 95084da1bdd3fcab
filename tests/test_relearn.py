"""Relearning: halves, training and bookkeeping, each against a plain reimplementation."""

from __future__ import annotations

import copy
import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import build_tiny, folder_digest, one_thread, open_target, quiet_scan, scan_tiny, tiny_case, tiny_evidence

import attacks.relearn
import audit.finetune
from attacks.relearn import Recipe, Relearn, fine_tune, halves, recipe_for
from audit.case import Case, Options
from audit.record import Outcome, Side
from audit.tokens import Tokens
from audit.verdict import judge

# --- halves

entities = st.lists(st.sampled_from([f"person {i}" for i in range(9)]), min_size=1, max_size=40)


@settings(max_examples=80, deadline=None)
@given(entities, st.integers(0, 5))
def test_halves_split_entities_whole_and_evenly(clusters, seed):
    in_a = halves(clusters, seed)
    assert in_a.shape == (len(clusters),)
    a = {c for c, inside in zip(clusters, in_a, strict=True) if inside}
    b = {c for c, inside in zip(clusters, in_a, strict=True) if not inside}
    assert not a & b, "no entity in both"
    assert a | b == set(clusters), "and none in neither"
    assert len(b) - len(a) in (0, 1)
    assert np.array_equal(halves(clusters, seed), in_a)
    assert list(halves(clusters[::-1], seed)) == list(in_a[::-1]), "the order of rows does not matter"


def test_the_seed_draws_the_halves():
    clusters = [str(i) for i in range(20)]
    drawn = {tuple(halves(clusters, seed)) for seed in range(10)}
    assert len(drawn) == 10


# --- training


def model_and_rows(n: int = 12, made: str = "unlearned"):
    target, case = open_target(made), tiny_case()
    return copy.deepcopy(target.model), [target.encode(r.prompt, r.answer) for r in case.rows("forget")[:n]]


def nll(model, rows: list[Tokens]) -> float:
    """Mean over all scored tokens, one text at a time."""
    losses = []
    for tokens in rows:
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([tokens.ids])).logits[0].log_softmax(-1)
        losses += [-float(logprobs[i - 1, tokens.ids[i]]) for i in range(tokens.start, len(tokens.ids))]
    return float(np.mean(losses))


def weights(model) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(autouse=True)
def single_threaded():
    with one_thread():
        yield


def test_fine_tune_lowers_the_loss_and_yields_its_steps():
    model, rows = model_and_rows()
    recipe = Recipe((2, 5, 20), 8, 1e-3)
    losses, ticks = [nll(model, rows)], []
    reached = []
    for step in fine_tune(model, rows, [], recipe, seed=0, tick=lambda done, total: ticks.append((done, total))):
        reached.append(step)
        losses.append(nll(model, rows))
        assert not any(p.requires_grad for p in model.parameters()), "a visited model is captured, not trained"
    assert reached == [2, 5, 20]
    assert losses[-1] < losses[0] / 2
    assert losses == sorted(losses, reverse=True)
    assert ticks == [(i, 20) for i in range(1, 21)]
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


def test_fine_tune_is_determined_by_its_seed():
    def run(seed: int, order: int = 1) -> str:
        model, rows = model_and_rows()
        torch.manual_seed(order)
        np.random.seed(order)
        for _ in fine_tune(model, rows[:6], rows[6:], Recipe((3,), 4, 1e-3), seed=seed):
            pass
        return weights(model)

    assert run(0) == run(0, order=2), "nothing else is random"
    assert run(0) != run(1)


def test_two_steps_by_hand():
    """Both rows in every batch: the loss is the mean over scored tokens, the warm-up a quarter, then a half."""
    model, rows = model_and_rows(2)
    rows[0] = Tokens(rows[0].ids, 2)  # several tokens scored
    mine = copy.deepcopy(model).requires_grad_(True)
    optimizer = torch.optim.AdamW(mine.parameters(), lr=1.0, weight_decay=0.0)
    for warm in (0.25, 0.5):
        terms = []
        for tokens in rows:
            logprobs = mine(input_ids=torch.tensor([tokens.ids])).logits[0].log_softmax(-1)
            terms += [-logprobs[i - 1, tokens.ids[i]] for i in range(tokens.start, len(tokens.ids))]
        loss = torch.stack(terms).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in mine.parameters() if p.grad is not None))
        for p in mine.parameters():
            if p.grad is not None and norm > 1.0:
                p.grad /= norm
        optimizer.param_groups[0]["lr"] = 1e-3 * warm
        optimizer.step()
    for _ in fine_tune(model, rows, [], Recipe((2,), 2, 1e-3), seed=0):
        pass
    for (name, one), two in zip(model.named_parameters(), mine.parameters(), strict=True):
        assert one.detach().numpy() == pytest.approx(two.detach().numpy(), abs=2e-6), name


def test_half_of_every_batch_is_mixed_in(monkeypatch):
    model, rows = model_and_rows(12)
    batches = []
    real = audit.finetune.padded
    monkeypatch.setattr(audit.finetune, "padded", lambda batch: batches.append(batch) or real(batch))
    taught, mixed = rows[:5], rows[5:]
    for _ in fine_tune(model, taught, mixed, Recipe((5,), 4, 1e-4), seed=0):
        pass
    assert all(sum(t in taught for t in batch) == 2 == sum(t in mixed for t in batch) for batch in batches)
    seen = [t for batch in batches for t in batch if t in taught]
    assert all(seen.count(t) == 2 for t in taught), "reshuffled only when all have been seen"


# --- the attack


def reached_models(case: Case, made: str = "unlearned") -> dict[str, str]:
    target = open_target(made)
    return {stage.name: weights(target.model) for stage in Relearn().run(case, target, lambda done, total: None)}


def small_recipe(monkeypatch) -> Recipe:
    recipe = Recipe((1, 2), 8, 1e-3)
    monkeypatch.setattr(attacks.relearn, "recipe_for", lambda case, target: recipe)
    return recipe


def test_run_visits_its_stages_and_release_restores(monkeypatch):
    small_recipe(monkeypatch)
    case, target = tiny_case(budget="standard"), open_target()
    before, folder = weights(target.model), folder_digest(build_tiny().models["unlearned"])
    stages = Relearn().stages(case, target)
    assert [s.name for s in stages] == ["relearn-a@1", "relearn-a@2", "relearn-b@1", "relearn-b@2"]
    progress = []
    seen = {}
    for stage in Relearn().run(case, target, lambda done, total: progress.append((done, total))):
        seen[stage.name] = weights(target.model)
    assert list(seen) == [s.name for s in stages]
    assert len({before, *seen.values()}) == 5, "every stage has weights of its own"
    assert progress == [(i, 4) for i in (1, 2, 3, 4)]
    target.release()
    assert weights(target.model) == before
    assert folder_digest(build_tiny().models["unlearned"]) == folder
    assert reached_models(case) == seen


def test_each_half_is_taught_to_fresh_weights_and_never_the_tested_half(monkeypatch):
    recipe = small_recipe(monkeypatch)
    case = tiny_case(budget="standard")
    taught: list[tuple[list[Tokens], list[Tokens]]] = []
    real = fine_tune
    monkeypatch.setattr(
        attacks.relearn, "fine_tune", lambda m, t, x, *a, **k: taught.append((t, x)) or real(m, t, x, *a, **k)
    )
    seen = reached_models(case)
    target = open_target()
    entity = {
        target.encode(row.prompt, row.answer).ids: (name, row.entity)
        for name in ("forget", "holdout", "retain") for row in case.rows(name)
    }  # fmt: skip
    who = [{entity[t.ids] for t in rows} for rows, _ in taught]
    assert len(who) == 2
    assert not who[0] & who[1], "the halves share no entity"
    everyone = {(name, row.entity) for name in ("forget", "holdout") for row in case.rows(name)}
    assert who[0] | who[1] == everyone
    for half in who:
        assert sum(name == "forget" for name, _ in half) == sum(name == "holdout" for name, _ in half) == 6
    mixed = [{entity[t.ids] for t in rows} for _, rows in taught]
    assert mixed[0] == mixed[1], "the same retain half is left untouched by both runs"
    assert {name for name, _ in mixed[0]} == {"retain"}
    assert len(mixed[0]) == 6
    for half, (rows, others) in zip("ab", taught, strict=True):
        model = copy.deepcopy(open_target().model)
        for step in real(model, rows, others, recipe, seed=case.options.seed):
            assert weights(model) == seen[f"relearn-{half}@{step}"]


def test_missing_wants_four_entities_a_group():
    case = tiny_case()
    assert Relearn().missing(case) is None
    sets = {
        name: type(s)(s.name, s.source, tuple(e for e in s.examples if e.entity in _first(s, 3)), s.digest)
        if name == "holdout" else s
        for name, s in case.sets.items()
    }  # fmt: skip
    reason = Relearn().missing(Case(case.name, case.models, case.specs, sets, case.options))
    assert reason is not None
    assert "4 entities" in reason
    assert "holdout" in reason


def _first(examples, count: int) -> set[str]:
    return set(sorted({e.entity for e in examples})[:count])


@pytest.mark.parametrize("option", [{"seed": 1}, {"budget": "standard"}, {"template": "qa"}])
def test_what_changes_the_weights_changes_the_recipe(option):
    target = open_target()
    changed = open_target()
    changed.template = option.get("template", "plain")
    plain = {s.recipe for s in Relearn().stages(tiny_case(), target)}
    assert plain.isdisjoint(s.recipe for s in Relearn().stages(tiny_case(**option), changed))


def test_the_learning_rate_falls_with_size():
    class Sized:
        def __init__(self, parameters: int) -> None:
            self.inventory = type("I", (), {"parameters": parameters})()

    case = Case("", {}, {}, {}, Options())
    rates = [recipe_for(case, Sized(n)).learning_rate for n in (10**5, 10**6, 8 * 10**6, 10**9, 10**12)]
    assert rates[:3] == pytest.approx([3e-4, 3e-4, 1.5e-4])
    assert rates[3] == pytest.approx(3e-5)
    assert rates[4] == pytest.approx(2e-5)


# --- what it finds


def chosen(evidence, role: str, name: str, rows) -> np.ndarray:
    """Multiple choice by mean log-probability, by hand; ties shared."""
    right = [v["logprob"].mean() for v in evidence.scores(role, f"relearn/{name}", "token")]
    wrong = iter([v["logprob"].mean() for v in evidence.scores(role, f"relearn/{name}/wrong", "token")])
    out = []
    for row, value in zip(rows, right, strict=True):
        options = [value, *(next(wrong) for _ in row.wrong)]
        out.append((value == max(options)) / options.count(max(options)))
    return np.array(out)


def test_findings_are_the_curves_counted_by_hand():
    case, evidence = tiny_case(), tiny_evidence()
    untaught, pace = Relearn().measure(case, evidence)
    steps = (10, 20)
    roles = ["target", *(f"target+relearn-a@{s}" for s in steps)]
    rows = {name: case.rows(name, 60) for name in ("forget", "holdout", "retain")}
    first = {name: np.isin([r.entity for r in rows[name]], _drawn([r.entity for r in rows[name]])) for name in rows}
    curves = {n: np.stack([chosen(evidence, role, n, rows[n]) for role in roles], 1) for n in rows}
    tested = {n: curves[n][~first[n]] for n in rows}
    assert untaught.estimate == pytest.approx(tested["forget"][:, 1:].mean() - tested["holdout"][:, 1:].mean())
    means = {(row[1], row[2]): row[3] for row in untaught.table.rows}
    for name in rows:
        for column, step in enumerate((0.0, 10.0, 20.0)):
            assert means[name, step] == pytest.approx(tested[name][:, column].mean())
    retained = tested["retain"][:, 1:].mean() - tested["holdout"][:, 1:].mean()
    assert untaught.controls[0].estimate == pytest.approx(retained)
    assert untaught.controls[0].passed
    taught = {n: curves[n][first[n]][:, 1:].mean() for n in ("forget", "holdout")}
    assert pace.estimate == pytest.approx(taught["forget"] - taught["holdout"])
    assert untaught.n == len({r.entity for r, a in zip(rows["forget"], first["forget"], strict=True) if not a}) + len(
        {r.entity for r, a in zip(rows["holdout"], first["holdout"], strict=True) if not a}
    )


def _drawn(clusters: list[str]) -> list[str]:
    names = sorted(set(clusters))
    np.random.default_rng(0).shuffle(names)
    return names[: len(names) // 2]


@pytest.mark.slow
def test_what_was_taught_comes_back_and_what_never_was_does_not(tmp_path):
    """Both halves, twelve people a group: enough for a test. The original knows; the retrained model never did."""
    found = {}
    for made in ("original", "retrained"):
        case = tiny_case({"target": made}, ("forget", "retain", "holdout"), only="relearn", budget="standard")
        record = quiet_scan(case, tmp_path / made)
        found[made] = {f.id: f for f in judge(record.findings)}["relearn/untaught-half"]
    assert (found["original"].verdict, found["original"].side) == (Outcome.EVIDENCE, Side.REMAINS)
    assert found["retrained"].verdict != Outcome.EVIDENCE
    assert abs(found["retrained"].estimate) < 0.2


def test_a_scan_leaves_the_models_on_disk_as_they_were():
    scanned = scan_tiny()
    assert any(f.instrument == "relearn" for f in scanned.record.findings)
    assert scanned.before == scanned.after
