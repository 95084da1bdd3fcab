"""The header of a safetensors file, read with the standard library and checked against the file; its values too.

    header = read_safetensors_header(path)
    header.tensors      # name, dtype as torch spells it, shape, and the place of its bytes

The `safetensors` package checks much of this when it loads. An inventory is taken before anything is loaded, of
files that nobody vouches for, so here every byte of the file must belong to the header or to one tensor.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from audit.errors import Refused
from audit.strict_json import parse_json

# safetensors itself allows 100 MB, of which reading takes a minute and gigabytes. The headers of the largest
# models in use (some 90,000 tensors) take about ten.
_MAX_HEADER = 32 << 20
_CHUNK = 1 << 20

# safetensors dtype: (torch's name, bits per element).
_DTYPES = {
    "F64": ("float64", 64),
    "F32": ("float32", 32),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F6_E2M3": ("float6_e2m3", 6),
    "F6_E3M2": ("float6_e3m2", 6),
    "F4": ("float4_e2m1fn", 4),
    "C64": ("complex64", 64),
    "I64": ("int64", 64),
    "I32": ("int32", 32),
    "I16": ("int16", 16),
    "I8": ("int8", 8),
    "U64": ("uint64", 64),
    "U32": ("uint32", 32),
    "U16": ("uint16", 16),
    "U8": ("uint8", 8),
    "BOOL": ("bool", 8),
}

# torch dtype: (numpy's unsigned integer of that width, the bits that are all set in NaN and infinity).
_EXPONENTS = {
    "float64": ("<u8", 0x7FF0_0000_0000_0000),
    "float32": ("<u4", 0x7F80_0000),
    "float16": ("<u2", 0x7C00),
    "bfloat16": ("<u2", 0x7F80),
    "float8_e5m2": ("<u1", 0x7C),
    "float8_e4m3fn": ("<u1", 0x7F),  # has no infinity; this is its NaN
}


class Span(NamedTuple):
    """One tensor: where its bytes begin and end after the header, its name, dtype and shape."""

    begin: int
    end: int
    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SafetensorsHeader:
    """Where the data begins in the file, and the tensors in the order in which the header lists them."""

    data_begin: int
    tensors: tuple[Span, ...]


def read_safetensors_header(path: Path) -> SafetensorsHeader:
    """Read and check the header of one file, whose bytes its tensors must cover once, without holes, to the last.

    Raises:
        Refused: a header that runs past the file or the limit, is not JSON, repeats a key, or describes a tensor
            with an unknown dtype, an absurd shape, or bytes that do not fit it, overlap or lie outside the file.
        OSError: the file cannot be read.
    """
    broken = f"{path}: broken safetensors header"
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER):
            raise Refused(f"{broken}: its length exceeds the file or {_MAX_HEADER} bytes")
        raw = file.read(length)
    header = parse_json(path, raw) if raw.startswith(b"{") else None
    if not isinstance(header, dict):
        raise Refused(f"{broken}: not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Refused(f"{broken}: __metadata__ does not map text to text")

    tensors = tuple(_span(f"{broken}: tensor {name[:80]!r}", name, info) for name, info in header.items())
    position, data = 0, size - 8 - length
    for begin, end, name, *_ in sorted(tensors):
        where = f"{broken}: tensor {name[:80]!r}"
        if end > data:
            raise Refused(f"{where} ends outside the file")
        if begin != position:
            raise Refused(f"{where} {'overlaps the one before it' if begin < position else 'begins after a hole'}")
        position = end
    if position != data:
        raise Refused(f"{path}: {data - position} bytes at the end that belong to no tensor")
    return SafetensorsHeader(8 + length, tensors)


def _span(where: str, name: str, info: Any) -> Span:
    if not name or not name.isprintable():
        raise Refused(f"{where} has an empty or unprintable name")
    if not isinstance(info, dict) or info.keys() != {"dtype", "shape", "data_offsets"}:
        raise Refused(f"{where} needs dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise Refused(f"{where} has the unknown dtype {str(dtype)[:40]!r}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise Refused(f"{where} has a shape or offsets that are no lists of sizes")
    torch_name, bits = _DTYPES[dtype]
    if math.prod(n for n in shape if n) >= 1 << 63:  # a dimension of 0 makes it empty, yet its strides overflow
        raise Refused(f"{where} has an absurd shape")
    if (offsets[1] - offsets[0]) * 8 != math.prod(shape) * bits:
        raise Refused(f"{where} has offsets that do not fit its shape and dtype")
    return Span(offsets[0], offsets[1], name, torch_name, tuple(shape))


def _are_sizes(value: Any) -> bool:
    """A list of at most 64 (torch's limit) whole numbers from 0 to 2**63 - 1; True is no number here."""
    return isinstance(value, list) and len(value) <= 64 and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def read_values(file: BinaryIO, path: Path, header: SafetensorsHeader) -> Iterator[bytes]:
    """All bytes of the file from its beginning, in pieces, each checked for NaN and infinity before it is yielded.

    The last piece may be followed by bytes that the header does not know, of a file that has grown since.

    Raises:
        Refused: a weight that is no finite number.
    """
    yield from _pieces(file, header.data_begin)
    for span in sorted(header.tensors):
        for piece in _pieces(file, span.end - span.begin):
            _check_finite(path, span, piece)
            yield piece
    yield from iter(lambda: file.read(_CHUNK), b"")


def _pieces(file: BinaryIO, count: int) -> Iterator[bytes]:
    while count and (piece := file.read(min(count, _CHUNK))):
        count -= len(piece)
        yield piece


def _check_finite(path: Path, span: Span, piece: bytes) -> None:
    import numpy as np  # here, for what only reads headers does without

    integer, exponent = _EXPONENTS.get(span.dtype, ("", 0))
    if integer and len(piece) % np.dtype(integer).itemsize == 0:  # else the file shrank, which its size will show
        bits = np.frombuffer(piece, integer)
        if bool(((bits & bits.dtype.type(exponent)) == exponent).any()):
            raise Refused(f"{path}: tensor {span.name[:80]!r} holds NaN or infinity: such weights answer nothing")
