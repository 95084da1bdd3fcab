"""From findings to a verdict: every rule reached, and every way in which `deleted` must not be."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audit.contrast import ALPHA
from audit.record import Control, Finding, Label, NotRun, Outcome, Question, Side
from audit.verdict import KNOWLEDGE, OPEN_SHARE, RULES, STATEMENTS, conclude, gather, judge

REMAINS_BEYOND = (Side.REMAINS, Side.BEYOND)
SEES = Control(name="positive control", description="retain", estimate=0.9, passed=True, gates="silence")
BLIND = SEES.model_copy(update={"estimate": 0.0, "passed": False})
UNFAIR = Control(name="bag of words", description="words", estimate=0.9, passed=False, gates="evidence")
FAIR = UNFAIR.model_copy(update={"estimate": 0.5, "passed": True})


def finding(name: str = "x", question: Question = Question.LEAKAGE, **values: Any) -> Finding:
    """By default silent: nothing there, tightly measured, by an instrument that can see."""
    given = {
        "id": f"tool/{name}",
        "instrument": "tool",
        "question": question,
        "statistic": "accuracy",
        "split": "forget vs holdout",
        "estimate": 0.0,
        "ci95": (-0.05, 0.05),
        "n": 40,
        "orientation": "more is left",
        "null": "as never taught",
        "p_value": 0.9,
        "smallest_p": 1e-4,
        "threshold": 0.1,
        "controls": [SEES],
        "reference": "nobody 2024",
    }
    return Finding(**given | values)


def loud(name: str = "x", question: Question = Question.LEAKAGE, **values: Any) -> Finding:
    return finding(name, question, **{"estimate": 0.3, "ci95": (0.2, 0.4), "p_value": 1e-4} | values)


def pushed(name: str = "x", question: Question = Question.LEAKAGE, **values: Any) -> Finding:
    return loud(name, question, **{"estimate": -0.3, "ci95": (-0.4, -0.2)} | values)


def unclear(name: str = "x", question: Question = Question.LEAKAGE, **values: Any) -> Finding:
    return finding(name, question, **{"ci95": (-0.3, 0.3)} | values)


def one(**values: Any) -> Finding:
    [judged] = judge([finding(**values)])
    return judged


def verdict_of(*findings: Finding, not_run: tuple[NotRun, ...] = ()) -> Label:
    return conclude(judge(findings), not_run).label


def silent_everywhere() -> dict[Question, Finding]:
    return {q: finding(q.value, q) for q in KNOWLEDGE}


# --- one finding


E, N, I = Outcome.EVIDENCE, Outcome.NONE, Outcome.INCONCLUSIVE  # noqa: E741
UP = {"estimate": 0.3, "ci95": (0.2, 0.4), "p_value": 1e-4}
DOWN = {"estimate": -0.3, "ci95": (-0.4, -0.2), "p_value": 1e-4}
DAMAGE = (Side.NEITHER, Side.DAMAGE)
PRIVLEAK = {"sides": (Side.BEYOND, Side.REMAINS), "threshold": 20.0}
TABLE = [
    # what, values, outcome, side, a word of the reason
    ("more than never taught", UP, E, Side.REMAINS, "p = 0.0001"),
    ("less than never taught", DOWN, E, Side.BEYOND, "p = 0.0001"),
    ("exactly at level and threshold", {"estimate": 0.1, "ci95": (0.01, 0.2), "p_value": ALPHA}, E, Side.REMAINS, ""),
    ("just above the level", UP | {"p_value": 0.0101}, I, Side.NEITHER, "not ruled out"),
    ("significant but small", {"estimate": 0.04, "ci95": (0.02, 0.06), "p_value": 1e-4}, N, Side.NEITHER, "excludes"),
    ("significant, small, but not surely", {"estimate": 0.08, "ci95": (0.04, 0.12), "p_value": 1e-4}, I,
     Side.NEITHER, "0.12"),
    ("against an AUC's null", {"estimate": 0.65, "ci95": (0.6, 0.7), "null_value": 0.5, "p_value": 1e-4}, E,
     Side.REMAINS, ""),
    ("an AUC below its null", {"estimate": 0.35, "ci95": (0.3, 0.4), "null_value": 0.5, "p_value": 1e-4}, E,
     Side.BEYOND, ""),
    ("an AUC near its null", {"estimate": 0.5, "ci95": (0.41, 0.59), "null_value": 0.5}, N, Side.NEITHER, ""),
    ("an AUC not near enough", {"estimate": 0.5, "ci95": (0.39, 0.61), "null_value": 0.5}, I, Side.NEITHER, "0.11"),
    ("utility lost", DOWN | {"sides": DAMAGE}, E, Side.DAMAGE, ""),
    ("utility gained", UP | {"sides": DAMAGE}, N, Side.NEITHER, "no cause for alarm"),
    ("utility kept, perhaps improved", {"ci95": (-0.04, 0.5), "sides": DAMAGE}, N, Side.NEITHER, ""),
    ("utility perhaps lost", {"ci95": (-0.5, 0.04), "sides": DAMAGE}, I, Side.NEITHER, "0.5"),
    ("PrivLeak: still looks like training data", {"estimate": -60.0, "ci95": (-70, -50), "p_value": 1e-4} | PRIVLEAK,
     E, Side.REMAINS, ""),
    ("PrivLeak: less seen than unseen", {"estimate": 60.0, "ci95": (50, 70), "p_value": 1e-4} | PRIVLEAK,
     E, Side.BEYOND, ""),
    ("PrivLeak: silent; only its lower end alarms", {"estimate": 5.0, "ci95": (-15, 90)} | PRIVLEAK, N, Side.NEITHER,
     ""),
    ("PrivLeak: unclear below", {"estimate": 5.0, "ci95": (-25, 15)} | PRIVLEAK, I, Side.NEITHER, "25"),
    ("a damaged side does not break silence", {"ci95": (-0.9, 0.05)}, N, Side.NEITHER, ""),
    ("upper end at the threshold", {"ci95": (-0.05, 0.1)}, I, Side.NEITHER, "not ruled out"),
    ("upper end below it", {"ci95": (-0.05, 0.0999)}, N, Side.NEITHER, "excludes"),
    ("no alarm on either side: both ends count", {"ci95": (-0.2, 0.05), "sides": (Side.NEITHER, Side.NEITHER)}, I,
     Side.NEITHER, "0.2"),
    ("a bound over layers, within", {"ci95": (-0.1, 0.2), "bound": 0.09}, N, Side.NEITHER, ""),
    ("a bound over layers, beyond", {"ci95": (-0.1, 0.05), "bound": 0.3}, I, Side.NEITHER, "0.3"),
    ("unfair split forbids evidence", UP | {"controls": [SEES, UNFAIR]}, I, Side.NEITHER, "bag of words"),
    ("a fair split does not", UP | {"controls": [SEES, FAIR]}, E, Side.REMAINS, ""),
    ("a blind instrument may still find", UP | {"controls": [BLIND]}, E, Side.REMAINS, ""),
    ("a blind instrument is not silent", {"controls": [BLIND]}, I, Side.NEITHER, "positive control"),
    ("an unfair split may still be silent", {"controls": [SEES, UNFAIR]}, N, Side.NEITHER, ""),
    ("a control recorded for comparison gates nothing",
     UP | {"controls": [SEES, UNFAIR.model_copy(update={"passed": None})]}, E, Side.REMAINS, ""),
    ("a failed control that gates nothing", {"controls": [SEES, UNFAIR.model_copy(update={"gates": None})]}, N,
     Side.NEITHER, ""),
    ("within the numeric noise", UP | {"noise": 0.31}, I, Side.NEITHER, "numeric noise"),
    ("as large as the noise", UP | {"noise": 0.3}, I, Side.NEITHER, "numeric noise"),
    ("above the noise", UP | {"noise": 0.29}, E, Side.REMAINS, ""),
    ("too few entities for any test", UP | {"p_value": 0.03, "smallest_p": 0.03, "n": 4}, I, Side.NEITHER,
     "4 independent entities"),
    ("no test at all", UP | {"p_value": None}, I, Side.NEITHER, "not ruled out"),
    ("nothing never taught to compare with",
     {"p_value": None, "controls": [UNFAIR.model_copy(update={"name": "never-taught control"})]}, I, Side.NEITHER,
     "never-taught control"),
    ("no estimate", {"estimate": None}, I, Side.NEITHER, "could not be computed"),
    ("not a number", {"estimate": float("nan")}, I, Side.NEITHER, "could not be computed"),
    ("no lower end", UP | {"ci95": (None, 0.4)}, I, Side.NEITHER, "could not be computed"),
    ("no upper end", UP | {"ci95": (0.2, float("inf"))}, I, Side.NEITHER, "could not be computed"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "outcome", "side", "word"), [row[1:] for row in TABLE], ids=[r[0] for r in TABLE])
def test_one_finding(values, outcome, side, word):
    judged = one(**values)
    assert (judged.verdict, judged.side) == (outcome, side), judged.reason
    assert word in judged.reason
    assert judged.reason


def test_silence_needs_a_positive_control_that_passed():
    # audit.verdict: none "if ... its positive control passed, so that it had the power to see"
    assert one(controls=[]).verdict == Outcome.INCONCLUSIVE
    assert one(controls=[SEES.model_copy(update={"passed": None})]).verdict == Outcome.INCONCLUSIVE


def test_silence_within_the_numeric_noise_is_inconclusive():
    assert one(noise=0.2).verdict == Outcome.INCONCLUSIVE


def test_holm_corrects_within_a_question_only():
    # Four tests in one question: the smallest p is multiplied by 4, and 0.003 no longer reaches 0.01.
    group = [loud(str(i), p_value=p) for i, p in enumerate((0.003, 0.2, 0.3, 0.4))]
    judged = judge(group)
    assert judged[0].p_adjusted == pytest.approx(0.012)
    assert judged[0].verdict == Outcome.INCONCLUSIVE
    # The same four, each answering another question, are one test each.
    apart = [f.model_copy(update={"question": q}) for f, q in zip(group, Question, strict=False)]
    judged = judge(apart)
    assert [f.p_adjusted for f in judged] == pytest.approx([0.003, 0.2, 0.3, 0.4])
    assert judged[0].verdict == Outcome.EVIDENCE


def test_holm_by_hand():
    # Sorted 0.001, 0.004, 0.02 times 3, 2, 1: 0.003, 0.008, 0.02; monotone. An untested finding is not counted.
    values = [0.02, None, 0.001, 0.004]
    judged = judge([loud(str(i), p_value=p) for i, p in enumerate(values)])
    assert [f.p_adjusted for f in judged] == [pytest.approx(0.02), None, pytest.approx(0.003), pytest.approx(0.008)]
    assert [f.verdict for f in judged] == [I, I, E, E]


def test_judge_keeps_order_and_what_it_does_not_set():
    findings = [loud(f"{i}", q) for i, q in enumerate(itertools.islice(itertools.cycle(Question), 9))]
    judged = judge(findings)
    assert [f.id for f in judged] == [f.id for f in findings]
    own = {"p_adjusted", "verdict", "side", "reason"}
    assert [f.model_dump(exclude=own) for f in judged] == [f.model_dump(exclude=own) for f in findings]
    assert judge([]) == []


numbers = st.floats(-1, 1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(numbers, min_size=3, max_size=3).map(sorted),
    st.one_of(st.none(), st.floats(0, 1)),
    st.sampled_from([REMAINS_BEYOND, (Side.BEYOND, Side.REMAINS), DAMAGE]),
    st.sampled_from([[], [SEES], [BLIND], [UNFAIR], [BLIND, UNFAIR]]),
    st.floats(0, 0.2),
)
def test_a_finding_is_never_more_than_it_can_be(ends, p, sides, controls, noise):
    lo, estimate, hi = ends
    judged = one(estimate=estimate, ci95=(lo, hi), p_value=p, sides=sides, controls=controls, noise=noise)
    if judged.verdict == Outcome.EVIDENCE:
        assert p is not None
        assert p <= ALPHA
        assert abs(estimate) >= judged.threshold
        assert UNFAIR not in controls
        assert judged.side == sides[0 if estimate > 0 else 1]
    else:
        assert judged.side == Side.NEITHER
    harmless = sides == DAMAGE and p is not None and p <= ALPHA and estimate >= judged.threshold
    if judged.verdict == Outcome.NONE and not harmless:
        assert BLIND not in controls
        alarming = hi if sides[0] == Side.REMAINS else -lo
        assert alarming < judged.threshold


# --- the whole


def test_not_unlearned():
    # A known fact's effect is 0.9; the target shows 0.5, more than half of it.
    findings = [loud(estimate=0.5, ci95=(0.4, 0.6))]
    found = conclude(judge(findings), [])
    assert found.label == Label.NOT_UNLEARNED
    assert found.statement == STATEMENTS[Label.NOT_UNLEARNED]
    assert "56%" in found.reasons[0]


def test_the_open_share_is_a_median_over_the_output_alone():
    weak, strong = loud("weak", estimate=0.3, ci95=(0.2, 0.4)), loud("strong", estimate=0.8, ci95=(0.7, 0.9))
    assert gather(judge([weak, strong, strong.model_copy(update={"id": "tool/s"})])).open_share == pytest.approx(8 / 9)
    assert gather(judge([weak, strong])).open_share == pytest.approx((3 + 8) / 18)
    inside = loud("inside", Question.REPRESENTATION, estimate=0.9, ci95=(0.8, 1.0))
    assert gather(judge([weak, inside])).open_share == pytest.approx(3 / 9)
    # Neither a blind statistic nor one whose orientation is inverted has a share.
    blind = strong.model_copy(update={"id": "tool/blind", "controls": [BLIND]})
    inverted = pushed("inverted", sides=(Side.BEYOND, Side.REMAINS), estimate=-0.8, ci95=(-0.9, -0.7))
    assert gather(judge([weak, blind, inverted])).open_share == pytest.approx(3 / 9)
    assert gather(judge([inside])).open_share is None


def test_the_open_share_counts_from_the_null():
    seen = SEES.model_copy(update={"estimate": 1.0})
    auc = loud(estimate=0.75, ci95=(0.7, 0.8), null_value=0.5, controls=[seen])
    assert gather(judge([auc])).open_share == pytest.approx(0.5)
    assert OPEN_SHARE == 0.5
    assert verdict_of(auc) == Label.NOT_UNLEARNED
    assert verdict_of(auc.model_copy(update={"estimate": 0.74})) == Label.SUPPRESSED


@pytest.mark.parametrize("question", KNOWLEDGE)
def test_suppressed_by_evidence_from_any_one_question(question):
    findings = silent_everywhere() | {question: loud("found", question)}
    found = conclude(judge(list(findings.values())), [])
    assert found.label == Label.SUPPRESSED
    assert any("tool" in reason for reason in found.reasons)


@pytest.mark.parametrize("question", [Question.TRACE, Question.UTILITY])
def test_neither_a_trace_nor_damage_is_knowledge(question):
    sides = REMAINS_BEYOND if question == Question.TRACE else DAMAGE
    assert verdict_of(*silent_everywhere().values(), pushed("edit", question, sides=sides)) == Label.DELETED


def test_suppressed_wins_over_beyond():
    # Pushed below the never-taught on the surface, and found inside: hidden, not gone.
    found = conclude(judge([pushed("surface"), loud("inside", Question.REPRESENTATION)]), [])
    assert found.label == Label.SUPPRESSED
    assert any("below what was never taught" in reason for reason in found.reasons)


def test_right_answers_avoided_are_over_unlearning():
    # Only a model that was driven away from each right answer passes over them more often than guessing would.
    avoided = pushed("choice", decides=(True, True))
    assert verdict_of(*silent_everywhere().values(), avoided) == Label.OVER_UNLEARNED
    assert verdict_of(avoided, loud("inside", Question.REPRESENTATION)) == Label.SUPPRESSED


def test_what_an_edit_of_the_output_does_too_decides_nothing_alone():
    familiar = loud("likelihood", decides=(False, False))
    found = conclude(judge([*silent_everywhere().values(), familiar]), [])
    assert found.label == Label.INCONCLUSIVE
    assert "an edit of the output does this too" in found.reasons[0]
    beside = conclude(judge([familiar, loud("inside", Question.REPRESENTATION)]), [])
    assert beside.label == Label.SUPPRESSED
    assert any("familiar" in reason for reason in beside.reasons)


def test_an_edited_output_over_a_deletion_needs_the_pace_of_new_facts():
    surface = pushed("surface")
    found = conclude(judge([*silent_everywhere().values(), surface]), [])
    assert found.label == Label.DELETED
    assert any("was edited" in reason for reason in found.reasons)
    slow = finding("slow", Question.RECOVERY, ci95=(-0.11, 0.01), estimate=-0.05)
    assert verdict_of(*silent_everywhere().values(), surface, slow) == Label.INCONCLUSIVE


def test_fitted_thresholds_set_what_is_evidence_and_not_what_is_silence():
    assert one(estimate=0.3, ci95=(0.2, 0.4), p_value=1e-4, fitted=(0.35, 0.01)).verdict == Outcome.INCONCLUSIVE
    assert one(estimate=-0.06, ci95=(-0.09, -0.03), p_value=1e-4, fitted=(0.35, 0.05)).side == Side.BEYOND
    assert one(estimate=0.06, ci95=(0.03, 0.09), p_value=1e-4, fitted=(0.05, 0.05)).verdict == Outcome.EVIDENCE
    assert one(estimate=0.06, ci95=(0.03, 0.09), p_value=1e-4).verdict == Outcome.NONE
    assert one(fitted=(0.01, 0.01)).verdict == Outcome.NONE


def test_an_edited_output_that_lags_under_attack_settles_nothing():
    # A deletion with a refusal on top lags too, so this is no over-unlearning; nor can it be called deleted.
    surface, lag = pushed("surface"), pushed("pace", Question.RECOVERY)
    found = conclude(judge([*silent_everywhere().values(), surface, lag]), [])
    assert found.label == Label.INCONCLUSIVE
    assert "it lags: tool" in found.reasons[0]
    assert verdict_of(surface) == verdict_of(lag) == Label.INCONCLUSIVE


def test_what_decides_nothing_opens_no_gap_and_closes_none():
    pace = unclear("pace", Question.RECOVERY, decides=(False, False), ci95=(-0.05, 0.12))
    assert verdict_of(*silent_everywhere().values(), pace) == Label.DELETED
    alone = {q: f for q, f in silent_everywhere().items() if q != Question.RECOVERY}
    silent = finding("pace", Question.RECOVERY, decides=(False, False))
    assert verdict_of(*alone.values(), silent) == Label.INCONCLUSIVE


def test_deleted_says_what_would_have_been_caught():
    found = conclude(judge(list(silent_everywhere().values())), [])
    assert found.label == Label.DELETED
    for question in KNOWLEDGE:
        assert f"tool/{question.value} 0.1" in found.statement
    assert "never saw the data, by these tests" in found.statement


@pytest.mark.parametrize("question", KNOWLEDGE)
def test_deleted_needs_silence_in_every_question(question):
    findings = silent_everywhere()
    findings.pop(question)
    found = conclude(judge(list(findings.values())), [])
    assert found.label == Label.INCONCLUSIVE
    assert any(question.value in reason for reason in found.reasons)


@pytest.mark.parametrize("question", KNOWLEDGE)
@pytest.mark.parametrize("spoiled", [{"controls": [BLIND]}, {"ci95": (-0.3, 0.3)}, {"estimate": None}])
def test_deleted_needs_every_question_to_have_been_able_to_see(question, spoiled):
    findings = silent_everywhere() | {question: finding("spoiled", question, **spoiled)}
    assert verdict_of(*findings.values()) == Label.INCONCLUSIVE


INSIDE = pytest.mark.parametrize("question", [Question.REPRESENTATION, Question.RECOVERY])


@INSIDE
@pytest.mark.parametrize(
    "spoiled",
    [
        {"ci95": (-0.3, 0.46)},  # half of what known facts show, 0.9, is not excluded
        {"estimate": 0.15, "ci95": (0.02, 0.3), "p_value": 0.02},  # a hint, though no evidence
        {"ci95": (-0.3, 0.3), "controls": [BLIND]},
        {"ci95": (-0.05, 0.05), "controls": [BLIND]},
        {"ci95": (-0.3, 0.3), "controls": [SEES.model_copy(update={"passed": None})]},
        {"estimate": None},
    ],
)
def test_one_inconclusive_test_inside_or_under_attack_is_a_gap(question, spoiled):
    found = conclude(judge([*silent_everywhere().values(), unclear("half-blind", question, **spoiled)]), [])
    assert found.label == Label.INCONCLUSIVE
    assert any("half-blind" in reason for reason in found.reasons)
    assert any("half-blind" in limit for limit in found.limits)


@INSIDE
def test_a_test_too_wide_for_its_threshold_alone_is_no_gap_but_is_said(question):
    found = conclude(judge([*silent_everywhere().values(), unclear("wide", question)]), [])
    assert found.label == Label.DELETED
    assert any("wide" in limit for limit in found.limits)
    alone = silent_everywhere() | {question: unclear("wide", question)}
    assert verdict_of(*alone.values()) == Label.INCONCLUSIVE


def test_never_deleted_where_relearning_lags():
    assert verdict_of(*silent_everywhere().values(), pushed("edit", Question.RECOVERY)) == Label.INCONCLUSIVE


@pytest.mark.parametrize("question", [*KNOWLEDGE, None])
def test_never_deleted_with_an_instrument_that_crashed(question):
    crashed = NotRun(instrument="knowledge", question=question, reason="ValueError: x", failed=True)
    assert verdict_of(*silent_everywhere().values(), not_run=(crashed,)) != Label.DELETED


def test_an_instrument_that_lacked_an_input_is_said_and_does_not_forbid():
    lacked = NotRun(instrument="probe", question=Question.REPRESENTATION, reason="needs a retrained model")
    found = conclude(judge(list(silent_everywhere().values())), [lacked])
    assert found.label == Label.DELETED
    assert "not run: probe" in found.coverage[Question.REPRESENTATION]


def test_nothing_tested_is_inconclusive():
    found = conclude([], [])
    assert found.label == Label.INCONCLUSIVE
    assert len(found.reasons) == len(KNOWLEDGE)
    assert set(found.coverage) == set(Question)
    assert all("not tested" in text for text in found.coverage.values())
    assert found.false_positive_rate.estimate is None
    assert found.false_positive_rate.basis


def test_coverage_counts_every_outcome_and_every_absence():
    findings = judge([loud("a"), finding("b"), unclear("c"), unclear("d")])
    absent = [NotRun(instrument="probe", question=Question.LEAKAGE, reason="x")]
    found = conclude(findings, absent, ["said before"])
    assert found.coverage[Question.LEAKAGE] == (
        "4 statistics by 1 instruments: 1 with evidence, 1 silent, 2 inconclusive; not run: probe"
    )
    assert found.limits[0] == "said before"
    assert "tool/c, tool/d" in found.limits[1]


def test_every_label_has_a_rule_and_the_last_always_applies():
    assert {rule.label for rule in RULES} == set(Label) == set(STATEMENTS)
    assert RULES[-1].label == Label.INCONCLUSIVE
    assert RULES[-1].applies(gather([]))


kinds = st.sampled_from([finding, loud, pushed, unclear])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(kinds, st.sampled_from(list(KNOWLEDGE))), max_size=8))
def test_any_mixture_gets_one_verdict_and_deleted_only_from_silence(made):
    findings = judge([make(f"{i}", question) for i, (make, question) in enumerate(made)])
    found = conclude(findings, [])
    assert found.reasons or found.label == Label.INCONCLUSIVE
    outcomes = {q: [f for f in findings if f.question == q] for q in KNOWLEDGE}
    if found.label == Label.DELETED:
        assert all(any(f.verdict == Outcome.NONE for f in group) for group in outcomes.values())
        assert not any(f.side == Side.REMAINS for f in findings)
    if found.label in (Label.NOT_UNLEARNED, Label.SUPPRESSED):
        assert any(f.side == Side.REMAINS for f in findings)
