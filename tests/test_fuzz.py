"""Whatever the bytes: what reads a GGUF header, a case, a policy, a profile or a record reads it, or refuses it in one
line that names the file. Examples are seeds that once found something, or that lie where bugs would.

Elsewhere: safetensors headers, shard indices, configurations and tokenizers in `test_hostile.py` and
`test_inventory.py`, example sets in `test_bad_data.py`, blocks and notes of evidence in `test_faults.py`.
"""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile import EMBEDDING, INDEX, NAME, SECOND, WEIGHTS, sound, tensors, write
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sample_record import sample

from audit.case import read_case
from audit.errors import BadInput, Refused
from audit.fleet.file import read_fleet
from audit.inventory import take_inventory
from audit.policy import read_policy
from audit.profile import read_profile
from audit.record import Record

fuzz = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def reads(read: Callable[[Path], Any], path: Path, within: Path | None = None) -> Any:
    """What it reads; None if it refuses, in one line that begins with the file's path, or one within the folder."""
    try:
        return read(path)
    except (BadInput, Refused) as error:
        assert str(error).startswith(str(within or path))
        return None


# --- GGUF


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def gguf(keys: dict[bytes, tuple[int, bytes]], rows: list[tuple[bytes, list[int], int, int]], tail: bytes) -> bytes:
    """A GGUF file by hand: keys with type and raw value, tensors with sizes, type and offset, and what follows."""
    data = b"GGUF" + struct.pack("<IQQ", 3, len(rows), len(keys))
    for key, (kind, value) in keys.items():
        data += text(key) + struct.pack("<I", kind) + value
    for name, sizes, kind, offset in rows:
        data += text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)
    return data + bytes(-len(data) % 32) + tail


SOUND = {
    b"general.architecture": (8, text(b"llama")),
    b"tokenizer.ggml.tokens": (9, struct.pack("<IQ", 8, 2) + text(b"a") + text(b"b")),
}
ROW = (b"w", [2, 4], 0, 0)
sizes = st.lists(st.integers(0, 5) | st.sampled_from([1 << 31, 1 << 62, (1 << 64) - 1]), max_size=6)
names = st.sampled_from([b"w", b"v", b"", b"\xff"])
odd = st.none() | sizes | st.text(max_size=4)
raw_values = st.binary(max_size=12) | st.binary(max_size=8).map(text)


def test_the_builder_builds(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf(SOUND, [ROW], bytes(32)))
    assert take_inventory(path).parameters == 8


@fuzz
@given(
    keys=st.dictionaries(
        st.sampled_from([*SOUND, b"general.alignment", b"split.count", b"tokenizer.chat_template", b"\xff", b""]),
        st.tuples(st.integers(0, 14), raw_values),
        max_size=4,
    ),
    rows=st.lists(
        st.tuples(names, sizes, st.integers(0, 45), st.integers(0, 64)),
        max_size=3,
    ),
    tail=st.binary(max_size=70),
    cut=st.integers(0, 60),
)
@example(keys={b"general.alignment": (4, bytes(4))}, rows=[ROW], tail=bytes(32), cut=0)
@example(keys={b"general.alignment": (6, struct.pack("<f", float("nan")))}, rows=[ROW], tail=bytes(32), cut=0)
@example(keys={b"split.count": (8, text(b"2"))}, rows=[ROW], tail=bytes(32), cut=0)
@example(keys={b"tokenizer.chat_template": (9, struct.pack("<IQ", 0, 1 << 63))}, rows=[ROW], tail=bytes(32), cut=0)
@example(keys={}, rows=[(b"w", [1 << 62, 1 << 62, 0], 0, 0)], tail=b"", cut=0)
@example(keys={}, rows=[(b"w", [], 8, 0)], tail=bytes(34), cut=0)
def test_any_gguf(tmp_path, keys, rows, tail, cut):
    data = gguf(SOUND | keys, rows, tail)
    path = tmp_path / "m.gguf"
    path.write_bytes(data[: len(data) - cut])
    reads(take_inventory, path)


# --- folders: the refusal names a file within


@fuzz
@given(
    changes=st.dictionaries(st.sampled_from([*EMBEDDING, "__proto__"]), odd),
    index=st.none() | st.dictionaries(st.sampled_from(["weight_map", "metadata"]), odd | st.just({NAME: SECOND})),
    config=st.none() | st.dictionaries(st.sampled_from(["architectures", "dtype", "vocab_size"]), odd),
)
@example(changes={}, index=None, config={"vocab_size": [10**400]})
def test_any_folder(tmp_path, changes, index, config):
    folder = sound(tmp_path / "sound")
    (folder / INDEX).unlink(missing_ok=True)
    write(folder / WEIGHTS, tensors({NAME: EMBEDDING | changes}))
    if index is not None:
        write(folder / INDEX, json.dumps(index))
    if config is not None:
        write(folder / "config.json", json.dumps(json.loads((folder / "config.json").read_text()) | config))
    reads(take_inventory, folder, within=folder)


# --- what the command line reads besides


READERS = {
    "case.toml": read_case,
    "fleet.toml": read_fleet,
    "policy.toml": read_policy,
    "profile.json": read_profile,
    "record.json": Record.read,
}


@pytest.mark.parametrize("name", READERS)
@fuzz
@given(data=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(data=b"x = " + b"[" * 5000)  # brackets deeper than the parser's stack
@example(data=b"[" * 100_000)
@example(data=b"x = " + b"9" * 5000)  # more digits than Python turns into a number
@example(data=b'{"schema_version": ' + b"9" * 5000 + b"}")
@example(data=b"\xef\xbb\xbf{}")
@example(data=b"\x00")
def test_any_bytes(name, data, tmp_path):
    path = tmp_path / name
    path.write_bytes(data)
    reads(READERS[name], path)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["1.0", "1e999", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@fuzz
@given(path=st.lists(st.integers(0, 30), min_size=1, max_size=6), value=JSON)
@example(path=[0], value="\ud800")
def test_a_record_with_anything_anywhere(tmp_path, path, value):
    """A record that is read is also one that can be written again."""
    data = copy.deepcopy(RECORD)
    place, last = data, None
    for step in path:
        keys = sorted(place) if isinstance(place, dict) else list(range(len(place))) if isinstance(place, list) else []
        if not keys:
            break
        holder, last = place, keys[step % len(keys)]
        place = place[last]
    holder[last] = value
    file = tmp_path / "record.json"
    file.write_text(json.dumps(data))
    if (record := reads(Record.read, file)) is not None:
        record.write(file)
        assert Record.read(file) == record


RECORD = sample().model_dump(mode="json")
