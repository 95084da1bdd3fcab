"""Every file of `bad_data.py`: refused in one line that names it, or loaded as it says; nothing runs, nothing hangs."""

from __future__ import annotations

import json
import os
import signal
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
from bad_data import CANARY, FILES, LARGE, SETS, File, Sets
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from audit.case import Case, Options
from audit.errors import BadInput
from audit.loaders import ExampleSet, SetSpec, load_set, parse_set_spec
from audit.readers import read_rows

SECONDS = 30
LONGEST = 2000


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """A read that waits for ever, as one of a pipe does, is broken off."""

    def late(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"not done after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def made(bad: File, folder: Path) -> Path:
    path = folder / bad.file
    if callable(bad.content):
        bad.content(path)
    else:
        path.write_bytes(bad.content)
    return path


def complaint(path: Path, query: str = "", role: str = "forget") -> str:
    with pytest.raises(BadInput) as caught:
        load_set(role, parse_set_spec(f"{path}{query}"))
    said = str(caught.value)
    assert said.isprintable() and len(said) <= LONGEST, "one line, of bounded length, that any terminal can show"
    return said


def test_the_list_is_long_and_no_name_comes_twice() -> None:
    assert len(FILES) >= 150
    assert [name for name, times in Counter(bad.name for bad in (*FILES, *SETS)).items() if times > 1] == []


@pytest.mark.parametrize("bad", [pytest.param(bad, id=bad.name) for bad in FILES])
@pytest.mark.filterwarnings("error")
def test_a_bad_file_is_refused_by_name_or_loaded_as_listed(
    bad: File, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = made(bad, tmp_path)
    capfd.readouterr()
    if bad.says:
        said = complaint(path, bad.query, bad.role)
        assert said.startswith(f"{path}{bad.says}"), said
    else:
        got = load_set(bad.role, parse_set_spec(f"{path}{bad.query}"))
        assert [row.answer for row in got] == list(bad.answers)
        assert bad.prompts is None or [row.prompt for row in got] == list(bad.prompts)
    assert not (tmp_path / CANARY).exists(), "planted code ran"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("bad", [pytest.param(bad, id=bad.name) for bad in LARGE])
def test_a_large_file_takes_memory_in_proportion(bad: File, tmp_path: Path) -> None:
    path = made(bad, tmp_path)
    tracemalloc.start()
    try:
        load_set(bad.role, parse_set_spec(f"{path}{bad.query}"))
    except BadInput:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 128 * 2**20


def test_the_canary_would_sing(tmp_path: Path) -> None:
    """What the archives plant does run where a pickle is trusted."""
    import numpy as np

    planted = next(bad for bad in FILES if bad.name == "a planted pickle")
    path = made(planted, tmp_path)
    with np.load(path, allow_pickle=True) as archive:
        archive["X"]
    assert (tmp_path / CANARY).exists()


# --- names that no list can hold ----------------------------------------------------------------------------


def test_a_file_whose_name_takes_two_lines(tmp_path: Path) -> None:
    path = tmp_path / "a\nb\x1b[2J.jsonl"
    path.write_text("{}")
    assert complaint(path).startswith(f"{tmp_path}/a\\nb\\x1b[2J.jsonl: no preset fits")


def test_a_file_whose_name_is_not_text(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl"))
    path.write_text('{"text": "a"}')
    assert complaint(path).endswith("\\udcff.jsonl: cannot be read: its name is not text")
    assert complaint(tmp_path / "a\0b.jsonl").endswith("a\\x00b.jsonl: cannot be read: its name is not text")


def test_a_file_whose_name_is_too_long(tmp_path: Path) -> None:
    assert complaint(tmp_path / ("a" * 300 + ".jsonl")).endswith(": cannot be read: File name too long")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("file", ["f.jsonl", "f.parquet", "f.npz", "f"])
def test_what_may_not_be_read(file: str, tmp_path: Path) -> None:
    path = tmp_path / file
    path.write_bytes(b"") if path.suffix else path.mkdir()
    path.chmod(0)
    try:
        assert complaint(path) == f"{path}: cannot be read: Permission denied"
    finally:
        path.chmod(0o700)


# --- sets that are bad together -----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [pytest.param(bad, id=bad.name) for bad in SETS])
def test_what_sets_share_and_lack_is_noted_with_counts(bad: Sets, tmp_path: Path) -> None:
    specs = {}
    for name, rows in bad.rows.items():
        path = tmp_path / f"{name}.jsonl"
        lines = [{"question": q, "answer": a, "author": bad.author} for q, a in rows]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        specs[name] = SetSpec(path)
    assert Case.build({"target": tmp_path}, specs, Options()).notes == bad.notes


def test_images_of_one_class_and_images_shared_are_noted(tmp_path: Path) -> None:
    import numpy as np

    pixels = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    np.savez(tmp_path / "forget.npz", X=pixels, y=["cat"] * 3)
    np.savez(tmp_path / "holdout.npz", X=pixels[[0, 0]], y=["cat", "dog"])
    specs = {name: SetSpec(tmp_path / f"{name}.npz") for name in ("forget", "holdout")}
    assert Case.build({"target": tmp_path}, specs, Options()).notes == (
        "1 row of forget also in holdout",
        "all 3 rows of forget have the same answer: cat",
        "1 of 2 rows of holdout lie in what was taught: no control of those",
    )


# --- the command line ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "says"),
    [("a raw NUL in JSON", ":1: not JSON: Invalid control character"), ("a planted pickle", ": not a readable .npz")],
)
def test_the_command_line_says_one_line_and_leaves_with_2(
    name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import cli

    path = made(next(bad for bad in FILES if bad.name == name), tmp_path)
    words = ["audit", "scan", tmp_path, "--forget", path, "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    *steps, said = capsys.readouterr().err.strip().splitlines()
    assert said.startswith(f"audit: {path}{says}")
    assert all(step.endswith("…") for step in steps)
    assert not (tmp_path / CANARY).exists()


# --- any bytes ----------------------------------------------------------------------------------------------

PIECES = [
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b":",
    b",",
    b"\n",
    b"\r",
    b"\\",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\\ud800",
    b"1",
]
PIECES += [
    b"e9",
    b"NaN",
    b"null",
    b'"text":',
    b'"question":',
    b'"answer":',
    b"text",
    b"question,answer",
    b"a",
    b"\xc3\xa9",
]
anything = st.one_of(st.binary(max_size=60), st.lists(st.sampled_from(PIECES), max_size=25).map(b"".join))
fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def loads(path: Path) -> ExampleSet | None:
    """The set, or None where it is refused as it should be."""
    try:
        return load_set("forget", SetSpec(path))
    except BadInput as error:
        assert str(error).startswith(str(path)) and str(error).isprintable()
        return None


@fuzz
@given(data=anything, suffix=st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".txt"]))
@example(data=b'{"text": 1e999}', suffix=".jsonl")
@example(data=b'question,answer\n"a\0', suffix=".csv")
def test_any_bytes_are_a_set_or_are_refused(data: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"f{suffix}"
    path.write_bytes(data)
    got = loads(path)
    assert got is None or all(row.answer.strip() for row in got)


@fuzz
@given(at=st.integers(0, 200), put=anything, cut=st.integers(0, 9))
def test_a_good_file_with_bytes_changed(at: int, put: bytes, cut: int, tmp_path: Path) -> None:
    """No row is lost in silence: what still loads has a row for every line that is not blank."""
    data = b"".join(b'{"question": "q%d", "answer": "a%d"}\n' % (i, i) for i in range(5))
    path = tmp_path / "f.jsonl"
    path.write_bytes(changed := data[:at] + put + data[at + cut :])
    if (got := loads(path)) is not None:
        assert len(got) == sum(1 for line in changed.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip())


@pytest.mark.parametrize("name", ["an archive", "whole numbers beside text"])
@settings(fuzz, max_examples=60)
@given(at=st.integers(0, 3000), put=st.binary(max_size=4))
@example(at=203, put=b"\x80")
def test_a_good_binary_file_with_bytes_changed(name: str, at: int, put: bytes, tmp_path: Path) -> None:
    path = tmp_path / next(bad for bad in FILES if bad.name == name).file
    if not (good := path.with_name("good")).exists():
        made(next(bad for bad in FILES if bad.name == name), tmp_path)
        path.rename(good)
    data = good.read_bytes()
    at %= len(data)
    path.write_bytes(data[:at] + put + data[at + len(put) :])
    loads(path)


def test_rows_that_are_read_name_their_places(tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    path.write_text('question,answer\n"q\nq",a\n\nr,b\n')
    assert [row.place for row in read_rows(path)] == [f"{path}:2", f"{path}:5"]
