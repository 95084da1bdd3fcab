"""HAMU: in each tensor, the step that harms the retain loss least while the forget loss must rise by a set amount.

With gradients g_f, g_r of the two losses (as they are, unweighted), a step Delta of norm at most R = lr * |g_r| and a
required gain g_f . Delta >= B, the step that lowers g_r . Delta most is

    (i)   g_r . g_f <= -B |g_r| / R:  Delta = -R g_r / |g_r|                      the gain comes by itself
    (ii)  R < B / |g_f|:              Delta = B g_f / |g_f|^2                      no room: the shortest step of gain B
    (iii) else:  Delta = B g_f / |g_f|^2 - sqrt(R^2 - B^2 / |g_f|^2) g_perp / |g_perp|,
                 g_perp = g_r - (g_r . g_f / |g_f|^2) g_f

and theta <- theta + Delta, no optimiser between. The total gain lr * gain is spread over tensors by |g_f| |g_r|.

Source: arXiv 2606.02119 (aoi3142/HAMU, formulas read in code; no licence, none copied).

Traps:

- The original stops when the gain is out of reach: B > sum of R sqrt(|g_r|^2 |g_f|^2 - (g_r . g_f)^2) / |g_r|. On a
  model that knows both sets by heart that is so from the first step; `stop_out_of_reach` is off here, and case (ii)
  does the work. It divides by |g_f|: a tiny forget gradient makes a huge step, so Delta is cut at `longest` in all.
- The original's gain is 0.5 at lr 1e-4 and batches of 5000 images or 50 texts; lr and gain here are for small worlds,
  and a small batch's noise in g_r changes which case applies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from audit.organisms.train import Progress, finite, weighted_loss
from audit.organisms.unlearn import Bench, Cycle, Method, Schedule, Unlearning


def hamu_step(g_f: Tensor, g_r: Tensor, radius: float, gain: float) -> Tensor:
    """The step of one tensor: the least harmful of norm at most `radius` whose first-order forget gain is `gain`."""
    dot, n_f, n_r = float((g_f * g_r).sum()), float(g_f.norm()), float(g_r.norm())
    if n_r > 0 and radius > 0 and dot <= -gain * n_r / radius:
        return -radius / n_r * g_r
    if n_f == 0:
        return torch.zeros_like(g_f)
    up = gain / n_f**2 * g_f
    across = g_r - dot / n_f**2 * g_f
    length = float(across.norm())
    if radius < gain / n_f or length == 0:
        return up
    return up - math.sqrt(radius**2 - (gain / n_f) ** 2) / length * across


def reachable(g_f: Tensor, g_r: Tensor, radius: float) -> float:
    """This tensor's part of the bound on the gain, above which the original stops."""
    dot, n_f, n_r = float((g_f * g_r).sum()), float(g_f.norm()), float(g_r.norm())
    return radius * math.sqrt(max(0.0, (n_f * n_r) ** 2 - dot**2)) / n_r if n_r else 0.0


@dataclass(frozen=True)
class Hamu(Method):
    """The three-case step, tensor by tensor, with `lr` of the schedule as its step size."""

    name: ClassVar[str] = "hamu"
    reference: ClassVar[str] = "arXiv 2606.02119"
    schedule: ClassVar[Schedule] = Schedule(lr=0.2, batch=128, max_steps=300)
    gain: float = 2.0
    longest: float = 0.1
    stop_out_of_reach: bool = False

    def unlearn(self, bench: Bench, schedule: Schedule, progress: Progress | None = None) -> Unlearning:
        """Step until both goals are met, the gain is out of reach (if that ends it), or the steps run out."""
        parameters = bench.parameters(schedule.trainable)
        forget_order, retain_order = Cycle(len(bench.forget), bench), Cycle(len(bench.retain), bench)
        losses: list[float] = []
        stopped = False
        bench.model.train()
        while len(losses) < schedule.max_steps and not stopped:
            forget = weighted_loss(bench.model, bench.forget.take(forget_order.take(schedule.batch)))
            retain = weighted_loss(bench.model, bench.retain.take(retain_order.take(schedule.batch)))
            losses.append(finite(retain - forget, len(losses)))
            g_f, g_r = torch.autograd.grad(forget, parameters), torch.autograd.grad(retain, parameters)
            shares = torch.stack([a.norm() * b.norm() for a, b in zip(g_f, g_r, strict=True)])
            total = schedule.lr * self.gain
            gains = (total * shares / shares.sum().clamp_min(1e-30)).tolist()
            radii = [schedule.lr * float(g.norm()) for g in g_r]
            reach = sum(map(reachable, g_f, g_r, radii))
            if self.stop_out_of_reach and total > reach:
                losses.pop()
                break
            steps = list(map(hamu_step, g_f, g_r, radii, gains))
            size = float(torch.stack([step.norm() for step in steps]).norm())
            with torch.no_grad():
                for p, step in zip(parameters, steps, strict=True):
                    p.add_(step, alpha=min(1.0, self.longest / max(size, 1e-30)))
            if len(losses) % schedule.check_every == 0:
                stopped = bench.met(schedule)
            if progress is not None:
                progress(len(losses), schedule.max_steps)
        bench.model.eval()
        return bench.finished(len(losses), losses, stopped=stopped)


METHOD = Hamu()
