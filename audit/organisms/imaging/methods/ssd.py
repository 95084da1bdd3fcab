"""Selective synaptic dampening: shrinking the weights that matter more to the forget set than to everything.

Importance of a weight is the mean over mini-batches of the squared gradient of the batch's mean loss: I_f on the
forget set, I_D on all training images, forget set included.

    where I_f > alpha I_D:  theta <- theta * min(lambda I_D / I_f, 1)

No training, no randomness.

Source: Foster et al. 2024, arXiv 2308.07707; if-loops/selective-synaptic-dampening (alpha 10 for ResNet, 5 for ViT).

Traps:

- I_f / I_D is at most (all batches / batches of the forget set): about 9 for one class of nine, so the published 10
  would change nothing.
- Squared gradients of batch means depend on the batch size: one for both sets.
- Every changed weight is the original's times a number below 1: plain to see for who has the original.
- What the published repository calls a retrained model is a warm start, no reference to judge this by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from audit.organisms.imaging.method import Ground, ImageMethod
from audit.organisms.imaging.train import cross_entropy
from audit.organisms.imaging.world import Images
from audit.organisms.methods.ssd import dampened


def squares(model: nn.Module, images: Images, batch: int) -> tuple[list[Tensor], int]:
    """For each parameter the sum over batches of the squared gradient, and the number of batches."""
    parameters = list(model.parameters())
    sums, count = [torch.zeros_like(p) for p in parameters], 0
    for part in images.batches(batch):
        gradients = torch.autograd.grad(cross_entropy(model, part), parameters)
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient.square()
        count += 1
    return sums, count


@dataclass(frozen=True)
class Ssd(ImageMethod):
    """Two passes for importances, then one change."""

    name: ClassVar[str] = "ssd"
    reference: ClassVar[str] = "Foster et al. 2024, arXiv 2308.07707"
    alpha: float = 3.0
    lam: float = 1.0
    batch: int = 8

    def unlearn(self, model: nn.Module, ground: Ground) -> None:
        """Measure, then dampen."""
        model.eval()
        forget, few = squares(model, ground.forget, self.batch)
        retain, many = squares(model, ground.retain, self.batch)
        with torch.no_grad():
            for parameter, f, r in zip(model.parameters(), forget, retain, strict=True):
                parameter.copy_(dampened(parameter, f / few, (f + r) / (few + many), self.alpha, self.lam))


METHOD = Ssd()
