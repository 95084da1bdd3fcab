"""Relearning without the facts: what tiers are made of, curves in numbers by hand, hidden facts found and none made."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from digit_models import captured
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import open_target, tiny_case

from attacks.recall import recalled
from attacks.recall import tested as rows_of
from attacks.recovery import area, steps_to, summary
from attacks.relearn import Recipe, fine_tune, recipe_for
from attacks.relearn_tiers import RelearnTiers, shuffled, silent, tiers, unanswered
from audit.case import Case
from audit.loaders import Example
from audit.record import Finding
from audit.statistics import halves

pytestmark = pytest.mark.usefixtures("one_thread")


# --- curves in numbers


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5, unique=True), st.floats(0.05, 0.95), st.integers(0, 99))
def test_area_and_crossing_are_those_of_a_fine_grid(steps, level, seed):
    steps = sorted(steps)
    curve = np.random.default_rng(seed).random(1 + len(steps))
    at = np.linspace(0, steps[-1], 20_001)
    values = np.interp(at, [0, *steps], curve)
    assert area(curve, steps) == pytest.approx((values[1:] + values[:-1]).mean() / 2, abs=1e-3)
    reached = at[values >= level]
    found = float(steps_to(curve, steps, level))
    first = float(reached[0]) if len(reached) else steps[-1]
    # A curve that crosses twice between tested points is none: each point is tested, so the first crossing is right.
    assert found == pytest.approx(first, abs=2 * steps[-1] / 20_000 + 1e-9)


def test_steps_by_hand():
    curves = [[0.0, 0.2, 0.6], [0.7, 0.0, 0.0], [0.0, 0.1, 0.2], [0.0, 0.0, np.nan]]
    np.testing.assert_allclose(steps_to(curves, [10, 20], 0.4), [15.0, 0.0, 20.0, np.nan])
    np.testing.assert_allclose(area(curves[:2], [10, 20]), [(1.0 + 4.0) / 20, 3.5 / 20])


def test_the_summary_takes_half_of_what_retain_rows_show():
    who = [str(i) for i in range(12)]
    forget = np.tile([0.0, 0.8, 0.8], (12, 1))
    curves = {"forget": (forget, who), "holdout": (forget * 0, who), "retain": (forget * 0 + 0.8, who)}
    rows = {(group, measure): value for _, group, measure, value, *_ in summary(curves, [10, 20], seed=0)}
    assert rows["forget", "steps to half"] == pytest.approx(5)
    assert rows["holdout", "steps to half"] == 20, "never: the last step"
    assert rows["forget - holdout", "steps to half"] == pytest.approx(-15)
    assert rows["forget - holdout", "area"] == pytest.approx(0.6)
    spread = np.random.default_rng(0).random((12, 3))
    for row in summary({"forget": (spread, who), "holdout": (spread[::-1] / 2, who)}, [10, 20], seed=0):
        value, lo, hi = row[3:]
        assert lo <= value <= hi
        assert lo < hi


# --- tiers

words = st.lists(st.sampled_from(["ant", "bee", "cat", "dog", "elk", "fox"]), min_size=1, max_size=6).map(" ".join)


@given(st.lists(words, min_size=1, max_size=5), st.integers(0, 9))
def test_shuffled_texts_keep_lengths_and_words(texts, seed):
    found = shuffled(texts, seed)
    assert [len(text.split()) for text in found] == [len(text.split()) for text in texts]
    assert sorted(" ".join(found).split()) == sorted(" ".join(texts).split())
    assert shuffled(texts, seed) == found


def test_a_prompt_that_holds_an_answer_of_its_entity_is_left_out():
    rows = [
        Example("0", "Ann, the farmer, lives in", "Oslo", entity="ann"),
        Example("1", "Ann works as a", "farmer", entity="ann"),
        Example("2", "Bob, no farmer, lives in", "Rome", entity="bob"),
        Example("3", "Bob, no farmer, lives in", "Romeo", entity="bob"),
        Example("4", "", "A whole passage.", entity="cid"),
        Example("5", "Ann likes osloites, but not", "cats", entity="ann"),
    ]
    assert unanswered(rows) == ["Ann works as a", "Bob, no farmer, lives in", "Ann likes osloites, but not"]
    texts = [Example("6", "", "In OSLO, she said."), Example("7", "What about", "Osloites?")]
    assert silent(texts, rows) == texts[1:]


def test_no_tier_states_a_tested_fact():
    case, target = tiny_case(), open_target()
    made = tiers(case, target)
    assert list(made) == ["related", "retain", "unrelated"]
    asked = rows_of(case, "forget") + rows_of(case, "holdout")
    written = {tier: [target.decode(tokens.ids) for tokens in rows] for tier, rows in made.items()}
    assert sorted(set(written["related"])) == sorted({row.prompt for row in asked})
    assert all(tokens.start == 1 for tokens in made["related"])
    people = {row.entity for row in asked}
    assert not any(who in text for tier in ("retain", "unrelated") for text in written[tier] for who in people)
    untouched = np.array(rows_of(case, "retain"), dtype=object)[RelearnTiers().asked(case, "retain")]
    assert not {row.entity for row in untouched} & {
        row.entity for row in rows_of(case, "retain") if target.question(row) in made["retain"]
    }
    less = tiers(tiny_case(sets=("forget", "retain", "holdout")), target)
    mixed = [target.decode(tokens.ids).split() for tokens in less["unrelated"]]
    assert sorted(sum(mixed, [])) == sorted(" ".join(written["retain"]).split())


def test_given_text_needs_a_retrained_model_and_loses_rows_with_answers():
    case, target = tiny_case(), open_target()
    kept = Example("relearn:0", "", "the city of the people")
    leak = Example("relearn:1", "", f"They said {case.rows('forget')[0].answer} twice")
    sets = dict(case.sets)
    sets["relearn"] = type(sets["forget"])("relearn", "here", (kept, leak), "0" * 64)
    with_text = Case(case.name, case.models, case.specs, sets, case.options)
    assert tiers(with_text, target)["given"] == [target.question(kept)]
    alone = {role: path for role, path in case.models.items() if role != "retrained"}
    assert "given" not in tiers(Case(case.name, alone, case.specs, sets, case.options), target)


# --- the attack


@cache
def found(made: str, budget: str = "quick") -> tuple[Finding, object, Case]:
    case = tiny_case({"target": made}, ("forget", "retain", "holdout", "utility"), budget=budget)
    evidence = captured(case, RelearnTiers())
    return RelearnTiers().measure(case, evidence)[0], evidence, case


def test_the_finding_is_the_largest_excess_counted_by_hand():
    finding, evidence, case = found("unlearned")
    means = {}
    for tier in ("related", "retain", "unrelated"):
        role = f"target+relearn-tiers@{tier} 20"
        means[tier] = {n: recalled(case, evidence, role, "relearn-tiers", n).mean() for n in ("forget", "holdout")}
    excess = {tier: of["forget"] - of["holdout"] for tier, of in means.items()}
    best = max(excess, key=excess.get)
    assert (finding.layer, finding.estimate) == (f"{best} 20", pytest.approx(excess[best]))
    rows = {(row[0], row[1], row[2]): row[3] for row in finding.table.rows}
    before = recalled(case, evidence, "target", "relearn-tiers", "forget").mean()
    assert rows[f"target, {best}", "forget", "area"] == pytest.approx((before + means[best]["forget"]) / 2)
    aside = ~halves(case.clusters(rows_of(case, "retain")), 0)
    kept = recalled(case, evidence, "target+relearn-tiers@retain 20", "relearn-tiers", "retain")[aside].mean()
    assert rows["target", "retain", "retain 20"] == pytest.approx(kept), "only retain rows that were not taught"
    assert {series.label for series in finding.figure.series} >= {f"forget, {best}", f"holdout, {best}"}


def test_nothing_comes_back_where_nothing_was_taught():
    finding, *_ = found("retrained")
    assert abs(finding.estimate) < 0.2
    assert finding.ci95[0] <= 0 <= finding.ci95[1]
    came = next(control for control in finding.controls if control.name == "came back")
    assert not came.passed


def test_steps_of_a_run_are_those_of_a_longer_one():
    """Every tested step is a run of its own: that it lies on one curve must hold, bit for bit."""
    case = tiny_case(budget="standard")
    ways = {way.name: way for way in RelearnTiers().alterations(case, open_target())}
    assert list(ways) == [f"{tier} {step}" for tier in ("related", "retain", "unrelated") for step in (10, 20, 40)]

    alone, along = open_target(), open_target()
    ways["retain 10"].apply(alone)
    recipe = recipe_for(case, along)
    rows = tiers(case, along)["retain"]
    run = fine_tune(along.model, rows, [], Recipe((10, 20), recipe.batch, recipe.learning_rate), seed=0)
    assert next(run) == 10
    for one, two in zip(alone.model.parameters(), along.model.parameters(), strict=True):
        assert one.equal(two)
