"""Shortcut check: was the class unlearned, or only what its images happen to share?

Where nearly all images of a class have the same background, a model may have learned the background, and unlearning may
have removed no more than that. The background, or whatever else stands in for the class, is the image's `group`. The
group that most forget images of a class have is the class's **bias**: these images are bias-aligned, the others
bias-conflicting. With right(m) = 1 where model m answers rightly, else 0, image by image:

    lost = right(original) - right(target)
    `shortcut/aligned-gap`   mean lost over aligned - over conflicting forget images, of those the original recognises
    `shortcut/bias`          mean lost over retained images of other classes with the bias - over those without it

If only the bias was unlearned, aligned images are no longer recognised while conflicting ones still are, and images of
other classes suffer for having the same background. Besides, as plain functions, CUPID's partition of a forget set of
which no groups are known: by the **sharpness** of the loss at the weights θ, image by image,

    ω = ℓ(θ + η g / |g|) - ℓ(θ),   g = ∇ℓ(θ);   the sharpest 5 % are its causal subset, the rest stands for the bias

Source: "Easy to Learn, Yet Hard to Forget" (CUPID; Kwon et al. 2026, arXiv 2602.21773), of which no code was found: it
compares accuracy by group. Both contrasts and their controls are this project's. The question is utility: a shortcut
that was unlearned is something else that was changed. What is left of the class, `detectors.recognition` says.

Traps:

- *A class forgotten altogether shows a gap, too*, if everything counts: 99 % of the aligned and 60 % of the conflicting
  images can be lost, and no more. So the first contrast is among images that the original recognises.
- *The second is not*: of hard images, those that one model recognises, the next often does not. Counting all of them,
  such losses and gains cancel.
- *Images with another class's background are hard*, and any damage takes them first. Where retained images have a
  background that is odd for their class and not the bias, the loss must be larger than theirs.
- *A gap below 0*, aligned images that stay while conflicting ones go (the paper finds them hard to forget), is no sign
  of this: it is the shortcut at work, or hard images went first. That the class is still answered, recognition says.
- *Accuracy on the class may even rise* when its shortcut is unlearned, as the paper reports. Training of any kind does
  that too, so what conflicting images gained stands beside the gap and decides nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from audit.case import ROLES, Case
from audit.contrast import ALPHA
from audit.evidence import Evidence
from audit.instrument import Instrument
from audit.plan import Request
from audit.quantities import TOKEN
from audit.record import Control, Finding, Question, Side, Table
from audit.statistics import Estimate, mean_estimate, one_sample, two_sample
from detectors.recognition import Floats, decided, decisions

if TYPE_CHECKING:
    import torch

    from audit.image_target import ImageTarget

__all__ = ["Shortcut", "majority", "sharpest", "sharpness"]

_SOURCE = "accuracy by group as in CUPID (arXiv 2602.21773); contrasts: this project, 2026"
_THRESHOLD = 0.1
Mask = NDArray[np.bool_]


# --- groups -------------------------------------------------------------------------------------------------


def majority(classes: Sequence[str], groups: Sequence[str]) -> dict[str, str]:
    """By class, the group that most of its images have; a class of which two groups have equally many is left out.

    `classes` and `groups`: of every image, [n] each. Raises ValueError if their lengths differ.
    """
    if len(classes) != len(groups):
        raise ValueError(f"groups holds {len(groups)} names, classes {len(classes)}")
    counts: dict[str, Counter[str]] = {}
    for name, group in zip(classes, groups, strict=True):
        counts.setdefault(name, Counter())[group] += 1
    found = {}
    for name, count in counts.items():
        (first, most), *others = count.most_common(2)
        if not others or others[0][1] < most:
            found[name] = first
    return found


# --- sharpness ----------------------------------------------------------------------------------------------


def sharpness(model: torch.nn.Module, pixels: torch.Tensor, labels: torch.Tensor, eta: float = 0.05) -> Floats:
    """l(θ + eta g / |g|) - l(θ) of every image by itself, in nats, [n]: by how much a step uphill raises its loss.

    Args:
        model: from images to logits, or to something that has `.logits`; its weights stay as they are. It is put into
            evaluation mode meanwhile, or dropout would be measured.
        pixels: as the model takes them, [n, ...].
        labels: numbers of the right classes, [n].
        eta: length of the step, over all weights together. The paper's is not known.

    0 where the gradient is. One forward and backward pass, and one more forward, for each image.

    Raises:
        ValueError: not one label for every image, or a step that is not positive.
    """
    import torch
    from torch.func import functional_call
    from torch.nn.functional import cross_entropy

    if len(pixels) != len(labels) or not eta > 0:
        raise ValueError(f"{len(pixels)} images, {len(labels)} labels, eta = {eta}: one label for each, eta above 0")
    weights = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}

    def loss(at: Mapping[str, torch.Tensor], i: int) -> torch.Tensor:
        found = functional_call(model, dict(at), (pixels[i : i + 1],))
        return cross_entropy(getattr(found, "logits", found).float(), labels[i : i + 1])

    was_training = model.training
    model.eval()
    try:
        values = []
        for i in range(len(pixels)):
            with torch.enable_grad():
                here = loss(weights, i)
                slope = torch.autograd.grad(here, list(weights.values()), materialize_grads=True)
            length = math.sqrt(sum(float(g.double().square().sum()) for g in slope))
            if length == 0:
                values.append(0.0)
                continue
            with torch.no_grad():
                there = {name: w + g * (eta / length) for (name, w), g in zip(weights.items(), slope, strict=True)}
                values.append(float(loss(there, i)) - float(here))
    finally:
        model.train(was_training)
    return np.array(values)


def sharpest(values: ArrayLike, share: float = 0.05) -> Mask:
    """CUPID's causal subset: which images are the sharpest `share` of all, one at least; [n].

    Raises ValueError for no values, or values that are not finite, or a share outside (0, 1].
    """
    each = np.asarray(values, np.float64)
    if each.ndim != 1 or not each.size or not np.isfinite(each).all() or not 0 < share <= 1:
        raise ValueError(f"values of shape {each.shape}, share {share}: finite values [n] and a share in (0, 1]")
    chosen = np.zeros(len(each), bool)
    chosen[np.argsort(-each, kind="stable")[: max(1, round(share * len(each)))]] = True
    return chosen


# --- instrument ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Images:
    """Some images of a set."""

    words: str
    set: str
    chosen: Mask  # of the set's rows

    def among(self, right: Mask) -> _Images:
        """Those that were recognised."""
        return _Images(self.words, self.set, self.chosen & right)


@dataclass(frozen=True)
class _Parts:
    """The images of a case by bias. `odd`: retained images without the bias, in a group that is odd for their class."""

    aligned: _Images
    conflicting: _Images
    biased: _Images
    unbiased: _Images
    odd: _Images


class Shortcut(Instrument):
    """Was the class unlearned, or what stands in for it?"""

    name = "shortcut"
    title = "Was only a shortcut unlearned?"
    question = Question.UTILITY
    modality = "image"
    sets = ("forget", "retain")
    roles = ("original",)
    reference = _SOURCE

    def missing(self, case: Case) -> str | None:
        """Needs to know the group of every image, and images on both sides of one contrast at least."""
        lacking = super().missing(case)
        if lacking:
            return lacking
        for name in self.sets:
            if not all(row.group for row in case.sets[name]):
                return f"needs the group (such as the background) of every image in the {name} set"
        absent = _absent(case)
        return next(iter(absent.values())) if len(absent) == 2 else None

    def withheld(self, case: Case) -> dict[str, str]:
        """A contrast with no images on one side."""
        absent = {f"{self.name}/{finding}": reason for finding, reason in _absent(case).items()}
        return super().withheld(case) | absent

    def requests(self, case: Case, target: ImageTarget) -> list[Request]:
        """The decision on every image of forget and retain set."""
        return [] if "+" in target.role else decisions(case, target, self.sets)

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """Both contrasts of what was lost, each with its table of accuracies."""
        measured, parts, absent = _Measured(case, evidence), _parts(case), _absent(case)
        found = []
        if "aligned-gap" not in absent:
            known = measured.right["original", "forget"] == 1
            found.append(
                measured.finding(
                    "aligned-gap",
                    parts.aligned.among(known),
                    parts.conflicting.among(known),
                    "images recognised before, no longer recognised: share of bias-aligned less share of "
                    "bias-conflicting ones",
                    "bias-aligned images of the class were lost more often than bias-conflicting ones",
                    [measured.gained(parts.conflicting)],
                    (parts.aligned, parts.conflicting),
                )
            )
        if "bias" not in absent:
            found.append(
                measured.finding(
                    "bias",
                    parts.biased,
                    parts.unbiased,
                    "accuracy lost on retained images with the forgotten class's bias, less that on those without it",
                    "retained images that share the forgotten class's bias lost more",
                    [measured.beyond_hardness(parts.biased, parts.odd)],
                    (parts.biased, parts.unbiased, parts.odd),
                )
            )
        return found


class _Measured:
    """Who answers rightly, and the contrasts that are made of it."""

    def __init__(self, case: Case, evidence: Evidence) -> None:
        self.case = case
        self.noise = max(evidence.noise.values(), default=0.0)
        self.roles = [role for role in ROLES if role in case.models]
        self.right = {
            (role, name): decided(evidence, role, name, TOKEN.name, "match")
            for role in self.roles
            for name in Shortcut.sets
        }
        self.clusters = {name: np.array(case.clusters(case.rows(name))) for name in Shortcut.sets}

    def lost(self, images: _Images, role: str) -> Floats:
        """Right in the original and wrong in this model: 1; the other way round: -1."""
        both = self.right["original", images.set] - self.right[role, images.set]
        return np.asarray(both[images.chosen])

    def contrast(self, a: _Images, b: _Images, lost_a: Floats, lost_b: Floats) -> Estimate:
        """Mean loss of a less that of b; NaN where one has no image."""
        if not lost_a.size or not lost_b.size:
            return Estimate(math.nan, math.nan, math.nan, None, len(lost_a) + len(lost_b), 1.0)
        who = [self.clusters[images.set][images.chosen] for images in (a, b)]
        # Of what the original recognises, nothing can be gained.
        known = all(self.right["original", images.set][images.chosen].all() for images in (a, b))
        bounds = (0.0 if known else -1.0, 1.0)
        return two_sample(lost_a, lost_b, *who, bounds=bounds, seed=self.case.options.seed)

    def finding(
        self,
        name: str,
        a: _Images,
        b: _Images,
        statistic: str,
        orientation: str,
        extra: Sequence[Control],
        shown: Sequence[_Images],
    ) -> Finding:
        """What the target lost of a, less what it lost of b."""
        found = self.contrast(a, b, self.lost(a, "target"), self.lost(b, "target"))
        return Finding(
            id=f"{Shortcut.name}/{name}",
            instrument=Shortcut.name,
            question=Shortcut.question,
            statistic=statistic,
            split=f"{a.words} against {b.words}, original to target",
            estimate=found.value,
            ci95=(found.lo, found.hi),
            n=found.n,
            unit="accuracy",
            orientation=orientation,
            null="both lost equally often",
            p_value=found.p_value,
            smallest_p=found.smallest_p,
            threshold=_THRESHOLD,
            noise=self.noise,
            sides=(Side.DAMAGE, Side.NEITHER),
            controls=[self.planted(a, b), *self.retrained(a, b), *extra],
            reference=_SOURCE,
            table=self.table(shown),
        )

    def planted(self, a: _Images, b: _Images) -> Control:
        """Had every image of a been lost and none of b: would so many images show it?"""
        most = self.right["original", a.set][a.chosen]
        found = self.contrast(a, b, most, np.zeros(int(b.chosen.sum())))
        return Control(
            name="positive control",
            description=f"as if the target had lost all that the original recognises of the {a.words} "
            f"({len(most)} here), and nothing of the {b.words} ({int(b.chosen.sum())} here)",
            estimate=found.value,
            ci95=(found.lo, found.hi),
            n=found.n,
            passed=_seen(found),
            gates="silence",
        )

    def retrained(self, a: _Images, b: _Images) -> list[Control]:
        """The same contrast in a model that never saw the forget set: what it lacks, nobody unlearned."""
        if "retrained" not in self.roles:
            return []
        found = self.contrast(a, b, self.lost(a, "retrained"), self.lost(b, "retrained"))
        return [
            Control(
                name="retrained model",
                description="the same contrast from original to retrained: what it shows comes with having forgotten",
                estimate=found.value,
                ci95=(found.lo, found.hi),
                n=found.n,
                passed=not _seen(found),
                gates="evidence",
            )
        ]

    def gained(self, images: _Images) -> Control:
        """Are conflicting images, all of them, recognised more often than before?"""
        found = one_sample(
            -self.lost(images, "target"),
            self.clusters[images.set][images.chosen],
            bounds=(-1.0, 1.0),
            seed=self.case.options.seed,
        )
        return Control(
            name="conflicting images recognised better",
            description="accuracy on all bias-conflicting forget images, target minus original: a rise is how a model "
            "looks that lost its bias, or was trained on",
            estimate=found.value,
            ci95=(found.lo, found.hi),
            n=found.n,
        )

    def beyond_hardness(self, a: _Images, b: _Images) -> Control:
        """Is more lost than of other retained images whose group is odd for their class?"""
        name = "as hard images"
        if not b.chosen.any():
            return Control(
                name=name,
                description="no retained image has another group that is odd for its class: images with the bias may "
                "have been lost because such images are hard, and go first under any damage",
            )
        found = self.contrast(a, b, self.lost(a, "target"), self.lost(b, "target"))
        return Control(
            name=name,
            description=f"the same contrast against {b.words}: the loss must be larger than theirs",
            estimate=found.value,
            ci95=(found.lo, found.hi),
            n=found.n,
            passed=_seen(found),
            gates="evidence",
        )

    def table(self, shown: Sequence[_Images]) -> Table:
        """Accuracy of every model on all images of these groups."""
        rows: list[list[str | int | float | None]] = []
        for images in shown:
            for role in self.roles if images.chosen.any() else ():
                e = mean_estimate(
                    self.right[role, images.set][images.chosen],
                    self.clusters[images.set][images.chosen],
                    bounds=(0.0, 1.0),
                    seed=self.case.options.seed,
                )
                rows.append([images.words, role, e.value, e.lo, e.hi, e.n])
        return Table(columns=["images", "model", "accuracy", "95 % from", "to", "entities"], rows=rows)


def _seen(found: Estimate) -> bool:
    return found.p_value is not None and found.p_value <= ALPHA and found.value >= _THRESHOLD


def _parts(case: Case) -> _Parts:
    """The case's images by bias: of each forgotten class, the group that most of its forget images have."""
    bias, usual = (
        majority([row.answer for row in case.sets[name]], [row.group for row in case.sets[name]])
        for name in ("forget", "retain")
    )
    forget, retain = case.rows("forget"), case.rows("retain")
    forgotten, shared = {row.answer for row in case.sets["forget"]}, set(bias.values())
    aligned = np.array([bias.get(row.answer) == row.group for row in forget])
    decided_for = np.array([row.answer in bias for row in forget])
    other = np.array([row.answer not in forgotten for row in retain])
    carries = np.array([row.group in shared for row in retain])
    odd = np.array([usual.get(row.answer, row.group) != row.group for row in retain])
    return _Parts(
        aligned=_Images("bias-aligned forget images", "forget", aligned),
        conflicting=_Images("bias-conflicting forget images", "forget", decided_for & ~aligned),
        biased=_Images("retained images with the bias", "retain", other & carries),
        unbiased=_Images("retained images without the bias", "retain", other & ~carries),
        odd=_Images("retained images with another odd group", "retain", other & ~carries & odd),
    )


def _absent(case: Case) -> dict[str, str]:
    """Contrasts that cannot be made, by finding, and why."""
    parts, reasons = _parts(case), {}
    if not (parts.aligned.chosen.any() and parts.conflicting.chosen.any()):
        reasons["aligned-gap"] = "needs forget images of a class in the group that most of them have, and in another"
    if not (parts.biased.chosen.any() and parts.unbiased.chosen.any()):
        reasons["bias"] = "needs retained images of other classes in the forgotten class's usual group, and in another"
    return reasons
