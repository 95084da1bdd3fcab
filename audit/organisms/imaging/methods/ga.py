"""Gradient ascent (NegGrad): going up where training went down.

    L = -CE(y | x) over the forget set

Source: Golatkar et al. 2020, arXiv 1911.04933; Thudi et al. 2022, arXiv 2109.13398.

Traps:

- Nothing holds it: no lower bound, no retain term. Run on, it destroys the model, and any detector wins. Here it ends
  as soon as the forget set is quiet.
- Of images known by heart the gradient is next to nothing, and Adam makes full steps of what noise it has: the first
  steps are the wildest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from audit.organisms.imaging.method import Ground
from audit.organisms.imaging.methods._descent import Descent, UntilQuiet
from audit.organisms.imaging.train import cross_entropy


@dataclass(frozen=True)
class GradientAscent(UntilQuiet):
    """Gradient ascent on the forget set alone."""

    name: ClassVar[str] = "ga"
    reference: ClassVar[str] = "Golatkar et al. 2020, arXiv 1911.04933"
    learning_rate: float = 1e-4

    def unlearn(self, model: nn.Module, ground: Ground) -> None:
        """Up, until the forget set is quiet."""
        descent = Descent(model, self.learning_rate)
        for part in self.batches(model, ground):
            descent.step(-cross_entropy(model, part))


METHOD = GradientAscent()
