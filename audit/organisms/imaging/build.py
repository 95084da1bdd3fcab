"""Recipes of image organisms: world x base x history x seed, built once and kept.

    folder = build(ImageRecipe("vit", "head-only", seed=0), Path("organisms"))
    sets = parts_of(recipe)[1].write_sets(Path("sets"))

As `audit.organisms.recipes` does for text: every organism is an ordinary Hugging Face folder plus `organism.json`, its
true history; organisms of one world, base and seed descend from one original (or one retrained model); a folder whose
recipe's digest no longer matches is built anew; what failed is kept with the reason under `broken`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from audit.errors import BadInput
from audit.organisms.imaging import methods
from audit.organisms.imaging.controls import CHANGES, Scene
from audit.organisms.imaging.histories import BY_CLASS, History, history_of
from audit.organisms.imaging.method import Ground
from audit.organisms.imaging.train import TEACHING, accuracy, fit, new_classifier, open_classifier, save
from audit.organisms.imaging.world import ImageWorld, Split, digits, from_npz, joined, split
from audit.organisms.recipes import read_history, weight_distance
from audit.organisms.train import Diverged

VERSION = 1
"""Raised when a change of this package, methods apart, changes what a recipe makes."""


@dataclass(frozen=True, slots=True)
class ImageRecipe:
    """What determines an organism.

    Attributes:
        base: "vit" or "resnet".
        history: by name.
        seed: of the split, the weights, the order of the images and every random choice.
        world: "digits", or an .npz of images.
        kind: what is forgotten: a "class", or single images ("instance").
        short: teach for this share of the usual epochs; for trials.
    """

    base: str
    history: str
    seed: int
    world: str = "digits"
    kind: str = "class"
    short: float = 1.0

    @property
    def name(self) -> str:
        """As its folder is called."""
        world = Path(self.world).stem.split("_")[0] + ("" if self.kind == "class" else "-instance")
        return f"{self.base}-{world}-{self.history}-{self.seed}"

    @property
    def digest(self) -> str:
        """SHA-256 of all that determines the organism, its parents' recipes and its method's source included."""
        history = history_of(self.history)
        settings = [VERSION, self.base, self.seed, _world_digest(self.world), self.kind, self.short, repr(history)]
        if history.parent:
            settings.append(replace(self, history=history.parent).digest)
        if history.method:
            method = methods.load(history.method)
            settings += [str(vars(method)), _methods_digest()]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


@cache
def _methods_digest() -> str:
    """Of the source of all methods, for they stand on one another: a change of one makes all anew."""
    sources = sorted(Path(methods.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


@cache
def _world_digest(world: str) -> str:
    """Of the file's bytes. Raises `BadInput` where there is none."""
    if world == "digits":
        return world
    try:
        return hashlib.sha256(Path(world).read_bytes()).hexdigest()
    except OSError as error:
        raise BadInput(f"no world {world!r} (digits, or an .npz of images): {error.strerror}") from None


def parts_of(recipe: ImageRecipe) -> tuple[ImageWorld, Split]:
    """The recipe's world, and what of it is forgotten, withheld and kept: one and the same for all its family."""
    return _parts(recipe.world, recipe.seed, recipe.kind)


@cache
def _parts(world: str, seed: int, kind: str) -> tuple[ImageWorld, Split]:
    found = digits(seed) if world == "digits" else from_npz(Path(world), seed)
    return found, split(found, seed, kind)


def build(recipe: ImageRecipe, root: Path, progress: Callable[[str, int, int], None] | None = None) -> Path:
    """The organism's folder, made now if it does not exist yet; what it starts from first.

    Raises:
        BadInput: no such base, world or history, or one that makes no sense for single images.
    """
    history = history_of(recipe.history)
    if recipe.kind == "instance" and recipe.history in BY_CLASS:
        raise BadInput(f"{recipe.history} blots out a class; where single images are forgotten there is none")
    folder, digest = root / recipe.name, recipe.digest
    if (known := read_history(folder)) is not None and known["recipe_digest"] == digest:
        return folder
    parent = build(replace(recipe, history=history.parent), root, progress) if history.parent else None
    show = (lambda done, total: progress(recipe.name, done, total)) if progress else None
    model, story = _make(recipe, history, parent, show)
    unfinished = root / f".{recipe.name}.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    save(model, unfinished, story)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return folder


def _make(
    recipe: ImageRecipe, history: History, parent: Path | None, show: Callable[[int, int], None] | None
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    world, parts = parts_of(recipe)
    teaching = TEACHING[recipe.base].shortened(recipe.short)
    order = 1000 * recipe.seed + history.order
    named = {k: v if v is None else world.classes[v] for k, v in vars(parts).items() if k in ("forgotten", "withheld")}
    story: dict[str, Any] = {
        "schema": "palimpsest/image-organism/1",
        "recipe": {**asdict(recipe), "world": world.name},
        "recipe_digest": recipe.digest,
        "label": history.label,
        "history": asdict(history),
        **named,
        "images": {name: len(part) for name, part in parts.parts.items()},
    }

    def fresh(seed: int = recipe.seed + 7000) -> PreTrainedModel:
        return new_classifier(recipe.base, world.side, world.classes, seed)

    broken = None
    if parent is None:
        model = fresh(recipe.seed + (500 if history.reseed else 0))
        data = joined(*(parts.parts[name] for name in history.taught))
        story["steps"] = len(fit(model, data, seed=order, progress=show, **teaching.options))
    else:
        original = open_classifier(parent)
        model = copy.deepcopy(original)
        story["parent"] = {"name": parent.name, "recipe_digest": _told(parent)["recipe_digest"]}
        try:
            if history.method:
                ground = Ground(
                    original.requires_grad_(False),
                    parts.forget,
                    parts.retain,
                    len(world.classes),
                    parts.forgotten,
                    order,
                    fresh,
                )
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(order)
                    methods.load(history.method).unlearn(model, ground)
            else:
                taught = joined(*(parts.parts[name] for name in _taught(recipe.history)))
                story |= CHANGES[history.change](model, Scene(parts, taught, teaching, order))
        except Diverged as error:
            model, broken = copy.deepcopy(original), f"diverged: {error}"
        model.eval()
        if show is not None:
            show(1, 1)
        story["distance"] = weight_distance(model, original)
    measured = {f"{name}_accuracy": accuracy(model, part) for name, part in parts.parts.items()}
    story |= {"measured": measured, "broken": broken or _fault(history, recipe.kind, measured)}
    return model.requires_grad_(True), story


def _taught(name: str) -> tuple[str, ...]:
    """The parts that the first of a history's ancestors was taught."""
    history = history_of(name)
    return history.taught or _taught(history.parent)


def _told(folder: Path) -> dict[str, Any]:
    story = read_history(folder)
    assert story is not None, "just built"
    return story


def _fault(history: History, kind: str, measured: Mapping[str, float]) -> str | None:
    """Why an organism is not what it was made to be, by what it answers; None if it is."""
    retain, forget = measured["retain_accuracy"], measured["forget_accuracy"]
    for part in history.taught:
        if measured[f"{part}_accuracy"] < 0.95:
            return f"did not learn: {part} accuracy {measured[f'{part}_accuracy']:.2f}"
    if history.label != "changed" and not history.taught and retain < 0.8:
        return f"destroyed: retain accuracy {retain:.2f}"
    # A model that never saw single images knows most of them all the same.
    if history.label in ("suppressed", "unlearned") and kind == "class" and forget > 0.5:
        return f"nothing came of it: forget accuracy {forget:.2f}"
    return None
