"""Against what was never taught: planted effects found, absent ones not, whatever control the case has."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from audit.case import Case, Options
from audit.contrast import ALPHA, NO_CONTROL, Statistic, against_never_taught
from audit.evidence import Evidence
from audit.instrument import Instrument
from audit.loaders import Example, ExampleSet
from audit.record import Control, Finding, Outcome, Question, Side
from audit.statistics import auc_two_sample, max_over_columns, one_sample, two_sample
from audit.verdict import judge

ENTITIES, ROWS = 20, 3
SHARE = Statistic("share", "share of it", "share", "more of it is left", (0.0, 1.0), 0.1, "nobody 2024")
SCORE = Statistic("score", "score of it", "nats", "more of it is left", None, 0.1, "nobody 2024")


class Stub(Instrument):
    name, title, question, reference = "stub", "stub", Question.LEAKAGE, "nobody 2024"

    def requests(self, case, target):
        return []

    def measure(self, case, evidence):
        return []


def case_of(*sets: str, roles: tuple[str, ...] = (), entities: int = ENTITIES, **options: Any) -> Case:
    def made(name: str) -> ExampleSet:
        rows = [Example(f"{name}:{i}", "q", "a", entity=f"{name} {i // ROWS}") for i in range(entities * ROWS)]
        return ExampleSet(name, "memory", tuple(rows), "0" * 64)

    models = {role: Path(role) for role in ("target", *roles)}
    return Case("stub", models, {}, {name: made(name) for name in sets}, Options(**options))


def values(level: float, seed: int, spread: float = 0.03, columns: int | None = None, entities: int = ENTITIES) -> Any:
    """Rows around a level, entities apart: [rows] or [rows, columns]."""
    rng = np.random.default_rng(seed)
    shape = (entities,) if columns is None else (entities, columns)
    by_entity = rng.normal(level, spread, shape).repeat(ROWS, axis=0)
    return np.clip(by_entity + rng.normal(0, spread, by_entity.shape), 0, 1)


def contrast(scores: dict[tuple[str, str], Any], case: Case, statistic: Statistic = SHARE, **more: Any) -> Finding:
    evidence = more.pop("evidence", Evidence())
    return against_never_taught(Stub(), case, evidence, statistic, lambda role, name: scores[role, name], **more)


def verdict(finding: Finding) -> tuple[Outcome, Side]:
    [judged] = judge([finding])
    return judged.verdict, judged.side


def positive(finding: Finding) -> Control:
    return next(c for c in finding.controls if c.name == "positive control")


KNOWN, UNSEEN = values(0.9, 1), values(0.2, 2)
ALL = ("forget", "retain", "holdout")
PLANTED = {("target", "forget"): values(0.6, 3), ("target", "holdout"): UNSEEN, ("target", "retain"): KNOWN}
ABSENT = PLANTED | {("target", "forget"): values(0.2, 4)}
PUSHED = PLANTED | {("target", "forget"): values(0.03, 5, 0.01)}


# --- the holdout set


def test_holdout_by_hand():
    found = contrast(PLANTED, case_of(*ALL))
    assert found.estimate == pytest.approx(PLANTED["target", "forget"].mean() - UNSEEN.mean())
    assert (found.id, found.split, found.unit, found.null_value) == ("stub/share", "forget vs holdout", "share", 0.0)
    assert found.n == 2 * ENTITIES, "entities, not rows"
    assert found.ci95[0] < found.estimate < found.ci95[1]
    assert found.layer is None
    assert found.bound is None
    assert found.table is not None
    assert [row[:2] for row in found.table.rows] == [["target", name] for name in ("forget", "holdout", "retain")]
    assert [row[2] for row in found.table.rows] == pytest.approx(
        [PLANTED["target", name].mean() for name in ("forget", "holdout", "retain")]
    )
    assert all(row[5] == ENTITIES for row in found.table.rows)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (PLANTED, (Outcome.EVIDENCE, Side.REMAINS)),
        (ABSENT, (Outcome.NONE, Side.NEITHER)),
        (PUSHED, (Outcome.EVIDENCE, Side.BEYOND)),
    ],
)
def test_holdout_planted_absent_and_pushed(scores, expected):
    found = contrast(scores, case_of(*ALL))
    assert verdict(found) == expected
    assert positive(found).passed


def test_rows_of_one_entity_are_not_independent():
    # 4 entities of 15 equal rows a group: no test with C(8, 4) = 70 splits reaches 0.01.
    case = case_of(*ALL, entities=4)
    scores = {key: values(level, i, entities=4) for i, (key, level) in enumerate(
        {("target", "forget"): 0.9, ("target", "holdout"): 0.1, ("target", "retain"): 0.9}.items()
    )}  # fmt: skip
    found = contrast(scores, case)
    assert found.n == 8
    assert found.smallest_p == pytest.approx(2 / 70)
    assert verdict(found)[0] == Outcome.INCONCLUSIVE
    assert not positive(found).passed, "the positive control has no more power than the finding"


def test_a_handful_of_rows_by_hand():
    rows = {
        name: tuple(Example(f"{name}:{i}", "q", "a") for i in range(n)) for name, n in (("forget", 3), ("holdout", 2))
    }
    case = case_of("forget", "holdout")
    scores = {("target", "forget"): np.array([0.5, 0.25, 0.75]), ("target", "holdout"): np.array([0.0, 0.5])}
    found = contrast(scores, case, rows=rows)
    assert found.estimate == pytest.approx(0.5 - 0.25)
    assert found.n == 5, "a row without an entity counts singly"


# --- the retrained model


RETRAINED = {("target", "forget"): values(0.6, 3), ("retrained", "forget"): values(0.2, 6), ("target", "retain"): KNOWN}
RETRAINED |= {("retrained", "retain"): values(0.9, 8)}


def test_retrained_by_hand():
    case = case_of("forget", "retain", roles=("retrained",))
    found = contrast(RETRAINED, case)
    difference = RETRAINED["target", "forget"] - RETRAINED["retrained", "forget"]
    assert found.estimate == pytest.approx(difference.mean())
    assert found.split == "forget, target vs retrained"
    assert found.n == ENTITIES, "the same entities on both sides are paired"
    clusters = case.clusters(case.rows("forget"))
    expected = one_sample(difference, clusters, bounds=(-1.0, 1.0), seed=0)
    assert (found.ci95, found.p_value) == ((expected.lo, expected.hi), expected.p_value)
    assert positive(found).estimate == pytest.approx(KNOWN.mean() - RETRAINED["retrained", "forget"].mean())


@pytest.mark.parametrize(
    ("level", "expected"),
    [(0.6, (Outcome.EVIDENCE, Side.REMAINS)), (0.2, (Outcome.NONE, Side.NEITHER)),
     (0.03, (Outcome.EVIDENCE, Side.BEYOND))],
)  # fmt: skip
def test_retrained_planted_absent_and_pushed(level, expected):
    scores = RETRAINED | {("target", "forget"): values(level, 9, 0.02)}
    assert verdict(contrast(scores, case_of("forget", "retain", roles=("retrained",)))) == expected


# --- both


def both(target: float, retrained: float) -> dict[tuple[str, str], Any]:
    """Forget texts are easier than holdout texts by 0.3 for everyone."""
    return {
        ("target", "forget"): values(target, 11), ("target", "holdout"): values(0.2, 12),
        ("retrained", "forget"): values(retrained, 13), ("retrained", "holdout"): values(0.2, 14),
        ("target", "retain"): KNOWN, ("retrained", "retain"): KNOWN,
    }  # fmt: skip


def test_what_the_sets_differ_in_by_themselves_cancels():
    case = case_of(*ALL, roles=("retrained",))
    scores = both(0.5, 0.5)
    found = contrast(scores, case)
    mean = {key: array.mean() for key, array in scores.items()}
    assert found.estimate == pytest.approx(
        (mean["target", "forget"] - mean["retrained", "forget"])
        - (mean["target", "holdout"] - mean["retrained", "holdout"])
    )
    assert found.split == "forget vs holdout, target minus retrained"
    assert verdict(found) == (Outcome.NONE, Side.NEITHER)
    # Without the retrained model the same rows look like knowledge: the split is the signal.
    assert verdict(contrast(scores, case_of(*ALL))) == (Outcome.EVIDENCE, Side.REMAINS)
    assert contrast(scores, case, subtract=False).estimate == pytest.approx(
        mean["target", "forget"] - mean["target", "holdout"]
    )


def test_what_is_left_on_top_of_it_is_found():
    assert verdict(contrast(both(0.8, 0.5), case_of(*ALL, roles=("retrained",)))) == (Outcome.EVIDENCE, Side.REMAINS)


# --- neither


def test_without_a_control_a_level_and_nothing_concluded():
    found = contrast(PLANTED, case_of("forget", "retain"))
    assert found.estimate == pytest.approx(PLANTED["target", "forget"].mean())
    assert found.p_value is None
    assert found.n == ENTITIES
    [control] = found.controls
    assert (control.passed, control.gates, control.description) == (False, "evidence", NO_CONTROL)
    assert verdict(found) == (Outcome.INCONCLUSIVE, Side.NEITHER)
    # Not even a level of zero is silence.
    zero = contrast({("target", "forget"): values(0, 0, 0.0), ("target", "retain"): KNOWN}, case_of("forget", "retain"))
    assert verdict(zero) == (Outcome.INCONCLUSIVE, Side.NEITHER)


# --- the positive control


def test_the_positive_control_fails_where_retain_is_like_holdout():
    found = contrast(ABSENT | {("target", "retain"): values(0.2, 21)}, case_of(*ALL))
    control = positive(found)
    assert (control.passed, control.gates) == (False, "silence")
    assert abs(control.estimate) < 0.05
    [judged] = judge([found])
    assert judged.verdict == Outcome.INCONCLUSIVE
    assert "blind" in judged.reason


@pytest.mark.parametrize(
    ("retain", "passed"),
    [(0.9, True), (0.35, True), (0.25, False), (0.05, False)],
    ids=["known", "barely known", "significant but below the threshold", "worse than unseen"],
)
def test_the_positive_control_needs_an_effect_of_its_own(retain, passed):
    scores = {("target", "forget"): UNSEEN, ("target", "holdout"): UNSEEN, ("target", "retain"): values(retain, 2)}
    control = positive(contrast(scores, case_of(*ALL)))
    assert control.passed is passed
    assert control.estimate == pytest.approx(scores["target", "retain"].mean() - UNSEEN.mean())


def test_the_original_stands_in_for_a_retain_set():
    case = case_of("forget", "holdout", roles=("original",))
    scores = ABSENT | {("original", "forget"): KNOWN, ("original", "holdout"): UNSEEN}
    control = positive(contrast(scores, case))
    assert control.passed
    assert control.estimate == pytest.approx(KNOWN.mean() - UNSEEN.mean())
    assert "original" in control.description
    # ... but only for an instrument that looks at the original.
    blind = positive(contrast(scores, case, roles=("target",)))
    assert not blind.passed


def test_without_anything_known_silence_proves_nothing():
    found = contrast(ABSENT, case_of("forget", "holdout"))
    assert positive(found).passed is False
    assert verdict(found)[0] == Outcome.INCONCLUSIVE


# --- ranks


def brute_auc(a: Any, b: Any) -> float:
    return float(np.mean([[(x > y) + (x == y) / 2 for y in b] for x in a]))


def test_auc_by_hand():
    case = case_of(*ALL)
    scores = {key: np.round(array, 2) for key, array in PLANTED.items()}
    found = contrast(scores, case, SCORE, auc=True)
    assert found.estimate == pytest.approx(brute_auc(scores["target", "forget"], scores["target", "holdout"]))
    assert (found.unit, found.null_value) == ("AUC", 0.5)
    assert positive(found).estimate == pytest.approx(brute_auc(scores["target", "retain"], scores["target", "holdout"]))
    assert verdict(found) == (Outcome.EVIDENCE, Side.REMAINS)


def test_auc_sees_the_other_side_and_nothing():
    assert verdict(contrast(PUSHED, case_of(*ALL), SCORE, auc=True)) == (Outcome.EVIDENCE, Side.BEYOND)
    found = contrast(ABSENT, case_of(*ALL), SCORE, auc=True)
    assert verdict(found)[0] != Outcome.EVIDENCE
    clusters = [f"e{i // ROWS}" for i in range(ENTITIES * ROWS)]
    expected = auc_two_sample(ABSENT["target", "forget"], UNSEEN, clusters, clusters, seed=0)
    assert (found.estimate, found.p_value) == (expected.value, expected.p_value)


# --- columns


def layered(planted: int | None, columns: int = 5) -> dict[tuple[str, str], Any]:
    forget = values(0.2, 31, columns=columns)
    if planted is not None:
        forget[:, planted] = values(0.6, 32)
    retain = values(0.2, 33, columns=columns)
    retain[:, -1] = values(0.9, 34)
    return {("target", "forget"): forget, ("target", "holdout"): values(0.2, 35, columns=columns),
            ("target", "retain"): retain}  # fmt: skip


AXIS = ("after block", [0.0, 2.0, 4.0, 6.0, 8.0])


@pytest.mark.parametrize("planted", [0, 2, 4])
def test_the_column_where_it_was_planted_is_quoted(planted):
    case, scores = case_of(*ALL), layered(planted)
    found = contrast(scores, case, columns=AXIS)
    a, b = scores["target", "forget"], scores["target", "holdout"]
    assert found.estimate == pytest.approx((a.mean(0) - b.mean(0))[planted])
    assert found.layer == f"after block {AXIS[1][planted]:g}"
    assert verdict(found) == (Outcome.EVIDENCE, Side.REMAINS)
    assert found.table is not None
    assert found.figure is not None
    means = {(row[0], row[1], row[2]): row[3] for row in found.table.rows}
    assert means["target", "forget", AXIS[1][planted]] == pytest.approx(a.mean(0)[planted])
    assert len(found.table.rows) == 3 * 5
    assert [series.label for series in found.figure.series] == ["forget, target", "holdout, target", "retain, target"]
    assert found.figure.series[1].y == pytest.approx(b.mean(0))


def test_the_choice_of_a_column_is_paid_for():
    case = case_of(*ALL)
    clusters = {name: case.clusters(case.rows(name)) for name in ALL}
    rng = np.random.default_rng(0)
    narrower = 0
    for _ in range(5):
        noise = {name: rng.normal(size=(ENTITIES * ROWS, 5)) for name in ALL}
        found = contrast({("target", name): noise[name] for name in ALL}, case, SCORE, columns=AXIS)
        best = int(np.argmax(noise["forget"].mean(0) - noise["holdout"].mean(0)))
        alone = two_sample(
            noise["forget"][:, best], noise["holdout"][:, best], clusters["forget"], clusters["holdout"], seed=0
        )
        assert found.estimate == pytest.approx(alone.value)
        assert found.p_value >= alone.p_value - 0.02
        narrower += alone.hi - alone.lo < found.ci95[1] - found.ci95[0]
        every = max_over_columns(
            noise["forget"], noise["holdout"], clusters["forget"], clusters["holdout"], seed=0
        ).per_column
        assert found.p_value == every[best].p_value
    assert narrower == 5


def test_silence_holds_in_every_column():
    case, scores = case_of(*ALL), layered(None)
    found = contrast(scores, case, columns=AXIS)
    clusters = case.clusters(case.rows("forget")), case.clusters(case.rows("holdout"))
    a, b = scores["target", "forget"], scores["target", "holdout"]
    ends = [two_sample(a[:, j], b[:, j], *clusters, bounds=(0.0, 1.0), seed=0).hi for j in range(5)]
    assert found.bound == pytest.approx(max(ends))
    assert verdict(found) == (Outcome.NONE, Side.NEITHER)


def test_the_positive_control_of_columns_is_the_last_one():
    scores = layered(None)
    assert positive(contrast(scores, case_of(*ALL), columns=AXIS)).estimate == pytest.approx(
        scores["target", "retain"][:, -1].mean() - scores["target", "holdout"][:, -1].mean()
    )
    deaf = scores | {("target", "retain"): values(0.2, 36, columns=5)}
    assert positive(contrast(deaf, case_of(*ALL), columns=AXIS)).passed is False


def test_columns_under_every_control():
    scores = layered(2)
    never = values(0.2, 37, columns=5)
    others = {("retrained", "forget"): never, ("retrained", "holdout"): never, ("retrained", "retain"): never}
    alone = contrast(scores | others, case_of("forget", "retain", roles=("retrained",)), columns=AXIS)
    assert alone.estimate == pytest.approx((scores["target", "forget"] - never).mean(0)[2])
    assert alone.split == "forget, target vs retrained"
    assert verdict(alone)[0] == Outcome.EVIDENCE
    both_ = contrast(scores | others, case_of(*ALL, roles=("retrained",)), columns=AXIS)
    assert both_.estimate == pytest.approx(
        (scores["target", "forget"] - never).mean(0)[2] - (scores["target", "holdout"] - never).mean(0)[2]
    )
    neither = contrast(scores, case_of("forget", "retain"), columns=AXIS)
    assert neither.estimate == pytest.approx(scores["target", "forget"].mean(0).max())
    assert verdict(neither) == (Outcome.INCONCLUSIVE, Side.NEITHER)


def test_an_aggregate_is_tested_and_the_columns_shown():
    scores = layered(4)
    found = contrast(scores, case_of(*ALL), columns=AXIS, aggregate=lambda curve: curve[:, -2:].mean(1))
    a, b = scores["target", "forget"], scores["target", "holdout"]
    assert found.estimate == pytest.approx(a[:, -2:].mean() - b[:, -2:].mean())
    assert found.layer is None
    assert found.bound is None
    assert found.table is not None
    assert len(found.table.rows) == 15
    assert positive(found).estimate == pytest.approx(scores["target", "retain"][:, -2:].mean() - b[:, -2:].mean())


# --- the rest


def test_noise_extra_controls_and_one_call_a_score():
    calls: Counter[tuple[str, str]] = Counter()

    def score(role: str, name: str) -> Any:
        calls[role, name] += 1
        return PLANTED[role, name]

    evidence = Evidence()
    evidence.noise = {"target": 1e-6, "original": 3e-6}
    extra = Control(name="own", description="own", passed=True, gates="evidence")
    case = case_of(*ALL, "utility")
    found = against_never_taught(Stub(), case, evidence, SHARE, score, extra=[extra])
    assert found.noise == 3e-6
    assert [c.name for c in found.controls] == ["positive control", "own"]
    assert set(calls.values()) == {1}
    assert ("target", "utility") not in calls


def test_the_same_seed_gives_the_same_finding_and_another_another_interval():
    case = case_of(*ALL)
    assert contrast(PLANTED, case) == contrast(PLANTED, case)
    assert contrast(PLANTED, case).ci95 != contrast(PLANTED, case_of(*ALL, seed=1)).ci95


def test_what_is_exchangeable_is_rarely_called_evidence():
    rng = np.random.default_rng(7)
    case = case_of(*ALL)
    p_values = []
    for _ in range(60):
        scores = {("target", name): rng.uniform(size=ENTITIES).repeat(ROWS) for name in ALL}
        p_values.append(contrast(scores, case).p_value)
    assert np.mean(np.array(p_values) <= ALPHA) <= 0.05
    assert np.mean(np.array(p_values) <= 0.5) == pytest.approx(0.5, abs=0.25)
