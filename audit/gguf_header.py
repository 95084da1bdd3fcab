"""The header of a GGUF file: keys and tensors, read with the standard library, checked against the file.

`gguf` itself needs numpy and trusts what it reads. An inventory opens files that nobody vouches for, so here
every count and length is checked against the bytes that are there before it is used.
"""

from __future__ import annotations

import math
import os
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from audit.errors import Refused

# A real header (vocabulary, merges, chat template, tensor table) takes some 10 MB. The limit bounds the time
# that a hostile one can cost, since each of its strings is stepped over one by one.
_MAX_HEADER = 100_000_000

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

# ggml type: (name, elements per block, bytes per block).
_TYPES = {
    0: ("float32", 1, 4),
    1: ("float16", 1, 2),
    2: ("q4_0", 32, 18),
    3: ("q4_1", 32, 20),
    6: ("q5_0", 32, 22),
    7: ("q5_1", 32, 24),
    8: ("q8_0", 32, 34),
    9: ("q8_1", 32, 40),
    10: ("q2_k", 256, 84),
    11: ("q3_k", 256, 110),
    12: ("q4_k", 256, 144),
    13: ("q5_k", 256, 176),
    14: ("q6_k", 256, 210),
    15: ("q8_k", 256, 292),
    16: ("iq2_xxs", 256, 66),
    17: ("iq2_xs", 256, 74),
    18: ("iq3_xxs", 256, 98),
    19: ("iq1_s", 256, 50),
    20: ("iq4_nl", 32, 18),
    21: ("iq3_s", 256, 110),
    22: ("iq2_s", 256, 82),
    23: ("iq4_xs", 256, 136),
    24: ("int8", 1, 1),
    25: ("int16", 1, 2),
    26: ("int32", 1, 4),
    27: ("int64", 1, 8),
    28: ("float64", 1, 8),
    29: ("iq1_m", 256, 56),
    30: ("bfloat16", 1, 2),
    34: ("tq1_0", 256, 54),
    35: ("tq2_0", 256, 66),
    39: ("mxfp4", 32, 17),
    40: ("nvfp4", 64, 36),
    41: ("q1_0", 128, 18),
}


@dataclass(frozen=True)
class GGUFHeader:
    """Architecture, size of the embedded vocabulary, (name, dtype, shape in torch's order) per tensor, templates."""

    architecture: str
    tokens: int
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]
    chat_templates: tuple[str, ...]


class _Cursor:
    """A place in the header that never moves past the end of the file, nor past the limit."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self.file, self.path, self.limit, self.at = file, path, min(size, _MAX_HEADER), 0

    def refusal(self, reason: str) -> Refused:
        return Refused(f"{self.path}: broken GGUF header: {reason}")

    def _advance(self, count: int) -> None:
        if count > self.limit - self.at:
            raise self.refusal(f"it runs past the end of the file (or past {_MAX_HEADER} bytes) at byte {self.at}")
        self.at += count

    def take(self, count: int) -> bytes:
        self._advance(count)
        data = self.file.read(count)
        if len(data) != count:
            raise self.refusal("the file shrank while it was read")
        return data

    def skip(self, count: int) -> None:
        self._advance(count)
        self.file.seek(self.at)

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        raw = self.take(self.number("Q"))
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.refusal(f"a name that is not UTF-8 before byte {self.at}") from None
        if not text or not text.isprintable():
            raise self.refusal(f"a name that is empty or not printable before byte {self.at}")
        return text

    def value(self, kind: int) -> Any:
        """One value: a number, the bytes of a string, or (element type, count) of an array stepped over."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.take(self.number("Q"))
        if kind != _ARRAY:
            raise self.refusal(f"unknown value type {kind} before byte {self.at}")
        element, count = self.number("I"), self.number("Q")
        if element in _SCALARS:
            self.skip(count * struct.calcsize(f"<{_SCALARS[element]}"))
        elif element == _STRING:
            for _ in range(count):
                self.skip(self.number("Q"))
        else:  # llama.cpp reads no arrays of arrays either
            raise self.refusal(f"array of unknown type {element} before byte {self.at}")
        return element, count


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read and check the header of a GGUF file (version 2 or 3, little-endian).

    Raises:
        Refused: not GGUF, a header that runs past the file, repeated keys or tensors, a tensor whose bytes
            overlap another's, leave a hole or lie outside the file, or one part of a model split over files.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        cursor = _Cursor(file, path, size)
        magic, version = cursor.take(4), cursor.number("I")
        if magic != b"GGUF":
            raise cursor.refusal(f"it begins with {magic!r}, not with b'GGUF'")
        if version not in (2, 3):
            raise cursor.refusal(f"version {version}, not 2 or 3")
        n_tensors, n_keys = cursor.number("Q"), cursor.number("Q")
        # The smallest key takes 14 bytes, the smallest tensor 25: counts beyond that cannot be true.
        if n_keys * 14 + n_tensors * 25 > cursor.limit:
            raise cursor.refusal(f"{n_keys} keys and {n_tensors} tensors do not fit into the file")

        values: dict[str, Any] = {}
        for _ in range(n_keys):
            key = cursor.text()
            if key in values:
                raise cursor.refusal(f"duplicate key {key[:80]!r}")
            values[key] = cursor.value(cursor.number("I"))
        if values.get("split.count", 1) not in (0, 1):
            raise Refused(f"{path}: one part of a GGUF model split over files", "merge the parts first")
        alignment = values.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= 65536 or alignment & (alignment - 1):
            raise cursor.refusal("general.alignment is not a power of two from 8 to 65536")

        tensors = [_tensor(cursor) for _ in range(n_tensors)]
        header_end = cursor.at

    data_size = size - _align(header_end, alignment)
    position = 0
    for begin, end, name, _, _ in sorted(tensors):
        # Each tensor begins where the one before it ends, rounded up to the alignment.
        if begin != position:
            raise cursor.refusal(f"tensor {name[:80]!r} begins at byte {begin} of the data, expected {position}")
        if end > data_size:
            raise cursor.refusal(f"tensor {name[:80]!r} ends outside the file")
        position = _align(end, alignment)
    if data_size > position:
        raise cursor.refusal(f"{data_size - position} bytes after the last tensor that belong to none")
    name, count = next(iter(Counter(row[2] for row in tensors).most_common(1)), ("", 1))
    if count > 1:
        raise cursor.refusal(f"duplicate tensor {name[:80]!r}")

    return GGUFHeader(
        architecture=_architecture(cursor, values.get("general.architecture")),
        tokens=_count_strings(values.get("tokenizer.ggml.tokens")),
        tensors=tuple((name, dtype, shape) for _, _, name, dtype, shape in tensors),
        chat_templates=tuple(
            value.decode("utf-8", "replace")
            for key, value in values.items()
            if key.startswith("tokenizer.chat_template") and isinstance(value, bytes)
        ),
    )


def _tensor(cursor: _Cursor) -> tuple[int, int, str, str, tuple[int, ...]]:
    """One row of the tensor table: begin and end of its bytes, name, dtype, shape in torch's order."""
    name, rank = cursor.text(), cursor.number("I")
    if rank > 4:
        raise cursor.refusal(f"tensor {name[:80]!r} has {rank} dimensions, at most 4 are allowed")
    sizes = [cursor.number("Q") for _ in range(rank)]
    kind, begin = cursor.number("I"), cursor.number("Q")
    if kind not in _TYPES:
        raise cursor.refusal(f"tensor {name[:80]!r} is of unknown type {kind}")
    dtype, per_block, block_bytes = _TYPES[kind]
    if (sizes[0] if sizes else 1) % per_block:  # quantized blocks do not cross rows
        raise cursor.refusal(f"tensor {name[:80]!r}: rows are no whole number of {dtype} blocks")
    end = begin + math.prod(sizes) // per_block * block_bytes
    return begin, end, name, dtype, tuple(reversed(sizes))  # GGUF lists the fastest dimension first


def _architecture(cursor: _Cursor, raw: Any) -> str:
    name = raw.decode("ascii", "replace") if isinstance(raw, bytes) else ""
    if not 0 < len(name) <= 64 or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise cursor.refusal("general.architecture is missing or not a name")
    return name


def _count_strings(value: Any) -> int:
    return value[1] if isinstance(value, tuple) and value[0] == _STRING else 0


def _align(position: int, alignment: int) -> int:
    return (position + alignment - 1) // alignment * alignment
