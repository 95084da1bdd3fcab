"""Edits of known effect, and changes that are no unlearning: an audit that calls one of the latter unlearning is wrong.

    head_only(model, parts.forgotten, joined(parts.forget, parts.retain))
    spaced_replay(model, tasks=[other_look(parts.retain, 0)], memory=few(taught, 10, seed=0), epochs=5, seed=0)

Each alters a model in place and leaves it in evaluation mode. `CHANGES` has them by name, as `histories` calls them,
with the settings they have in organisms.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit.errors import BadInput
from audit.organisms.imaging.method import classifier, features, generator, logits
from audit.organisms.imaging.train import Teaching, all_logits, fit
from audit.organisms.imaging.world import Images, Split, joined

# --- an edit by construction ------------------------------------------------------------------------------------


@torch.no_grad()
def head_only(model: nn.Module, forgotten: int, shown: Images, margin: float = 5.0) -> None:
    """Blot a class out of the classifier: its row becomes zero, its bias so low that it is never answered.

    By `margin` it stays below the best other class on every image of `shown`. Whatever the blocks know of the class
    they still know, and the row that read it is gone, so that no output tells these images from others.
    """
    found = all_logits(model, shown)
    found[:, forgotten] = -torch.inf
    head = classifier(model)
    head.weight[forgotten] = 0.0
    head.bias[forgotten] = found.max(dim=-1).values.min() - margin


# --- controls ---------------------------------------------------------------------------------------------------


def noisy_labels(
    model: nn.Module, data: Images, *, epochs: int, learning_rate: float, seed: int, share: float = 0.2, q: float = 0.7
) -> Tensor:
    """Train on images a share of which is wrongly labelled, by a loss that gives up on what it cannot fit.

    Control for: images that a model was shown and does not answer rightly, without any deletion. The loss is
    generalised cross-entropy, (1 - p^q) / q, whose pull on log p is p^q. Wrong labels are drawn from the classes
    present: a class that is withheld is not taught by mistake. Returns the numbers of the falsified images.
    """
    present, labels, order = torch.tensor(data.present), data.labels.clone(), generator(seed)
    flipped = torch.randperm(len(data), generator=order)[: round(share * len(data))]
    if len(present) < 2:
        raise BadInput("images of a single class cannot be labelled wrongly")
    place = torch.searchsorted(present, labels[flipped])
    away = torch.randint(1, len(present), place.shape, generator=order)
    labels[flipped] = present[(place + away) % len(present)]

    def loss(model: nn.Module, batch: Images) -> Tensor:
        likelihood = logits(model, batch.pixels).log_softmax(-1).gather(1, batch.labels[:, None])
        return ((1.0 - (q * likelihood).exp()) / q).mean()

    fit(model, data.labelled(labels), epochs=epochs, learning_rate=learning_rate, seed=seed, loss=loss)
    return flipped.sort().values


def relation_distillation(
    model: nn.Module,
    tasks: Sequence[Images],
    known: Sequence[int],
    *,
    epochs: int,
    learning_rate: float,
    seed: int,
    weight: float = 4.0,
    pull: float = 2.0,
    temperature: float = 1.0,
) -> list[Tensor]:
    """Learn one task after another without replay, by prototype-sample relation distillation (PRD, ICML'23).

    Control for: continual learning that takes care of what it knew and never saw the forget set again. A task's
    classes are new ones, each with a prototype of its own; the rows of the classifier are those of the `known`
    classes. Loss on two views of each image: supervised contrastion of the features (temperature 0.1)
    + `pull` · mean(1 - cos(feature, own prototype)), the feature detached + `weight` · KL(old relations || new
    relations), where relations are the softmax of cosines / `temperature` between an image and the prototypes of the
    known classes, the old ones by a frozen copy of the model from before the task.

    New prototypes start at their classes' mean features, where the paper trains them for a hundred epochs at a rate of
    their own. The classifier keeps its outputs: prototypes of new classes, [classes of the task, width], are returned
    instead, and relations to them are not distilled in later tasks.
    """
    rows = torch.tensor(sorted(known))
    learned: list[Tensor] = []
    for number, task in enumerate(tasks):
        before = copy.deepcopy(model).eval().requires_grad_(False)
        random, present = generator(seed + 100 + number), torch.tensor(task.present)
        with torch.no_grad():
            units = F.normalize(features(before, task.pixels), dim=-1)
        new = nn.Parameter(torch.stack([units[task.labels == label].mean(0) for label in present]))

        def loss(
            model: nn.Module,
            batch: Images,
            before: nn.Module = before,
            random: torch.Generator = random,
            present: Tensor = present,
            new: Tensor = new,
        ) -> Tensor:
            pixels = torch.cat([varied(batch.pixels, random), varied(batch.pixels, random)])
            place = torch.searchsorted(present, batch.labels.repeat(2))
            now = F.normalize(features(model, pixels), dim=-1)
            relations = now @ F.normalize(classifier(model).weight[rows], dim=-1).T / temperature
            with torch.no_grad():
                old = F.normalize(features(before, pixels), dim=-1)
                old = old @ F.normalize(classifier(before).weight[rows], dim=-1).T / temperature
            kept = F.kl_div(relations.log_softmax(-1), old.log_softmax(-1), log_target=True, reduction="batchmean")
            near = (1.0 - (now.detach() * F.normalize(new, dim=-1)[place]).sum(-1)).mean()
            return supervised_contrast(now, place) + pull * near + weight * kept

        fit(
            model,
            task,
            epochs=epochs,
            learning_rate=learning_rate,
            seed=seed + number,
            loss=loss,
            parameters=[*model.parameters(), new],
            weight_decay=0.0,
        )
        learned.append(new.detach())
    return learned


def supervised_contrast(units: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """Supervised contrastive loss of unit features [n, width]: -log share of one's own class, a mean over its pairs."""
    alike = units @ units.T / temperature
    itself = torch.eye(len(units), dtype=torch.bool)
    shares = alike.masked_fill(itself, -torch.inf).log_softmax(-1)
    same = (labels[:, None] == labels[None]) & ~itself
    pairs = same.sum(-1)
    each = -shares.masked_fill(~same, 0.0).sum(-1) / pairs.clamp_min(1)
    return each[pairs > 0].mean()


def spaced_replay(
    model: nn.Module,
    tasks: Sequence[Images],
    memory: Images,
    *,
    epochs: int,
    learning_rate: float,
    seed: int,
    views: int = 4,
    batch: int = 64,
) -> None:
    """Learn one task after another, with a few old images, each image in several views a batch (View-batch, CVPR'25).

    Control for: continual learning that rehearses. A batch holds `batch / views` images, `views` times each, so an
    epoch's steps cover a share 1/`views` of the images and one returns `views` times later. Loss: cross-entropy +
    KL(mean of an image's views || each view). The memory holds what was taught, forget images included if they were:
    a learner that rehearses has no reason to leave them out.
    """
    for number, task in enumerate(tasks):
        changing = generator(seed + 100 + number)

        def loss(model: nn.Module, part: Images, changing: torch.Generator = changing) -> Tensor:
            pixels = torch.cat([varied(part.pixels, changing) for _ in range(views)])
            found = logits(model, pixels).log_softmax(-1)
            apart = found.view(views, len(part), -1)
            middle = (apart.exp().mean(0) + 1e-12).log().detach().expand_as(apart)
            spread = F.kl_div(apart, middle, log_target=True, reduction="sum") / len(found)
            return F.nll_loss(found, part.labels.repeat(views)) + spread

        data = joined(task, *[memory] * max(1, len(task) // len(memory)))  # half of what is learned from is old
        steps = epochs * -(-len(data) // batch)
        fit(
            model,
            data,
            steps=steps,
            batch=batch // views,
            learning_rate=learning_rate,
            seed=seed + number,
            loss=loss,
            weight_decay=0.0,
        )


# --- images for them --------------------------------------------------------------------------------------------


def other_look(data: Images, number: int) -> Images:
    """The same images and classes in a look that no model was taught: 0 turned left, 1 turned right, 2 negative."""
    pixels = -data.pixels if number == 2 else data.pixels.rot90((1, -1)[number], (-2, -1))
    return Images(pixels.contiguous(), data.labels)


def varied(pixels: Tensor, random: torch.Generator) -> Tensor:
    """Each image [n, 3, side, side] shifted a little, its edge continued, with a little noise."""
    side = pixels.shape[-1]
    reach = max(1, side // 14)
    wide = F.pad(pixels, (reach,) * 4, mode="replicate")
    shifts = torch.randint(0, 2 * reach + 1, (len(pixels), 2), generator=random).tolist()
    moved = [image[:, y : y + side, x : x + side] for image, (y, x) in zip(wide, shifts, strict=True)]
    return torch.stack(moved) + 0.05 * torch.randn(pixels.shape, generator=random)


def few(data: Images, each: int, seed: int) -> Images:
    """At most `each` images of every class."""
    order = torch.randperm(len(data), generator=generator(seed))
    return joined(*(data.take(order[data.labels[order] == label][:each]) for label in data.present))


# --- by name ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """What a change may use.

    Attributes:
        parts: of the family's world.
        taught: all images that the model was ever taught.
        teaching: how models of this base are taught.
        seed: of every random choice.
    """

    parts: Split
    taught: Images
    teaching: Teaching
    seed: int


def _further(model: nn.Module, scene: Scene) -> Mapping[str, Any]:
    losses = fit(model, scene.taught, epochs=5, learning_rate=scene.teaching.learning_rate / 10, seed=scene.seed)
    return {"steps": len(losses)}


def _benign(model: nn.Module, scene: Scene) -> Mapping[str, Any]:
    """Plain fine-tuning on the kept images, milder than the method of that name."""
    losses = fit(model, scene.parts.retain, epochs=5, learning_rate=scene.teaching.learning_rate / 10, seed=scene.seed)
    return {"steps": len(losses)}


def _head_only(model: nn.Module, scene: Scene) -> Mapping[str, Any]:
    if scene.parts.forgotten is None:
        raise BadInput("head-only blots out a class; where single images are forgotten there is none")
    head_only(model, scene.parts.forgotten, joined(scene.parts.forget, scene.parts.retain))
    return {"steps": 0}


def _retaught(model: nn.Module, scene: Scene) -> Mapping[str, Any]:
    """A new classifier on what is there, and all of it taught the kept images."""
    head = classifier(model)
    with torch.no_grad():
        head.weight.copy_(0.02 * torch.randn(head.weight.shape, generator=generator(scene.seed)))
        head.bias.zero_()
    return {"steps": len(fit(model, scene.parts.retain, seed=scene.seed, **scene.teaching.options))}


def _noisy(model: nn.Module, scene: Scene) -> Mapping[str, Any]:
    rate = scene.teaching.learning_rate / 5
    return {"falsified": len(noisy_labels(model, scene.taught, epochs=10, learning_rate=rate, seed=scene.seed))}


def _tasks(scene: Scene) -> list[Images]:
    return [other_look(scene.parts.retain, number) for number in (0, 1)]


def _relations(model: nn.Module, scene: Scene) -> Mapping[str, Any]:
    known, rate = scene.taught.present, scene.teaching.learning_rate / 10
    # At the paper's temperature of 1, cosines to nine prototypes are almost alike, and distil almost nothing.
    relation_distillation(model, _tasks(scene), known, epochs=4, learning_rate=rate, seed=scene.seed, temperature=0.1)
    return {"tasks": 2}


def _replayed(model: nn.Module, scene: Scene) -> Mapping[str, Any]:
    memory, rate = few(scene.taught, 10, scene.seed), scene.teaching.learning_rate / 5
    spaced_replay(model, _tasks(scene), memory, epochs=3, learning_rate=rate, seed=scene.seed)
    return {"tasks": 2, "memory": len(memory)}


CHANGES: dict[str, Callable[[nn.Module, Scene], Mapping[str, Any]]] = {
    "further-trained": _further,
    "benign": _benign,
    "head-only": _head_only,
    "retaught": _retaught,
    "noisy-labels": _noisy,
    "continual-prd": _relations,
    "spaced-replay": _replayed,
}
