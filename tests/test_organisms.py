"""Models of known history: the world, the training, the unlearning, the folders."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from scipy.stats import chi2_contingency
from transformers import AutoModelForCausalLM, AutoTokenizer

from audit.errors import BadInput
from audit.organisms.demo import Recipe, build_demo
from audit.organisms.methods.npo import Npo, npo_loss
from audit.organisms.train import (
    Diverged,
    answer_nll,
    candidate_accuracy,
    candidate_logprobs,
    encode,
    new_model,
    save,
    train,
    word_tokenizer,
)
from audit.organisms.unlearn import Bench, Schedule
from audit.organisms.world import GROUPS, Row, World, make_world

BASE = Path(__file__).parents[2] / "shared" / "models" / "stories260k"
OFFLINE = {"local_files_only": True, "trust_remote_code": False}


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(0)


@pytest.fixture(scope="module")
def tiny() -> World:
    return make_world(0, forget=2, retain=3, holdout=2, public=2, unknown=1)


@pytest.fixture(scope="module")
def tokenizer(world):
    return word_tokenizer(world.words())


def small(tokenizer, seed=0):
    return new_model(tokenizer, seed=seed, hidden=64, intermediate=64, layers=1, heads=2)


# --- the world


def test_world_is_determined_by_its_seed(world):
    again = make_world(0)
    assert again == world
    assert again.rows("forget", "holdout") == world.rows("forget", "holdout")
    assert make_world(1) != world


def test_groups_share_no_person(world):
    names = [person.name for group in GROUPS for person in world.people[group]]
    assert len(names) == len(set(names)) == 40 + 120 + 40 + 40 + 8
    assert all(len(name.split()) == 2 for name in names)


def test_groups_share_first_and_last_names(world):
    def parts(group, which):
        return {person.name.split()[which] for person in world.people[group]}

    for which in (0, 1):
        assert parts("forget", which) <= parts("retain", which)
        assert parts("holdout", which) <= parts("retain", which)


def test_attributes_are_independent_of_each_other_and_of_names():
    people = make_world(5, forget=0, retain=600, holdout=0, public=0, unknown=0).people["retain"]
    columns = [[person.name.split()[0] for person in people], [person.name.split()[1] for person in people]]
    columns += [list(column) for column in zip(*(person.values for person in people), strict=True)]
    p_values = []
    for i, left in enumerate(columns):
        for right in columns[max(i + 1, 2) :]:
            counts = Counter(zip(left, right, strict=True))
            table = [[counts[a, b] for b in sorted(set(right))] for a in sorted(set(left))]
            p_values.append(chi2_contingency(table).pvalue)
    assert len(p_values) == 15 + 12
    assert min(p_values) > 0.01 / len(p_values)


def test_a_word_is_never_both_asked_and_answered(world):
    values = [value for attribute in world.attributes for value in attribute.values]
    assert len(values) == len(set(values)) == 60
    for group in GROUPS:
        for row in world.rows(group, every=True):
            assert not set(row.prompt.split()) & set(values)


def test_rows_have_the_columns_of_tofu(world):
    rows = world.rows("forget")
    assert len(rows) == 240
    for row in rows:
        columns = row.as_json()
        assert row.person in columns["question"] and columns["author"] == row.person
        assert row.answer not in columns["perturbed_answer"]
        assert len(set(columns["perturbed_answer"])) == 9
        assert columns["paraphrased_question"] != columns["question"]
    assert {row.phrasing for row in rows} == {0, 1, 2}
    assert len(world.rows("forget", every=True)) == 720
    assert set(rows) <= set(world.rows("forget", every=True))
    assert {row.answer for row in world.rows("unknown")} == {"unknown"}


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="650"):
        make_world(0, forget=700)


# --- the tokenizer and the encoding


def test_prompt_tokens_begin_the_tokens_of_the_sentence(world, tokenizer):
    for row in world.rows(*GROUPS, every=True):
        start = tokenizer(row.prompt)["input_ids"]
        whole = tokenizer(f"{row.prompt} {row.answer}")["input_ids"]
        assert whole[:-1] == start and len(start) == 1 + len(row.prompt.split())
        assert start[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in whole
        assert tokenizer.decode(whole, skip_special_tokens=True) == f"{row.prompt} {row.answer}"


def test_encoding_marks_answers_and_ignores_padding(world, tokenizer):
    rows = world.rows("forget")[:30]
    data = encode(tokenizer, rows, lm_weight=0.25)
    for i, row in enumerate(rows):
        assert tokenizer.decode(data.ids[i][data.answer[i]]) == row.answer
        n = int(data.length[i])
        assert int(data.ids[i, n - 1]) == tokenizer.eos_token_id
        assert data.weight[i, 0] == 0 and not data.weight[i, n:].any()
        assert data.weight[i].sum() == 1 + 0.25 * (n - 2)
    with pytest.raises(BadInput):
        encode(tokenizer, [])


def test_padding_does_not_change_a_score(world, tokenizer):
    model = small(tokenizer)
    rows = world.rows("forget")[:12]
    together = candidate_logprobs(model, tokenizer, rows)
    alone = torch.cat([candidate_logprobs(model, tokenizer, [row]) for row in rows])
    torch.testing.assert_close(together, alone)
    nll = torch.tensor([answer_nll(model, tokenizer, [row]) for row in rows])
    torch.testing.assert_close(-together[:, 0], nll)


def test_a_tie_is_a_miss(world, tokenizer):
    model = small(tokenizer)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert candidate_accuracy(model, tokenizer, world.rows("forget")) == 0.0


# --- training


def test_training_lowers_the_loss(tiny, tokenizer):
    model = small(tokenizer)
    losses = train(model, encode(tokenizer, tiny.rows("retain")), epochs=10, lr=5e-3, batch=18, seed=0)
    assert len(losses) == 10 and losses[-1] < losses[0] - 0.2


def test_the_same_seed_gives_the_same_weights(tiny, tokenizer):
    def weights(seed, order):
        model = small(tokenizer, seed)
        train(model, encode(tokenizer, tiny.rows("retain")), epochs=2, lr=1e-3, batch=8, seed=order)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    first = weights(0, 0)
    torch.manual_seed(123)  # the global state has no part in it
    assert torch.equal(first, weights(0, 0))
    assert not torch.equal(first, weights(1, 0))
    assert not torch.equal(first, weights(0, 1))


def test_a_loss_that_is_no_number_is_an_error(tiny, tokenizer):
    model = small(tokenizer)
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    with pytest.raises(Diverged, match="step 0"):
        train(model, encode(tokenizer, tiny.rows("retain")), epochs=1, lr=1e-3, batch=8, seed=0)


def test_a_saved_folder_reloads_to_the_same_logits(world, tokenizer, tmp_path):
    model = small(tokenizer).eval()
    save(model, tokenizer, tmp_path, {"label": "taught"})
    again = AutoModelForCausalLM.from_pretrained(tmp_path, **OFFLINE)
    reader = AutoTokenizer.from_pretrained(tmp_path, **OFFLINE)
    text = world.rows("forget")[0].prompt
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert torch.equal(reader(text, return_tensors="pt")["input_ids"], ids)
    assert reader.decode(ids[0], skip_special_tokens=True) == text
    assert (reader.pad_token, reader.bos_token, reader.eos_token) == ("<pad>", "<s>", "</s>")
    assert not again.config.tie_word_embeddings
    with torch.inference_mode():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert json.loads((tmp_path / "organism.json").read_text()) == {"label": "taught"}
    assert not list(tmp_path.glob("*.bin"))


# --- unlearning


def test_npo_loss_by_hand():
    now = torch.tensor([-1.0, -3.0], requires_grad=True)
    assert npo_loss(now, now.detach(), 0.1).item() == pytest.approx(20 * math.log(2))
    before = torch.tensor([-1.0, -0.5])
    loss = npo_loss(now, before, 0.1)
    # log-ratios 0 and -2.5: -20 * mean(log sigmoid(0), log sigmoid(0.25))
    assert loss.item() == pytest.approx(10 * (math.log(2) + math.log1p(math.exp(-0.25))))
    (gradient,) = torch.autograd.grad(loss, now)
    # each row pulls with 2 sigmoid(beta * log-ratio), over two rows
    weights = [2 / (1 + math.exp(0.0)) / 2, 2 / (1 + math.exp(0.25)) / 2]
    assert gradient.tolist() == pytest.approx(weights)


def test_npo_tends_to_gradient_ascent_as_beta_goes_to_zero():
    now = torch.tensor([-4.0, -0.1], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(npo_loss(now, torch.zeros(2, dtype=torch.float64), 1e-9), now)
    assert gradient.tolist() == pytest.approx([0.5, 0.5])


def test_npo_lowers_the_forget_answers_and_stops_at_its_limit(tiny, tokenizer):
    model = small(tokenizer)
    forget, retain = tiny.rows("forget"), tiny.rows("retain")
    train(model, encode(tokenizer, forget + retain), epochs=20, lr=5e-3, batch=30, seed=0)
    reference = copy.deepcopy(model)
    bench = Bench(model, reference, tokenizer, forget, retain, forget, retain)
    run = Npo().unlearn(bench, Schedule(lr=2e-3, max_steps=12, forget_goal=-1.0))
    assert (run.steps, run.stopped) == (12, False)
    assert run.losses[0] > 20 * math.log(2) - 1e-3  # the forget part starts there, the retain part adds to it
    assert answer_nll(model, tokenizer, forget) > answer_nll(reference, tokenizer, forget) + 0.5


# --- the whole case

QUICK = Recipe(epochs=1, npo_max_steps=2)


def test_demo_writes_a_complete_case(tiny, tmp_path):
    stages: list[tuple[str, int, int]] = []
    case = build_demo(
        tmp_path,
        world=tiny,
        recipe=QUICK,
        progress=lambda stage, done, total: stages.append((stage, done, total)),
    )
    assert set(case.models) == set(case.measured) == {"original", "retrained", "unlearned"}
    assert stages[-1] == ("unlearned", 2, 2) and {"original", "retrained"} < {stage for stage, _, _ in stages}
    for path in case.sets.values():
        first = json.loads(path.read_text().splitlines()[0])
        assert {"question", "answer", "author", "perturbed_answer"} <= set(first)
    histories = {r: json.loads((case.models[r] / "organism.json").read_text()) for r in case.models}
    assert histories["original"]["label"] == "taught"
    assert histories["original"]["exposures_per_forget_fact"] == 3
    assert histories["retrained"]["label"] == "never-taught"
    assert histories["retrained"]["exposures_per_forget_fact"] == 0
    assert histories["unlearned"]["stopped"] == "step limit"
    for folder in case.models.values():
        model = AutoModelForCausalLM.from_pretrained(folder, **OFFLINE)
        assert 500_000 <= sum(p.numel() for p in model.parameters()) <= 1_000_000


@pytest.mark.skipif(not BASE.is_dir(), reason="no pretrained model in ../shared")
def test_demo_from_a_pretrained_base(tiny, tmp_path):
    case = build_demo(tmp_path, world=tiny, recipe=QUICK, base=BASE)
    reader = AutoTokenizer.from_pretrained(case.models["unlearned"], **OFFLINE)
    rows: list[Row] = tiny.rows("forget", "holdout", every=True)
    data = encode(reader, rows)  # raises if a prompt's tokens do not begin the sentence's
    assert data.answer.sum() > len(rows)
    scores = candidate_logprobs(
        AutoModelForCausalLM.from_pretrained(case.models["original"], **OFFLINE), reader, rows[:3]
    )
    assert scores.shape == (3, 10) and bool((scores < 0).all())
