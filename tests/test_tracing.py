"""Trace findings: planted fingerprints above matched nulls are evidence; ordinary ones, or those without nulls, not.

Models are made of arrays here: distributions, states and answers that an unlearned, an untouched and an ordinarily
edited model could have given. Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import detectors.tracing as tracing
from audit.case import Case, Options
from audit.evidence import Evidence, Store
from audit.instrument import Instrument
from audit.loaders import Example, ExampleSet
from audit.plan import Generate, Request
from audit.quantities import Quantity
from audit.record import Finding, Outcome, Side
from audit.tokens import Tokens
from audit.verdict import judge
from detectors.fingerprint import SETS, Classifier, Table
from detectors.trace import Trace
from detectors.trace_activations import TraceActivations
from detectors.trace_activations import told_apart as states_told_apart
from detectors.trace_logits import TraceLogits
from detectors.trace_text import TraceText, text_features, told_apart
from detectors.tracing import trace_findings

ROOT = Path("nowhere")
ENTITIES, EACH = 12, 2
NULLS = tuple(f"original+null@{k}" for k in range(1, 6))


def case_of(*sets: str, original: bool = True) -> Case:
    """A case of invented rows; its model folders are never opened."""
    made = {
        name: ExampleSet(
            name,
            "test",
            tuple(
                Example(f"{name}:{i}", f"{name} {i}?", f"answer {i}", entity=f"{name}-{i // EACH}")
                for i in range(ENTITIES * EACH)
            ),
            name,
        )
        for name in sets
    }
    models = {"target": ROOT} | ({"original": ROOT} if original else {})
    return Case("trace", models, {}, made, Options())


def judged(found: Sequence[Finding]) -> dict[str, Finding]:
    return {finding.id.split("/")[1]: finding for finding in judge(found)}


# --- from a fingerprint to a finding


def planted_table(effect: float = 8.0) -> Table:
    """Ten histories a side in three families; unlearned ones differ in `retain.kl` and in `forget.kl`."""
    rng = np.random.default_rng(0)
    rows = [(f"{kind}{i}", family) for kind in ("u", "o") for i in range(10) for family in "abc"]
    unlearned = np.array([history[0] == "u" for history, _ in rows])
    values = rng.normal(size=(len(rows), 3)) + effect * unlearned[:, None] * np.array([1, 1, 0])
    names = ("retain.kl", "forget.kl", "retain.rank")
    return Table(names, values, unlearned, tuple(h for h, _ in rows), tuple(f for _, f in rows))


class Toy(TraceLogits):
    """A name and a question for findings whose features are given."""


def findings_of(monkeypatch: pytest.MonkeyPatch, values: Mapping[str, float], *sets: str) -> dict[str, Finding]:
    """Findings where a role's features are all one number, with a little noise from entity to entity."""
    monkeypatch.setattr(tracing, "shipped_classifier", lambda names: Classifier.fitted(planted_table(), names))
    case, evidence = case_of(*(sets or SETS)), Evidence()
    for role in values:
        evidence.register(role, Store(ROOT, {"role": role}), [])
    noise = np.random.default_rng(0).normal(scale=0.3, size=ENTITIES * EACH)

    def features(_: Case, __: Evidence, role: str, use: Mapping[str, Any]) -> dict[str, float]:
        one = {f"{name}.kl": values[role] + float(noise[kept].mean()) for name, kept in use.items()}
        return {name: one[name] for name in ("retain.kl", "forget.kl") if name in one} | {"retain.rank": 0.0}

    rows = {name: case.rows(name) for name in case.sets}
    return judged(trace_findings(Toy(), case, evidence, "fingerprint", rows, features))


def roles(target: float, *nulls: float) -> dict[str, float]:
    return {"target": target} | dict(zip(NULLS, nulls, strict=False))


ORDINARY = (0.0, 0.2, -0.2, 0.1, -0.1)


def test_what_is_above_its_nulls_and_above_known_edits_is_evidence(monkeypatch):
    found = findings_of(monkeypatch, roles(8.0, *ORDINARY))
    assert list(found) == ["irrelevant", "all"]
    for finding in found.values():
        assert (finding.verdict, finding.side) == (Outcome.EVIDENCE, Side.UNLEARNED)
        assert finding.p_adjusted < 0.01
        assert finding.estimate > finding.null_value + finding.threshold
        assert all(control.passed for control in finding.controls if control.gates)
        assert finding.decides == (False, False)
        assert finding.table.rows[0][0] in ("retain.kl", "forget.kl")


def test_what_looks_like_its_nulls_is_none(monkeypatch):
    for finding in findings_of(monkeypatch, roles(0.0, *ORDINARY)).values():
        assert (finding.verdict, finding.side) == (Outcome.NONE, Side.NEITHER)
        assert finding.p_value > 0.05
        lo, hi = finding.ci95
        assert lo < finding.estimate < hi < finding.null_value + finding.threshold


@pytest.mark.parametrize("nulls", [0, 1, 2])
def test_fewer_than_three_nulls_decide_nothing(monkeypatch, nulls):
    for finding in findings_of(monkeypatch, roles(8.0, *ORDINARY[:nulls])).values():
        assert (finding.verdict, finding.p_value) == (Outcome.INCONCLUSIVE, None)
        control = next(c for c in finding.controls if c.name == "matched null")
        assert (control.passed, control.n) == (False, nulls)


def test_as_many_nulls_that_score_as_high_take_the_evidence_away(monkeypatch):
    """An original whose every fine-tune looks unlearned."""
    for finding in findings_of(monkeypatch, roles(8.0, *(8.0 + x for x in ORDINARY))).values():
        assert finding.verdict != Outcome.EVIDENCE
        assert finding.p_value > 0.05
        alone = findings_of(monkeypatch, roles(8.0))
        assert finding.estimate == pytest.approx(alone[finding.id.split("/")[1]].estimate)


def test_above_its_nulls_and_not_above_known_edits_is_no_evidence(monkeypatch):
    """Fine-tunes of this original that look less edited than any known make an ordinary target significant only."""
    for finding in findings_of(monkeypatch, roles(0.5, *(-5.0 + x for x in ORDINARY))).values():
        assert finding.p_value < 0.001
        assert finding.verdict != Outcome.EVIDENCE
        assert finding.threshold == pytest.approx(finding.controls[2].estimate - finding.null_value)


def test_irrelevant_prompts_are_judged_without_the_forget_set(monkeypatch):
    whole, part = findings_of(monkeypatch, roles(8.0)), findings_of(monkeypatch, roles(8.0), "retain", "holdout")
    assert list(part) == ["irrelevant"]
    assert part["irrelevant"].estimate == pytest.approx(whole["irrelevant"].estimate)
    assert not any("forget" in str(row[0]) for row in whole["irrelevant"].table.rows)
    assert whole["irrelevant"].n == ENTITIES * 3
    assert whole["all"].n == ENTITIES * 4


# --- the detectors, on arrays that models could have given

VOCABULARY, WIDTH, POSITIONS = 40, 24, 4
Model = Callable[[str], tuple[np.ndarray, np.ndarray]]
"""From a set to log-probabilities [rows, positions, vocabulary] and states [rows, positions, 5, width]."""


def logits_to(logprobs: np.ndarray) -> np.ndarray:
    return logprobs - np.log(np.exp(logprobs).sum(-1, keepdims=True))


@cache
def original(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, right tokens and states of a model that knows all sets but the holdout."""
    rng = np.random.default_rng(SETS.index(name))
    n = ENTITIES * EACH
    logits, right = rng.normal(size=(n, POSITIONS, VOCABULARY)), rng.integers(0, VOCABULARY, (n, POSITIONS))
    if name != "holdout":
        np.put_along_axis(logits, right[..., None], 6.0, axis=-1)
    return logits, right, rng.normal(size=(n, POSITIONS, 5, WIDTH))


def unmoved(name: str) -> tuple[np.ndarray, np.ndarray]:
    logits, _, states = original(name)
    return logits_to(logits), states


def fine_tune(seed: int) -> Model:
    """Moves every row a little in a direction of its own, the more the deeper."""

    def model(name: str) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([seed, SETS.index(name)])
        logits, _, states = original(name)
        depth = np.linspace(0.05, 0.25, 5)[:, None]
        return (
            logits_to(logits + 0.3 * rng.normal(size=logits.shape)),
            states + depth * rng.normal(size=states.shape),
        )

    return model


def unlearned(seed: int) -> Model:
    """The same, and forget rows lose their answers and move together."""

    def model(name: str) -> tuple[np.ndarray, np.ndarray]:
        logprobs, states = fine_tune(seed)(name)
        push = np.random.default_rng(seed).normal(size=(2, max(VOCABULARY, WIDTH)))
        share = 1.0 if name == "forget" else 0.5
        logits = logprobs + share * 2 * push[0, :VOCABULARY]
        if name == "forget":
            np.put_along_axis(logits, original(name)[1][..., None], -9.0, axis=-1)
        return logits_to(logits), states + share * np.linspace(0.2, 2, 5)[:, None] * push[1, :WIDTH]

    return model


def evidence_of(case: Case, tmp_path: Path, target: Model, nulls: int = len(NULLS)) -> Evidence:
    """What a scan would have captured."""
    evidence = Evidence()
    quantities = tuple(Quantity(name, lambda _: {}) for name in ("distribution-all", "hidden:some"))
    models = {"target": target, "original": unmoved} | {role: fine_tune(k + 9) for k, role in enumerate(NULLS[:nulls])}
    for role, model in models.items():
        store, requests = Store(tmp_path, {"role": role}), []
        for at, name in enumerate(case.sets):
            logprobs, states = model(name)
            tokens = tuple(Tokens((at, row, *range(POSITIONS)), 2) for row in range(len(logprobs)))
            arrays = zip(tokens, logprobs, states, strict=True)
            store.write((t, {"distribution-all": {"logprobs": p}, "hidden:some": {"hidden": s}}) for t, p, s in arrays)
            extra = {"right": original(name)[1].tolist(), "layers": 5}
            requests.append(Request(f"trace/{name}", tokens, quantities, extra))
        evidence.register(role, store, requests)
    return evidence


SEEING: tuple[Instrument, ...] = (TraceLogits(), TraceActivations(), Trace())


@pytest.mark.parametrize("instrument", SEEING, ids=lambda i: i.name)
def test_a_model_that_lost_its_answers_is_told_from_one_that_was_moved_as_far(instrument, tmp_path):
    case = case_of(*SETS)
    lost = judged(instrument.measure(case, evidence_of(case, tmp_path / "lost", unlearned(3))))
    assert (lost["all"].verdict, lost["all"].side) == (Outcome.EVIDENCE, Side.UNLEARNED)
    moved = judged(instrument.measure(case, evidence_of(case, tmp_path / "moved", fine_tune(3))))
    assert moved["all"].verdict == Outcome.NONE
    assert moved["irrelevant"].verdict != Outcome.EVIDENCE
    assert moved["all"].estimate == pytest.approx(moved["all"].null_value, abs=1.0), "it is one more draw of the null"
    few = judged(instrument.measure(case, evidence_of(case, tmp_path / "few", unlearned(3), nulls=2)))
    assert {few[split].verdict for split in ("irrelevant", "all")} == {Outcome.INCONCLUSIVE}
    assert few["all"].estimate == pytest.approx(lost["all"].estimate)


@pytest.mark.parametrize("instrument", SEEING, ids=lambda i: i.name)
def test_the_original_itself_was_not_unlearned(instrument, tmp_path):
    case = case_of(*SETS)
    for split, finding in judged(instrument.measure(case, evidence_of(case, tmp_path, unmoved))).items():
        assert finding.verdict != Outcome.EVIDENCE, split


def test_without_an_original_nothing_is_concluded(tmp_path):
    case = case_of(*SETS, original=False)
    found = judged(TraceLogits().measure(case, evidence_of(case, tmp_path, unlearned(3), nulls=0)))
    assert {finding.verdict for finding in found.values()} == {Outcome.INCONCLUSIVE}
    assert all(row[0].startswith(("alone.", "most like")) for row in found["all"].table.rows)


def test_a_part_of_the_rows_is_that_part(tmp_path):
    """What the interval leaves out is left out: of target and original alike."""
    case = case_of(*SETS)
    evidence, rng = evidence_of(case, tmp_path, unlearned(3)), np.random.default_rng(0)
    use = {name: rng.random(ENTITIES * EACH) < 0.5 for name in SETS}
    kept, n = unlearned(3)("retain")[0][use["retain"]], int(use["retain"].sum())
    found = TraceLogits().features(case, evidence, "target", use)
    before = unmoved("retain")[0][use["retain"]]
    flipped = (kept.argmax(-1) != before.argmax(-1)).mean()
    assert found["retain.flipped"] == pytest.approx(flipped)
    right = original("retain")[1][use["retain"]][..., None]
    likelier = np.take_along_axis(kept - before, right, -1).mean()
    assert found["retain.right"] == pytest.approx(likelier)
    states = TraceActivations().features(case, evidence, "target", use)
    a, b = (model("retain")[1][use["retain"]].reshape(n * POSITIONS, 5, WIDTH) for model in (unmoved, unlearned(3)))
    moved = np.linalg.norm(b[:, 4] - a[:, 4], axis=1).mean() / np.linalg.norm(a[:, 4], axis=1).mean()
    assert states["retain.4.moved"] == pytest.approx(np.log(moved))


# --- told apart, and not


def test_states_that_moved_alike_are_told_apart_and_permuted_ones_are_not():
    rng = np.random.default_rng(0)
    a, clusters = rng.normal(size=(60, 8)), [f"e{i // 2}" for i in range(60)]
    assert states_told_apart(a, a + 1.5, clusters, seed=0).mean() > 0.8
    assert states_told_apart(a, a, clusters, seed=0).mean() == 0.5
    chance = []
    for seed in range(8):
        swap = np.repeat(np.random.default_rng(seed).random(30) < 0.5, 2)[:, None]
        chance.append(states_told_apart(a + 1.5 * swap, a + 1.5 * ~swap, clusters, seed=0).mean())
    assert 0.35 < np.mean(chance) < 0.6


def test_the_published_setting_sees_any_edit_and_claims_nothing(tmp_path):
    case = case_of(*SETS)
    found = judged(TraceActivations().measure(case, evidence_of(case, tmp_path, unlearned(3))))["edited"]
    assert found.estimate > 0.9
    assert found.side == Side.NEITHER
    assert found.verdict != Outcome.EVIDENCE


words = st.text("abcdefgh ", min_size=1, max_size=6).filter(str.strip)


@settings(max_examples=10, deadline=None)
@given(st.lists(words, min_size=8, max_size=20))
def test_the_same_answers_are_told_apart_by_nothing(answers):
    assert told_apart(answers, answers, [str(i // 2) for i in range(len(answers))]) == 0.5


def random_answers(seed: int, n: int = 40, letters: str = "abcdefghij") -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list(letters), 6)) for _ in range(n)]


def test_a_planted_habit_is_told_on_prompts_held_out():
    clusters = [str(i // 2) for i in range(40)]
    theirs = random_answers(0)
    ours = [f"{answer} zz" for answer in random_answers(1)]
    assert told_apart(ours, theirs, clusters) > 0.95
    assert told_apart(ours, theirs, clusters, encode=lambda texts: [[float(len(text))] for text in texts]) == 1.0
    assert told_apart(ours, theirs, clusters, encode=lambda texts: np.zeros((len(texts), 1))) == 0.5


def test_with_labels_permuted_a_habit_is_told_by_chance():
    clusters, found = [str(i // 2) for i in range(40)], []
    theirs = random_answers(0)
    ours = [f"{answer} zz" for answer in random_answers(1)]
    for seed in range(8):
        swap = np.repeat(np.random.default_rng(seed).random(20) < 0.5, 2)
        pairs = [(b, a) if turned else (a, b) for a, b, turned in zip(ours, theirs, swap, strict=True)]
        found.append(told_apart(*zip(*pairs, strict=True), clusters))
    assert 0.35 < np.mean(found) < 0.6


def test_what_is_learned_by_heart_of_one_prompt_does_not_help_with_another():
    """Answers that all differ, and nothing in common: only a row in training and test could tell them."""
    clusters = [str(i // 2) for i in range(40)]
    found = [told_apart(random_answers(2 * s), random_answers(2 * s + 1), clusters) for s in range(6)]
    assert 0.35 < np.mean(found) < 0.65
    by_entity = [f"{answer} {'qrstuvwxyz'[i // 2 % 10] * 3}" for i, answer in enumerate(random_answers(0))]
    assert told_apart(by_entity, by_entity, clusters) == 0.5


def test_numbers_of_answers_by_hand():
    target, before = ["Paris", "paris ", "I don't know"], ["Paris", "Rome", "Oslo"]
    found = text_features({"retain": target}, {"retain": before})
    assert found == pytest.approx(
        {
            "text.retain.same-answer": 2 / 3,
            "text.retain.answers": 2 / 3,
            "text.retain.refusals": 1 / 3,
            "text.retain.length": np.log1p(22 / 3),
            "text.retain.more-same-answer": 1 / 3,
            "text.retain.more-answers": -1 / 3,
            "text.retain.more-refusals": 1 / 3,
            "text.retain.more-length": np.log1p(22 / 3) - np.log1p(13 / 3),
            "text.retain.changed": 2 / 3,
            "text.retain.likeness": (1 + 0 + 2 * 1 / 16) / 3,  # "o" is all that the third two share
        }
    )
    alone = text_features({"retain": target})
    assert alone == {name.replace("text.", "alone.text-"): found[name] for name in list(found)[:4]}


def test_a_contrast_is_the_difference_of_two_sets():
    answers = {name: random_answers(i, 20) for i, name in enumerate(SETS)}
    target = answers | {"forget": ["unknown"] * 20}
    clusters = {name: [str(i) for i in range(20)] for name in SETS}
    found = text_features(target, answers, clusters)
    for key in ("changed", "likeness", "same-answer"):
        planted = found[f"text.forget.{key}"] - found[f"text.retain.{key}"]
        assert found[f"text.forget-retain.{key}"] == pytest.approx(planted)
    assert found["text.forget-retain.changed"] == 1
    assert found["text.holdout-retain.changed"] == 0
    assert found["text.forget.more-refusals"] == 1
    assert found["text.forget.told-apart"] > 0.95
    assert found["text.retain.told-apart"] == 0.5


def answering(share: float, seed: int, refused: Sequence[str] = ()) -> dict[str, list[str]]:
    """Answers of which a share were changed at random, and those of some sets refused."""
    rng = np.random.default_rng(seed)
    made = {}
    for at, name in enumerate(SETS):
        known, other = random_answers(at, ENTITIES * EACH), random_answers(100 + at + seed, ENTITIES * EACH)
        made[name] = [b if rng.random() < share else a for a, b in zip(known, other, strict=True)]
        if name in refused:
            made[name] = ["i don't know"] * len(known)
    return made


def text_evidence(case: Case, target: Mapping[str, list[str]], nulls: int) -> Evidence:
    evidence = Evidence()
    models = {"target": target, "original": answering(0.0, 0)}
    models |= {role: answering(0.1, k + 1) for k, role in enumerate(NULLS[:nulls])}
    for role, texts in models.items():
        evidence.register(role, Store(ROOT, {"role": role}), [Generate(f"trace-text/{name}", (), 12) for name in SETS])
        for name in case.sets:
            evidence.add_texts(role, f"trace-text/{name}", texts[name])
    return evidence


def test_refused_forget_prompts_are_evidence_and_a_few_changed_answers_none():
    case = case_of("forget", "retain")
    refusing, ordinary = answering(0.1, 9, refused=["forget"]), answering(0.1, 9)
    found = {
        which: judged(TraceText().measure(case, text_evidence(case, target, nulls)))["all"]
        for which, target, nulls in (("refusing", refusing, 5), ("few", refusing, 2), ("ordinary", ordinary, 5))
    }
    assert (found["refusing"].verdict, found["refusing"].side) == (Outcome.EVIDENCE, Side.UNLEARNED)
    assert found["few"].verdict == Outcome.INCONCLUSIVE
    assert found["few"].estimate == found["refusing"].estimate
    assert found["ordinary"].verdict != Outcome.EVIDENCE
    assert found["ordinary"].p_value > 0.01
