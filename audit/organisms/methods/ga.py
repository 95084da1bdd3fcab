"""Gradient ascent: going up where training went down.

    L = -CE(y | x) over the forget rows, mean over answer tokens.

Nothing holds it: the loss has no lower bound and no retain term.

Source: Jang et al. 2022, arXiv 2210.01504; the form of open-unlearning's `GradAscent`.

Traps:

- It collapses. Run to the end of a schedule made for other methods, every answer of the model is noise, and any
  detector wins. The schedule here asks nothing of the retain set, so a run ends as soon as the forget set is quiet;
  it is looked at after every step.
- Broken is not deleted: what a collapsed model knew may come back within a few steps of training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from audit.organisms.train import token_logprobs
from audit.organisms.unlearn import Batch, Bench, GradientMethod, Schedule


def answer_loss(logp: Tensor, answer: Tensor) -> Tensor:
    """Mean cross-entropy of the answers' tokens, from log-probabilities and a mask `[rows, time]`."""
    return -(logp * answer).sum() / answer.sum()


@dataclass(frozen=True)
class GradientAscent(GradientMethod):
    """Gradient ascent on the forget set alone."""

    name: ClassVar[str] = "ga"
    reference: ClassVar[str] = "Jang et al. 2022, arXiv 2210.01504"
    schedule: ClassVar[Schedule] = Schedule(check_every=1, forget_goal=0.15, retain_goal=0.0)

    def loss(self, bench: Bench, batch: Batch) -> Tensor:
        """The forget loss upside down."""
        return -answer_loss(token_logprobs(bench.model, batch.forget.ids), batch.forget.answer[:, 1:])


METHOD = GradientAscent()
