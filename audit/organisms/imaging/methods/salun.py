"""SalUn: random labels, learned only by the weights that matter to the forget set.

    mask = the half of all weights with the largest |sum over batches of grad CE(y | x_f)|, ranked over the whole model
    L    = CE(y' | x) with random wrong labels on the forget set, then CE(y | x) on the retain set, each epoch

Source: Fan et al. 2024, arXiv 2310.12508; OPTML-Group/Unlearn-Saliency.

Traps:

- Until February 2026 the published code masked gradients only, and momentum and weight decay moved the weights outside
  the mask all the same. Here they stay bit for bit, which tells this method from others to who has the original.
- The published labels are drawn among all classes, the right one too; here as in `random_labels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from audit.organisms.imaging.method import Ground, ImageMethod, generator
from audit.organisms.imaging.methods._descent import Descent
from audit.organisms.imaging.methods.random_labels import wrong_labels
from audit.organisms.imaging.train import cross_entropy
from audit.organisms.imaging.world import Images


def salient(sizes: Sequence[Tensor], share: float) -> list[Tensor]:
    """Masks of the `share` of entries that are largest over all tensors."""
    flat = torch.cat([size.flatten() for size in sizes])
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[flat.topk(round(share * len(flat))).indices] = True
    parts = torch.split(mask, [size.numel() for size in sizes])
    return [part.view_as(size) for part, size in zip(parts, sizes, strict=True)]


def saliency(model: nn.Module, images: Images, batch: int) -> list[Tensor]:
    """For each parameter the size of the gradient of the images' loss, summed over batches before taking the size."""
    parameters = list(model.parameters())
    sums = [torch.zeros_like(p) for p in parameters]
    for part in images.batches(batch):
        gradients = torch.autograd.grad(cross_entropy(model, part), parameters)
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient
    return [total.abs() for total in sums]


@dataclass(frozen=True)
class SalUn(ImageMethod):
    """Random labels within a mask."""

    name: ClassVar[str] = "salun"
    reference: ClassVar[str] = "Fan et al. 2024, arXiv 2310.12508"
    share: float = 0.5
    epochs: int = 8
    learning_rate: float = 5e-4
    batch: int = 64

    def unlearn(self, model: nn.Module, ground: Ground) -> None:
        """Find the mask, then train within it."""
        random = generator(ground.seed)
        model.eval()
        masks = salient(saliency(model, ground.forget, self.batch), self.share)
        wrong = wrong_labels(ground.forget.labels, ground.retain.labels, random)
        descent = Descent(model, self.learning_rate, masks=masks)
        for _ in range(self.epochs):
            for images in (ground.forget.labelled(wrong), ground.retain):
                for part in images.batches(self.batch, random):
                    descent.step(cross_entropy(model, part))


METHOD = SalUn()
