"""Recognition: is the class of a forgotten image still answered?

What is measured, per image, in one pass through the classifier:

===========  ==========================================================================
accuracy     is the right class the one with the largest probability?
probability  probability of the right class
confusion    the class that is answered: its share of the forget images, model by model
===========  ==========================================================================

Source: accuracy on the forget set, as in SalUn (Fan et al. 2024, arXiv 2310.12508) and nearly all work on unlearning
in classifiers; the table of answered classes is the prediction matrix of the Unlearning Comparator (arXiv 2508.12730).

Traps:

- *An accuracy of 0 is the least that unlearning does*: putting the class's output out of reach does it, with all that
  the model knows left inside. Silence here says nothing of deletion.
- *Chance is not 1 / classes.* A class that was never taught is hardly ever answered, so never-taught accuracy is near
  0 for a class, and near test accuracy for single images of classes that the model knows. Hence the holdout set.
- *Right answers that are avoided.* Where single images are forgotten, a model that errs on them more often than on
  unseen images of the same classes tells them apart, which decides that they are avoided. Where a class is forgotten,
  an edit of the output does that to a model which knows nothing, and it decides nothing.
- *A class may be easier than another*: without a retrained model, a forgotten class is compared with another class.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from audit.asking import COMPARED, compared
from audit.case import ROLES, Case
from audit.contrast import Statistic, against_never_taught
from audit.evidence import Evidence
from audit.instrument import Instrument
from audit.plan import Request
from audit.quantities import TOKEN, Quantity, top_k
from audit.record import Control, Figure, Finding, Question, Series, Table
from audit.statistics import mean_estimate

if TYPE_CHECKING:
    from audit.image_target import ImageTarget

__all__ = ["Recognition", "called", "decided", "decisions", "like_with_like"]

Floats = NDArray[np.float64]
_SOURCE = "SalUn (Fan et al. 2024, arXiv 2310.12508): accuracy on the forget set"
_FIRST = top_k(1)
_SHOWN = 12
_STYLE = {"target": "target", "original": "reference", "retrained": "control"}

ACCURACY = Statistic(
    "accuracy", "is the right class answered", "accuracy",
    "the right class is answered more often", (0.0, 1.0), 0.1, _SOURCE,
)  # fmt: skip
PROBABILITY = Statistic(
    "probability", "probability of the right class", "probability",
    "the right class is likelier", (0.0, 1.0), 0.1, _SOURCE, (False, False),
)  # fmt: skip


def called(answered: ArrayLike, classes: int) -> Floats:
    """Share of images that are called each class, [classes]; `answered` [n] holds the numbers of classes.

    Raises ValueError if there is no image, or a number that is no class.
    """
    numbers = np.asarray(answered)
    if not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(f"answered must hold numbers of classes, got {numbers.dtype}")
    if numbers.ndim != 1 or not numbers.size:
        raise ValueError(f"answered must be a non-empty 1-D array, got shape {numbers.shape}")
    if numbers.min() < 0 or numbers.max() >= classes:
        raise ValueError(f"answered holds {numbers.min()} to {numbers.max()}, of {classes} classes")
    return np.bincount(numbers, minlength=classes) / len(numbers)


# --- what every instrument for images asks ------------------------------------------------------------------


def decisions(
    case: Case, target: ImageTarget, sets: Iterable[str], quantities: tuple[Quantity, ...] = (TOKEN,)
) -> list[Request]:
    """Let the model decide on every image: request `<set>/decision`, which knows the names of the classes."""
    return [
        Request(
            f"{name}/decision",
            tuple(target.show(row) for row in case.rows(name)),
            quantities,
            {"classes": target.classes},
        )
        for name in sets
    ]


def decided(evidence: Evidence, role: str, name: str, quantity: str, key: str) -> Floats:
    """One number of every decision on a set, [rows]."""
    return np.array([values[key][0] for values in evidence.iterate(role, f"{name}/decision", quantity)], np.float64)


def like_with_like(case: Case) -> bool:
    """Is every forgotten class among the holdout's? Then single images are to be forgotten, and no class."""
    forget, holdout = ({row.answer for row in case.sets.get(name, ())} for name in ("forget", "holdout"))
    return forget <= holdout


# --- instrument ---------------------------------------------------------------------------------------------


class Recognition(Instrument):
    """Does the classifier still call forgotten images what they are?"""

    name = "recognition"
    title = "Is the class still answered?"
    question = Question.LEAKAGE
    modality = "image"
    reference = _SOURCE

    def requests(self, case: Case, target: ImageTarget) -> list[Request]:
        """The decision on every image of forget, holdout and retain set, and the class answered."""
        return decisions(case, target, compared(case, target.role), (TOKEN, _FIRST))

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """Accuracy and probability against never-taught images; the classes answered stand beside the accuracy."""

        def accuracy(role: str, name: str) -> Floats:
            return decided(evidence, role, name, TOKEN.name, "match")

        def probability(role: str, name: str) -> Floats:
            return np.exp(decided(evidence, role, name, TOKEN.name, "logprob"))

        controls = [*_one_class_against_another(case), *_answered_anyway(case, evidence)]
        contrast = partial(against_never_taught, self, case, evidence, extra=controls)
        # Only who tells these very images from their like can err on them more often.
        right = contrast(replace(ACCURACY, decides=(True, like_with_like(case))), accuracy)
        figure, rows = _confusion(case, evidence)
        assert right.table is not None, "made by against_never_taught"
        own = [[model, name, "their own class", *numbers] for model, name, *numbers in right.table.rows]
        columns = ["model", "set", "called", "share", "95 % from", "to", "entities"]
        table = Table(columns=columns, rows=[*own, *rows])
        return [right.model_copy(update={"figure": figure, "table": table}), contrast(PROBABILITY, probability)]

    def examples(self, case: Case, evidence: Evidence) -> dict[str, dict[str, float | str]]:
        """Per forget image: the class answered, how sure the target is of it, and of the right one."""
        names: Sequence[str] = evidence.extra("target", "forget/decision")["classes"]
        seen = evidence.iterate("target", "forget/decision", TOKEN.name, _FIRST.name)
        return {
            row.id: {
                "generated": names[int(values["top_ids"][0, 0])],
                "probability of what is answered": float(np.exp(values["top_logprobs"][0, 0])),
                "probability": float(np.exp(values["logprob"][0])),
            }
            for row, values in zip(case.rows("forget"), seen, strict=True)
        }


def _one_class_against_another(case: Case) -> list[Control]:
    """Said where nothing but the never-taught class's own nature is compared with the forgotten one's."""
    if "holdout" not in case.sets or "retrained" in case.models or like_with_like(case):
        return []
    return [
        Control(
            name="one class against another",
            description="the never-taught images are of another class, and no retrained model is at hand: part of a "
            "difference may be that one class is easier than the other",
        )
    ]


def _answered_anyway(case: Case, evidence: Evidence) -> list[Control]:
    """A model that calls everything a cat knows no cats: is the forgotten class the answer to other images too?"""
    others = [name for name in COMPARED if name in case.sets and name != "forget"]
    if like_with_like(case) or not others:
        return []
    own = {tokens.ids[tokens.start] for tokens in evidence.sequences("target", "forget/decision")}
    share = np.concatenate(
        [np.isin(decided(evidence, "target", name, _FIRST.name, "top_ids").ravel(), list(own)) for name in others]
    )
    estimate = mean_estimate(
        share.astype(float),
        [who for name in others for who in case.clusters(case.rows(name))],
        bounds=(0.0, 1.0),
        seed=case.options.seed,
    )
    right = float(decided(evidence, "target", "forget", TOKEN.name, "match").mean())
    return [
        Control(
            name="answered for other images too",
            description="share of images of other classes that are called the forgotten one: right answers are to be "
            "more frequent than that by the threshold",
            estimate=estimate.value,
            ci95=(estimate.lo, estimate.hi),
            n=estimate.n,
            passed=right - estimate.value >= ACCURACY.threshold,
            gates="evidence",
        )
    ]


def _confusion(case: Case, evidence: Evidence) -> tuple[Figure, list[list[str | int | float | None]]]:
    """What forget images are called under each model: a figure, and (model, set, class, share, from, to, n)."""
    roles = [role for role in ROLES if role in case.models]
    names: Sequence[str] = evidence.extra("target", "forget/decision")["classes"]
    answered = {role: decided(evidence, role, "forget", _FIRST.name, "top_ids").astype(int).ravel() for role in roles}
    shares = np.stack([called(answered[role], len(names)) for role in roles])
    # What the target answers most often first; of many classes, those that any model answers most often.
    most = sorted(range(len(names)), key=lambda i: (-shares[:, i].max(), i))[:_SHOWN]
    shown = sorted((i for i in most if shares[:, i].max() > 0), key=lambda i: (-shares[0, i], i))
    clusters = case.clusters(case.rows("forget"))
    series: list[Series] = []
    rows: list[list[str | int | float | None]] = []
    for role in roles:
        estimates = [
            mean_estimate(answered[role] == i, clusters, bounds=(0.0, 1.0), seed=case.options.seed) for i in shown
        ]
        rows += [[role, "forget", names[i], e.value, e.lo, e.hi, e.n] for i, e in zip(shown, estimates, strict=True)]
        series.append(
            Series(
                label=f"forget images, {role}",
                x=[float(place) for place in range(len(shown))],
                y=[e.value for e in estimates],
                lo=[e.lo for e in estimates],
                hi=[e.hi for e in estimates],
                role=_STYLE[role],
            )
        )
    figure = Figure(
        kind="bars",
        title="What forget images are called",
        alt="Share of the forget images that each model calls by each class; values in the table.",
        x_label="class answered",
        y_label="share of forget images",
        series=series,
        ticks=[names[i] for i in shown],
    )
    return figure, rows
