"""Continual requests: unlearning by hand, a stream that is served in order, relapse and degrees counted by hand."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch
from digit_models import captured
from worlds import open_target, tiny_case

from attacks.continual import Continual, Recipe, _turns, answer_logprobs, degree, unlearn
from attacks.recall import recalled
from attacks.recall import tested as rows_of
from audit.case import Case
from audit.evidence import Evidence
from audit.record import Finding, Question, Side
from audit.tokens import Tokens

pytestmark = pytest.mark.usefixtures("one_thread")
SETS = ("forget", "holdout", "retain")


def test_degree_by_hand():
    np.testing.assert_allclose(degree([0.2, 0.1, 0.3, 0.5, 0.0], 0.2), [1, 0.5, 0.5, 0, 0])
    assert np.isnan(degree(0.1, 0.0))


def test_answers_are_scored_token_by_token():
    target = open_target("original")
    rows = [Tokens(target.question(row).ids, start) for row, start in zip(tiny_case().rows("forget"), (1, 2, 3))]  # noqa: B905
    found = answer_logprobs(target.model, rows)
    for tokens, value in zip(rows, found, strict=True):
        logprobs = target.model(input_ids=torch.tensor([tokens.ids])).logits[0].log_softmax(-1)
        expected = sum(float(logprobs[i - 1, tokens.ids[i]]) for i in range(tokens.start, len(tokens.ids)))
        assert float(value) == pytest.approx(expected, abs=1e-4)


def test_unlearning_ends_where_it_should():
    target, case = open_target("original"), tiny_case()
    forget, retain = ([target.question(row) for row in case.rows(name)[:20]] for name in ("forget", "retain"))

    def level() -> tuple[float, float]:
        return tuple(float(answer_logprobs(target.model, rows).mean()) for rows in (forget, retain))

    start, kept = level()
    recipe, ticks = Recipe(most=60, learning_rate=1e-3), []
    before = copy.deepcopy(target.model.state_dict())
    assert unlearn(target.model, forget, retain, start + 1, recipe, seed=0) == 0
    assert all(torch.equal(before[name], value) for name, value in target.model.state_dict().items())
    taken = unlearn(target.model, forget, retain, -4.0, recipe, seed=0, tick=ticks.append)
    end, still = level()
    assert taken % recipe.check == 0
    assert ticks == list(range(1, taken + 1))
    assert taken < recipe.most
    assert end <= -4.0 < start
    assert still > kept - 1
    assert unlearn(target.model, forget, retain, -1e9, Recipe(most=3), seed=0) == 3, "the budget ends it"


@cache
def stream() -> tuple[Case, Evidence, Finding]:
    models = {"target": "unlearned", "original": "original", "retrained": "retrained"}
    case = tiny_case(models, SETS, only="continual")
    evidence = captured(case, Continual())
    return case, evidence, Continual().measure(case, evidence)[0]


def test_each_request_takes_its_own_entities_away():
    case, evidence, finding = stream()
    turn, rows = _turns(case), rows_of(case, "forget")
    assert set(turn) == {0, 1}
    assert not {r.entity for r, t in zip(rows, turn, strict=True) if t} & {
        r.entity for r, t in zip(rows, turn, strict=True) if not t
    }
    known = [recalled(case, evidence, role, "continual", "forget")
             for role in ("original", "original+continual@1", "original+continual@2")]  # fmt: skip
    first, second = (np.array([values[turn == i].mean() for values in known]) for i in (0, 1))
    assert first[0] > 0.9 > 0.5 > first[1]
    assert second[2] < 0.5
    assert {c.name: c.passed for c in finding.controls}["requests done"]


def test_relapse_and_degrees_counted_by_hand():
    case, evidence, finding = stream()
    turn = _turns(case)
    roles = ("original", "original+continual@1", "original+continual@2", "retrained")
    ask = {(role, name): recalled(case, evidence, role, "continual", name) for role in roles for name in SETS}
    one, two = "original+continual@1", "original+continual@2"
    relapse = (ask[two, "forget"] - ask[one, "forget"])[turn == 0].mean()
    assert finding.estimate == pytest.approx(relapse - (ask[two, "holdout"] - ask[one, "holdout"]).mean())
    table = {(row[0], row[1], row[2]): row[3] for row in finding.table.rows}
    assert table[2, "request 1", "accuracy"] == pytest.approx(ask[two, "forget"][turn == 0].mean())

    def level(role: str, name: str, kept: np.ndarray) -> float:
        right = evidence.scores(role, f"continual/{name}", "token")
        probability = np.array([np.exp(np.mean(v["logprob"])) for v in right])[kept].mean()
        match = np.array([np.mean(v["match"]) for v in right])[kept].mean()
        return (probability * match * ask[role, name][kept].mean()) ** (1 / 3)

    every = np.ones(len(ask[one, "retain"]), dtype=bool)
    useful = max(0, 1 - abs(level(two, "retain", every) / level("retrained", "retain", every) - 1))
    assert table[2, "retain", "retained utility"] == pytest.approx(useful)
    for i, role, kept in ((1, one, turn == 0), (2, two, turn >= 0)):
        reference = level("retrained", "forget", kept)
        forgotten = max(0, 1 - abs(level(role, "forget", kept) / reference - 1)) if reference else np.nan
        assert table[i, "requests so far", "forget degree"] == pytest.approx(forgotten, nan_ok=True)
    assert finding.question == Question.UTILITY
    assert finding.decides == (False, False)
    assert finding.sides == (Side.NEITHER, Side.NEITHER)


def test_it_runs_by_name_only_and_on_the_original():
    case = tiny_case()
    assert "--only" in (Continual().missing(case) or "")
    assert "original" in (Continual().missing(tiny_case({"target": "original"}, SETS, only="continual")) or "")
    assert Continual().stages(case, open_target("original", "target")) == []
    stages = Continual().stages(case, open_target("original", "original"))
    assert len({s.recipe for s in stages}) == len(stages) == 2
