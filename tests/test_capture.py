"""The capture engine against the plainest forward pass there is: one text at a time, transformers alone.

Hidden states are compared with TransformerLens' own run_with_cache. Both references are computed here, on models
loaded here; nothing of the engine is used to check the engine.
"""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, save_tiny, words_tokenizer

from audit import capture, passes
from audit.capture import Engine
from audit.errors import BadInput
from audit.passes import TextPass
from audit.plan import Generate, Request, merge, pack
from audit.quantities import MOMENTS, TOKEN, Quantity, View, hidden, top_k
from audit.tokens import Tokens

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = (*TINY, "stories")
TOP = 5


def close(found, expected, *, tolerance=1e-5):
    """Equal to 1e-5, relative to the largest value where values are large."""
    found, expected = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max(initial=0.0) <= tolerance * max(1.0, np.abs(expected).max(initial=0.0))


@pytest.fixture(scope="module")
def folder(tiny, request):
    return lambda name: request.getfixturevalue("stories") if name == "stories" else tiny(name)


@pytest.fixture(scope="module")
def target(folder, open_target):
    return cache(lambda name: open_target(folder(name)))


@pytest.fixture(scope="module")
def plain_model(folder):
    """A model that the engine never touches."""
    from transformers import AutoModelForCausalLM

    return cache(lambda name: AutoModelForCausalLM.from_pretrained(folder(name)).eval())


@pytest.fixture(scope="module")
def bridge(folder):
    """TransformerLens' view of a fresh model."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM, AutoTokenizer

    @cache
    def boot(name):
        path = folder(name)
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        return TransformerBridge.boot_transformers(
            str(path), hf_model=model, tokenizer=AutoTokenizer.from_pretrained(path)
        )

    return boot


def sites(layers: int) -> list[str]:
    """Every canonical name that the documentation lists."""
    kinds = ("hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
    blocks = [f"blocks.{i}.{kind}" for i in range(layers) for kind in kinds]
    return ["hook_embed", *blocks, "ln_final.hook_in", "ln_final.hook_out"]


def corpus(seed: int = 0) -> list[Tokens]:
    """Ragged texts of 2 to 64 tokens with and without BOS (1); neighbours, options, repeats, one-token answers."""
    random = np.random.default_rng(seed)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(int(i) for i in random.integers(3, 110, length))

    texts = [Tokens((1, *draw(n - 1)), int(random.integers(1, n))) for n in (2, 3, 5, 9, 17, 33, 64)]
    texts += [Tokens(draw(n), int(random.integers(1, n))) for n in (2, 4, 13, 31, 64)]
    for length in (3, 8, 13, 21, 40):
        beginning = (1, *draw(length - 1))
        texts += [Tokens((*beginning, *draw(int(random.integers(1, 8)))), length) for _ in range(4)]
        texts += [Tokens((*beginning, option), length) for option in draw(3)]  # one input for all of them
    texts.append(Tokens(texts[5].ids, 1))  # once more, from an earlier token on
    texts.append(Tokens(texts[6].ids, texts[6].start, (7, 8)))
    return texts


def requests(layers: int) -> list[Request]:
    """Several instruments: some ask for the same texts, none for all quantities of all texts."""
    texts = tuple(corpus())
    return [
        Request("scores", texts, (TOKEN, MOMENTS)),
        Request("top", texts[::2], (top_k(TOP),)),
        Request("states", texts[1::3], (hidden(*sites(layers)),)),
    ]


@pytest.fixture(scope="module")
def expected(plain_model):
    """Per model and text, the numbers by definition: a pass without batch, in float64 from the logits on."""

    @cache
    def compute(name, tokens):
        with torch.inference_mode():
            logits = plain_model(name)(torch.tensor([tokens.ids])).logits[0]
        logprobs = logits.double().log_softmax(-1)[tokens.start - 1 : -1].numpy()
        p = np.exp(logprobs)
        mean = (p * logprobs).sum(1)
        order = np.argsort(-logprobs, axis=1)[:, :TOP]
        answer = np.array(tokens.ids[tokens.start :])
        return {
            "logprob": logprobs[np.arange(len(answer)), answer],
            "match": logprobs.argmax(1) == answer,
            "mean": mean,
            "variance": (p * (logprobs - mean[:, None]) ** 2).sum(1),
            "entropy": -(p * np.log(p)).sum(1),
            "top_ids": order,
            "top_logprobs": np.take_along_axis(logprobs, order, 1),
        }

    return compute


def check_scores(rows, name, expected):
    for row in rows:
        truth = expected(name, row.tokens)
        for arrays in row.values.values():
            for key, array in arrays.items():
                assert len(array) == row.tokens.scored
                if key in ("match", "top_ids"):
                    assert (array == truth[key]).all(), (key, row.tokens)
                elif key != "hidden":
                    close(array, truth[key])
        if "moments" in row.values:
            close(-row.values["moments"]["mean"], truth["entropy"])


# --- scores


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(
    ("name", "budget"), [*((name, budget) for name in MODELS for budget in (100, 4096)), ("llama", 1), ("gemma2", 1)]
)
def test_scores_equal_the_plain_forward_pass(name, share, budget, target, expected):
    engine = Engine(target(name), token_budget=budget, share=share)
    works = merge(requests(target(name).layers))
    batches = pack(works, token_budget=budget, share=share)
    assert any(batch.prefix for batch in batches) == (share and budget > 1)  # a budget of 1 leaves nothing together
    rows = [row for batch in batches for row in engine.run(batch)]
    check_scores(rows, name, expected)
    assert engine.passes.share == share  # none of these needs to be run without
    assert engine.forward_tokens == sum(batch.forward_tokens for batch in batches)
    # Every text has every quantity that anyone asked for, from the earliest token on.
    asked = {(w.tokens, tuple(q.name for q in w.quantities)) for w in works}
    assert {(row.tokens, tuple(row.values)) for row in rows} == asked
    assert len(rows) == len(works)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("rows_at_a_time", [1, 3])
def test_logits_in_chunks(name, rows_at_a_time, target, expected, monkeypatch):
    opened = target(name)
    vocabulary = opened.model.config.vocab_size
    monkeypatch.setattr(capture, "_LOGITS_ELEMENTS", rows_at_a_time * vocabulary + 1)
    engine = Engine(opened)
    batches = pack(merge(requests(opened.layers)), token_budget=4096)
    engine.run(batches[0])  # checks the model once, with a whole small pass
    seen: list[int] = []
    handle = opened.model.get_output_embeddings().register_forward_hook(lambda _m, args, _o: seen.append(len(args[0])))
    try:
        rows = [row for batch in batches for row in engine.run(batch)]
    finally:
        handle.remove()
    assert max(seen) == rows_at_a_time
    check_scores(rows, name, expected)


def test_what_the_engine_itself_packs(target, expected):
    engine = Engine(target("llama"), token_budget=300)
    works = merge(requests(2))
    batches = engine.batches(works)
    assert batches == engine.batches(works)
    check_scores([row for batch in batches for row in engine.run(batch)], "llama", expected)


def test_the_head_runs_once_for_all_that_want_the_same(target):
    engine = Engine(target("llama"))
    texts = [Tokens((5, 6, 7, *range(10 + i, 14 + i)), 4) for i in range(12)]
    asked = [Request("all", tuple(texts), (TOKEN,)), Request("some", tuple(texts[::2]), (MOMENTS,))]
    [batch] = pack(merge(asked), token_budget=4096)
    engine.run(batch)
    applied, head = [], engine.passes.head
    engine.passes.head = lambda state: applied.append(len(state)) or head(state)
    rows = engine.run(batch)
    assert sorted(applied) == [18, 18]  # not once for each of twelve texts that take turns
    assert [row.tokens for row in rows] == [work.tokens for work in batch.works]
    assert [set(row.values) for row in rows] == [{q.name for q in work.quantities} for work in batch.works]


def test_one_batch_twice_gives_the_same_bytes(target):
    engine = Engine(target("qwen2"))
    [batch, *_] = pack(merge(requests(2)), token_budget=4096)
    first, second = engine.run(batch), engine.run(batch)
    for a, b in zip(first, second, strict=True):
        for name, arrays in a.values.items():
            assert all(array.tobytes() == b.values[name][key].tobytes() for key, array in arrays.items())


def test_the_plain_pass_and_the_measured_noise(target, expected):
    engine = Engine(target("gpt_neox"))
    texts = corpus()[:8]
    for tokens in texts:
        found = engine.plain(tokens)
        close(found["logprob"], expected("gpt_neox", tokens)["logprob"])
    rows = [row for b in pack(merge([Request("r", tuple(texts))]), token_budget=200) for row in engine.run(b)]
    pairs = [(row.tokens, row.values["token"]) for row in rows]
    assert 0 <= engine.noise(pairs) < 1e-4
    wrong = dict(pairs[0][1], logprob=pairs[0][1]["logprob"] + np.float32(0.25))
    assert engine.noise([*pairs[1:], (pairs[0][0], wrong)]) == pytest.approx(0.25, abs=1e-4)
    assert engine.noise([]) == 0.0


def test_half_precision_stays_near_its_own_plain_pass(tiny, open_target):
    engine = Engine(open_target(tiny("llama"), dtype=torch.bfloat16), token_budget=200)
    rows = [row for b in pack(merge(requests(2)), token_budget=200) for row in engine.run(b)]
    assert engine.noise((row.tokens, row.values["token"]) for row in rows[::5]) < 0.3
    assert all(a.dtype in (np.float32, np.int64, bool) for r in rows for v in r.values.values() for a in v.values())


# --- hidden states


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", [n for n in MODELS if n != "gemma2"])
def test_hidden_states_at_every_canonical_name(name, share, target, bridge):
    check_states(name, sites(target(name).layers), share, target, bridge)


@pytest.mark.parametrize("share", [True, False])
def test_hidden_states_of_a_post_norm_architecture(share, target, bridge):
    names = [site for site in sites(2) if not site.endswith(("attn_out", "mlp_out"))]
    check_states("gemma2", names, share, target, bridge)


@pytest.mark.parametrize("site", ["blocks.0.hook_attn_out", "blocks.1.hook_mlp_out"])
def test_sublayer_outputs_of_a_post_norm_architecture(site, target, bridge):
    check_states("gemma2", [site], False, target, bridge)


def check_states(name, names, share, target, bridge):
    asked = Request("states", tuple(corpus()[::2]), (hidden(*names),))
    batches = pack(merge([asked]), token_budget=500, share=share)
    assert any(batch.prefix for batch in batches) == share
    engine = Engine(target(name))
    for batch in batches:
        for row in engine.run(batch):
            with torch.inference_mode():
                _, states = bridge(name).run_with_cache(torch.tensor([row.tokens.ids]), names_filter=names)
            found = row.values[f"hidden:{','.join(names)}"]["hidden"]
            assert found.shape[:2] == (row.tokens.scored, len(names))
            for i, site in enumerate(names):
                close(found[:, i], states[site][0, row.tokens.start - 1 : -1])


def test_hooks_are_gone_after_a_pass_even_one_that_fails(target):
    opened = target("llama")

    def broken(view: View) -> dict[str, torch.Tensor]:
        raise RuntimeError("third party")

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in opened.model.modules())

    before = hooks()
    engine = Engine(opened)
    [batch] = pack(merge([Request("r", (Tokens((1, 5, 6), 1),), (hidden(*sites(2)),))]), token_budget=99)
    engine.run(batch)
    failing = Quantity("broken", broken, ("hook_embed",))
    with pytest.raises(RuntimeError, match="third party"):
        engine.run(pack(merge([Request("r", (Tokens((1, 5, 6), 1),), (failing,))]), token_budget=99)[0])
    assert hooks() == before


# --- views


@pytest.mark.parametrize("name", MODELS)
def test_the_lens_at_the_last_block_reads_what_the_model_says(name, target):
    opened = target(name)
    last = f"blocks.{opened.layers - 1}.hook_resid_post"
    difference = Quantity(
        "difference", lambda view: {"d": (view.lens(last).log_softmax(-1) - view.logprobs).abs().amax(1)}, (last,)
    )
    rows = [
        row
        for batch in pack(merge([Request("r", tuple(corpus()), (difference,))]), token_budget=700)
        for row in Engine(opened).run(batch)
    ]
    assert max(row.values["difference"]["d"].max() for row in rows) < 1e-4


@pytest.mark.parametrize("rows_at_a_time", [1, 2, 1000])
def test_rivals_stand_at_the_first_scored_token_of_their_own_text(rows_at_a_time, target, monkeypatch):
    monkeypatch.setattr(capture, "_LOGITS_ELEMENTS", rows_at_a_time * 120)
    seen = Quantity("rivals", lambda view: {"sum": torch.tensor([sum(r) for r in view.rivals])})
    texts = [Tokens((1, 9, 10 + i, 20 + i), 1 + i % 3, (100 + i,) if i % 2 else ()) for i in range(9)]
    rows = [r for b in pack(merge([Request("r", tuple(texts), (seen,))]), token_budget=40) for r in _run(target, b)]
    assert {row.tokens for row in rows} == set(texts)
    for row in rows:
        assert row.values["rivals"]["sum"].tolist() == [sum(row.tokens.rivals)] + [0] * (row.tokens.scored - 1)


def _run(target, batch):
    return Engine(target("llama")).run(batch)


def test_moments_with_a_vocabulary_entry_ruled_out():
    logits = torch.tensor([[0.0, 1.0, -torch.inf], [2.0, -torch.inf, -torch.inf]])
    view = View(logits, torch.tensor([0, 0]), {}, [(), ()], lambda x: x, lambda x: x)
    found = MOMENTS.compute(view)
    p = np.exp([0, 1]) / np.exp([0, 1]).sum()
    mean = (p * np.log(p)).sum()
    close(found["mean"], [mean, 0.0])
    close(found["variance"], [(p * (np.log(p) - mean) ** 2).sum(), 0.0])


def moments_of(scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Variance as computed and as defined, of distributions whose logits spread by `scale`."""
    logits = scale * torch.randn(50, 32000, generator=torch.Generator().manual_seed(0))
    view = View(logits, torch.zeros(50, dtype=torch.long), {}, [()] * 50, lambda x: x, lambda x: x)
    exact = logits.double().log_softmax(-1)
    mean = (exact.exp() * exact).sum(1, keepdim=True)
    return MOMENTS.compute(view)["variance"].numpy(), (exact.exp() * (exact - mean) ** 2).sum(1).numpy()


@pytest.mark.parametrize("scale", [1.0, 2.0, 5.0])
def test_variance_of_ordinary_distributions(scale):
    found, exact = moments_of(scale)
    assert found == pytest.approx(exact, rel=2e-4)


def test_variance_of_nearly_uniform_distributions():
    found, exact = moments_of(0.02)
    assert found == pytest.approx(exact, rel=1e-3)


# --- unusual models


def test_a_head_that_cannot_be_taken_apart_is_left_to_the_model(folder, open_target, plain_model):
    opened = open_target(folder("llama"))

    def halve(_module, _args, output):
        output.logits = output.logits * 0.5
        return output

    opened.model.register_forward_hook(halve)
    texts = corpus()
    engine = Engine(opened)
    for batch in pack(merge([Request("r", tuple(texts))]), token_budget=300):
        for row in engine.run(batch):
            with torch.inference_mode():
                logits = plain_model("llama")(torch.tensor([row.tokens.ids])).logits[0] * 0.5
            answer = torch.tensor(row.tokens.ids[row.tokens.start :])
            truth = logits.log_softmax(-1)[row.tokens.start - 1 : -1].gather(1, answer[:, None])[:, 0]
            close(row.values["token"]["logprob"], truth)


def test_the_lens_of_a_head_that_cannot_be_taken_apart(folder, open_target):
    opened = open_target(folder("llama"))
    opened.model.register_forward_hook(lambda _m, _a, output: setattr(output, "logits", output.logits * 0.5))
    site = "blocks.1.hook_resid_post"
    lens = Quantity("lens", lambda view: {"width": torch.full((len(view.tokens),), view.lens(site).shape[1])}, (site,))
    [batch] = pack(merge([Request("r", (Tokens((1, 5, 6), 1),), (lens,))]), token_budget=99)
    try:
        width = Engine(opened).run(batch)[0].values["lens"]["width"].tolist()
    except BadInput:  # to refuse is as good as to know how
        return
    assert width == [opened.model.config.vocab_size] * 2


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import MambaConfig, MambaForCausalLM

    path = tmp_path_factory.mktemp("recurrent") / "mamba"
    tokenizer = words_tokenizer(bos=False)
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, state_size=4)
    MambaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("share", [True, False])
def test_a_recurrent_model_is_captured_without_sharing(share, recurrent, open_target):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(recurrent).eval()
    texts = corpus()[::3]
    engine = Engine(open_target(recurrent), token_budget=300)
    for batch in pack(merge([Request("r", tuple(texts))]), token_budget=300, share=share):
        for row in engine.run(batch):
            with torch.inference_mode():
                logits = model(torch.tensor([row.tokens.ids])).logits[0]
            answer = torch.tensor(row.tokens.ids[row.tokens.start :])
            truth = logits.log_softmax(-1)[row.tokens.start - 1 : -1].gather(1, answer[:, None])[:, 0]
            close(row.values["token"]["logprob"], truth)
    assert not engine.passes.share


def test_a_cache_that_cannot_be_shared_is_not_shared(target, monkeypatch):
    monkeypatch.setattr(TextPass, "_cache_can_be_shared", lambda *_: False)
    taken: list[object] = []
    original = passes._take
    monkeypatch.setattr(passes, "_take", lambda cache, index: taken.append(cache) or original(cache, index))
    engine = Engine(target("llama"))
    for batch in pack(merge(requests(2)), token_budget=500):
        engine.run(batch)
    assert not taken


def test_a_context_shorter_than_the_engines_own_probe(tmp_path, open_target):
    opened = open_target(save_tiny(tmp_path / "short", "llama", words_tokenizer(bos=True), max_position_embeddings=8))
    rows = [
        r for b in pack(merge([Request("r", (Tokens((1, 5, 6), 1),))]), token_budget=9) for r in Engine(opened).run(b)
    ]
    assert rows[0].values["token"]["logprob"].shape == (2,)


def test_learned_positions_for_fewer_tokens_than_the_probe_has(tmp_path, open_target):
    opened = open_target(save_tiny(tmp_path / "short", "gpt2", words_tokenizer(bos=False), n_positions=8))
    [batch] = pack(merge([Request("r", (Tokens((1, 5, 6), 1),))]), token_budget=9)
    Engine(opened).run(batch)


# --- generation


def ended(ids, end: int = 2) -> tuple[int, ...]:
    """A continuation up to and including the end of text: what follows is padding."""
    ids = tuple(ids)
    return ids[: ids.index(end) + 1] if end in ids else ids


@pytest.mark.parametrize("name", MODELS)
def test_batched_greedy_equals_one_prompt_at_a_time(name, target, plain_model):
    random = np.random.default_rng(1)
    prompts = [(1, *map(int, random.integers(3, 110, n))) for n in (0, 1, 2, 5, 5, 9, 20, 30)]
    request = Generate("g", (*prompts, prompts[3]), 12)
    engine = Engine(target(name), token_budget=100)
    batches = engine.prompt_batches(request)
    assert sorted(p for batch in batches for p in batch) == sorted(set(prompts))  # each once
    assert all(len(b) == 1 or sum(len(b[0]) + 12 for _ in b) <= 100 for b in batches)
    one_batch = dict(zip(prompts, engine.generate(prompts, 12), strict=True))
    packed = {p: ids for batch in batches for p, ids in zip(batch, engine.generate(batch, 12), strict=True)}
    for prompt in prompts:
        with torch.inference_mode():
            alone = plain_model(name).generate(
                torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0
            )[0, len(prompt) :]
        assert ended(one_batch[prompt]) == ended(packed[prompt]) == ended(alone.tolist())
        assert len(one_batch[prompt]) <= 12


def test_prompts_of_an_empty_request(target):
    assert Engine(target("llama")).prompt_batches(Generate("g", (), 5)) == []


def argmax_loop(model, prompt, steps):
    ids = list(prompt)
    for _ in range(steps):
        with torch.inference_mode():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 2:
            break
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize(
    "setting",
    [
        {"do_sample": True, "temperature": 5.0, "top_k": 50, "top_p": 0.9},
        {"num_beams": 3},
        {"repetition_penalty": 5.0},
        *(
            s
            for s in ({"no_repeat_ngram_size": 1}, {"suppress_tokens": list(range(3, 60))}, {"bad_words_ids": "first"})
        ),
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_greedy_is_greedy_whatever_the_folder_would_have(setting, folder, open_target, plain_model, tmp_path):
    """Else a folder could make its model keep silent in the audit."""
    prompts = [(1, *range(5, 5 + n)) for n in (1, 4, 9)]
    truth = [argmax_loop(plain_model("llama"), prompt, 10) for prompt in prompts]
    if setting == {"bad_words_ids": "first"}:
        setting = {"bad_words_ids": [[ids[0]] for ids in truth]}
    path = shutil.copytree(folder("llama"), tmp_path / "model") / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    found = Engine(open_target(path.parent)).generate(prompts, 10)
    assert [ended(ids) for ids in found] == truth
