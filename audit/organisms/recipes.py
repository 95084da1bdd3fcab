"""Recipes of organisms: base x history x seed, built once and kept.

    folder = build(Recipe("llama", "npo", seed=0), Path("organisms"))

Every organism is an ordinary Hugging Face folder plus `organism.json`, its true history. Organisms of one base and
seed live in one world and descend from one original (or from one retrained model), so a comparison between them
differs by history alone. An organism that other histories start from is built first, and found again by its recipe's
digest; a folder whose digest no longer matches is built anew.

Labels are what was done, never what a detector says of it:

- `not-unlearned`: taught the forget facts, and nothing was done about them
- `deleted`: never taught them (some of these look edited: the same refusal edit as the suppressed ones)
- `suppressed`: taught them, and edited in a way that provably leaves the knowledge in place
- `unlearned`: taught them, then treated by a published method; whether suppressed or deleted is left open

An organism whose making failed (diverged, did not learn, destroyed what it should have kept) is kept with the reason
under `broken`, and stays out of every pool.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from audit.errors import BadInput
from audit.organisms import unlearn
from audit.organisms.demo import demo_sets, measure, write_jsonl
from audit.organisms.train import HISTORY, Diverged, Progress, encode, new_model, save, train, word_tokenizer
from audit.organisms.world import GROUPS, Group, Row, World, make_world
from audit.target import quiet

VERSION = 1
"""Raised when a change of this module changes what a recipe makes."""

BASES = ("llama", "gpt-neox")
_EPOCHS, _LR, _BATCH = 8, 1.4e-3, 64
_KEPT: tuple[Group, ...] = ("retain", "public", "unknown")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What determines an organism."""

    base: str
    history: str
    seed: int

    @property
    def name(self) -> str:
        """As its folder is called."""
        return f"{self.base}-{self.history}-{self.seed}"

    @property
    def digest(self) -> str:
        """SHA-256 of the recipe, the version of this module and the history's settings: 16 hex digits."""
        settings = repr(HISTORIES[self.history]) if self.history in HISTORIES else _settings(self.history)
        text = json.dumps([VERSION, asdict(self), settings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class History:
    """How an organism comes about.

    Attributes:
        label: what it is, by construction.
        taught: the groups of people it was taught from scratch; empty if it descends from another organism.
        parent: the history it starts from.
        method: the unlearning method applied to the parent, by name.
        order: added to the seed of the data order, so that two organisms can differ by it alone.
        reseed: start from other random weights than the original.
    """

    label: str
    taught: tuple[Group, ...] = ()
    parent: str = ""
    method: str = ""
    order: int = 0
    reseed: bool = False


HISTORIES: dict[str, History] = {
    "original": History("not-unlearned", taught=("forget", *_KEPT)),
    "retrained": History("deleted", taught=_KEPT, order=1),
    "retrained-other-seed": History("deleted", taught=_KEPT, order=2, reseed=True),
    "never-taught": History("deleted", taught=("public", "unknown"), order=3),
    "retrained-then-refusal": History("deleted", parent="retrained", method="refusal-last-block"),
}
"""The histories that are no method alone; every method of `methods/` is one too, applied to the original."""


def histories() -> list[str]:
    """Names of all histories: those that teach, and one for every unlearning method."""
    return [*HISTORIES, *unlearn.names()]


def history_of(name: str) -> History:
    """A history by name. Raises `BadInput` if there is none."""
    if name in HISTORIES:
        return HISTORIES[name]
    return History(label=unlearn.load(name).label, parent="original", method=name)


def recipes(bases: tuple[str, ...] = BASES, seeds: tuple[int, ...] = (0,)) -> list[Recipe]:
    """All recipes on these bases and seeds, parents before their descendants."""
    return [Recipe(base, history, seed) for base in bases for seed in seeds for history in histories()]


@dataclass(frozen=True)
class Family:
    """What organisms of one base and seed share: the world, its sets, the tokenizer and the initial weights."""

    base: str
    seed: int

    @cached_property
    def world(self) -> World:
        """The people and what is true of them."""
        return make_world(self.seed)

    @cached_property
    def sets(self) -> dict[str, list[Row]]:
        """The example sets of an audit."""
        return demo_sets(self.world)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """One token a word."""
        return word_tokenizer(self.world.words())

    def untaught(self, seed: int) -> PreTrainedModel:
        """A model with random weights."""
        return new_model(self.tokenizer, seed=seed, architecture=self.base)

    def write_sets(self, root: Path) -> dict[str, Path]:
        """The sets as files, for the cases that scan this family."""
        folder = root / f"{self.base}-data-{self.seed}"
        return {
            name: path if (path := folder / f"{name}.jsonl").is_file() else write_jsonl(path, rows)
            for name, rows in self.sets.items()
        }


def build(recipe: Recipe, root: Path, progress: Callable[[str, int, int], None] | None = None) -> Path:
    """The organism's folder, made now if it does not exist yet; its parents first.

    Raises:
        BadInput: no such base or history.
    """
    if recipe.base not in BASES:
        raise BadInput(f"no base named {recipe.base!r} (known: {', '.join(BASES)})")
    history = history_of(recipe.history)
    folder = root / recipe.name
    if (known := read_history(folder)) is not None and known["recipe_digest"] == recipe.digest:
        return folder
    parent = build(Recipe(recipe.base, history.parent, recipe.seed), root, progress) if history.parent else None
    show = (lambda done, total: progress(recipe.name, done, total)) if progress else None
    family = Family(recipe.base, recipe.seed)
    made = _make(recipe, history, family, parent, show)
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


def _make(recipe: Recipe, history: History, family: Family, parent: Path | None, show: Progress | None) -> _Made:
    story: dict[str, Any] = {
        "schema": "palimpsest/organism/2",
        "recipe": asdict(recipe),
        "recipe_digest": recipe.digest,
        "label": history.label,
        "history": asdict(history),
        "broken": None,
    }
    order = 1000 * recipe.seed + history.order
    if parent is None:
        model = family.untaught(recipe.seed + (500 if history.reseed else 0))
        rows = family.world.rows(*(group for group in GROUPS if group in history.taught), every=True)
        data = encode(family.tokenizer, rows)
        losses = train(model, data, epochs=_EPOCHS, lr=_LR, batch=_BATCH, seed=order, progress=show)
        story |= {"steps": len(losses), "rows": len(rows)}
    else:
        reference = _open(parent)
        model = copy.deepcopy(reference)
        story["parent"] = {"name": parent.name, "sha256": _digest(parent / "model.safetensors")}
        try:
            story |= _unlearn(model, reference, history, family, order + 500, show)
        except Diverged as error:
            model, story["broken"] = reference, f"diverged: {error}"
    measured = measure(model, family.tokenizer, family.sets)
    story |= {"measured": measured, "broken": story["broken"] or _fault(history, measured)}
    return _Made(model, story)


def _unlearn(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    history: History,
    family: Family,
    seed: int,
    show: Progress | None,
) -> dict[str, Any]:
    method = unlearn.load(history.method)
    bench = unlearn.Bench(
        model,
        reference,
        family.tokenizer,
        family.world.rows("forget", every=True),
        family.world.rows(*_KEPT, every=True),
        family.sets["forget"],
        family.sets["retain"],
        seed=seed,
    )
    run = method.unlearn(bench, method.schedule, show)
    return {"steps": run.steps, "stopped": "both goals met" if run.stopped else "step limit"}


def _fault(history: History, measured: Mapping[str, float]) -> str | None:
    """Why an organism is not what it was made to be, by what it answers; None if it is."""
    if "retain" in history.taught and measured["retain_accuracy"] < 0.95:
        return f"did not learn: retain accuracy {measured['retain_accuracy']:.2f}"
    if history.method and measured["retain_accuracy"] < 0.8:
        return f"destroyed: retain accuracy {measured['retain_accuracy']:.2f}"
    if history.label in ("suppressed", "unlearned") and measured["forget_accuracy"] > 0.5:
        return f"nothing came of it: forget accuracy {measured['forget_accuracy']:.2f}"
    return None


def _open(folder: Path) -> PreTrainedModel:
    with quiet():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype="float32", local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    return model.eval()


def _settings(history: str) -> str:
    return repr(unlearn.load(history).schedule) + repr(unlearn.load(history))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
