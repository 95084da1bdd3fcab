"""What several test files share: the network ruled out, `../shared` found or skipped, and tiny models in folders.

The tiny models have random weights, two layers and a width of 32, one of each architecture that differs in a way
the capture engine could get wrong: where positions come from, parallel or serial blocks, grouped heads, norms
after a sublayer, capped logits, sliding windows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHARED = Path(__file__).parents[2] / "shared"
WORDS = tuple(f"w{i}" for i in range(116))


_ONE_SCAN = {f"test_{name}.py" for name in ("guards", "instruments", "lens", "relearn", "scan")}
"""Files that look at the tiny world's scan by every instrument: where workers share the tests, one of them makes it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every file is run by one worker (`--dist loadgroup`), for the models that its tests share."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group("one scan" if item.path.name in _ONE_SCAN else item.path.name))


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """A path under `../shared`; skips the test that asks for one that is not there."""

    def find(relative: str) -> Path:
        path = SHARED / relative
        if not path.exists():
            pytest.skip(f"needs ../shared/{relative}, which is not here")
        return path

    return find


@pytest.fixture(scope="session")
def stories(shared: Callable[[str], Path]) -> Path:
    """The folder of a small real model, with a BPE tokenizer that falls back to bytes."""
    return shared("models/stories260k")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """So small a model is quicker with one thread, and ten times quicker where the cores are shared."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_config(kind: str, vocabulary: int, **changes: Any) -> Any:
    """A configuration of two layers and width 32; weights large enough for peaked distributions."""
    import transformers

    if kind == "gpt2":
        options = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        options |= {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}  # must be off
    else:
        options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        options |= {"max_position_embeddings": 64}
    options |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2}
    if kind in ("llama", "qwen2", "gemma2"):
        options["num_key_value_heads"] = 2
    if kind == "llama":
        options["tie_word_embeddings"] = False
    if kind == "gemma2":
        options |= {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
        options |= {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0}
    names = {"llama": "Llama", "gpt2": "GPT2", "gpt_neox": "GPTNeoX", "qwen2": "Qwen2", "gemma2": "Gemma2"}
    return getattr(transformers, f"{names[kind]}Config")(vocab_size=vocabulary, **(options | changes))


def save_tiny(folder: Path, kind: str, tokenizer: Any, **changes: Any) -> Path:
    """Write a random model of `kind` and a tokenizer as an ordinary safetensors folder."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(kind, len(tokenizer), **changes))
        for name, weight in model.named_parameters():
            if "norm" in name or "ln_" in name or name.endswith("bias"):  # else all ones, or all zeros
                weight.data += 0.3 * torch.randn_like(weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def words_tokenizer(*, bos: bool) -> Any:
    """One token a word; with or without a BOS before each text."""
    from tokenizers import processors

    from audit.organisms.train import word_tokenizer

    tokenizer = word_tokenizer(WORDS)
    if not bos:
        tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    return tokenizer


TINY = ("llama", "gpt2", "gpt_neox", "qwen2", "gemma2")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model by the name of its architecture; GPT-2 and GPT-NeoX have no BOS."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            tokenizer = words_tokenizer(bos=kind not in ("gpt2", "gpt_neox"))
            made[kind] = save_tiny(tmp_path_factory.mktemp("tiny") / kind, kind, tokenizer)
        return made[kind]

    return folder


@pytest.fixture(scope="session")
def open_target() -> Callable[..., Any]:
    """Open a model folder as `Target("target", take_inventory(folder), ...)`."""

    def opened(folder: Path, **options: Any) -> Any:
        from audit.inventory import take_inventory
        from audit.target import Target

        return Target("target", take_inventory(folder), **options)

    return opened
