"""Attacks that alter the weights once, in several ways, and look whether forgotten facts are preferred again.

    recovered_g(v) = share of group g whose right answer is preferred after alteration v,   g = forget, holdout
    finding        = recovered_forget - recovered_holdout, for the alteration where it is largest

The holdout facts were never taught: what the altered model seems to know of them is what the alteration makes any model
seem to know. Where a retrained model is at hand, it is altered in the same ways, and its difference taken off. Having
chosen among alterations is paid for in interval and p-value. What was there before the attack did not come back by it:
a control asks what the forget facts gained over what the holdout facts did. The retain facts are the positive control:
an alteration that destroys the model recovers nothing, and proves nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from attacks.recall import SETS, Floats, came_back, questions, recalled, tested
from audit.case import Case
from audit.contrast import Statistic, against_never_taught
from audit.evidence import Evidence
from audit.instrument import Access, Attack, Stage
from audit.plan import Request
from audit.record import Finding, Question, Side

if TYPE_CHECKING:
    from audit.opened import OpenModel

__all__ = ["Alteration", "Altering", "Bools"]

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Alteration:
    """One way to alter a model.

    Attributes:
        name: as in the figure.
        apply: does it, to the model in place.
        recipe: everything that determines the result besides the model's weights.
    """

    name: str
    apply: Callable[[OpenModel], None]
    recipe: str


class Altering(Attack):
    """An attack by alterations; a subclass says which."""

    question = Question.RECOVERY
    access = Access.WEIGHTS
    modality = "any"
    sets = ("forget", "retain")
    copies = 2
    statistic: Statistic
    axis: ClassVar[str] = "alteration"
    """What the alterations differ in, in a word or two: for figure and table."""
    alarms: ClassVar[bool] = True
    """Does it mean anything that facts come back? Not where they come back in a model that never knew them."""

    @abstractmethod
    def alterations(self, case: Case, target: OpenModel) -> Sequence[Alteration]:
        """The ways, by budget; cheap."""

    def attacked(self, case: Case) -> tuple[str, ...]:
        """The roles that are altered: the target, and the retrained model as its never-taught control."""
        return tuple(role for role in ("target", "retrained") if role in case.models)

    def asked(self, case: Case, name: str) -> Bools:
        """Which of a set's tested rows count: all but those that an alteration was fitted on."""
        return np.ones(len(tested(case, name)), dtype=bool)

    def requests(self, case: Case, target: OpenModel) -> list[Request]:
        """Is the right answer preferred, before and after?"""
        return questions(case, target, self.name) if target.role.split("+")[0] in self.attacked(case) else []

    def stages(self, case: Case, target: OpenModel) -> list[Stage]:
        """One a way."""
        if target.role not in self.attacked(case):
            return []
        return [Stage(f"{self.name}@{way.name}", way.recipe) for way in self.alterations(case, target)]

    def run(self, case: Case, target: OpenModel, tick: Any) -> Iterator[Stage]:
        """Each on fresh weights."""
        ways = self.alterations(case, target)
        for i, way in enumerate(ways):
            if i:
                target.release()
            way.apply(target)
            tick(i + 1, len(ways))
            yield Stage(f"{self.name}@{way.name}", way.recipe)

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """The way that recovers most."""
        roles = self.attacked(case)
        prefix = f"target+{self.name}@"
        names = [role.removeprefix(prefix) for role in evidence.roles if role.startswith(prefix)]
        if not names:
            return []

        def score(role: str, name: str) -> Floats:
            altered = (f"{role}+{self.name}@{way}" for way in names)
            every = [recalled(case, evidence, each, self.name, name) for each in altered]
            return np.stack(every, axis=1)[self.asked(case, name)]

        rows = {
            name: tuple(row for row, asked in zip(tested(case, name), self.asked(case, name), strict=True) if asked)
            for name in SETS
            if name in case.sets
        }
        alarm = Side.REMAINS if self.alarms else Side.NEITHER
        finding = against_never_taught(
            self, case, evidence, self.statistic, score, columns=(self.axis, names), rows=rows, roles=roles,
            # Rows that an alteration makes worse were hidden by an edit, or hang on small weights: no reason for alarm.
            sides=(alarm, Side.NEITHER),
        )  # fmt: skip
        chosen = names.index(finding.layer) if finding.layer in names else 0

        def gain(name: str) -> Floats:
            before = recalled(case, evidence, "target", self.name, name)[self.asked(case, name)]
            return np.asarray(score("target", name)[:, chosen] - before)

        if "holdout" in rows:
            finding.controls.append(came_back(case, rows, gain))
        return [finding]
