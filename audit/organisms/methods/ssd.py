"""Selective synaptic dampening: shrinking the weights that matter more to the forget set than to everything.

Importance of a weight is the mean over mini-batches of its squared gradient (the diagonal of the empirical Fisher),
I_f on the forget rows and I_D on all that was taught, forget rows included:

    where I_f > alpha * I_D:  theta <- theta * min(lambda * I_D / I_f, 1)

No training, no randomness beyond the order of rows.

Source: Foster et al. 2023, arXiv 2308.07707 (alpha 10, lambda 1 for ResNets; 5 and 50 elsewhere).

Traps:

- Squared gradients of batch means depend on the batch size: the same for both passes, and named in the history.
- Its thresholds are for classifiers with a forgotten class. Where forget and retain rows use the same weights in the
  same way, as names and attributes shared between people do, the ratio I_f / I_D spreads little: at most
  (all batches / forget batches), about 5 on the worlds here, so alpha = 10 would change nothing, and no alpha that was
  tried meets both goals.
- Every changed weight is the original's times a number below 1: plain to see for who has the original.
- Rows known by heart have gradients near 0, and importances mostly of noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from audit.organisms.methods.ga import answer_loss
from audit.organisms.train import Encoded, Progress, finite, token_logprobs
from audit.organisms.unlearn import Bench, Method, Schedule, Unlearning


def dampened(weight: Tensor, forget: Tensor, whole: Tensor, alpha: float, lam: float) -> Tensor:
    """The weights after dampening, from their importances for the forget set and for the whole."""
    factor = (lam * whole / forget.clamp(min=torch.finfo(forget.dtype).tiny)).clamp(max=1.0)
    return torch.where(forget > alpha * whole, weight * factor, weight)


@dataclass(frozen=True)
class Ssd(Method):
    """SSD: two passes for importances, then one change."""

    name: ClassVar[str] = "ssd"
    reference: ClassVar[str] = "Foster et al. 2023, arXiv 2308.07707"
    schedule: ClassVar[Schedule] = Schedule(batch=8, forget_goal=0.15)
    alpha: float = 2.0
    lam: float = 1.0

    def unlearn(self, bench: Bench, schedule: Schedule, progress: Progress | None = None) -> Unlearning:
        """Measure importances batch by batch, then dampen. `steps` counts the batches; losses are theirs."""
        bench.model.eval()
        parameters = bench.parameters(schedule.trainable)
        sums = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
        parts = [bench.forget, bench.retain]
        counts = [-(-len(data) // schedule.batch) for data in parts]
        losses: list[float] = []
        for data, total in zip(parts, sums, strict=True):
            order = torch.randperm(len(data), generator=bench.generator)
            for index in torch.split(order, schedule.batch):
                losses.append(_add_squares(bench.model, data.take(index), parameters, total, len(losses)))
                if progress is not None:
                    progress(len(losses), sum(counts))
        with torch.no_grad():
            for parameter, forget, retain in zip(parameters, *sums, strict=True):
                whole = (forget + retain) / sum(counts)
                parameter.copy_(dampened(parameter, forget / counts[0], whole, self.alpha, self.lam))
        forget_accuracy, retain_accuracy = bench.accuracies()
        met = forget_accuracy <= schedule.forget_goal and retain_accuracy >= schedule.retain_goal
        return Unlearning(len(losses), met, forget_accuracy, retain_accuracy, tuple(losses))


def _add_squares(
    model: nn.Module, data: Encoded, parameters: list[nn.Parameter], total: list[Tensor], step: int
) -> float:
    loss = answer_loss(token_logprobs(model, data.ids), data.answer[:, 1:])
    value = finite(loss, step)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    for summed, gradient in zip(total, gradients, strict=True):
        if gradient is not None:
            summed += gradient.square()
    return value


METHOD = Ssd()
