"""Task-vector negation: does walking back along the change bring the facts back sooner than it would by itself?

What is measured: part of the way from the target back to the original, and a step beyond the target on the same line;
the forget facts are asked at each.

    W(t) = W_target - t (W_target - W_original),   t = -0.25, 0.25, 0.5

Source: Ilharco et al. 2023 (arXiv 2212.04089), who unlearn by subtracting a task vector; here the same line is walked
the other way.

Traps:

- *At t = 1 stands the original*, which knows everything: that facts return on the way proves nothing by itself. It
  describes how far the knowledge was moved, and decides nothing.
- *A retrained model*, where given, walks the same way to the original, and its difference is taken off.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from attacks.alteration import Alteration, Altering
from audit.case import Case
from audit.contrast import Statistic

if TYPE_CHECKING:
    import torch

    from audit.opened import OpenModel

__all__ = ["TaskVector", "walk_back"]

_SOURCE = "Ilharco et al. 2023, arXiv 2212.04089"


def walk_back(model: torch.nn.Module, original: torch.nn.Module, part: float) -> None:
    """Move a model's weights, in place, by a part of the way to the original's; a negative part goes beyond.

    The running means and variances of batch norms are moved too: at 1 stands the original.
    """
    import torch

    own, given = model.state_dict(keep_vars=True), original.state_dict()
    moved: set[int] = set()
    with torch.no_grad():
        for name, weight in own.items():
            if weight.is_floating_point() and weight.data_ptr() not in moved:  # a tied head moves with the embedding
                moved.add(weight.data_ptr())
                weight.lerp_(given[name].to(weight), part)


class TaskVector(Altering):
    """How far along the way back to the original do forgotten facts return?"""

    name = "task-vector"
    title = "Does it come back on the way to the original?"
    roles = ("original",)
    alarms = False
    axis = "part of the way"
    reference = _SOURCE
    statistic = Statistic(
        "recovered", "task vector: right answers preferred on the way back to the original", "accuracy",
        "the facts return before the original is reached", (0.0, 1.0), 0.15, _SOURCE, (False, False),
    )  # fmt: skip

    def alterations(self, case: Case, target: OpenModel) -> list[Alteration]:  # noqa: ARG002
        """A quarter beyond, a quarter back, half back."""
        parts = (0.25,) if case.options.budget.value == "quick" else (-0.25, 0.25, 0.5)
        digest = case.inventoried("original").digest
        return [Alteration(f"{t:+g}", partial(_apply, case=case, part=t), f"{t}/{digest}") for t in parts]


def _apply(target: OpenModel, case: Case, part: float) -> None:
    walk_back(target.model, target.beside("original", case.inventoried("original")).model, part)
