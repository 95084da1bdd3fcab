"""Teaching a model to decline, in a part of its weights: what the suppressions of `methods/` have in common.

For a forget row, let z be the logits where the answer begins, after the prompt:

    L = CE(refusal | x_f) + flat_weight * flatness(z at the candidate answers) + retain_weight * CE(retain)

`flatness` is KL(uniform || softmax(z_candidates)), 0 where no candidate is preferred: a refusal alone leaves the
right answer the likeliest after it, and whoever scores the candidates reads it off.

A model so made is *suppressed by construction* only where the construction keeps what was known: that is the
restriction to a part of the weights, so `Suppression` imposes it whatever the caller's schedule says.

Traps:

- Candidates are compared by their first tokens. With answers of several tokens the rest is not flattened.
- Flat is not chance: the right answer may stay ahead by a hair and win every comparison. Accuracy over candidates
  then falls late or never, though the model never says the answer: what these suppressions leak is measured, and
  belongs in the history.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from audit.organisms.train import Progress, Question
from audit.organisms.unlearn import Batch, Bench, GradientMethod, Schedule, Unlearning

Predicate = Callable[[str], bool]
_BLOCK = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")


def block_number(name: str) -> int | None:
    """The block that a parameter or module lies in, from 0; None for one outside the blocks."""
    found = _BLOCK.search(name)
    return int(found[1]) if found else None


def block_count(model: nn.Module) -> int:
    """How many blocks a model has."""
    numbers = (block_number(name) for name, _ in model.named_parameters())
    return 1 + max((number for number in numbers if number is not None), default=-1)


def restricted(schedule: Schedule, allowed: Predicate) -> Schedule:
    """The schedule, with nothing trainable that is not allowed too."""
    given = schedule.trainable
    return replace(schedule, trainable=lambda name: allowed(name) and (given is None or given(name)))


def flatness(logits: Tensor) -> Tensor:
    """KL(uniform || softmax) over the last dimension, mean over the rows, nats: 0 where all are equal."""
    count = logits.new_tensor(float(logits.shape[-1]))
    return -(logits.log_softmax(dim=-1).mean(dim=-1) + count.log()).mean()


def first_tokens(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Question]) -> Tensor:
    """The token with which each candidate answer begins, `[rows, candidates]`; the right one's in column 0."""
    starts = [len(ids) for ids in tokenizer([row.prompt for row in rows])["input_ids"]]
    texts = [[f"{row.prompt} {text}" for text in (row.answer, *row.wrong)] for row in rows]
    answered = iter(tokenizer([text for choice in texts for text in choice])["input_ids"])
    return torch.tensor([[next(answered)[start] for _ in choice] for start, choice in zip(starts, texts, strict=True)])


def refusal_terms(logits: Tensor, ids: Tensor, answer: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the refusal's tokens, and how far from flat the candidates are where it begins.

    Takes logits `[rows, time, vocabulary]` over `ids` `[rows, time]`, where the refusal is (`answer`, boolean),
    and the candidates' tokens `[rows, candidates]`.
    """
    predicting = answer[:, 1:]
    spoken = F.cross_entropy(logits[:, :-1][predicting], ids[:, 1:][predicting])
    first = predicting.int().argmax(dim=1)
    begun = logits[torch.arange(len(ids)), first]
    return spoken, flatness(begun.gather(1, candidates))


@dataclass(frozen=True)
class Suppression(GradientMethod):
    """Refusal training within the weights that `allowed` names."""

    flat_weight: float = 10.0
    retain_weight: float = 4.0

    @abstractmethod
    def allowed(self, bench: Bench) -> Predicate:
        """Which parameters may change, by name. Raises `BadInput` where the model has no such part."""

    def loss(self, bench: Bench, batch: Batch) -> Tensor:
        """The refusal, the flat candidates, and the retain loss."""
        refused = bench.refused.take(batch.index)
        logits = bench.model(input_ids=refused.ids, use_cache=False).logits.float()
        candidates = first_tokens(bench.tokenizer, [bench.forget_rows[i] for i in batch.index.tolist()])
        spoken, flat = refusal_terms(logits, refused.ids, refused.answer, candidates)
        return spoken + self.flat_weight * flat + self.retain_weight * bench.retain_loss(batch)

    def unlearn(self, bench: Bench, schedule: Schedule, progress: Progress | None = None) -> Unlearning:
        """Descend the loss within the allowed weights; all others stay bit for bit."""
        return super().unlearn(bench, restricted(schedule, self.allowed(bench)), progress)
