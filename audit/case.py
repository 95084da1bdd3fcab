"""The case: which models, which example sets, which options. `case.toml` and the flags say the same things.

    name = "my audit"

    [models]
    target = "models/unlearned"
    original = "models/original"        # optional: before unlearning
    retrained = "models/retrained"      # optional: trained without the forget set
    # a model behind an API: target = { endpoint = "http://127.0.0.1:8000/v1", model = "name" }

    [sets]
    forget = "data/forget.jsonl"        # or "full.jsonl?split=forget01&limit=40&preset=tofu"
    retain = { path = "data/retain.csv", columns = { prompt = "q", answer = "a" }, limit = 200 }

    [options]
    seed = 0
    budget = "standard"

Relative paths are relative to the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from audit.endpoint.address import Endpoint
from audit.errors import BadInput
from audit.instrument import Access
from audit.inventory import Inventory, take_inventory
from audit.loaders import Example, ExampleSet, SetSpec, load_set, oddities, overlaps, parse_set_spec
from audit.memory import parse_bytes
from audit.toml_file import read_toml

ROLES = ("target", "original", "retrained")
SETS = ("forget", "retain", "holdout", "neighbor", "utility", "relearn", "suspects")


class Budget(StrEnum):
    """How much an audit may cost; decides how many rows and how many attack steps."""

    QUICK = "quick"
    STANDARD = "standard"
    THOROUGH = "thorough"

    @property
    def rows(self) -> int:
        """Rows a set, at most."""
        return {"quick": 120, "standard": 400, "thorough": 10**9}[self.value]


@dataclass(frozen=True)
class Options:
    """What changes what is measured, or how.

    Attributes:
        seed: of every random choice.
        budget: see `Budget`.
        access: what the auditor may use.
        template: how a prompt becomes text: auto, chat, qa, plain, or a string with {prompt}.
        device: auto, cpu or cuda.
        dtype: float32, bfloat16 or float16.
        only, skip: instruments by name.
        memory: bytes that the audit may take, see `audit.memory`; None: as many as it needs.
        allow: files of a model folder that are let pass, and why, see `audit.allowed`.
    """

    seed: int = 0
    budget: Budget = Budget.STANDARD
    access: Access = Access.WEIGHTS
    template: str = "auto"
    device: str = "auto"
    dtype: str = "float32"
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    memory: int | None = None
    allow: tuple[str, ...] = ()

    @classmethod
    def parse(cls, raw: Mapping[str, Any], where: str) -> Options:
        """Options from TOML or flags; unknown names and values are bad input."""
        known = {f.name for f in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in raw.items():
            if key not in known:
                raise BadInput(f"{where}: unknown option {key!r} (known: {', '.join(sorted(known))})")
            values[key] = _option(key, value, where)
        return cls(**values)

    def dump(self) -> dict[str, str | int | float | bool | None]:
        """As plain values, for the record; a bound on memory only where there is one."""
        raw = self.said()
        raw |= {"budget": self.budget.value, "access": self.access.name.lower()}
        return raw | {name: ",".join(raw[name]) for name in ("only", "skip", "allow")}

    def said(self) -> dict[str, Any]:
        """All options that say something, by name."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}


def _option(key: str, value: Any, where: str) -> Any:
    choices: dict[str, list[str]] = {
        "budget": [b.value for b in Budget],
        "access": [a.name.lower() for a in Access],
        "device": ["auto", "cpu", "cuda"],
        "dtype": ["float32", "bfloat16", "float16"],
    }
    if key in choices:
        if value not in choices[key]:
            raise BadInput(f"{where}: {key} {value!r} is none of {', '.join(choices[key])}")
        return {"budget": Budget, "access": lambda v: Access[v.upper()]}.get(key, str)(value)
    if key == "seed":
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise BadInput(f"{where}: seed {value!r} is no whole number of at least 0")
        return value
    if key == "memory":
        return None if value is None else parse_bytes(value, where)
    if key in ("only", "skip", "allow"):
        names = [name for name in value.split(",") if name] if isinstance(value, str) else value
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise BadInput(f"{where}: {key} {value!r} is no list of names")
        return tuple(names)
    if key == "template" and not isinstance(value, str):
        raise BadInput(f"{where}: template {value!r} is no text")
    if key == "template" and value not in ("auto", "chat", "qa", "plain") and "{prompt}" not in value:
        raise BadInput(f"{where}: template {value!r} holds no {{prompt}} and is none of auto, chat, qa, plain")
    return value


@dataclass(frozen=True)
class Case:
    """What is audited, loaded and checked."""

    name: str
    models: Mapping[str, Path | Endpoint]
    specs: Mapping[str, SetSpec]
    sets: Mapping[str, ExampleSet]
    options: Options
    notes: tuple[str, ...] = field(default=())
    _taken: dict[str, Inventory] = field(default_factory=dict, init=False, repr=False, compare=False)

    def inventory(self, role: str, progress: Callable[[int, int], None] | None = None) -> Inventory:
        """What lies in a model's folder now, by `take_inventory`, with the exceptions of this case."""
        self._taken[role] = take_inventory(self.folder(role), progress, self.options.allow)
        return self._taken[role]

    def inventoried(self, role: str) -> Inventory:
        """The inventory that was taken last, for what comes later in the same scan: hashing gigabytes takes seconds.

        Raises:
            Refused: the folder is not what was inventoried.
        """
        if role not in self._taken:
            return self.inventory(role)
        self._taken[role].refuse_changes()
        return self._taken[role]

    def rows(self, name: str, limit: int | None = None) -> tuple[Example, ...]:
        """The rows of a set that the budget (or `limit`) allows: whole entities drawn by seed, in file order."""
        examples = self.sets[name].examples
        limit = min(limit or self.options.budget.rows, self.options.budget.rows)
        if len(examples) <= limit:
            return examples
        clusters = np.array(self.sets[name].clusters())
        entities = np.unique(clusters)
        np.random.default_rng(self.options.seed).shuffle(entities)
        kept: set[str] = set()
        count = 0
        sizes = dict(zip(*np.unique(clusters, return_counts=True), strict=True))
        for entity in entities:
            if count + sizes[entity] <= limit:
                kept.add(str(entity))
                count += int(sizes[entity])
        if not kept:  # every entity is larger than the limit: the first drawn of the smallest
            kept.add(str(min(entities, key=sizes.__getitem__)))
        return tuple(e for e, c in zip(examples, clusters, strict=True) if c in kept)

    def folder(self, role: str) -> Path:
        """Where a role's model lies. Raises BadInput if it lies behind an API."""
        place = self.models[role]
        if isinstance(place, Endpoint):
            raise BadInput(f"needs a model folder, and the {role} is behind an API ({place.url})")
        return place

    @property
    def modality(self) -> str:
        """`image` if the sets hold images, else `text`."""
        return "image" if any(row.picture for examples in self.sets.values() for row in examples) else "text"

    @staticmethod
    def clusters(rows: tuple[Example, ...]) -> list[str]:
        """Per row, the unit of independence: its entity, or itself."""
        return [row.entity or row.id for row in rows]

    @classmethod
    def build(
        cls,
        models: Mapping[str, Path | Endpoint],
        specs: Mapping[str, SetSpec],
        options: Options,
        name: str = "",
    ) -> Case:
        """Load the sets and note what rows they share, and what else makes them weigh less.

        Raises:
            BadInput: no target, an unknown set name, or a set that cannot be loaded.
        """
        if "target" not in models:
            raise BadInput("no target model: name a model folder, or [models] target in the case")
        unknown = [name for name in specs if name not in SETS]
        if unknown:
            raise BadInput(f"unknown set {unknown[0]!r} (known: {', '.join(SETS)})")
        sets = {name: load_set(name, specs[name]) for name in SETS if name in specs}
        images = [name for name, rows in sets.items() if any(row.picture for row in rows)]
        if images and (texts := [name for name in sets if name not in images]):
            raise BadInput(
                f"set {images[0]!r} holds images, set {texts[0]!r} does not: an audit is of one kind of model"
            )
        ordered = {role: models[role] for role in ROLES if role in models}
        notes = (*overlaps(sets), *oddities(sets))
        return cls(name or models["target"].name, ordered, dict(specs), sets, options, notes)

    def to_toml(self) -> str:
        """The case as resolved: absolute paths, every option."""
        lines = [f"name = {_toml(self.name)}", "", "[models]"]
        for role, place in self.models.items():
            lines.append(f"{role} = {_toml(place.dump() if isinstance(place, Endpoint) else str(place.resolve()))}")
        lines += ["", "[sets]"]
        for name, spec in self.specs.items():
            table = {
                "path": str(spec.path.resolve()),
                "preset": spec.preset,
                "passage_words": spec.passage_words,
            }
            extra = {"columns": dict(spec.columns), "where": dict(spec.where)}
            extra |= {"limit": spec.limit, "offset": spec.offset or None}
            lines.append(f"{name} = {_toml(table | {k: v for k, v in extra.items() if v})}")
        options = self.options.said()
        options |= {"budget": self.options.budget.value, "access": self.options.access.name.lower()}
        lines += ["", "[options]", *(f"{key} = {_toml(value)}" for key, value in options.items())]
        return "\n".join(lines) + "\n"


def read_case(path: Path) -> tuple[str, dict[str, Path | Endpoint], dict[str, SetSpec], dict[str, Any]]:
    """Name, models, sets and raw options of a `case.toml`, paths resolved against its folder.

    Raises:
        BadInput: unreadable, not TOML, or a table, role or key that no case has.
    """
    raw = read_toml(path)
    unknown = sorted(set(raw) - {"name", "models", "sets", "options"})
    if unknown:
        raise BadInput(f"{path}: unknown key {unknown[0]!r} (known: name, models, sets, options)")
    for table in ("models", "sets", "options"):
        if not isinstance(raw.get(table, {}), dict):
            raise BadInput(f"{path}: [{table}] must be a table")
    models: dict[str, Path | Endpoint] = {}
    for role, value in raw.get("models", {}).items():
        if role not in ROLES or not isinstance(value, str | dict):
            raise BadInput(f"{path}: [models] {role} = {value!r}: a role is one of {', '.join(ROLES)}, a path a string")
        if isinstance(value, dict):
            models[role] = Endpoint.parse(value, f"{path}: [models] {role}", path.parent)
        else:
            models[role] = path.parent / value
    specs = parse_sets(raw.get("sets", {}), path)
    return str(raw.get("name", "")), models, specs, dict(raw.get("options", {}))


def parse_sets(raw: Mapping[str, Any], path: Path, where: str = "") -> dict[str, SetSpec]:
    """The sets of a table of the file `path`, which lies `where` in it; paths are resolved against its folder.

    Raises:
        BadInput: an unknown set, or a specification that is none.
    """
    specs: dict[str, SetSpec] = {}
    for name, value in raw.items():
        if name not in SETS:
            raise BadInput(f"{path}: {where}unknown set {name!r} (known: {', '.join(SETS)})")
        try:
            specs[name] = _spec(value, path, f"{where}[sets] {name}")
        except BadInput as error:
            text = str(error)
            raise BadInput(text if text.startswith(str(path)) else f"{path}: {where}[sets] {name}: {text}") from None
    return specs


def _spec(value: Any, path: Path, where: str) -> SetSpec:
    if isinstance(value, str):
        return parse_set_spec(value, path.parent)
    if not isinstance(value, dict) or not isinstance(value.get("path"), str):
        raise BadInput(f"{path}: {where} must be a string or a table with a path")
    known = {f.name for f in fields(SetSpec)}
    unknown = sorted(set(value) - known)
    if unknown:
        raise BadInput(f"{path}: {where}: unknown key {unknown[0]!r} (known: {', '.join(sorted(known))})")
    for key, item in value.items():
        whole = key in ("limit", "offset", "passage_words")
        kind = int if whole else dict if key in ("columns", "where") else str
        if not isinstance(item, kind) or isinstance(item, bool):
            raise BadInput(f"{path}: {where}: {key} = {item!r} is no {'whole number' if whole else kind.__name__}")
    return replace(SetSpec(path.parent / value["path"]), **{k: v for k, v in value.items() if k != "path"})


def _toml(value: Any) -> str:
    """A value as TOML. JSON strings are TOML basic strings once DEL and surrogates are out of the way."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_toml(str(k))} = {_toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
