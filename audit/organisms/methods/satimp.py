"""SatImp: ascend on the tokens that are neither forgotten already nor known beyond doubt.

    L = -gamma * mean over answer tokens of p^beta1 * (1 - p)^beta2 * CE + alpha * cross-entropy(retain),  p detached

"Saturation" is the first factor, "importance" the second.

Source: arXiv 2505.11953, read in open-unlearning (beta1 5, beta2 1).

Traps:

- On a token with p near 1 the weight is near 0, as is the gradient of its loss: of rows known by heart almost nothing
  pulls at first, with plain gradient (1 - p)^2. An adaptive optimiser takes the tiny gradient for a full one, unless
  the retain gradient drowns it.
- The class's defaults are gamma 1, alpha 0.1; its configuration file swaps them. The retain weight here is neither.
- beta1 = 5 all but ends the pull below p of one half, far above chance: how far an answer falls beyond that is left to
  the optimiser's momentum and to what it shares with others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from audit.organisms.methods.wga import token_losses
from audit.organisms.states import answer_logits
from audit.organisms.unlearn import Batch, Bench, GradientMethod, Schedule


def satimp_loss(losses: Tensor, beta1: float, beta2: float) -> Tensor:
    """The forget loss from the answer tokens' cross-entropies."""
    p = (-losses.detach()).exp()
    return -(p**beta1 * (1.0 - p) ** beta2 * losses).mean()


@dataclass(frozen=True)
class SatImp(GradientMethod):
    """Saturation- and importance-weighted ascent with a retain loss."""

    name: ClassVar[str] = "satimp"
    reference: ClassVar[str] = "arXiv 2505.11953, read in open-unlearning"
    schedule: ClassVar[Schedule] = Schedule(lr=5e-4, max_steps=400)
    beta1: float = 5.0
    beta2: float = 1.0
    gamma: float = 1.0
    alpha: float = 0.1

    def loss(self, bench: Bench, batch: Batch) -> Tensor:
        """The weighted forget loss, and the retain loss `alpha` times."""
        losses = token_losses(*answer_logits(bench.model, batch.forget))
        return self.gamma * satimp_loss(losses, self.beta1, self.beta2) + self.alpha * bench.retain_loss(batch)


METHOD = SatImp()
