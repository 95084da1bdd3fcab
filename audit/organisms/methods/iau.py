"""Influence approximation: the forget rows leave in one gradient step over all data, of a stated length.

    theta <- theta - s * g,   g = grad of [mean CE(all of D_r) - mean CE(all of D_f)]

with the step's length a share of the weights' norm, |s g| = share * |theta|, and the share chosen from `grid`: the
largest forget loss among the shares that keep the retain goal; where none does, the best retain minus forget accuracy.

Source: Lolo1222/IAU (code read; a small CNN, 5 % of CIFAR-10).

Traps:

- "As released" takes that step with a fresh Adam, which is lr * sign(g) and no influence step; plain SGD here. The
  scale is not the paper's, which rests on a model trained with a gradient penalty: without it the gradient at a model
  that knows everything is small and that of its few hardest rows.
- The step is a first-order one with the identity for the inverse Hessian. On a fitted model, do not expect it to
  forget much before it breaks the rest.
- The line search reads the goals' test rows: its result is chosen, not predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from audit.organisms.train import Encoded, Progress, answer_nll, finite, sequence_logprobs
from audit.organisms.unlearn import Bench, Method, Schedule, Unlearning


def mean_gradient(model: nn.Module, data: Encoded, parameters: Sequence[Tensor], batch: int = 512) -> list[Tensor]:
    """Gradient of the mean answer loss (nats a token) over all rows, in batches."""
    total = [torch.zeros_like(p) for p in parameters]
    count = float(data.answer.sum())
    for index in torch.split(torch.arange(len(data)), batch):
        loss = -sequence_logprobs(model, data.take(index)).sum() / count
        for sum_, g in zip(total, torch.autograd.grad(loss, parameters), strict=True):
            sum_.add_(g)
    return total


def step_of_length(parameters: Sequence[Tensor], gradient: Sequence[Tensor], share: float) -> list[Tensor]:
    """The step against `gradient` whose length is `share` of the parameters' norm."""
    size = torch.stack([p.detach().norm() for p in parameters]).norm()
    slope = torch.stack([g.norm() for g in gradient]).norm().clamp_min(1e-30)
    return [-(share * size / slope) * g for g in gradient]


@dataclass(frozen=True)
class Iau(Method):
    """One influence step, its length line-searched; `losses` are the forget losses along `grid`."""

    name: ClassVar[str] = "iau"
    reference: ClassVar[str] = "Lolo1222/IAU, with SGD"
    schedule: ClassVar[Schedule] = Schedule()
    grid: tuple[float, ...] = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12)

    def unlearn(self, bench: Bench, schedule: Schedule, progress: Progress | None = None) -> Unlearning:
        """Try every length from the same weights and keep the best."""
        parameters = bench.parameters(schedule.trainable)
        keeping = mean_gradient(bench.model, bench.retain, parameters)
        losing = mean_gradient(bench.model, bench.forget, parameters)
        gradient = [k - f for k, f in zip(keeping, losing, strict=True)]
        start = [p.detach().clone() for p in parameters]
        losses: list[float] = []
        ranks: list[tuple[bool, float]] = []
        for share in self.grid:
            _move(parameters, start, step_of_length(start, gradient, share))
            nll = answer_nll(bench.model, bench.tokenizer, bench.forget_test)
            losses.append(finite(torch.tensor(nll), len(losses)))
            forget, retain = bench.accuracies()
            kept = retain >= schedule.retain_goal
            ranks.append((kept, nll if kept else retain - forget))
            if progress is not None:
                progress(len(losses), len(self.grid))
        best = self.grid[max(range(len(ranks)), key=ranks.__getitem__)]
        _move(parameters, start, step_of_length(start, gradient, best))
        return bench.finished(1, losses, stopped=bench.met(schedule))


@torch.no_grad()
def _move(parameters: Sequence[Tensor], start: Sequence[Tensor], step: Sequence[Tensor]) -> None:
    for p, before, change in zip(parameters, start, step, strict=True):
        p.copy_(before + change)


METHOD = Iau()
