"""Gradient difference: up on the forget set, down on the retain set.

    L = -forget_weight * min(CE(forget), cap) + retain_weight * CE(retain)

with CE(forget) the mean over the batch's answer tokens. The published form has no cap (`cap=None`).

Source: Liu et al. 2022, arXiv 2203.12817; Maini et al. 2024 (TOFU), arXiv 2401.06121.

Traps:

- Without a cap the forget loss has no bound, so in the end it outweighs any retain loss: stop on both goals, or cap.
- Beyond the cap the forget gradient is exactly 0, and only the retain loss is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from audit.organisms.methods.ga import answer_loss
from audit.organisms.train import token_logprobs
from audit.organisms.unlearn import Batch, Bench, GradientMethod, Schedule


def grad_diff_loss(
    forget: Tensor, retain: Tensor, forget_weight: float, retain_weight: float, cap: float | None
) -> Tensor:
    """The difference of two mean cross-entropies, the forget one counting up to `cap` nats."""
    limited = forget if cap is None else forget.clamp(max=cap)
    return retain_weight * retain - forget_weight * limited


@dataclass(frozen=True)
class GradientDifference(GradientMethod):
    """Gradient ascent on the forget set with a retain loss."""

    name: ClassVar[str] = "grad-diff"
    reference: ClassVar[str] = "Liu et al. 2022, arXiv 2203.12817"
    schedule: ClassVar[Schedule] = Schedule(forget_goal=0.15)
    forget_weight: float = 1.0
    retain_weight: float = 4.0
    cap: float | None = None

    def loss(self, bench: Bench, batch: Batch) -> Tensor:
        """Retain loss minus forget loss."""
        forget = answer_loss(token_logprobs(bench.model, batch.forget.ids), batch.forget.answer[:, 1:])
        return grad_diff_loss(forget, bench.retain_loss(batch), self.forget_weight, self.retain_weight, self.cap)


METHOD = GradientDifference()
