"""What an unlearning method for image classifiers is, and what it may use.

    @dataclass(frozen=True)
    class Ascent(ImageMethod):
        name: ClassVar[str] = "ga"
        reference: ClassVar[str] = "…"
        epochs: int = 5

        def unlearn(self, model, ground): ...

A method leaves the model in evaluation mode. What it leaves behind has no ground truth: such an organism's label is
`unlearned`, save where the method provably leaves all below the classifier as it was (`suppressed`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from audit.organisms.imaging.world import Images


@dataclass(frozen=True)
class Ground:
    """What a method is given.

    Attributes:
        original: a frozen copy of the model as it was.
        forget, retain: training images to be forgotten, and to be kept.
        classes: number of outputs.
        forgotten: the class to be forgotten; None where single images are.
        seed: of every random choice.
        fresh: a model of the same shape with new random weights.
    """

    original: nn.Module
    forget: Images
    retain: Images
    classes: int
    forgotten: int | None
    seed: int
    fresh: Callable[[], nn.Module]


class ImageMethod(ABC):
    """An unlearning method.

    Class attributes:
        name: as in recipes and labels; the module's name with dashes.
        reference: the paper, and where the formula was read.
        label: what the models it makes are: "unlearned", or "suppressed" by construction.
    """

    name: ClassVar[str]
    reference: ClassVar[str]
    label: ClassVar[str] = "unlearned"

    @abstractmethod
    def unlearn(self, model: nn.Module, ground: Ground) -> None:
        """Alter `model` in place, and leave it in evaluation mode."""


def classifier(model: nn.Module) -> nn.Linear:
    """The last linear layer: one row of weights and a bias for every class."""
    last = [module for module in model.get_submodule("classifier").modules() if isinstance(module, nn.Linear)]
    assert len(last) == 1, "ViT, DeiT, Swin, ResNet and ConvNeXT have one"
    return last[0]


def logits(model: nn.Module, pixels: Tensor) -> Tensor:
    """[n, classes], with gradients."""
    found: Tensor = model(pixel_values=pixels).logits
    return found


def features(model: nn.Module, pixels: Tensor) -> Tensor:
    """What enters the classifier, [n, width], with gradients."""
    return features_and_logits(model, pixels)[0]


def features_and_logits(model: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Both of one forward pass."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Any, ...]) -> None:
        kept.append(args[0])

    hook = classifier(model).register_forward_pre_hook(keep)
    try:
        found = logits(model, pixels)
    finally:
        hook.remove()
    return kept[0], found


def generator(seed: int) -> torch.Generator:
    """Random numbers of one's own."""
    return torch.Generator().manual_seed(seed)
