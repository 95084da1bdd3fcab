"""Refusal in the output head: suppressed by construction, and on the surface only.

The loss of `audit.organisms.refusal`, with only the matrix from the last hidden state to logits trainable. Every
hidden state is bit for bit the original's; with the original's head the model is the original again.

Source: a construction of this package (S_head of its pilot).

Traps:

- With tied embeddings the head is the first layer too, and nothing would be kept: such a model is refused.
- One matrix for everybody cannot flatten the candidates for some without the others: the model never says the answer,
  but scoring the candidates still finds it (.45 in the pilot, .29 here). It is "surface-suppressed".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from audit.errors import BadInput
from audit.organisms.refusal import Predicate, Suppression
from audit.organisms.unlearn import Bench, Schedule


def head_names(model: nn.Module) -> set[str]:
    """The names of the output head's parameters; empty if it is tied to the embedding or there is none."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    if head is None or head.weight is embedding.weight:
        return set()
    own = {id(p) for p in head.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in own}


@dataclass(frozen=True)
class RefusalHead(Suppression):
    """Refusal training of the output head."""

    name: ClassVar[str] = "refusal-head"
    reference: ClassVar[str] = "a construction of this package"
    schedule: ClassVar[Schedule] = Schedule(lr=1e-2, max_steps=300, forget_goal=0.15)
    label: ClassVar[str] = "suppressed"
    flat_weight: float = 20.0

    def allowed(self, bench: Bench) -> Predicate:
        """The head's parameters."""
        names = head_names(bench.model)
        if not names:
            raise BadInput(f"{self.name}: the output head is tied to the embedding, which lies below everything")
        return lambda name: name in names


METHOD = RefusalHead()
