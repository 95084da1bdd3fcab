"""Shadow models: does the target treat forgotten images as models treat what they were trained on?

What is measured: K models of the target's own shape are trained from nothing, each on a random half of all forget,
holdout and retain images, so that every image was seen by half of them (IN) and not by the others (OUT). How a model
that never saw an image treats it is thereby known image by image, and a hard image is not taken for an unseen one.

    LiRA   log Phi((f - m) / s),   f = log p_y - log(1 - p_y) in the target, m its mean over OUT models, s their spread
    RMIA   share of population images z with  (p(x) / q(x)) / (p(z) / q(z)) > gamma,   p in the target,
           q = (mean over IN + mean over OUT) / 2

Both are larger for likelier members. The finding is the AUC of forget images against holdout images, which the target
never saw; beside it the true-positive rate at a false-positive rate of 1 %.

Source: LiRA, offline: Carlini et al. 2022 (arXiv 2112.03570), with one spread for all images below 32 OUT models; RMIA:
Zarifzadeh et al. 2024 (arXiv 2312.03262), gamma = 1 as in the authors' ml_privacy_meter. IN and OUT models are both at
hand, so that q needs no guess of what IN models would say (the offline coefficient a).

Traps:

- *Whole classes*: an OUT model still saw other images of the class, so it says nothing of a model that never saw the
  class. The attack is about single images, and does not run where forget and holdout differ in their classes.
- *z sets the scale, not the order*: the share is a monotone function of p(x) / q(x). With gamma above 1 and a target
  sure of everything it is 0 for all images.
- *q must weigh IN and OUT alike*: with a plain mean, an odd number of IN models moves q with membership itself.
- *Shadows overfit more than the target*, which saw more images: an attack that finds the shadows' own members may still
  miss the target's. The retained images in the target are the second positive control.
- *A rate at 1 %* rests on one false positive in a hundred holdout images: read its interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import special

from attacks.shadow_scores import Flags, Floats, average_probability, lira_scores, random_halves, rmia_scores
from audit.case import Case
from audit.contrast import Score, Statistic, against_never_taught
from audit.controls import retrained_control, untaught_control
from audit.errors import Incomplete
from audit.evidence import Evidence
from audit.finetune import learning_rate
from audit.instrument import Access, Attack, Stage
from audit.plan import Request
from audit.quantities import TOKEN
from audit.record import Control, Finding, Question
from audit.statistics import auc_two_sample, clopper_pearson, tpr_at_fpr
from detectors.image_membership import LOG_ODDS
from detectors.recognition import decided, decisions, like_with_like

if TYPE_CHECKING:
    from audit.image_target import ImageTarget

__all__ = ["Shadow", "average_probability", "lira_scores", "random_halves", "renew", "rmia_scores"]

_LIRA = "LiRA (Carlini et al. 2022, arXiv 2112.03570), offline"
_RMIA = "RMIA (Zarifzadeh et al. 2024, arXiv 2312.03262)"
_POOL = ("forget", "holdout", "retain")
_SHADOWS = "target+shadow-"
_FPR = 0.01
_MODELS = {"quick": 4, "standard": 8, "thorough": 32}
_EPOCHS = {"quick": 40, "standard": 60, "thorough": 60}

_ORIENTATION = "the target treats forget images as models treat images they were trained on"
LIRA = Statistic(
    "lira", "LiRA: confidence against that of models which never saw the image", "score", _ORIENTATION,
    None, 0.1, _LIRA,
)  # fmt: skip
RMIA = Statistic(
    "rmia", "RMIA: likelihood ratio to shadow models, against population images", "score", _ORIENTATION,
    None, 0.1, _RMIA,
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How shadow models are trained.

    Attributes:
        models: how many.
        epochs: passes over the half of the images that a model is given.
        batch: images a step.
        learning_rate: the highest, of AdamW.
    """

    models: int
    epochs: int
    batch: int
    learning_rate: float


def recipe_for(case: Case, target: ImageTarget) -> Recipe:
    """The budget's models and epochs; the learning rate falls with the cube root of size, 2e-3 at a million weights."""
    budget = case.options.budget.value
    return Recipe(_MODELS[budget], _EPOCHS[budget], 32, learning_rate(target.inventory.parameters, 2e-3, 1e-4))


def renew(model: Any, seed: int) -> None:
    """Give a Hugging Face model new random weights, in place; the caller's random numbers are left as they were."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(model)(model.config)
    model.load_state_dict(fresh.state_dict())


class Shadow(Attack):
    """Does the target treat forgotten images as members, by what the auditor's own models do with them?"""

    name = "shadow"
    title = "Does it treat them as it would what it was taught?"
    question = Question.LEAKAGE
    access = Access.WEIGHTS
    modality = "image"
    sets = ("forget", "holdout")
    reference = f"{_LIRA}; {_RMIA}"

    def missing(self, case: Case) -> str | None:
        """Shadow models know single images from their like, not a class from another."""
        reason = super().missing(case)
        if reason is None and not like_with_like(case):
            return "needs holdout images of every forgotten class: shadow models that see a class know its other images"
        return reason

    def requests(self, case: Case, target: ImageTarget) -> list[Request]:
        """The decisions on all images, of every model at hand and every shadow."""
        if "+" in target.role and not target.role.startswith(_SHADOWS):
            return []
        return decisions(case, target, dict.fromkeys([*_pool(case), _population(case)]), (TOKEN, LOG_ODDS))

    def cost(self, case: Case, target: ImageTarget) -> str:
        """How many models are trained, on how much."""
        recipe, images = recipe_for(case, target), sum(len(case.rows(name)) for name in _pool(case))
        return f": {recipe.models} models from nothing, {recipe.epochs} epochs on {images // 2} images each"

    def stages(self, case: Case, target: ImageTarget) -> list[Stage]:
        """One a shadow model."""
        if target.role != "target":
            return []
        recipe, options = recipe_for(case, target), case.options
        sets = ",".join(case.sets[name].digest for name in _pool(case))
        given = f"{recipe}/{options.seed}/{options.budget.value}/{sets}"
        return [Stage(f"{self.name}-{i}", f"{given}/{i}") for i in range(recipe.models)]

    def run(self, case: Case, target: ImageTarget, tick: Any) -> Iterator[Stage]:
        """Train one model after the other, each from new random weights."""
        import torch

        from audit.organisms.imaging.train import fit
        from audit.organisms.imaging.world import Images

        recipe, model = recipe_for(case, target), target.model
        rows = [row for name in _pool(case) for row in case.rows(name)]
        inside = np.concatenate([_inside(case)[name] for name in _pool(case)])
        shown = target.pixels([row.picture.pixels for row in rows if row.picture is not None]).float()
        labels = torch.tensor([target.label(row.answer) for row in rows], device=target.device)
        every = Images(shown, labels)
        for i, stage in enumerate(self.stages(case, target)):
            seed = case.options.seed + 1000 * (1 + i)
            model.float().requires_grad_(True)
            renew(model, seed)
            try:
                fit(
                    model,
                    every.take(torch.from_numpy(np.flatnonzero(inside[:, i])).to(target.device)),
                    epochs=recipe.epochs,
                    batch=recipe.batch,
                    learning_rate=recipe.learning_rate,
                    seed=seed,
                    progress=partial(overall, tick, i, recipe.models),
                )
            except Incomplete as error:  # a shadow that diverged ends this attack, not the scan
                raise RuntimeError(f"{stage.name}: {error}") from error
            model.to(target.dtype).requires_grad_(False)
            yield stage

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """LiRA and RMIA on forget against holdout images, and how each does on the shadows themselves."""
        return [
            against_never_taught(
                self,
                case,
                evidence,
                statistic,
                score,
                auc=True,
                subtract=False,
                extra=[*_trial(case, statistic, score), *retrained_control(case, score), _at_few_alarms(score)],
            )
            for statistic, score in ((LIRA, _lira(case, evidence)), (RMIA, _rmia(case, evidence)))
        ]

    def examples(self, case: Case, evidence: Evidence) -> dict[str, dict[str, float | str]]:
        """Per forget image both scores, as shares, and whether it is a member by LiRA at 1 % false positives."""
        lira, rmia = _lira(case, evidence), _rmia(case, evidence)
        scores, bar = lira("target", "forget"), _bar(lira("target", "holdout"))
        return {
            row.id: {"LiRA": math.exp(a), "RMIA": float(b), "treated as a member": float(a > bar)}
            for row, a, b in zip(case.rows("forget"), scores, rmia("target", "forget"), strict=True)
        }


def overall(tick: Any, before: int, models: int, done: int, total: int) -> None:
    """Progress of one model as progress of all."""
    tick(before * total + done, models * total)


def _role(shadow: int) -> str:
    return f"{_SHADOWS}{shadow}"


def _pool(case: Case) -> list[str]:
    """The sets whose images shadow models are trained on."""
    return [name for name in _POOL if name in case.sets]


def _population(case: Case) -> str:
    """The set that RMIA's population images come from: unseen by the target, and not under test if that can be had."""
    return "utility" if "utility" in case.sets else "holdout"


def _inside(case: Case) -> dict[str, Flags]:
    """By set, which image each shadow model is trained on, [rows, models]."""
    models = _MODELS[case.options.budget.value]
    clusters = {name: case.clusters(case.rows(name)) for name in _pool(case)}
    drawn = random_halves([label for labels in clusters.values() for label in labels], models, case.options.seed)
    ends = np.cumsum([len(labels) for labels in clusters.values()])
    inside = dict(zip(clusters, np.split(drawn, ends[:-1]), strict=True))
    population = _population(case)
    return {population: np.zeros((len(case.rows(population)), models), np.bool_)} | inside


def _lira(case: Case, evidence: Evidence) -> Score:
    """LiRA of a set's images under a role; a shadow model is scored by the others."""
    inside = _inside(case)

    def score(role: str, name: str) -> Floats:
        own, others, seen = _read(evidence, role, name, inside[name])
        return lira_scores(own, others, seen)

    return cache(score)


def _rmia(case: Case, evidence: Evidence) -> Score:
    """RMIA of a set's images under a role; a shadow model is scored by the others."""
    inside = _inside(case)

    @cache
    def log_probabilities(role: str, name: str) -> tuple[Floats, Floats]:
        own, others, seen = _read(evidence, role, name, inside[name])
        return special.log_expit(own), average_probability(special.log_expit(others), seen)

    def score(role: str, name: str) -> Floats:
        return rmia_scores(*log_probabilities(role, name), *log_probabilities(role, _population(case)))

    return cache(score)


def _read(evidence: Evidence, role: str, name: str, inside: Flags) -> tuple[Floats, Floats, Flags]:
    """Log-odds under a role, [n]; under the shadow models other than it, [n, k]; and what these were trained on."""
    odds = partial(decided, evidence, name=name, quantity=LOG_ODDS.name, key="log_odds")
    others = [i for i in range(inside.shape[1]) if _role(i) != role]
    return odds(role=role), np.stack([odds(role=_role(i)) for i in others], axis=1), inside[:, others]


def _trial(case: Case, statistic: Statistic, score: Score) -> list[Control]:
    """The attack on the shadow models, of which it is known what they saw."""
    inside = _inside(case)
    names, models = _pool(case), range(next(iter(inside.values())).shape[1])
    clusters = {name: np.array(case.clusters(case.rows(name))) for name in names}
    parts = [(score(_role(i), name), inside[name][:, i], clusters[name]) for name in names for i in models]
    seen, unseen = ((np.concatenate([x[m == side] for x, m, _ in parts]),
                     np.concatenate([c[m == side] for _, m, c in parts])) for side in (True, False))  # fmt: skip
    members = auc_two_sample(seen[0], unseen[0], seen[1], unseen[1], seed=case.options.seed)
    # Every image was seen by half of them, so that nothing but the sets' own nature is left in its mean.
    forget, holdout = (np.mean([score(_role(i), name) for i in models], axis=0) for name in ("forget", "holdout"))
    split = auc_two_sample(forget, holdout, clusters["forget"], clusters["holdout"], seed=case.options.seed)
    return [
        Control(
            name="shadow models' own members",
            description="the attack on the shadow models themselves: images that they were trained on against others",
            estimate=members.value,
            ci95=(members.lo, members.hi),
            n=members.n,
            passed=members.lo > 0.5 and members.value >= 0.5 + statistic.threshold,
            gates="silence",
        ),
        untaught_control(
            "forget and holdout alike",
            "forget against holdout images in the shadow models, which were trained on half of either",
            split,
        ),
    ]


def _at_few_alarms(score: Score) -> Control:
    forget, holdout = score("target", "forget"), score("target", "holdout")
    rate = tpr_at_fpr(forget, holdout, _FPR)
    return Control(
        name="TPR at 1 % FPR",
        description=f"share of forget images above a threshold that {int((holdout > _bar(holdout)).sum())} of "
        f"{len(holdout)} holdout images pass; exact interval, images taken as independent",
        estimate=rate,
        ci95=clopper_pearson(round(rate * len(forget)), len(forget)),
        n=len(forget),
    )


def _bar(holdout: Floats) -> float:
    """The threshold that at most 1 % of the holdout images pass."""
    return float(np.sort(holdout)[::-1][math.floor(_FPR * len(holdout))])
