"""Representation misdirection: hidden states of the forget set are sent where no other state points.

With h_l the output of block l (from 0), u a fixed random unit vector of the positive orthant, and n the mean norm of
the reference's h_l over the batch's retain tokens,

    L_forget = mean ||h_l(x_f) - steering * n * u||^2 / n^2
    L_retain = mean ||h_l(x_r) - h_l_ref(x_r)||^2 / n^2
    L        = L_forget + retain_weight * L_retain

over the positions that predict a forget answer's tokens, and over all real tokens of retain rows. Only blocks up to l
can be moved by it, and only `reach` of them, l the last, are: the rest stays bit for bit.

Source: Li et al. 2024 (WMDP), arXiv 2403.03218; the scale relative to n is the adaptive RMU of Huu-Tien et al. 2024,
arXiv 2408.06223. There errors are means over coordinates and not relative to n^2.

Traps:

- An absolute c (6.5, 20, ...) means nothing at another width: here it is a multiple of the norm found.
- The published loss covers the label positions *of the hidden states*. With answers of one token that is one place
  too late: the state that predicts the answer stands at the prompt's last token. Here the mask is shifted.
- hidden_states[l + 1] is block l's output, but the last one has passed the final norm: l may not be the last block.
- The change is made at one layer and carried on upwards: lower layers still hold what was known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from audit.errors import BadInput
from audit.organisms.refusal import block_count, block_number, restricted
from audit.organisms.train import Progress
from audit.organisms.unlearn import Batch, Bench, GradientMethod, Schedule, Unlearning


def misdirection_loss(forget: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    """Mean squared distance of states `[positions, width]` from `target`, in units of `scale` squared."""
    return (forget - target).square().sum(dim=-1).mean() / scale.square()


def direction(width: int, seed: int) -> Tensor:
    """A random unit vector with no negative coordinate."""
    vector = torch.rand(width, generator=torch.Generator().manual_seed(seed))
    unit: Tensor = vector / vector.norm()
    return unit


def states(model: nn.Module, ids: Tensor, layer: int) -> Tensor:
    """The output of a block, `[rows, time, width]`."""
    hidden: tuple[Tensor, ...] = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    return hidden[layer + 1].float()


@dataclass(frozen=True)
class Rmu(GradientMethod):
    """RMU with a relative steering norm."""

    name: ClassVar[str] = "rmu"
    reference: ClassVar[str] = "Li et al. 2024, arXiv 2403.03218"
    schedule: ClassVar[Schedule] = Schedule(lr=1e-3, forget_goal=0.15)
    layer: int = 1
    reach: int = 2
    steering: float = 2.0
    retain_weight: float = 10.0

    def loss(self, bench: Bench, batch: Batch) -> Tensor:
        """The distance from the target, and the retain states' drift `retain_weight` times."""
        retain = batch.retain
        real = torch.arange(retain.ids.shape[1]) < retain.length[:, None]
        now = states(bench.model, retain.ids, self.layer)[real]
        with torch.no_grad():
            before = states(bench.reference, retain.ids, self.layer)[real]
        scale = before.norm(dim=-1).mean()
        moved = states(bench.model, batch.forget.ids, self.layer)[:, :-1][batch.forget.answer[:, 1:]]
        target = self.steering * scale * direction(moved.shape[-1], bench.seed)
        return misdirection_loss(moved, target, scale) + self.retain_weight * misdirection_loss(now, before, scale)

    def unlearn(self, bench: Bench, schedule: Schedule, progress: Progress | None = None) -> Unlearning:
        """Descend the loss within `reach` blocks. Raises `BadInput` where the model has no such layer."""
        count = block_count(bench.model)
        if not 0 <= self.layer < count - 1:
            raise BadInput(f"{self.name}: layer {self.layer} is not below the last of {count} blocks")
        blocks = range(self.layer - self.reach + 1, self.layer + 1)
        return super().unlearn(bench, restricted(schedule, lambda name: block_number(name) in blocks), progress)


METHOD = Rmu()
