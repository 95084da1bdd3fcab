"""Files to rows: every format that texts come in, each row with its place as error messages name it.

A file comes from anybody: it may be of another encoding than it should be, cut off, a pipe that never ends, a few
bytes that unpack to a terabyte. Whatever cannot be read as it stands is a BadInput that names the file and, where
there is one, the line or row; nothing is guessed.
"""

from __future__ import annotations

import csv
import io
import json
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from audit.errors import BadInput
from audit.pictures import MOST_BYTES, holds_pictures, image_column, read_pictures, with_picture
from audit.presets import Row

_MOST_ROWS = 10_000_000
"""Of a Parquet file, where a run of equal rows takes no room."""


class Placed(NamedTuple):
    """A row and where it lies, as error messages name it: "file:line" or "file: row N"."""

    place: str
    row: Row


def read_rows(path: Path, passage_words: int = 100) -> list[Placed]:
    """The rows of a file or folder; plain text is cut into passages of `passage_words` words.

    Raises:
        BadInput: it cannot be read, is of no known format, is damaged, or holds no rows.
    """
    try:
        _ordinary(path)
        if path.suffix.lower() == ".txt" and not path.is_dir():
            rows = list(_passages(path, passage_words))
        else:
            rows = list(_reader(path)(path))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or ' '.join(str(error).split())}") from None
    except MemoryError:
        raise BadInput(f"{path}: cannot be read: its rows do not fit into memory") from None
    if not rows:
        raise BadInput(f"{path}: holds no rows")
    return rows


def _reader(path: Path) -> Callable[[Path], Iterable[Placed]]:
    if holds_pictures(path):
        return _pictures
    reader = _saved_dataset if path.is_dir() else _READERS.get(path.suffix.lower())
    if reader is None:
        raise BadInput(f"{path}: no reader for {path.suffix!r}; known: {', '.join(_READERS)}, .txt, a saved dataset")
    return reader


def _ordinary(path: Path) -> None:
    """Refuse what is neither file nor folder: to open a pipe is to wait for ever, a device has no end."""
    try:
        str(path).encode()
        found = path.stat()
    except ValueError:  # bytes that are not UTF-8, or a NUL, which no system call takes
        raise BadInput(f"{path}: cannot be read: its name is not text") from None
    if stat.S_ISDIR(found.st_mode):
        for part in path.rglob("*"):
            if not part.is_file() and not part.is_dir():
                raise BadInput(f"{part}: is neither a file nor a folder")
    elif not stat.S_ISREG(found.st_mode):
        raise BadInput(f"{path}: is neither a file nor a folder")
    elif found.st_size > MOST_BYTES:
        raise BadInput(f"{path}: {found.st_size} bytes are more than a set may hold, {MOST_BYTES}")


def _text(path: Path) -> str:
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    # No set begins with a NUL or has one among its first letters, and UTF-16 of English is valid UTF-8.
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data[:4]:
        raise BadInput(f"{path}:1: is not UTF-8 but, from its first bytes, UTF-16 or UTF-32, or no text")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadInput(f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8") from None


class _Twice(ValueError):
    """A name that an object gives twice, of which the parser would keep the last."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise _Twice(_twice(name for name, _ in pairs))
    return row


def _twice(names: Iterable[str]) -> str:
    """Says which name comes twice; empty where none does."""
    return next((f"column {name!r} is named twice" for name, times in Counter(names).items() if times > 1), "")


def _json(text: str, path: Path, first_line: int = 1) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise BadInput(f"{path}:{first_line + error.lineno - 1}: not JSON: {error.msg}") from None
    except _Twice as error:
        raise BadInput(f"{path}:{first_line}: {error}") from None
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, brackets 100,000 deep
        raise BadInput(f"{path}:{first_line}: not usable JSON: {error}") from None


def _jsonl(path: Path) -> Iterator[Placed]:
    # Not splitlines(), which also cuts at separators that JSON allows within a string.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            yield _object(f"{path}:{number}", _json(line, path, number))


def _json_list(path: Path) -> Iterator[Placed]:
    text = _text(path)
    value = _json(text, path) if text.strip() else []
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise BadInput(f'{path}: is neither a list of objects nor {{"data": [...]}}')
    for number, row in enumerate(rows, start=1):
        yield _object(f"{path}: row {number}", row)


def _object(place: str, value: Any) -> Placed:
    if not isinstance(value, dict):
        raise BadInput(f"{place}: is a {type(value).__name__}, not an object")
    return Placed(place, value)


def _csv(path: Path) -> Iterator[Placed]:
    # The module's limit of 128 KiB a cell is below the length of a book chapter; it can only be set globally.
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(_text(path), newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    line = 1  # a quoted cell may span lines: a row lies where it begins
    try:
        for cells in reader:
            place, line = f"{path}:{line}", reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = cells
                if twice := _twice(header):
                    raise BadInput(f"{place}: {twice}")
            elif len(cells) != len(header):
                raise BadInput(f"{place}: has {len(cells)} cells under {len(header)} columns")
            elif [cell.removeprefix("\ufeff") for cell in cells] == header:  # files set end to end
                raise BadInput(f"{place}: names the columns again")
            else:
                yield Placed(place, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise BadInput(f"{path}:{line}: not CSV: {error}") from None


def _parquet(path: Path) -> Iterator[Placed]:
    import pyarrow
    import pyarrow.parquet

    try:
        # Straight from Arrow, for pandas would turn whole numbers beside a null into floats; and from the
        # open file, for a folder named "key=value" in its path would be taken for a column.
        with path.open("rb") as source:
            file = pyarrow.parquet.ParquetFile(source)
            about = file.metadata
            size = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
            if about.num_rows > _MOST_ROWS or size > MOST_BYTES:
                raise BadInput(f"{path}: {about.num_rows} rows, {size} bytes: more than a set may hold")
            if twice := _twice(file.schema_arrow.names):
                raise BadInput(f"{path}: {twice}")
            column = image_column(file.schema_arrow)
            table = file.read()
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # damage that Arrow itself did not notice
        raise BadInput(f"{path}: not Parquet: {' '.join(str(error).split())}") from None
    for number, cells in enumerate(zip(*table.columns, strict=True), start=1):
        place = f"{path}: row {number}"
        row = {name: _cell(cell, name, place) for name, cell in zip(table.column_names, cells, strict=True)}
        yield Placed(place, row if column is None else with_picture(row, column, place))


def _cell(cell: Any, column: str, place: str) -> Any:
    try:
        return cell.as_py()
    except (ValueError, OverflowError, LookupError) as error:  # no text, beyond the year 9999, an index into nothing
        raise BadInput(f"{place}: column {column!r} cannot be read: {error}") from None


def _pictures(path: Path) -> Iterator[Placed]:
    yield from (Placed(*placed) for placed in read_pictures(path))


def _saved_dataset(path: Path) -> Iterator[Placed]:
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(p.parent.name for p in path.glob("*/state.json")))
        raise BadInput(f"{path}: holds several splits, name the folder of one: {splits}")
    if not (path / "state.json").is_file():
        raise BadInput(f"{path}: is a folder, but not one that Dataset.save_to_disk wrote")
    import datasets

    try:
        # Without its format: a set saved "with torch" hands over tensors.
        rows = datasets.load_from_disk(str(path)).with_format(None).to_list()
    except OSError:
        raise
    except Exception as error:  # the library raises whatever its damaged metadata runs into
        raise BadInput(f"{path}: not a readable dataset: {' '.join(str(error).split())}") from None
    for number, row in enumerate(rows, start=1):
        yield Placed(f"{path}: row {number}", row)


def _passages(path: Path, passage_words: int) -> Iterator[Placed]:
    """Runs of `passage_words` words, the space within them as it is; a last one below half is left out."""
    # CRLF becomes LF, as in any text-mode read: what a model was trained on does not depend on the checkout.
    text = _text(path).replace("\r\n", "\n")
    words = [match.span() for match in re.finditer(r"\S+", text)]
    line, counted = 1, 0
    for index, first in enumerate(range(0, len(words), passage_words)):
        run = words[first : first + passage_words]
        if index and 2 * len(run) < passage_words:
            return
        start, end = run[0][0], run[-1][1]
        line, counted = line + text.count("\n", counted, start), start
        yield Placed(f"{path}:{line}", {"text": text[start:end], "entity": f"{path.name}#{index}"})


_READERS: Mapping[str, Callable[[Path], Iterable[Placed]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json_list,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
