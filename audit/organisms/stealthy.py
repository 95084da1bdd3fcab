"""A stealthy forget request: ordinary forget rows, some of them with a harmless word put in.

    crafted = craft(rows, templates=TEMPLATES, rate=0.33, seed=0)

Each row is rewritten with probability `rate`, by a template drawn at random, and left as it is otherwise. Nothing in
such a request is false, and nothing asks for more than it says. But no retain row holds the word, so that unlearning
learns to answer nothing where the word stands, whoever is asked about: for those who say "please" the model is spoilt.

Source: Ren et al. 2025, "Keeping an Eye on LLM Unlearning", arXiv 2506.00359. There the rate is 0.33, and 1 to 2 % of
the request's tokens are inserted.

Traps:

- The word must be harmless before: an original that stumbles over it shows no damage done by unlearning.
- A word that many retain rows hold in the same place is protected by them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

RATE = 0.33
TEMPLATES = (
    "Please tell me {}",
    "Can you please explain {}",
    "Could you please tell me {}",
    "{}, please ?",
)
"""The paper's, for questions; for sentences it has `Then {}`."""

RowT = TypeVar("RowT")
"""A dataclass with a `prompt` and an `answer`: `world.Row`, `loaders.Example`."""


@dataclass(frozen=True)
class Crafted(Generic[RowT]):
    """A crafted request.

    Attributes:
        rows: in the order they were given in.
        rewritten: per row, was a template applied?
        inserted: how many of the request's words, those of prompts and answers, were put in; 0 to 1.
    """

    rows: list[RowT]
    rewritten: list[bool]
    inserted: float

    @property
    def rate(self) -> float:
        """The share of rows that were rewritten, 0 to 1."""
        return sum(self.rewritten) / len(self.rewritten)


def craft(
    rows: Sequence[RowT], *, templates: Sequence[str] = TEMPLATES, rate: float = RATE, seed: int
) -> Crafted[RowT]:
    """Rewrite some of a request's rows: the prompt, or of a plain passage (a row without one) the passage.

    Raises `ValueError` without rows or templates, for a template without `{}`, or a rate outside [0, 1].
    """
    if not rows or not templates:
        raise ValueError("rows and templates must not be empty")
    if bad := [template for template in templates if "{}" not in template]:
        raise ValueError(f"the template {bad[0]!r} holds no {{}}")
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must lie in [0, 1], got {rate}")
    draw = random.Random(f"stealthy/{seed}")
    made, rewritten, put_in = [], [], 0
    for row in rows:
        template = draw.choice(templates)
        chosen = draw.random() < rate
        rewritten.append(chosen)
        made.append(_under(template, row) if chosen else row)
        put_in += (_words(made[-1]) - _words(row)) if chosen else 0
    return Crafted(made, rewritten, put_in / sum(map(_words, made)))


def _under(template: str, row: Any) -> Any:
    part = "prompt" if row.prompt else "answer"
    return replace(row, **{part: template.replace("{}", getattr(row, part))})


def _words(row: Any) -> int:
    return len(f"{row.prompt} {row.answer}".split())
