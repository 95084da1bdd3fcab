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

from audit.case import Case
from audit.evidence import Evidence
from audit.instrument import Access, Instrument
from audit.plan import Generate, Request
from audit.record import Control, Finding, Question, Side, Table
from audit.statistics import mean_estimate, one_sample
from detectors import answers
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

SETS = ("retain", "neighbor", "utility")
_TOFU = "TOFU (Maini et al. 2024, arXiv 2401.06121), section 2.2"
_THRESHOLD = 0.05


class Utility(Instrument):
    """What should have stayed: did it stay?"""

    name = "utility"
    title = "What else was damaged?"
    question = Question.UTILITY
    access = Access.LOGPROBS
    sets = ()
    reference = _TOFU

    def missing(self, case: Case) -> str | None:
        """Needs a set that should have stayed, and a model to compare with."""
        if not any(name in case.sets for name in SETS):
            return f"needs one of the sets {', '.join(SETS)}"
        if _yardstick(case) is None:
            return "needs the original model (or a retrained one) to measure damage against"
        return super().missing(case)

    def requests(self, case: Case, target: Target) -> list[Request | Generate]:
        """Answers and options of the sets that should have stayed."""
        sets = _present(case) if "+" not in target.role else []
        return [
            *answers.answers(case, target, sets),
            *answers.options(case, target, sets),
            *(answers.continuations(case, target, sets) if _can_continue(case) else []),
        ]

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """Per set and statistic, target minus yardstick, row by row."""
        yardstick = _yardstick(case)
        assert yardstick is not None, "checked by missing()"
        parts = {role: _parts(case, evidence, role) for role in ("target", yardstick)}
        utility = {role: model_utility({k: v[1] for k, v in p.items()}) for role, p in parts.items()}
        table = Table(
            columns=["set and statistic", "target", yardstick],
            rows=[
                *([key, parts["target"][key][1], parts[yardstick][key][1]] for key in parts["target"]),
                ["model utility (harmonic mean)", utility["target"], utility[yardstick]],
            ],
        )
        words = {"choice": "multiple-choice accuracy", "probability": "probability of the right answer"}
        found: list[Finding] = []
        for name in _present(case):
            kind = "choice" if f"{name}/choice" in parts["target"] else "probability"
            here, there = (parts[role][f"{name}/{kind}"][0] for role in ("target", yardstick))
            clusters = case.clusters(case.rows(name))
            estimate = one_sample(here - there, clusters, bounds=(-1.0, 1.0), seed=case.options.seed)
            level = mean_estimate(there, clusters, bounds=(0.0, 1.0), seed=case.options.seed)
            able = Control(
                name="positive control",
                description=f"the {yardstick} itself on these rows: there must be something to lose",
                estimate=level.value,
                ci95=(level.lo, level.hi),
                n=level.n,
                passed=level.hi > _THRESHOLD,
                gates="silence",
            )
            found.append(
                Finding(
                    id=f"{self.name}/{name}",
                    instrument=self.name,
                    question=self.question,
                    statistic=f"{words[kind]} on the {name} set",
                    split=f"{name}, target minus {yardstick}",
                    estimate=estimate.value,
                    ci95=(estimate.lo, estimate.hi),
                    n=estimate.n,
                    unit="accuracy" if kind == "choice" else "probability",
                    orientation="the target does better on what it should have kept (negative: it lost some)",
                    null=f"target and {yardstick} do equally well",
                    p_value=estimate.p_value,
                    smallest_p=estimate.smallest_p,
                    threshold=_THRESHOLD,
                    noise=max(evidence.noise.values(), default=0.0),
                    sides=(Side.NEITHER, Side.DAMAGE),
                    controls=[able],
                    reference=_TOFU,
                    table=table if not found else None,
                )
            )
        return found


def _present(case: Case) -> list[str]:
    return [name for name in SETS if name in case.sets]


def _yardstick(case: Case) -> str | None:
    return next((role for role in ("original", "retrained") if role in case.models), None)


def _can_continue(case: Case) -> bool:
    return "forget" in case.sets and all(row.prompt for name in _present(case) for row in case.rows(name))


def _parts(case: Case, evidence: Evidence, role: str) -> dict[str, tuple[NDArray[np.float64], float]]:
    """Per `set/statistic`: one value a row, and the aggregate that enters model utility."""
    parts: dict[str, tuple[NDArray[np.float64], float]] = {}

    def add(key: str, values: list[float], aggregate: Any = np.mean) -> None:
        parts[key] = (np.array(values), float(aggregate(values)))

    for name in _present(case):
        true = answers.logprobs(evidence, role, f"{name}/answer")
        add(f"{name}/probability", [answer_probability(t) for t in true])
        if all(row.wrong for row in case.rows(name)):
            wrong = answers.grouped(case, evidence, role, name, "wrong")
            right = answers.grouped(case, evidence, role, name, "paraphrase")
            add(f"{name}/choice", [choice_correct(t, w) for t, w in zip(true, wrong, strict=True)])
            ratios = [truth_ratio(r or [t], w) for t, r, w in zip(true, right, wrong, strict=True)]
            add(f"{name}/1 - truth ratio", ratios, partial(retain_truth_ratio))
        if _can_continue(case):
            said = evidence.texts(role, f"{name}/continued")
            rows = answers.continued_rows(case, name)
            add(f"{name}/rouge", [rouge_l_recall(r.answer, text) for r, text in zip(rows, said, strict=True)])
    return parts
