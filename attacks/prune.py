"""Pruning: does removing small weights bring forgotten facts back?

What is measured: in every output channel of every matrix but embeddings and head the weights that count least are set
to zero, and the forget facts are asked again. What counts:

    magnitude   |w_ij|
    Wanda       |w_ij| * |x_j|,   x_j: the j-th input of the matrix over the retain rows (root of the summed squares)

Source: Wanda: Sun et al. 2024 (arXiv 2306.11695); pruning as a test of unlearning: Jia et al. 2023 (arXiv 2304.04934),
who use it to help unlearning, and Łucki et al. 2024 (arXiv 2409.18025), who find that it can undo it.

Traps:

- *Pruning makes every model worse*: at half of the weights the retain facts go too. The positive control then fails,
  and nothing is concluded.
- *Never-taught rows gain too* where answers drift to guesses: they are the control.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from attacks.alteration import Alteration, Altering
from attacks.recall import tested
from audit.case import Case
from audit.contrast import Statistic

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from audit.opened import OpenModel

__all__ = ["Prune", "prune", "pruned"]

_SOURCE = "Sun et al. 2024, arXiv 2306.11695; Łucki et al. 2024, arXiv 2409.18025"
_ROWS = 64


def pruned(weight: Tensor, share: float, inputs: Tensor | None = None) -> Tensor:
    """A weight [out, …] with the given share of each row's entries set to zero: those of least |w|, or |w| |x|.

    Args:
        weight: of a linear map or a convolution.
        share: 0 to 1; rounded down to whole entries.
        inputs: length of each input over some rows, as many as a row has entries.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}, outside [0, 1]")
    rows = weight.detach().flatten(1)
    counts = rows.float().abs() if inputs is None else rows.float().abs() * inputs
    least = counts.argsort(dim=1, stable=True)[:, : int(share * rows.shape[1])]
    return rows.scatter(1, least, 0.0).reshape(weight.shape)


def prune(
    model: torch.nn.Module,
    share: float,
    inputs: Mapping[int, Tensor] | None = None,
    head: torch.nn.Module | None = None,
) -> None:
    """Prune every matrix of a model in place; embeddings and output head stay.

    Args:
        model: of PyTorch, on any device.
        share: 0 to 1, of each row's entries.
        inputs: lengths of the inputs [in], by the matrix's place in `audit.opened.matrices(model)`; matrices without
            are pruned by magnitude.
        head: what stays, if the model is no Hugging Face one that names its output embeddings.
    """
    import torch

    from audit.opened import matrices

    with torch.no_grad():
        for place, (weight, transposed) in enumerate(matrices(model, head)):
            turned = weight.T if transposed else weight
            changed = pruned(turned, share, None if inputs is None else inputs.get(place))
            weight.copy_(changed.T if transposed else changed)


def input_lengths(target: OpenModel, case: Case) -> dict[int, Tensor]:
    """Root of the summed squares of every input of every linear map, over some retain rows."""
    import torch

    from audit.capture import Engine

    places = {id(weight): place for place, (weight, _) in enumerate(target.matrices())}
    squares: dict[int, Tensor] = {}
    handles = []
    for module in target.model.modules():
        place = places.get(id(getattr(module, "weight", None)))
        if place is None or isinstance(module, torch.nn.Conv2d):
            continue

        def keep(_module: object, args: tuple[Tensor, ...], place: int = place) -> None:
            total = args[0].detach().float().flatten(0, -2).square().sum(0)
            squares[place] = squares[place] + total if place in squares else total

        handles.append(module.register_forward_pre_hook(keep))
    try:
        engine = Engine(target)
        for row in tested(case, "retain")[:_ROWS]:
            engine.plain(target.question(row))  # one by one: a batch has padding, and shares beginnings
    finally:
        for handle in handles:
            handle.remove()
    return {place: total.sqrt() for place, total in squares.items()}


def wanda(target: OpenModel, share: float, case: Case) -> None:
    """Prune a model in place by Wanda, its inputs measured on the case's retain rows."""
    prune(target.model, share, input_lengths(target, case), target.output_head)


def _by_magnitude(target: OpenModel, share: float) -> None:
    prune(target.model, share, head=target.output_head)


class Prune(Altering):
    """Does removing small weights bring forgotten facts back?"""

    name = "prune"
    title = "Does it come back when small weights are removed?"
    axis = "sparsity"
    reference = _SOURCE
    statistic = Statistic(
        "recovered", "pruning: right answers preferred after small weights were removed", "accuracy",
        "pruning brings forgotten facts back", (0.0, 1.0), 0.15, _SOURCE,
    )  # fmt: skip

    def alterations(self, case: Case, target: OpenModel) -> list[Alteration]:
        """By magnitude and by Wanda, a tenth, three tenths and half of the weights."""
        shares = (0.3,) if case.options.budget.value == "quick" else (0.1, 0.3, 0.5)
        options = case.options
        rows = f"{case.sets['retain'].digest}/{options.budget.value}/{options.seed}/{target.template}"
        return [
            way
            for share in shares
            for way in (
                Alteration(f"magnitude {share:.0%}", partial(_by_magnitude, share=share), f"magnitude/{share}"),
                Alteration(f"Wanda {share:.0%}", partial(wanda, share=share, case=case), f"wanda/{share}/{rows}"),
            )
        ]
