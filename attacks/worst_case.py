"""Worst-case forget sets: which images would a stated unlearning method forget worst?

What is measured: of all training images at hand, m are chosen that unlearning would fail on, by an optimization on two
levels, and m are drawn at random, several times. A copy of the model unlearns each of these subsets in the same way.
How much more is then known of the chosen subset than of random ones?

    upper   w <- P(w - eta (l_i + 2 gamma w)),   P = projection onto {w in [0, 1], sum w = m},   w = m / n at first
    lower   l_i = loss of image i in the model after a few epochs of sign-SGD on the loss of all images but its group's;
            groups: the m with the largest w, the next m, ...
    chosen = the m largest w
    finding = mean(known | chosen) - mean(known | random),   known_i = p(class of i) - mean p(class) over unseen images

Unlearning here is fine-tuning on the images that are not in the subset. Beside it stand random labels on the subset, a
method that the choice was not made against, and training from nothing without it, which never taught it.

Source: Fan et al. 2024, Challenging Forgets (ECCV 2024, arXiv 2403.07362); read in the authors' Unlearn-WorstCase. A
sign has no derivative, so w moves the upper loss directly only, and no gradient is taken through the lower level. Here
as there a lower level starts from the model as it is. What differs:

- There the lower level is one run on sum_i (1 - w_i) l_i, and gives the upper losses of all images. A small network
  that knows its images by heart then has no loss on those it goes on training on, and hardly any on the others: where
  40 planted images among 150 were to be found, a choice of 30 made so (two rounds of two epochs) held 1 of them. Hence
  groups: every image is judged by a model that it was left out of.
- There w starts at a random subset; at the published rate of 0.01, weights 1 and 0 change places in one round only if
  two losses differ by 100 nats. Here all weights start alike, and the rate is 1.
- There upper losses are taken in training mode, with augmentation. Here in evaluation mode, without.

Traps:

- *Easy is not remembered*: what is chosen has a low loss after unlearning, and so it has in a model trained from
  nothing without it: the rest teaches it. The gap of `retrained` is that part; only what exceeds it is left over.
- *It says nothing of the target's own forget set*, and of no method but the one stated. It is about the original's
  training images, and how far a success on a random or given forget set can be generalized. So it answers the question
  of utility, where nothing decides whether knowledge remains; among attacks it would count as cover for a question that
  it does not ask.
- *One chosen subset is one run of unlearning*: the interval is over images. What differs from run to run shows in the
  random subsets, and the chosen one must lie outside what another of these would be expected in.
- *Where random subsets are not forgotten either*, none can be forgotten worse: silence then means nothing.
- *A choice can undo itself*: images teach each other, and where all of a kind are chosen nothing is left that would
  teach them. The groups see to that in part; a gap below 0 says that they did not.
- *The pool is what the sets hold*, not all that the model was trained on: a class of which most images are in the pool
  is forgotten with other ease than the paper's tenth of all images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from attacks import shadow, subsets
from attacks.selection import project_capped_simplex, select
from attacks.subsets import METHODS
from audit.case import Case
from audit.errors import Incomplete
from audit.evidence import Evidence
from audit.finetune import learning_rate
from audit.instrument import Access, Attack, Stage
from audit.plan import Request
from audit.quantities import recorded_by_attack
from audit.record import Control, Figure, Finding, Question, Series, Side, Table
from audit.statistics import mean_estimate
from detectors.recognition import decisions

if TYPE_CHECKING:
    from audit.image_target import ImageTarget
    from audit.organisms.imaging.world import Images

__all__ = ["METHODS", "Recipe", "WorstCase", "project_capped_simplex", "select", "unlearn"]

_SOURCE = "Challenging Forgets (Fan et al. 2024, arXiv 2403.07362)"
_FEWEST = 20

SELECTION = recorded_by_attack("worst-case-selection")
"""Recorded once, at the first image: `weight` and `chosen` of every image of the pool, [1, n]."""


@dataclass(frozen=True)
class Recipe:
    """What is done to every subset.

    Attributes:
        epochs, learning_rate: of unlearning from the model as it is.
        fresh_epochs, fresh_rate: of training from nothing.
        select_rate: of sign-SGD.
        batch: images a step.
    """

    epochs: int
    learning_rate: float
    fresh_epochs: int
    fresh_rate: float
    select_rate: float
    batch: int = 32


def recipe_for(case: Case, target: ImageTarget) -> Recipe:
    """Ten epochs; rates fall with the cube root of size; from nothing as shadow models are trained."""
    size, fresh = target.inventory.parameters, shadow.recipe_for(case, target)
    rates = learning_rate(size, 5e-3, 1e-4), learning_rate(size, 1e-3, 1e-5)
    return Recipe(10, rates[0], fresh.epochs, fresh.learning_rate, rates[1], fresh.batch)


def unlearn(
    model: Any,
    method: str,
    forget: Images,
    rest: Images,
    recipe: Recipe,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Unlearn `forget` in place by one of `METHODS`. Raises `Diverged` where a loss is no longer a number."""
    from audit.organisms.imaging.method import generator
    from audit.organisms.imaging.methods.random_labels import wrong_labels
    from audit.organisms.imaging.train import fit
    from audit.organisms.imaging.world import joined

    taught = rest
    if method == "random-labels":
        every = joined(forget, rest).labels.cpu()
        wrong = wrong_labels(forget.labels.cpu(), every, generator(seed)).to(forget.labels.device)
        taught = joined(forget.labelled(wrong), rest)
    if method == "retrained":
        shadow.renew(model, seed)
    fresh = method == "retrained"
    fit(
        model,
        taught,
        epochs=recipe.fresh_epochs if fresh else recipe.epochs,
        learning_rate=recipe.fresh_rate if fresh else recipe.learning_rate,
        batch=recipe.batch,
        seed=seed,
        progress=progress,
    )


# --- instrument ---------------------------------------------------------------------------------------------


class WorstCase(Attack):
    """How much more is left of the images that unlearning would forget worst than of any others?"""

    name = subsets.NAME
    title = "Which images would be forgotten worst?"
    aside = "asks about a method, not about this model: it trains many"
    question = Question.UTILITY
    access = Access.WEIGHTS
    modality = "image"
    sets = ("forget", "retain")
    reference = _SOURCE

    def missing(self, case: Case) -> str | None:
        """A fifth of the images is chosen, and wrong labels must be at hand."""
        reason = super().missing(case)
        if reason is not None:
            return reason
        if len(subsets.images(case)) < _FEWEST:
            return f"needs at least {_FEWEST} images in forget and retain set together"
        if len({row.answer for row in subsets.images(case)}) < 2:
            return "needs images of at least two classes in forget and retain set together"
        return None

    def requests(self, case: Case, target: ImageTarget) -> list[Request]:
        """Of every unlearned copy the decisions on the whole pool and on unseen images; of the choice, the weights."""
        host, _, stage = target.role.partition("+")
        if host != subsets.host(case) or (stage and not stage.startswith(f"{self.name}-")):
            return []
        if stage == f"{self.name}-{subsets.SELECTED}":
            return [Request(f"{self.name}/selection", (target.show(subsets.images(case)[0]),), (SELECTION,))]
        unseen = subsets.unseen_set(case)
        return decisions(case, target, ("forget", "retain", *([unseen] if unseen else [])))

    def cost(self, case: Case, target: ImageTarget) -> str:
        """How many models are trained, on how much."""
        recipe, plan = recipe_for(case, target), subsets.plan(case)
        fresh = sum(method == "retrained" for method, _ in plan)
        images = len(subsets.images(case)) - subsets.size(case)
        return (
            f": {len(plan) - fresh} models unlearn for {recipe.epochs} epochs on {images} images, {fresh} are trained "
            f"from nothing for {recipe.fresh_epochs}"
        )

    def stages(self, case: Case, target: ImageTarget) -> list[Stage]:
        """The choice, then each subset unlearned by each method; of the original, where there is one."""
        if target.role != subsets.host(case):
            return []
        options = case.options
        sets = ",".join(case.sets[name].digest for name in ("forget", "retain"))
        given = f"{recipe_for(case, target)}/{options.seed}/{options.budget.value}/{sets}"
        names = (subsets.SELECTED, *(f"{method}-{subset}" for method, subset in subsets.plan(case)))
        return [Stage(f"{self.name}-{name}", f"{given}/{name}") for name in names]

    def run(self, case: Case, target: ImageTarget, tick: Any) -> Iterator[Stage]:
        """Choose, then unlearn one subset after the other, each time from the model as it was."""
        import torch

        from audit.organisms.imaging.world import Images

        recipe, model, pool = recipe_for(case, target), target.model, subsets.images(case)
        first, *stages = self.stages(case, target)
        shown = target.pixels([row.picture.pixels for row in pool if row.picture is not None]).float()
        every = Images(shown, torch.tensor([target.label(row.answer) for row in pool], device=target.device))
        model.float().requires_grad_(True)
        begun = {name: value.clone() for name, value in model.state_dict().items()}
        found = select(
            model,
            every,
            subsets.size(case),
            seed=case.options.seed,
            batch=recipe.batch,
            learning_rate=recipe.select_rate,
        )
        model.to(target.dtype).requires_grad_(False)
        chosen = np.isin(np.arange(len(pool)), found.chosen)
        kept = {SELECTION.name: {"weight": found.weights[None], "chosen": chosen[None]}}
        yield Stage(first.name, first.recipe, ((target.show(pool[0]), kept),))
        named = subsets.by_name(case, found.chosen)
        for i, (stage, (method, subset)) in enumerate(zip(stages, subsets.plan(case), strict=True)):
            model.float().requires_grad_(True)
            model.load_state_dict(begun)
            within = torch.from_numpy(np.isin(np.arange(len(pool)), named[subset])).to(target.device)
            try:
                unlearn(
                    model,
                    method,
                    every.take(within),
                    every.take(~within),
                    recipe,
                    case.options.seed + 1000 * (1 + i),
                    partial(shadow.overall, tick, i, len(stages)),
                )
            except Incomplete as error:  # a copy that diverged ends this attack, not the scan
                raise RuntimeError(f"{stage.name}: {error}") from error
            model.to(target.dtype).requires_grad_(False)
            yield stage

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """What is known of the chosen images against what is known of random ones, after the same unlearning."""
        known = subsets.Known(case, evidence)
        seed, gap = case.options.seed, known.gap(METHODS[0])
        controls = subsets.controls(known)
        if subsets.host(case) == "target":
            controls.append(
                Control(
                    name="without the original",
                    description="no original model is at hand: the choice is made in the target, of what is left there",
                )
            )
        m, n, unseen = subsets.size(case), len(subsets.images(case)), subsets.unseen_set(case)
        levels = {
            (method, kind): mean_estimate(*known.of(method, kind), bounds=subsets.BOUNDS, seed=seed)
            for method in ("before", *METHODS)
            for kind in (subsets.WORST, "random")
        }
        series = [
            Series(
                label=label,
                x=[float(i) for i in range(1 + len(METHODS))],
                y=[e.value for (_, of), e in levels.items() if of == kind],
                lo=[e.lo for (_, of), e in levels.items() if of == kind],
                hi=[e.hi for (_, of), e in levels.items() if of == kind],
                role=style,
            )
            for kind, label, style in ((subsets.WORST, "chosen", "target"), ("random", "random subsets", "control"))
        ]
        beyond = f", beyond unseen images ({unseen})" if unseen else ""
        words = f"probability of the right class after unlearning{beyond}"
        return [
            Finding(
                id=f"{self.name}/gap",
                instrument=self.name,
                question=self.question,
                statistic=f"worst-case forget set, fine-tuning on the rest: {words}",
                split=f"chosen vs random subsets, {m} of {n} images, {subsets.host(case)}",
                estimate=gap.value,
                ci95=(gap.lo, gap.hi),
                level=levels[METHODS[0], subsets.WORST].value,
                n=gap.n,
                unit="probability",
                orientation="more is left of the images that unlearning forgets worst than of images drawn at random",
                null="as much is left of the chosen images as of images drawn at random",
                p_value=gap.p_value,
                smallest_p=gap.smallest_p,
                threshold=subsets.THRESHOLD,
                noise=max(evidence.noise.values(), default=0.0),
                decides=(False, False),
                sides=(Side.NEITHER, Side.NEITHER),
                controls=controls,
                reference=_SOURCE,
                figure=Figure(
                    kind="bars",
                    title="What is left of the worst-case forget set, and of random ones",
                    alt=f"{words}, of chosen images and of random subsets, by method; values in the table.",
                    x_label="unlearned by",
                    y_label="probability",
                    series=series,
                    ticks=["before", *METHODS],
                ),
                table=Table(
                    columns=["unlearned by", "images", "mean (probability)", "95 % from", "to", "accuracy", "models"],
                    rows=[
                        [method, "chosen" if kind == subsets.WORST else kind, e.value, e.lo, e.hi,
                         known.accuracy(method, kind), len(known.runs(method, kind))]
                        for (method, kind), e in levels.items()
                    ],
                ),
            )
        ]  # fmt: skip

    def examples(self, case: Case, evidence: Evidence) -> dict[str, dict[str, float | str]]:
        """Per forget image its weight in the choice, and whether it was chosen."""
        known = subsets.Known(case, evidence)
        return {
            row.id: {"worst-case weight": float(weight), "forgotten worst": float(chosen)}
            for row, weight, chosen in zip(
                case.rows("forget"), known.weights, np.isin(np.arange(len(known.weights)), known.chosen), strict=False
            )
        }
