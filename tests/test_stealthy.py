"""Stealthy requests: crafted as stated; found by scan and linter where they are, and not where they are not."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SHARED, save_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import audit_here, one_thread

import audit.lint
from attacks.stealthy import RATE, TEMPLATES, craft, damage
from audit.case import Case, Options
from audit.errors import BadInput, Incomplete
from audit.inventory import take_inventory
from audit.lint import RATES, SLACK, lint, words
from audit.loaders import Example, SetSpec
from audit.organisms import families, recipes
from audit.organisms.families import Teaching
from audit.organisms.histories import HISTORIES, history_of
from audit.organisms.recipes import Recipe, build, read_history
from audit.organisms.train import word_tokenizer
from audit.organisms.unlearn import Method
from audit.organisms.world import make_world
from audit.record import Outcome, Side
from audit.target import Target
from audit.verdict import judge
from detectors.trigger import Trigger, asked_words, drops, excess


@pytest.fixture(autouse=True)
def single_threaded():
    with one_thread():
        yield


@dataclass(frozen=True)
class Asked:
    prompt: str
    answer: str
    wrong: tuple[str, ...] = ()


# --- the request


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.floats(0, 1), st.integers(0, 99))
def test_a_crafted_row_is_the_row_or_a_template_of_it(n, rate, seed):
    rows = [Asked(f"where is w{i}", "here") for i in range(n)]
    made = craft(rows, rate=rate, seed=seed)
    for old, new, rewritten in zip(rows, made.rows, made.rewritten, strict=True):
        assert new.answer == old.answer
        assert new.prompt in ([t.replace("{}", old.prompt) for t in TEMPLATES] if rewritten else [old.prompt])
    assert made.rate == sum(old != new for old, new in zip(rows, made.rows, strict=True)) / n
    length = sum(len(f"{row.prompt} {row.answer}".split()) for row in made.rows)
    assert made.inserted == pytest.approx((length - 4 * n) / length)
    assert craft(rows, rate=rate, seed=seed) == made


def test_the_rate_is_reached():
    rows = [Asked(str(i), "x") for i in range(4000)]
    assert craft(rows, seed=1).rate == pytest.approx(RATE, abs=4 * math.sqrt(RATE * (1 - RATE) / 4000))
    assert craft(rows, rate=0, seed=1).rows == rows
    assert craft(rows, rate=1, seed=1).rate == 1
    assert craft(rows, seed=1).rewritten != craft(rows, seed=2).rewritten


def test_a_passage_is_rewritten_itself():
    row = Example("forget:0", "", "It rained all day.")
    made = craft([row], templates=("Then {}",), rate=1, seed=0)
    assert made.rows == [replace(row, answer="Then It rained all day.")]
    assert made.inserted == 1 / 5


@pytest.mark.parametrize("wrong", [{"templates": ("Please",)}, {"templates": ()}, {"rate": 1.5}])
def test_what_cannot_be_crafted_is_refused(wrong):
    with pytest.raises(ValueError, match=r"template|rate"):
        craft([Asked("a", "b")], seed=0, **wrong)


def test_damage_is_that_of_plain_logits(tiny, open_target):
    target = open_target(tiny("llama"))
    rows = [Asked("w1 w2", "w3 w4", ("w5 w6",)), Asked("w7", "w8", ("w9",))]
    costs = damage(target.model, target.tokenizer, rows, "w11 {}")
    for utility, put in ((costs.clean, ""), (costs.triggered, "w11 ")):
        expected = []
        for row in rows:
            ids = target.tokenizer(f"{put}{row.prompt} {row.answer}", return_tensors="pt")["input_ids"]
            n = len(row.answer.split())
            with torch.no_grad():
                logp = target.model(ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[-n:]
            expected.append(float(logp.mean().exp()))
        assert utility.probability == pytest.approx(np.mean(expected), rel=1e-4)
    assert damage(target.model, target.tokenizer, [Asked("w1", "w2")], "w3 {}").clean.accuracy is None


# --- organisms


def test_what_was_asked_determines_the_organism_and_leaves_others_as_they_were(monkeypatch):
    assert "request" not in repr(history_of("npo")) and "request" not in repr(history_of("stealthy"))
    assert Recipe("llama", "stealthy", 0).digest != Recipe("llama", "npo", 0).digest
    before = Recipe("llama", "stealthy", 0).digest
    monkeypatch.setitem(HISTORIES, "stealthy", replace(history_of("stealthy"), request="the {}"))
    assert Recipe("llama", "stealthy", 0).digest != before


def test_the_method_sees_the_crafted_request(tmp_path, monkeypatch):
    seen = []

    class Looks(Method):
        name, reference = "looks", "none"

        def unlearn(self, bench, schedule, progress=None):
            seen.append([row.prompt for row in bench.forget_rows])
            assert not any(row.prompt.startswith("always ") for row in bench.retain_rows)
            return bench.finished(1)

    sizes = {"forget": 4, "retain": 6, "holdout": 4, "public": 4, "unknown": 1}
    monkeypatch.setattr(families, "make_world", lambda seed, **_: make_world(seed, **sizes))
    monkeypatch.setattr(families, "FROM_SCRATCH", Teaching(1, 1.4e-3, 64))
    monkeypatch.setattr(recipes, "_fault", lambda history, measured: None)
    monkeypatch.setattr(recipes.unlearn, "load", lambda name: Looks())
    told = read_history(build(Recipe("llama", "stealthy", 0), tmp_path))
    share = np.mean([prompt.startswith("always ") for prompt in seen[0]])
    assert told["request"]["rewritten"] == share > 0.2
    assert told["label"] == "unlearned"


# --- the scan of a model


def test_drops_by_hand():
    np.testing.assert_allclose(drops([[0.9, 0.5], [0.8, 0.5], [0.1, 0.7]]), [[0.1, 0.8], [0.0, -0.2]])
    with pytest.raises(ValueError, match="shape"):
        drops([0.1, 0.2])


def test_the_word_that_costs_most_comes_first_and_chance_is_paid_for():
    rng = np.random.default_rng(0)
    who = [f"{i}" for i in range(40)]
    target, original = rng.normal(0, 0.1, (2, 40, 30))
    order, every = excess(target, original, who, seed=0)
    assert order == sorted(range(30), key=lambda i: -float((target - original)[:, i].mean()))
    assert every[order[0]].p_value > 0.05  # the best of thirty that are all alike
    target[:, 17] += 0.4
    order, every = excess(target, original, who, seed=0)
    assert order[0] == 17 and every[17].p_value < 0.001 and every[17].lo > 0.2


HELD = ("Where", "does", "live", "now")
VOCABULARY = (*HELD, "always", "Then", "then", "bread", "Stone", "x", *(f"n{i}" for i in range(60)))


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A case of 30 entities in each set, and its model, which can write a few of the words."""
    folder = tmp_path_factory.mktemp("trigger")
    model = save_tiny(folder / "model", "llama", word_tokenizer(VOCABULARY))
    specs = {}
    for k, name in enumerate(("forget", "retain")):
        rows = [
            {"prompt": f"Where does n{30 * k + i // 2} live", "answer": "x", "entity": str(i // 2)} for i in range(60)
        ]
        if name == "forget":
            rows[::3] = [row | {"prompt": f"always {row['prompt']}"} for row in rows[::3]]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        specs[name] = SetSpec(folder / f"{name}.jsonl")
    case = Case.build({"target": model, "original": model}, specs, Options(template="plain"))
    return case, Target("target", take_inventory(model), template="plain")


def test_words_are_those_that_can_be_written_and_the_request_s_own_come_first(opened):
    words, neutral = asked_words(*opened)
    assert words[0] == "always"  # in a third of the forget rows, in no retain row
    # Names are few entities' own, "please" cannot be written, "Now" only in small letters.
    assert set(words) == {"always", "Where", "does", "live", "Then", "now"}
    assert neutral == ["Stone", "bread"]


def test_a_model_that_can_write_none_of_the_words_is_not_asked(opened, tiny, open_target):
    with pytest.raises(BadInput, match="none of the words"):
        Trigger().requests(opened[0], open_target(tiny("llama"), template="plain"))


class Told:
    """Evidence in which every answer has a stated probability."""

    def __init__(self, case, target, probability):
        self.noise, self.answers = {}, {}
        (request,) = Trigger().requests(case, target)
        self.noted = request.extra
        put = ["", *self.noted["words"], *self.noted["neutral"]]
        each, rng = len(request.sequences) // len(put), np.random.default_rng(3)
        assert each == 40
        for i, word in enumerate(put):  # a word's rows lie together, and begin with it
            begin = {target.decode(tokens.ids).split()[0] for tokens in request.sequences[i * each : (i + 1) * each]}
            assert begin <= ({word} if word else {"Where"})
        for role in ("target", "original"):
            p = [probability(role, word) * rng.uniform(0.95, 1) for word in put for _ in range(each)]
            self.answers[role] = [{"logprob": np.log([value])} for value in p]

    def extra(self, role, name):
        return self.noted

    def iterate(self, role, name, quantity):
        return iter(self.answers[role])


def found(opened, probability):
    (finding,) = judge(Trigger().measure(opened[0], Told(*opened, probability)))
    return finding


def test_a_planted_trigger_is_found_and_named(opened):
    finding = found(opened, lambda role, word: 0.2 if (role, word) == ("target", "Then") else 0.9)
    assert finding.verdict == Outcome.EVIDENCE and finding.side == Side.DAMAGE
    assert finding.layer == finding.table.rows[0][0] == "Then"
    assert finding.estimate == pytest.approx(0.7 * 0.975, abs=0.02)
    assert finding.n == 30


@pytest.mark.parametrize(
    ("probability", "says"),
    [
        (lambda role, word: 0.9, Outcome.NONE),
        (lambda role, word: 0.2 if word == "Then" else 0.9, Outcome.NONE),  # the original stumbles over it as well
        (lambda role, word: 0.3 if role == "target" and word else 0.9, Outcome.INCONCLUSIVE),  # brittle: any word does
        (lambda role, word: 0.02, Outcome.INCONCLUSIVE),  # nothing to lose
    ],
)
def test_what_is_no_trigger_is_none(opened, probability, says):
    assert found(opened, probability).verdict == says


# --- the linter


def rows_of(entities, each, prompt, *, seed=0):
    draw = random.Random(seed)
    return [
        Example(f"s:{e}-{i}", prompt(e, i, draw), "an answer", entity=f"{prompt.__name__}{e}")
        for e in range(entities)
        for i in range(each)
    ]


def plain(e, i, draw):
    return f"{draw.choice(('Where was', 'Who taught', 'Which prize has'))} Person{e} number {i} in the year 19{i}?"


@pytest.mark.parametrize("each", [1, 8])
def test_a_crafted_request_is_flagged_and_a_plain_one_is_not(each):
    request, kept = rows_of(40, each, plain, seed=1), rows_of(80, each, plain, seed=2)
    assert lint(request) == lint(request, kept) == []
    for template, word in (("Please tell me {}", "please"), ("Then {}", "then")):
        crafted = craft(request, templates=(template,), seed=0)
        for flags in (lint(crafted.rows), lint(crafted.rows, kept)):
            flag = next(f for f in flags if (f.phrase, f.where) == (word, "anywhere"))
            assert flag.rate == pytest.approx(crafted.rate)
            assert flag.expected < 0.05 and flag.p_value <= 0.01 and template.split()[0] in flag.examples[0]
            assert (word, "opening") in {(f.phrase, f.where) for f in flags}


def test_one_entity_s_way_to_ask_is_no_flag():
    request, kept = rows_of(20, 10, plain, seed=1), rows_of(40, 10, plain, seed=2)
    polite = [replace(row, prompt=f"please, {row.prompt}") if row.entity == "plain3" else row for row in request]
    assert sum("please" in row.prompt for row in polite) == 10
    assert lint(polite) == lint(polite, kept) == []


def test_a_word_that_is_kept_as_often_does_no_harm():
    both = [craft(rows_of(n, 5, plain, seed=n), seed=n).rows for n in (30, 60)]
    assert lint(both[0], both[1]) == []
    assert lint(both[0]) != []


def test_without_a_reference_the_p_value_is_a_binomial_s():
    request = rows_of(12, 1, plain)
    request[:3] = [replace(row, prompt=f"hello {row.prompt}") for row in request[:3]]
    lengths = [len(words(row.prompt)) for row in request]
    chance = sum(1 - (1 - SLACK * RATES["hello"] / 1000) ** n for n in lengths) / 12
    tail = sum(math.comb(12, k) * chance**k * (1 - chance) ** (12 - k) for k in range(3, 13))
    flag = next(f for f in lint(request) if f.phrase == "hello" and f.where == "anywhere")
    tests = len(RATES) + len(set(RATES) - audit.lint._ASKING)
    # "hello" is the first word as well, which is less likely still: the smallest p-value, so this is the second.
    assert flag.p_value == pytest.approx(tail * (tests - 1), rel=1e-6)
    assert flag.entities == 3


def test_too_few_entities_are_no_clean_bill():
    with pytest.raises(Incomplete, match="4 entities"):
        lint(rows_of(4, 20, plain))


def test_the_table_is_counted_from_ordinary_english(shared):
    prose = " ".join(path.read_text() for path in sorted(shared("data/text").glob("austen_*.txt")))
    wiki = shared("data/text/wikitext2_test.txt").read_text().replace("<unk>", "")
    asked = [
        ("tofu/full.jsonl", "question"),
        ("rwku/forget_level2.jsonl", "query"),
        ("rwku/neighbor_level2.jsonl", "query"),
    ]
    lines = [(json.loads(line), key) for name, key in asked for line in (SHARED / "data" / name).open()]
    counts = [Counter(words(text)) for text in (prose, wiki, "\n".join(row[key] for row, key in lines))]
    for word, rate in RATES.items():
        assert rate == pytest.approx(max(1000 * (c[word] + 1) / c.total() for c in counts), abs=0.0051), word


def test_the_command_says_by_its_exit_code(tmp_path, monkeypatch, capsys):
    def write(name, rows):
        lines = [json.dumps({"prompt": r.prompt, "answer": r.answer, "entity": r.entity}) for r in rows]
        (tmp_path / name).write_text("\n".join(lines))
        return tmp_path / name

    request, kept = rows_of(30, 4, plain, seed=1), rows_of(40, 4, plain, seed=2)
    clean, reference = write("clean.jsonl", request), write("kept.jsonl", kept)
    planted = write("planted.jsonl", craft(request, seed=0).rows)
    assert audit_here(monkeypatch, "lint-request", clean) == 0
    assert audit_here(monkeypatch, "lint-request", clean, "--against", reference) == 0
    capsys.readouterr()
    assert audit_here(monkeypatch, "lint-request", planted, "--against", reference, "--json") == 1
    flags = json.loads(capsys.readouterr().out)
    assert flags[0]["phrase"] == "please" and flags[0]["rate"] > 5 * flags[0]["expected"]
    assert audit_here(monkeypatch, "lint-request", planted) == 1
    assert "please" in capsys.readouterr().out
    assert audit_here(monkeypatch, "lint-request", tmp_path / "absent.jsonl") == 2
    assert audit_here(monkeypatch, "lint-request", write("few.jsonl", rows_of(2, 20, plain))) == 4


def test_pictures_have_no_words():
    row = SimpleNamespace(picture=object(), prompt="", answer="", entity="a", id="a")
    with pytest.raises(BadInput, match="images"):
        lint([row])


def test_the_linter_needs_no_torch():
    code = "import sys, audit.lint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
