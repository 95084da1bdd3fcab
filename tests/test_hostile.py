"""The corpus of hostile folders (`hostile.py`): each is refused in one line that names the file, and nothing runs."""

from __future__ import annotations

import json
import os
import pickle
import time
import tracemalloc
from pathlib import Path
from typing import Any

import hostile
import pytest
from hostile import EMBEDDING, FIRST, FOLDERS, INDEX, NAME, SECOND, WEIGHTS, Folder, raw, sound, tensors, write
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import audit.inventory
import cli
from audit.disguises import refuse_disguised
from audit.errors import Refused
from audit.inventory import take_inventory

HOSTILE = [row for row in FOLDERS if row.words]
HARMLESS = [row for row in FOLDERS if not row.words]
FIRST_OF_EACH_FAMILY = list({row.family: row for row in reversed(HOSTILE)}.values())


def label(row: Folder) -> str:
    return f"{row.family}: {row.name}".encode("ascii", "backslashreplace").decode()


def build(tmp_path: Path, row: Folder) -> tuple[Path, Path]:
    """The folder of this row, and its canary."""
    folder, canary = sound(tmp_path / "sound"), tmp_path / "canary"
    row.make(folder, canary)
    return folder, canary


def check(message: str, row: Folder) -> None:
    assert message.isprintable(), "one line, and nothing that moves a terminal's cursor"
    assert "Traceback" not in message and len(message) < 700
    assert row.file in message
    assert row.words in message


def test_the_corpus_is_large_and_without_doubles():
    assert len(HOSTILE) >= 120
    assert len({label(row) for row in FOLDERS}) == len(FOLDERS)


@pytest.mark.parametrize("protocol", range(6))
def test_the_canary_is_alive(tmp_path, protocol):
    pickle.loads(hostile.bomb(protocol)(tmp_path / "canary")).close()
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "text", [hostile.CALL, "(VPATH\nVw\nibuiltins\nopen\n.", "(cbuiltins\nopen\nVPATH\nVw\no."], ids=["R", "i", "o"]
)
def test_pickles_by_hand_run_too(tmp_path, text):
    pickle.loads(hostile.opcodes(text)(tmp_path / "canary")).close()
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("row", HOSTILE, ids=label)
def test_hostile_folders(tmp_path, row):
    folder, canary = build(tmp_path, row)
    start = time.process_time()
    with pytest.raises(Refused) as caught:
        take_inventory(folder)
    assert time.process_time() - start < 5
    check(str(caught.value), row)
    assert caught.value.todo and str(caught.value) == f"{caught.value.fault}; {caught.value.todo}"
    assert not canary.exists()


@pytest.mark.parametrize("row", HARMLESS, ids=label)
def test_harmless_folders(tmp_path, row):
    folder, canary = build(tmp_path, row)
    assert take_inventory(folder).parameters > 0
    assert not canary.exists()


@pytest.mark.parametrize("row", FIRST_OF_EACH_FAMILY, ids=label)
def test_by_the_command_line(tmp_path, monkeypatch, capsys, row):
    folder, canary = build(tmp_path, row)
    for name in ("forget", "retain", "holdout"):
        write(tmp_path / f"{name}.jsonl", json.dumps({"prompt": f"{name}?", "answer": "a"}))
    sets = [word for name in ("forget", "retain", "holdout") for word in (f"--{name}", str(tmp_path / f"{name}.jsonl"))]
    words = [
        "scan",
        str(folder),
        *sets,
        "--out",
        str(tmp_path / "out"),
        "--only",
        "memorization",
        "--template",
        "plain",
    ]
    monkeypatch.setattr("sys.argv", ["audit", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("audit: ")]
    assert left.value.code == 3
    assert len(said) == 1
    check(said[0], row)
    assert not canary.exists()
    assert not (tmp_path / "out" / "record.json").exists()


# --- what changes while it is read


def rewrite(folder: Path) -> None:
    """Other bytes, the same length, and even the same times as far as a user can set them."""
    path = folder / "config.json"
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b"llama", b"LLAMA"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def swap(folder: Path) -> None:
    (folder / "new").write_bytes((folder / "config.json").read_bytes())
    (folder / "new").replace(folder / "config.json")


@pytest.mark.parametrize(
    ("change", "file"),
    [
        (rewrite, "config.json"),
        (swap, "config.json"),
        (lambda folder: write(folder / "added.txt", "x"), "added.txt"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text("{}"), "config.json"),
    ],
    ids=["rewritten", "swapped", "added", "removed", "shortened"],
)
def test_what_changes_while_it_is_read(tmp_path, change, file):
    folder = sound(tmp_path / "sound")

    def progress(done: int, total: int) -> None:
        if done == total:
            change(folder)

    with pytest.raises(Refused, match=rf"{file}: changed while it was read"):
        take_inventory(folder, progress)


def test_too_many_files(tmp_path, monkeypatch):
    folder = sound(tmp_path / "sound")
    monkeypatch.setattr(audit.inventory, "_MAX_FILES", 2)
    with pytest.raises(Refused, match="holds more than 2 files"):
        take_inventory(folder)


def test_a_compressed_bomb_is_never_unpacked(tmp_path):
    import gzip
    import zlib

    for pack in (zlib.compress, gzip.compress):
        path = tmp_path / "notes.txt"
        path.write_bytes(pack(bytes(50 << 20)))
        tracemalloc.start()
        with pytest.raises(Refused):
            refuse_disguised(path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 40 << 20


# --- whatever the bytes, a refusal or an inventory, and nothing runs

fuzz = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["F32", "F4", "", "../x", FIRST])
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "weight_map", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


def survives(folder: Path) -> None:
    try:
        take_inventory(folder)
    except Refused as error:
        assert str(error).isprintable()


@fuzz
@given(data=st.binary(max_size=120))
@example(data=b"\x80\x02\x00\x00\x00\x00\x00\x00{}")
@example(data=b"\x02" + bytes(7) + b"{}")
@example(data=raw(b'{"w": NaN}'))
@example(data=raw(b'{"w": {"dtype": "F32", "shape": [1e400], "data_offsets": [0, 0]}}'))
@example(data=raw(b'{"\\ud800": {}}'))
def test_any_bytes_as_weights(tmp_path, data):
    write(sound(tmp_path / "sound") / WEIGHTS, data)
    survives(tmp_path / "sound")


@fuzz
@given(changes=st.dictionaries(st.sampled_from(list(EMBEDDING)), anything), more=anything, data=st.integers(0, 40))
@example(changes={"shape": [1 << 62, 1 << 62, 0], "data_offsets": [0, 0]}, more=None, data=0)
@example(changes={"shape": [], "dtype": "F4"}, more={}, data=1)
@example(changes={"data_offsets": [0, float("inf")]}, more=[], data=32)
def test_any_header(tmp_path, changes, more, data):
    folder = sound(tmp_path / "sound")
    for header in ({NAME: EMBEDDING | changes}, {NAME: EMBEDDING, "v": more}, {NAME: EMBEDDING, "__metadata__": more}):
        write(folder / WEIGHTS, tensors(header, data))
        survives(folder)


@fuzz
@given(edits=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=4))
@example(edits=[(8, 0x20)])
@example(edits=[(7, 0x80)])
def test_a_few_bytes_changed(tmp_path, edits):
    folder = sound(tmp_path / "sound")
    data = bytearray((folder / WEIGHTS).read_bytes())
    for position, value in edits:
        data[position % len(data)] = value
    write(folder / WEIGHTS, bytes(data))
    survives(folder)


@fuzz
@given(found=anything, files=st.dictionaries(st.sampled_from(["a", "b", "c"]), anything | st.just(SECOND), max_size=3))
@example(found={"weight_map": {"a": ["x"]}}, files={"a": {}})
@example(found={"weight_map": None}, files={"a": FIRST, "b": FIRST})
def test_any_index(tmp_path, found: Any, files: dict[str, Any]):
    folder = sound(tmp_path / "sound")
    if (folder / WEIGHTS).exists():
        hostile.sharded(lambda folder, canary: None)(folder, tmp_path / "canary")
    for content in (found, {"weight_map": files}):
        write(folder / INDEX, json.dumps(content))
        survives(folder)


@fuzz
@given(value=anything, tokens=st.dictionaries(st.text(max_size=3), anything, max_size=3))
@example(value={"text_config": [], "vocab_size": True}, tokens={"a": 10**30})
@example(value={"vocab_size": 2}, tokens={"a": float("nan")})
def test_any_tokenizer_and_configuration(tmp_path, value: Any, tokens: dict[str, Any]):
    steps = {"normalizer": value, "decoder": [value]}
    for change in ({"model": {"vocab": tokens}}, {"model": value}, {"added_tokens": value}, steps):
        folder = sound(tmp_path / "sound")
        write(folder / "tokenizer.json", json.dumps(hostile.TOKENIZER | change))
        survives(folder)
    write(folder / "config.json", json.dumps(value))
    survives(folder)
