"""Forgotten items: divergences by scipy and by brute force, discoveries counted, planted items found, none invented."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy
from worlds import audit, build_tiny, one_thread, open_target, tiny_case

from audit.capture import Engine
from audit.case import Case
from audit.errors import BadInput
from audit.evidence import Evidence
from audit.gather import Run, capture_all
from audit.loaders import SetSpec, load_set
from audit.plan import Request, merge
from audit.progress import SILENT
from audit.scan import take_inventories
from detectors.forgotten import POSITIONS, Forgotten, decided
from detectors.suspicion import (
    HEAD,
    by_item,
    changed,
    confidence,
    js_divergence,
    movement,
    no_answer,
    robust_z,
    suspicion,
    together,
    unusual,
)

# --- distributions


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(shape[-1], 0.2), shape[:-1])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 30))
def test_the_divergence_is_scipy_s_distance_squared(seed, size):
    p, q = drawn(seed, 5, size), drawn(seed + 1, 5, size)
    assert js_divergence(p, q) == pytest.approx([jensenshannon(a, b) ** 2 for a, b in zip(p, q, strict=True)], abs=1e-9)
    assert js_divergence(p, q) == pytest.approx(js_divergence(q, p))


def test_movement_by_hand():
    sure, other, even = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.5, 0.5, 0.0]
    assert js_divergence(sure, sure) == 0
    assert js_divergence(sure, other) == pytest.approx(math.log(2))
    assert movement(sure, sure) == 0
    assert movement(sure, other) == pytest.approx(1)
    # The middle is (3/4, 1/4): JS = (log 4/3 + (log 2/3 + log 2) / 2) / 2 nats; half the probability is lost.
    js = (math.log(4 / 3) + (math.log(2 / 3) + math.log(2)) / 2) / 2 / math.log(2)
    assert movement(sure, even) == pytest.approx((js + 0.5) / 2)
    assert movement(even, sure) == pytest.approx((js - 0.5) / 2), "surer than before: less than nothing"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 40), st.data())
def test_heads_taken_together_are_the_whole_with_its_tail_evened(seed, vocabulary, data):
    k = data.draw(st.integers(1, vocabulary))
    full, heads = [], []
    for p in drawn(seed, 2, vocabulary):
        ids = np.argsort(-p)[:k]
        evened = np.full(vocabulary, max(0, 1 - p[ids].sum()) / max(1, vocabulary - k))
        evened[ids] = p[ids]
        full.append(evened)
        heads += [ids, np.log(np.maximum(p[ids], 1e-300))]
    cells = together(*heads, vocabulary)
    assert [c.sum() for c in cells] == pytest.approx([1, 1])
    assert js_divergence(*cells) == pytest.approx(js_divergence(*full), abs=1e-9)
    assert movement(*cells, others=True) == pytest.approx(movement(*full), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 40), st.data())
def test_confidence_is_entropy_and_odds(seed, vocabulary, data):
    k = data.draw(st.integers(1, vocabulary))
    [p] = drawn(seed, 1, vocabulary)
    kept = np.sort(p)[::-1][:k]
    evened = np.append(kept, np.full(vocabulary - k, (1 - kept.sum()) / max(1, vocabulary - k)))
    found = confidence(np.log(np.maximum(kept, 1e-300)), vocabulary)
    assert math.exp(found[0]) == pytest.approx(max(entropy(evened.clip(0)), 1e-7), rel=1e-6, abs=1e-9)
    first = min(max(kept[0], 1e-7), 1 - 1e-7)
    assert found[1] == pytest.approx(math.log(first) - math.log(1 - first))


def test_what_is_recorded_is_the_models_own_distribution():
    target = open_target("unlearned")
    rows = tiny_case().rows("forget")[:3]
    engine = Engine(target)
    request = Request("x", tuple(decided(target, row) for row in rows), (HEAD,))
    for batch in engine.batches(merge([request])):
        for row in engine.run(batch):
            with torch.no_grad():
                plain = target.model(input_ids=torch.tensor([row.tokens.ids])).logits[0].log_softmax(-1).numpy()
            for i, position in enumerate(plain[row.tokens.start - 1 : -1]):
                head = row.values["head-256"]
                assert head["vocabulary"][i] == len(position)
                found = np.empty(len(position))
                found[head["head_ids"][i]] = head["head_logprobs"][i]
                assert found == pytest.approx(position, abs=1e-5)


def test_what_is_looked_at():
    target = open_target("original")
    row = tiny_case().rows("forget")[0]
    prompt = target.encode_prompt(row.prompt)
    asked, answered = decided(target, replace(row, answer="")), decided(target, row)
    assert (asked.ids[:-1], asked.start, asked.scored) == (prompt, len(prompt), 1)
    assert answered == target.encode(row.prompt, row.answer)
    long = decided(target, replace(row, answer=" ".join(["red"] * 20)))
    assert (long.start, long.scored) == (len(prompt), POSITIONS)
    passage = decided(target, replace(row, prompt="", answer=" ".join(["red"] * 20)))
    assert passage.scored == POSITIONS
    assert len(passage.ids) == len(target.encode("", " ".join(["red"] * 20)).ids)


# --- texts


@pytest.mark.parametrize(
    "text",
    [
        "I don't know.",
        "I’m not sure about that",
        "Sorry, but no",
        "unknown .",
        "As an AI, I",
        " \n",
        "…",
        "we cannot say",
    ],
)
def test_declining(text):
    assert no_answer([text], ["a"]) == [1]


@pytest.mark.parametrize("text", ["Paris .", "the Unknown Soldier", "She does not like cats", "I know it well", "42"])
def test_answering(text):
    assert no_answer([text], ["a"]) == [0]


def test_stutter_and_repetition_by_hand():
    assert no_answer(["is is is the"], ["a"]) == [0.5]
    texts = ["Red .", "red", "Oslo", "Red"]
    assert no_answer(texts, ["a", "a", "a", "b"]) == pytest.approx([0.5, 0.5, 0, 0]), "one of two others; b has none"


def test_change_of_text():
    assert changed("Paris . And more", "paris! Or less") == 0
    assert changed("abc", "xyz") == 1
    assert changed("abcd", "abxy") == pytest.approx(0.5)


# --- items


def test_robust_z_by_hand():
    assert robust_z([1, 2, 3, 4, 100]) == pytest.approx(np.array([-2, -1, 0, 1, 97]) / 1.4826)
    assert robust_z([0, 0, 0, 0, 5]) == pytest.approx(np.array([0, 0, 0, 0, 5]) / 1.2533), "half are equal"
    assert robust_z([3, 3, 3]).tolist() == [0, 0, 0]


def test_means_by_item():
    index = np.array([1, 0, 1])
    assert by_item([1.0, 5.0, 3.0], index).tolist() == [5, 2]
    assert by_item([[1.0, 0], [5, 1], [3, 4]], index).tolist() == [[5, 1], [2, 2]]


def listed(levels: Any, rows: int = 3, noise: float = 0.0, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Rows of items at these levels, and their names, which sort as the levels are given."""
    rng = np.random.default_rng(seed)
    values = np.repeat(levels, rows) + noise * rng.standard_normal(rows * len(levels))
    return values, [f"{i // rows:05}" for i in range(len(values))]


def test_planted_items_stand_out_and_are_ranked_first():
    rng = np.random.default_rng(0)
    levels = rng.normal(0.05, 0.02, 100)
    levels[:10] = rng.uniform(0.7, 1, 10)
    found = suspicion(*listed(levels, noise=0.05))
    assert found.stands_out.nonzero()[0].tolist() == list(range(10))
    assert set(np.argsort(-found.suspicion)[:10]) == set(range(10))
    assert found.level == pytest.approx(levels, abs=0.15)


def test_small_movements_never_stand_out_however_far_from_the_bulk():
    levels = np.full(100, 0.01) + np.linspace(0, 1e-3, 100)
    levels[:10] = 0.45
    found = suspicion(*listed(levels))
    assert found.z[:10].min() > 100
    assert not found.stands_out.any()
    assert found.suspicion.max() == 0, "and none is ranked before another by them"
    assert suspicion(*listed(levels), mark=0).suspicion == pytest.approx(levels)


def test_a_list_that_was_forgotten_as_a_whole_hides_it():
    found = suspicion(*listed(np.random.default_rng(0).normal(0.9, 0.02, 100)))
    assert not found.stands_out.any()
    assert np.median(found.level) > 0.5, "but is seen by its median"


@pytest.mark.parametrize("made", ["suspicion", "unusual"])
def test_few_lists_without_anything_planted_have_a_discovery(made):
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(300):
        values, who = listed(rng.normal(0.8, 0.05, 200), rows=1)  # all above the half-way mark: only z decides
        found = suspicion(values, who) if made == "suspicion" else unusual(values[:, None], who)
        hits += bool(found.stands_out.any())
    # One in twenty if the spread were known; estimated robustly from 200 items, about one in ten.
    assert 0 < hits <= 300 * 0.1 + 4 * math.sqrt(300 * 0.1 * 0.9)


def test_discoveries_are_benjamini_and_hochberg_s():
    from scipy.stats import norm

    levels = np.random.default_rng(2).normal(0.7, 0.1, 60)
    levels[:8] += 0.25
    found = suspicion(*listed(levels, rows=1))
    p = np.where(levels >= 0.5, norm.sf(robust_z(levels)), 1)
    order = np.argsort(p)
    passed = [i for i in range(60) if p[order[i]] <= 0.05 * (i + 1) / 60]
    assert found.stands_out.sum() == (max(passed) + 1 if passed else 0) > 0


def test_unusual_is_two_sided():
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, (100, 2))
    values[0], values[1] = 12, -12
    found = unusual(values, [f"{i:03}" for i in range(100)])
    assert found.stands_out[:2].all()
    assert set(np.argsort(-found.suspicion)[:2]) == {0, 1}


# --- the instrument


@cache
def suspects_file(answers: bool = False) -> Path:
    """Queries about three forgotten people and sixteen others, in an order that tells nothing."""
    tiny, rows = build_tiny(), []
    for name, people in (("forget", 3), ("retain", 12), ("utility", 4)):
        read = [json.loads(line) for line in tiny.sets[name].read_text().splitlines()]
        kept = list(dict.fromkeys(row["author"] for row in read))[:people]
        for row in read:
            if row["author"] in kept:
                asked = {"prompt": row["question"], "entity": row["author"]}
                rows.append(asked | ({"answer": row["answer"]} if answers else {}))
    rows.sort(key=lambda row: row["prompt"])
    path = tiny.folder / f"suspects-{answers}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def case_of(target: str, *, original: bool = True, forget: bool = True, answers: bool = False, **options: Any) -> Case:
    models = {"target": target, "retrained": "retrained"} | ({"original": "original"} if original else {})
    case = tiny_case(models, ("forget",) if forget else (), **options)
    specs = {**case.specs, "suspects": SetSpec(suspects_file(answers))}
    return Case.build(case.models, specs, case.options, "suspects")


def evidence_of(case: Case, folder: Path) -> Evidence:
    run = Run(case, folder, SILENT, [Forgotten()], [])
    with one_thread():
        found = capture_all(run, take_inventories(case))
    assert not run.not_run
    return found


def forget_people() -> set[str]:
    return {row.entity for row in tiny_case().rows("forget")}


@pytest.mark.parametrize("answers", [False, True])
def test_the_forgotten_are_found_beside_the_original(tmp_path, answers):
    case = case_of("unlearned", answers=answers)
    evidence = evidence_of(case, tmp_path)
    items, auroc = Forgotten().measure(case, evidence)
    assert (items.id, auroc.id) == ("forgotten/items", "forgotten/auroc")
    assert items.n == auroc.n == 19
    assert items.estimate == pytest.approx(3 / 19)
    assert items.p_value < 0.01
    assert auroc.estimate == 1
    assert {row[1] for row in items.table.rows[:3]} <= forget_people()
    assert [row[-1] for row in items.table.rows] == ["yes"] * 3 + [""] * 16
    controls = {c.name: c for c in items.controls}
    assert controls["original at hand"].passed
    assert controls["enough items"].passed
    assert controls["the bulk stayed"].passed
    assert controls["positive control"].passed
    assert controls["positive control"].estimate == 1
    # What the table says of an item is what its rows say, one by one.
    target, original = open_target("unlearned"), open_target("original")
    first = items.table.rows[0]
    moved = []
    for row in case.rows("suspects"):
        if row.entity == first[1]:
            ids = torch.tensor([target.encode_prompt(row.prompt)])
            with torch.no_grad():
                p0, p = (m.model(input_ids=ids).logits[0, -1].double().softmax(-1).numpy() for m in (original, target))
            lost = p0.max() - p[p0.argmax()]
            moved.append((jensenshannon(p0, p, 2) ** 2 + lost) / 2)
    assert first[4] == pytest.approx(np.mean(moved), abs=1e-3)
    assert first[3] == pytest.approx(np.mean([max(0, 2 * m - 1) for m in moved]), abs=1e-3)


def test_nothing_stands_out_where_nothing_was_done(tmp_path):
    case = case_of("original")
    items, auroc = Forgotten().measure(case, evidence_of(case, tmp_path))
    assert items.estimate == 0
    assert items.p_value == 1
    assert auroc.estimate == 0.5


def test_without_a_forget_set_the_same_is_found_and_no_auroc(tmp_path):
    known, blind = case_of("unlearned"), case_of("unlearned", forget=False)
    evidence = evidence_of(blind, tmp_path)
    [items] = Forgotten().measure(blind, evidence)
    with_set = Forgotten().measure(known, evidence)[0]
    assert [row[:-1] for row in items.table.rows] == [row[:-1] for row in with_set.table.rows], "blind while scoring"
    assert all(row[-1] == "" for row in items.table.rows)
    assert Forgotten().examples(blind, evidence) == {}
    drill = Forgotten().examples(known, evidence)
    assert len(drill) == 18
    assert min(values["suspicion"] for values in drill.values()) > 0


@pytest.mark.parametrize("access", ["logprobs", "text"])
@pytest.mark.parametrize("original", [True, False])
def test_less_is_said_with_less(tmp_path, access, original):
    case = case_of("unlearned", original=original, access=access)
    items, auroc = Forgotten().measure(case, evidence_of(case, tmp_path))
    if original:
        assert auroc.estimate > 0.95
    elif access == "text":
        assert auroc.estimate > 0.75
    controls = {c.name: c for c in items.controls}
    assert controls["original at hand"].passed == original
    assert controls["original at hand"].gates == "evidence"
    words = {
        ("logprobs", True): "probabilities beside",
        ("logprobs", False): "how unusually sure",
        ("text", True): "answers beside",
        ("text", False): "decline",
    }
    assert words[access, original] in items.statistic
    assert ("original by itself" in {c.name for c in auroc.controls}) == original
    assert controls["the bulk stayed"].passed == (original or access == "text")


def test_without_suspects_the_other_sets_are_the_list(tmp_path):
    case = tiny_case({"target": "unlearned", "original": "original"}, ("forget", "retain", "holdout", "utility"))
    items, auroc = Forgotten().measure(case, evidence_of(case, tmp_path))
    assert items.n == 12 + 12 + 4, "the holdout was never known, and is not in the list"
    assert auroc.estimate == 1
    assert {row[1] for row in items.table.rows[:12]} == forget_people()


def test_matched_fine_tunes_gate_the_evidence(tmp_path):
    case = case_of("unlearned")
    evidence = evidence_of(case, tmp_path)
    found = Forgotten().measure(case, evidence)
    assert all({c.name: c for c in f.controls}["matched null"].gates is None for f in found)
    requests = Forgotten().requests(case, open_target("original", "original+null@1"))
    assert requests
    for model, passed in (("original", True), ("target", False)):  # a fine-tune that does nothing, or as much
        evidence.register("original+null@1", evidence._stores[model], requests)
        for finding in Forgotten().measure(case, evidence):
            control = {c.name: c for c in finding.controls}["matched null"]
            assert (control.gates, control.passed, control.n) == ("evidence", passed, 1)


def test_models_that_read_other_tokens_are_not_compared(tmp_path):
    case = case_of("unlearned")
    captured, mixed = evidence_of(case, tmp_path), Evidence()
    for role in ("target", "original", "retrained"):
        [request] = Forgotten().requests(case, open_target("original", role))
        if role == "target":
            request = replace(request, sequences=request.sequences[::-1])
        mixed.register(role, captured._stores[role], [request])
    with pytest.raises(BadInput, match="target and original read the list as different tokens"):
        Forgotten().measure(case, mixed)


def test_missing():
    assert Forgotten().missing(tiny_case(sets=("forget", "holdout")))
    assert Forgotten().missing(tiny_case(sets=("forget", "utility"))) is None
    assert Forgotten().missing(case_of("unlearned", forget=False, access="text")) is None


# --- the set


def test_suspects_need_no_answers(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "answer": null, "entity": "x"}\n{"prompt": "c", "answer": "d"}\n')
    rows = load_set("suspects", SetSpec(path)).examples
    assert [(r.prompt, r.answer, r.entity) for r in rows] == [("a", "", ""), ("b", "", "x"), ("c", "d", "")]
    with pytest.raises(BadInput, match=r"q\.jsonl:1: column 'answer' is missing"):
        load_set("forget", SetSpec(path))
    path.write_text('{"q": "a", "who": "x"}\n')
    named = SetSpec(path, columns={"prompt": "q", "entity": "who"})
    assert load_set("suspects", named).examples[0].prompt == "a"
    with pytest.raises(BadInput, match="no preset fits"):
        load_set("forget", named)
    path.write_text('{"prompt": "a"}\n{"prompt": " "}\n')
    with pytest.raises(BadInput, match=r"q\.jsonl:2: column 'prompt' is empty"):
        load_set("suspects", SetSpec(path))


def test_the_command_line_takes_suspects(tmp_path):
    tiny = build_tiny()
    done = audit("scan", tiny.models["unlearned"], "--suspects", tmp_path / "none.jsonl", "--out", tmp_path)
    assert done.returncode == 2
    assert "none.jsonl: cannot be read" in done.stderr
