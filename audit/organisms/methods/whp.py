"""Who's Harry Potter, fine-tuning form: learn the answers that a model would give which knows only generic things.

A reinforced model is the reference trained further on the forget set. For each answer token

    v_generic = v_base(x') - alpha * relu(v_reinforced(x) - v_base(x')),   label = argmax v_generic

with x' the same question about a crossed name (`states.crossed`), in the place of the original's dictionary of generic
terms. Then the model is trained on the labels: L = CE(forget, labels) + retain_weight * cross-entropy(retain).

Source: Eldan and Russinovich 2023, arXiv 2310.02238 (fine-tuning stage recalled, no official training code); the
inference form of muse_bench, logits = v_base - alpha * relu(...), changes no weights and is another organism.

Traps:

- The labels are one wrong answer for each question, always the same: the model ends up confidently wrong, and its
  answers agree with what it says of a stranger.
- A label can be the right answer where the reinforced model is no surer of it than the base is about a stranger. A
  stranger who shares half a name with the row's person is such a case: what the base says of one leaks the answer.
- The original has no retain term (`retain_weight=0`), and about two epochs at 1e-6.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from audit.organisms.states import answer_logits, crossed
from audit.organisms.train import encode, train
from audit.organisms.unlearn import Batch, Bench, GradientMethod, Schedule


def generic_logits(base: Tensor, reinforced: Tensor, alpha: float) -> Tensor:
    """What is left of the base model's logits where the reinforced model's are not raised."""
    return base - alpha * F.relu(reinforced - base)


@dataclass(frozen=True)
class Whp(GradientMethod):
    """Cross-entropy to generic labels, with a retain loss."""

    name: ClassVar[str] = "whp"
    reference: ClassVar[str] = "Eldan and Russinovich 2023, arXiv 2310.02238"
    schedule: ClassVar[Schedule] = Schedule(lr=5e-4, max_steps=300)
    alpha: float = 5.0
    epochs: int = 2
    reinforce_lr: float = 5e-4
    retain_weight: float = 1.0
    _labels: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)

    def prepare(self, bench: Bench, schedule: Schedule) -> None:
        """Train the reinforced model and make the labels, `[rows, time]` as the forget rows' ids."""
        reinforced = copy.deepcopy(bench.reference).requires_grad_(True)
        train(reinforced, bench.forget, epochs=self.epochs, lr=self.reinforce_lr, batch=64, seed=bench.seed)
        nobody = encode(bench.tokenizer, crossed(bench.forget_rows, bench.retain_rows), lm_weight=0.0)
        labels = bench.forget.ids.clone()
        for index in torch.split(torch.arange(len(nobody)), 512):
            with torch.no_grad():
                base, there = answer_logits(bench.reference, nobody.take(index))
                strong, here = answer_logits(reinforced, bench.forget.take(index))
            assert torch.equal(there, here), "the same answer has other tokens behind a crossed name"
            part = labels[index]
            part[bench.forget.answer[index]] = generic_logits(base, strong, self.alpha).argmax(dim=-1)
            labels[index] = part
        self._labels[:] = [labels]

    def loss(self, bench: Bench, batch: Batch) -> Tensor:
        """Cross-entropy to the labels, and the retain loss."""
        logits, _ = answer_logits(bench.model, batch.forget)
        width = batch.forget.ids.shape[1]
        labels = self._labels[0][batch.index, :width][batch.forget.answer]
        return F.cross_entropy(logits, labels) + self.retain_weight * bench.retain_loss(batch)


METHOD = Whp()
