"""GS-LoRA: low-rank changes of the feed-forward layers, as few blocks of them as can be.

    W = W_0 + B A for every feed-forward layer, A and B of rank r
    L = beta ReLU(bound - CE(y | x_f)) + CE(y | x_r) + alpha sum over blocks of ||all A and B of the block||

Source: Zhao et al. 2024, arXiv 2403.11530; bjzhb666/GS-LoRA (rank 8, beta .15, alpha 1e-4, rate 1e-2, 100 epochs).

Traps:

- The bound must exceed log(classes), the loss of one who guesses. The published 105 belongs to a head with logits of
  another scale; the code's default is 10.
- Only transformers have feed-forward layers.
- The changes are added to the weights at the end. As an adapter one could take them away again.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from audit.errors import BadInput
from audit.organisms.imaging.method import Ground, ImageMethod, generator
from audit.organisms.imaging.methods._descent import Descent
from audit.organisms.imaging.train import cross_entropy, endless

_FEED_FORWARD = re.compile(r"(.*layers\.\d+)\.mlp\.fc[12]")


class LowRank(nn.Module):
    """A weight plus a product of two thin matrices, which is 0 at first."""

    def __init__(self, weight: Tensor, rank: int, random: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.a = nn.Parameter(torch.randn(rank, columns, generator=random) / math.sqrt(columns))
        self.b = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight as it is used."""
        return weight + self.b @ self.a


def feed_forward(model: nn.Module) -> dict[str, list[nn.Linear]]:
    """The feed-forward layers of each block, by the block's name.

    Raises:
        BadInput: there are none.
    """
    blocks: dict[str, list[nn.Linear]] = defaultdict(list)
    for name, module in model.named_modules():
        if (found := _FEED_FORWARD.fullmatch(name)) and isinstance(module, nn.Linear):
            blocks[found[1]].append(module)
    if not blocks:
        raise BadInput("gs-lora changes the feed-forward layers of a transformer, and this model has none")
    return dict(blocks)


def group_lasso(blocks: list[list[LowRank]]) -> Tensor:
    """Sum over blocks of the norm of all that is in the block."""
    return torch.stack(
        [torch.cat([p.flatten() for part in block for p in part.parameters()]).norm() for block in blocks]
    ).sum()


@dataclass(frozen=True)
class GsLora(ImageMethod):
    """Unlearning by low-rank changes with a group lasso over blocks."""

    name: ClassVar[str] = "gs-lora"
    reference: ClassVar[str] = "Zhao et al. 2024, arXiv 2403.11530"
    rank: int = 8
    bound: float = 10.0
    beta: float = 0.15
    alpha: float = 1e-4
    learning_rate: float = 5e-3
    steps: int = 120
    batch: int = 64

    def unlearn(self, model: nn.Module, ground: Ground) -> None:
        """Learn the changes, then add them to the weights. Raises `BadInput` for a model that is no transformer."""
        random = generator(ground.seed)
        blocks = feed_forward(model)
        layers = [layer for block in blocks.values() for layer in block]
        changes = [[LowRank(layer.weight, self.rank, random) for layer in block] for block in blocks.values()]
        flat = [change for block in changes for change in block]
        for layer, change in zip(layers, flat, strict=True):
            parametrize.register_parametrization(layer, "weight", change)
        descent = Descent(model, self.learning_rate, [p for change in flat for p in change.parameters()])
        forget, retain = (endless(part, self.batch, ground.seed) for part in (ground.forget, ground.retain))
        for _ in range(self.steps):
            far = F.relu(self.bound - cross_entropy(model, next(forget)))
            loss = self.beta * far + cross_entropy(model, next(retain)) + self.alpha * group_lasso(changes)
            descent.step(loss)
        for layer in layers:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


METHOD = GsLora()
