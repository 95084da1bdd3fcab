"""SCRUB: a student that obeys its teacher on the retain set and disobeys it on the forget set.

    an epoch up, the first `rising` ones only:  -KL_T(p_0 || p) over the forget set
    an epoch down, every one:                   gamma CE(y | x) + alpha KL_T(p_0 || p) over the retain set

p_0 is the original model, KL_T the divergence of both softened by the temperature T, times T squared.

Source: Kurmanji et al. 2023, arXiv 2302.09880; meghdadk/SCRUB (small: T 2, gamma 1, alpha .5, 3 of 10 epochs up).

Traps:

- The way up has no bound; the ways down that follow must mend what it broke.
- The published weight decay of .1 moves every weight; there is none here.
- SCRUB+R, which rewinds to the epoch with the wished error, is not this: it needs a reference for that error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit.organisms.imaging.method import Ground, ImageMethod, generator, logits
from audit.organisms.imaging.methods._descent import Descent
from audit.organisms.imaging.world import Images


def divergence(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of softened logits `[n, classes]`, mean over images, times the temperature squared."""
    p, q = (torch.log_softmax(it / temperature, dim=-1) for it in (teacher, student))
    return F.kl_div(q, p, log_target=True, reduction="batchmean") * temperature**2


@dataclass(frozen=True)
class Scrub(ImageMethod):
    """Epochs up on the forget set and down on the retain set by turns."""

    name: ClassVar[str] = "scrub"
    reference: ClassVar[str] = "Kurmanji et al. 2023, arXiv 2302.09880"
    epochs: int = 8
    rising: int = 4
    learning_rate: float = 5e-4
    temperature: float = 2.0
    gamma: float = 1.0
    alpha: float = 0.5
    batch: int = 64

    def unlearn(self, model: nn.Module, ground: Ground) -> None:
        """Disobey and obey."""
        random = generator(ground.seed)
        descent = Descent(model, self.learning_rate)

        def kl(part: Images, now: Tensor) -> Tensor:
            with torch.no_grad():
                before = logits(ground.original, part.pixels)
            return divergence(before, now, self.temperature)

        for epoch in range(self.epochs):
            if epoch < self.rising:
                for part in ground.forget.batches(self.batch, random):
                    descent.step(-kl(part, logits(model, part.pixels)))
            for part in ground.retain.batches(self.batch, random):
                now = logits(model, part.pixels)
                descent.step(self.gamma * F.cross_entropy(now, part.labels) + self.alpha * kl(part, now))


METHOD = Scrub()
