"""Patching: the score by hand, passes by brute force, resumption, findings on planted and on absent effects."""

from __future__ import annotations

import math
from importlib.metadata import EntryPoint, entry_points

import numpy as np
import pytest
import torch
from conftest import save_tiny, words_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from worlds import open_target as open_world
from worlds import quiet_scan, tiny_case

from audit import patching
from audit.capture import Engine
from audit.case import Case
from audit.errors import BadInput
from audit.evidence import Store
from audit.instrument import GROUP, Instrument
from audit.loaders import Example, ExampleSet
from audit.plan import Batch, Input, Patched, Request, Work, merge
from audit.quantities import MOMENTS, TOKEN, hidden
from audit.record import Outcome, Question, Side
from audit.tokens import Tokens
from audit.verdict import judge
from probes.patching import Patching, recall, unlearning_depth

SITES = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")

# --- the score


def test_the_score_by_hand():
    retrained = [[1.0, 3.0, 0.05], [2.0, 2.0, 2.0], [0.04, -1.0, 0.0]]
    target = [[0.5, 4.0, 9.0], [-1.0, 0.0, 1.0], [5.0, 5.0, 5.0]]
    # Row 0: the third layer does not exceed 0.05; (1·0.5 + 3·1) / 4. Row 1: (0 + 0 + 1) / 6. Row 2: no layer.
    found = unlearning_depth(retrained, target)
    assert found[:2].tolist() == pytest.approx([3.5 / 4, 1 / 6])
    assert math.isnan(found[2])
    assert unlearning_depth([[0.2]], [[0.1]], threshold=0.2).tolist() == pytest.approx([math.nan], nan_ok=True)
    for wrong in ([[1.0, 2.0]], [1.0]):
        with pytest.raises(ValueError, match=r"(target|retrained) (has shape|must have 2)"):
            unlearning_depth([[1.0]], wrong)


deltas = arrays(np.float64, (4, 5), elements=st.floats(-5, 5))


@settings(max_examples=60, deadline=None)
@given(deltas, deltas)
def test_the_score_is_the_paper_s_sum(one, two):
    for row, other, found in zip(one, two, unlearning_depth(one, two), strict=True):
        layers = [i for i in range(5) if row[i] > 0.05]
        if layers:
            shares = [min(max(other[i] / row[i], 0.0), 1.0) for i in layers]
            weighted = sum(row[i] * share for i, share in zip(layers, shares, strict=True))
            assert found == pytest.approx(weighted / sum(row[i] for i in layers))
        else:
            assert math.isnan(found)
    assert np.nan_to_num(unlearning_depth(one, one), nan=1.0).tolist() == pytest.approx([1.0] * 4)
    assert np.nan_to_num(unlearning_depth(one, 0 * one)).tolist() == [0.0] * 4


def test_recall_is_the_mean_probability_of_the_answers(tiny, open_target):
    target = open_target(tiny("llama"))
    texts = ragged(70)  # more than pass at once
    expected = [np.exp(Engine(target).plain(tokens)["logprob"].mean()) for tokens in texts]
    assert recall(target.model, texts) == pytest.approx(np.mean(expected), rel=1e-5)


# --- patched passes


def ragged(count: int) -> list[Tokens]:
    """Texts of many lengths and scored tokens; some differ from each other in where scoring starts only."""
    random = np.random.default_rng(0)
    made = []
    for i in range(count):
        ids = tuple(int(x) for x in random.integers(4, 100, 5 + i % 7))
        made.append(Tokens(ids, 2 + i % 3, (3, 4) if i % 5 == 0 else ()))
    return [*made, Tokens(made[1].ids, made[1].start + 1)]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A second model of an architecture, with other weights."""
    made = {}

    def folder(kind):
        if kind not in made:
            tokenizer = words_tokenizer(bos=kind not in ("gpt2", "gpt_neox"))
            made[kind] = save_tiny(tmp_path_factory.mktemp("other") / kind, kind, tokenizer, initializer_range=0.3)
        return made[kind]

    return folder


def captured(target, texts, root, **options) -> Store:
    """A store that holds a source's states, captured as a scan would."""
    engine = Engine(target, token_budget=60)
    store = Store(root, {"model": target.digest})
    for batch in engine.batches(merge([Request("states", tuple(texts), (hidden(*SITES),))])):
        store.write((row.tokens, row.values) for row in engine.run(batch))
    return store


def by_brute_force(reader, source, tokens: Tokens) -> np.ndarray:
    """Log-probabilities [T, 1 + sites] by plain forward passes of one text, positions overwritten one by one."""
    ids, columns = torch.tensor([tokens.ids]), []

    def blocks(target):
        return [target.site(site)[0] for site in SITES]

    def state_of(output):
        return output[0] if isinstance(output, tuple) else output

    states = {}
    handles = [
        block.register_forward_hook(lambda _m, _i, out, i=i: states.update({i: state_of(out).clone()}))
        for i, block in enumerate(blocks(source))
    ]
    with torch.no_grad():
        source.model(input_ids=ids)
    for handle in handles:
        handle.remove()

    def logprobs():
        with torch.no_grad():
            found = reader.model(input_ids=ids).logits[0].log_softmax(-1)
        return [float(found[t - 1, tokens.ids[t]]) for t in range(tokens.start, len(tokens.ids))]

    columns.append(logprobs())
    for i, block in enumerate(blocks(reader)):

        def overwrite(_module, _inputs, out, i=i):
            state = state_of(out).clone()
            for t in range(tokens.start, len(tokens.ids)):
                state[0, t - 1] = states[i][0, t - 1]
            return (state, *out[1:]) if isinstance(out, tuple) else state

        handle = block.register_forward_hook(overwrite)
        columns.append(logprobs())
        handle.remove()
    return np.array(columns).T


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_patched_passes_by_brute_force(kind, tiny, other, open_target, tmp_path):
    reader, source, texts = open_target(tiny(kind)), open_target(other(kind)), ragged(12)
    states, store = captured(source, texts, tmp_path), Store(tmp_path, {"model": reader.digest})
    request = Patched("x", tuple(texts), "target", SITES, (TOKEN, MOMENTS))
    engine = Engine(reader, token_budget=30)  # several batches
    done: list[int] = []
    patching.run(engine, request, patching.missing(request, store, states), store, states, done.append)
    assert done[-1] == len(texts)
    assert len(done) > 2
    assert patching.forward_tokens(request, texts) == engine.forward_tokens
    moved = []
    for tokens in texts:
        found = store.read(tokens, request.kept(TOKEN, tokens, states.digest).name)["logprob"]
        expected = by_brute_force(reader, source, tokens)
        assert found == pytest.approx(expected, abs=2e-5)
        moved.append(np.abs(expected[:, 1:] - expected[:, :1]).max())
        moments = store.read(tokens, request.kept(MOMENTS, tokens, states.digest).name)
        assert moments["mean"].shape == found.shape
    assert min(moved) > 0.01, "the other model's states make a difference"


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_a_model_s_own_states_change_nothing(kind, tiny, open_target, tmp_path):
    target, texts = open_target(tiny(kind)), ragged(12)
    engine = Engine(target)
    batch = Batch(0, tuple((Input(t.ids[:-1], (Work(t, (hidden(*SITES),)),)),) for t in texts))
    own = np.concatenate([row.values[hidden(*SITES).name]["hidden"] for row in engine.run(batch)])
    request = Patched("x", tuple(texts), "target", SITES)
    for row in patching.patched(engine, texts, request, own):  # captured in a batch of the same shape: to the last bit
        logprobs = row.values["token"]["logprob"]
        assert np.array_equal(logprobs[:, 1:], np.repeat(logprobs[:, :1], 2, axis=1))
    states, store = captured(target, texts, tmp_path), Store(tmp_path, {"model": "reader"})
    patching.run(engine, request, patching.missing(request, store, states), store, states, lambda _: None)
    for tokens in texts:
        found = store.read(tokens, request.kept(TOKEN, tokens, states.digest).name)["logprob"]
        assert found[:, 1:] == pytest.approx(np.repeat(found[:, :1], 2, axis=1), abs=1e-5)


def test_a_killed_run_resumes_and_nothing_is_served_wrongly(tiny, other, open_target, tmp_path, monkeypatch):
    reader, texts = open_target(tiny("llama")), ragged(12)
    states = captured(open_target(other("llama")), texts, tmp_path)
    request = Patched("x", tuple(texts), "target", SITES)

    def values(store):
        return [store.read(t, request.kept(TOKEN, t, states.digest).name)["logprob"] for t in texts]

    def run(store):
        todo = patching.missing(request, store, states)
        patching.run(Engine(reader, token_budget=30), request, todo, store, states, lambda _: None)

    whole = Store(tmp_path / "whole", {"model": reader.digest})
    run(whole)
    real, passes = Engine.run_whole, 0

    def dies(engine, batch):
        nonlocal passes
        passes += 1
        if passes == 8:  # of three a batch: in the third batch
            raise KeyboardInterrupt
        return real(engine, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Engine, "run_whole", dies)
        with pytest.raises(KeyboardInterrupt):
            run(Store(tmp_path / "killed", {"model": reader.digest}))
    store = Store(tmp_path / "killed", {"model": reader.digest})
    left = patching.missing(request, store, states)
    assert 0 < len(left) < len(texts)
    run(store)
    again = Store(tmp_path / "killed", {"model": reader.digest})
    assert patching.missing(request, again, states) == []
    assert all(np.array_equal(a, b) for a, b in zip(values(again), values(whole), strict=True))
    # From other states, at other sites, from another position on: nothing is there.
    own = captured(reader, texts, tmp_path)
    assert len(patching.missing(request, again, own)) == len(texts)
    assert own.digest != states.digest
    with pytest.raises(BadInput, match="no states"):
        patching.missing(Patched("x", tuple(texts), "target", SITES[:1]), again, states)
    later = Tokens(texts[0].ids, texts[0].start + 1, ())
    assert patching.missing(Patched("x", (later,), "target", SITES), again, captured(reader, [later], tmp_path))


def test_states_that_do_not_fit_are_refused(tiny, open_target, tmp_path):
    target, texts = open_target(tiny("llama")), ragged(3)
    request, engine = Patched("x", tuple(texts), "target", SITES), Engine(target)
    scored = sum(tokens.scored for tokens in texts)
    with pytest.raises(BadInput, match="width 16 do not fit a model of width 32"):
        patching.patched(engine, texts, request, np.zeros((scored, 2, 16), np.float32))
    before = engine.run(Batch(0, ((Input(texts[0].ids[:-1], (Work(texts[0], (TOKEN,)),)),),)))
    assert before[0].values["token"]["logprob"] == pytest.approx(engine.plain(texts[0])["logprob"], abs=1e-5), (
        "unhooked"
    )
    at_input = Patched("x", tuple(texts), "target", ("blocks.0.hook_resid_pre",))
    with pytest.raises(BadInput, match="at outputs only"):
        patching.patched(engine, texts, at_input, np.zeros((scored, 1, 32), np.float32))
    nowhere = Patched("x", tuple(texts), "target", ("blocks.7.hook_resid_post",))
    with pytest.raises(BadInput, match=r"blocks\.7"):
        patching.patched(engine, texts, nowhere, np.zeros((scored, 1, 32), np.float32))


# --- findings, on made-up evidence


class Told:
    """Evidence in which every probability is said: by (reader, source, set) a function of row and column."""

    def __init__(self, case, says):
        self.case, self.says, self.noise = case, says, {}

    def extra(self, role, name):
        return {"layers": [0, 1]}

    def patched(self, reader, name):
        _, rows, source = name.split("/")
        random = np.random.default_rng([len(rows), len(source)])
        for _ in self.case.rows(rows):
            p = np.array([self.says(reader, source, rows, column) for column in range(3)])
            yield {"logprob": np.log(np.clip(p + random.normal(0, 0.03, 3), 0.001, 0.999))[None]}


READER = "original+patching-taught"


def judged(says, models=("original",), told=Told):
    roles = {"target": "unlearned"} | {name: name for name in models}
    case = tiny_case(roles, ("forget", "retain", "holdout"))
    return judge(Patching().measure(case, told(case, says)))


def knows(reader, source, rows, column):
    """A model that keeps the facts up to its first block, and a reader that finds few of them by itself."""
    if column == 0 or rows == "retain":
        return 0.9
    return 0.9 if rows == "forget" and column == 1 and source == "target" else 0.2


def test_what_the_states_supply_is_evidence():
    [found] = judged(knows)
    assert (found.verdict, found.side, found.layer) == (Outcome.EVIDENCE, Side.REMAINS, "after block 0")
    assert found.estimate == pytest.approx(0.7, abs=0.03)
    assert found.decides == (True, False)
    supplied, depth = judged(knows, ("original", "retrained"))
    assert supplied.verdict == Outcome.EVIDENCE
    # Block 0 is intact, block 1 lacks as much as the retrained model's: half of what that lacks.
    assert depth.estimate == pytest.approx(0.5, abs=0.05)
    assert (depth.verdict, depth.decides) == (Outcome.INCONCLUSIVE, (False, False))
    assert "second retrained model" in depth.reason


def test_a_model_that_never_knew_is_silent_and_so_is_an_edit_of_its_output():
    def never(reader, source, rows, column):
        return 0.9 if column == 0 or rows == "retain" else 0.2

    def refuses(reader, source, rows, column):
        return 0.01 if rows == "forget" and column == 2 else never(reader, source, rows, column)

    for says in (never, refuses):
        [found] = judged(says)
        assert (found.verdict, found.side) == (Outcome.NONE, Side.NEITHER)
    _, depth = judged(lambda r, s, n, c: (refuses if s == "target" else never)(r, s, n, c), ("original", "retrained"))
    assert depth.estimate == pytest.approx(1.0, abs=0.05), "to lack more than the retrained model counts as lacking"


def test_a_reader_that_knows_old_facts_better_proves_nothing():
    [found] = judged(lambda r, s, n, c: 0.6 if c == 0 and n == "holdout" else knows(r, s, n, c))
    assert found.verdict == Outcome.INCONCLUSIVE
    assert "knows both alike" in found.reason


def test_silence_with_a_reader_that_has_little_to_lose_is_not_believed():
    def unsure(reader, source, rows, column):
        return 0.9 if rows == "retain" else 0.7 if column == 0 else 0.3

    [found] = judged(unsure)
    assert found.verdict == Outcome.INCONCLUSIVE
    assert "something to lose" in found.reason


class Patchy(Told):
    """Evidence of a reader that failed to learn every fourth holdout row."""

    def patched(self, reader, name):
        for i, values in enumerate(super().patched(reader, name)):
            if "holdout" in name and i % 4 == 0:
                values["logprob"][:] = np.log(0.1)
            yield values


def test_rows_that_the_reader_does_not_know_are_left_out():
    [whole], [patchy] = judged(knows), judged(knows, told=Patchy)
    assert patchy.verdict == Outcome.EVIDENCE
    assert patchy.estimate == pytest.approx(whole.estimate, abs=0.01)
    alike = next(control for control in patchy.controls if "alike" in control.name)
    assert alike.estimate == pytest.approx(0, abs=0.02)
    with pytest.raises(BadInput, match="taught in vain: it knows 0 of 72 holdout rows"):
        judged(lambda r, s, n, c: 0.3 if c == 0 and n == "holdout" else knows(r, s, n, c))


def test_states_of_another_basis_do_not_run():
    with pytest.raises(BadInput, match="mean nothing to the original"):
        judged(lambda r, s, n, c: 0.9 if c == 0 else 0.05)


def test_without_holdout_or_original_it_does_not_run():
    roles = {"target": "unlearned", "original": "original", "retrained": "retrained"}
    assert "holdout" in Patching().missing(tiny_case(roles, ("forget", "retain")))
    assert "original" in Patching().missing(tiny_case({"target": "unlearned"}, ("forget", "retain", "holdout")))
    assert Patching().missing(tiny_case(roles, ("forget", "retain", "holdout"))) is None


# --- a scan


class Backwards(Instrument):
    """Wants the original's states put into the target, which is read before it."""

    name, title, question, reference = "backwards", "Backwards?", Question.TRACE, "nobody"

    def requests(self, case, target):
        texts = tuple(target.encode(row.prompt, row.answer) for row in case.rows("forget"))
        if target.role == "target":
            return [Patched("backwards/a", texts, "original", SITES), Patched("backwards/b", texts, "original", SITES)]
        return [Request("backwards", texts, (hidden(*SITES),))]

    def measure(self, case, evidence):
        raise AssertionError("dropped before")


@pytest.fixture
def registered(monkeypatch):
    """Patching, and `Backwards`, as installed instruments."""
    made = {"patching": "probes.patching:Patching", "backwards": f"{__name__}:Backwards"}
    points = [point for point in entry_points(group=GROUP) if point.name not in made]
    points += [EntryPoint(name, value, GROUP) for name, value in made.items()]
    monkeypatch.setattr("audit.instrument.entry_points", lambda group: points)


def scanned(made, out, retrained=True, **options):
    roles = {"target": made, "original": "original"} | ({"retrained": "retrained"} if retrained else {})
    case = tiny_case(roles, ("forget", "retain", "holdout"), **{"only": "patching"} | options)
    return quiet_scan(case, out, evidence_folder=out.parent / "evidence")


def test_a_scan_resumes_without_a_pass_and_tells_the_original_from_the_retrained(registered, tmp_path, monkeypatch):
    knows = scanned("original", tmp_path / "knows")
    assert knows.not_run == []
    supplied, depth = knows.findings
    assert (supplied.verdict, supplied.side) == (Outcome.EVIDENCE, Side.REMAINS)
    assert supplied.estimate > 0.5
    assert depth.estimate == pytest.approx(0, abs=1e-3), "its own states: nothing is lost"
    assert knows.cost.unique_tokens == knows.cost.forward_tokens - knows.cost.reused_tokens
    never = scanned("retrained", tmp_path / "never")
    supplied, depth = never.findings
    assert supplied.side == Side.NEITHER
    assert supplied.estimate == pytest.approx(0, abs=1e-4), "target and retrained are one model"
    assert depth.estimate == pytest.approx(1)
    drawn = {row.id: row.scores["unlearning depth"] for row in never.examples if row.scores}
    assert drawn
    assert set(drawn.values()) == {1.0}

    def forbidden(*_, **__):
        raise AssertionError("a pass through a model")

    with monkeypatch.context() as patched:
        for name in ("run", "plain"):
            patched.setattr(Engine, name, forbidden)
        patched.setattr("probes.patching.descend", forbidden)
        again = scanned("retrained", tmp_path / "never")
    assert again.comparable() == never.comparable()
    assert again.cost.forward_tokens == 0


def test_what_cannot_be_answered_is_said_once(registered, tmp_path):
    record = scanned("original", tmp_path / "out", retrained=False, only="backwards")
    [absent] = record.not_run
    assert absent.reason == "backwards/a: the original was not captured before"
    assert not absent.failed


def test_the_original_is_read_last(registered, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr("audit.gather.capture_one", lambda run, target, *_: read.append(target.role))
    monkeypatch.setattr("audit.gather.visit", lambda *_: None)
    monkeypatch.setattr("audit.scan._measure_all", lambda *_: ([], []))
    record = scanned("unlearned", tmp_path / "out")
    assert read == ["target", "retrained", "original"]
    assert list(record.models) == ["target", "original", "retrained"]


def test_without_wrong_answers_the_beginning_of_the_answer_is_read():
    case, target = tiny_case({"target": "original", "original": "original"}, ("forget",)), open_world("original")
    forks = Patching()._texts(case, target, "forget")
    assert all(tokens.scored == 1 and tokens.rivals for tokens in forks)
    long = Example("forget:0", "Alma Archer likes to eat", "soup " * 12)
    plain = Case(
        case.name, case.models, case.specs, {"forget": ExampleSet("forget", "here", (long,), "0")}, case.options
    )
    [tokens] = Patching()._texts(plain, target, "forget")
    assert (tokens.scored, tokens.rivals) == (8, ())
    assert tokens.ids == target.encode(long.prompt, long.answer).ids[: tokens.start + 8]


def test_every_role_is_asked_for_what_is_its_part():
    case = tiny_case({"target": "unlearned", "original": "original"}, ("forget", "retain", "holdout"))
    asked = {
        role: list(Patching().requests(case, open_world("original", role)))
        for role in ("target", "retrained", "original", READER, "target+relearn-a@20", "original+null@1")
    }
    assert [type(request) for request in asked["target"]] == [Request] * 3
    assert [request.sequences for request in asked["retrained"]] == [r.sequences for r in asked["target"]]
    assert [(type(r), r.source) for r in asked[READER]] == [(Patched, "target")] * 3
    assert [r.sequences for r in asked[READER]] == [r.sequences for r in asked["target"]]
    assert not asked["original"] + asked["target+relearn-a@20"] + asked["original+null@1"]
    full = tiny_case(sets=("forget", "retain", "holdout"))
    both = list(Patching().requests(full, open_world("original", "original")))
    assert [(r.name, r.source) for r in both] == [
        ("patching/forget/target", "target"), ("patching/retain/target", "target"),
        ("patching/forget/retrained", "retrained"), ("patching/retain/retrained", "retrained"),
    ]  # fmt: skip
