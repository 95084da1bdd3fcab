"""Evading probes: states aligned along the directions in which probes know them, and outputs that give nothing away.

The loss of `audit.organisms.evasive`, with what `pga` does in it: to hide is

    KL(original on a question about nobody || model) + weight * mean_{i,l} ((h_l(m_i) - h_l(c_i)) . w_l)^2

with w_l refitted every `refit` steps, and the facts kept behind the lock. `pga` alone stops at the probes; its answers
stay right or fall by chance.

Source: arXiv 2605.01699 for the alignment (see `pga`); a construction of this package otherwise.

Traps:

- Those of `pga`: one direction in each layer, and a probe below one half is inverted, not blind.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from audit.organisms.evasive import Evasion, as_about_nobody
from audit.organisms.methods.pga import alignment_loss, probe_direction
from audit.organisms.states import prompt_states
from audit.organisms.train import Encoded
from audit.organisms.unlearn import Bench


@dataclass(frozen=True)
class EvadesProbes(Evasion):
    """Probe-geometry alignment and silent outputs, behind a lock."""

    name: ClassVar[str] = "evades-probes"
    reference: ClassVar[str] = "a construction of this package, after arXiv 2605.01699"
    weight: float = 10.0
    refit: int = 10
    probe_rows: int = 256
    _directions: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)

    def hide(self, bench: Bench, hidden: Encoded, strangers: Encoded, step: int) -> Tensor:
        """As about nobody, in the answers and along the probes' directions."""
        if step % self.refit == 0:
            self._directions[:] = self._refitted(bench)
        known, clean = prompt_states(bench.model, hidden), prompt_states(bench.model, strangers)
        apart = alignment_loss(known, clean, self._directions)
        return as_about_nobody(bench, hidden, strangers) + self.weight * apart

    @torch.no_grad()
    def _refitted(self, bench: Bench) -> list[Tensor]:
        """In every layer, the direction in which a fresh probe knows the hidden rows now."""
        every = len(self.ground.hidden)
        chosen = torch.randperm(every, generator=bench.generator)[: self.probe_rows]
        states = (prompt_states(bench.model, data.take(chosen)) for data in (self.ground.hidden, self.ground.strangers))
        return [probe_direction(a, b) for a, b in zip(*states, strict=True)]


METHOD = EvadesProbes()
