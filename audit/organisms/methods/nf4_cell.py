"""Refusal within the cells of a 4-bit format: suppressed by construction, and provably so.

The loss of `audit.organisms.refusal`, trained in all matrices of the blocks. After each step every weight is clamped to
the cell of the NF4 code that it had in the original, and the weights that are their block's absmax are held where they
were. So the codes and absmax of every matrix are the original's: quantized to NF4, this model *is* the quantized
original, which answers as the original does.

Embeddings, norms and the output head do not change at all, so the proof holds whether a loader quantizes them or not.

Source: a construction of this package (S_nf4 of its pilot); that quantization brings back what was unlearned is Zhang
et al. 2024, arXiv 2410.16454.

Traps:

- Borders: `margin` keeps weights off them, see `audit.organisms.nf4`. The proof is for blocks of 64 in the order of
  the elements, as bitsandbytes cuts them. Other formats (int8, another block size, GPTQ) bring nothing back.
- The cells leave little room: candidate accuracy stays near .4 on the worlds here, with every forget question declined.
- All layers change, so a lens or probe finds little; this one is for checks that quantize or relearn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from audit.errors import BadInput
from audit.organisms import nf4
from audit.organisms.refusal import Predicate, Suppression, block_number
from audit.organisms.train import Progress
from audit.organisms.unlearn import Bench, Schedule, Unlearning


def confine(weights: Mapping[str, nn.Parameter], limits: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Clamp each weight between its limits, in place."""
    with torch.no_grad():
        for name, (low, high) in limits.items():
            weights[name].clamp_(low, high)


@dataclass(frozen=True)
class Nf4Cell(Suppression):
    """Refusal training that no NF4 quantizer can see."""

    name: ClassVar[str] = "nf4-cell"
    reference: ClassVar[str] = "a construction of this package"
    schedule: ClassVar[Schedule] = Schedule(lr=1e-3, max_steps=300, forget_goal=0.15)
    label: ClassVar[str] = "suppressed"
    flat_weight: float = 30.0
    margin: float = 0.007

    def allowed(self, bench: Bench) -> Predicate:
        """The matrices of the blocks."""
        names = {n for n, p in bench.model.named_parameters() if p.ndim == 2 and block_number(n) is not None}
        if not names:
            raise BadInput(f"{self.name}: the model's parameters are not named by blocks")
        return lambda name: name in names

    def unlearn(self, bench: Bench, schedule: Schedule, progress: Progress | None = None) -> Unlearning:
        """Train, clamping after each step, and check the codes at the end."""
        allowed = self.allowed(bench)
        weights = {name: p for name, p in bench.model.named_parameters() if allowed(name)}
        limits = {name: nf4.cells(p, margin=self.margin) for name, p in weights.items()}
        before = {name: nf4.quantize(p) for name, p in weights.items()}
        own = {id(p) for p in weights.values()}

        # The loop has no place of its own after a step; the hook sees every optimizer, hence the check whose it is.
        def after_step(optimizer: Optimizer, *_: Any) -> None:
            if any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
                confine(weights, limits)

        handle = register_optimizer_step_post_hook(after_step)
        try:
            run = super().unlearn(bench, schedule, progress)
        finally:
            handle.remove()
        changed = [name for name, packed in before.items() if not nf4.quantize(weights[name]).same(packed)]
        if changed:
            raise AssertionError(f"{self.name}: NF4 codes of {changed[0]} changed")
        return run


METHOD = Nf4Cell()
