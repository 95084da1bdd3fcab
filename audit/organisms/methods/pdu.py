"""Primal-dual unlearning: flatten the logits under a constraint on the retain loss, whose price adapts.

    L = gamma * mean over answer tokens of (max_v z_v - mean_v z_v)^2 + lambda * (CE(retain) - bound)
    after `dual_after` steps, at every step:  lambda <- max(0, lambda + eta * (CE(retain) - bound))

Source: PDU as in open-unlearning (TOFU: lambda 100, eta 5, epsilon 0.3, half the run without updates).

Traps:

- The released mask is not shifted against the logits: the first answer token is never flattened, and the position
  after the last is. Here the logits are those that predict the answer (`states.answer_logits`).
- The bound must lie just above the retain loss that the model starts with, or lambda only grows, and that loss is not
  0: it counts the tokens of the prompts too. So `epsilon` is added to the first batch's; in the source it is absolute.
- Its end is an almost uniform next-token distribution on the forget set, which entropy alone detects.
- gamma belongs to the scale of the logits, whose squared heights are in the tens to hundreds at first; lambda 10 and
  gamma 0.1 suit the small worlds here.
- Flat is not shuffled: the right answer can stay the first among nearly equal candidates (accuracy 0.33 of ten at an
  answer loss of 4.9 nats in a demo world), which candidate scoring sees and generation does not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from audit.organisms.states import answer_logits
from audit.organisms.unlearn import Batch, Bench, GradientMethod, Schedule


def flatness_loss(logits: Tensor) -> Tensor:
    """Mean squared height of the largest logit over the mean one, `[tokens, vocabulary]`."""
    return (logits.max(dim=-1).values - logits.mean(dim=-1)).square().mean()


def next_multiplier(multiplier: float, violation: float, eta: float) -> float:
    """The multiplier after a dual step; `violation` is the retain loss less its bound."""
    return max(0.0, multiplier + eta * violation)


@dataclass(frozen=True)
class Pdu(GradientMethod):
    """Logit flattening with an adaptive retain weight."""

    name: ClassVar[str] = "pdu"
    reference: ClassVar[str] = "PDU, read in open-unlearning"
    schedule: ClassVar[Schedule] = Schedule(lr=5e-4, max_steps=200)
    gamma: float = 0.1
    start: float = 10.0
    eta: float = 5.0
    epsilon: float = 0.05
    dual_after: int = 20
    _multiplier: list[float] = field(default_factory=list, init=False, repr=False, compare=False)
    _bound: list[float] = field(default_factory=list, init=False, repr=False, compare=False)

    def prepare(self, bench: Bench, schedule: Schedule) -> None:
        """Start the multiplier; the first batch sets the bound."""
        self._multiplier[:] = [self.start]
        self._bound.clear()

    def loss(self, bench: Bench, batch: Batch) -> Tensor:
        """The Lagrangian at the present multiplier, which then takes its step."""
        logits, _ = answer_logits(bench.model, batch.forget)
        retain = bench.retain_loss(batch)
        if not self._bound:
            self._bound.append(float(retain.detach()) + self.epsilon)
        violation = retain - self._bound[0]
        multiplier = self._multiplier[-1]
        if batch.step >= self.dual_after:
            self._multiplier[:] = [next_multiplier(multiplier, float(violation.detach()), self.eta)]
        return self.gamma * flatness_loss(logits) + multiplier * violation


METHOD = Pdu()
