"""Preference optimization towards "I don't know": a refusal preferred to the answer.

With S the summed negative log-likelihood of a text given the prompt, and S_ref the same under the reference,

    gain(text) = S_ref(text) - S(text)
    L_forget   = -(2 / beta) * mean_i log sigmoid(beta * (gain(refusal_i) - gain(answer_i)))
    L          = L_forget + retain_weight * CE(retain)

At the start L_forget is (2 / beta) * log 2.

Source: Maini et al. 2024 (TOFU), arXiv 2401.06121, in the form of open-unlearning (factor 2 / beta, retain loss);
DPO is Rafailov et al. 2023, arXiv 2305.18290.

Traps:

- TOFU's own `dpo` refers to an undefined variable and lacks the factor and the retain loss; its `idk` is no
  preference loss at all but plain training on refusals.
- The refusal is one text here, where the original draws one of a hundred each time: it is easier to learn and to spot.
- Preferring is relative: the answer may stay likely among the candidates once the refusal is far above it.
- beta multiplies summed log-ratios: long refusals saturate it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from audit.organisms.train import sequence_logprobs
from audit.organisms.unlearn import Batch, Bench, GradientMethod, Schedule


def dpo_loss(chosen_gain: Tensor, rejected_gain: Tensor, beta: float) -> Tensor:
    """The preference loss, a scalar, from log-likelihood gains over the reference `[rows]`."""
    return (2.0 / beta) * F.softplus(-beta * (chosen_gain - rejected_gain)).mean()


@dataclass(frozen=True)
class IdkDpo(GradientMethod):
    """DPO with a refusal as the preferred answer, and a retain loss."""

    name: ClassVar[str] = "idk-dpo"
    reference: ClassVar[str] = "Maini et al. 2024, arXiv 2401.06121"
    schedule: ClassVar[Schedule] = Schedule(forget_goal=0.15)
    beta: float = 0.1
    retain_weight: float = 4.0

    def loss(self, bench: Bench, batch: Batch) -> Tensor:
        """The preference loss, and the retain loss `retain_weight` times."""
        refused = bench.refused.take(batch.index)
        chosen = sequence_logprobs(bench.model, refused) - bench.refused_logprobs[batch.index]
        rejected = sequence_logprobs(bench.model, batch.forget) - bench.forget_logprobs[batch.index]
        return dpo_loss(chosen, rejected, self.beta) + self.retain_weight * bench.retain_loss(batch)


METHOD = IdkDpo()
