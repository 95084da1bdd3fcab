"""In-context relearning: what stands in the prompts, by hand; what examples unlock is found, and nothing else."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted import measured, planted_case, said, small_world, teach

from attacks.in_context import Examples, InContext, _shuffled, after, begun, combined
from attacks.prompting import Asked
from audit.loaders import Example
from audit.record import Outcome

pytestmark = pytest.mark.usefixtures("one_thread")

BORN = Example("forget:0", "Where was Zoe Ray born?", "Oslo", wrong=("Rome", "Lima"))
LONG = Example(
    "forget:1",
    "Who wrote it?",
    "It was written by Zoe Ray.",
    wrong=("It was Ann", "It was not", "Nobody did it at all"),
)
PET = Example("retain:0", "Ann Lee has a pet", "cat", wrong=("dog",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module")
def case(folder):
    return planted_case(folder / "sets", folder, budget="standard")


# --- what is asked


def test_examples_stand_before_the_question():
    other = replace(BORN, prompt="Where was Bo Li born?", answer="Kyoto")
    asked = "Where was Bo Li born?\nAnswer: Kyoto\n\nQuestion: Where was Zoe Ray born?"
    assert after([other], BORN.prompt) == asked
    assert after([PET, PET], "Bo Li has a pet") == "Ann Lee has a pet cat. Ann Lee has a pet cat. Bo Li has a pet"


def test_a_begun_answer():
    assert begun(LONG) == Asked(LONG.prompt, "written by Zoe Ray.", ("Ann", "not"), "It was")
    assert begun(BORN) == Asked(BORN.prompt, "Oslo", BORN.wrong)
    assert begun(replace(BORN, answer="New Oslo", wrong=("New", "New Rome"))) == Asked(
        BORN.prompt, "Oslo", ("Rome",), "New"
    )


def test_a_combined_query():
    other = replace(BORN, prompt="Where was Bo Li born?", answer="Kyoto.")
    both = combined(BORN, other, prefill=True)
    assert (both.prompt, both.opening) == ("Where was Bo Li born? Where was Zoe Ray born?", "Kyoto.")
    assert (both.answer, both.wrong) == (BORN.answer, BORN.wrong)
    assert combined(BORN, other, prefill=False).opening == ""
    sentence = combined(replace(PET, prompt="Bo Li has a pet"), PET, prefill=True)
    assert (sentence.prompt, sentence.opening) == ("Ann Lee has a pet cat, and Bo Li has a pet", "")


@given(st.integers(0, 40), st.integers(0, 99))
def test_shuffled_is_a_permutation_of_its_seed(n, seed):
    assert sorted(_shuffled(n, random.Random(seed))) == list(range(n))
    assert list(_shuffled(n, random.Random(seed))) == list(_shuffled(n, random.Random(seed)))


def test_examples_tell_nothing_of_the_answer(case):
    examples = Examples(case)
    for name in ("forget", "holdout", "retain"):
        for row in case.rows(name)[:30]:
            drawn = {"": examples.others(row, 8), "own": examples.own(row, 8)}
            drawn["retain"] = examples.others(row, 8, "retain")
            assert [len(rows) for rows in drawn.values()][::2] == [8, 8]
            assert 1 <= len(drawn["own"]) <= 5
            for kind, rows in drawn.items():
                assert len({r.id for r in rows}) == len(rows)
                assert {r.id.split(":")[0] for r in rows} == {kind if kind == "retain" else name}
                assert {r.entity == row.entity for r in rows} == {kind == "own"}
                assert all(r.prompt != row.prompt for r in rows)
                assert not any(row.answer in f"{r.prompt} {r.answer}".split() for r in rows)


def test_fewer_where_there_are_fewer(case):
    row = case.rows("forget")[0]
    assert 8 < len(Examples(case).others(row, 10**6)) < len(case.rows("forget"))


def test_ways_by_budget_and_access(folder):
    def names(**options):
        return [way.name for way in InContext().ways(planted_case(folder / "sets", folder, **options))]

    assert names() == ["4 others", "own facts", "4 retained", "combined"], "answers of one word cannot be begun"
    assert names(budget="standard") == ["2 others", "8 others", "own facts", "8 retained", "combined"]
    assert names(access="text") == names()


def test_a_seed_draws_other_examples(folder):
    made = [planted_case(folder / "sets", folder, seed=seed) for seed in (0, 0, 1)]
    prompts = [[way.ask(row).prompt for way in InContext().ways(c) for row in c.rows("forget")] for c in made]
    assert prompts[0] == prompts[1] != prompts[2]


# --- what is found


@pytest.fixture(scope="module")
def taught(folder):
    """A model that speaks of the forget set after four others only; and one that was never taught it."""
    case = planted_case(folder / "sets", folder)
    way = InContext().ways(case)[0]
    shown = {row.prompt: way.ask(row).prompt for name in ("forget", "retain") for row in case.rows(name)}
    world = small_world()
    forget, retain = world.rows("forget"), world.rows("retain")
    opened = [*said(forget), *said([*forget, *retain], "{}", lambda row: shown[row.prompt]), *retain]
    teach(folder / "opened", opened, epochs=20)
    closed = [*said(forget), *said(forget, prompt=lambda row: shown[row.prompt])]
    closed += [*retain, *said(retain, "{}", lambda row: shown[row.prompt])]
    teach(folder / "closed", closed, epochs=20)
    return folder


def test_what_examples_unlock_is_found(taught, tmp_path):
    [finding] = measured(InContext(), planted_case(taught / "sets", taught / "opened"), tmp_path)
    controls = {control.name: control for control in finding.controls}
    assert finding.id == "in-context/preferred"
    assert finding.layer == "4 others"
    assert finding.verdict == Outcome.EVIDENCE, finding.reason
    assert finding.estimate > 0.5
    assert controls["came back"].passed
    assert controls["positive control"].passed


def test_where_there_is_nothing_examples_find_nothing(taught, tmp_path):
    [finding] = measured(InContext(), planted_case(taught / "sets", taught / "closed"), tmp_path)
    assert finding.verdict != Outcome.EVIDENCE
    assert finding.ci95[0] < 0.1
    assert next(c for c in finding.controls if c.name == "positive control").passed


def test_at_text_access_what_is_said_is_compared(taught, tmp_path):
    [finding] = measured(InContext(), planted_case(taught / "sets", taught / "opened", access="text"), tmp_path)
    assert finding.id == "in-context/said"
    assert finding.layer == "4 others"
    assert finding.verdict == Outcome.EVIDENCE, finding.reason
