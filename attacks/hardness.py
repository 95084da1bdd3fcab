"""Hardness: which forget entities could not have been unlearned cleanly, whatever the method?

What is measured, in the original model, of every forget entity e:

    entangled(e) = cos( grad L(rows of e), grad L(retain rows) )
    near(e)      = max over retain entities r of cos( h(e) - m, h(r) - m )

with L the mean negative log-likelihood of the answers, gradients over all matrices inside the blocks, h an entity's
mean state after the middle block where its answers are decided, m the mean over all entities. Where the first is large,
a step that makes the forgotten less likely makes the retained less likely too; where the second is, the two are told
apart by little. The gradients are of the original as it is: nothing is trained.

Source: entanglement of forget and retain set as what makes unlearning hard: Zhao et al. 2024 (arXiv 2406.01257);
gradients that conflict: e.g. GRU, Wang et al. 2025 (arXiv 2503.09117).

Traps:

- *It says nothing of the target*: a hard entity may be gone and an easy one left. Beside the hardest entities stands
  what the target still knows of them, and how the two go together. It answers the question of utility, and decides
  nothing.
- *Every fact told in one form has something in common with every other*: how an answer is given. Holdout entities,
  which were never taught, show how much of the cosine is that; only what exceeds it is about the taught facts.
- *Facts known by heart have hardly any gradient*, and its direction is the more noise. The positive control are the
  entities of the compared retain rows themselves, each a part of the whole: with n of them and nothing else in common
  their cosine with it is about 1 / sqrt(n).
- *The nearest of many is always near*: compare the sets with each other, not with zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from attacks.recall import SETS, questions, recalled, tested
from audit.arrays import finite
from audit.case import Case
from audit.contrast import ALPHA, thinned
from audit.evidence import Evidence
from audit.instrument import Access, Attack, Stage
from audit.loaders import Example
from audit.plan import Request
from audit.quantities import hidden, recorded_by_attack
from audit.record import Control, Figure, Finding, Question, Series, Side, Table
from audit.statistics import halves, two_sample
from audit.tokens import Tokens

if TYPE_CHECKING:
    import torch

    from audit.target import Target

__all__ = ["Hardness", "cosine", "gradient", "nearest"]

Floats = NDArray[np.float64]
_SOURCE = "Zhao et al. 2024, arXiv 2406.01257; Wang et al. 2025, arXiv 2503.09117"
_STAGE = "gradients"
_PART = "compared"
_SHOWN = 20
_BATCH = 16
_THRESHOLD = 0.1
_WORDS = {
    "entangled": ("cosine of an entity's gradient with that of the retain rows", "gradient"),
    "near": ("cosine of an entity's mean state with that of the nearest retain entity", "state"),
}


GRADIENT = recorded_by_attack("hardness-gradient")
"""Recorded at the first row of an entity: `cosine` with the retain rows' gradient, [1]."""


def gradient(
    loss: Callable[[Sequence[Tokens]], torch.Tensor], weights: Sequence[torch.Tensor], rows: Sequence[Tokens]
) -> list[torch.Tensor]:
    """Gradient of the mean loss over all scored tokens with regard to `weights`, of any shape: as shaped, in float32.

    `loss` is such a mean over a batch; batches count by how many tokens they score.
    """
    import torch

    total = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    scored = sum(tokens.scored for tokens in rows)
    for first in range(0, len(rows), _BATCH):
        batch = rows[first : first + _BATCH]
        share = sum(tokens.scored for tokens in batch) / scored
        found = torch.autograd.grad(loss(batch), list(weights))
        for sum_, part in zip(total, found, strict=True):
            sum_ += part.float() * share
    return total


def cosine(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> float:
    """Cosine of two gradients, tensors of any shape in one order, in [-1, 1]; 0 where one of them is nil."""
    dot = sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))
    length = np.sqrt(sum(float(x.square().sum()) for x in a) * sum(float(y.square().sum()) for y in b))
    return float(dot / length) if length > 0 else 0.0


def nearest(states: ArrayLike, others: ArrayLike) -> tuple[Floats, NDArray[np.intp]]:
    """Per state [n, width] the largest cosine with one of the others [m, width], and which it is: [n] each."""
    a, b = finite(states, "states", 2), finite(others, "others", 2)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"others has width {b.shape[1]}, states {a.shape[1]}")
    a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (a, b))
    cosines = a @ b.T
    return cosines.max(axis=1), cosines.argmax(axis=1)


class Hardness(Attack):
    """Which forget entities are entangled with what is to be kept?"""

    name = "hardness"
    title = "What could not be cleanly unlearned anyway?"
    question = Question.UTILITY
    access = Access.WEIGHTS
    sets = SETS
    roles = ("original",)
    reference = _SOURCE

    def missing(self, case: Case) -> str | None:
        """Half of the retain entities are compared with the other half."""
        if "retain" in case.sets and len(set(case.clusters(tested(case, "retain")))) < 2:
            return "needs at least 2 entities in the retain set"
        return super().missing(case)

    def requests(self, case: Case, target: Target) -> list[Request]:
        """The original's states, and what it recorded of its gradients; what the target still answers."""
        if target.role == "target":
            return questions(case, target, self.name, ("forget",))
        if target.role == "original":
            state = hidden(f"blocks.{(target.layers - 1) // 2}.hook_resid_post")
            return [
                Request(f"{self.name}/state/{name}", _decided(target, tested(case, name)), (state,)) for name in SETS
            ]
        if target.role == f"original+{self.name}-{_STAGE}":
            firsts = {name: [rows[0] for rows in _entities(case, name).values()] for name in SETS}
            return [
                Request(f"{self.name}/gradient/{name}", _decided(target, firsts[name]), (GRADIENT,)) for name in SETS
            ]
        return []

    def stages(self, case: Case, target: Target) -> list[Stage]:
        """One, of the original: its weights stay as they are."""
        if target.role != "original":
            return []
        return [Stage(f"{self.name}-{_STAGE}", self._recipe(case, target))]

    def _recipe(self, case: Case, target: Target) -> str:
        sets = ",".join(case.sets[name].digest for name in SETS)
        return f"{case.options.seed}/{case.options.budget.value}/{target.template}/{sets}"

    def run(self, case: Case, target: Target, tick: Any) -> Iterator[Stage]:
        """A gradient of half of the retain entities, and of every entity by itself."""
        weights = [weight for weight, _ in target.matrices()]
        for weight in weights:
            weight.requires_grad_(True)
        by_set = {name: _entities(case, name) for name in SETS}
        reference = set(_reference(case))
        common = [target.question(row) for who in reference for row in by_set["retain"][who]]
        kept = gradient(target.loss, weights, sorted(common, key=lambda tokens: tokens.ids))
        recorded = []
        total = sum(map(len, by_set.values()))
        for entities in by_set.values():
            for rows in entities.values():
                own = gradient(target.loss, weights, [target.question(row) for row in rows])
                value = {GRADIENT.name: {"cosine": np.array([cosine(own, kept)])}}
                recorded.append((_decided(target, rows[:1])[0], value))
                tick(len(recorded), total)
        target.model.requires_grad_(False)
        yield Stage(f"{self.name}-{_STAGE}", self._recipe(case, target), recorded)

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """Forget entities against holdout entities, by gradient and by state."""
        known = _Entities(case, evidence)
        return [self._finding(case, evidence, known, measure) for measure in _WORDS]

    def _finding(self, case: Case, evidence: Evidence, known: _Entities, measure: str) -> Finding:
        values, seed = known.values[measure], case.options.seed
        names = {name: list(_entities(case, name)) for name in SETS}
        names |= {"retain": known.others, _PART: known.compared}

        def against_holdout(name: str) -> Any:
            pair = (names[name], names["holdout"])
            return two_sample(values[name], values["holdout"], *pair, bounds=(-1.0, 1.0), seed=seed)

        gap, seen = against_holdout("forget"), against_holdout(_PART)
        words, short = _WORDS[measure]
        return Finding(
            id=f"{self.name}/{measure}",
            instrument=self.name,
            question=self.question,
            statistic=f"hardness: {words}",
            split="forget vs holdout, original",
            estimate=gap.value,
            ci95=(gap.lo, gap.hi),
            level=float(values["forget"].mean()),
            n=gap.n,
            unit="cosine",
            orientation="forget entities are more entangled with the retained than facts that were never taught",
            null="forget entities are as entangled with the retained as holdout entities",
            p_value=gap.p_value,
            smallest_p=gap.smallest_p,
            threshold=_THRESHOLD,
            noise=max(evidence.noise.values(), default=0.0),
            decides=(False, False),
            sides=(Side.NEITHER, Side.NEITHER),
            controls=[
                Control(
                    name="positive control",
                    description="the retain entities that all are compared with, over holdout entities: each is a part "
                    "of the whole, and so entangled with it by construction. Is that seen?",
                    estimate=seen.value,
                    ci95=(seen.lo, seen.hi),
                    n=seen.n,
                    passed=seen.p_value is not None and seen.p_value <= ALPHA and seen.value > 0,
                    gates="silence",
                ),
                known.left_over(measure),
            ],
            reference=_SOURCE,
            figure=Figure(
                kind="distribution",
                title=f"Hardness by {short}: entities of each set in the original",
                alt=f"Histograms of the {words}, over the entities of each set.",
                x_label="cosine",
                y_label="share of entities",
                series=[
                    Series(label=name, x=thinned(values[name]), y=[], role=role)
                    for name, role in (("forget", "target"), ("holdout", "control"), ("retain", "reference"))
                ],
            ),
            table=known.hardest(measure),
        )

    def examples(self, case: Case, evidence: Evidence) -> dict[str, dict[str, float | str]]:
        """Per forget row how hard its entity is."""
        known = _Entities(case, evidence)
        return {
            row.id: {measure: float(values["forget"][i]) for measure, values in known.values.items()}
            for i, rows in enumerate(_entities(case, "forget").values())
            for row in rows
        }


class _Entities:
    """Both measures of every entity, [entities] by measure and set, in the order of `_entities`.

    Of the retain set those that are part of what is compared with (`_PART`, named in `compared`), and the `others`.
    """

    def __init__(self, case: Case, evidence: Evidence) -> None:
        reference = set(_reference(case))
        by_set = {name: _entities(case, name) for name in SETS}
        retain = list(by_set["retain"])
        aside = np.array([who not in reference for who in retain])
        self.names = list(by_set["forget"])
        self.others = [who for who in retain if who not in reference]
        self.compared = [who for who in retain if who in reference]
        cosines: dict[str, Floats] = {}
        states: dict[str, Floats] = {}
        for name in SETS:
            role = f"original+{Hardness.name}-{_STAGE}"
            found = evidence.scores(role, f"{Hardness.name}/gradient/{name}", GRADIENT.name)
            cosines[name] = np.array([float(values["cosine"][0]) for values in found])
            decided = evidence.scores("original", f"{Hardness.name}/state/{name}")
            rows = np.array([np.asarray(values["hidden"], dtype=float)[0, 0] for values in decided])
            whose = np.array(case.clusters(tested(case, name)))
            states[name] = np.array([rows[whose == who].mean(axis=0) for who in by_set[name]])
        middle = np.concatenate(list(states.values())).mean(axis=0)
        for values in (states, cosines):
            values[_PART], values["retain"] = values["retain"][~aside], values["retain"][aside]
        near = {name: nearest(of - middle, states[_PART] - middle) for name, of in states.items()}
        self.values: dict[str, dict[str, Floats]] = {
            "entangled": cosines,
            "near": {name: values for name, (values, _) in near.items()},
        }
        self.neighbour = [self.compared[i] for i in near["forget"][1]]
        answered = recalled(case, evidence, "target", Hardness.name, "forget")
        whose = np.array(case.clusters(tested(case, "forget")))
        self.left = np.array([answered[whose == who].mean() for who in self.names])

    def left_over(self, measure: str) -> Control:
        """Are the hard ones what is left in the target?"""
        hard = self.values[measure]["forget"]
        varied = len(hard) > 2 and np.ptp(hard) > 0 and np.ptp(self.left) > 0
        return Control(
            name="left in the target",
            description="rank correlation, over forget entities, of this cosine with the share of right answers that "
            "the target still prefers" + ("" if varied else ": none, for one of them does not vary"),
            estimate=float(stats.spearmanr(hard, self.left).statistic) if varied else None,
            n=len(hard),
        )

    def hardest(self, measure: str) -> Table:
        """The hardest forget entities first."""
        entangled, near = (self.values[each]["forget"] for each in ("entangled", "near"))
        order = np.argsort(-self.values[measure]["forget"], kind="stable")[:_SHOWN]
        return Table(
            columns=["entity", "gradient (cosine)", "state (cosine)", "nearest retain entity", "right in the target"],
            rows=[
                [self.names[i], float(entangled[i]), float(near[i]), self.neighbour[i], float(self.left[i])]
                for i in order
            ],
        )


def _entities(case: Case, name: str) -> dict[str, list[Example]]:
    """The tested rows of a set by entity, in file order."""
    found: dict[str, list[Example]] = {}
    rows = tested(case, name)
    for who, row in zip(case.clusters(rows), rows, strict=True):
        found.setdefault(who, []).append(row)
    return found


def _reference(case: Case) -> list[str]:
    """The half of the retain entities that all others are compared with."""
    names = list(_entities(case, "retain"))
    return [who for who, a in zip(names, halves(names, case.options.seed), strict=True) if a]


def _decided(target: Target, rows: Sequence[Example]) -> tuple[Tokens, ...]:
    """Every row up to its answer's first token."""
    return tuple(target.decision(row.prompt, row.answer) for row in rows)
