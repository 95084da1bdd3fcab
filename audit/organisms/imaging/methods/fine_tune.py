"""Fine-tuning on what is kept, in the hope that the rest is forgotten meanwhile.

    L = CE(y | x) over the retain set

Source: the baseline of Golatkar et al. 2020, arXiv 1911.04933 (there SGD, rate .01, 10 epochs).

Traps:

- A model that knows the retain set by heart has nothing to learn there: at a low rate it forgets nothing. What it
  forgets at a high one, it forgets because it is thrown off and comes back without the forget set.
- This is training, so the model is in training mode and what batch normalization has counted moves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from audit.organisms.imaging.method import Ground, ImageMethod
from audit.organisms.imaging.train import fit


@dataclass(frozen=True)
class FineTune(ImageMethod):
    """Plain training on the retain set."""

    name: ClassVar[str] = "fine-tune"
    reference: ClassVar[str] = "Golatkar et al. 2020, arXiv 1911.04933"
    epochs: int = 10
    learning_rate: float = 5e-3
    batch: int = 64

    def unlearn(self, model: nn.Module, ground: Ground) -> None:
        """Train on."""
        fit(
            model,
            ground.retain,
            epochs=self.epochs,
            batch=self.batch,
            learning_rate=self.learning_rate,
            weight_decay=0.0,
            seed=ground.seed,
        )


METHOD = FineTune()
