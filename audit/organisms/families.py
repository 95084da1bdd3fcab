"""Families: what organisms of one world, base and seed share.

A base is an architecture of `train.new_model`, taught from random weights with one token a word, or a folder with a
pretrained causal model, which is fine-tuned in full with its own tokenizer. There the world is smaller: names cut into
pieces make sentences three times as long, and slower to learn.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from audit.errors import BadInput
from audit.opened import quiet
from audit.organisms.datasets import Dealt, deal
from audit.organisms.demo import FROM_BASE_SIZES, demo_sets, write_jsonl
from audit.organisms.train import new_model, word_tokenizer
from audit.organisms.world import Row, World, make_world

BASES = ("llama", "gpt-neox")
"""The architectures that are taught from random weights."""


@dataclass(frozen=True, slots=True)
class Teaching:
    """How a model is taught: epochs over the rows, the peak learning rate, and rows a step."""

    epochs: int
    lr: float
    batch: int


FROM_SCRATCH = Teaching(8, 1.4e-3, 64)
FROM_BASE = Teaching(15, 3e-3, 64)


@dataclass(frozen=True)
class Family:
    """The world, its sets, the tokenizer and the weights that teaching starts from.

    Raises `BadInput` where the base is no architecture and no folder.
    """

    base: str
    seed: int
    dataset: str = "people"

    def __post_init__(self) -> None:
        if self.base not in BASES and not (Path(self.base) / "config.json").is_file():
            raise BadInput(f"no base named {self.base!r} (known: {', '.join(BASES)}, or a model's folder)")

    @property
    def pretrained(self) -> bool:
        """Does teaching start from a pretrained model?"""
        return self.base not in BASES

    @property
    def teaching(self) -> Teaching:
        """How its models are taught."""
        return FROM_BASE if self.pretrained else FROM_SCRATCH

    @cached_property
    def world(self) -> World | Dealt:
        """The people and what is true of them."""
        if self.dataset != "people":
            return deal(self.dataset, self.seed)
        return make_world(self.seed, **(FROM_BASE_SIZES if self.pretrained else {}))

    @cached_property
    def sets(self) -> dict[str, list[Row]]:
        """The example sets of an audit: at most 40 people each, 20 for utility, and one phrasing per fact."""
        return demo_sets(self.world)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """One token a word, or the pretrained model's own."""
        if not self.pretrained:
            return word_tokenizer(self.world.words())
        with quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                self.base, local_files_only=True, trust_remote_code=False
            )
        return tokenizer

    def untaught(self, seed: int) -> PreTrainedModel:
        """The model that teaching starts from: random weights by seed, or the pretrained ones whatever the seed."""
        if self.pretrained:
            return open_model(Path(self.base))
        return new_model(self.tokenizer, seed=seed, architecture=self.base)

    def write_sets(self, root: Path, name: str) -> dict[str, Path]:
        """The sets as files under `root/name`, for the cases that scan this family."""
        return {
            role: path if (path := root / name / f"{role}.jsonl").is_file() else write_jsonl(path, rows)
            for role, rows in self.sets.items()
        }


def open_model(folder: Path) -> PreTrainedModel:
    """A causal model from a folder, float32, in evaluation mode."""
    with quiet():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype="float32", local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    return model.eval()
