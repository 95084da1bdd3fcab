"""Utility: what else did unlearning damage?

What is measured: on the sets that should have stayed (retain, neighbor, utility), how much less likely, or less
often chosen, the right answer is than under the model before unlearning; and TOFU's *model utility*, the harmonic
mean over sets of probability, ROUGE-L recall and 1 − truth ratio.

Source: TOFU (Maini et al. 2024, arXiv 2401.06121), section 2.2; open-unlearning's aggregation.

Traps:

- *Damage is a difference, and needs the model before.* Without the original (or, second best, a retrained model)
  there is nothing to compare with, and this instrument does not run.
- *A retrained model is no neutral yardstick*: it differs from the target by its seed as well.
- *One collapsed part makes model utility 0*; the parts are in the table.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from audit import asking
from audit.case import Case
from audit.evidence import Evidence
from audit.instrument import Access, Instrument
from audit.plan import Generate, Request
from audit.record import Control, Finding, Question, Side, Table
from audit.statistics import mean_estimate, one_sample
from detectors.knowledge import (
    answer_probability,
    choice_correct,
    model_utility,
    retain_truth_ratio,
    rouge_l_recall,
    truth_ratio,
)

if TYPE_CHECKING:
    from audit.target import Target

__all__ = ["Damage", "Utility", "model_utility", "present", "yardstick"]

SETS = ("retain", "neighbor", "utility")
_TOFU = "TOFU (Maini et al. 2024, arXiv 2401.06121), section 2.2"
_THRESHOLD = 0.05
_YARDSTICKS = ("original", "retrained")
Floats = NDArray[np.float64]


class Damage(Instrument):
    """What should have stayed, set by set, against the model before unlearning; a subclass says what is scored."""

    question = Question.UTILITY
    sets = ()

    def missing(self, case: Case) -> str | None:
        """Needs a set that should have stayed, and a model to compare with."""
        if not present(case):
            return f"needs one of the sets {', '.join(SETS)}"
        if not set(_YARDSTICKS) & set(case.models):
            return "needs the original model (or a retrained one) to measure damage against"
        return super().missing(case)

    def damage(
        self,
        case: Case,
        evidence: Evidence,
        name: str,
        here: Floats,
        there: Floats,
        *,
        statistic: str,
        unit: str,
        table: Table | None,
    ) -> Finding:
        """What the target lost on a set: its scores `here`, from 0 to 1, less the yardstick's, `there`, [rows] each."""
        reference, clusters, seed = yardstick(case), case.clusters(case.rows(name)), case.options.seed
        rows = "images" if self.modality == "image" else "rows"
        estimate = one_sample(here - there, clusters, bounds=(-1.0, 1.0), seed=seed)
        level = mean_estimate(there, clusters, bounds=(0.0, 1.0), seed=seed)
        able = Control(
            name="positive control",
            description=f"the {reference} itself on these {rows}: there must be something to lose",
            estimate=level.value,
            ci95=(level.lo, level.hi),
            n=level.n,
            passed=level.hi > _THRESHOLD,
            gates="silence",
        )
        return Finding(
            id=f"{self.name}/{name}",
            instrument=self.name,
            question=self.question,
            statistic=f"{statistic} on the {name} set",
            split=f"{name}, target minus {reference}",
            estimate=estimate.value,
            ci95=(estimate.lo, estimate.hi),
            n=estimate.n,
            unit=unit,
            orientation="the target does better on what it should have kept (negative: it lost some)",
            null=f"target and {reference} do equally well",
            p_value=estimate.p_value,
            smallest_p=estimate.smallest_p,
            threshold=_THRESHOLD,
            noise=max(evidence.noise.values(), default=0.0),
            sides=(Side.NEITHER, Side.DAMAGE),
            controls=[able],
            reference=self.reference,
            table=table,
        )


def present(case: Case) -> list[str]:
    """The sets at hand that should have stayed."""
    return [name for name in SETS if name in case.sets]


def yardstick(case: Case) -> str:
    """The role that damage is measured against."""
    return next(role for role in _YARDSTICKS if role in case.models)


class Utility(Damage):
    """What should have stayed: did it stay?"""

    name = "utility"
    title = "What else was damaged?"
    access = Access.LOGPROBS
    reference = _TOFU

    def requests(self, case: Case, target: Target) -> list[Request | Generate]:
        """Answers and options of the sets that should have stayed."""
        sets = present(case) if "+" not in target.role else []
        return [
            *asking.answers(case, target, sets),
            *asking.options(case, target, sets),
            *(asking.continuations(case, target, sets) if _can_continue(case) else []),
        ]

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """Per set and statistic, target minus yardstick, row by row."""
        reference = yardstick(case)
        parts = {role: _parts(case, evidence, role) for role in ("target", reference)}
        utility = {role: model_utility({k: v[1] for k, v in p.items()}) for role, p in parts.items()}
        table = Table(
            columns=["set and statistic", "target", reference],
            rows=[
                *([key, parts["target"][key][1], parts[reference][key][1]] for key in parts["target"]),
                ["model utility (harmonic mean)", utility["target"], utility[reference]],
            ],
        )
        found: list[Finding] = []
        for name in present(case):
            choice = f"{name}/choice" in parts["target"]
            here, there = (part[f"{name}/{'choice' if choice else 'probability'}"][0] for part in parts.values())
            found.append(
                self.damage(
                    case,
                    evidence,
                    name,
                    here,
                    there,
                    statistic="multiple-choice accuracy" if choice else "probability of the right answer",
                    unit="accuracy" if choice else "probability",
                    table=table if not found else None,
                )
            )
        return found


def _can_continue(case: Case) -> bool:
    return "forget" in case.sets and all(row.prompt for name in present(case) for row in case.rows(name))


def _parts(case: Case, evidence: Evidence, role: str) -> dict[str, tuple[Floats, float]]:
    """Per `set/statistic`: one value a row, and the aggregate that enters model utility."""
    parts: dict[str, tuple[Floats, float]] = {}

    def add(key: str, values: list[float], aggregate: Any = np.mean) -> None:
        parts[key] = (np.array(values), float(aggregate(values)))

    for name in present(case):
        true = asking.logprobs(evidence, role, f"{name}/answer")
        add(f"{name}/probability", [answer_probability(t) for t in true])
        if all(row.wrong for row in case.rows(name)):
            wrong = asking.grouped(case, evidence, role, name, "wrong")
            right = asking.grouped(case, evidence, role, name, "paraphrase")
            add(f"{name}/choice", [choice_correct(t, w) for t, w in zip(true, wrong, strict=True)])
            ratios = [truth_ratio(r or [t], w) for t, r, w in zip(true, right, wrong, strict=True)]
            add(f"{name}/1 - truth ratio", ratios, partial(retain_truth_ratio))
        if _can_continue(case):
            said = evidence.texts(role, f"{name}/continued")
            rows = asking.continued_rows(case, name)
            add(f"{name}/rouge", [rouge_l_recall(r.answer, text) for r, text in zip(rows, said, strict=True)])
    return parts
