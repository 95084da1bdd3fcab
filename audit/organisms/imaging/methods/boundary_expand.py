"""Boundary expanding: the forget set gets a class of its own, which is then taken away.

    the classifier gets one more row, K + 1
    L = CE(K + 1 | x) over the forget set, for all weights
    the row is dropped

Source: Chen et al. 2023, arXiv 2303.11570 (SGD, 10 epochs).

Traps:

- Nothing asks the right class to be no longer the next best: what decides is how far the other logits fell while the
  new one rose. Once the new class is said, the loss has no slope. On digits models still call between one
  in seventy and six in ten images by the right class, whatever the rate and the length of the new row.
- Here it ends as soon as the forget set is quiet without the row, or the steps run out.
- No retain term, and no direction is safe: the new row starts from random weights, and what moves is mostly the states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from audit.organisms.imaging.method import Ground, classifier, features_and_logits
from audit.organisms.imaging.methods._descent import Descent, UntilQuiet


@dataclass(frozen=True)
class BoundaryExpand(UntilQuiet):
    """Training the forget set towards a class that is not kept."""

    name: ClassVar[str] = "boundary-expand"
    reference: ClassVar[str] = "Chen et al. 2023, arXiv 2303.11570"
    learning_rate: float = 1e-4
    steps: int = 60

    def unlearn(self, model: nn.Module, ground: Ground) -> None:
        """Learn the new class; its row is never part of the model."""
        row = classifier(ground.fresh()).weight[:1].detach().clone()
        extra = [nn.Parameter(row), nn.Parameter(torch.zeros(1))]
        descent = Descent(model, self.learning_rate, [*model.parameters(), *extra])
        for part in self.batches(model, ground):
            states, found = features_and_logits(model, part.pixels)
            wide = torch.cat([found, F.linear(states, *extra)], dim=-1)
            descent.step(F.cross_entropy(wide, torch.full_like(part.labels, ground.classes)))


METHOD = BoundaryExpand()
