"""Task vector negation: learn the forget set still better, then go the same way backwards.

    theta = theta_0 - alpha * (theta_ft - theta_0)

with theta_ft the original trained further on the forget rows alone. Alpha is the smallest of a stated grid that meets
both goals; if none does, the one with the largest retain minus forget accuracy, and the run counts as not stopped.
Deterministic, and the change of weights is one direction whatever alpha is.

Source: Ilharco et al. 2022, arXiv 2212.04089; as an unlearning baseline in MUSE, arXiv 2407.06460 (10 epochs, alpha 5).

Traps:

- On rows that are known by heart the loss is near 0 and its gradient mostly noise; Adam normalises it to full steps
  all the same. How far theta_ft lies, and so what an alpha means, is set by learning rate and steps.
- On the worlds here no alpha of the grid met both goals: forget .25 and retain .78 was the best compromise.
- Alpha is chosen on the goals' test rows: their accuracies are optimistic by that choice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from audit.organisms.train import Progress, train
from audit.organisms.unlearn import Bench, Method, Schedule, Unlearning

GRID = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0, 15.0, 20.0, 30.0)


def negated(before: Tensor, after: Tensor, alpha: float) -> Tensor:
    """The tensor `alpha` times as far on the other side of `before`."""
    return before - alpha * (after - before)


def set_alpha(model: nn.Module, reference: nn.Module, tuned: nn.Module, alpha: float, names: Sequence[str]) -> None:
    """Give the named parameters their negated values in place."""
    old, new = dict(reference.named_parameters()), dict(tuned.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.copy_(negated(old[name], new[name], alpha))


def smallest(
    grid: Sequence[float], measure: Callable[[float], tuple[float, float]], goals: Schedule
) -> tuple[float, bool]:
    """The smallest alpha that meets both goals, and True; else the best compromise, and False."""
    best, margin = grid[0], float("-inf")
    for alpha in sorted(grid):
        forget, retain = measure(alpha)
        if forget <= goals.forget_goal and retain >= goals.retain_goal:
            return alpha, True
        if retain - forget > margin:
            best, margin = alpha, retain - forget
    return best, False


@dataclass(frozen=True)
class TaskVector(Method):
    """Fine-tunes a copy on the forget set and subtracts the difference."""

    name: ClassVar[str] = "task-vector"
    reference: ClassVar[str] = "Ilharco et al. 2022, arXiv 2212.04089"
    schedule: ClassVar[Schedule] = Schedule(max_steps=100, forget_goal=0.15)
    grid: tuple[float, ...] = GRID

    def unlearn(self, bench: Bench, schedule: Schedule, progress: Progress | None = None) -> Unlearning:
        """Train the copy for about `max_steps` steps, whole epochs of them, then choose alpha."""
        tuned = copy.deepcopy(bench.model)
        chosen = [n for n, _ in bench.model.named_parameters() if schedule.trainable is None or schedule.trainable(n)]
        for name, parameter in tuned.named_parameters():
            parameter.requires_grad_(name in chosen)
        epochs = max(1, round(schedule.max_steps * schedule.batch / len(bench.forget)))
        options = {"epochs": epochs, "lr": schedule.lr, "batch": schedule.batch, "seed": bench.seed}
        losses = train(tuned, bench.forget, **options, weight_decay=0.0, progress=progress)  # type: ignore[arg-type]

        def measure(alpha: float) -> tuple[float, float]:
            set_alpha(bench.model, bench.reference, tuned, alpha, chosen)
            return bench.accuracies()

        alpha, met = smallest(self.grid, measure, schedule)
        set_alpha(bench.model, bench.reference, tuned, alpha, chosen)
        bench.model.eval()
        return bench.finished(len(losses), losses, stopped=met)


METHOD = TaskVector()
