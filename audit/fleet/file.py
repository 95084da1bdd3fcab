"""`fleet.toml`: which models are audited on which cases.

    name = "spring audit"

    [sets]                              # of every case
    retain = "data/retain.jsonl"

    [options]                           # of every case
    budget = "quick"

    [[cases]]
    name = "authors"
    sets = { forget = "data/authors.jsonl", holdout = "data/never.jsonl" }
    options = { template = "qa" }

    [[models]]
    target = "models/npo-*"             # every folder that fits: a model each
    original = "models/original"        # theirs all

Sets and options are written as in `case.toml`. A case adds its own to those of every case; without `[[cases]]` there is
one, of the fleet's name. Relative paths are relative to the file.
"""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from audit.case import ROLES, Case, Options, parse_sets
from audit.errors import BadInput
from audit.instrument import load
from audit.loaders import SetSpec
from audit.toml_file import read_toml


@dataclass(frozen=True)
class Plan:
    """What the jobs of one case have in common: all but the models."""

    name: str
    specs: Mapping[str, SetSpec]
    options: Options


@dataclass(frozen=True)
class Job:
    """One model on one case."""

    model: str
    models: Mapping[str, Path]
    plan: Plan

    @property
    def name(self) -> str:
        """Of the job, and of the case that its record names."""
        return f"{self.plan.name}/{self.model}"

    @property
    def folder(self) -> str:
        """Where its results lie below the fleet's: its name, if every letter of it is harmless in an address."""
        return f"{_harmless(self.plan.name)}/{_harmless(self.model)}"

    def case(self) -> Case:
        """The case, its sets loaded."""
        return Case.build(self.models, self.plan.specs, self.plan.options, self.name)


@dataclass(frozen=True)
class Fleet:
    """What one file says."""

    name: str
    jobs: tuple[Job, ...]


def read_fleet(path: Path) -> Fleet:
    """The jobs of a `fleet.toml`, case after case, models in the file's order and by name where a pattern names them.

    Raises:
        BadInput: unreadable, not TOML, a key or value that means nothing here, a folder that is not there, a pattern
            that fits none, or two models or cases of one name.
    """
    raw = read_toml(path)
    try:
        said = _File.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(f"{path}: {_place(first['loc'])}: {first['msg']}") from None
    name = said.name or path.stem
    plans = _plans(said, name, path)
    models = list(_models(said, path))
    cases = {plan.name for plan in plans}
    for number, (entry, _, _) in enumerate(models, start=1):
        for wanted in entry.cases or ():
            if wanted not in cases:
                raise BadInput(f"{path}: [[models]] {number} cases: no case {wanted!r} (known: {', '.join(cases)})")
    jobs = [
        Job(model, roles, plan)
        for plan in plans
        for entry, model, roles in models
        if entry.cases is None or plan.name in entry.cases
    ]
    if not jobs:
        raise BadInput(f"{path}: no model is on any case, so there is nothing to audit")
    return Fleet(name, tuple(jobs))


# --- the file's shape -----------------------------------------------------------------------------------------


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Case(_Table):
    name: str = Field(min_length=1)
    sets: dict[str, Any] = {}
    options: dict[str, Any] = {}


class _Models(_Table):
    target: str | list[str]
    original: str | None = None
    retrained: str | None = None
    name: str | None = Field(default=None, min_length=1)
    cases: list[str] | None = None


class _File(_Table):
    name: str = ""
    sets: dict[str, Any] = {}
    options: dict[str, Any] = {}
    cases: list[_Case] | None = Field(default=None, min_length=1)
    models: list[_Models] = Field(min_length=1)


def _place(loc: tuple[int | str, ...]) -> str:
    """Where in the file: `[[models]] 2 original`."""
    words = [f"[[{part}]]" if part in ("models", "cases") and i == 0 else part for i, part in enumerate(loc)]
    return " ".join(str(word + 1) if isinstance(word, int) else word for word in words)


def _plans(said: _File, name: str, path: Path) -> list[Plan]:
    shared = parse_sets(said.sets, path)
    Options.parse(said.options, f"{path}: [options]")  # a fault in it is its own, not a case's
    plans: dict[str, Plan] = {}
    for case in said.cases or [_Case(name=name)]:
        where = f"[[cases]] {case.name!r}"
        if case.name in plans:
            raise BadInput(f"{path}: {where}: a second case of this name")
        options = Options.parse({**said.options, **case.options}, f"{path}: {where} options")
        for instrument in (*options.only, *options.skip):
            load(instrument)  # an unknown one is named now, not once a job
        plans[case.name] = Plan(case.name, shared | parse_sets(case.sets, path, f"{where}: "), options)
    return list(plans.values())


def _models(said: _File, path: Path) -> Iterator[tuple[_Models, str, dict[str, Path]]]:
    """Each model of each entry: the entry, the model's name, and its folders by role."""
    seen: dict[str, Path] = {}
    for number, entry in enumerate(said.models, start=1):
        where = f"{path}: [[models]] {number}"
        patterns = [entry.target] if isinstance(entry.target, str) else entry.target
        base = path.parent.resolve()  # other nodes have another working directory
        found = [folder for pattern in patterns for folder in _folders(pattern, base, f"{where} target")]
        if entry.name is not None and len(found) > 1:
            raise BadInput(f"{where} name: {entry.name!r} would be that of {len(found)} models")
        given = {"original": entry.original, "retrained": entry.retrained}
        others = {role: (base / folder).resolve() for role, folder in given.items() if folder is not None}
        for role, folder in others.items():
            if not folder.is_dir():
                raise BadInput(f"{where} {role}: {folder}: no such folder")
        for target in found:
            model = entry.name or target.name
            if model in seen:
                both = f"{seen[model]} and {target}"
                raise BadInput(f"{where}: two models named {model!r}, {both}: give one of them a name")
            seen[model] = target
            roles = {"target": target, **others}
            yield entry, model, {role: roles[role] for role in ROLES if role in roles}


def _folders(pattern: str, base: Path, where: str) -> Sequence[Path]:
    """The folder of this very name, or all that fit it as a pattern, by name."""
    if (base / pattern).is_dir():
        return [(base / pattern).resolve()]
    if not glob.has_magic(pattern):
        raise BadInput(f"{where}: {base / pattern}: no such folder")
    found = sorted(glob.glob(pattern, root_dir=base, recursive=True))  # noqa: PTH207 (Path's takes no absolute pattern)
    folders = [(base / name).resolve() for name in found if (base / name).is_dir()]
    if not folders:
        raise BadInput(f"{where}: no folder fits {pattern!r}")
    return folders


def _harmless(name: str) -> str:
    """`name`, or what is left of it and a few digits of its digest: never a step out of the folder, nor another's."""
    if re.fullmatch(r"[A-Za-z0-9_+-][A-Za-z0-9._+-]{0,99}", name):
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9_+-]', '_', name)[:60]}-{digest}"
