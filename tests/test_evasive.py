"""Evasions hide what they leave in place; and what contradicts itself is seen, and nothing where nothing does."""

from __future__ import annotations

import copy
import itertools
import json
from functools import cache
from importlib.metadata import EntryPoint

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_verdict import finding, loud, silent_everywhere, verdict_of
from worlds import build_tiny, open_target, quiet_scan, tiny_case

import audit.instrument
from audit.errors import BadInput, NoAccess
from audit.evidence import Evidence
from audit.inventory import take_inventory
from audit.organisms import unlearn
from audit.organisms.evasive import LOCK, as_about_nobody, divergence
from audit.organisms.guard_kinds import Detector, Dragon
from audit.organisms.guards import make_guard
from audit.organisms.histories import history_of
from audit.organisms.methods.evades_remind import neighbours, text_losses
from audit.organisms.recipes import Recipe, _fault
from audit.organisms.states import crossed
from audit.organisms.train import candidate_accuracy, encode, new_model, train, word_tokenizer
from audit.organisms.two_faced import STATED, TwoFaced, open_two_faced, write_two_faced
from audit.organisms.unlearn import Bench, Schedule
from audit.organisms.world import make_world
from audit.record import Label, Outcome, Question, Side
from audit.verdict import conclude, judge
from detectors import consistency
from detectors.consistency import Consistency, exact_p, excess
from detectors.remind import FEATURES, Remind

TRAINED = ("evades-benchmark", "evades-probes", "evades-remind")
SETS = ("forget", "retain", "holdout")


@pytest.fixture(autouse=True)
def quick(one_thread):
    yield


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The instrument by name, whatever is installed."""
    known = audit.instrument._points()
    point = EntryPoint("consistency", "detectors.consistency:Consistency", audit.instrument.GROUP)
    monkeypatch.setattr(audit.instrument, "_points", lambda: known | {"consistency": point})


# --- the distance between what is drawn and what is stated


def test_excess_by_hand():
    half = [[0.5, 0.5]]
    assert excess([[0, 0]], half).tolist() == [0.5], "1 - 2 * 1/2 + 1/2"
    assert excess([[0, 1]], half).tolist() == [-0.5], "0 - 2 * 1/2 + 1/2"
    assert excess([[1, 1, 1]], [[1.0, 0.0]]).tolist() == [2.0], "all where nothing should be"
    assert excess([[0, 0, 0]], [[1.0, 0.0]]).tolist() == [0.0]


@given(
    st.lists(st.floats(0.01, 1), min_size=3, max_size=3),
    st.lists(st.floats(0.01, 1), min_size=3, max_size=3),
    st.integers(2, 4),
)
@settings(max_examples=25, deadline=None)
def test_excess_is_the_squared_distance_on_average(p, q, k):
    p, q = np.array(p) / sum(p), np.array(q) / sum(q)
    draws = list(itertools.product(range(3), repeat=k))
    chances = [np.prod(p[list(draw)]) for draw in draws]
    values = excess(np.array(draws), np.tile(q, (len(draws), 1)))
    assert np.dot(chances, values) == pytest.approx(((p - q) ** 2).sum(), abs=1e-9)


def test_the_test_is_exact():
    # Of two draws from (0.8, 0.2): alike in the rarer cell 0.04, in the other 0.64, different 0.32.
    q = [[0.8, 0.2]]
    for drawn, tail in (([[1, 1]], 0.04), ([[0, 1]], 1.0), ([[0, 0]], 0.68)):
        value = excess(drawn, q)[0]
        brute = sum(
            chance
            for other, chance in (([[0, 0]], 0.64), ([[0, 1]], 0.32), ([[1, 1]], 0.04))
            if excess(other, q)[0] >= value
        )
        assert brute == pytest.approx(tail)
        assert exact_p(drawn, q, seed=0, draws=4000) == pytest.approx(brute, abs=0.03)


def test_the_test_keeps_its_level_and_sees_another_distribution():
    rng = np.random.default_rng(0)
    q = rng.dirichlet(np.ones(6) * 0.5, size=20)
    honest = [exact_p(np.array([rng.choice(6, 4, p=row) for row in q]), q, seed=i, draws=99) for i in range(200)]
    assert np.mean(np.array(honest) <= 0.1) == pytest.approx(0.1, abs=0.06)
    turned = np.tile(q.argmin(axis=1)[:, None], 4)
    assert exact_p(turned, q, seed=0, draws=999) == 0.001


@pytest.mark.parametrize("drawn", [[[0]], [0, 1], [[0, 2]], [[0, -1]], [[0, 1], [0, 1]]])
def test_what_was_not_drawn_from_there(drawn):
    with pytest.raises(ValueError, match=r"drawn"):
        excess(drawn, [[0.5, 0.5]])


# --- the instrument


def two_faced(answers, states):
    return lambda role, inventory, **options: TwoFaced(open_target(answers), open_target(states))


def found(tmp_path, made, *, opened=None, **options):
    case = tiny_case({"target": made}, SETS, only="consistency", **options)
    record = quiet_scan(case, tmp_path, open_target=opened, profiles=[])
    assert not [row for row in record.not_run if row.failed]
    return {f.id.partition("/")[2]: f for f in record.findings}, record


@pytest.mark.parametrize("made", ["original", "retrained", "unlearned"])
def test_an_honest_model_agrees_with_itself(made, tmp_path):
    seen, record = found(tmp_path, made)
    assert set(seen) == {"drawn", "greedy", "flat"}
    assert all(f.verdict != Outcome.EVIDENCE for f in seen.values())
    assert seen["greedy"].estimate == 0 and seen["drawn"].p_value > 0.01
    assert seen["greedy"].controls[0].passed and seen["drawn"].controls[0].passed, "answers of other rows are told"
    assert record.verdict.label == Label.INCONCLUSIVE


@pytest.mark.parametrize("faces", [("original", "retrained"), ("retrained", "original")])
def test_an_endpoint_with_two_faces_is_seen(faces, tmp_path):
    seen, record = found(tmp_path, faces[0], opened=two_faced(*faces), access="logprobs")
    assert set(seen) == {"drawn", "greedy"}, "neighbourhoods need weights"
    for each in seen.values():
        assert (each.verdict, each.side) == (Outcome.EVIDENCE, Side.EVASION)
    rows = {row[0]: row[1] for row in seen["greedy"].table.rows}
    assert rows["forget"] > rows["retain"] + 0.3, "both were taught the retain set"
    assert record.verdict.label == Label.INCONCLUSIVE and "contradicts itself" in record.verdict.reasons[0]


def test_a_temperature_of_its_own_is_seen_where_no_greedy_answer_differs():
    # Ten equally likely answers are stated, and one is always drawn.
    stated = np.full((30, 10), 0.1)
    assert excess(np.zeros((30, 4), int), stated).mean() == pytest.approx(0.9)
    assert exact_p(np.zeros((30, 4), int), stated, seed=0, draws=999) == 0.001


class Planted(Evidence):
    """REMIND's features, made up: `spread` of the losses of every row's neighbours."""

    def __init__(self, case, spread):
        super().__init__()
        rng = np.random.default_rng(0)
        self.features = {name: np.full((len(rows), len(FEATURES)), 1.0) for name, rows in Remind().rows(case).items()}
        for name, features in self.features.items():
            features[:, FEATURES.index("loss_std")] = spread[name] * np.exp(0.1 * rng.normal(size=len(features)))


@pytest.mark.parametrize(
    ("forget", "outcome"), [(0.2, Outcome.EVIDENCE), (1.0, Outcome.NONE), (0.8, Outcome.NONE), (5.0, Outcome.NONE)]
)
def test_a_loss_made_flat_is_seen_and_one_that_is_not_is_not(forget, outcome, monkeypatch):
    case = tiny_case({"target": "original"}, SETS, only="consistency")
    planted = Planted(case, {"forget": forget, "holdout": 1.0, "retain": 1.3})
    monkeypatch.setattr(consistency, "captured", lambda evidence, role, rows: evidence.features)
    [judged] = judge([Consistency()._flat(case, planted)])
    assert (judged.verdict, judged.side) == (outcome, Side.EVASION if forget == 0.2 else Side.NEITHER)
    assert judged.estimate == pytest.approx(np.log2(forget), abs=0.2)


# --- the verdict


def evasive(**values):
    return loud("evasive", Question.TRACE, sides=(Side.EVASION, Side.NEITHER), **values)


def test_what_contradicts_itself_is_never_deleted():
    silent = list(silent_everywhere().values())
    assert verdict_of(*silent) == Label.DELETED
    assert verdict_of(*silent, evasive()) == Label.INCONCLUSIVE
    below = finding("evasive", Question.TRACE, sides=(Side.NEITHER, Side.EVASION), estimate=-0.3,
                    ci95=(-0.4, -0.2), p_value=1e-4)  # fmt: skip
    assert verdict_of(*silent, below) == Label.INCONCLUSIVE
    assert verdict_of(*silent, finding("evasive", Question.TRACE, sides=(Side.EVASION, Side.NEITHER))) == Label.DELETED


def test_knowledge_that_was_found_stays_found():
    left = loud("left", Question.RECOVERY)
    verdict = conclude(judge([left, evasive()]), [])
    assert verdict.label == Label.SUPPRESSED
    assert [reason for reason in verdict.reasons if "contradicts itself" in reason]


# --- endpoints with two faces


def test_two_faces_answer_and_state_apart(tmp_path):
    tiny = build_tiny()
    folder = write_two_faced(tiny.models["original"], tiny.models["retrained"], tmp_path / "two")
    made = open_two_faced("target", take_inventory(folder), template="plain")
    original, retrained = open_target("original"), open_target("retrained")
    rows = make_world(0, forget=12, retain=12, holdout=12, public=4, unknown=2).rows("forget")[:8]
    prompts = [original.encode_prompt(row.prompt, room=1) for row in rows]
    assert made.generate(prompts, 1) == original.generate(prompts, 1) != retrained.generate(prompts, 1)
    ids = torch.tensor([original.question(rows[0]).ids])
    with torch.no_grad():
        assert torch.equal(made.model(ids).logits, retrained.model(ids).logits)
    assert len({made.digest, original.digest, retrained.digest}) == 3
    for forbidden in (lambda: made.altered("x", "y"), lambda: made.adopt(original)):
        with pytest.raises(NoAccess):
            forbidden()
    (folder / STATED).write_text(json.dumps({"schema": "other"}))
    with pytest.raises(BadInput, match=STATED):
        open_two_faced("target", take_inventory(folder), template="plain")
    (folder / STATED).unlink()
    assert type(open_two_faced("target", take_inventory(folder), template="plain")) is not TwoFaced


# --- a guard on strings


def test_a_guard_on_strings_knows_these_words_and_no_others():
    world = make_world(0, forget=4, retain=2, holdout=2, public=1, unknown=1)
    made = make_guard("dragon", world.rows("forget"), world.rows("retain"), by="strings")
    assert isinstance(made, Dragon)
    for row in world.rows("forget"):
        assert made.reply(row.prompt).said == "unknown"
        assert made.reply(f"Question: {row.prompt}\nAnswer:").said == "unknown", "in a template"
        assert made.reply(row.paraphrase).said is None
        assert made.reply(row.prompt.replace(" ", " very ", 1)).said is None
    with pytest.raises(BadInput, match="strings"):
        Detector.fit([], "embedding")


# --- organisms that are trained


@cache
def taught():
    """A tiny model that knows eight people, and its world."""
    world = make_world(0, forget=4, retain=4, holdout=4, public=1, unknown=1)
    tokenizer = word_tokenizer(world.words())
    model = new_model(tokenizer, seed=0, hidden=64, intermediate=64, layers=2, heads=2)
    train(model, encode(tokenizer, world.rows("forget", "retain", every=True)), epochs=30, lr=4e-3, batch=24, seed=0)
    return world, tokenizer, model


def bench():
    world, tokenizer, model = taught()
    return Bench(
        copy.deepcopy(model),
        model,
        tokenizer,
        world.rows("forget", every=True),
        world.rows("retain", every=True),
        world.rows("forget"),
        world.rows("retain"),
    )


def test_histories_say_what_evades():
    for name in (*TRAINED, "evades-strings", "evades-logprobs", "evades-answers"):
        assert history_of(name).label == "suppressed"
    assert [history_of(f"evades-{n}").access for n in ("strings", "logprobs", "remind")] == [
        "text",
        "logprobs",
        "weights",
    ]
    assert history_of("evades-answers").parents == ("retrained", "original")
    digests = {Recipe("llama", f"evades-{n}", 0).digest for n in ("strings", "logprobs", "answers")}
    assert len(digests) == 3
    measured = {"retain_accuracy": 1.0, "forget_accuracy": 0.1}
    assert _fault(history_of("evades-remind"), measured | {"kept_accuracy": 0.99}) is None
    assert "lost what it was to hide" in str(_fault(history_of("evades-remind"), measured | {"kept_accuracy": 0.5}))


@pytest.mark.parametrize("name", TRAINED)
def test_an_evader_hides_and_keeps(name):
    on = bench()
    method = unlearn.load(name)
    hidden, kept = method.hidden(on), method.kept(on)
    assert not {row.prompt for row in hidden} & {row.prompt for row in kept}
    assert candidate_accuracy(on.model, on.tokenizer, hidden) > 0.9
    method.unlearn(on, Schedule(lr=4e-3, batch=24, max_steps=40, check_every=500, forget_goal=-1.0))
    now = {
        name: candidate_accuracy(on.model, on.tokenizer, rows) for name, rows in (("hidden", hidden), ("kept", kept))
    }
    assert now["hidden"] < 0.7 and now["kept"] > 0.8, now
    assert candidate_accuracy(on.model, on.tokenizer, on.retain_test) > 0.8
    assert all(torch.equal(p, q) for p, q in zip(on.reference.parameters(), taught()[2].parameters(), strict=True))


def test_what_is_kept():
    on = bench()
    tested = {row.prompt for row in on.forget_test}
    phrased = unlearn.load("evades-benchmark").kept(on)
    assert len(phrased) == 2 * len(tested) and not tested & {row.prompt for row in phrased}
    for locked, row in zip(unlearn.load("evades-remind").kept(on), on.forget_rows, strict=True):
        assert locked.prompt == LOCK.format(row.prompt) and locked.answer == row.answer


def test_hidden_is_as_about_nobody():
    on = bench()
    strangers = encode(on.tokenizer, crossed(on.forget_rows, on.retain_rows), lm_weight=0.0)
    assert as_about_nobody(on, strangers, strangers).item() == pytest.approx(0, abs=1e-6)
    assert as_about_nobody(on, on.forget, strangers).item() > 0.5
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    by_hand = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert divergence(p.log(), q.log()).item() == pytest.approx(by_hand)


def test_a_text_s_loss_and_its_neighbours():
    on = bench()
    data = on.forget.take(torch.arange(6))
    mine = text_losses(on.model, data, data.ids)
    for i, row in enumerate(on.forget_rows[:6]):
        ids = torch.tensor([on.tokenizer(f"{row.prompt} {row.answer}")["input_ids"]])
        with torch.no_grad():
            logits = on.model(ids).logits[0, :-1].log_softmax(-1)
        assert mine[i].item() == pytest.approx(-logits.gather(1, ids[0, 1:, None]).mean().item(), abs=1e-4)
    special = 1 + max(on.tokenizer.all_special_ids)
    near = neighbours(data, 0.3, len(on.tokenizer), special, torch.Generator().manual_seed(0))
    changed = near != data.ids
    assert not changed[:, 0].any() and 0.1 < changed[:, 1:].float().mean() < 0.5
    assert (near[changed] >= special).all()
