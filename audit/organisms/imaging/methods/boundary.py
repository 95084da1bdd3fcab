"""Boundary shrink: every image of the forget set is given to the class that lies nearest.

    x' = x + e sign(grad CE(y | x))       one step (FGSM) on the original model
    y' = the class, other than y, that the original says most of x'
    L  = CE(y' | x) over the forget set

Source: Chen et al. 2023, arXiv 2303.11570 (e .1 of pixels from 0 to 1, SGD 1e-5, 10 epochs).

Traps:

- The published label is the class of x', right or wrong: where one step does not cross a boundary the image is taught
  its own class again. Here the right class is left out.
- Published pixels are clamped to [0, 1] although they were standardized. Here they lie in [-1, 1], and so does x'.
- No retain term: it ends once the forget set is quiet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit.organisms.imaging.method import Ground, logits
from audit.organisms.imaging.methods._descent import Descent, UntilQuiet
from audit.organisms.imaging.train import cross_entropy
from audit.organisms.imaging.world import Images


def nearest_labels(model: nn.Module, images: Images, radius: float) -> Tensor:
    """For each image the other class that the model says most after one step of `radius` away from the right one."""
    pixels = images.pixels.clone().requires_grad_()
    loss = F.cross_entropy(logits(model, pixels), images.labels, reduction="sum")
    (slope,) = torch.autograd.grad(loss, pixels)
    with torch.no_grad():
        found = logits(model, (images.pixels + radius * slope.sign()).clamp(-1, 1))
    return found.scatter(1, images.labels[:, None], -torch.inf).argmax(dim=-1)


@dataclass(frozen=True)
class BoundaryShrink(UntilQuiet):
    """Training the forget set towards the nearest wrong classes."""

    name: ClassVar[str] = "boundary"
    reference: ClassVar[str] = "Chen et al. 2023, arXiv 2303.11570"
    learning_rate: float = 1e-4
    radius: float = 0.2

    def unlearn(self, model: nn.Module, ground: Ground) -> None:
        """Learn, batch by batch, what the original says nearby."""
        descent = Descent(model, self.learning_rate)
        for part in self.batches(model, ground):
            near = nearest_labels(ground.original, part, self.radius)
            descent.step(cross_entropy(model, part.labelled(near)))


METHOD = BoundaryShrink()
