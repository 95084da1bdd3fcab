"""Weighted gradient ascent: ascend less on a token the less likely it already is.

    L = -gamma * mean over answer tokens of p^beta * CE  + alpha * cross-entropy(retain),   p detached

so the pull on log p is p^beta: full on a known token, fading as it is forgotten, and 0 in the limit. Ascent without
that weight is beta = 0.

Source: arXiv 2505.11953, read in open-unlearning (beta 1).

Traps:

- The weight is a constant of the gradient: if p is not detached, the loss is another one, and its gradient changes
  sign at p = 1/e.
- The released run scripts hold a syntax error and pass arguments that the class does not take: say which gamma and
  alpha were used.
- The pull fades at once on a forgotten token, so a row that the retain loss brings back is only pushed down again
  when its answer is likely once more: the answer can stay second best.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from audit.organisms.states import answer_logits
from audit.organisms.unlearn import Batch, Bench, GradientMethod, Schedule


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of each token, `[tokens]`."""
    return -logits.log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]


def wga_loss(losses: Tensor, beta: float) -> Tensor:
    """The forget loss from the answer tokens' cross-entropies."""
    return -((-beta * losses.detach()).exp() * losses).mean()


@dataclass(frozen=True)
class Wga(GradientMethod):
    """Weighted ascent with a retain loss."""

    name: ClassVar[str] = "wga"
    reference: ClassVar[str] = "arXiv 2505.11953, read in open-unlearning"
    schedule: ClassVar[Schedule] = Schedule(lr=2e-4, max_steps=300)
    beta: float = 1.0
    gamma: float = 1.0
    alpha: float = 4.0

    def loss(self, bench: Bench, batch: Batch) -> Tensor:
        """The weighted forget loss, and the retain loss `alpha` times."""
        losses = token_losses(*answer_logits(bench.model, batch.forget))
        return self.gamma * wga_loss(losses, self.beta) + self.alpha * bench.retain_loss(batch)


METHOD = Wga()
