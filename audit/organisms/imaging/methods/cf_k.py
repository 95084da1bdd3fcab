"""CF-k: the last k layers catastrophically forget; all below stay frozen.

    L = CE(y | x) over the retain set, for the last k convolutional or linear layers only

Source: Goel et al. 2022, arXiv 2201.06640; read in OPTML-Group/Unlearn-WorstCase, where k is 1.

Traps:

- With k = 1 everything that enters the classifier is as it was: suppressed by construction, if it is forgotten at all.
- It need not be: a retain set known by heart has next to no gradient, and a class that is never shown keeps its row.
- In training mode what batch normalization has counted would move in "frozen" layers; here it does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from audit.errors import BadInput
from audit.organisms.imaging.method import Ground, ImageMethod, generator
from audit.organisms.imaging.methods._descent import Descent
from audit.organisms.imaging.train import cross_entropy


def last_layers(model: nn.Module, k: int) -> list[nn.Module]:
    """The last `k` convolutional or linear layers, in the order in which the model lists them.

    Raises:
        BadInput: `k` is below 1 or above their number.
    """
    layers: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    if not 1 <= k <= len(layers):
        raise BadInput(f"the last {k} of {len(layers)} layers")
    return layers[-k:]


def retrain(layers: list[nn.Module], model: nn.Module, ground: Ground, epochs: int, rate: float, batch: int) -> None:
    """Train these layers on the retain set, and nothing else."""
    random = generator(ground.seed)
    descent = Descent(model, rate, [p for layer in layers for p in layer.parameters()])
    for _ in range(epochs):
        for part in ground.retain.batches(batch, random):
            descent.step(cross_entropy(model, part))


@dataclass(frozen=True)
class CfK(ImageMethod):
    """Fine-tuning of the last k layers on the retain set."""

    name: ClassVar[str] = "cf-k"
    reference: ClassVar[str] = "Goel et al. 2022, arXiv 2201.06640"
    label: ClassVar[str] = "suppressed"
    k: int = 1
    epochs: int = 20
    learning_rate: float = 1e-1
    batch: int = 64

    def __post_init__(self) -> None:
        if self.k > 1:
            object.__setattr__(self, "label", "unlearned")

    def unlearn(self, model: nn.Module, ground: Ground) -> None:
        """Train the last layers on."""
        retrain(last_layers(model, self.k), model, ground, self.epochs, self.learning_rate, self.batch)


METHOD = CfK()
