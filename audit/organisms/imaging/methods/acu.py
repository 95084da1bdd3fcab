"""Analytic unlearning: a ridge classifier on frozen features, from which rows are taken away exactly.

    learn:   R = (X'X + l I)^-1,  W = R X'Y                   X: features and a 1, Y: one-hot classes, all images
    forget:  R <- R + R X_f' (I - X_f R X_f')^-1 X_f R
             W <- W - R X_f' (Y_f - X_f W)                    with the new R

W is then what ridge regression on the retain set alone gives.

Source: Tang et al. 2025, arXiv 2505.12239; the recursion of analytic continual learning, run backwards (Woodbury).

Traps:

- Exact for the classifier, and for nothing else: the features were learned from the forget set and still hold it.
  Suppressed by construction, with a certificate.
- Everything is in float64. With a small ridge or most rows forgotten, I - X_f R X_f' is nearly singular.
- A ridge classifier's outputs lie between 0 and 1, which as logits say next to nothing; here they are `scale` times
  that, which moves no decision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit.organisms.imaging.method import Ground, ImageMethod, classifier, features
from audit.organisms.imaging.world import Images, joined


def ridge(x: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Weights `[width, classes]` and the inverse `[width, width]` of X'X + penalty."""
    inverse = torch.linalg.inv(x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype))
    return inverse @ x.T @ y, inverse


def removed(weights: Tensor, inverse: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and inverse after rows `x [n, width]`, `y [n, classes]` are taken away."""
    through = x @ inverse
    inverse = inverse + through.T @ torch.linalg.solve(torch.eye(len(x), dtype=x.dtype) - through @ x.T, through)
    return weights - inverse @ x.T @ (y - x @ weights), inverse


@torch.no_grad()
def rows(model: nn.Module, images: Images, classes: int) -> tuple[Tensor, Tensor]:
    """Features with a 1 at the end, and one-hot classes, in float64."""
    found = torch.cat([features(model, part.pixels) for part in images.batches(512)]).double()
    ones = torch.ones(len(found), 1, dtype=torch.float64)
    return torch.cat([found, ones], dim=-1), F.one_hot(images.labels, classes).double()


@dataclass(frozen=True)
class Acu(ImageMethod):
    """The classifier made analytic, and the forget set taken out of it."""

    name: ClassVar[str] = "acu"
    reference: ClassVar[str] = "Tang et al. 2025, arXiv 2505.12239"
    label: ClassVar[str] = "suppressed"
    penalty: float = 1.0
    scale: float = 10.0

    def unlearn(self, model: nn.Module, ground: Ground) -> None:
        """Fit to all, take the forget set away, and make it the model's classifier."""
        model.eval()
        everything = rows(model, joined(ground.forget, ground.retain), ground.classes)
        weights, _ = removed(*ridge(*everything, self.penalty), *rows(model, ground.forget, ground.classes))
        head = classifier(model)
        with torch.no_grad():
            head.weight.copy_(self.scale * weights[:-1].T)
            head.bias.copy_(self.scale * weights[-1])


METHOD = Acu()
