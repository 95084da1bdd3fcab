"""Bad teaching: a student of two teachers, one of which knows nothing.

    target = softmax(a network with random weights) on the forget set, softmax(the original) on a part of the retain set
    L      = KL(target || p)

Source: Chundawat et al. 2023, arXiv 2205.08096; vikram2000b/bad-teaching-unlearning (30 % of the retain set, 1 epoch).

Traps:

- What is left behind on the forget set is the output of one random network, nearly the same for every image. Its
  largest output may be the forgotten class: then accuracy says that nothing was forgotten, and only probability tells.
- The published loss is divided by the number of classes too, so its rate of 1e-4 is not the rate here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from audit.organisms.imaging.method import Ground, ImageMethod, generator, logits
from audit.organisms.imaging.methods._descent import Descent
from audit.organisms.imaging.methods.scrub import divergence
from audit.organisms.imaging.train import all_logits
from audit.organisms.imaging.world import Images


@dataclass(frozen=True)
class BadTeaching(ImageMethod):
    """Learning from an incompetent teacher where something is to be forgotten."""

    name: ClassVar[str] = "bad-teaching"
    reference: ClassVar[str] = "Chundawat et al. 2023, arXiv 2205.08096"
    share: float = 0.3
    epochs: int = 8
    learning_rate: float = 1e-3
    batch: int = 64

    def unlearn(self, model: nn.Module, ground: Ground) -> None:
        """Ask both teachers once, then learn from their answers."""
        random = generator(ground.seed)
        chosen = torch.randperm(len(ground.retain), generator=random)[: round(self.share * len(ground.retain))]
        retain = ground.retain.take(chosen)
        pixels = torch.cat([ground.forget.pixels, retain.pixels])
        taught = torch.cat([all_logits(ground.fresh(), ground.forget), all_logits(ground.original, retain)]).clone()
        # Numbers take the labels' place: which teacher's answer belongs to an image is found by them.
        numbered = Images(pixels, torch.arange(len(pixels)))
        descent = Descent(model, self.learning_rate)
        for _ in range(self.epochs):
            for part in numbered.batches(self.batch, random):
                descent.step(divergence(taught[part.labels], logits(model, part.pixels)))


METHOD = BadTeaching()
