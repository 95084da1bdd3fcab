"""FLAT: an f-divergence between what should be said and what should not, from the forget set alone.

P_e and P_f are the mean probabilities of the tokens of the refusal and of the forget answer:

    tv: L = -tanh(P_e) / 2 + tanh(P_f) / 2
    kl: L = -P_e + exp(P_f - 1)

plus retain_weight * CE(retain), which the published method does without (retain_weight = 0).

Source: Wang et al. 2024, arXiv 2410.11143; UCSC-REAL/FLAT.

Traps:

- The published code counts masked positions as zeros, so padding dilutes both terms. Only answer tokens count here.
- It works on probabilities: where P_f is near 1 and P_e near 0, as in a model that knows its answers by heart, the
  gradient is nearly 0 at first; and once P_f is small nothing more is asked. That happens long before the right answer
  loses its lead over the other candidates: silent, hence often still the likeliest of them.
- Without a retain set the refusal spreads to everybody: the schedule here asks nothing of the retain set, so that a
  run ends as soon as the forget set is quiet. With retain_weight = 1 it got to forget .20 and retain .88.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from audit.organisms.train import token_logprobs
from audit.organisms.unlearn import Batch, Bench, GradientMethod, Schedule


def mean_probability(logp: Tensor, answer: Tensor) -> Tensor:
    """Mean probability of the answers' tokens, from log-probabilities and a mask `[rows, time]`."""
    return (logp.exp() * answer).sum() / answer.sum()


def flat_loss(refusal: Tensor, forget: Tensor, variant: Literal["kl", "tv"]) -> Tensor:
    """The loss from P_e and P_f, both scalars."""
    if variant == "tv":
        return 0.5 * (forget.tanh() - refusal.tanh())
    return (forget - 1.0).exp() - refusal


@dataclass(frozen=True)
class Flat(GradientMethod):
    """FLAT in its KL or total-variation form."""

    name: ClassVar[str] = "flat"
    reference: ClassVar[str] = "Wang et al. 2024, arXiv 2410.11143"
    schedule: ClassVar[Schedule] = Schedule(lr=1e-3, max_steps=200, check_every=5, forget_goal=0.15, retain_goal=0.0)
    variant: Literal["kl", "tv"] = "kl"
    retain_weight: float = 0.0

    def loss(self, bench: Bench, batch: Batch) -> Tensor:
        """The divergence, and the retain loss where it has a weight."""
        refused = bench.refused.take(batch.index)
        spoken = mean_probability(token_logprobs(bench.model, refused.ids), refused.answer[:, 1:])
        known = mean_probability(token_logprobs(bench.model, batch.forget.ids), batch.forget.answer[:, 1:])
        loss = flat_loss(spoken, known, self.variant)
        return loss + self.retain_weight * bench.retain_loss(batch) if self.retain_weight else loss


METHOD = Flat()
