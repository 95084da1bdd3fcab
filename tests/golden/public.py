"""What others build on, as text that can be compared: the Python they import, the commands they type, the record.

Public is what the documentation imports, and `CORE`. A line a thing, so that a change can be read in a diff.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from typer.main import get_command

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
API, COMMANDS, SCHEMA = HERE / "api.txt", HERE / "commands.txt", HERE / "record.schema.json"
CORE = {
    "audit.case": ("Case", "Options", "read_case"),
    "audit.errors": ("AuditError", "BadInput", "Refused", "NoAccess", "Incomplete"),
    "audit.evidence": ("Evidence",),
    "audit.instrument": ("Access", "Attack", "Instrument", "Stage", "load", "names"),
    "audit.inventory": ("Inventory", "take_inventory"),
    "audit.loaders": ("Example", "SetSpec", "load_set", "parse_set_spec"),
    "audit.offline": ("network_closed",),
    "audit.plan": ("Generate", "Patched", "Request", "Weights"),
    "audit.policy": ("check", "read_policy"),
    "audit.record": ("Finding", "Record", "json_schema"),
    "audit.scan": ("scan",),
    "audit.target": ("Target",),
    "reports.html": ("render_html", "write_report"),
}


# --- Python ---------------------------------------------------------------------------------------------------


def public() -> dict[str, set[str]]:
    """Names by module: those of `CORE`, and all that a code block of the documentation imports."""
    found = {module: set(names) for module, names in CORE.items()}
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for block in re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL):
            for module, names in re.findall(
                r"^from ((?:audit|probes|detectors|attacks|reports)\S*) import (.+)$", block, re.M
            ):
                found.setdefault(module, set()).update(name.strip() for name in names.split(","))
    return found


def api() -> list[str]:
    """`module.name(parameters)` of everything public, of classes with their public methods; sorted."""
    return sorted(line for module, names in public().items() for name in names for line in _lines(module, name))


def _lines(module: str, name: str) -> Iterator[str]:
    thing, where = getattr(importlib.import_module(module), name), f"{module}.{name}"
    if not isinstance(thing, type):
        yield where + (_signature(thing) if callable(thing) else "")
    elif issubclass(thing, Enum):
        yield from (f"{where}.{member}" for member in thing.__members__)
    else:
        yield where + ("" if issubclass(thing, BaseModel) else _signature(thing))
        for each, value in vars(thing).items():
            value = getattr(value, "__func__", value)
            if not each.startswith("_") and (callable(value) or isinstance(value, property)):
                yield f"{where}.{each}" + (_signature(value) if callable(value) else "")


def _signature(thing: Any) -> str:
    """Parameters by name, with `=` where they may be left out."""
    try:
        parameters = inspect.signature(thing).parameters.values()
    except ValueError:
        return "()"
    texts, starred = [], False
    for each in parameters:
        if each.kind is each.KEYWORD_ONLY and not starred:
            texts.append("*")
        starred = starred or each.kind in (each.KEYWORD_ONLY, each.VAR_POSITIONAL)
        stars = {each.VAR_POSITIONAL: "*", each.VAR_KEYWORD: "**"}.get(each.kind, "")
        texts.append(f"{stars}{each.name}{'' if each.default is each.empty else '='}")
    return f"({', '.join(texts)})"


@dataclass(frozen=True)
class Parameter:
    """One parameter of a line of `api`."""

    name: str
    place: int | None  # None: by keyword alone
    optional: bool


def parameters(line: str) -> dict[str, Parameter] | None:
    """Those of a line of `api`; None where it is no function."""
    name, bracket, rest = line.partition("(")
    if not bracket:
        return None
    found: dict[str, Parameter] = {}
    by_place = True
    for i, text in enumerate(filter(None, rest.removesuffix(")").split(", "))):
        by_place = by_place and not text.startswith("*")
        if text != "*":
            loose = text.endswith("=") or text.startswith("*")
            found[text.rstrip("=")] = Parameter(text.rstrip("="), i if by_place else None, loose)
    return found


def broken_calls(old: str, new: str) -> list[str]:
    """Why what calls the old line could not call the new one."""
    before, after = parameters(old), parameters(new)
    if before is None or after is None:
        return [] if before is after else ["is another kind of thing"]
    said = []
    for name, was in before.items():
        now = after.get(name)
        if now is None:
            said.append(f"takes no {name} any more")
        elif was.place is not None and now.place != was.place:
            said.append(f"takes {name} at another place")
        elif was.optional and not now.optional:
            said.append(f"cannot do without {name} any more")
    said += [
        f"cannot do without the new {name}" for name, now in after.items() if name not in before and not now.optional
    ]
    return said


# --- commands -------------------------------------------------------------------------------------------------


def commands() -> list[str]:
    """`command option type default` of every parameter of every command; sorted."""
    import cli

    return sorted(_parameters(get_command(cli.app), ()))


def _parameters(command: Any, path: tuple[str, ...]) -> Iterator[str]:
    for name, each in getattr(command, "commands", {}).items():
        yield from _parameters(each, (*path, name))
    if path:
        yield " ".join(path)
    for each in command.params if path else ():
        if each.name == "help":
            continue
        named = "/".join(each.opts) if each.param_type_name == "option" else (each.metavar or each.name or "").upper()
        default = str(each.default) if isinstance(each.default, Path) else each.default
        said = "required" if each.required else f"default {default!r}"
        yield f"{' '.join(path)} {named} {inspect.formatannotation(each.type_descriptor.annotation)} {said}"


# --- the record -----------------------------------------------------------------------------------------------


def schema() -> Any:
    """The record's JSON schema, without descriptions, which may say the same better."""
    from audit.record import json_schema

    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: bare(v) for k, v in value.items() if k != "description" or isinstance(v, dict)}
        return [bare(each) for each in value] if isinstance(value, list) else value

    return bare(json_schema())


def broken_schema(old: Any, new: Any, where: str = "") -> list[str]:
    """What an older record, or who reads a newer one, could rely on, and can no more: what went, or is another.

    Fields may come, if they have a default; values of an enumeration may too.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        said = [f"{where}/{key} is gone" for key in old if key not in new]
        for key in old.keys() & new.keys():
            said += broken_schema(old[key], new[key], f"{where}/{key}")
        required = (
            set(new.get("required", ())) - set(old.get("required", ()))
            if isinstance(new.get("required"), list)
            else set()
        )
        return said + [f"{where}: {name} is required, and was not" for name in sorted(required)]
    if isinstance(old, list) and isinstance(new, list):
        if where.endswith("/required"):
            return []
        return [f"{where} has no {json.dumps(each)} any more" for each in old if each not in new]
    return [] if old == new else [f"{where} is {json.dumps(new)}, and was {json.dumps(old)}"]
