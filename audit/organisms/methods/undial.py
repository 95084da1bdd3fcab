"""UNDIAL: distilling the model into itself, with the right token's logit lowered.

At every answer token y_t of a forget row, with z_ref the reference's logits,

    target = softmax(z_ref - strength * onehot(y_t))
    L      = mean_t CE(target_t, p_t) + retain_weight * CE(retain)

The target is fixed and the loss bounded below by the targets' entropy, so it converges where ascent runs away.

Source: Dong et al. 2024, arXiv 2402.10052 (strength 3 to 30, no retain term), in a clean masked form.

Traps:

- open-unlearning's mean runs over prompt and padding too, and the label -100 wraps to an entry of the vocabulary
  that is lowered at every masked position: a hidden self-distillation that holds the model in place. Without it, as
  here, the retain term is needed; results differ at equal learning rates.
- The order of all other tokens is the reference's: with a strength below the right answer's lead in logits it stays
  the likeliest, and the loss is at its minimum all the same. At a strength far above it, it comes last of all: below
  chance, and as telling as above it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from audit.organisms.unlearn import Batch, Bench, GradientMethod, Schedule


def undial_loss(logits: Tensor, logits_ref: Tensor, tokens: Tensor, strength: float) -> Tensor:
    """Mean cross-entropy from the lowered reference; logits `[positions, vocabulary]`, right tokens `[positions]`."""
    lowered = logits_ref.scatter_add(1, tokens[:, None], logits_ref.new_full((len(tokens), 1), -strength))
    return -(lowered.softmax(dim=-1) * logits.log_softmax(dim=-1)).sum(dim=-1).mean()


@dataclass(frozen=True)
class Undial(GradientMethod):
    """Self-distillation on adjusted logits, with a retain loss."""

    name: ClassVar[str] = "undial"
    reference: ClassVar[str] = "Dong et al. 2024, arXiv 2402.10052"
    schedule: ClassVar[Schedule] = Schedule(forget_goal=0.15)
    strength: float = 10.0
    retain_weight: float = 4.0

    def loss(self, bench: Bench, batch: Batch) -> Tensor:
        """The distillation loss over answer tokens, and the retain loss `retain_weight` times."""
        ids, predicting = batch.forget.ids, batch.forget.answer[:, 1:]
        logits = bench.model(input_ids=ids, use_cache=False).logits[:, :-1].float()[predicting]
        with torch.no_grad():
            before = bench.reference(input_ids=ids, use_cache=False).logits[:, :-1].float()[predicting]
        forget = undial_loss(logits, before, ids[:, 1:][predicting], self.strength)
        return forget + self.retain_weight * bench.retain_loss(batch)


METHOD = Undial()
