"""The loss that several code bases call NPO: negative preference over raw logits, without softmax or labels.

With z the logits of the model and z_ref the reference's,

    L = -(2 / beta) * mean_{row, position, vocabulary} log sigmoid(beta * (z_ref - z)) + retain_weight * CE(retain)

over every position of a forget row, prompt included, and every entry of the vocabulary. It is no function of
p(y|x): it lowers all logits alike, a shift that softmax cancels, and forgets only by what that shift does on the
side. On the worlds here forget prompts come to be answered with the refusal, which nobody asked for. An organism for
the question whether an audit notices that a method did not do what its name says.

Source: the code of MUSE, github.com/swj0419/muse_bench (Shi et al. 2024, arXiv 2407.06460), and its copies. The
published method is `npo`.

Traps:

- Never label what this makes "NPO". Published "NPO" rows made with that code are this loss.
- Its value starts at (2 / beta) * log 2 as NPO's does, so the log does not give it away.
- Padding is left out here; MUSE's texts have none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from audit.organisms.unlearn import Batch, Bench, GradientMethod, Schedule


def raw_logit_loss(logits: Tensor, logits_ref: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Mean over vocabulary and masked positions; logits `[rows, time, vocabulary]`, mask `[rows, time]` boolean."""
    return (2.0 / beta) * F.softplus(beta * (logits - logits_ref))[mask].mean()


@dataclass(frozen=True)
class NpoRawLogit(GradientMethod):
    """The raw-logit loss with a retain loss."""

    name: ClassVar[str] = "npo-rawlogit"
    reference: ClassVar[str] = "github.com/swj0419/muse_bench"
    schedule: ClassVar[Schedule] = Schedule(lr=5e-4, max_steps=300, forget_goal=0.15)
    beta: float = 0.1
    retain_weight: float = 1.0

    def loss(self, bench: Bench, batch: Batch) -> Tensor:
        """The raw-logit loss, and the retain loss `retain_weight` times."""
        ids = batch.forget.ids
        logits = bench.model(input_ids=ids, use_cache=False).logits.float()
        with torch.no_grad():
            before = bench.reference(input_ids=ids, use_cache=False).logits.float()
        real = torch.arange(ids.shape[1]) < batch.forget.length[:, None]
        return raw_logit_loss(logits, before, real, self.beta) + self.retain_weight * bench.retain_loss(batch)


METHOD = NpoRawLogit()
