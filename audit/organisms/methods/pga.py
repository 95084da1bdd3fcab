"""Probe-geometry alignment: move what is forgotten along the one direction in which a linear probe knows it.

Every `refit` steps and in every layer, a logistic regression on standardised states tells the forget prompts m_i
from matched prompts c_i that were never taught; w_l is its direction in the original coordinates, of length 1. Then

    L = weight * mean_{i,l} ((h_l(m_i) - h_l(c_i)) . w_l)^2 + retain_weight * cross-entropy(retain)

with h_l the state after block l at the last token of the prompt.

Source: arXiv 2605.01699 (recipe read in code: C = 1, refit every 25 of 200 passes, LoRA).

Traps:

- A probe below one half is inverted, not blind: report max(a, 1 - a), concordance of pairs, and a permutation null
  of the statistic after any choice of layer. The authors' own later audit finds fresh probes at .955.
- One direction in each layer is removed, and what remains is free to move elsewhere. It is made to defeat naive
  linear probes, not to make answers unlikely: how far those rise is a side effect.
- The original's second term is the cross-entropy of the clean texts, which it memorises; much of the reported loss
  of recall may be that. Here it is that of the retain rows.
- Without `clean` the matched prompts are crossed names (`states.crossed`); they must not be the hold-out people
  that an audit compares with, for then the control is part of the treatment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from audit.organisms.states import crossed, prompt_states
from audit.organisms.train import Encoded, Question, encode
from audit.organisms.unlearn import Batch, Bench, GradientMethod, Schedule


def probe_direction(known: Tensor, clean: Tensor) -> Tensor:
    """Unit normal, in the states' own coordinates, of a probe that tells two sets of states `[rows, width]` apart."""
    from sklearn.linear_model import LogisticRegression

    both = torch.cat([known, clean]).double()
    scale = both.std(dim=0).clamp_min(1e-8)
    labels = np.repeat([1, 0], [len(known), len(clean)])
    probe = LogisticRegression(C=1.0, max_iter=200).fit(((both - both.mean(dim=0)) / scale).numpy(), labels)
    direction: Tensor = torch.from_numpy(probe.coef_[0]) / scale
    return F.normalize(direction, dim=0).to(known.dtype)


def alignment_loss(known: Sequence[Tensor], clean: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of paired states along each layer's direction."""
    parts = [((a - b) @ w).square().mean() for a, b, w in zip(known, clean, directions, strict=True)]
    return torch.stack(parts).mean()


@dataclass
class _Probes:
    clean: Encoded | None = None
    directions: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Pga(GradientMethod):
    """Alignment along refitted probe directions, with a retain loss; `clean` pairs with the forget rows."""

    name: ClassVar[str] = "pga"
    reference: ClassVar[str] = "arXiv 2605.01699"
    schedule: ClassVar[Schedule] = Schedule(lr=5e-4, max_steps=400, check_every=20)
    weight: float = 10.0
    retain_weight: float = 4.0
    refit: int = 10
    probe_rows: int = 256
    clean: tuple[Question, ...] = ()
    _probes: _Probes = field(default_factory=_Probes, init=False, repr=False, compare=False)

    def prepare(self, bench: Bench, schedule: Schedule) -> None:
        """Encode the matched prompts."""
        rows = self.clean or crossed(bench.forget_rows, bench.retain_rows)
        self._probes.clean = encode(bench.tokenizer, rows, lm_weight=0.0)

    def loss(self, bench: Bench, batch: Batch) -> Tensor:
        """The alignment loss, after a refit where one is due, and the retain loss."""
        clean = self._probes.clean
        assert clean is not None, "prepare comes first"
        if batch.step % self.refit == 0:
            chosen = torch.randperm(len(clean), generator=bench.generator)[: self.probe_rows]
            with torch.no_grad():
                states = prompt_states(bench.model, bench.forget.take(chosen))
                others = prompt_states(bench.model, clean.take(chosen))
            self._probes.directions[:] = [probe_direction(a, b) for a, b in zip(states, others, strict=True)]
        known = prompt_states(bench.model, batch.forget)
        apart = alignment_loss(known, prompt_states(bench.model, clean.take(batch.index)), self._probes.directions)
        return self.weight * apart + self.retain_weight * bench.retain_loss(batch)


METHOD = Pga()
