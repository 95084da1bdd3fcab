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
from audit.plan import Request
from audit.quantities import TOKEN
from audit.record import Finding, Table
from audit.statistics import mean_estimate, one_sample
from detectors.recognition import decided, decisions
from detectors.utility import Damage, present, yardstick

if TYPE_CHECKING:
    from audit.image_target import ImageTarget

__all__ = ["ImageUtility", "one_sample"]

_SOURCE = "SalUn (Fan et al. 2024, arXiv 2310.12508): accuracy on retained and on unseen images"


class ImageUtility(Damage):
    """What should have stayed: is it still recognised?"""

    name = "image-utility"
    title = "What else is no longer recognised?"
    modality = "image"
    reference = _SOURCE

    def requests(self, case: Case, target: ImageTarget) -> list[Request]:
        """The decision on every image of the sets that should have stayed."""
        return decisions(case, target, present(case)) if "+" not in target.role else []

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """Per set, target minus yardstick, image by image."""
        found = []
        for name in present(case):
            clusters, seed = case.clusters(case.rows(name)), case.options.seed
            right = {role: decided(evidence, role, name, TOKEN.name, "match") for role in ROLES if role in case.models}
            levels = {role: mean_estimate(x, clusters, bounds=(0.0, 1.0), seed=seed) for role, x in right.items()}
            table = Table(
                columns=["model", "accuracy", "95 % from", "to", "entities"],
                rows=[[role, e.value, e.lo, e.hi, e.n] for role, e in levels.items()],
            )
            here, there = right["target"], right[yardstick(case)]
            found.append(
                self.damage(case, evidence, name, here, there, statistic="accuracy", unit="accuracy", table=table)
            )
        return found
