"""Scope-aware unlearning: a forget prompt before it must not spoil a retain question.

    L = L_base + eta * CE(y_r | x_f + x_r)

L_base is NPO's or gradient difference's loss, retain term included. The sentence x_f + x_r is the prompt of a forget
row, without its answer, followed at once by the prompt of a retain row of the same batch; only the retain answer's
tokens count.

Source: arXiv 2506.00359, from the paper's formula; its code was not public when this was written. There eta is
2 to 50 with NPO, and 1 to 20 with gradient difference, unstable from 10.

Traps:

- How the two prompts are joined is not said there; here nothing but the second's BOS, if it has one, is left out.
- A model that never read two sentences in a row has to learn that first: the term starts high and teaches a skill.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from audit.organisms.methods.ga import answer_loss
from audit.organisms.methods.grad_diff import GradientDifference
from audit.organisms.methods.npo import Npo
from audit.organisms.train import Encoded, token_logprobs
from audit.organisms.unlearn import Batch, Bench, GradientMethod, Schedule


def joined(forget: Encoded, retain: Encoded, bos: int | None) -> tuple[Tensor, Tensor]:
    """Token ids and retain-answer mask, `[rows, time]`, of each forget prompt followed by its retain row."""
    starts = forget.answer.int().argmax(dim=1)  # where an answer begins, its prompt ends
    drop = [int(bos is not None and int(row[0]) == bos) for row in retain.ids]
    lengths = [int(s) + int(n) - d for s, n, d in zip(starts, retain.length, drop, strict=True)]
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, (start, length, d) in enumerate(zip(starts.tolist(), lengths, drop, strict=True)):
        ids[i, :start] = forget.ids[i, :start]
        ids[i, start:length] = retain.ids[i, d : length - start + d]
        mask[i, start:length] = retain.answer[i, d : length - start + d]
    return ids, mask


@dataclass(frozen=True)
class ScopeAware(GradientMethod):
    """NPO or gradient difference, with retain questions asked after forget prompts."""

    name: ClassVar[str] = "scope-aware"
    reference: ClassVar[str] = "arXiv 2506.00359"
    schedule: ClassVar[Schedule] = Schedule(forget_goal=0.15)
    base: Literal["npo", "grad-diff"] = "npo"
    eta: float = 2.0
    beta: float = 0.1
    retain_weight: float = 4.0

    def loss(self, bench: Bench, batch: Batch) -> Tensor:
        """The base method's loss, and the joined rows' `eta` times."""
        if self.base == "npo":
            loss = Npo(beta=self.beta, retain_weight=self.retain_weight).loss(bench, batch)
        else:
            loss = GradientDifference(retain_weight=self.retain_weight).loss(bench, batch)
        ids, mask = joined(batch.forget, batch.retain, bench.tokenizer.bos_token_id)
        return loss + self.eta * answer_loss(token_logprobs(bench.model, ids), mask[:, 1:])


METHOD = ScopeAware()
