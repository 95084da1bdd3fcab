"""Geometric-disentanglement unlearning: any gradient method, kept off the directions that move the retain set.

After the backward pass of the base method's forget loss, in each tensor by itself,

    g <- (I - Q Q') g_forget + retain_weight * g_retain

where Q spans the last k retain gradients of that tensor, the present one among them. To first order, a step along
the projected gradient leaves the loss of the last k retain batches as it is.

Source: arXiv 2511.17100 (design notes and first release; the form here is the one that the authors' notes call
correct in place, without their whitening).

Traps:

- The first release projects in an `optimizer_step` that its trainer never calls: "GU as released" is the base
  method, unprojected. Here the projection is in `adjust`, which this package's loop does call.
- The step is AdamW's: divided by the running second moment and mixed with past gradients, it is no longer
  orthogonal to the retain gradients. Only the gradient is.
- The paper takes the span of gradients of KL to the reference, which is zero at the start; here it is that of the
  retain cross-entropy.
- The base method's own retain term is switched off through its field `retain_weight`. A base that calls it
  otherwise would have its retain gradient projected away too.
- Another method of the same name exists (Tan et al.).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit.organisms.methods.npo import Npo
from audit.organisms.unlearn import Batch, Bench, GradientMethod, Schedule


def project_out(gradient: Tensor, span: Tensor) -> Tensor:
    """`gradient` without its component in the span of the rows of `span`, `[k, *gradient.shape]`; any rank."""
    rows = F.normalize(span.reshape(len(span), -1), dim=1, eps=1e-30)
    flat = gradient.reshape(-1)
    # By the pseudo-inverse of the small Gram matrix: rows may be parallel, or zero.
    inverse: Tensor = torch.linalg.pinv((rows @ rows.T).double(), rtol=1e-6, hermitian=True)
    return (flat - rows.T @ (inverse @ (rows @ flat).double()).to(flat.dtype)).view_as(gradient)


@dataclass(frozen=True)
class Gu(GradientMethod):
    """A base method's forget gradient, projected off the last `rank` retain gradients, and the retain gradient."""

    name: ClassVar[str] = "gu"
    reference: ClassVar[str] = "arXiv 2511.17100, as corrected by its authors' notes, unwhitened"
    schedule: ClassVar[Schedule] = Schedule(lr=3e-4, max_steps=300)
    base: GradientMethod = field(default_factory=Npo)
    rank: int = 8
    retain_weight: float = 4.0
    _past: deque[list[Tensor]] = field(default_factory=deque, init=False, repr=False, compare=False)

    @property
    def forget_only(self) -> GradientMethod:
        """The base method without its retain term."""
        return replace(self.base, retain_weight=0.0) if hasattr(self.base, "retain_weight") else self.base  # type: ignore[type-var]

    def prepare(self, bench: Bench, schedule: Schedule) -> None:
        """Start without past gradients."""
        self._past.clear()
        self.base.prepare(bench, schedule)

    def loss(self, bench: Bench, batch: Batch) -> Tensor:
        """The base method's forget loss alone."""
        return self.forget_only.loss(bench, batch)

    def adjust(self, bench: Bench, batch: Batch, parameters: Sequence[nn.Parameter]) -> None:
        """Project the forget gradient, then add the retain gradient."""
        self.base.adjust(bench, batch, parameters)
        retain = list(torch.autograd.grad(bench.retain_loss(batch), parameters))
        self._past.append(retain)
        while len(self._past) > self.rank:
            self._past.popleft()
        for i, (p, g) in enumerate(zip(parameters, retain, strict=True)):
            if p.grad is not None:
                span = torch.stack([past[i] for past in self._past])
                p.grad = project_out(p.grad, span) + self.retain_weight * g


METHOD = Gu()
