"""Example sets: what an audit asks a model about, read from files and unified into one shape.

    from audit.loaders import load_set, parse_set_spec

    forget = load_set("forget", parse_set_spec("full.jsonl?split=forget10&limit=40"))
    forget.examples[0].prompt, forget.examples[0].answer

JSONL, JSON (a list of objects, or one under "data"), CSV, TSV, Parquet, plain text and folders written by
`Dataset.save_to_disk` are read (`audit.readers`). The columns of the known benchmarks are recognised
(`audit.presets`). A row that cannot be used stops the load: its BadInput names file, row and column. Nothing is
repaired or skipped in silence, for an audit that quietly lost rows would report on a set that nobody named.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from audit.errors import BadInput
from audit.pictures import Picture
from audit.presets import AUTO, FIELDS, PRESET_NAMES, CellError, Preset, Row, fit, listed
from audit.readers import Placed, read_rows

UNANSWERED = "suspects"
"""The set whose rows need no answer: queries of which nobody says what should be answered."""


@dataclass(frozen=True)
class Example:
    """One thing to ask: a question and its answer, a prefix and its continuation, or a plain passage."""

    id: str  # stable within the set: "<set name>:<index>"
    prompt: str  # context that is not scored; "" for plain passages
    answer: str  # the text whose knowledge is tested
    paraphrases: tuple[str, ...] = ()  # other phrasings of the true answer
    wrong: tuple[str, ...] = ()  # wrong answers: perturbed ones, distractors
    entity: str = ""  # unit of independence (author, person, document); "" makes the row its own
    source: str = ""  # "file:line", or "file: row N" where the format has no lines
    group: str = ""  # a property that may stand in for the answer, such as the background of an image
    picture: Picture | None = None  # what is shown instead of a prompt; the answer is its class


@dataclass(frozen=True)
class ExampleSet:
    """Examples in file order, with the SHA-256 of their content: the same rows in any format agree in it."""

    name: str
    source: str
    examples: tuple[Example, ...]
    digest: str

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    @property
    def entities(self) -> int:
        """How many independent units there are; rows without an entity count singly."""
        return len(set(self.clusters()))

    def clusters(self) -> list[str]:
        """For each row the unit it belongs to: its entity, or its own id."""
        return [example.entity or example.id for example in self.examples]


@dataclass(frozen=True)
class SetSpec:
    """Where a set lies and which of its rows and columns are meant. Raises BadInput on a bad option."""

    path: Path
    preset: str = AUTO
    columns: Mapping[str, str] = field(default_factory=dict)  # field of Example -> column, over the preset's
    where: Mapping[str, str | list[str]] = field(default_factory=dict)  # column -> value, or any of several
    limit: int | None = None  # rows at most, after `where` and `offset`
    passage_words: int = 100  # plain text is cut into passages of so many words
    offset: int = 0  # rows passed over, after `where`

    def __post_init__(self) -> None:
        if self.preset not in (AUTO, *PRESET_NAMES):
            raise BadInput(f"{self.path}: no preset {self.preset!r}; presets: {', '.join(PRESET_NAMES)}")
        for name in self.columns:
            if name not in FIELDS:
                raise BadInput(f"{self.path}: no field {name!r} in columns; fields: {', '.join(FIELDS)}")
        for name, least in (("limit", 1), ("offset", 0), ("passage_words", 1)):
            number = getattr(self, name)
            if number is not None and number < least:
                raise BadInput(f"{self.path}: {name}={number} is less than {least}")


def parse_set_spec(text: str, base: Path = Path()) -> SetSpec:
    """A set as written on the command line: `path` or `path?split=forget01&limit=40&preset=tofu`.

    `limit`, `offset`, `passage_words`, `preset` and `columns` (`columns=prompt:question,answer:gold`) are
    options; any other key is a column, and its value, or one of its comma-separated values, what a row must
    hold there. `%2C` and the like stand for characters that would otherwise separate.
    """
    path, _, query = text.partition("?")
    if not path:
        raise BadInput(f"{text!r} names no file")
    options: dict[str, Any] = {}
    where: dict[str, str | list[str]] = {}
    for part in query.split("&") if query else ():
        key, equals, value = part.partition("=")
        key, values = unquote(key), [unquote(item) for item in value.split(",")]
        if not key or not equals:
            raise BadInput(f"{text!r}: {part!r} is not of the form key=value")
        if key in options or key in where:
            raise BadInput(f"{text!r}: {key!r} is given twice")
        if key in ("limit", "offset", "passage_words"):
            if not re.fullmatch(r"[0-9]{1,9}", value):
                raise BadInput(f"{text!r}: {key}={value} is not a whole number")
            options[key] = int(value)
        elif key == "preset":
            options[key] = unquote(value)
        elif key == "columns":
            pairs = [item.partition(":") for item in values]
            if not all(name and column for name, _, column in pairs):
                raise BadInput(f"{text!r}: columns={value} is not of the form field:column,field:column")
            options[key] = {name: column for name, _, column in pairs}
        else:
            where[key] = values[0] if len(values) == 1 else values
    return SetSpec(path=base / path, where=where, **options)


def load_set(name: str, spec: SetSpec) -> ExampleSet:
    """Read the set that `spec` describes; raises BadInput, one line that names file, row and column at fault."""
    try:
        return _load(name, spec)
    except BadInput as error:
        raise BadInput(_one_line(str(error))) from None


def _load(name: str, spec: SetSpec) -> ExampleSet:
    rows = read_rows(spec.path, spec.passage_words)
    if name == UNANSWERED:
        rows = [_asked(placed) for placed in rows]
    columns = list(dict.fromkeys(column for placed in rows for column in placed.row))
    try:
        preset, fields = fit(spec.preset, columns, spec.columns)
    except BadInput as error:
        raise BadInput(f"{spec.path}: {error}") from None
    kept = _where(rows, spec, preset, columns)
    if "prompt" not in fields and not preset.pictures:
        # Files of passages separate them by blank rows (WikiText does); those hold nothing to ask.
        text = fields["answer"]
        kept = [placed for placed in kept if placed.row.get(text) is None or not _blank(placed.row[text])]
    total = len(kept)
    kept = kept[spec.offset :][: spec.limit]
    if not kept:
        raise BadInput(f"{spec.path}: no row is left: offset={spec.offset}, of {total} that are not blank")
    unanswered = name == UNANSWERED
    examples = tuple(_example(f"{name}:{i}", placed, preset, fields, unanswered) for i, placed in enumerate(kept))
    return ExampleSet(name=name, source=str(spec.path), examples=examples, digest=digest(examples))


def digest(examples: Iterable[Example]) -> str:
    """SHA-256 over what the examples say, in order; neither their ids nor where they were read count."""
    content = [
        [e.prompt, e.answer, e.paraphrases, e.wrong, e.entity, *filter(None, (e.group, e.picture and e.picture.digest))]
        for e in examples
    ]
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode("ascii")).hexdigest()


def overlaps(sets: Mapping[str, ExampleSet]) -> list[str]:
    """A note for each pair of sets that share rows; case, spacing and Unicode form make no difference."""
    keys = {name: [_key(example) for example in each] for name, each in sets.items()}
    notes = []
    for first, second in combinations(keys, 2):
        known = set(keys[second])
        if shared := sum(key in known for key in keys[first]):
            notes.append(f"{_rows(shared)} of {first} also in {second}")
    return notes


def oddities(sets: Mapping[str, ExampleSet]) -> list[str]:
    """A note for whatever makes a set weigh less than its rows: a leaked holdout, repeats, one unit, one answer."""
    keys = {name: [_key(example) for example in each] for name, each in sets.items()}
    notes = []
    for name, each in sets.items():
        if repeated := len(each) - len(set(keys[name])):
            notes.append(f"{repeated} of {_rows(len(each))} of {name} repeat an earlier one")
        if each.entities == 1:
            rows = "one row" if len(each) == 1 else f"{len(each)} rows, all of one entity"
            notes.append(f"{name} holds {rows}: with one independent unit no test can be significant")
        if len(each) > 1 and len({answer for _, answer, _ in keys[name]}) == 1 and (said := each.examples[0].answer):
            notes.append(f"all {len(each)} rows of {name} have the same answer: {_one_line(said, 60)}")
        if name == "holdout":
            known = {key for taught in ("forget", "retain") for key in keys.get(taught, ())}
            if leaked := sum(key in known for key in keys[name]):
                notes.append(f"{leaked} of {_rows(len(each))} of holdout lie in what was taught: no control of those")
    return notes


def _rows(number: int) -> str:
    return "1 row" if number == 1 else f"{number} rows"


def _one_line(text: str, limit: int = 2000) -> str:
    """A message or a cell for one line: what is not printable is escaped, what is too long is cut."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: limit + 1])
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _key(example: Example) -> tuple[str, str, str | None]:
    shown = example.picture.digest if example.picture else None
    return _normal(example.prompt), _normal(example.answer), shown


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


# --- rows to examples -------------------------------------------------------------------------------------


def _where(rows: list[Placed], spec: SetSpec, preset: Preset, columns: list[str]) -> list[Placed]:
    kept = rows
    for column, value in spec.where.items():
        if column not in columns:
            raise BadInput(f"{spec.path}: no column {column!r} to filter by; columns: {', '.join(columns)}")
        present = {label for placed in rows if (label := _label(placed.row.get(column))) is not None}
        wanted = preset.any_of(column, [value] if isinstance(value, str) else value, present)
        # A value that no row has is more likely misspelt than meant.
        if missing := sorted(wanted - present):
            found = ", ".join(sorted(present)[:12]) + (", …" if len(present) > 12 else "")
            raise BadInput(f"{spec.path}: no row has {column}={missing[0]}; its values: {found}")
        kept = [placed for placed in kept if _label(placed.row.get(column)) in wanted]
    if not kept:
        raise BadInput(f"{spec.path}: no row has all of {', '.join(spec.where)} as asked for")
    return kept


def _asked(placed: Placed) -> Placed:
    """A row that need not hold an answer: without one it has an empty one."""
    return placed if not _absent(placed.row.get("answer")) else placed._replace(row={**placed.row, "answer": ""})


def _label(value: Any) -> str | None:
    """A cell as a row filter sees it; None for what it cannot name."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, str | int | float) else None


def _example(id_: str, placed: Placed, preset: Preset, fields: Mapping[str, str], unanswered: bool) -> Example:
    try:
        row = preset.reshape(placed.row)
        for name, column in fields.items():
            if preset.requires(name):
                _require(row, column, blank=name == "prompt" or unanswered)
        cells = {name: (row.get(column), column) for name, column in fields.items()}
        if unanswered and all(_blank(row[fields[name]]) for name in ("prompt", "answer") if name in fields):
            raise CellError(fields["prompt"], "is empty")
        nothing = (None, "")
        entity, column = cells.get("entity", nothing)
        group, grouped_by = cells.get("group", nothing)
        return Example(
            id=id_,
            prompt=_string(*cells["prompt"]) if "prompt" in cells else "",
            answer=_string(*cells["answer"]),
            paraphrases=_strings(*cells.get("paraphrases", nothing), preset.separator),
            wrong=_strings(*cells.get("wrong", nothing), preset.separator),
            entity="" if _absent(entity) else _string(entity, column),
            source=placed.place,
            group="" if _absent(group) else _string(group, grouped_by),
            picture=shown if isinstance(shown := row.get("image"), Picture) else None,
        )
    except CellError as error:
        raise BadInput(f"{placed.place}: {error}") from None


def _require(row: Row, column: str, blank: bool) -> None:
    if column not in row:
        raise CellError(column, "is missing")
    if _blank(row[column]):
        if not blank:
            raise CellError(column, "is empty")
    elif _absent(row[column]):
        raise CellError(column, "is null" if row[column] is None else "is null (NaN)")


def _blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def _absent(value: Any) -> bool:
    """Null, NaN (how tables spell null in a column of numbers) or blank (how CSV spells it)."""
    return value is None or _blank(value) or (isinstance(value, float) and math.isnan(value))


def _string(value: Any, column: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise CellError(column, f"holds a {type(value).__name__} where text is expected")
    if isinstance(value, float) and not math.isfinite(value):
        raise CellError(column, f"holds {value}, which is no text and no number")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        # JSON can spell half a surrogate pair, which no tokenizer and no file can take.
        raise CellError(column, "holds half a surrogate pair, which is not text") from None
    return text


def _strings(value: Any, column: str, separator: str) -> tuple[str, ...]:
    if _absent(value):
        return ()
    value = listed(value)
    if separator and isinstance(value, str):
        value = [part.strip() for part in value.split(separator)]
    items = value if isinstance(value, list) else [value]
    return tuple(_string(item, column) for item in items if not _absent(item))
