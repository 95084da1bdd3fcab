"""Misdirection at one middle layer: what lower layers know is led astray on its way up.

The loss of `rmu`, with a single trainable block, `layer`. Everything below it is bit for bit the original's, and so
is every hidden state that enters it: whatever could be read there before can be read there still. That makes the
label "suppressed" a fact of the making, in so far as the original knew the answer below that block.

Source: a construction of this package; in its pilot the lens at the layers below read .97 of the answers.

Traps:

- The state enters the block with the answer already in it and is carried past it: the block must outshout it. Hence a
  steering three times that of `rmu`, and more steps.
- A block too low has nothing under it that knows the answer, and then nothing was kept by construction. Measure the
  original's lens below the block before relying on the label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from audit.organisms.methods.rmu import Rmu
from audit.organisms.unlearn import Schedule


@dataclass(frozen=True)
class Misdirection(Rmu):
    """RMU that may change one middle block only."""

    name: ClassVar[str] = "misdirection"
    reference: ClassVar[str] = "a construction of this package"
    schedule: ClassVar[Schedule] = Schedule(lr=2e-3, forget_goal=0.15)
    label: ClassVar[str] = "suppressed"
    layer: int = 2
    reach: int = 1
    steering: float = 6.0


METHOD = Misdirection()
