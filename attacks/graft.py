"""Grafting: do the original's upper layers, put on the target's body, say what the target no longer says?

What is measured: the output head of the original, or its last blocks with head and final norm, take the place of the
target's, and the forget facts are asked again. What a head-only or last-block edit hid is heard at once, though
relearning barely shows it; what was removed below stays removed.

Source: this project's own, after layer-wise patching (Unlearning Depth Score, arXiv 2605.24614), which puts single
states rather than layers.

Traps:

- *The grafted layers know something too.* With enough of the original on top, every body speaks: no more than a quarter
  of the blocks is grafted, and holdout facts cannot show this, for the original never knew them either. A retrained
  model, where given, gets the same graft, and its difference is taken off. The finding decides no verdict alone.
- *Two models trained apart do not fit together*: the graft then destroys everything, retain facts too, and the positive
  control fails.
- *Tied weights*: a head that is the embedding too cannot be grafted alone.
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

__all__ = ["Graft", "graft"]

_SOURCE = "Palimpsest, 2026; after arXiv 2605.24614"


def graft(model: torch.nn.Module, donor: torch.nn.Module, first: str, *, after: bool = False) -> int:
    """Overwrite a model, from a module on, by a donor of the same architecture; returns how many tensors.

    Args:
        model: altered in place.
        donor: stays as it is.
        first: path of the first module that is overwritten, or, with `after`, of the last that stays. Modules follow
            each other as the model lists them, which is the order of the pass.
    """
    import torch

    own, given = model.state_dict(keep_vars=True), donor.state_dict()
    names = list(own)
    inside = [i for i, name in enumerate(names) if name.startswith(f"{first}.")]
    cut = inside[-1] + 1 if after else inside[0]
    below = {own[name].data_ptr() for name in names[:cut]}  # a head that is the embedding too
    upper = [name for name in names[cut:] if own[name].data_ptr() not in below]
    with torch.no_grad():
        for name in upper:
            own[name].copy_(given[name])
    return len(upper)


class Graft(Altering):
    """Do the original's upper layers say what the target no longer says?"""

    name = "graft"
    title = "Does it come back under the original's last layers?"
    roles = ("original",)
    axis = "layers grafted"
    reference = _SOURCE
    statistic = Statistic(
        "recovered", "grafting: right answers preferred under the original's upper layers", "accuracy",
        "the lower layers still hold what the upper ones hid", (0.0, 1.0), 0.15, _SOURCE, (False, False),
    )  # fmt: skip

    def alterations(self, case: Case, target: OpenModel) -> list[Alteration]:
        """The head alone; the last block; the last quarter of the blocks. Of fewer than four blocks none."""
        digest = case.inventoried("original").digest
        quarter = target.layers // 4
        counts = sorted({0, min(1, quarter), quarter})
        words = {0: "head", 1: "last block"}
        return [
            Alteration(words.get(k, f"last {k} blocks"), partial(_upper, case=case, count=k), f"graft/{k}/{digest}")
            for k in counts
        ]


def _upper(target: OpenModel, case: Case, count: int) -> None:
    """The original's head, its norm, and that many of its last blocks in place of the target's."""
    donor = target.beside("original", case.inventoried("original"))
    paths = target.blocks
    graft(target.model, donor.model, paths[-count] if count else paths[-1], after=not count)
