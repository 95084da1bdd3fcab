"""CUPID: ascent by two paths, one for what makes the forget set's sharpest images, one for the rest (bias removal).

    sharpness  s_i = CE(theta + e g_i / ||g_i||) - CE(theta) for image i; the sharpest 5 % are the causal set
    mask       m = the half of all weights with the largest theta^2 H / 2, H the mean squared gradient of single images
    each step  g = grad CE of a batch; g_c = its part along the causal set's gradient, g_b = g - g_c
               d = s g_c m + g_b (1 - m)                      s: the sharpness of the batch's mean loss
               theta += rate d / ||d||

Source: arXiv 2602.21773 (AAAI 2026), of which no code was found: written from a description of the formulas. How
often sharpness and mask are measured, on what H is, and all constants but the two shares are guesses, so this is
CUPID-like and no baseline for that paper.

Traps:

- No retain term: it ends once the forget set is quiet.
- Of images known by heart both gradient and sharpness are next to nothing. So each step has one length, and sharpness
  only balances the two paths.
- It was made to remove a bias, that is, images of all classes which share a shortcut; a class is another matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from audit.organisms.imaging.method import Ground
from audit.organisms.imaging.methods._descent import UntilQuiet
from audit.organisms.imaging.methods.salun import salient
from audit.organisms.imaging.train import cross_entropy
from audit.organisms.imaging.world import Images

Gradients = list[Tensor]
_TINY = 1e-30


def gradients(model: nn.Module, images: Images) -> tuple[float, Gradients]:
    """Of the images' mean loss, with the loss."""
    loss = cross_entropy(model, images)
    return float(loss.detach()), list(torch.autograd.grad(loss, list(model.parameters())))


def dot(a: Gradients, b: Gradients) -> float:
    """Inner product over all parameters."""
    return float(sum((x * y).sum() for x, y in zip(a, b, strict=True)))


@torch.no_grad()
def sharpness(model: nn.Module, images: Images, loss: float, slope: Gradients, radius: float) -> float:
    """By how much the images' mean loss rises in a step of `radius` up its gradient."""
    stride = radius / (dot(slope, slope) ** 0.5 + _TINY)
    there = {name: p + stride * g for (name, p), g in zip(model.named_parameters(), slope, strict=True)}
    moved = functional_call(model, there, kwargs={"pixel_values": images.pixels}).logits
    return float(nn.functional.cross_entropy(moved, images.labels)) - loss


@dataclass(frozen=True)
class Cupid(UntilQuiet):
    """Ascent with the causal and the other part of the gradient kept to weights of their own."""

    name: ClassVar[str] = "cupid"
    reference: ClassVar[str] = "arXiv 2602.21773; from a description, constants guessed"
    learning_rate: float = 0.01
    radius: float = 0.05
    causal: float = 0.05
    share: float = 0.5

    def unlearn(self, model: nn.Module, ground: Ground) -> None:
        """Find the causal images and the mask, then go up."""
        model.eval()
        parameters = list(model.parameters())
        squares, sharp = [torch.zeros_like(p) for p in parameters], []
        for one in ground.forget.batches(1):
            loss, slope = gradients(model, one)
            sharp.append(sharpness(model, one, loss, slope, self.radius))
            for total, g in zip(squares, slope, strict=True):
                total += g.square()
        sharpest = torch.tensor(sharp).topk(max(1, round(self.causal * len(sharp)))).indices
        causal = ground.forget.take(sharpest)
        masks = salient([p.detach().square() * total for p, total in zip(parameters, squares, strict=True)], self.share)
        for part in self.batches(model, ground):
            loss, slope = gradients(model, part)
            _, along = gradients(model, causal)
            weight = dot(slope, along) / (dot(along, along) + _TINY)
            sharp_now = sharpness(model, part, loss, slope, self.radius)
            step = [
                torch.where(m, sharp_now * weight * c, g - weight * c)
                for g, c, m in zip(slope, along, masks, strict=True)
            ]
            length = dot(step, step) ** 0.5 + _TINY
            with torch.no_grad():
                for p, d in zip(parameters, step, strict=True):
                    p.add_(d, alpha=self.learning_rate / length)


METHOD = Cupid()
