"""UNSIR: noise that the model cannot bear to call by the class, taught under that very name; then repair.

    noise:   N <- argmin over pixels of -CE(class | N) + 0.1 ||N||^2     for the original model
    impair:  CE(class | N) and CE(y | x) over some of the retain set, together
    repair:  CE(y | x) over the retain set

Source: Tarun et al. 2023, arXiv 2111.08947 (noise: Adam, rate .1, 40 steps; impair .02, repair .01, an epoch each).

Traps:

- It forgets a class, and needs no image of it. For single images there is no such noise.
- The noise is no image: its pixels are not clamped, and what is learned from it need not touch how real images of the
  class are seen. How much is forgotten is found out, not asked for.
- The repair can bring the class back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit.errors import BadInput
from audit.organisms.imaging.method import Ground, ImageMethod, generator, logits
from audit.organisms.imaging.methods._descent import Descent
from audit.organisms.imaging.train import cross_entropy
from audit.organisms.imaging.world import Images, joined


def error_maximizing(
    model: nn.Module, start: Tensor, label: int, *, steps: int, learning_rate: float, penalty: float
) -> Tensor:
    """Noise `[n, 3, height, width]` from `start` on that the model calls by `label` least; its size is held down."""
    noise = start.clone().requires_grad_()
    labels = torch.full((len(noise),), label)
    optimizer = torch.optim.Adam([noise], lr=learning_rate)
    for _ in range(steps):
        loss = -F.cross_entropy(logits(model, noise), labels) + penalty * noise.square().sum(dim=(1, 2, 3)).mean()
        (noise.grad,) = torch.autograd.grad(loss, noise)
        optimizer.step()
    return noise.detach()


@dataclass(frozen=True)
class Unsir(ImageMethod):
    """Impair with noise, then repair."""

    name: ClassVar[str] = "unsir"
    reference: ClassVar[str] = "Tarun et al. 2023, arXiv 2111.08947"
    noises: int = 64
    noise_steps: int = 40
    noise_rate: float = 0.1
    penalty: float = 0.1
    copies: int = 8
    impair_rate: float = 5e-3
    repair_rate: float = 1e-3
    repair_epochs: int = 4
    batch: int = 64

    def unlearn(self, model: nn.Module, ground: Ground) -> None:
        """Make the noise, impair, repair. Raises `BadInput` where single images are to be forgotten."""
        if ground.forgotten is None:
            raise BadInput(f"{self.name} forgets a class; single images have no noise of their own")
        random = generator(ground.seed)
        start = torch.randn((self.noises, *ground.retain.pixels.shape[1:]), generator=random)
        noise = error_maximizing(
            ground.original,
            start,
            ground.forgotten,
            steps=self.noise_steps,
            learning_rate=self.noise_rate,
            penalty=self.penalty,
        )
        unbearable = Images(noise, torch.full((len(noise),), ground.forgotten))
        impairing = joined(*[unbearable] * self.copies, ground.retain)
        for images, rate, epochs in (
            (impairing, self.impair_rate, 1),
            (ground.retain, self.repair_rate, self.repair_epochs),
        ):
            descent = Descent(model, rate)
            for _ in range(epochs):
                for part in images.batches(self.batch, random):
                    descent.step(cross_entropy(model, part))


METHOD = Unsir()
