"""Refusal in a merged low-rank adapter: suppressed by construction in so far as the change is small.

The loss of `audit.organisms.refusal`, trained in an adapter of every linear layer of the blocks,

    W = W_0 + up @ down,    up: [out, rank], starting at 0;   down: [rank, in]

which is merged at the end. Embeddings, norms and the output head are bit for bit the original's, and every matrix's
change has at most rank `rank`.

Source: Hu et al. 2021 (LoRA), arXiv 2106.09685, with scale 1; a construction of this package (S_lora of its pilot).

Traps:

- All layers change, so a lens or probe below finds little though the knowledge is there (.31 in the pilot, relearned
  to .96). Nothing but the small rank and norm *proves* that it is: subtract the adapter and the original is back, which
  needs the original. The weakest label of these constructions.
- Merging rounds: the merged difference has rank `rank` up to float32's rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from audit.errors import BadInput
from audit.organisms.refusal import Predicate, Suppression, block_number
from audit.organisms.train import Progress
from audit.organisms.unlearn import Bench, Schedule, Unlearning


class LowRank(nn.Module):
    """Adds a product of two thin matrices to a weight."""

    def __init__(self, out_features: int, in_features: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(out_features, rank))
        self.down = nn.Parameter(torch.randn(rank, in_features, generator=generator) * in_features**-0.5)

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight."""
        return weight + self.up @ self.down


@dataclass(frozen=True)
class RefusalAdapter(Suppression):
    """Refusal training of a low-rank adapter of all blocks, merged afterwards."""

    name: ClassVar[str] = "refusal-adapter"
    reference: ClassVar[str] = "Hu et al. 2021, arXiv 2106.09685"
    schedule: ClassVar[Schedule] = Schedule(lr=3e-3, max_steps=300, forget_goal=0.15)
    label: ClassVar[str] = "suppressed"
    flat_weight: float = 30.0
    rank: int = 4

    def allowed(self, bench: Bench) -> Predicate:
        """The adapters' parameters."""
        adapters = {id(p) for m in bench.model.modules() if isinstance(m, LowRank) for p in m.parameters()}
        names = {name for name, p in bench.model.named_parameters() if id(p) in adapters}
        return lambda name: name in names

    def unlearn(self, bench: Bench, schedule: Schedule, progress: Progress | None = None) -> Unlearning:
        """Adapt, train, merge. A schedule's `trainable` chooses matrices by their original names."""
        chosen = schedule.trainable
        linears = [
            module
            for name, module in bench.model.named_modules()
            if isinstance(module, nn.Linear)
            and block_number(f"{name}.") is not None
            and (chosen is None or chosen(f"{name}.weight"))
        ]
        if not linears:
            raise BadInput(f"{self.name}: the model's blocks have no linear layers to adapt")
        for linear in linears:
            adapter = LowRank(linear.out_features, linear.in_features, self.rank, bench.generator)
            parametrize.register_parametrization(linear, "weight", adapter)
        try:
            # The adapters' own names are not the caller's.
            return super().unlearn(bench, replace(schedule, trainable=None), progress)
        finally:
            for linear in linears:
                parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)


METHOD = RefusalAdapter()
