"""NegGrad+: down on the retain set and up on the forget set in one loss.

    L = a CE(y | x) over the retain set - (1 - a) CE(y | x) over the forget set

Source: Kurmanji et al. 2023, arXiv 2302.09880, equation of the baseline; meghdadk/SCRUB.

Traps:

- The forget loss has no bound: however small 1 - a, it ends dominated by it. Here it ends once the forget set is quiet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from audit.organisms.imaging.method import Ground
from audit.organisms.imaging.methods._descent import Descent, UntilQuiet
from audit.organisms.imaging.train import cross_entropy, endless


@dataclass(frozen=True)
class NegGradPlus(UntilQuiet):
    """Gradient ascent with a retain term."""

    name: ClassVar[str] = "neg-grad-plus"
    reference: ClassVar[str] = "Kurmanji et al. 2023, arXiv 2302.09880"
    learning_rate: float = 2e-4
    weight: float = 0.9

    def unlearn(self, model: nn.Module, ground: Ground) -> None:
        """A batch of each set a step."""
        descent = Descent(model, self.learning_rate)
        kept = endless(ground.retain, self.batch, ground.seed)
        for part in self.batches(model, ground):
            up, down = cross_entropy(model, part), cross_entropy(model, next(kept))
            descent.step(self.weight * down - (1 - self.weight) * up)


METHOD = NegGradPlus()
