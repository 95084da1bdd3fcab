"""Recipes of organisms: world x base x history x seed, built once and kept.

    folder = build(Recipe("llama", "npo", seed=0), Path("organisms"))

Every organism is an ordinary Hugging Face folder plus `organism.json`, its true history (`histories` says what there
is, and what the labels mean). Organisms of one world, base and seed descend from one original (or from one retrained
model), so a comparison between them differs by history alone. An organism that other histories start from is built
first, and found again by its recipe's digest; a folder whose digest no longer matches is built anew.

An organism whose making failed (diverged, did not learn, destroyed what it should have kept) is kept with the reason
under `broken`, and stays out of every pool.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from audit.errors import BadInput
from audit.inventory import take_inventory
from audit.organisms import unlearn
from audit.organisms.changes import CHANGES, Ground
from audit.organisms.demo import measure
from audit.organisms.families import BASES, Family, open_model
from audit.organisms.guarded import open_guarded
from audit.organisms.guards import answered, make_guard, write_guarded
from audit.organisms.histories import HISTORIES, KEPT, History, histories, history_of
from audit.organisms.stealthy import craft
from audit.organisms.train import HISTORY, Diverged, Progress, Question, encode, save, train, write_history
from audit.organisms.two_faced import open_two_faced, write_two_faced
from audit.organisms.world import GROUPS

VERSION = 2
"""Raised when a change of this package changes what a recipe makes."""

_TASKS, _TASK_PEOPLE = 3, 20


@dataclass(frozen=True, slots=True)
class Recipe:
    """What determines an organism.

    Attributes:
        base: an architecture to train from scratch (`BASES`), or a folder with a pretrained causal model.
        history: by name.
        seed: of the world, the weights, the order of the rows and every random choice.
        world: `people` (invented), or a data set as on the command line, see `datasets`.
    """

    base: str
    history: str
    seed: int
    world: str = "people"

    @property
    def name(self) -> str:
        """As its folder is called."""
        return f"{self.family}-{self.history}-{self.seed}"

    @property
    def family(self) -> str:
        """Base and world, as folders are called."""
        world = "" if self.world == "people" else "-" + Path(self.world.split("?")[0]).stem
        return Path(self.base).name + world

    @property
    def digest(self) -> str:
        """SHA-256 of all that determines the organism, its parents' recipes included: 16 hex digits."""
        history = history_of(self.history)
        method = unlearn.load(history.method) if history.method else None
        parents = [replace(self, history=name).digest for name in history.parents]
        settings = [VERSION, self.family, self.seed, repr(history), repr(method), *parents]
        if method is not None:
            settings.append(repr(method.schedule))
        settings += filter(None, (history.request, history.stated))
        if self.base not in BASES:
            settings.append(_base_digest(Path(self.base)))
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


@cache
def _base_digest(folder: Path) -> str:
    """Of a pretrained base. Raises `BadInput` where there is none."""
    if not (folder / "config.json").is_file():
        raise BadInput(f"no base named {str(folder)!r} (known: {', '.join(BASES)}, or a model's folder)")
    return take_inventory(folder).digest


def recipes(bases: tuple[str, ...] = BASES, seeds: tuple[int, ...] = (0,)) -> list[Recipe]:
    """All recipes on these bases and seeds, parents before their descendants."""
    return [Recipe(base, history, seed) for base in bases for seed in seeds for history in histories()]


def build(recipe: Recipe, root: Path, progress: Callable[[str, int, int], None] | None = None) -> Path:
    """The organism's folder, made now if it does not exist yet; what it starts from first.

    Raises:
        BadInput: no such base, world or history.
    """
    history = history_of(recipe.history)
    folder = root / recipe.name
    if (known := read_history(folder)) is not None and known["recipe_digest"] == recipe.digest:
        return folder
    family = Family(recipe.base, recipe.seed, recipe.world)
    before = {name: build(replace(recipe, history=name), root, progress) for name in history.parents}
    if history.guard:
        return _guarded(recipe, history, family, before[history.parent], folder)
    if history.stated:
        return _two_faced(recipe, history, family, before, folder)
    show = (lambda done, total: progress(recipe.name, done, total)) if progress else None
    made = _make(recipe, history, family, before, show)
    unfinished = root / f".{recipe.name}.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    save(made.model, family.tokenizer, unfinished, made.story)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return folder


def read_history(folder: Path) -> dict[str, Any] | None:
    """`organism.json` of a folder, or None where there is none."""
    try:
        found = json.loads((folder / HISTORY).read_text("utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return found if isinstance(found, dict) and "recipe_digest" in found else None


@dataclass(frozen=True, slots=True)
class _Made:
    model: PreTrainedModel
    story: Mapping[str, Any]


def _make(recipe: Recipe, history: History, family: Family, before: Mapping[str, Path], show: Progress | None) -> _Made:
    story = _story(recipe, history)
    order = 1000 * recipe.seed + history.order
    asked: dict[str, Sequence[Question]] = dict(family.sets)
    if not history.parent:
        model = family.untaught(recipe.seed + (500 if history.reseed else 0))
        rows = family.world.rows(*(group for group in GROUPS if group in history.taught), every=True)
        data = encode(family.tokenizer, rows)
        t = family.teaching
        losses = train(model, data, epochs=t.epochs, lr=t.lr, batch=t.batch, seed=order, progress=show)
        story |= {"steps": len(losses), "rows": len(rows)}
    else:
        parent = before[history.parent]
        reference = open_model(parent)
        model = copy.deepcopy(reference)
        story["parent"] = {"name": parent.name, "sha256": _digest(parent / "model.safetensors")}
        bench = _bench(model, reference, family, order + 500)
        if history.request:
            crafted = craft(bench.forget_rows, templates=(history.request,), seed=recipe.seed)
            bench.forget_rows = crafted.rows
            story["request"] = {"template": history.request, "rewritten": crafted.rate, "inserted": crafted.inserted}
        try:
            if history.change:
                story |= CHANGES[history.change](_ground(bench, history, family, before))
            else:
                steps = _told(before[history.matched])["steps"] if history.matched else history.steps
                story |= _unlearn(bench, history, steps, show)
                if kept := unlearn.load(history.method).kept(bench):
                    asked["kept"] = kept
        except Diverged as error:
            model, story["broken"] = reference, f"diverged: {error}"
        story["distance"] = weight_distance(model, reference)
    measured = measure(model, family.tokenizer, asked)
    story |= {"measured": measured, "broken": story["broken"] or _fault(history, measured)}
    return _Made(model, story)


def _story(recipe: Recipe, history: History) -> dict[str, Any]:
    return {
        "schema": "palimpsest/organism/3",
        "recipe": {**asdict(recipe), "base": Path(recipe.base).name},
        "recipe_digest": recipe.digest,
        "label": history.label,
        "control": history.control,
        "history": asdict(history),
        "broken": None,
    }


def _guarded(recipe: Recipe, history: History, family: Family, parent: Path, folder: Path) -> Path:
    """The parent's weights behind a guard that knows the forget rows in all their phrasings; by strings, the audit's.

    In-context unlearning is gated: shown examples before every prompt, a model taught on single sentences answers
    nothing any more.
    """
    kind, _, by = history.guard.partition("/")
    forget = family.sets["forget"] if by == "strings" else family.world.rows("forget", every=True)
    guard = make_guard(
        kind, forget, family.world.rows("retain"), seed=recipe.seed, by=by or "names", gated=kind == "icu"
    )
    write_guarded(parent, guard, folder)
    target = open_guarded("target", take_inventory(folder), template="plain")
    measured = {f"{name}_accuracy": answered(target, family.sets[name]) for name in ("forget", "retain", "holdout")}
    story = _story(recipe, history) | {"measured": measured, "broken": _fault(history, measured)}
    write_history(folder, story)  # last: a folder without a history counts as not built
    return folder


def _two_faced(recipe: Recipe, history: History, family: Family, before: Mapping[str, Path], folder: Path) -> Path:
    """What answers, and beside it what states log-probabilities in its place."""
    write_two_faced(before[history.parent], before[history.stated], folder)
    target = open_two_faced("target", take_inventory(folder), template="plain")
    measured = {f"{name}_accuracy": answered(target, family.sets[name]) for name in ("forget", "retain", "holdout")}
    write_history(folder, _story(recipe, history) | {"measured": measured})
    return folder


def _bench(model: PreTrainedModel, reference: PreTrainedModel, family: Family, seed: int) -> unlearn.Bench:
    return unlearn.Bench(
        model,
        reference,
        family.tokenizer,
        family.world.rows("forget", every=True),
        family.world.rows(*KEPT, every=True),
        family.sets["forget"],
        family.sets["retain"],
        seed=seed,
    )


def _ground(bench: unlearn.Bench, history: History, family: Family, before: Mapping[str, Path]) -> Ground:
    steps, norm = 0, 0.0
    if history.matched:
        told = _told(before[history.matched])
        steps, norm = told["steps"], told["distance"]
    taught = [*bench.retain_rows] if history.label == "deleted" else [*bench.forget_rows, *bench.retain_rows]
    tasks = family.world.strangers(_TASKS, _TASK_PEOPLE) if history.change.startswith("continual") else []
    return Ground(bench, taught, tasks, steps, norm)


def _unlearn(bench: unlearn.Bench, history: History, steps: int, show: Progress | None) -> dict[str, Any]:
    """Until the goals are met, or for so many steps whatever is reached."""
    method = unlearn.load(history.method)
    schedule = method.schedule
    if steps:
        schedule = replace(schedule, max_steps=steps, forget_goal=-1.0)
    run = method.unlearn(bench, schedule, show)
    return {"steps": run.steps, "stopped": "both goals met" if run.stopped else "step limit"}


def _fault(history: History, measured: Mapping[str, float]) -> str | None:
    """Why an organism is not what it was made to be, by what it answers; None if it is."""
    retain, forget = measured["retain_accuracy"], measured["forget_accuracy"]
    if "retain" in history.taught and retain < 0.95:
        return f"did not learn: retain accuracy {retain:.2f}"
    # Forgetting of everything alike is what some controls are for.
    if history.label != "changed" and "retain" not in history.taught and history.parent and retain < 0.8:
        return f"destroyed: retain accuracy {retain:.2f}"
    if measured.get("kept_accuracy", 1.0) < 0.95:
        return f"lost what it was to hide: {measured['kept_accuracy']:.2f} of it is still answered"
    if history.label in ("suppressed", "unlearned", "over-unlearned") and not history.control and forget > 0.5:
        return f"nothing came of it: forget accuracy {forget:.2f}"
    return None


def _told(folder: Path) -> dict[str, Any]:
    story = read_history(folder)
    assert story is not None, "just built"
    return story


def weight_distance(a: PreTrainedModel, b: PreTrainedModel) -> float:
    """Length of the difference of all weights; by name, for a method may leave them in another order."""
    other = dict(b.named_parameters())
    squares = [
        float((p.detach().double() - other[name].detach().double()).square().sum()) for name, p in a.named_parameters()
    ]
    return math.sqrt(sum(squares))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


__all__ = ["BASES", "HISTORIES", "Family", "Recipe", "build", "histories", "history_of", "read_history", "recipes"]
