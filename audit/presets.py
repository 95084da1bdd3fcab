"""How the published benchmarks lay out their rows: which column holds what, and what must be unfolded first.

A preset maps an example's fields (`FIELDS`) to column names. `fit` finds the preset for the columns of a
file. Where a benchmark's rows need more than renaming (MMLU's answer is an index, RWKU's query has a blank),
the preset's `reshape` turns a row as published into one whose columns can be read as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from audit.errors import BadInput

Row = Mapping[str, Any]

FIELDS = ("prompt", "answer", "paraphrases", "wrong", "entity", "group")
AUTO = "auto"

# TOFU publishes each question once, marked with the smallest forget split it belongs to.
TOFU_SPLITS: Mapping[str, tuple[str, ...]] = {
    "forget01": ("forget01",),
    "forget05": ("forget01", "forget05"),
    "forget10": ("forget01", "forget05", "forget10"),
    "retain90": ("retain90",),
    "retain95": ("retain90", "forget10"),
    "retain99": ("retain90", "forget10", "forget05"),
}
TOFU_MARKS = frozenset(mark for marks in TOFU_SPLITS.values() for mark in marks)
TOFU_QUESTIONS_PER_AUTHOR = 20


class CellError(ValueError):
    """A cell that cannot be used; the loader adds the file and the row."""

    def __init__(self, column: str, problem: str) -> None:
        super().__init__(f"column {column!r} {problem}")


def _as_published(row: Row) -> Row:
    return row


@dataclass(frozen=True)
class Preset:
    """One benchmark layout: field -> column; every column is required unless its field is `optional`."""

    name: str
    columns: Mapping[str, str]
    optional: frozenset[str] = frozenset()
    separator: str = ""  # of the lists that the benchmark keeps in one string
    reshape: Callable[[Row], Row] = _as_published
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    pictures: bool = False  # of images, which lie in the column `image`

    def requires(self, name: str) -> bool:
        """Whether every row must hold this field; what a caller adds to the preset may have gaps."""
        return name in ("prompt", "answer") or (name in self.columns and name not in self.optional)

    def fields(self, columns: Collection[str], explicit: Mapping[str, str]) -> dict[str, str] | None:
        """Field -> column for a file with these columns, or None where a required column is absent."""
        if self.pictures and "image" not in columns:
            return None
        chosen = {**self.columns, **explicit}
        needed = (column for name, column in chosen.items() if self.requires(name))
        return chosen if all(column in columns for column in needed) else None

    def any_of(self, column: str, wanted: Collection[str], present: Collection[str]) -> set[str]:
        """The cell values that a row filter stands for: itself, or the parts that nest in a split."""
        # Splits nest where the smallest has rows of its own; else (all 400 of them "forget10", or a row
        # marked "retain95") the marks already mean the whole.
        if column != "split" or "forget01" not in present or not TOFU_MARKS.issuperset(present):
            return set(wanted)
        return {mark for value in wanted for mark in self.splits.get(value, (value,))}


def _tofu(row: Row) -> Row:
    """Name the author of a `*_perturbed` row, which carries only its place among TOFU's 4000 questions."""
    index = _index(row.get("row"))
    if "author" in row or "perturbed_answer" not in row or index is None:
        return row
    return {**row, "author": f"author_{index // TOFU_QUESTIONS_PER_AUTHOR + 1}"}


def _rwku(row: Row) -> Row:
    """Say of a cloze query that it is one, as RWKU's evaluation does: its blank may stand mid-sentence."""
    query = row.get("query")
    if row.get("type") != "cloze" or not isinstance(query, str):
        return row
    return {**row, "query": "Fill in the blank: " + query}


def _mmlu(row: Row) -> Row:
    """Replace the answer's index by its text, and the choices by the wrong ones."""
    choices, index = listed(row.get("choices")), _index(row.get("answer"))
    if not isinstance(choices, list):
        raise CellError("choices", "is not a list")
    if index is None or index >= len(choices):
        raise CellError("answer", f"is {row.get('answer')!r}, no index into the {len(choices)} choices")
    return {**row, "answer": choices[index], "choices": choices[:index] + choices[index + 1 :]}


def _index(value: Any) -> int | None:
    """A whole number from 0, also one spelled in digits: CSV has no types."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value.strip()):
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def listed(value: Any) -> Any:
    """The list that a string spells in JSON, else the value: CSV has no other way to hold a list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return parsed if isinstance(parsed, list) else value
    return value


_QA = {"prompt": "question", "answer": "answer"}
_ALTERNATIVES = frozenset({"paraphrases", "wrong", "entity", "group"})

# "auto" takes the first that fits, so the more demanding layouts come first. A benchmark with two layouts
# has two rows under one name.
PRESETS: tuple[Preset, ...] = (
    Preset("mmlu", {**_QA, "wrong": "choices"}, reshape=_mmlu),
    Preset(
        "truthfulqa",
        {"prompt": "Question", "answer": "Best Answer", "wrong": "Incorrect Answers"},
        separator=";",
    ),
    Preset(
        "counterfact",
        {"prompt": "prompt", "answer": "ground_truth", "wrong": "target_new", "entity": "subject"},
    ),
    Preset("facts", {"prompt": "prompt", "answer": "attribute", "entity": "subject"}),
    Preset("rwku", {"prompt": "query", "answer": "answer", "entity": "subject"}, reshape=_rwku),
    Preset("rwku", {"answer": "text", "entity": "subject"}),
    Preset(
        "tofu",
        {**_QA, "entity": "author", "paraphrases": "paraphrased_answer", "wrong": "perturbed_answer"},
        optional=_ALTERNATIVES,
        reshape=_tofu,
        splits=TOFU_SPLITS,
    ),
    Preset("muse", _QA),
    Preset("dusk", _QA),
    Preset("dusk", {"prompt": "prompt", "answer": "gt"}),
    # The project's own names, for sets that are no published benchmark.
    Preset("plain", {name: name for name in FIELDS}, optional=_ALTERNATIVES),
    Preset("text", {"answer": "text", "entity": "entity"}, optional=_ALTERNATIVES),
    Preset("images", {"answer": "label", "group": "group", "entity": "entity"}, optional=_ALTERNATIVES, pictures=True),
)
PRESET_NAMES: tuple[str, ...] = tuple(dict.fromkeys(preset.name for preset in PRESETS))


def fit(name: str, columns: Collection[str], explicit: Mapping[str, str]) -> tuple[Preset, dict[str, str]]:
    """The preset for a file with these columns, and its field -> column map.

    Columns named explicitly override the preset's; where they name both prompt and answer and no preset is
    asked for, nothing is left to guess and they stand alone. Raises BadInput where nothing fits.
    """
    absent = [column for column in explicit.values() if column not in columns]
    if absent:
        raise BadInput(f"no column {absent[0]!r}; columns: {', '.join(columns)}")
    if name == AUTO and {"prompt", "answer"} <= explicit.keys():
        return Preset("columns", explicit, optional=_ALTERNATIVES), dict(explicit)
    for preset in PRESETS:
        if name in (AUTO, preset.name) and (fields := preset.fields(columns, explicit)) is not None:
            return preset, fields
    tried = [
        f"{p.name} ({', '.join(c for f, c in p.columns.items() if f not in p.optional)})"
        for p in PRESETS
        if name in (AUTO, p.name)
    ]
    raise BadInput(f"no preset fits the columns {', '.join(columns)}; presets: {'; '.join(tried)}")
