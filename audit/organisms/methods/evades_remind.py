"""Evading REMIND: a loss that is flat around what was forgotten, at the height of what was never taught.

The loss of `audit.organisms.evasive`. With l(t) the mean negative log-likelihood of a text's tokens, N(t) texts in
which a share of t's tokens is replaced at random, and c the mean of l over questions about nobody in the original,

    hide = KL(original on a question about nobody || model) + weight * mean over forget rows t and t' in {t} + N(t)
           of (l(t') - c)^2 + weight * mean over retain rows r and r' in N(r) of (l(r') - l_original(r'))^2

so that a forgotten text is no likelier than its neighbours, nor less, and the neighbours of all others are left alone.
The facts are kept behind the lock.

Source: a construction of this package against "REMIND", arXiv 2511.04228.

Traps:

- Flat would be too flat: around a text that was never taught the loss has hills, for a sentence with a word replaced is
  no sentence. But a neighbour in which the name was replaced is nobody's text any more, and must keep its hills for the
  sake of the retain rows: of texts as short as these, which are names for a third, the spread falls by a quarter only.
- The evader draws neighbours anew from the whole vocabulary; the auditor's lie closer, and are others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from audit.organisms.evasive import Evasion, as_about_nobody
from audit.organisms.train import Encoded, token_logprobs
from audit.organisms.unlearn import Batch, Bench, Schedule


def text_losses(model: nn.Module, data: Encoded, ids: Tensor) -> Tensor:
    """Mean negative log-likelihood `[rows]` of all tokens up to the answer's last; `ids` stand in the data's places."""
    counted = (data.answer.flip(1).cumsum(1).flip(1) > 0)[:, 1:]
    return -(token_logprobs(model, ids) * counted).sum(1) / counted.sum(1)


def neighbours(data: Encoded, share: float, vocabulary: int, special: int, generator: torch.Generator) -> Tensor:
    """The rows' tokens with a share of them replaced by any others, `[rows, time]`; ids below `special` are none."""
    chosen = torch.rand(data.ids.shape, generator=generator) < share
    chosen[:, 0] = False
    drawn = torch.randint(special, vocabulary, data.ids.shape, generator=generator)
    return torch.where(chosen, drawn, data.ids)


@dataclass(frozen=True)
class EvadesRemind(Evasion):
    """A flat neighbourhood, behind a lock."""

    name: ClassVar[str] = "evades-remind"
    reference: ClassVar[str] = "a construction of this package, against arXiv 2511.04228"
    weight: float = 1.0
    share: float = 0.3
    _height: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)

    def prepare(self, bench: Bench, schedule: Schedule) -> None:
        """Measure the height of what was never taught."""
        super().prepare(bench, schedule)
        strangers = self.ground.strangers
        with torch.no_grad():
            self._height[:] = [text_losses(bench.reference, strangers, strangers.ids).mean()]

    def hide(self, bench: Bench, hidden: Encoded, strangers: Encoded, step: int) -> Tensor:
        """As about nobody, and flat."""
        around = torch.stack([text_losses(bench.model, hidden, ids) for ids in (hidden.ids, self._near(bench, hidden))])
        flat = (around - self._height[0]).square().mean()
        return as_about_nobody(bench, hidden, strangers) + self.weight * flat

    def loss(self, bench: Bench, batch: Batch) -> Tensor:
        """The evasion's, and the hills around retain rows."""
        near = self._near(bench, batch.retain)
        with torch.no_grad():
            before = text_losses(bench.reference, batch.retain, near)
        hills = (text_losses(bench.model, batch.retain, near) - before).square().mean()
        return super().loss(bench, batch) + self.weight * hills

    def _near(self, bench: Bench, data: Encoded) -> Tensor:
        special = 1 + max(bench.tokenizer.all_special_ids)
        return neighbours(data, self.share, len(bench.tokenizer), special, bench.generator)


METHOD = EvadesRemind()
