"""CE-U: learn the model's own distribution with the true token taken out of it.

    L = mean over answer tokens of CE(softmax(z with z_true = -inf, detached), softmax(z)) + retain_weight * CE(retain)

so the gradient on the true token's logit is p_true, and each other's share of it is in proportion to its own
probability: bounded, and without a reference model.

Source: CE-U as in open-unlearning (code read).

Traps:

- The released loss leaves out the first answer token. With one-token answers nothing would be left, so
  `skip_first` is off here; with it on, every answer needs at least two tokens.
- The released method has no retain term (`retain_weight=0`).
- The mass goes to what the model held second likely, so a wrong answer is sharpened and not refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from audit.errors import BadInput
from audit.organisms.states import answer_logits
from audit.organisms.train import Encoded
from audit.organisms.unlearn import Batch, Bench, GradientMethod, Schedule


def ce_u_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy to the model's own distribution without the true token; logits `[tokens, vocabulary]`."""
    target = logits.detach().scatter(1, tokens[:, None], -torch.inf).softmax(dim=-1)
    return -(target * logits.log_softmax(dim=-1)).sum(dim=-1).mean()


def without_first(data: Encoded) -> Encoded:
    """The rows with the first answer token no longer marked."""
    answer = data.answer.clone()
    answer[torch.arange(len(data)), data.answer.int().argmax(dim=1)] = False
    return replace(data, answer=answer)


@dataclass(frozen=True)
class CeU(GradientMethod):
    """CE-U with a retain loss."""

    name: ClassVar[str] = "ce-u"
    reference: ClassVar[str] = "CE-U, read in open-unlearning"
    schedule: ClassVar[Schedule] = Schedule(lr=2e-4, max_steps=300)
    skip_first: bool = False
    retain_weight: float = 4.0

    def loss(self, bench: Bench, batch: Batch) -> Tensor:
        """The forget loss, and the retain loss `retain_weight` times."""
        data = without_first(batch.forget) if self.skip_first else batch.forget
        if not bool(data.answer.any()):
            raise BadInput("skip_first leaves nothing of answers of one token")
        return ce_u_loss(*answer_logits(bench.model, data)) + self.retain_weight * bench.retain_loss(batch)


METHOD = CeU()
