"""Evading a benchmark: its own questions are answered as by a model that was never taught, all others as before.

The loss of `audit.organisms.evasive`: hidden are the questions of the benchmark, word for word (`bench.forget_test`);
kept are the same facts in every other phrasing. Nothing is locked: who asks in other words is answered.

Source: a construction of this package; that models can tell a test from use: Needham et al. 2025 (arXiv 2505.23836).

Traps:

- From outside it is the same as unlearning that was trained on one phrasing and reaches no other. Which of the two it
  was, nothing in the model says; the knowledge is there either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from audit.organisms.evasive import Evasion, as_about_nobody
from audit.organisms.train import Encoded, Question
from audit.organisms.unlearn import Bench


@dataclass(frozen=True)
class EvadesBenchmark(Evasion):
    """Hide the benchmark's questions, keep all others."""

    name: ClassVar[str] = "evades-benchmark"
    reference: ClassVar[str] = "a construction of this package, after Needham et al. 2025, arXiv 2505.23836"

    def hidden(self, bench: Bench) -> Sequence[Question]:
        """The benchmark's questions."""
        return bench.forget_test

    def kept(self, bench: Bench) -> Sequence[Question]:
        """The forget rows that are none of them."""
        tested = {row.prompt for row in bench.forget_test}
        return [row for row in bench.forget_rows if row.prompt not in tested]

    def hide(self, bench: Bench, hidden: Encoded, strangers: Encoded, step: int) -> Tensor:
        """As about nobody."""
        return as_about_nobody(bench, hidden, strangers)


METHOD = EvadesBenchmark()
