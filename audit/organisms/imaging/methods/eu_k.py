"""EU-k: the last k layers are drawn anew and trained on the retain set; all below stay frozen.

    the last k convolutional or linear layers <- those of a model with new random weights
    L = CE(y | x) over the retain set, for these layers only

Source: Goel et al. 2022, arXiv 2201.06640; read in OPTML-Group/Unlearn-WorstCase, where k is 1.

Traps:

- "Exact" holds for these layers alone: what enters them was learned from the forget set and is as it was. With k = 1
  the model is suppressed by construction.
- With k = 1 nothing pushes the forgotten class's new row down on that class's own images, which are never shown. Once
  the retain set is known the row stays where it is, and by chance it may still be the largest there: from none to
  three in four images, on digits, whatever the rate and however long.
- The published code draws the layers anew in every epoch, so that only the last one counts, and draws a linear layer
  from N(0, 1), ten to fifty times what a model starts from. Here once, and as the model starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from audit.organisms.imaging.method import Ground, ImageMethod
from audit.organisms.imaging.methods.cf_k import last_layers, retrain


@dataclass(frozen=True)
class EuK(ImageMethod):
    """Retraining of the last k layers."""

    name: ClassVar[str] = "eu-k"
    reference: ClassVar[str] = "Goel et al. 2022, arXiv 2201.06640"
    label: ClassVar[str] = "suppressed"
    k: int = 1
    epochs: int = 20
    learning_rate: float = 5e-2
    batch: int = 64

    def __post_init__(self) -> None:
        if self.k > 1:
            object.__setattr__(self, "label", "unlearned")

    def unlearn(self, model: nn.Module, ground: Ground) -> None:
        """Draw the last layers anew and train them."""
        layers = last_layers(model, self.k)
        for layer, fresh in zip(layers, last_layers(ground.fresh(), self.k), strict=True):
            layer.load_state_dict(fresh.state_dict())
        retrain(layers, model, ground, self.epochs, self.learning_rate, self.batch)


METHOD = EuK()
