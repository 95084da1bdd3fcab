"""What a file really is, whatever its name says: pickles, archives and programs are told by name and by content.

    refuse_disguised(path)  # raises Refused if loading, unpacking or running it could run code

A refusal's code says what it is: `pickle` (what runs code when it is loaded), `archive` or `program`. Nothing is
unpickled, unpacked or imported. Of each file the first 16 MiB and the last 64 KiB are looked at.
"""

from __future__ import annotations

import io
import os
import pickletools
import re
import tarfile
import zlib
from pathlib import Path

from audit.errors import Refused

_PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".dill", ".cloudpickle", ".joblib", ".sav", ".msgpack"}
_PICKLED |= {".h5", ".hdf5", ".keras", ".npy", ".npz", ".pb", ".pdparams", ".pdmodel", ".ptl", ".pte", ".t7", ".nemo"}
_PICKLED |= {".mar", ".rds", ".rdata"}
_ARCHIVES = {".zip", ".tar", ".tgz", ".tbz", ".txz", ".gz", ".bz2", ".xz", ".lzma", ".zst", ".lz4", ".7z", ".rar"}
_CODE = {".py", ".pyc", ".pyo", ".pyw", ".pyz", ".pyd", ".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".cmd", ".ps1"}
_CODE |= {".whl", ".egg", ".jar", ".wasm", ".node"}

_CAN_RUN = {
    **{bytes((0x80, protocol)): "a pickle" for protocol in range(6)},
    b"PK\x03\x04": "a zip archive (how torch.save packs pickles)",
    b"PK\x05\x06": "a zip archive",
    b"PK\x07\x08": "a zip archive",
    b"\x89HDF\r\n\x1a\n": "HDF5",
    b"\x93NUMPY": "a numpy array file",
    b"\x7fELF": "compiled code",
    b"\xcf\xfa\xed\xfe": "compiled code",
    b"\xce\xfa\xed\xfe": "compiled code",
    b"\xca\xfe\xba\xbe": "compiled code",
    b"\x00asm": "compiled code",
    b"!<arch>\n": "compiled code",
    b"#!": "a script",
}
_HIDES = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x5d\x00\x00": "lzma",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"\x04\x22\x4d\x18": "LZ4",
    b"7z\xbc\xaf\x27\x1c": "7-Zip",
    b"Rar!\x1a\x07": "RAR",
    b"ZF0x": "an old joblib file",
}

_PROGRAMS = {"compiled code", "a script"}
_REMOVE = "remove it"

_HEAD = 16 << 20
_TAIL = 22 + 0xFFFF  # a zip's last record with the longest comment
_MAX_OPCODES = 100_000
_TUPLES = {"MARK", "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}  # what a call takes its arguments from
_NAME = re.compile(r"[A-Za-z_][\w.]* [A-Za-z_][\w.]*", re.ASCII)


def refuse_by_name(path: Path) -> None:
    """Raise Refused if the file's name alone says that it is pickled, packed or a program."""
    base, suffix = path.name.lower(), path.suffix.lower()
    if suffix in _PICKLED:
        raise Refused(
            f"{path}: weights or data in a format ({suffix}) that can run code; only safetensors and GGUF are opened",
            "remove or convert it",
            "pickle",
        )
    if suffix in _ARCHIVES:
        raise Refused(f"{path}: an archive ({suffix}), which hides what it holds", "unpack or remove it", "archive")
    if suffix in _CODE or ".so." in base:
        raise Refused(f"{path}: custom code, which an audit never runs", "remove it", "program")


def refuse_disguised(path: Path, within_git: bool = False) -> None:
    """Raise Refused if the file's content is a pickle, an archive or a program.

    Git's own folder holds compressed objects and sample scripts; with `within_git` these are let be.

    Raises:
        Refused: such content, or an unfinished stream of pickle opcodes that is too long to walk.
        OSError: the file cannot be read.
    """
    weights = path.suffix.lower() in (".safetensors", ".gguf")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(1024 if weights else _HEAD)
        hdf = any(_at(file, 512 << i, 8) == b"\x89HDF\r\n\x1a\n" for i in range(max(0, size.bit_length() - 9)))
        tail = _at(file, max(0, size - _TAIL), _TAIL)
    # A safetensors file begins with its header's length, which may be 0x0280; every byte of it is accounted for.
    if not weights:
        for magic, what in _CAN_RUN.items():
            if head.startswith(magic) and not (within_git and magic == b"#!"):
                code = "program" if what in _PROGRAMS else "pickle"
                raise Refused(f"{path}: begins like {what}, which can run code, whatever its name says", _REMOVE, code)
        packed = next((name for magic, name in _HIDES.items() if head.startswith(magic)), _zlib(head))
        if packed and not within_git:
            raise Refused(f"{path}: begins like {packed}, which hides what it holds", "unpack or remove it", "archive")
        if _is_windows_program(head) or _is_compiled_python(head):
            what = "begins like compiled code, which can run code, whatever its name says"
            raise Refused(f"{path}: {what}", _REMOVE, "program")
        if reason := _pickle_that_calls(head):
            raise Refused(f"{path}: is a pickle without a header ({reason}), whatever its name says", _REMOVE, "pickle")
        if path.suffix.lower() in (".yaml", ".yml") and b"!!python/" in head:
            raise Refused(f"{path}: YAML that names Python objects (!!python/), which can run code", _REMOVE, "pickle")
    if hdf:
        raise Refused(f"{path}: holds HDF5 behind other bytes, which can run code", _REMOVE, "pickle")
    if _ends_like_zip(tail):
        what = "ends like a zip archive, which can run code, whatever its beginning says"
        raise Refused(f"{path}: {what}", _REMOVE, "pickle")
    if _is_tar(head):
        raise Refused(f"{path}: a tar archive, which hides what it holds", "unpack or remove it", "archive")


def _at(file: io.BufferedReader, position: int, count: int) -> bytes:
    file.seek(position)
    return file.read(count)


def _ends_like_zip(tail: bytes) -> bool:
    """Readers look for a zip from its end: a last record whose comment runs to the very end of the file."""
    at = tail.rfind(b"PK\x05\x06")
    return at >= 0 and len(tail) - at >= 22 and int.from_bytes(tail[at + 20 : at + 22], "little") == len(tail) - at - 22


def _is_tar(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head[:512], "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return False
    return True


def _zlib(head: bytes) -> str | None:
    """How joblib packs by default: no magic but two bytes, so a little is unpacked to be sure."""
    if len(head) < 8 or head[0] & 0x0F != 8 or head[0] >> 4 > 7 or int.from_bytes(head[:2], "big") % 31:
        return None
    try:
        return "zlib" if zlib.decompressobj().decompress(head[:4096], 256) else None
    except zlib.error:
        return None


def _is_windows_program(head: bytes) -> bool:
    at = int.from_bytes(head[60:64], "little")
    return head.startswith(b"MZ") and head[at : at + 4] == b"PE\0\0"


def _is_compiled_python(head: bytes) -> bool:
    """A `.pyc`: a version number near 3400, then a line break, then flags that are 0, 1 or 3."""
    return head[2:4] == b"\r\n" and 3000 <= int.from_bytes(head[:2], "little") < 4000 and head[4:8] in _FLAGS


_FLAGS = {bytes((flags, 0, 0, 0)) for flags in (0, 1, 3)}


def _pickle_that_calls(head: bytes) -> str:
    """Does this read as a pickle (also of protocol 0 or 1, which have no magic) that imports or calls something?

    Its opcodes are walked as text is, none is obeyed. Prose soon holds a byte that is no opcode; what unpickles
    does not, up to its first call at least.
    """
    seen, module = set(), ""
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(head))):
            seen.add(opcode.name)
            if opcode.name in ("GLOBAL", "INST"):
                module = str(argument)
                if not _NAME.fullmatch(module):
                    return ""
            imports = bool(seen & {"GLOBAL", "INST", "STACK_GLOBAL"})
            calls = opcode.name in ("REDUCE", "NEWOBJ", "OBJ", "INST", "BUILD")
            if imports and (opcode.name == "STOP" or (calls and seen & _TUPLES)):
                return f"it calls {module.replace(' ', '.')[:80]}" if module else "it imports something"
            if count > _MAX_OPCODES:
                return "its opcodes are too many to follow"
    except Exception:  # pickletools raises whatever the bytes provoke: then no unpickler gets further either
        return ""
    return ""
