"""Trace: was this model unlearned, or only edited, or neither? And the null that every trace has to be told from.

What is measured: the fingerprints in next-token distributions and in inner states together (`trace-logits`,
`trace-activations`), judged by one classifier trained on models of known history.

What is done besides, the *matched null*: the original is fine-tuned K times on ordinary data, as much as the target was
changed and in the same places (`audit.matched`): on all retain rows, on the rows of a few retain entities only (of all
fine-tunes a narrow one looks most like unlearning), and on other sets that the case has. The detectors of traces ask of
these models what they ask of the target: their scores are the null that the target's has to exceed.

Source: Chen et al. 2025 (arXiv 2506.14003). The matched null is this project's, 2026; for want of it any further edit
was "detected" in an independent reproduction.

Traps:

- *Ordinary* is what the auditor makes of it: these are fine-tunes. Quantization, pruning and continual learning are in
  the classifiers' threshold, not in this null.
- *Steps* of the target's own history are not known; the budget's are taken.
- *Kinship*, and the other traps of `trace-logits` and `trace-activations`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from audit.case import Case
from audit.evidence import Evidence
from audit.finetune import learning_rate
from audit.instrument import Access, Attack, Stage
from audit.plan import Request
from audit.record import Finding, Question
from audit.tokens import Tokens
from detectors.fingerprint import Features
from detectors.trace_activations import TraceActivations
from detectors.trace_logits import TraceLogits
from detectors.tracing import SOURCE, Use, asked_sets, rows_of, trace_findings

if TYPE_CHECKING:
    from audit.target import Target

_PARTS = (TraceLogits(), TraceActivations())
_OTHERS = ("utility", "neighbor", "relearn")
_NARROW = 0.15


@dataclass(frozen=True)
class Budget:
    """How many fine-tunes, of how many steps, and the learning rate of AdamW."""

    fine_tunes: int
    steps: int
    learning_rate: float


def budget_for(case: Case, target: Target) -> Budget:
    """By the case's budget; the learning rate falls with the cube root of size, as in relearning."""
    fine_tunes, steps = {"quick": (4, 20), "standard": (8, 30), "thorough": (24, 60)}[case.options.budget.value]
    return Budget(fine_tunes, steps, learning_rate(target.inventory.parameters, 5e-4, 3e-5))


class Trace(Attack):
    """Does the change from the original bear the marks of unlearning, rather than of an ordinary fine-tune?"""

    name = "trace"
    title = "Was it unlearned, or only edited, or neither?"
    question = Question.TRACE
    access = Access.WEIGHTS
    sets = ("retain",)
    roles = ("original",)
    reference = SOURCE

    def requests(self, case: Case, target: Target) -> list[Request]:
        """What the two detectors ask that it puts together."""
        logits, states = (part.requests(case, target) for part in _PARTS)
        return [
            replace(one, quantities=one.quantities + other.quantities, extra={**one.extra, **other.extra})
            for one, other in zip(logits, states, strict=True)
        ]

    def cost(self, case: Case, target: Target) -> str:
        """How many fine-tunes, and how long."""
        budget = budget_for(case, target)
        return f": {budget.fine_tunes} fine-tunes of {budget.steps} steps"

    def stages(self, case: Case, target: Target) -> list[Stage]:
        """One altered original a fine-tune."""
        if target.role != "original":
            return []
        return _stages(case, target, _radii(case))

    def run(self, case: Case, target: Target, tick: Any) -> Iterator[Stage]:
        """Fine-tune, and start from the original again."""
        from audit.matched import fine_tune_matched

        budget, radii, data = budget_for(case, target), _radii(case), _data(case, target)
        for k, stage in enumerate(_stages(case, target, radii)):
            target.release()
            fine_tune = fine_tune_matched(
                target.model,
                data[k % len(data)],
                radii,
                steps=budget.steps,
                learning_rate=budget.learning_rate,
                seed=case.options.seed * 1000 + k,
            )
            for step in fine_tune:
                tick(k * budget.steps + step, budget.fine_tunes * budget.steps)
            yield stage

    def features(self, case: Case, evidence: Evidence, role: str, use: Use) -> Features:
        """The numbers of one role, from the rows to use of every set."""
        return {name: value for part in _PARTS for name, value in part.features(case, evidence, role, use).items()}

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """On prompts that have nothing to do with the forget set, and on all."""
        rows = {name: rows_of(case, name) for name in asked_sets(case)}
        return trace_findings(
            self, case, evidence, "fingerprint in distributions and inner states together", rows, self.features
        )


def _stages(case: Case, target: Target, radii: Mapping[int, float]) -> list[Stage]:
    """None where nothing was changed."""
    if not any(radii.values()):
        return []
    budget = budget_for(case, target)
    matched = ",".join(f"{site}:{length:.6g}" for site, length in radii.items())
    sets = ",".join(case.sets[name].digest for name in ("retain", *_OTHERS) if name in case.sets)
    return [
        Stage(f"null@{k}", f"{budget}/{k}/{case.options.seed}/{target.template}/{matched}/{sets}")
        for k in range(1, budget.fine_tunes + 1)
    ]


def _radii(case: Case) -> dict[int, float]:
    """Length of the target's change at every site."""
    from audit.matched import change_by_site
    from audit.weights import Folder

    return change_by_site(Folder(case.folder("target")), Folder(case.folder("original")))


def _data(case: Case, target: Target) -> list[list[Tokens]]:
    """What the fine-tunes are taught, in turn."""
    retain = case.rows("retain")
    entities = sorted(set(case.clusters(retain)))
    np.random.default_rng(case.options.seed).shuffle(entities)
    few = set(entities[: max(2, round(_NARROW * len(entities)))])
    kinds = [retain, tuple(row for row, who in zip(retain, case.clusters(retain), strict=True) if who in few)]
    kinds += [case.rows(name) for name in _OTHERS if name in case.sets]
    return [[target.encode(row.prompt, row.answer) for row in rows] for rows in kinds]
