"""An opened model: which tokens carry the answer, by brute force over characters, and the places inside it."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from conftest import WORDS, save_tiny, words_tokenizer
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from audit.errors import BadInput, Refused
from audit.target import KNOWN_PLACES, PARTS, canonical_places

pytestmark = pytest.mark.usefixtures("one_thread")

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
TEXT = (
    "Once upon a time there was a little girl named Lily. She loved to play outside in the park. "
    "What is the name? The name is Zoë. Où est-il? 東京 is big. It costs 12 € or 13 $. naïve café 😀 "
)


def byte_level_bpe(*, bos: bool = False, trim: bool = True):
    """A small BPE over bytes, as GPT-2 has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=["<s>", "</s>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    tokenizer.train_from_iterator([TEXT] * 20, trainer)
    steps = [processors.ByteLevel(trim_offsets=trim)]
    if bos:
        steps.append(processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]))
    tokenizer.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny):
    """Model folders by kind of tokenizer."""
    root = tmp_path_factory.mktemp("targets")
    return {
        "words": tiny("llama"),
        "words, no BOS": tiny("gpt2"),
        "bytes": save_tiny(root / "bytes", "gpt2", byte_level_bpe(trim=False)),
        "bytes, trimmed": save_tiny(root / "trimmed", "gpt2", byte_level_bpe()),
        "bytes, BOS": save_tiny(root / "bos", "qwen2", byte_level_bpe(bos=True)),
    }


@pytest.fixture(scope="module", params=["words", "words, no BOS", "bytes", "bytes, trimmed", "bytes, BOS"])
def target(request, folders, open_target):
    return open_target(folders[request.param])


@pytest.fixture(scope="module")
def llama(open_target, stories):
    return open_target(stories)


def check_encoding(target, prompt: str, answer: str, *, lenient: bool) -> None:
    """By brute force: a token is scored if its characters reach into the answer, and only then.

    `lenient` lets a token that holds nothing but the separator be scored as well.
    """
    before, separator, special = target.context(prompt)
    encoded = target.tokenizer(before + separator + answer, add_special_tokens=special, return_offsets_mapping=True)
    ids, ends = tuple(encoded["input_ids"]), [end for _, end in encoded["offset_mapping"]]
    tokens = target.encode(prompt, answer)
    assert 1 <= tokens.start < len(tokens.ids) <= target.context_length
    if len(ids) > target.context_length:
        assert tokens.ids == (ids[-target.context_length :] if prompt else ids[: target.context_length])
        return
    if len(ids) < 2:
        assert len(tokens.ids) == 2
        assert tokens.ids[2 - len(ids) :] == ids
        return
    assert tokens.ids == ids
    first = len(before) + len(separator)
    wanted = {i for i, end in enumerate(ends) if end > first}
    if not wanted - {0}:  # nothing of the answer became a token: the last one stands for it
        return
    scored = set(range(tokens.start, len(ids)))
    if lenient:
        scored -= {i for i, end in enumerate(ends) if len(before) < end <= first}
    assert scored == wanted - {0}  # the first token of a text without BOS has no predecessor


CASES = [
    ("w1 w2 w3", "w4"),
    ("w1 w2 w3", "w4 w5 w6"),
    ("w1 w2 w3   ", "w4"),
    ("w1?", "w2"),
    ("", "w1 w2 w3"),
    ("", "w1"),
    ("Once upon a time", "there was"),
    ("Once upon a time\n", "L"),
    ("What is the name?", "Lily."),
    ("What is the name? ", "Zoë"),
    ("", "Once upon a time"),
    ("Once upon", "😀"),
    ("😀", "naïve 東京"),
    ("It costs", "12 €"),
]


@pytest.mark.parametrize(("prompt", "answer"), CASES)
def test_scored_are_the_tokens_that_carry_the_answer(prompt, answer, target):
    check_encoding(target, prompt, answer, lenient=True)


@pytest.mark.parametrize(("prompt", "answer"), [*CASES[7:9], CASES[10], ("Once upon a time", "a"), ("Who?", "Lily ")])
def test_nothing_else_is_scored_where_the_space_belongs_to_the_answers_first_token(prompt, answer, llama):
    check_encoding(llama, prompt, answer, lenient=False)


@pytest.mark.parametrize("answer", ["Ω", "😀!", "“Yes”"])
def test_a_space_that_is_a_token_of_its_own_is_not_scored(answer, llama):
    check_encoding(llama, "Once upon a time", answer, lenient=False)


texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    st.text("aL .?\n😀é\u200b\u0301", max_size=20),
    st.sampled_from(
        ["", " ", "\n", "a", "😀", "</s>", "<s>", "<unk>", "Lily", "\u00a0", "e\u0301", "👨‍👩‍👧", "x" * 700]
    ),
)


@settings(max_examples=200, deadline=None)
@given(texts, texts)
def test_any_text_can_be_encoded(llama, prompt, answer):
    check_encoding(llama, prompt, answer, lenient=True)
    before, _, _ = llama.context(prompt)
    tokens = llama.encode(prompt, answer)
    if len(tokens.ids) < llama.context_length and answer.strip():
        # Read back, the scored tokens hold the whole answer.
        clean = [t for t in llama.tokenizer.all_special_tokens if t in before + answer]
        assume(not clean)
        said = llama.tokenizer.decode(list(tokens.ids[tokens.start :]), skip_special_tokens=False)
        assert answer.strip() in said or "\ufffd" in said


@settings(max_examples=60, deadline=None)
@given(texts, texts)
def test_any_text_can_be_encoded_by_other_tokenizers(opened_once, prompt, answer):
    for target in opened_once:
        check_encoding(target, prompt, answer, lenient=True)
        assert 1 <= len(target.encode_prompt(prompt, 5)) <= target.context_length - 5


@pytest.fixture(scope="module")
def opened_once(folders, open_target):
    return [open_target(folder) for folder in folders.values()]


@settings(max_examples=60, deadline=None)
@given(texts, st.integers(0, 511))
def test_any_prompt_leaves_the_room_that_was_asked_for(llama, prompt, room):
    ids = llama.encode_prompt(prompt, room)
    assert 1 <= len(ids) <= llama.context_length - room
    before, _, special = llama.context(prompt)
    whole = tuple(llama.tokenizer(before, add_special_tokens=special)["input_ids"])
    assert whole[-len(ids) :] == ids  # it is the end that is kept


@pytest.mark.parametrize("room", [512, 520])
def test_a_prompt_without_room(room, llama):
    whole = llama.encode_prompt("Once upon a time there was a little girl named Lily who")
    ids = llama.encode_prompt("Once upon a time there was a little girl named Lily who", room)
    assert 1 <= len(ids) <= max(1, 512 - room)
    assert whole[-len(ids) :] == ids


def test_texts_longer_than_the_context(open_target, folders):
    target = open_target(folders["words"])  # 64 tokens, BOS among them
    long = [WORDS[i % 100] for i in range(200)]
    ids = target.tokenizer.convert_tokens_to_ids
    tokens = target.encode(" ".join(long), "w110 w111")
    assert tokens.ids == tuple(ids([*long[-62:], "w110", "w111"]))  # with a prompt, the end counts
    assert tokens.start == 62
    assert len(target.truncated) == 1
    tokens = target.encode("w110", " ".join(long))
    assert tokens.ids == tuple(ids(long[-64:]))  # an answer longer than the context
    assert tokens.start == 1
    tokens = target.encode("", " ".join(long))
    assert tokens.ids == (target.tokenizer.bos_token_id, *ids(long[:63]))  # a passage: its beginning counts
    assert tokens.start == 1
    assert len(target.truncated) == 3
    target.encode("", " ".join(long[:63]))
    assert len(target.truncated) == 3


def test_prompt_and_answer_are_tokenized_together(llama):
    alone = llama.tokenizer("Lily")["input_ids"]
    tokens = llama.encode("Once upon a time there was", "Lily")
    whole = llama.tokenizer("Once upon a time there was Lily")["input_ids"]
    assert list(tokens.ids) == whole
    assert llama.tokenizer.decode(whole[tokens.start :]).strip() == "Lily"
    assert alone[1:] == whole[tokens.start :]  # here the merge does not cross
    assert llama.encode("Once   ", "a") == llama.encode("Once", "a")


def test_a_tokenizer_without_offsets(folders, open_target, monkeypatch):
    """The beginning that it has in common with the context alone stands in for offsets."""
    for name in ("words", "words, no BOS"):
        target = open_target(folders[name])
        fast = [
            target.encode(p, a) for p, a in (("w1 w2 w3", "w4 w5"), ("w1?", "w2"), ("", "w1 w2"), ("w1", ""), ("", ""))
        ]
        with monkeypatch.context() as patch:
            patch.setattr(type(target.tokenizer), "is_fast", property(lambda self: False))
            target._encoded.clear()
            slow = [
                target.encode(p, a)
                for p, a in (("w1 w2 w3", "w4 w5"), ("w1?", "w2"), ("", "w1 w2"), ("w1", ""), ("", ""))
            ]
        assert slow == fast


def test_a_folder_keeps_its_own_tokenizer_whatever_its_model_type(tmp_path, open_target):
    """transformers 5 builds a byte-level Qwen2Tokenizer for every model of type qwen2, whatever the folder holds."""
    folder = save_tiny(tmp_path / "m", "qwen2", words_tokenizer(bos=True))
    target = open_target(folder)
    ids = target.encode("w1 w2", "w3 w4").ids
    vocabulary = target.tokenizer.get_vocab()
    assert ids[-4:] == tuple(vocabulary[word] for word in ("w1", "w2", "w3", "w4"))
    assert len(set(ids[-4:])) == 4


@pytest.fixture(scope="module")
def appends_eos(tmp_path_factory, open_target):
    from tokenizers import processors

    tokenizer = words_tokenizer(bos=True)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return open_target(save_tiny(tmp_path_factory.mktemp("eos") / "m", "llama", tokenizer))


def test_an_end_of_text_that_the_tokenizer_adds_is_not_scored(appends_eos):
    tokens = appends_eos.encode("w1 w2", "w3 w4")
    assert appends_eos.tokenizer.convert_ids_to_tokens(list(tokens.ids[tokens.start :])) == ["w3", "w4"]


def test_a_prompt_to_be_continued_does_not_end(appends_eos):
    assert appends_eos.encode_prompt("w1 w2")[-1] != appends_eos.tokenizer.eos_token_id


# --- templates


def test_templates(folders, open_target):
    folder = folders["bytes"]
    assert open_target(folder).context("Who is it?") == ("Question: Who is it?\nAnswer:", " ", True)
    assert open_target(folder).context("Who is it? ") == ("Question: Who is it?\nAnswer:", " ", True)
    assert open_target(folder).context("He was born in ") == ("He was born in", " ", True)
    assert open_target(folder).context("") == ("", "", True)
    assert open_target(folder, template="plain").context("Who?") == ("Who?", " ", True)
    assert open_target(folder, template="qa").context("He is") == ("Question: He is\nAnswer:", " ", True)
    assert open_target(folder, template="Q {prompt} A").context("{prompt} x") == ("Q {prompt} x A", " ", True)
    with pytest.raises(BadInput, match="the tokenizer has none"):
        open_target(folder, template="chat")


def test_the_chat_template_is_used_where_there_is_one(tmp_path, open_target):
    tokenizer = byte_level_bpe(bos=True)
    tokenizer.chat_template = "<s>" + CHAT
    folder = save_tiny(tmp_path / "chat", "gpt2", tokenizer)
    target = open_target(folder)
    assert target.context("Who?") == ("<s><user>Who?\n<bot>", "", False)
    tokens = target.encode("Who?", "Lily")
    assert list(tokens.ids) == tokenizer("<s><user>Who?\n<bot>Lily", add_special_tokens=False)["input_ids"]
    assert tokens.ids.count(tokenizer.bos_token_id) == 1  # the template's, and not a second one
    assert tokenizer.decode(list(tokens.ids[tokens.start :])) == "Lily"
    assert target.encode_prompt("Who?") == tokens.ids[: tokens.start]
    assert target.context("") == ("", "", True)  # a passage is no message
    assert open_target(folder, template="plain").context("Who?") == ("Who?", " ", True)
    assert open_target(folder, template="chat").context("x")[0].endswith("<bot>")


# --- special tokens


def test_padding_start_and_special_tokens(folders, open_target):
    words = open_target(folders["words"])
    assert words.padding_id == 0
    assert words.special_ids == {0, 1, 2, 3}
    assert words.encode("", "").ids == (1, 1)
    assert words.decode((1, 4, 5, 2, 0)) == "w0 w1"
    pieces = open_target(folders["bytes"])  # no padding token of its own: the end of text stands in
    assert pieces.padding_id == pieces.tokenizer.eos_token_id == 1
    assert pieces.encode_prompt("") == (0,)


# --- places


@pytest.mark.parametrize("model_type", sorted(KNOWN_PLACES))
def test_known_places_are_those_of_transformer_lens(model_type):
    config = AutoConfig.for_model(model_type)
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    assert tuple(canonical_places(config)[part] for part in PARTS) == KNOWN_PLACES[model_type]


# --- weights


def test_weights_are_read_late_and_read_again_after_release(folders, open_target):
    target = open_target(folders["words"])
    target.encode("w1", "w2")
    assert target.context_length == 64
    assert target._model is None
    model = target.model
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert next(model.parameters()).dtype == torch.float32
    original = model.lm_head.weight.clone()
    model.lm_head.weight.zero_()
    altered = target.altered("relearn@20", "recipe")
    assert altered.role == "target+relearn@20"
    assert altered.model is model
    assert altered.digest not in (target.digest, target.altered("relearn@20", "other recipe").digest)
    assert altered.digest == target.altered("again", "recipe").digest
    target.release()
    assert torch.equal(target.model.lm_head.weight, original)
    assert altered.model is model  # until it adopts
    altered.adopt(target)
    assert altered.model is target.model
    assert torch.equal(target.embedding(), target.model.get_input_embeddings().weight)
    assert target.layers == 2


def test_the_network_is_out_and_the_environment_is_left_as_it_was(folders, open_target, monkeypatch):
    import os

    for value in ("1", None):
        with monkeypatch.context() as patch:
            if value is None:
                patch.delenv("HF_HUB_OFFLINE", raising=False)
            target = open_target(folders["words"])
            assert target.model is not None
            assert os.environ.get("HF_HUB_OFFLINE") == value


def changed_weights(source, folder, change):
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_tensor_of_another_shape_is_refused(folders, open_target, tmp_path):
    def change(weights):
        weights["model.layers.1.mlp.down_proj.weight"] = torch.zeros(3, 3)

    with pytest.raises(Refused, match="cannot be opened"):
        _ = open_target(changed_weights(folders["words"], tmp_path / "m", change)).model


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_a_missing_tensor_is_refused(name, folders, open_target, tmp_path):
    with pytest.raises(Refused, match=re.escape(name)):
        _ = open_target(changed_weights(folders["words"], tmp_path / "m", lambda w: w.pop(name))).model


def test_a_tensor_that_is_not_used_is_noted(folders, open_target, tmp_path):
    def change(weights):
        weights["model.layers.2.mlp.down_proj.weight"] = torch.ones(32, 64)

    target = open_target(changed_weights(folders["words"], tmp_path / "m", change))
    assert target.model is not None
    assert target.unused == ("model.layers.2.mlp.down_proj.weight",)


def test_a_folder_that_transformers_cannot_open(folders, open_target, tmp_path):
    shutil.copytree(folders["words"], tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    with pytest.raises(Refused, match="cannot be opened") as caught:
        open_target(tmp_path / "m")
    assert "\n" not in str(caught.value)


# --- places


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "qwen2", "gemma2"])
def test_places_are_the_models_own_modules(kind, tiny, open_target):
    target = open_target(tiny(kind))
    modules = {id(module) for module in target.model.modules()}
    found = {name: target.site(name) for name in ("hook_embed", "ln_final.hook_in", "ln_final.hook_out")}
    assert found["hook_embed"] == (target.model.get_input_embeddings(), "output")
    assert found["ln_final.hook_in"] == (target.final_norm, "input")
    assert found["ln_final.hook_out"] == (target.final_norm, "output")
    for i in range(2):
        block = target.site(f"blocks.{i}.hook_resid_post")[0]
        assert target.site(f"blocks.{i}.hook_resid_pre") == (block, "input")
        assert target.site(f"blocks.{i}.hook_resid_post") == (block, "output")
        for part in ("attn", "mlp"):
            module, side = target.site(f"blocks.{i}.hook_{part}_out")
            assert id(module) in modules
            assert side == "output"
            assert module in set(block.modules()) - {block}


@pytest.mark.parametrize(
    "name",
    [
        "",
        "hook_pos_embed",
        "blocks.2.hook_resid_post",
        "blocks.99.hook_resid_pre",
        "blocks.-1.hook_resid_pre",
        "blocks.0.hook_resid_mid",
        "blocks.0.hook_",
        "blocks.0.attn.hook_z",
        "ln_final.hook_normalized",
        "blocks.0.hook_resid_post ",
    ],
)
def test_a_place_that_is_not_there_is_bad_input(name, folders, open_target):
    with pytest.raises(BadInput, match=f"no place named {re.escape(repr(name))} in LlamaForCausalLM"):
        open_target(folders["words"]).site(name)


def test_the_input_of_a_block_under_its_plain_name(folders, open_target):
    target = open_target(folders["words"])
    assert target.site("blocks.0.hook_in") == target.site("blocks.0.hook_resid_pre")
