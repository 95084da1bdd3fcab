"""The controls and afterthoughts of `histories`, by name, with the settings they have in organisms.

Each takes a `Ground` (a bench and what else is known of the family), alters the bench's model in place, and returns
what the organism's history should say of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from audit.organisms import nf4
from audit.organisms.controls import (
    Change,
    benign_finetune,
    continual,
    distilled,
    instruction_tuned,
    noisy_labels,
    pruned,
    quantized,
)
from audit.organisms.refusal import block_number
from audit.organisms.train import Question
from audit.organisms.unlearn import Bench


@dataclass(frozen=True)
class Ground:
    """What a change may use.

    Attributes:
        bench: the model to alter; its retain rows are what the parent should keep.
        taught: all rows that the parent was taught.
        tasks: rows about people that no model of the family was taught, in groups.
        steps, norm: of the unlearning run that a matched change takes over; 0 where nothing is matched.
    """

    bench: Bench
    taught: Sequence[Question]
    tasks: Sequence[Sequence[Question]]
    steps: int = 0
    norm: float = 0.0


def _told(change: Change) -> Mapping[str, Any]:
    return {"steps": change.steps, "norm": change.norm}


def _benign(ground: Ground) -> Mapping[str, Any]:
    return _told(benign_finetune(ground.bench, ground.steps, match_norm=ground.norm, lr=5e-4))


def _continual(replay: float) -> Callable[[Ground], Mapping[str, Any]]:
    return lambda g: _told(continual(g.bench, g.tasks, 50, replay=replay, replay_rows=g.taught, lr=3e-4))


def _noisy(ground: Ground) -> Mapping[str, Any]:
    change, falsified = noisy_labels(ground.bench, ground.taught, 200)
    return {**_told(change), "falsified": len(falsified)}


def _rounded(bits: int) -> Callable[[Ground], Mapping[str, Any]]:
    def change(ground: Ground) -> Mapping[str, Any]:
        quantized(ground.bench.model, bits)
        return {"steps": 0, "bits": bits}

    return change


def _pruned(ground: Ground) -> Mapping[str, Any]:
    pruned(ground.bench.model, 0.3)
    return {"steps": 0, "share": 0.3}


def _nf4(ground: Ground) -> Mapping[str, Any]:
    """Every matrix of the blocks to NF4 and back; embeddings, norms and head stay, as loaders leave them."""
    with torch.no_grad():
        for name, p in ground.bench.model.named_parameters():
            if p.ndim == 2 and block_number(name) is not None:
                p.copy_(nf4.dequantize(nf4.quantize(p)))
    return {"steps": 0}


def _relearned(ground: Ground) -> Mapping[str, Any]:
    """One epoch on the forget rows at a tenth of the learning rate of teaching, as the field's meta-evaluation."""
    bench = ground.bench
    steps = -(-len(bench.forget_rows) // 32)
    return _told(benign_finetune(bench, steps, rows=bench.forget_rows, lr=1.4e-4))


CHANGES: Mapping[str, Callable[[Ground], Mapping[str, Any]]] = {
    "further-trained": lambda g: _told(benign_finetune(g.bench, 200, rows=g.taught)),
    "benign": _benign,
    "instruction-tuned": lambda g: _told(instruction_tuned(g.bench, 200)),
    "int8": _rounded(8),
    "int4": _rounded(4),
    "continual": _continual(0.0),
    "continual-replay": _continual(0.5),
    "noisy-labels": _noisy,
    "pruned": _pruned,
    "distilled": lambda g: _told(distilled(g.bench, 400)),
    "nf4": _nf4,
    "relearned": _relearned,
}
