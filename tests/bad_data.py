"""Bad and odd data files, by name: what lies in each, and what must come of it.

A `refused` file ends in one line that begins with the file's path and then `says`: the line, row and column where
there is one. A `loaded` file gives exactly these answers. `SETS` are pairs and more of good files that make a bad
case together, with the notes that must say so. `test_bad_data.py` writes each into an empty folder and loads it.
"""

# ruff: noqa: E501  (a file a line)

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

CANARY = "canary"
"""The file that planted code would make in the folder of its data file."""


@dataclass(frozen=True)
class File:
    """A file (or folder) to be made and loaded, and what must come of it."""

    name: str
    file: str
    content: bytes | Callable[[Path], object]  # or what makes it, given its path
    says: str = ""  # refused: how the message goes on after the path
    answers: Sequence[str] = ()  # loaded: these
    prompts: Sequence[str] | None = None  # and these, where it matters
    query: str = ""  # after the path: `?limit=1`
    role: str = "forget"


def refused(
    name: str, file: str, content: str | bytes | Callable[[Path], object], says: str, query: str = "", role="forget"
):
    assert says.startswith((":", "/"))
    return File(name, file, content.encode() if isinstance(content, str) else content, says, query=query, role=role)


def loaded(name: str, file: str, content: str | bytes | Callable[[Path], object], *answers: str, **more: Any) -> File:
    assert answers
    return File(name, file, content.encode() if isinstance(content, str) else content, answers=answers, **more)


def qa(*answers: Any, **more: Any) -> str:
    """JSONL of questions q0, q1, … and these answers."""
    return "".join(json.dumps({"question": f"q{i}", "answer": a, **more}) + "\n" for i, a in enumerate(answers))


# --- encodings and line ends --------------------------------------------------------------------------------

CSV = "question,answer\nq0,a0\nq1,a1\n"
TEXT = "one two three four\nfive six seven eight\n"
OTHER = ":1: is not UTF-8 but, from its first bytes, UTF-16 or UTF-32, or no text"
OTHERS = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")
LATIN = "question,answer\nq0,a0\nq1,été\n"

ENCODINGS = [
    *(refused(f"JSONL in {code}", "f.jsonl", qa("a0").encode(code), OTHER) for code in OTHERS),
    *(refused(f"CSV in {code}", "f.csv", CSV.encode(code), OTHER) for code in OTHERS),
    *(refused(f"text in {code}", "f.txt", TEXT.encode(code), OTHER) for code in OTHERS),
    refused("JSON in utf-16", "f.json", f"[{qa('a0')}]".encode("utf-16"), OTHER),
    refused("TSV in utf-16", "f.tsv", CSV.replace(",", "\t").encode("utf-16"), OTHER),
    refused("CSV in Latin-1", "f.csv", LATIN.encode("latin-1"), ":3: byte 0xe9 is not UTF-8"),
    refused("CSV in Windows-1252", "f.csv", "question,answer\nq,“a”\n".encode("cp1252"), ":2: byte 0x93 is not UTF-8"),
    refused("JSONL in Shift JIS", "f.jsonl", '{"text": "日本"}'.encode("shift_jis"), ":1: byte 0x93 is not UTF-8"),
    refused("text in KOI8-R", "f.txt", "one\nдва".encode("koi8-r"), ":2: byte 0xc4 is not UTF-8"),
    refused("TSV in Latin-1", "f.tsv", LATIN.replace(",", "\t").encode("latin-1"), ":3: byte 0xe9 is not UTF-8"),
    refused("UTF-8 cut within a letter", "f.txt", "one é".encode()[:-1], ":1: byte 0xc3 is not UTF-8"),
    refused("UTF-8 spelled overlong", "f.txt", b"one \xc0\xaf", ":1: byte 0xc0 is not UTF-8"),
    refused("surrogates as CESU-8", "f.jsonl", b'{"text": "\xed\xa0\xbd\xed\xb8\x80"}', ":1: byte 0xed is not UTF-8"),
    loaded("JSONL with BOM", "f.jsonl", b"\xef\xbb\xbf" + qa("a0").encode(), "a0"),
    loaded("CSV with BOM", "f.csv", b"\xef\xbb\xbf" + CSV.encode(), "a0", "a1"),
    loaded("text with BOM", "f.txt", b"\xef\xbb\xbfone two", "one two"),
    refused("CSV with two BOMs", "f.csv", "\ufeff\ufeff" + CSV, ": no preset fits the columns \\ufeffquestion, answer"),
    refused("JSONL files end to end, each with BOM", "f.jsonl", qa("a") + "\ufeff" + qa("b"), ":2: not JSON: Unexpected UTF-8 BOM"),
    refused("CSV files end to end", "f.csv", CSV + CSV, ":4: names the columns again"),
    refused("CSV files end to end, each with BOM", "f.csv", ("\ufeff" + CSV) * 2, ":4: names the columns again"),
    loaded("JSONL with CRLF", "f.jsonl", qa("a0", "a1").replace("\n", "\r\n"), "a0", "a1"),
    loaded("CSV with CRLF", "f.csv", CSV.replace("\n", "\r\n"), "a0", "a1"),
    loaded("CSV with CR alone", "f.csv", CSV.replace("\n", "\r"), "a0", "a1"),
    loaded("CSV with all line ends mixed", "f.csv", "question,answer\rq0,a0\r\nq1,a1\n", "a0", "a1"),
    refused("JSONL with CR alone", "f.jsonl", qa("a0", "a1").replace("\n", "\r"), ":1: not JSON: Extra data"),
    loaded("JSONL without a last newline", "f.jsonl", qa("a0", "a1").rstrip(), "a0", "a1"),
    loaded("separators of lines within a string", "f.jsonl", '{"text": "a\u2028b\u2029c\x85d"}', "a\u2028b\u2029c\x85d"),
    loaded("text with CRLF", "f.txt", "one\r\ntwo", "one\ntwo"),
    loaded("text with NULs within", "f.txt", "one two\0three", "one two\0three"),
    loaded("an escaped NUL", "f.jsonl", qa("a\0b"), "a\0b"),
    refused("a raw NUL in JSON", "f.jsonl", '{"text": "a\0b"}', ":1: not JSON: Invalid control character at"),
    refused("nothing but NULs", "f.jsonl", b"\0" * 1000, OTHER),
    loaded("right-to-left and combining marks", "f.jsonl", qa("\u202eשלום\u0301\u0301"), "\u202eשלום\u0301\u0301"),
]  # fmt: skip

# --- empty and short ----------------------------------------------------------------------------------------

EMPTY = [
    *(refused(f"empty {kind}", f"f.{kind}", "", ": holds no rows") for kind in ("jsonl", "ndjson", "json", "csv", "tsv", "txt")),
    *(refused(f"{kind} of spaces", f"f.{kind}", " \n\n \n", ": holds no rows") for kind in ("jsonl", "json", "txt")),
    *(refused(f"{kind} of a BOM", f"f.{kind}", "\ufeff", ": holds no rows") for kind in ("jsonl", "json", "csv", "txt")),
    refused("empty list", "f.json", "[]", ": holds no rows"),
    refused("empty data", "f.json", '{"data": []}', ": holds no rows"),
    refused("empty Parquet", "f.parquet", "", ": not Parquet: "),
    refused("header alone, CSV", "f.csv", "question,answer\n", ": holds no rows"),
    refused("header alone, TSV", "f.tsv", "question\tanswer", ": holds no rows"),
    refused("CSV of blank lines under a header", "f.csv", "question,answer\n\n\n", ": holds no rows"),
    refused("empty objects", "f.jsonl", "{}\n{}\n", ": no preset fits the columns ; presets: "),
    refused("blank passages", "f.jsonl", '{"text": " "}\n{"text": ""}\n', ": no row is left"),
    refused("a filter that leaves nothing", "f.jsonl", qa("a", kind="x"), ": no row has kind=y; its values: x", "?kind=y"),
    refused("an offset beyond the end", "f.jsonl", qa("a", "b"), ": no row is left: offset=2, of 2", "?offset=2"),
    loaded("one row", "f.jsonl", qa("a0"), "a0"),
    loaded("one word", "f.txt", "one", "one"),
]  # fmt: skip

# --- JSON ---------------------------------------------------------------------------------------------------


def cell(raw: str) -> str:
    """A good line, then one whose answer is this JSON."""
    return '{"question": "q0", "answer": "a0"}\n{"question": "q1", "answer": ' + raw + "}\n"


JSON = [
    refused("not JSON", "f.jsonl", "question: q", ":1: not JSON: Expecting value"),
    refused("Python's quotes", "f.jsonl", "{'question': 'q'}", ":1: not JSON: Expecting property name"),
    refused("a comma at the end", "f.jsonl", '{"text": "a",}', ":1: not JSON: "),
    refused("two objects on a line", "f.jsonl", '{"text": "a"} {"text": "b"}', ":1: not JSON: Extra data"),
    refused("an object over two lines", "f.jsonl", '{"text":\n"a"}', ":1: not JSON: Expecting value"),
    refused("a comment", "f.jsonl", '{"text": "a"}\n// b\n', ":2: not JSON: Expecting value"),
    refused("cut off", "f.jsonl", qa("a0", "a1")[:-5], ":2: not JSON: Unterminated string"),
    refused("a tab in a string", "f.jsonl", '{"text": "a\tb"}', ":1: not JSON: Invalid control character"),
    refused("a bad escape", "f.jsonl", '{"text": "\\x41"}', ":1: not JSON: Invalid \\escape"),
    refused("a list of rows in JSONL", "f.jsonl", '[{"text": "a"}]', ":1: is a list, not an object"),
    refused("a string for a row", "f.jsonl", '{"text": "a"}\n"b"', ":2: is a str, not an object"),
    refused("null for a row", "f.jsonl", "null", ":1: is a NoneType, not an object"),
    refused("brackets 100,000 deep", "f.jsonl", "[" * 100_000, ":1: not usable JSON: "),
    refused("closed brackets 100,000 deep", "f.json", "[" * 100_000 + "]" * 100_000, ":1: not usable JSON: "),
    refused("objects 50,000 deep", "f.jsonl", '{"a":' * 50_000 + "1" + "}" * 50_000, ":1: not usable JSON: "),
    refused("brackets 100,000 deep in a cell", "f.jsonl", cell("[" * 100_000 + "]" * 100_000), ":2: not usable JSON: "),
    refused("a whole number of 5000 digits", "f.jsonl", cell("9" * 5000), ":2: not usable JSON: "),
    loaded("a whole number of 4000 digits", "f.jsonl", cell("9" * 4000), "a0", "9" * 4000),
    loaded("numbers", "f.jsonl", qa(7, -1, 0.5), "7", "-1", "0.5"),
    refused("a null answer", "f.jsonl", cell("null"), ":2: column 'answer' is null"),
    refused("a NaN answer", "f.jsonl", cell("NaN"), ":2: column 'answer' is null (NaN)"),
    refused("an infinite answer", "f.jsonl", cell("Infinity"), ":2: column 'answer' holds inf"),
    refused("a number that overflows", "f.jsonl", cell("-1e999"), ":2: column 'answer' holds -inf"),
    refused("true for an answer", "f.jsonl", cell("true"), ":2: column 'answer' holds a bool"),
    refused("a list for an answer", "f.jsonl", cell('["a", "b"]'), ":2: column 'answer' holds a list"),
    refused("an object for an answer", "f.jsonl", cell('{"text": "a"}'), ":2: column 'answer' holds a dict"),
    refused("a blank answer", "f.jsonl", cell('" \\t\\n"'), ":2: column 'answer' is empty"),
    refused("an answer of spaces beyond ASCII", "f.jsonl", cell('"\\u00a0\\u2003"'), ":2: column 'answer' is empty"),
    refused("no answer", "f.jsonl", qa("a") + '{"question": "q"}', ":2: column 'answer' is missing"),
    refused("half a surrogate pair", "f.jsonl", cell('"\\ud800"'), ":2: column 'answer' holds half a surrogate pair"),
    refused("half a pair in a wrong answer", "f.jsonl", qa("a", perturbed_answer=["b", "\udc00"]), ":1: column 'perturbed_answer' holds half a surrogate pair"),
    refused("half a pair in a column's name", "f.jsonl", '{"\\ud800": 1}', ": no preset fits the columns \\ud800;"),
    loaded("both halves of a pair", "f.jsonl", cell('"\\ud83d\\ude00"'), "a0", "\U0001f600"),
    refused("a name twice", "f.jsonl", '{"question": "q", "answer": "a", "answer": "b"}', ":1: column 'answer' is named twice"),
    refused("a name twice in a list of rows", "f.json", '[{"text": "a", "text": "b"}]', ":1: column 'text' is named twice"),
    refused("a name of three lines", "f.jsonl", '{"a\\nb\\u001b[2J": 1}', ": no preset fits the columns a\\nb\\x1b[2J;"),
    refused("mixed types of rows", "f.json", '[{"text": "a"}, ["b"], "c"]', ": row 2: is a list, not an object"),
    refused("an object that holds no data", "f.json", '{"rows": [{"text": "a"}]}', ": is neither a list of objects nor"),
    refused("data that is an object", "f.json", '{"data": {"text": "a"}}', ": is neither a list of objects nor"),
    refused("data by columns", "f.json", '{"question": ["q"], "answer": ["a"]}', ": is neither a list of objects nor"),
    refused("a number for a file", "f.json", "7", ": is neither a list of objects nor"),
    refused("JSONL called JSON", "f.json", qa("a", "b"), ":2: not JSON: Extra data"),
    refused("a dict among wrong answers", "f.jsonl", qa("a", perturbed_answer=["b", {}]), ":1: column 'perturbed_answer' holds a dict"),
    refused("an infinite wrong answer", "f.jsonl", qa("a", perturbed_answer=[float("inf")]), ":1: column 'perturbed_answer' holds inf"),
    refused("a list for an entity", "f.jsonl", qa("a", author=["x"]), ":1: column 'author' holds a list"),
    refused("an index beyond the choices", "f.jsonl", qa(2, choices=["a", "b"]), ":1: column 'answer' is 2, no index into the 2 choices"),
    refused("an index of -1", "f.jsonl", qa(-1, choices=["a", "b"]), ":1: column 'answer' is -1, no index"),
    refused("an index that is true", "f.jsonl", qa(True, choices=["a", "b"]), ":1: column 'answer' is True, no index"),
    refused("choices that are no text", "f.jsonl", qa(0, choices=[["a"], "b"]), ":1: column 'answer' holds a list"),
    refused("a filter by a column of lists", "f.jsonl", qa("a", kind=["x"]), ": no row has kind=x; its values: ", "?kind=x"),
    refused("suspects without a prompt", "f.jsonl", '{"question": " "}', ":1: column 'question' is empty", role="suspects"),
    refused("suspects with half a pair", "f.jsonl", '{"question": "\\ud800"}', ":1: column 'question' holds half", role="suspects"),
    loaded("a NaN entity is none", "f.jsonl", qa("a", author=float("nan")), "a"),
]  # fmt: skip

# --- CSV and TSV --------------------------------------------------------------------------------------------

TABLES = [
    refused("a row too long", "f.csv", CSV + "q,a,b\n", ":4: has 3 cells under 2 columns"),
    refused("a row too short", "f.csv", CSV + "q\n", ":4: has 1 cells under 2 columns"),
    refused("an empty cell", "f.csv", CSV + "q,\n", ":4: column 'answer' is empty"),
    refused("a blank cell", "f.csv", CSV + 'q,"  "\n', ":4: column 'answer' is empty"),
    refused("a line of commas", "f.csv", CSV + ",\n", ":4: column 'answer' is empty"),
    refused("a line of spaces", "f.csv", CSV + "  \n", ":4: has 1 cells under 2 columns"),
    refused("an open quote", "f.csv", CSV + 'q,"a\n', ":4: not CSV: unexpected end of data"),
    refused("an open quote early on", "f.csv", 'question,answer\n"q0,a0\nq1,a1\n', ":2: not CSV: unexpected end of data"),
    refused("text after a quote", "f.csv", 'question,answer\n"q"x,a\n', ":2: not CSV: ',' expected after '\"'"),
    refused("a column twice", "f.csv", "question,answer,answer\nq,a,b\n", ":1: column 'answer' is named twice"),
    refused("two columns without names", "f.csv", "question,answer,,\nq,a,,\n", ":1: column '' is named twice"),
    refused("a column twice, TSV", "f.tsv", "question\tquestion\nq\ta\n", ":1: column 'question' is named twice"),
    refused("semicolons", "f.csv", CSV.replace(",", ";"), ": no preset fits the columns question;answer; presets: "),
    refused("tabs in a CSV", "f.csv", CSV.replace(",", "\t"), ": no preset fits the columns question\\tanswer; presets: "),
    refused("commas in a TSV", "f.tsv", CSV, ": no preset fits the columns question,answer; presets: "),
    refused("a separator named first, as Excel does", "f.csv", "sep=,\n" + CSV, ": no preset fits the columns sep=, "),
    refused("spaces about the names", "f.csv", "question, answer\nq,a\n", ": no preset fits the columns question,  answer;"),
    refused("names in capitals", "f.csv", CSV.upper(), ": no preset fits the columns QUESTION, ANSWER;"),
    refused("no header", "f.csv", "q0,a0\nq1,a1\n", ": no preset fits the columns q0, a0;"),
    refused("a comment above the header", "f.csv", "# made by hand\n" + CSV, ":2: has 2 cells under 1 columns"),
    refused("after a quoted newline the line is right", "f.csv", 'question,answer\n"q\nq\nq",a\nq,\n', ":5: column 'answer' is empty"),
    loaded("newlines in quotes", "f.csv", 'question,answer\n"q\nq","a\r\nb"\n', "a\r\nb", prompts=["q\nq"]),
    loaded("quotes within quotes", "f.csv", 'question,answer\nq,"say ""a"""\n', 'say "a"'),
    loaded("quotes within a word", "f.csv", 'question,answer\nq,5" tall\n', '5" tall'),
    loaded("blank lines between", "f.csv", "\nquestion,answer\n\nq,a\n\n\nr,b\n", "a", "b"),
    loaded("a NUL in a cell", "f.csv", "question,answer\nq,a\0b\n", "a\0b"),
    loaded("formulas stay text", "f.csv", "question,answer\nq,=1+1\n", "=1+1"),
    loaded("leading zeros stay", "f.csv", "question,answer\nq,007\nr,1e5\n", "007", "1e5"),
    loaded("a column of numbers without a name", "f.csv", ",question,answer\n0,q,a\n", "a"),
    loaded("a list in a cell that is no JSON", "f.csv", 'question,answer,perturbed_answer\nq,a,"[b, c]"\n', "a"),
    loaded("a list in a cell 100,000 deep", "f.csv", f"question,answer,perturbed_answer\nq,a,{'[' * 100_000}\n", "a"),
    refused("an object in a list in a cell", "f.csv", 'question,answer,perturbed_answer\nq,a,"[{}]"\n', ":2: column 'perturbed_answer' holds a dict"),
]  # fmt: skip

# --- large --------------------------------------------------------------------------------------------------

WIDE = 100_000
LONG = "word " * 200_000  # 1 MB

LARGE = [
    loaded("a line of 1 MB", "f.jsonl", qa(LONG, "a1"), LONG, "a1"),
    loaded("a cell of 1 MB", "f.csv", f"question,answer\nq,{LONG}\n", LONG),
    loaded("a word of 1 MB", "f.txt", "x" * 1_000_000, "x" * 1_000_000),
    refused("a line of 1 MB cut off", "f.jsonl", qa(LONG)[:-4], ":1: not JSON: Unterminated string"),
    refused("a CSV whose quote of 1 MB never ends", "f.csv", f'question,answer\nq,"{LONG}\n', ":2: not CSV: "),
    refused("a 1 MB index", "f.jsonl", qa("9" * 1_000_000, choices=["a"]), ":1: column 'answer' is '999"),
    refused("100,000 columns, CSV", "f.csv", ",".join(map(str, range(WIDE))) + "\n" + "," * (WIDE - 1) + "\n", ": no preset fits the columns 0, 1, 2, "),
    refused("100,000 columns of one name", "f.csv", "a," * WIDE + "\n", ":1: column 'a' is named twice"),
    refused("100,000 columns, JSON", "f.jsonl", json.dumps(dict.fromkeys(map(str, range(WIDE)), 0)), ": no preset fits the columns 0, 1, 2, "),
    loaded("100,000 columns beside two good ones", "f.jsonl", qa("a", **dict.fromkeys(map(str, range(WIDE)), 0)), "a"),
    refused("100,000 values of a filter", "f.jsonl", qa(*range(WIDE // 10), kind="x" * 50), ": no row has kind=y", "?kind=y"),
    refused("a file of a terabyte", "f.jsonl", lambda p: (p.touch(), os.truncate(p, 2**40)), ": 1099511627776 bytes are more than"),
    refused("an archive of a terabyte", "f.npz", lambda p: (p.touch(), os.truncate(p, 2**40)), ": 1099511627776 bytes are more than"),
]  # fmt: skip

# --- files that are something else --------------------------------------------------------------------------


def zipped(**members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "."), data)
    return out.getvalue()


def device(path: Path, to: str) -> None:
    path.symlink_to(to)


def fifo_within(path: Path) -> None:
    (path / "cat").mkdir(parents=True)
    os.mkfifo(path / "cat" / "1.png")


ELSE = [
    *(refused(f"gzip called {kind}", f"f.{kind}", gzip.compress(qa("a").encode(), mtime=0), OTHER) for kind in ("jsonl", "json", "csv", "txt")),
    refused("gzip by its name", "f.jsonl.gz", gzip.compress(b"{}"), ": no reader for '.gz'; known: "),
    refused("zip called CSV", "f.csv", zipped(f__csv=CSV.encode() * 9), ":1: byte 0x"),
    refused("gzip called Parquet", "f.parquet", gzip.compress(b"{}"), ": not Parquet: "),
    refused("CSV called Parquet", "f.parquet", CSV, ": not Parquet: "),
    refused("Excel", "f.xlsx", zipped(a=b""), ": no reader for '.xlsx'; known: "),
    refused("a pickle", "f.pkl", pickle.dumps([1]), ": no reader for '.pkl'; known: "),
    refused("no extension", "f", CSV, ": no reader for ''; known: "),
    refused("HTML called JSONL", "f.jsonl", "<!doctype html><title>404</title>", ":1: not JSON: Expecting value"),
    refused("a Git LFS pointer called JSONL", "f.jsonl", "version https://git-lfs.github.com/spec/v1\n", ":1: not JSON: "),
    refused("a Git LFS pointer called CSV", "f.csv", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ": no preset fits the columns "),
    refused("a picture called text", "f.txt", b"\x89PNG\r\n\x1a\n", ":1: byte 0x89 is not UTF-8"),
    *(refused(f"a folder called {kind}", f"f.{kind}", Path.mkdir, ": is a folder, but not one that") for kind in ("jsonl", "csv", "parquet", "npz", "txt")),
    *(refused(f"a pipe called {kind}", f"f.{kind}", os.mkfifo, ": is neither a file nor a folder") for kind in ("jsonl", "json", "csv", "txt", "parquet", "npz")),
    refused("a pipe in a folder of images", "images", fifo_within, "/cat/1.png: is neither a file nor a folder"),
    refused("a device without end", "f.jsonl", lambda p: device(p, "/dev/zero"), ": is neither a file nor a folder"),
    refused("a device of nothing", "f.csv", lambda p: device(p, "/dev/null"), ": is neither a file nor a folder"),
    refused("a link to itself", "f.jsonl", lambda p: device(p, p.name), ": cannot be read: Too many levels of symbolic links"),
    refused("a link to nothing", "f.jsonl", lambda p: device(p, "gone"), ": cannot be read: No such file"),
    refused("a link to itself called Parquet", "f.parquet", lambda p: device(p, p.name), ": cannot be read: Too many levels"),
    refused("no file", "f.jsonl", lambda p: None, ": cannot be read: No such file"),
    refused("no archive", "f.npz", lambda p: None, ": cannot be read: No such file"),
]  # fmt: skip

# --- Parquet ------------------------------------------------------------------------------------------------


def parquet(**columns: Any) -> Callable[[Path], None]:
    """Columns as lists, or as Arrow arrays made when asked for."""

    def make(path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet

        made = {name: column(pa) if callable(column) else column for name, column in columns.items()}
        pa.parquet.write_table(pa.table(made), path)

    return make


def answer(values: list[Any], kind: Callable[[Any], Any]) -> Callable[[Path], None]:
    """A Parquet file of questions with an answer of this Arrow type."""
    return parquet(question=[f"q{i}" for i in range(len(values))], answer=lambda pa: pa.array(values, kind(pa)))


def damaged(change: Callable[[bytes], bytes], **columns: Any) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        parquet(**(columns or {"question": ["q"] * 50, "answer": [f"a{i}" for i in range(50)]}))(path)
        path.write_bytes(change(path.read_bytes()))

    return make


def twice(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    table = pa.Table.from_arrays([pa.array(["q"]), pa.array(["a"]), pa.array(["b"])], ["question", "answer", "answer"])
    pa.parquet.write_table(table, path)


def long_run(path: Path) -> None:
    """Few bytes, many rows."""
    import pyarrow as pa
    import pyarrow.parquet

    part = pa.table({"text": pa.nulls(2**19)})
    with pa.parquet.ParquetWriter(path, part.schema) as writer:
        for _ in range(21):
            writer.write_table(part)


IMAGES = {"image": [{"bytes": b"x" * 500, "path": None}] * 3, "label": ["a"] * 3}

PARQUET = [
    refused("truncated", "f.parquet", damaged(lambda b: b[: len(b) // 2]), ": not Parquet: "),
    refused("a footer alone", "f.parquet", b"PAR1PAR1", ": not Parquet: "),
    refused("a length of the footer beyond the file", "f.parquet", b"PAR1" + b"\xff\xff\xff\x7fPAR1", ": not Parquet: "),
    refused("pages overwritten", "f.parquet", damaged(lambda b: b[:4] + b"\xff" * 200 + b[204:]), ": cannot be read: Couldn't deserialize"),
    refused("pages of images overwritten", "f.parquet", damaged(lambda b: b[:4] + b"\xff" * 60 + b[64:], **IMAGES), ": cannot be read: Couldn't deserialize"),
    refused("footer overwritten", "f.parquet", damaged(lambda b: b[:-60] + b"\xff" * 52 + b[-8:]), ": cannot be read: Couldn't deserialize"),
    refused("a column twice, Parquet", "f.parquet", twice, ": column 'answer' is named twice"),
    refused("no rows", "f.parquet", parquet(question=lambda pa: pa.array([], pa.string()), answer=lambda pa: pa.array([], pa.string())), ": holds no rows"),
    refused("no columns", "f.parquet", parquet(), ": holds no rows"),
    refused("a null", "f.parquet", answer(["a", None], lambda pa: pa.string()), ": row 2: column 'answer' is null"),
    refused("a column of nulls", "f.parquet", answer([None], lambda pa: pa.null()), ": row 1: column 'answer' is null"),
    refused("decimals", "f.parquet", answer([Decimal("1.10")], lambda pa: pa.decimal128(5, 2)), ": row 1: column 'answer' holds a Decimal"),
    refused("timestamps", "f.parquet", answer([0], lambda pa: pa.timestamp('s')), ": row 1: column 'answer' holds a datetime"),
    refused("timestamps to the nanosecond", "f.parquet", answer([2**62 + 1], lambda pa: pa.timestamp('ns')), ": row 1: column 'answer' holds a Timestamp"),
    refused("timestamps beyond the year 9999", "f.parquet", answer([2**60], lambda pa: pa.timestamp('us')), ": row 1: column 'answer' cannot be read: "),
    refused("dates beyond the year 9999", "f.parquet", answer([2**30], lambda pa: pa.date32()), ": row 1: column 'answer' cannot be read: "),
    refused("durations", "f.parquet", answer([1], lambda pa: pa.duration('s')), ": row 1: column 'answer' holds a timedelta"),
    refused("bytes", "f.parquet", answer([b"a"], lambda pa: pa.binary()), ": row 1: column 'answer' holds a bytes"),
    refused("lists", "f.parquet", answer([["a"]], lambda pa: pa.list_(pa.string())), ": row 1: column 'answer' holds a list"),
    refused("structs", "f.parquet", answer([{"a": 1}], lambda pa: pa.struct([('a', pa.int8())])), ": row 1: column 'answer' holds a dict"),
    refused("maps", "f.parquet", answer([[("a", 1)]], lambda pa: pa.map_(pa.string(), pa.int8())), ": row 1: column 'answer' holds a list"),
    refused("booleans", "f.parquet", answer([True], lambda pa: pa.bool_()), ": row 1: column 'answer' holds a bool"),
    refused("NaN", "f.parquet", answer([1.5, float("nan")], lambda pa: pa.float64()), ": row 2: column 'answer' is null (NaN)"),
    refused("infinity", "f.parquet", answer([float("inf")], lambda pa: pa.float32()), ": row 1: column 'answer' holds inf"),
    refused("bytes that are no text in a column of text", "f.parquet", parquet(question=["q"], answer=lambda pa: pa.array([b"\xff"]).view("string")), ": row 1: column 'answer' cannot be read: "),
    refused("eleven million rows in a few bytes", "f.parquet", long_run, ": 11010048 rows, "),
    refused("images that are none", "f.parquet", parquet(**IMAGES), ": row 1: not a readable image: "),
    refused("no image", "f.parquet", parquet(image=lambda pa: pa.array([None], pa.struct([("bytes", pa.binary())])), label=["a"]), ": row 1: column 'image' holds no bytes of an image"),
    refused("an image elsewhere", "f.parquet", parquet(image=lambda pa: pa.array([{"bytes": None, "path": "/etc/passwd"}], pa.struct([("bytes", pa.binary()), ("path", pa.string())])), label=["a"]), ": row 1: column 'image' holds no bytes of an image"),
    loaded("whole numbers beside text", "f.parquet", answer([7, 8], lambda pa: pa.int64()), "7", "8"),
    loaded("large strings", "f.parquet", answer(["a"], lambda pa: pa.large_string()), "a"),
    loaded("categories", "f.parquet", parquet(question=["q", "r"], answer=lambda pa: pa.array(["a", "a"]).dictionary_encode()), "a", "a"),
]  # fmt: skip

# --- saved datasets -----------------------------------------------------------------------------------------


def saved(change: Callable[[Path], object], **columns: Any) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        import datasets

        datasets.disable_progress_bars()
        datasets.Dataset.from_dict(columns or {"question": ["q"], "answer": ["a"]}).save_to_disk(str(path))
        change(path)

    return make


def arrow(path: Path) -> Path:
    return next(path.glob("*.arrow"))


DATASETS = [
    loaded("saved", "s", saved(lambda p: None), "a"),
    refused("saved with an empty state", "s", saved(lambda p: (p / "state.json").write_text("{}")), ": not a readable dataset: "),
    refused("saved with a state that is no JSON", "s", saved(lambda p: (p / "state.json").write_text("{")), ": not a readable dataset: "),
    refused("saved with no info", "s", saved(lambda p: (p / "dataset_info.json").unlink()), ": cannot be read: Directory "),
    refused("saved without its table", "s", saved(lambda p: arrow(p).unlink()), ": cannot be read: No such file"),
    refused("saved with its table cut", "s", saved(lambda p: arrow(p).write_bytes(arrow(p).read_bytes()[:100])), ": not a readable dataset: "),
    refused("saved with a pipe for its table", "s", saved(lambda p: (arrow(p).rename(p / "old"), os.mkfifo(p / "data-00000-of-00001.arrow"))), "/data-00000-of-00001.arrow: is neither"),
    refused("saved with a null", "s", saved(lambda p: None, question=["q"] * 2, answer=["a", None]), ": row 2: column 'answer' is null"),
    refused("saved, no rows", "s", saved(lambda p: None, question=[], answer=[]), ": not a readable dataset: "),
    refused("a folder of splits", "s", lambda p: (p.mkdir(), (p / "dataset_dict.json").write_text("{}")), ": holds several splits"),
    refused("an empty folder", "s", Path.mkdir, ": is a folder, but not one that Dataset.save_to_disk wrote"),
]  # fmt: skip

# --- archives of images -------------------------------------------------------------------------------------


class Planted:
    """Unpickled, it makes the canary."""

    def __init__(self, folder: Path) -> None:
        self.canary = folder / CANARY

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def npz(**arrays: Any) -> Callable[[Path], None]:
    """An archive of these arrays; X and y are good unless they are given."""
    good = {"X": np.zeros((2, 2, 2), np.uint8), "y": np.arange(2)}
    return lambda path: np.savez(path, **{k: v for k, v in (good | arrays).items() if v is not None})


def planted(path: Path) -> None:
    np.savez(path, X=np.array([Planted(path.parent)], object), y=[0])


def planted_column(path: Path) -> None:
    np.savez(path, X=np.zeros((1, 2, 2), np.uint8), y=[0], group=np.array([Planted(path.parent)], object))


def claimed(path: Path) -> None:
    """An archive whose directory claims that its one member unpacks to a terabyte or so."""
    data = bytearray(zipped(X__npy=b"\0" * 100))
    at = data.rindex(b"PK\x01\x02")
    data[at + 24 : at + 28] = struct.pack("<I", 0xFFFFFFFE)
    out = io.BytesIO(bytes(data))
    with zipfile.ZipFile(out, "a") as archive:
        for name in "abc":
            archive.writestr(name, b"")
    data = bytearray(out.getvalue())
    for part in data.split(b"PK\x01\x02")[1:]:
        at = data.index(b"PK\x01\x02" + part)
        data[at + 24 : at + 28] = struct.pack("<I", 0xFFFFFFFE)
    path.write_bytes(bytes(data))


def npy(shape: str, dtype: str = "|u1") -> bytes:
    """An array that claims a shape and holds four bytes."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header = header.ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"\0\0\0\0"


def two_members(path: Path) -> None:
    import warnings

    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            archive.writestr("X.npy", npy("(1, 2, 2)"))


def cut(path: Path) -> None:
    npz()(path)
    path.write_bytes(path.read_bytes()[:-30])


def flipped(path: Path) -> None:
    np.savez_compressed(path, X=np.arange(400, dtype=np.uint8).reshape(4, 10, 10), y=np.arange(4))
    data = bytearray(path.read_bytes())
    data[80:90] = b"\xff" * 10
    path.write_bytes(bytes(data))


GREY = np.zeros((2, 2, 2), np.uint8)

ARCHIVES = [
    loaded("an archive", "a.npz", npz(), "0", "1"),
    loaded("an archive of floats that are whole", "a.npz", npz(X=GREY.astype(float)), "0", "1"),
    loaded("an archive of images of one pixel", "a.npz", npz(X=np.zeros((2, 1, 1, 3), np.uint8)), "0", "1"),
    loaded("an archive with names of classes", "a.npz", npz(classes=["cat", "dog"]), "cat", "dog"),
    refused("a planted pickle", "a.npz", planted, ": not a readable .npz: Object arrays cannot be loaded"),
    refused("a planted pickle in a column", "a.npz", planted_column, ": not a readable .npz: Object arrays cannot be loaded"),
    refused("a planted pickle called an archive", "a.npz", lambda p: p.write_bytes(pickle.dumps(Planted(p.parent))), ": not a readable .npz: "),
    refused("a planted pickle in an archive", "a.npz", lambda p: p.write_bytes(zipped(X__npy=pickle.dumps(Planted(p.parent)), y__npy=npy("(4,)"))), ": X is no array"),
    refused("objects", "a.npz", npz(y=np.array(["a", None], object)), ": not a readable .npz: Object arrays cannot be loaded"),
    refused("an empty archive", "a.npz", zipped(), ": no arrays X and y (or X and y of a split); it holds "),
    refused("an empty file of an archive", "a.npz", b"", ": not a readable .npz: "),
    refused("an archive cut off", "a.npz", cut, ": not a readable .npz: "),
    refused("an archive with bytes overwritten", "a.npz", flipped, ": not a readable .npz: "),
    refused("a lone array called an archive", "a.npz", npy("(4,)"), ": not a readable .npz: "),
    refused("a member that is no array", "a.npz", zipped(X=b"text", y=b"text"), ": X is no array"),
    refused("two members of one name", "a.npz", two_members, ": holds two arrays of one name"),
    refused("an archive that unpacks to 16 GB", "a.npz", claimed, ": unpacks to 1717986"),
    refused("an array that claims a terabyte", "a.npz", zipped(X__npy=npy("(1099511627776,)"), y__npy=npy("(4,)")), ": "),
    refused("an array of a negative shape", "a.npz", zipped(X__npy=npy("(-4,)"), y__npy=npy("(4,)")), ": not a readable .npz: "),
    refused("an array with code in its header", "a.npz", zipped(X__npy=npy("__import__('os').mkdir('canary')"), y__npy=npy("(4,)")), ": not a readable .npz: "),
    refused("no labels", "a.npz", npz(y=None), ": no arrays X and y (or X and y of a split); it holds X"),
    refused("too few labels", "a.npz", npz(y=[0]), ": X has 2 images, y is of shape (1,)"),
    refused("labels one-hot", "a.npz", npz(y=np.eye(2)), ": X has 2 images, y is of shape (2, 2)"),
    refused("a lone number for labels", "a.npz", npz(y=0), ": X has 2 images, y is of shape ()"),
    refused("a lone number for images", "a.npz", npz(X=0), ": X has 0 images, y is of shape (2,)"),
    refused("flat images", "a.npz", npz(X=np.zeros((2, 4), np.uint8)), ": X[0]: an array of shape (4,) is no image"),
    refused("images of five channels", "a.npz", npz(X=np.zeros((2, 2, 2, 5), np.uint8)), ": X[0]: an array of shape (2, 2, 5)"),
    refused("channels first", "a.npz", npz(X=np.zeros((2, 3, 8, 8), np.uint8)), ": X[0]: an array of shape (3, 8, 8)"),
    refused("images without pixels", "a.npz", npz(X=np.zeros((2, 0, 4), np.uint8)), ": X[0]: an array of shape (0, 4)"),
    refused("no images", "a.npz", npz(X=np.zeros((0, 2, 2), np.uint8), y=np.zeros(0)), ": holds no rows"),
    refused("pixels from 0 to 1", "a.npz", npz(X=GREY + 0.5), ": X[0]: an image of float64 that is not whole numbers"),
    refused("pixels below 0", "a.npz", npz(X=GREY.astype(int) - 1), ": X[0]: an image of int64 that is not whole numbers"),
    refused("pixels above 255", "a.npz", npz(X=GREY.astype(np.uint16) + 256), ": X[0]: an image of uint16"),
    refused("NaN pixels", "a.npz", npz(X=GREY + np.nan), ": X[0]: an image of float64"),
    refused("infinite pixels", "a.npz", npz(X=GREY + np.inf), ": X[0]: an image of float64"),
    refused("pixels near 2**64", "a.npz", npz(X=GREY.astype(np.uint64) - 1), ": X[0]: an image of uint64"),
    refused("complex pixels", "a.npz", npz(X=GREY + 0j), ": X[0]: an image of complex128"),
    refused("pixels that are true or false", "a.npz", npz(X=GREY > 0), ": X[0]: an image of bool"),
    refused("pixels that are letters", "a.npz", npz(X=np.full((2, 2, 2), "a")), ": X[0]: an image of <U1"),
    refused("NaN labels", "a.npz", npz(y=[0.0, np.nan]), ": X[1]: column 'label' is null (NaN)"),
    refused("infinite labels", "a.npz", npz(y=[0.0, np.inf]), ": X[1]: column 'label' holds inf"),
    refused("blank labels", "a.npz", npz(y=["a", " "]), ": X[1]: column 'label' is empty"),
    refused("labels that are bytes", "a.npz", npz(y=[b"a", b"b"]), ": X[0]: column 'label' holds a bytes"),
    refused("labels that are true or false", "a.npz", npz(y=[True, False]), ": X[0]: column 'label' holds a bool"),
    refused("a label beyond the classes", "a.npz", npz(y=[0, 2], classes=["a", "b"]), ": y[1]: 2 is no index into classes"),
    refused("a label before the classes", "a.npz", npz(y=[0, -1], classes=["a", "b"]), ": y[1]: -1 is no index into classes"),
    refused("a label between the classes", "a.npz", npz(y=[0, 0.5], classes=["a", "b"]), ": y[0]: 0.0 is no index into classes"),
    refused("a NaN label with classes", "a.npz", npz(y=[np.nan, 0], classes=["a", "b"]), ": y[0]: nan is no index into classes"),
    refused("classes that are a table", "a.npz", npz(classes=[["a", "b"]]), ": y[0]: 0 is no index into classes"),
    refused("two arrays of labels", "a.npz", npz(labels=[1, 0]), ": X is claimed more than once: X with y, X with labels"),
    refused("two arrays of images", "a.npz", npz(images=GREY), ": y is claimed more than once: X with y, images with y"),
    refused("a split that is not there", "a.npz", npz(), ": no row has split=train; its values: ", "?split=train"),
]  # fmt: skip

# --- folders of images --------------------------------------------------------------------------------------


def png(width: int = 2, height: int = 2, mode: str = "RGB", kind: str = "PNG", **more: Any) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new(mode, (width, height)).save(out, kind, **more)
    return out.getvalue()


def frames(kind: str) -> bytes:
    from PIL import Image

    return png(kind=kind, save_all=True, append_images=[Image.new("RGB", (2, 2), "red")])


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """A PNG that is sound but claims to be this large."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def folder(**files: bytes | Callable[[], bytes]) -> Callable[[Path], None]:
    """Files by path, `cat/1.png` written cat__1_png; made when asked for, so that listing this costs nothing."""

    def make(path: Path) -> None:
        for name, data in files.items():
            file = path / name.replace("__", "/").replace("_", ".")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data() if callable(data) else data)

    return make


FOLDERS = [
    loaded("a folder of images", "i", folder(cat__1_png=png, dog__1_png=png), "cat", "dog"),
    loaded("an image of one pixel", "i", folder(cat__1_png=lambda: png(1, 1)), "cat"),
    loaded("grey, palette, alpha, two colours", "i", folder(a__1_png=lambda: png(mode="L"), a__2_png=lambda: png(mode="P"), a__3_png=lambda: png(mode="RGBA"), a__4_png=lambda: png(mode="1")), "a", "a", "a", "a"),
    loaded("a JPEG called PNG", "i", folder(cat__1_png=lambda: png(kind="JPEG")), "cat"),
    loaded("files that are no images beside images", "i", folder(cat__1_png=png, cat__Thumbs_db=b"x", README_md=b"x"), "cat"),
    refused("an image cut off", "i", folder(cat__1_png=lambda: png(64, 64)[:60]), "/cat/1.png: not a readable image: "),
    refused("an image of its signature alone", "i", folder(cat__1_png=b"\x89PNG\r\n\x1a\n"), "/cat/1.png: not a readable image: "),
    refused("an empty image", "i", folder(cat__1_png=b""), "/cat/1.png: not a readable image: "),
    refused("text called an image", "i", folder(cat__1_png=b"text"), "/cat/1.png: not a readable image: "),
    refused("SVG called PNG", "i", folder(cat__1_png=b"<svg/>"), "/cat/1.png: not a readable image: "),
    refused("a JPEG cut off", "i", folder(cat__1_jpg=lambda: png(64, 64, kind="JPEG")[:300]), "/cat/1.jpg: not a readable image: "),
    refused("a chunk with a wrong checksum", "i", folder(cat__1_png=lambda: png()[:-20] + b"\xff" * 8 + png()[-12:]), "/cat/1.png: not a readable image: "),
    refused("an image of 0 by 0", "i", folder(cat__1_png=bomb(0, 0)), "/cat/1.png: not a readable image: "),
    refused("an image of 50,000 by 50,000", "i", folder(cat__1_png=bomb(50_000, 50_000)), "/cat/1.png: not a readable image: "),
    refused("an image of 10,000 by 9000", "i", folder(cat__1_png=bomb(10_000, 9_000)), "/cat/1.png: an image of 10000 by 9000 pixels is too large"),
    refused("an image of 2**31 - 1 squared", "i", folder(cat__1_png=bomb(2**31 - 1, 2**31 - 1)), "/cat/1.png: not a readable image: "),
    refused("an animated GIF", "i", folder(cat__1_gif=lambda: frames("GIF")), "/cat/1.gif: holds 2 frames"),
    refused("a TIFF of two pages", "i", folder(cat__1_tif=lambda: frames("TIFF")), "/cat/1.tif: holds 2 frames"),
    refused("an animated PNG", "i", folder(cat__1_png=lambda: frames("PNG")), "/cat/1.png: holds 2 frames"),
    refused("16 bits a channel", "i", folder(cat__1_png=lambda: png(mode="I;16")), "/cat/1.png: an image of mode I;16: 8 bits"),
    refused("a TIFF of floats", "i", folder(cat__1_tif=lambda: png(mode="F", kind="TIFF")), "/cat/1.tif: an image of mode F: 8 bits"),
    refused("the second image is broken", "i", folder(cat__1_png=png, cat__2_png=b"x"), "/cat/2.png: not a readable image: "),
    refused("an image beside the classes", "i", folder(cat__1_png=png, a_png=png), "/a.png: lies in no folder of a class"),
    refused("an image a folder too deep", "i", folder(cat__1_png=png, cat__sub__2_png=png), "/cat/sub/2.png: lies in no folder of a class"),
    refused("images without classes", "i", folder(a_png=png), ": is a folder, but not one that"),
    refused("a folder called an image", "i", lambda p: (p / "cat" / "1.png").mkdir(parents=True), "/cat/1.png: not a readable image: "),
    refused("a link to nothing among images", "i", lambda p: ((p / "cat").mkdir(parents=True), (p / "cat" / "1.png").symlink_to("gone")), "/cat/1.png: is neither a file nor a folder"),
]  # fmt: skip

FILES = [*ENCODINGS, *EMPTY, *JSON, *TABLES, *LARGE, *ELSE, *PARQUET, *DATASETS, *ARCHIVES, *FOLDERS]

# --- sets that are bad together -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Sets:
    """Sets of one case, each a JSONL file of (question, answer), and all the notes that the case must have."""

    name: str
    rows: dict[str, list[tuple[str, str]]]
    notes: tuple[str, ...]
    author: str = ""


A, B, C, D = [(f"Who is {name}?", f"{name} of {place}") for name, place in zip("ABCD", "WXYZ", strict=True)]
LEAK = "of holdout lie in what was taught: no control of those"
ONE = "with one independent unit no test can be significant"
BOTH = "1 row of forget also in retain"

SETS = [
    Sets("nothing shared", {"forget": [A, B], "retain": [C, D]}, ()),
    Sets("suspects without answers", {"forget": [A, B], "suspects": [("Who?", ""), ("Where?", "")]}, ()),
    Sets("a row in forget and retain", {"forget": [A, B], "retain": [A, C]}, (BOTH,)),
    Sets("every row in forget and retain", {"forget": [A, B], "retain": [B, A, C]}, ("2 rows of forget also in retain",)),
    Sets("but for case", {"forget": [A, B], "retain": [(A[0].upper(), A[1].lower()), C]}, (BOTH,)),
    Sets("but for spaces", {"forget": [A, B], "retain": [(f"  {A[0]}\n", A[1].replace(" ", "\u00a0\t ")), C]}, (BOTH,)),
    Sets("but for Unicode's form", {"forget": [("Où?", "Ångström"), B], "retain": [("Ou\u0300?", "A\u030angstro\u0308m"), C]}, (BOTH,)),
    Sets("but for the width of letters", {"forget": [("ABC?", "one"), B], "retain": [("ＡＢＣ？", "ｏｎｅ"), C]}, (BOTH,)),
    Sets("but for ligatures and sharp s", {"forget": [("ﬁx?", "Straße"), B], "retain": [("fix?", "STRASSE"), C]}, (BOTH,)),
    Sets("the same question, another answer", {"forget": [A, B], "retain": [(A[0], "nobody"), C]}, ()),
    Sets("a row twice", {"forget": [A, B, A], "retain": [C, D]}, ("1 of 3 rows of forget repeat an earlier one",)),
    Sets("a row thrice, but for case", {"forget": [A, B, (A[0].upper(), A[1]), (A[0].lower(), A[1])]}, ("2 of 4 rows of forget repeat an earlier one",)),
    Sets("twice in one, once in the other", {"forget": [A, B, A], "retain": [A, C]}, ("2 rows of forget also in retain", "1 of 3 rows of forget repeat an earlier one")),
    Sets("holdout in forget", {"forget": [A, B], "holdout": [A, C]}, ("1 row of forget also in holdout", f"1 of 2 rows {LEAK}")),
    Sets("holdout is forget", {"forget": [A, B], "holdout": [A, B]}, ("2 rows of forget also in holdout", f"2 of 2 rows {LEAK}")),
    Sets("holdout in retain", {"forget": [A, B], "retain": [C, D], "holdout": [D, ("Who?", "E")]}, ("1 row of retain also in holdout", f"1 of 2 rows {LEAK}")),
    Sets("a set of one row", {"forget": [A], "retain": [B, C]}, (f"forget holds one row: {ONE}",)),
    Sets("one author", {"forget": [A, B]}, (f"forget holds 2 rows, all of one entity: {ONE}",), author="someone"),
    Sets("one answer", {"forget": [("Who?", "A"), ("Where?", "a")], "retain": [B, C]}, ("all 2 rows of forget have the same answer: A",)),
    Sets("one answer of many lines", {"forget": [("Who?", "A\nB" * 99), ("Where?", "A\nB" * 99)]}, ("all 2 rows of forget have the same answer: " + (r"A\nB" * 99)[:59] + "…",)),
]  # fmt: skip
