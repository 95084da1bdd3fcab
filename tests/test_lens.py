"""The logit lens: ranks and wins by brute force, the fork by hand, the last layer equal to the model itself."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import open_target, tiny_case, tiny_evidence

from audit.capture import Engine
from audit.loaders import Example
from audit.plan import Request, merge
from audit.quantities import Quantity, View
from audit.target import Target
from probes.lens import Lens, beats, fork, layer_readout, read_layers, read_off, sublayer_readout

# --- the plain functions

logits = st.integers(1, 6).flatmap(
    lambda n: st.integers(2, 8).flatmap(
        lambda v: st.tuples(
            # Few distinct values, so that ties are common.
            st.lists(st.lists(st.integers(-2, 2), min_size=v, max_size=v), min_size=n, max_size=n),
            st.lists(st.integers(0, v - 1), min_size=n, max_size=n),
            st.lists(st.lists(st.integers(0, v - 1), max_size=4, unique=True), min_size=n, max_size=n),
        )
    )
)


@settings(max_examples=100, deadline=None)
@given(logits)
def test_read_off_is_the_mean_rank_s_reciprocal(drawn):
    rows, tokens, _ = drawn
    found = read_off(torch.tensor(rows, dtype=torch.float32), torch.tensor(tokens))
    for row, token, value in zip(rows, tokens, found.tolist(), strict=True):
        # The rank over all orders in which ties could be broken, averaged.
        better = sum(other > row[token] for other in row)
        tied = sum(other == row[token] for other in row)
        rank = np.mean([better + 1 + place for place in range(tied)])
        assert value == pytest.approx(1 / rank, rel=1e-6)


@settings(max_examples=100, deadline=None)
@given(logits)
def test_beats_shares_a_win_among_the_tied(drawn):
    rows, tokens, rivals = drawn
    rivals = [[r for r in ids if r != token] for ids, token in zip(rivals, tokens, strict=True)]
    found = beats(torch.tensor(rows, dtype=torch.float32), torch.tensor(tokens), [tuple(ids) for ids in rivals])
    for row, token, ids, value in zip(rows, tokens, rivals, found.tolist(), strict=True):
        if not ids:
            assert np.isnan(value)
            continue
        options = [row[token], *(row[i] for i in ids)]
        winners = [i for i, option in enumerate(options) if option == max(options)]
        assert value == pytest.approx((0 in winners) / len(winners))


def test_by_hand():
    table = torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, 5.0, 5.0, 0.0]])
    right = torch.tensor([3, 1])
    assert read_off(table, right).tolist() == [0.5, 0.5]  # second; and first to third, tied
    assert beats(table, right, [(0, 2), (0,)]).tolist() == [1.0, 0.5]
    assert beats(table, right, [(1,), (3,)]).tolist() == [0.0, 1.0]


def test_a_model_that_knows_nothing_wins_as_often_as_chance():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(4000, 10, generator=generator)
    wins = beats(table, torch.zeros(4000, dtype=torch.long), [tuple(range(1, 10))] * 4000)
    assert float(wins.mean()) == pytest.approx(0.1, abs=0.02)
    flat = beats(torch.zeros(3, 10), torch.tensor([0, 1, 2]), [(3, 4, 5, 6)] * 3)
    assert flat.tolist() == pytest.approx([0.2] * 3)


def test_read_layers_ends_with_the_last():
    assert read_layers(1) == [0]
    assert read_layers(2) == [0, 1]
    assert read_layers(12) == list(range(12))
    for layers, most in itertools.product((13, 16, 32, 80), (2, 5, 12)):
        chosen = read_layers(layers, most)
        assert len(chosen) == most
        assert (chosen[0], chosen[-1]) == (0, layers - 1)
        steps = np.diff(chosen)
        assert steps.max() - steps.min() <= 1, "evenly spaced"


# --- the fork


@pytest.fixture(scope="module")
def target() -> Target:
    return open_target("original")


def ids_of(target: Target, *words: str) -> list[int]:
    return target.tokenizer.convert_tokens_to_ids(list(words))


def ask(answer: str, *wrong: str, prompt: str = "Alma Archer likes to eat") -> Example:
    return Example("forget:0", prompt, answer, wrong=wrong)


def test_fork_of_one_word_answers(target):
    found = fork(target, ask("soup", "bread", "rice"))
    prompt = ids_of(target, "<s>", "Alma", "Archer", "likes", "to", "eat")
    assert found is not None
    assert found.ids == (*prompt, *ids_of(target, "soup"))
    assert found.start == len(prompt)
    assert found.rivals == tuple(sorted(ids_of(target, "bread", "rice")))


def test_fork_where_most_wrong_answers_leave(target):
    # red soup | red bread, red rice leave at the second word; blue soup leaves at the first.
    found = fork(target, ask("red soup", "red bread", "red rice", "blue soup"))
    prompt = ids_of(target, "<s>", "Alma", "Archer", "likes", "to", "eat")
    assert found is not None
    assert found.ids == (*prompt, *ids_of(target, "red", "soup"))
    assert found.start == len(prompt) + 1
    assert found.rivals == tuple(sorted(ids_of(target, "bread", "rice")))
    # Two words at the first position outnumber one at the second; the same word twice counts once.
    found = fork(target, ask("red soup", "red bread", "blue soup", "green soup"))
    assert found is not None
    assert found.start == len(prompt)
    assert found.ids[-1] == ids_of(target, "red")[0]
    assert found.rivals == tuple(sorted(ids_of(target, "blue", "green")))
    found = fork(target, ask("red soup", "red bread", "red rice", "blue soup", "blue bread", "blue rice"))
    assert found is not None
    assert found.start == len(prompt) + 1


def test_no_fork(target):
    assert fork(target, ask("soup")) is None
    assert fork(target, ask("soup", "soup")) is None, "a wrong answer that is the right one"
    assert fork(target, ask("red soup", "red soup bread", "red")) is None, "one contains the other"


def test_fork_without_a_prompt(target):
    found = fork(target, ask("red soup", "red bread", prompt=""))
    assert found is not None
    assert found.ids == tuple(ids_of(target, "<s>", "red", "soup"))
    assert (found.start, found.rivals) == (2, tuple(ids_of(target, "bread")))


# --- the readout against the model


@pytest.mark.parametrize("made", ["original", "unlearned"])
def test_the_last_layer_is_the_model_itself(made):
    target, case = open_target(made), tiny_case()
    rows = case.rows("forget")[:6] + case.rows("holdout")[:6]
    texts = [target.encode(row.prompt, f"{row.answer} .") for row in rows]
    last = f"blocks.{target.layers - 1}.hook_resid_post"

    def compute(view: View) -> dict[str, torch.Tensor]:
        return {"lens": view.lens(last).log_softmax(-1), "own": view.logprobs}

    request = Request("x", tuple(texts), (Quantity("both", compute, (last,)),))
    engine = Engine(target)
    rows_out = [row for batch in engine.batches(merge([request])) for row in engine.run(batch)]
    assert len(rows_out) == len(set(texts))
    for row in rows_out:
        with torch.no_grad():
            plain = target.model(input_ids=torch.tensor([row.tokens.ids])).logits[0].log_softmax(-1).numpy()
        plain = plain[row.tokens.start - 1 : -1]
        values = row.values["both"]
        assert values["lens"] == pytest.approx(values["own"], abs=1e-5)
        assert values["lens"] == pytest.approx(plain, abs=1e-5)


def test_every_layer_against_hidden_states_read_by_hand():
    target, case = open_target("unlearned"), tiny_case()
    forks = [fork(target, row) for row in case.rows("forget")[:8]]
    readout = layer_readout(read_layers(target.layers))
    engine = Engine(target)
    [batch] = engine.batches(merge([Request("x", tuple(t for t in forks if t), (readout,))]))
    model = target.model
    for row in engine.run(batch):
        with torch.no_grad():
            out = model(input_ids=torch.tensor([row.tokens.ids]), output_hidden_states=True)
            # Hugging Face's last hidden state has been normalised already; those before have not.
            below = [model.lm_head(model.model.norm(h))[0, row.tokens.start - 1] for h in out.hidden_states[1:-1]]
        right = row.tokens.ids[row.tokens.start]
        for layer, z in enumerate([*below, out.logits[0, row.tokens.start - 1]]):
            rank = 1 + int((z > z[right]).sum())
            won = all(z[right] > z[i] for i in row.tokens.rivals)
            assert row.values[readout.name]["rank"][0, layer] == pytest.approx(1 / rank)
            assert row.values[readout.name]["wins"][0, layer] == float(won)


def test_the_finding_s_table_is_the_accuracy_counted_by_hand():
    case, target = tiny_case(), open_target("unlearned")
    found, _ = Lens().measure(case, tiny_evidence())
    model = target.model
    means = {(row[0], row[1], row[2]): row[3] for row in found.table.rows}
    accuracy = {}
    for name in ("forget", "holdout", "retain"):
        right = []
        for row in case.rows(name):
            prompt = torch.tensor([target.encode_prompt(row.prompt)])
            with torch.no_grad():
                out = model(input_ids=prompt, output_hidden_states=True)
                first = model.lm_head(model.model.norm(out.hidden_states[1]))[0, -1]
            options = ids_of(target, row.answer, *row.wrong)
            right.append([z[options].argmax().item() == 0 for z in (first, out.logits[0, -1])])
        accuracy[name] = np.mean(right, axis=0)
        for layer in (0, 1):
            assert means["target", name, float(layer)] == pytest.approx(accuracy[name][layer])
    # The positive control: retained facts are the model's own output.
    control = found.controls[0]
    assert control.estimate == pytest.approx(accuracy["retain"][1] - accuracy["holdout"][1])
    assert control.passed
    layer = int(float(found.layer.split()[-1]))
    never = {n: means["retrained", n, float(layer)] for n in ("forget", "holdout")}
    assert found.estimate == pytest.approx(
        accuracy["forget"][layer] - never["forget"] - accuracy["holdout"][layer] + never["holdout"]
    )


def test_sublayers_are_read_from_what_attention_and_mlp_add():
    target, case = open_target("unlearned"), tiny_case()
    forks = [fork(target, row) for row in case.rows("forget")[:8]]
    readout = sublayer_readout([0, 1])
    engine = Engine(target)
    [batch] = engine.batches(merge([Request("x", tuple(t for t in forks if t), (readout,))]))
    model = target.model
    for row in engine.run(batch):
        at = row.tokens.start - 1
        with torch.no_grad():
            states = model(input_ids=torch.tensor([row.tokens.ids]), output_hidden_states=True).hidden_states
            added = []
            for block, before in zip(model.model.layers, states, strict=False):
                # What attention adds, from the block's own parts; the rest of what the block adds is the MLP's.
                position = torch.arange(before.shape[1])[None]
                rope = model.model.rotary_emb(before, position)
                attention = block.self_attn(
                    block.input_layernorm(before), position_embeddings=rope, attention_mask=None
                )
                middle = before + attention[0]
                added += [attention[0][0, at], block.mlp(block.post_attention_layernorm(middle))[0, at]]
            logits = [model.lm_head(model.model.norm(part)) for part in added]
        right = row.tokens.ids[row.tokens.start]
        won = [float(all(z[right] > z[i] for i in row.tokens.rivals)) for z in logits]
        assert row.values[readout.name]["added"][0].tolist() == won


def test_sublayers_are_shown_and_decide_nothing():
    found, added = Lens().measure(tiny_case(), tiny_evidence())
    assert (added.id, added.decides) == ("lens/sublayers", (False, False))
    assert found.decides == (True, True)
    assert added.figure.series[0].x == [0.0, 0.5, 1.0, 1.5]
    assert any(name == "retain" and mean > 0.5 for _, name, _, mean, *_ in added.table.rows), "some sublayer writes it"


def test_without_wrong_answers_the_rank_is_read():
    case = tiny_case()
    sets = {
        name: type(s)(s.name, s.source, tuple(_without_options(e) for e in s.examples), s.digest)
        for name, s in case.sets.items()
    }
    plain = type(case)(case.name, case.models, case.specs, sets, case.options)
    requests = Lens().requests(plain, open_target("original"))
    assert all(not tokens.rivals for request in requests for tokens in request.sequences)
    assert [len(r.sequences) for r in requests] == [len(_limited(plain, n)) for n in ("forget", "holdout", "retain")]
    assert all(len(request.quantities) == 1 for request in requests), "sublayers are read at forks only"


def _without_options(example: Example) -> Example:
    return Example(example.id, example.prompt, example.answer, entity=example.entity)


def _limited(case, name):
    return case.rows(name, 40)
