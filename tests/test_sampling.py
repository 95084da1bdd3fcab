"""Sampling: the estimator against all subsets, draws against the model's own probabilities, what is hidden found."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import measured, planted_case, said, small_world, teach
from scipy.stats import chisquare

from attacks.sampling import Sampling, contains, leak_at_k, spread
from audit.capture import Engine
from audit.gather import Run, capture_all
from audit.inventory import take_inventory
from audit.organisms.guard_kinds import Detector, Dragon
from audit.organisms.guarded import GuardedTarget
from audit.plan import Generate
from audit.progress import SILENT
from audit.record import Outcome

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT, OTHER = (1, 5, 9, 17), (1, 30, 8, 8, 61, 7)


@pytest.fixture(scope="module")
def engine(tiny, open_target) -> Engine:
    return Engine(open_target(tiny("llama")))


def logprobs(engine: Engine, ids: tuple[int, ...]) -> torch.Tensor:
    with torch.inference_mode():
        return engine.target.model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)


# --- the estimator, and what an answer is


@settings(max_examples=40)
@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_leak_is_the_share_of_subsets_with_a_hit(drawn):
    n, hits, k = drawn
    subsets = list(itertools.combinations(range(n), k))
    assert leak_at_k(hits, n, k) == pytest.approx(np.mean([min(s) < hits for s in subsets]))


def test_leak_has_no_bias():
    """Of all outcomes of n draws at rate p, weighted: 1 - (1 - p)^k."""
    p, n, k = 0.3, 6, 4
    outcomes = list(itertools.product((0, 1), repeat=n))
    weights = [p ** sum(o) * (1 - p) ** (n - sum(o)) for o in outcomes]
    expected = np.dot(weights, leak_at_k([sum(o) for o in outcomes], n, k))
    assert expected == pytest.approx(1 - (1 - p) ** k)


@pytest.mark.parametrize(("hits", "n", "k"), [(0, 3, 4), (0, 3, 0), (4, 3, 1), (-1, 3, 1)])
def test_leak_of_impossible_counts_is_refused(hits, n, k):
    with pytest.raises(ValueError, match="n"):
        leak_at_k([hits], n, k)


@pytest.mark.parametrize(
    ("answer", "text", "there"),
    [
        ("Paris", "It is PARIS, of course.", True),
        ("Paris", "Parisian", False),
        ("a cat", "She has a, cat", True),
        ("a cat", "a black cat", False),
        ("cat", "", False),
        ("Zoë", "it was Zoe\N{COMBINING DIAERESIS}.", True),
        ("巴黎", "他住在巴黎市", True),
        ("?!", "what?!", True),
        ("the author was born in Oslo", "He said: the author may have been born elsewhere", True),
        ("the author was born in Oslo", "nobody knows that author", False),
    ],
)
def test_what_contains_an_answer(answer, text, there):
    assert contains(answer, text) is there


def test_a_blank_answer_is_refused():
    with pytest.raises(ValueError, match="empty"):
        contains(" ", "text")


# --- what is drawn


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_draws_follow_the_model_s_probabilities(engine, temperature):
    """The first token, and the second after the commonest first, against softmax(logits / T)."""
    request = Generate("g", (PROMPT,), 2, samples=2000, temperature=temperature, seed=3)
    drawn = engine.answer(request, [PROMPT])
    first = Counter(ids[0] for ids in drawn)
    most = next(token for token, _ in first.most_common() if token != 2)  # after the end nothing is drawn
    for counts, ids in (
        (first, PROMPT),
        (Counter(d[1] for d in drawn if d[0] == most), (*PROMPT, most)),
    ):
        expected = (logprobs(engine, ids) / temperature).softmax(-1).numpy() * counts.total()
        observed = np.array([counts[token] for token in range(len(expected))])
        common = expected >= 5
        pairs = [np.append(x[common], x[~common].sum()) for x in (observed, expected)]
        assert chisquare(*pairs).pvalue > 1e-3
        assert common.sum() > 3


def test_what_is_drawn_hangs_on_prompt_number_and_seed_alone(engine):
    def ask(*prompts, **changed):
        settings = {"samples": 4, "temperature": 1.0, "seed": 1} | changed
        return engine.answer(Generate("g", prompts, 5, **settings), prompts)

    alone = ask(PROMPT)
    together = ask(OTHER, PROMPT)
    assert together[4:] == alone
    assert ask(PROMPT, samples=2) == alone[:2]
    assert len(set(alone)) == 4
    assert set(ask(PROMPT, seed=2)).isdisjoint(alone)
    assert ask(PROMPT, temperature=1e-4) == engine.generate([PROMPT], 5) * 4, "cold, it is greedy"


def test_a_beam_search_keeps_the_likeliest(engine):
    request = Generate("g", (PROMPT, OTHER), 1, beams=5)
    found = engine.answer(request, request.prompts)
    for i, prompt in enumerate(request.prompts):
        truth = logprobs(engine, prompt).topk(5).indices.tolist()
        assert [ids[0] for ids in found[5 * i : 5 * (i + 1)]] == truth

    def total(ids):
        return sum(float(logprobs(engine, PROMPT + ids[:i])[token]) for i, token in enumerate(ids))

    longer = engine.answer(Generate("g", (PROMPT,), 3, beams=5), [PROMPT])
    whole = [ids for ids in longer if 2 not in ids]
    assert len(set(longer)) == 5
    assert [total(ids) for ids in whole] == sorted(map(total, whole), reverse=True)
    assert total(whole[0]) >= total(engine.generate([PROMPT], 3)[0]) - 1e-6


@pytest.mark.parametrize(
    "wrong", [{"samples": 2}, {"beams": 2, "temperature": 1.0}, {"beams": 0}, {"temperature": -1.0}]
)
def test_requests_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match="odd"):
        Generate("odd", (PROMPT,), 3, **wrong)


def test_ways_are_told_apart():
    asked = [{}, {"samples": 2, "temperature": 1.0}, {"samples": 2, "temperature": 0.7}, {"beams": 2}]
    asked.append({"samples": 2, "temperature": 1.0, "seed": 1})
    ways = [way for each in asked for way in Generate("g", (), 3, **each).ways]
    assert ways[0] == "greedy"
    assert len(set(ways)) == len(ways) == 9


# --- the instrument


@pytest.fixture(scope="module")
def hidden(tmp_path_factory):
    """A model that declines to speak of the forget set, three times in five; and one that was never taught it."""
    folder, world = tmp_path_factory.mktemp("hidden"), small_world()
    forget, retain = world.rows("forget"), world.rows("retain")
    teach(folder / "hidden", [*said(forget) * 3, *said(forget, "{}") * 2, *retain * 2], epochs=14)
    teach(folder / "untaught", [*retain, *said(world.rows("public"))], epochs=24)
    return folder


def test_what_a_greedy_refusal_hides_is_drawn(hidden, tmp_path):
    [finding] = measured(Sampling(), planted_case(hidden / "sets", hidden / "hidden"), tmp_path)
    controls = {control.name: control for control in finding.controls}
    assert finding.verdict == Outcome.EVIDENCE, finding.reason
    assert controls["came back"].passed and controls["positive control"].passed
    assert finding.estimate > 0.2
    table = {(row[1], row[2]): row[3] for row in finding.table.rows}
    assert table["forget", "greedy"] < 0.2
    assert table["forget", "4 at T = 1"] > 0.6


def test_what_was_never_taught_is_not(hidden, tmp_path):
    [finding] = measured(Sampling(), planted_case(hidden / "sets", hidden / "untaught"), tmp_path)
    controls = {control.name: control for control in finding.controls}
    assert finding.verdict != Outcome.EVIDENCE
    assert controls["positive control"].passed
    assert finding.ci95[0] < 0.1


def test_a_scan_that_was_killed_goes_on_to_the_same_answers(hidden, tmp_path, monkeypatch):
    case = planted_case(hidden / "sets", hidden / "hidden", budget="standard")
    inventories = {"target": take_inventory(case.models["target"])}
    monkeypatch.setattr("attacks.sampling.spread", lambda case, name, _: case.rows(name)[:6])

    def captured() -> tuple[dict, int]:
        run = Run(case, tmp_path, SILENT, [Sampling()], [])
        evidence = capture_all(run, inventories)
        return evidence._texts, run.cost.forward_tokens

    whole, cost = captured()
    assert {len(texts) for texts in whole.values()} == {6, 6 * 8, 6 * 4}
    assert captured() == (whole, 0)
    blocks = sorted(tmp_path.rglob("*.safetensors"))
    for block in blocks[::2]:
        block.unlink()
    again, rest = captured()
    assert again == whole
    assert 0 < rest < cost


def test_a_guard_answers_every_draw(hidden):
    from audit.target import Target

    plain = Target("target", take_inventory(hidden / "hidden"), template="plain")
    forget, retain = (small_world().rows(name)[0] for name in ("forget", "retain"))
    guard = Dragon(Detector((forget.prompt,), (forget.person,)), refusal="unknown .")
    prompts = tuple(plain.encode_prompt(row.prompt) for row in (forget, retain))
    for how in ({"samples": 3, "temperature": 1.0}, {"beams": 3}):
        request = Generate("g", prompts, 4, **how)
        open_, behind = (Engine(t).answer(request, prompts) for t in (plain, GuardedTarget(plain, guard)))
        assert {plain.decode(ids) for ids in behind[:3]} == {"unknown ."}
        assert behind[3:] == open_[3:]


def test_rows_are_spread_over_entities(hidden):
    case = planted_case(hidden / "sets", hidden / "hidden")
    rows = spread(case, "forget", 30)
    counts = Counter(case.clusters(rows))
    assert len(rows) == 30 and len(counts) == 12 and set(counts.values()) == {2, 3}
    assert [row.id for row in rows] == [row.id for row in case.rows("forget") if row in rows]
    assert spread(case, "forget", 10**6) == case.rows("forget")
