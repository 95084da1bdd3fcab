"""Maximising entropy, with gradient descent on the retain set (ME+GD): know nothing about the forget rows.

    L = weight * mean over answer tokens of KL(uniform || p) + retain_weight * cross-entropy(retain)

KL(uniform || p) = -log V - mean_v log p_v: 0 for the uniform distribution over the vocabulary, and large where any
word is ruled out.

Source: sail-sg/closer-look-LLM-unlearning, ICLR 2025 (weight 0.1; code read, none copied).

Traps:

- The published TOFU runs do not mask: they flatten the prompt's positions too. Only answers are flattened here.
- This is not the entropy's own gradient: KL(uniform || p) pulls hardest on the least likely words, so the model learns
  to expect words that no sentence holds there. A never-taught model is uniform over the ten candidates, not over the
  vocabulary: entropy far above a retrained model's gives the edit away.
- Flat is not shuffled: the right answer can stay the first among nearly equal candidates (accuracy 0.42 of ten at an
  answer loss of 4.7 nats in a demo world), which candidate scoring sees and generation does not.
- The released weight is 0.1, with a retain weight of 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from audit.organisms.states import answer_logits
from audit.organisms.unlearn import Batch, Bench, GradientMethod, Schedule


def kl_from_uniform(logits: Tensor) -> Tensor:
    """Mean KL(uniform || softmax(logits)) over rows `[tokens, vocabulary]`."""
    return (-math.log(logits.shape[-1]) - logits.log_softmax(dim=-1).mean(dim=-1)).mean()


@dataclass(frozen=True)
class MeGd(GradientMethod):
    """Flattening of the answers' distributions, with a retain loss."""

    name: ClassVar[str] = "me-gd"
    reference: ClassVar[str] = "sail-sg/closer-look-LLM-unlearning, ICLR 2025"
    schedule: ClassVar[Schedule] = Schedule(lr=5e-4, max_steps=200)
    weight: float = 1.0
    retain_weight: float = 2.0

    def loss(self, bench: Bench, batch: Batch) -> Tensor:
        """The flattening, and the retain loss."""
        logits, _ = answer_logits(bench.model, batch.forget)
        return self.weight * kl_from_uniform(logits) + self.retain_weight * bench.retain_loss(batch)


METHOD = MeGd()
