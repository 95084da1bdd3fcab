"""Utility of an image classifier: what else did unlearning damage?

What is measured: on the sets that should have stayed (retain, neighbor, utility), image by image, whether the class is
answered rightly, target minus the model before unlearning:

    finding = mean of right(target) - right(original)

Source: retain and test accuracy as in SalUn (Fan et al. 2024, arXiv 2310.12508); image by image, so that what both
models get wrong cancels.

Traps:

- *Damage is a difference, and needs the model before.* Without the original (or, second best, a retrained model) there
  is nothing to compare with, and this instrument does not run.
- *A retrained model is no neutral yardstick*: it differs from the target by its seed as well.
- *Retained images were trained on*: accuracy on them may stay at 1 while unseen images (utility) suffer. Look at both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from audit.case import ROLES, Case
from audit.evidence import Evidence
from audit.instrument import Instrument
from audit.plan import Request
from audit.quantities import TOKEN
from audit.record import Control, Finding, Question, Side, Table
from audit.statistics import mean_estimate, one_sample
from detectors.recognition import Floats, decided, decisions
from detectors.utility import SETS

if TYPE_CHECKING:
    from audit.image_target import ImageTarget

_SOURCE = "SalUn (Fan et al. 2024, arXiv 2310.12508): accuracy on retained and on unseen images"
_THRESHOLD = 0.05


class ImageUtility(Instrument):
    """What should have stayed: is it still recognised?"""

    name = "image-utility"
    title = "What else is no longer recognised?"
    question = Question.UTILITY
    modality = "image"
    sets = ()
    reference = _SOURCE

    def missing(self, case: Case) -> str | None:
        """Needs a set that should have stayed, and a model to compare with."""
        if not any(name in case.sets for name in SETS):
            return f"needs one of the sets {', '.join(SETS)}"
        if _yardstick(case) is None:
            return "needs the original model (or a retrained one) to measure damage against"
        return super().missing(case)

    def requests(self, case: Case, target: ImageTarget) -> list[Request]:
        """The decision on every image of the sets that should have stayed."""
        return decisions(case, target, _present(case)) if "+" not in target.role else []

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """Per set, target minus yardstick, image by image."""
        yardstick = _yardstick(case)
        assert yardstick is not None, "checked by missing()"

        def right(role: str, name: str) -> Floats:
            return decided(evidence, role, name, TOKEN.name, "match")

        found: list[Finding] = []
        for name in _present(case):
            clusters, seed = case.clusters(case.rows(name)), case.options.seed
            levels = {
                role: mean_estimate(right(role, name), clusters, bounds=(0.0, 1.0), seed=seed)
                for role in ROLES
                if role in case.models
            }
            estimate = one_sample(
                right("target", name) - right(yardstick, name), clusters, bounds=(-1.0, 1.0), seed=seed
            )
            there = levels[yardstick]
            able = Control(
                name="positive control",
                description=f"the {yardstick} itself on these images: there must be something to lose",
                estimate=there.value,
                ci95=(there.lo, there.hi),
                n=there.n,
                passed=there.hi > _THRESHOLD,
                gates="silence",
            )
            found.append(
                Finding(
                    id=f"{self.name}/{name}",
                    instrument=self.name,
                    question=self.question,
                    statistic=f"accuracy on the {name} set",
                    split=f"{name}, target minus {yardstick}",
                    estimate=estimate.value,
                    ci95=(estimate.lo, estimate.hi),
                    n=estimate.n,
                    unit="accuracy",
                    orientation="the target does better on what it should have kept (negative: it lost some)",
                    null=f"target and {yardstick} do equally well",
                    p_value=estimate.p_value,
                    smallest_p=estimate.smallest_p,
                    threshold=_THRESHOLD,
                    noise=max(evidence.noise.values(), default=0.0),
                    sides=(Side.NEITHER, Side.DAMAGE),
                    controls=[able],
                    reference=_SOURCE,
                    table=Table(
                        columns=["model", "accuracy", "95 % from", "to", "entities"],
                        rows=[[role, e.value, e.lo, e.hi, e.n] for role, e in levels.items()],
                    ),
                )
            )
        return found


def _present(case: Case) -> list[str]:
    return [name for name in SETS if name in case.sets]


def _yardstick(case: Case) -> str | None:
    return next((role for role in ("original", "retrained") if role in case.models), None)
