"""Negative preference optimization, sequence form: making known answers unlikely, more gently than ascent.

For a forget row with prompt x and answer y, `log p(y|x)` being the *sum* over the answer's tokens,

    L_forget = -(2 / beta) * mean_i log sigmoid(-beta * (log p(y_i|x_i) - log p_ref(y_i|x_i)))
    L        = L_forget + retain_weight * cross-entropy(retain)

where the reference is the model as it was before. At the start the loss is (2 / beta) * log 2, and the pull on
`log p(y_i|x_i)` has weight 2 * sigmoid(beta * (log p - log p_ref)): 1 at first, falling as the answer becomes
unlikely, which is why it collapses later than gradient ascent (its limit for beta -> 0).

Source: Zhang et al. 2024, arXiv 2404.05868.

Traps:

- Several copied code bases call "NPO" a loss over the raw logits of all vocabulary entries, without log-softmax or
  labels (`npo_rawlogit`). That mostly shifts logits, which softmax cancels. This is the sequence form.
- beta multiplies a summed log-ratio: with long answers the same beta saturates sooner.
- Stopped on the forget set alone it leaves the retain set broken; run on after both are met it drives the forget
  loss far beyond a never-taught model's (over-unlearning), where even relearning no longer finds what was there.
- The more layers it may change, the less of the knowledge it leaves to be found again; `Schedule.trainable` limits
  it to some, and the history must say so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from audit.organisms.train import sequence_logprobs
from audit.organisms.unlearn import Batch, Bench, GradientMethod


def npo_loss(logp: Tensor, logp_ref: Tensor, beta: float) -> Tensor:
    """NPO's forget loss, a scalar, from the answers' log-probabilities `[rows]` now and in the reference."""
    # softplus(z) is -log sigmoid(-z), and does not overflow.
    return (2.0 / beta) * F.softplus(beta * (logp - logp_ref)).mean()


@dataclass(frozen=True)
class Npo(GradientMethod):
    """NPO with a retain loss."""

    name: ClassVar[str] = "npo"
    reference: ClassVar[str] = "Zhang et al. 2024, arXiv 2404.05868"
    beta: float = 0.1
    retain_weight: float = 4.0

    def loss(self, bench: Bench, batch: Batch) -> Tensor:
        """The forget loss, and the retain loss `retain_weight` times."""
        logp = sequence_logprobs(bench.model, batch.forget)
        forget = npo_loss(logp, bench.forget_logprobs[batch.index], self.beta)
        return forget + self.retain_weight * bench.retain_loss(batch)


METHOD = Npo()
