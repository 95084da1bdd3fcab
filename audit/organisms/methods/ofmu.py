"""OFMU: ascend the forget loss where that does not pull on the retain set, then restore the retain set nearby.

Each step, with L_f and L_r the cross-entropies of the forget and the retain batch,

    inner, T times:  theta <- theta + inner_lr * grad Phi / |grad Phi|,  Phi = L_f - beta * cos(grad L_f, grad L_r)
    outer:           descend L_r + rho * |grad Phi|^2,  rho growing with the steps

whose gradient is grad L_r + 2 rho (Hessian of Phi) grad Phi. The cosine makes grad Phi a second and the outer
gradient a third derivative; both are exact here, by differentiating through the backward pass.

Source: arXiv 2509.22483, read in summaries only; no code is published.

Guessed: the inner steps move the model itself and have a fixed length, both losses are of the same pair of batches,
rho grows geometrically up to a bound, the outer step is AdamW's, and all constants.

Traps:

- Fused attention cannot be differentiated twice: attention runs in its plain form while the loss is built.
- |grad Phi| is also almost zero where the forget set is known by heart: the penalty does not tell the end from the
  start, and only the inner ascent leaves the latter.
- L_f has no upper bound: a large T or inner_lr breaks the model before the outer step can mend it.
- A step costs some fifteen times as much as one of NPO.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from audit.organisms.train import weighted_loss
from audit.organisms.unlearn import Batch, Bench, GradientMethod, Schedule


def inner_objective(forget: Tensor, retain: Tensor, parameters: Sequence[Tensor], beta: float) -> Tensor:
    """Phi, a scalar that can be differentiated again, from the two losses."""
    g_f = torch.autograd.grad(forget, parameters, create_graph=True)
    g_r = torch.autograd.grad(retain, parameters, create_graph=True)
    return forget - beta * _dot(g_f, g_r) / (_dot(g_f, g_f) * _dot(g_r, g_r) + 1e-24).sqrt()


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()


@dataclass(frozen=True)
class Ofmu(GradientMethod):
    """Inner ascent with a decorrelated gradient, outer descent with a stationarity penalty."""

    name: ClassVar[str] = "ofmu"
    reference: ClassVar[str] = "arXiv 2509.22483, from summaries; constants guessed"
    schedule: ClassVar[Schedule] = Schedule(lr=5e-4, batch=16, max_steps=60, check_every=5)
    beta: float = 0.1
    inner_steps: int = 5
    inner_lr: float = 0.02
    rho: float = 1e-4
    growth: float = 1.05
    rho_max: float = 1e-2

    def loss(self, bench: Bench, batch: Batch) -> Tensor:
        """Take the inner steps, then return the outer objective."""
        parameters = [p for p in bench.model.parameters() if p.requires_grad]
        with sdpa_kernel(SDPBackend.MATH):
            for _ in range(self.inner_steps):
                gradient = torch.autograd.grad(self._phi(bench, batch, parameters), parameters)
                length = self.inner_lr / _dot(gradient, gradient).sqrt().clamp_min(1e-12)
                with torch.no_grad():
                    for p, g in zip(parameters, gradient, strict=True):
                        p.add_(g * length)
            stationary = torch.autograd.grad(self._phi(bench, batch, parameters), parameters, create_graph=True)
            rho = min(self.rho_max, self.rho * self.growth**batch.step)
            return bench.retain_loss(batch) + rho * _dot(stationary, stationary)

    def _phi(self, bench: Bench, batch: Batch, parameters: Sequence[Tensor]) -> Tensor:
        forget = weighted_loss(bench.model, batch.forget)
        return inner_objective(forget, bench.retain_loss(batch), parameters, self.beta)


METHOD = Ofmu()
