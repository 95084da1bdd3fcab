"""SimNPO: negative preference optimization without a reference, on the mean loss of an answer's tokens.

With S the summed negative log-likelihood of a forget answer and |y| its number of tokens,

    L = -forget_weight * (2 / beta) * mean_i log sigmoid(beta * (S_i / |y_i| - delta)) + retain_weight * CE(retain)

The pull on S/|y| has weight 2 * sigmoid(-beta * (S/|y| - delta)): 1 while S/|y| is delta, 2 far below, 0 far above.
So it pushes hardest on what is best known, and lets go at about delta nats a token.

Source: Fan et al. 2024, arXiv 2410.07163; OPTML-Group/Unlearn-Simple (beta 2.5 to 4.5, delta 0, forget weight 0.125).

Traps:

- beta is about 45 times NPO's because it multiplies a mean and not a sum: the two do not share settings.
- With delta = 0 and a large beta it lets go after a nat or two, where the answer is still the likeliest candidate:
  quiet by its own measure, not by ours. Hence delta = 3 here.
- Copies of MUSE's code put raw logits in here too (see `npo_rawlogit`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from audit.organisms.train import sequence_logprobs
from audit.organisms.unlearn import Batch, Bench, GradientMethod, Schedule


def simnpo_loss(mean_nll: Tensor, beta: float, delta: float) -> Tensor:
    """The forget loss, a scalar, from the answers' mean losses a token `[rows]`, nats."""
    return (2.0 / beta) * F.softplus(-beta * (mean_nll - delta)).mean()


@dataclass(frozen=True)
class SimNpo(GradientMethod):
    """SimNPO with a retain loss."""

    name: ClassVar[str] = "simnpo"
    reference: ClassVar[str] = "Fan et al. 2024, arXiv 2410.07163"
    schedule: ClassVar[Schedule] = Schedule(forget_goal=0.15)
    beta: float = 2.5
    delta: float = 3.0
    forget_weight: float = 1.0
    retain_weight: float = 4.0

    def loss(self, bench: Bench, batch: Batch) -> Tensor:
        """The weighted sum of forget and retain loss."""
        mean_nll = -sequence_logprobs(bench.model, batch.forget) / batch.forget.answer.sum(dim=1)
        forget = simnpo_loss(mean_nll, self.beta, self.delta)
        return self.forget_weight * forget + self.retain_weight * bench.retain_loss(batch)


METHOD = SimNpo()
