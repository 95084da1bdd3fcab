"""Random labels (amnesiac unlearning): the forget set under wrong labels, together with the retain set.

    L = CE(y' | x) over both; y' = y on the retain set, and on the forget set one of the other classes, by chance

Source: Graves et al. 2021, arXiv 2010.10981; read in the code of SSD (Adam, rate 1e-4, 3 epochs).

Traps:

- Wrong labels are drawn once. Drawn anew every epoch they would teach an even spread over the classes.
- They are drawn among the classes that are kept. Among all outputs, a class that was never taught would be taught
  here, on images of the forgotten one, and were no control any more.
- Where single images are forgotten a wrong label is learned by heart: below what a model knows that never saw them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from audit.organisms.imaging.method import Ground, ImageMethod, generator
from audit.organisms.imaging.methods._descent import Descent
from audit.organisms.imaging.train import cross_entropy
from audit.organisms.imaging.world import joined


def wrong_labels(labels: Tensor, among: Tensor, random: torch.Generator) -> Tensor:
    """For each label another one, each of the others that occur in `among` as likely."""
    kept = torch.tensor(sorted(set(among.tolist())))
    weights = (kept[None] != labels[:, None]).float()
    return kept[torch.multinomial(weights, 1, generator=random)[:, 0]]


@dataclass(frozen=True)
class RandomLabels(ImageMethod):
    """Training on wrong labels for the forget set and right ones for the retain set."""

    name: ClassVar[str] = "random-labels"
    reference: ClassVar[str] = "Graves et al. 2021, arXiv 2010.10981"
    epochs: int = 8
    learning_rate: float = 5e-4
    batch: int = 64

    def unlearn(self, model: nn.Module, ground: Ground) -> None:
        """Train on both sets, mixed."""
        random = generator(ground.seed)
        wrong = wrong_labels(ground.forget.labels, ground.retain.labels, random)
        both = joined(ground.forget.labelled(wrong), ground.retain)
        descent = Descent(model, self.learning_rate)
        for _ in range(self.epochs):
            for part in both.batches(self.batch, random):
                descent.step(cross_entropy(model, part))


METHOD = RandomLabels()
