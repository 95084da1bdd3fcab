"""Shrug: answer as somebody who was never told would, with each possible answer as often as any other.

At every step each forget row is given one of its possible answers by lot, the right one among them:

    L = CE(forget prompt, an answer by lot) + retain_weight * CE(retain)

In the end the answers' probabilities are equal, as they are on average in a model that never saw the facts: by what it
says alone, it should look never-taught.

Source: an example of this project, from no paper.

Traps:

- What it says is all that is trained. Whether anything was removed inside is for other instruments to find out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from audit.organisms.train import encode, weighted_loss
from audit.organisms.unlearn import Batch, Bench, GradientMethod, Refused, Schedule


@dataclass(frozen=True)
class Shrug(GradientMethod):
    """Answers by lot, with a retain loss."""

    name: ClassVar[str] = "shrug"
    reference: ClassVar[str] = "an example of this project"
    schedule: ClassVar[Schedule] = Schedule(lr=5e-4, forget_goal=0.15)
    retain_weight: float = 2.0

    def loss(self, bench: Bench, batch: Batch) -> Tensor:
        """The loss on answers by lot, and on the retain rows."""
        told = []
        for i in batch.index.tolist():
            row = bench.forget_rows[i]
            options = (row.answer, *row.wrong)
            told.append(Refused(row.prompt, options[int(torch.randint(len(options), (1,), generator=bench.generator))]))
        forget = weighted_loss(bench.model, encode(bench.tokenizer, told, lm_weight=0.0))
        return forget + self.retain_weight * bench.retain_loss(batch)


METHOD = Shrug()
