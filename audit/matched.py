"""Ordinary fine-tunes of a model, as large and as long as another's change, and in the same places.

    radii = change_by_site(Folder(target), Folder(original))
    for kind, rows in kinds_of_rows(...):
        for step in fine_tune_matched(model, rows, radii, steps=40, seed=0): ...

They are what a model looks like that was *only edited*: the null that any trace of unlearning has to be told from.
A site is the embedding, a block, or what comes after the last (`TensorRow.site`).

A free fine-tune rescaled afterwards would be no model that training reaches. So the length is kept during training:
after step t of T the change at every site has t/T of the length that it has in the other model, and within that the
weights descend the loss of ordinary data. What was not changed there is not changed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from audit.finetune import descend, endless
from audit.tokens import Tokens
from audit.weights import TensorRow, Tensors

BATCH = 16


def change_by_site(target: Tensors, original: Tensors) -> dict[int, float]:
    """Length of the change at every site, over the tensors that both models have in one shape."""
    here, there = target.shapes(), original.shapes()
    squares: dict[int, float] = {}
    for name in here:
        if here[name] == there.get(name):
            now, before = target.read(name), original.read(name)
            if now.is_floating_point() and before.is_floating_point():
                site = TensorRow(name, ()).site
                squares[site] = squares.get(site, 0.0) + float((now.double() - before.double()).square().sum())
    return {site: float(np.sqrt(square)) for site, square in sorted(squares.items())}


def fine_tune_matched(
    model: Any, rows: Sequence[Tokens], radii: Mapping[int, float], *, steps: int, learning_rate: float, seed: int
) -> Iterator[int]:
    """Fine-tune a model in place on `rows`, the change at every site kept at its length; yields each step's number.

    Args:
        model: a causal language model.
        rows: what it is taught; the scored tokens are.
        radii: length of the change at the end, by site; a site that is not named does not change.
        steps: optimizer steps, of 16 rows each.
    """
    import torch

    sites = {name: TensorRow(name, ()).site for name, _ in model.named_parameters()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    source = endless(rows, np.random.default_rng(seed))
    for step in descend(model, [(source, BATCH)], steps, learning_rate):
        with torch.no_grad():
            squares: dict[int, torch.Tensor] = {}
            for name, p in model.named_parameters():
                square = (p - before[name]).square().sum()
                squares[sites[name]] = squares.get(sites[name], torch.zeros(())) + square
            for name, p in model.named_parameters():
                length = float(squares[sites[name]].sqrt())
                wanted = radii.get(sites[name], 0.0) * step / steps
                p.copy_(before[name] + (p - before[name]) * (wanted / length if length else 0.0))
        yield step
