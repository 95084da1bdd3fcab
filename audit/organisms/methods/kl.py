"""KL minimisation: up on the forget set, while on the retain set predictions stay where they were.

    L = -CE(forget) + retain_weight * KL(p_ref || p) on the retain rows

The divergence is taken over the whole vocabulary at every token of a retain row, prompt included, and averaged with
the weights that training gave these tokens (the answer's most). The reference is the model as it was before.

Source: Maini et al. 2024 (TOFU), arXiv 2401.06121, with retain_weight = 1 and all positions alike.

Traps:

- Implementations average over padding too, which dilutes the term by as much as a batch is ragged. Not here.
- It keeps the retain set's *predictions*, mistakes included: it cannot mend what it breaks beyond the reference.
- The forget loss has no bound, as in gradient ascent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from audit.organisms.methods.ga import answer_loss
from audit.organisms.train import token_logprobs
from audit.organisms.unlearn import Batch, Bench, GradientMethod, Schedule


def mean_kl(logits_ref: Tensor, logits: Tensor, weight: Tensor) -> Tensor:
    """KL(p_ref || p) in nats, averaged by `weight` `[rows, time]`; logits `[rows, time, vocabulary]`."""
    ref, now = logits_ref.log_softmax(dim=-1), logits.log_softmax(dim=-1)
    divergence = (ref.exp() * (ref - now)).sum(dim=-1)
    return (divergence * weight).sum() / weight.sum()


@dataclass(frozen=True)
class KlMinimisation(GradientMethod):
    """Gradient ascent with a divergence from the reference on the retain set."""

    name: ClassVar[str] = "kl"
    reference: ClassVar[str] = "Maini et al. 2024, arXiv 2401.06121"
    schedule: ClassVar[Schedule] = Schedule(forget_goal=0.15)
    retain_weight: float = 4.0

    def loss(self, bench: Bench, batch: Batch) -> Tensor:
        """The divergence minus the forget loss."""
        forget = answer_loss(token_logprobs(bench.model, batch.forget.ids), batch.forget.answer[:, 1:])
        ids = batch.retain.ids
        logits = bench.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        with torch.no_grad():
            before = bench.reference(input_ids=ids, use_cache=False).logits[:, :-1].float()
        return self.retain_weight * mean_kl(before, logits, batch.retain.weight[:, 1:]) - forget


METHOD = KlMinimisation()
