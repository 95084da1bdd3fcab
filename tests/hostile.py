"""The corpus of hostile model folders: one row each, with what the refusal must say.

Each row starts from `sound`, a folder that is accepted, and changes it by a maker, a function of the folder and of a
canary: a path at which a file appears if planted code is run. Rows with no words are odd but harmless: they must be
accepted, for a scanner that cries at everything is switched off.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import marshal
import os
import pickle
import socket
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Content = bytes | str | dict[str, Any] | list[Any]
Maker = Callable[[Path, Path], object]
Planted = Callable[[Path], bytes]  # from the canary to bytes that create it when they are loaded


@dataclass(frozen=True)
class Folder:
    """One folder: how it is made, which file its refusal must name, and what it must say ("" if it is accepted)."""

    family: str
    name: str
    make: Maker
    file: str = ""
    words: str = ""


# --- what a sound folder is made of

VOCABULARY = {"<s>": 0, "</s>": 1, "a": 2, "b": 3}
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 4, "hidden_size": 2}
TOKENIZER = {"added_tokens": [{"id": 0, "content": "<s>"}], "model": {"type": "WordLevel", "vocab": VOCABULARY}}
EMBEDDING = {"dtype": "F32", "shape": [4, 2], "data_offsets": [0, 32]}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NAME = "model.embed_tokens.weight"


def sound(folder: Path) -> Path:
    """The folder that every row starts from."""
    write(folder / "config.json", CONFIG)
    write(folder / "tokenizer.json", TOKENIZER)
    write(folder / WEIGHTS, tensors({NAME: EMBEDDING}, 32))
    return folder


def write(path: Path, content: Content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, (dict, list)):
        content = json.dumps(content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def raw(header: bytes, data: bytes = b"") -> bytes:
    """A safetensors file with this header, whatever it says."""
    return struct.pack("<Q", len(header)) + header + data


def tensors(header: dict[str, Any], data: bytes | int = 32) -> bytes:
    return raw(json.dumps(header).encode(), bytes(data) if isinstance(data, int) else data)


def gguf(keys: int = 1, magic: bytes = b"GGUF", version: int = 3, tail: bytes = b"", **more: str) -> bytes:
    """A GGUF file without tensors, written by hand; `more` are keys (with __ for the dot) beside the architecture."""
    rows = b""
    for name, text in {"general__architecture": "llama", **more}.items():
        key, value = name.replace("__", ".").encode(), text.encode()
        rows += struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, len(value)) + value
    return magic + struct.pack("<IQQ", version, 0, keys + len(more)) + rows + tail


# --- makers


def put(name: str, content: Content | Planted) -> Maker:
    return lambda folder, canary: write(folder / name, content(canary) if callable(content) else content)


def keys(name: str, **more: Any) -> Maker:
    """Add keys to a JSON file, which may be new."""

    def make(folder: Path, canary: Path) -> None:
        path = folder / name
        write(path, (json.loads(path.read_text()) if path.exists() else {}) | more)

    return make


def tensor(**changes: Any) -> Maker:
    """The only tensor of the weights, described otherwise."""
    return put(WEIGHTS, tensors({NAME: EMBEDDING | changes}))


def values(dtype: str, bits: bytes) -> Maker:
    """A second tensor of this dtype, whose last element is made of these bits."""
    size = 8 * len(bits)
    header = {NAME: EMBEDDING, "v": {"dtype": dtype, "shape": [8], "data_offsets": [32, 32 + size]}}
    return put(WEIGHTS, tensors(header, bytes(32 + size - len(bits)) + bits))


def without(name: str, then: Maker | None = None) -> Maker:
    def make(folder: Path, canary: Path) -> None:
        (folder / name).unlink()
        if then:
            then(folder, canary)

    return make


def sharded(then: Maker) -> Maker:
    """Two shards with their index, then a change."""

    def make(folder: Path, canary: Path) -> None:
        (folder / WEIGHTS).unlink()
        write(folder / FIRST, tensors({"a": EMBEDDING}))
        write(folder / SECOND, tensors({"b": EMBEDDING}))
        write(folder / INDEX, {"metadata": {"total_size": 64}, "weight_map": {"a": FIRST, "b": SECOND}})
        then(folder, canary)

    return make


def index(**weight_map: Any) -> Maker:
    return sharded(put(INDEX, {"weight_map": weight_map}))


def link(name: str, target: str) -> Maker:
    return lambda folder, canary: (folder / name).symlink_to(target)


def outside(then: Callable[[Path, Path], object]) -> Maker:
    """A file beside the model folder, which `then` reaches from within."""

    def make(folder: Path, canary: Path) -> None:
        secret = folder.parent / "secret.txt"
        secret.write_text("secret")
        then(folder, secret)

    return make


def listen(folder: Path, canary: Path) -> None:
    here = Path.cwd()
    os.chdir(folder)  # a socket's path is limited to some hundred characters
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("sock")
    finally:
        os.chdir(here)


def hole(name: str, size: int) -> Maker:
    def make(folder: Path, canary: Path) -> None:
        with (folder / name).open("wb") as file:
            file.truncate(size)

    return make


# --- planted code


class Bomb:
    """Unpickling it creates the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.canary, "w")


def bomb(protocol: int = 2) -> Planted:
    return lambda canary: pickle.dumps(Bomb(canary), protocol)


def opcodes(text: str, before: bytes = b"") -> Planted:
    """A pickle written by hand, with PATH for the canary."""
    return lambda canary: before + text.replace("PATH", str(canary)).encode()


def packed(pack: Callable[[bytes], bytes], inner: Planted | None = None) -> Planted:
    return lambda canary: pack((inner or bomb(2))(canary))


def zipped(data: bytes, name: str = "archive/data.pkl") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, data)
    return buffer.getvalue()


def tarred(name: str, kind: bytes = tarfile.REGTYPE, form: int = tarfile.USTAR_FORMAT) -> Callable[[bytes], bytes]:
    def pack(data: bytes) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc" if kind == tarfile.SYMTYPE else ""
            info.size = len(data) if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(data))
        return buffer.getvalue()

    return pack


def old_tar(data: bytes) -> bytes:
    """A tar from before the format had a magic number: only its checksum tells."""
    block = bytearray(tarred("x")(data)[:512])
    block[257:265] = bytes(8)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + data


def numpy_objects(canary: Path) -> bytes:
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bomb()(canary)


def python(canary: Path) -> bytes:
    return f"open({str(canary)!r}, 'w')\n".encode()


def shell(canary: Path) -> bytes:
    return f"#!/bin/sh\ntouch '{canary}'\n".encode()


def yaml(canary: Path) -> bytes:
    return b"!!python/object/apply:builtins.open ['" + str(canary).encode() + b"', w]\n"


def compiled(canary: Path) -> bytes:
    """A .pyc as CPython 3.11 writes it."""
    return struct.pack("<H", 3495) + b"\r\n" + bytes(12) + marshal.dumps(compile(python(canary), "x", "exec"))


def keras(canary: Path) -> bytes:
    layer = {"class_name": "Lambda", "config": {"function": marshal.dumps(compile(python(canary), "x", "exec")).hex()}}
    return zipped(json.dumps({"config": {"layers": [layer]}}).encode(), "config.json")


def polyglot_weights(canary: Path) -> bytes:
    """A sound safetensors file that is a zip archive as well: its only tensor's bytes end like one."""
    inner = zipped(bomb()(canary))
    return tensors({"w": {"dtype": "U8", "shape": [len(inner)], "data_offsets": [0, len(inner)]}}, inner)


def tar_weights(canary: Path) -> bytes:
    """A safetensors file whose first 512 bytes are the header of a tar archive."""
    size = 512 - 8
    text = json.dumps({NAME: EMBEDDING}).encode().ljust(140) + b" " * 8
    head = bytearray(struct.pack("<Q", size) + text.ljust(size))
    head[148:156] = b"        "
    head[148:156] = b"%07o " % sum(head)  # digits between JSON and its padding: not JSON, yet a tar
    return bytes(head) + bytes(32)


def header_bomb(folder: Path, canary: Path) -> None:
    """A header of 33 MiB, each tensor of which is empty."""
    with (folder / WEIGHTS).open("wb") as file:  # sparse
        file.write(struct.pack("<Q", 33 << 20) + b"{")
        file.truncate((33 << 20) + 8)


def deep(folder: Path, canary: Path) -> None:
    inner = folder.joinpath(*["d"] * 40)
    inner.mkdir(parents=True)
    (inner / "x.txt").write_text("x")


PNG = b"\x89PNG\r\n\x1a\n" + bytes(64)
CALL = "cbuiltins\nopen\n(VPATH\nVw\ntR."  # a pickle of protocol 0
CAN_RUN, HIDES, BROKEN, CODE = "can run code", "hides what it holds", "broken safetensors header", "custom code"


def _rows() -> list[Folder]:
    found: list[Folder] = []

    def add(family: str, name: str, make: Maker, file: str = "", words: str = "") -> None:
        found.append(Folder(family, name, make, file, words))

    # Pickles under names that loaders know
    for file, content in {
        "pytorch_model.bin": packed(zipped),
        "pytorch_model-00001-of-00002.bin": bomb(),
        "model.pt": packed(zipped),
        "consolidated.00.pth": bomb(),
        "last.ckpt": bomb(),
        "training_args.bin": packed(zipped),
        "optimizer.PT": bomb(),
        "vocabulary.pkl": bomb(0),
        "vocabulary.pickle": bomb(4),
        "session.dill": bomb(5),
        "scaler.joblib": packed(zlib.compress),
        "flax_model.msgpack": bomb(),
        "tf_model.h5": lambda canary: b"\x89HDF\r\n\x1a\n" + bomb()(canary),
        "embeddings.npy": numpy_objects,
        "embeddings.npz": packed(zipped, numpy_objects),
        "saved_model.pb": bomb(),
        "model.keras": keras,
        "one/two/three.pkl": bomb(),
        "model.safetensors.bin": bomb(),
    }.items():
        add("pickle", f"named {file}", put(file, content), file, CAN_RUN)

    # Pickles in disguise
    for protocol in range(6):
        add("disguise", f"protocol {protocol} as README.md", put("README.md", bomb(protocol)), "README.md", "pickle")
    for file in ("config.json", "tokenizer.model", "LICENSE", "merges.txt", "one/data", ".hidden", "photo.png"):
        add("disguise", f"pickle as {file}", put(file, bomb(3)), file, CAN_RUN)
    add("disguise", "pickle as safetensors", put(WEIGHTS, bomb()), WEIGHTS, BROKEN)
    add("disguise", "zip as safetensors", put(WEIGHTS, packed(zipped)), WEIGHTS, "zip archive")
    add("disguise", "pickle as GGUF", without(WEIGHTS, put("m.gguf", bomb())), "m.gguf", "GGUF header")
    for name, content in {
        "without its magic": opcodes(CALL),
        "opcodes before its magic": lambda canary: b"N0" + bomb(4)(canary),
        "cut off after its call": opcodes(CALL[:-1]),
        "by INST": opcodes("(VPATH\nVw\nibuiltins\nopen\n."),
        "by OBJ": opcodes("(cbuiltins\nopen\nVPATH\nVw\no."),
        "by STACK_GLOBAL": lambda canary: pickle.dumps(Bomb(canary), 4)[11:],
        "that only imports": opcodes("cantigravity\nfly\n."),
        "behind 200,000 opcodes": opcodes(CALL, b"N0" * 100_000),
    }.items():
        add("disguise", f"pickle {name}", put("notes.txt", content), "notes.txt", "pickle")

    # Archives
    for name, content in {
        "zip": packed(zipped),
        "zip slip": packed(lambda data: zipped(data, "../../../evil.py")),
        "empty zip": zipped(b"")[-22:],
        "HDF5": lambda canary: b"\x89HDF\r\n\x1a\n" + bomb()(canary),
        "numpy objects": numpy_objects,
        "Keras Lambda": keras,
    }.items():
        add("archive", f"{name} as vocab.txt", put("vocab.txt", content), "vocab.txt", CAN_RUN)
    for name, content in {
        "gzip": packed(gzip.compress),
        "bzip2": packed(bz2.compress),
        "xz": packed(lzma.compress),
        "lzma": packed(lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE)),
        "zlib, as joblib packs": packed(zlib.compress),
        "zlib, strongest": packed(lambda data: zlib.compress(data, 9)),
        "Zstandard": b"\x28\xb5\x2f\xfd" + bytes(16),
        "LZ4": b"\x04\x22\x4d\x18" + bytes(16),
        "7-Zip": b"7z\xbc\xaf\x27\x1c" + bytes(16),
        "RAR": b"Rar!\x1a\x07\x01\x00",
        "tar slip": packed(tarred("../../evil.py")),
        "tar with an absolute path": packed(tarred("/tmp/evil.py")),
        "tar with a link": packed(tarred("evil", tarfile.SYMTYPE)),
        "tar, GNU": packed(tarred("x", form=tarfile.GNU_FORMAT)),
        "tar without magic": packed(old_tar),
    }.items():
        add("archive", f"{name} as notes.txt", put("notes.txt", content), "notes.txt", HIDES)
    for file in ("assets.zip", "weights.tar.gz", "data.tar", "x.7z"):
        add("archive", f"named {file}", put(file, "text"), file, HIDES)
    add(
        "archive",
        "zip behind text",
        put("README.md", packed(lambda d: b"# Hi\n" + zipped(d))),
        "README.md",
        "ends like",
    )
    add("archive", "zip behind a picture", put("a.png", packed(lambda d: PNG + zipped(d))), "a.png", "ends like")
    add("archive", "zip within weights", put(WEIGHTS, polyglot_weights), WEIGHTS, "ends like")
    add("archive", "tar around weights", put(WEIGHTS, tar_weights), WEIGHTS, "tar archive")
    add("archive", "HDF5 behind 512 bytes", put("a.txt", bytes(512) + b"\x89HDF\r\n\x1a\n"), "a.txt", "holds HDF5")

    # Programs
    for file, content in {
        "modeling_llama.py": python,
        "sub/__init__.py": python,
        "sitecustomize.PY": python,
        "cache.pyc": compiled,
        "kernel.so": b"\x7fELF",
        "libkernel.so.1": b"\x7fELF",
        "kernel.dll": b"MZ",
        "install.sh": shell,
        "setup.exe": b"MZ",
        "plugin.whl": packed(zipped),
    }.items():
        add("program", f"named {file}", put(file, content), file, CODE)
    for name, content in {
        "script": shell,
        "ELF": b"\x7fELF" + bytes(60),
        "Mach-O": b"\xcf\xfa\xed\xfe" + bytes(60),
        "Windows": b"MZ" + bytes(58) + struct.pack("<I", 64) + b"PE\0\0",
        "WebAssembly": b"\x00asm\x01\x00\x00\x00",
        "Java": b"\xca\xfe\xba\xbe" + bytes(8),
        ".pyc": compiled,
    }.items():
        add("program", f"{name} as data", put("data", content), "data", CAN_RUN)
    add("program", "YAML with Python objects", put("recipe.yaml", yaml), "recipe.yaml", CAN_RUN)
    add("program", ".pth, run as Python starts", put("evil.pth", lambda c: b"import x;" + python(c)), "evil.pth",
        CAN_RUN)  # fmt: skip

    # Configurations that load code, other files or other models
    for file in ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json"):
        add("configuration", f"auto_map in {file}", keys(file, auto_map={"AutoModel": "evil--m.M"}), file, "auto_map")
    add("configuration", "auto_map, deep", keys("config.json", text_config={"x": [{"auto_map": {"A": "m.M"}}]}),
        "config.json", "auto_map")  # fmt: skip
    add("configuration", "auto_map, escaped", put("tokenizer_config.json", r'{"auto\u005fmap": {"A": "m.M"}}'),
        "tokenizer_config.json", "auto_map")  # fmt: skip
    add("configuration", "auto_map in a subfolder", put("vae/config.json", {"auto_map": {"A": "m.M"}}),
        "vae/config.json", "auto_map")  # fmt: skip
    add("configuration", "auto_map under another case", put("Generation_Config.JSON", {"auto_map": {"A": "m.M"}}),
        "Generation_Config.JSON", "the same name")  # fmt: skip
    for key, value, words in (
        ("trust_remote_code", True, CODE),
        ("custom_pipelines", {"x": {"impl": "p.P"}}, CODE),
        ("attn_implementation", "someone/kernel", "names a repository"),
        ("_attn_implementation", {"": "someone/kernel@main"}, "names a repository"),
        ("transformers_weights", "other.safetensors", "other files"),
        ("fast_tokenizer_files", ["../tokenizer.4.0.json"], "other files"),
        ("layers", [{"class_name": "Lambda", "config": {}}], "Keras Lambda"),
        ("state", {"py/reduce": [{"py/type": "os.system"}]}, "jsonpickle"),
        ("use_pretrained_backbone", True, "fetch another model"),
        ("base_model_name_or_path", "someone/base", "fetch another model"),
        ("_name_or_path", "https://evil.example/model", "points to the network"),
        ("vocab_file", "s3://bucket/vocab", "points to the network"),
        ("merges_file", "file:///etc/passwd", "points to the network"),
        ("image", "\\\\evil\\share\\x", "points to the network"),
        ("sources", ["hf://someone/x"], "points to the network"),
        ("torch_dtype", "load", "no data type"),
        ("dtype", "float32; import os", "no data type"),
        ("architectures", ["A\nB"], "names no architecture"),
        ("architectures", [{"A": 1}], "names no architecture"),
    ):
        add("configuration", f"{key}: {str(value)[:40]!r}", keys("config.json", **{key: value}), "config.json", words)
    for file in ("adapter_config.json", "adapter_model.safetensors", "lora/adapter_config.json"):
        add("configuration", f"adapter {file}", put(file, {"base_model_name_or_path": "x/y"}), file, "an adapter")
    for name, text, words in (
        ("equal keys", '{"architectures": ["A"], "architectures": ["B"]}', "duplicate key"),
        ("a byte-order mark", b"\xef\xbb\xbf{}", "not valid JSON"),
        ("UTF-16", json.dumps(CONFIG).encode("utf-16"), "not valid JSON"),
        ("a comment", '{"architectures": ["A"]} // x', "not valid JSON"),
        ("100,000 brackets", "[" * 100_000, "nested too deeply"),
        ("a number of 5,000 digits", '{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ("a list", "[]", "not a JSON object"),
        ("nothing", "", "not valid JSON"),
    ):
        add("configuration", f"config.json with {name}", put("config.json", text), "config.json", words)
    add("configuration", "none", without("config.json"), "config.json", "missing")

    # Chat templates
    reach = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    template = "chat_template.jinja"
    add("template", "reaches into the interpreter", put(template, reach), template, "into the interpreter")
    add("template", "reaches by attr()", put(template, "{{ x|attr('__globals__') }}"), template, "into the interpreter")
    add("template", "in tokenizer_config.json", keys("tokenizer_config.json", chat_template=reach),
        "tokenizer_config.json", "into the interpreter")  # fmt: skip
    named = [{"name": "default", "template": reach}]
    add("template", "in a list", keys("tokenizer_config.json", chat_template=named), "tokenizer_config.json",
        "into the interpreter")  # fmt: skip
    add("template", "by name", keys("tokenizer_config.json", chat_template={"tool": reach}), "tokenizer_config.json",
        "into the interpreter")  # fmt: skip
    add("template", "in chat_template.json", put("chat_template.json", {"chat_template": reach}), "chat_template.json",
        "into the interpreter")  # fmt: skip
    add("template", "one of several", put("additional_chat_templates/tool.jinja", reach), "tool.jinja", "interpreter")
    add("template", "includes a file", put(template, "{% include '/etc/passwd' %}"), template, "loads another")
    add("template", "imports", put(template, "{%- from 'x' import y %}"), template, "loads another")
    add("template", "of two megabytes", put(template, "{# x #}" * 300_000), template, "more than")
    add("template", "of 900 megabytes", hole(template, 900 << 20), template, "more than")
    add("template", "not UTF-8", put(template, b"\xff\xfe{{"), template, "not UTF-8")

    # Tokenizers
    def tokenizer(words: str, name: str, **more: Any) -> None:
        add("tokenizer", name, keys("tokenizer.json", **more), "tokenizer.json", words)

    def vocabulary(**more: Any) -> dict[str, Any]:
        return {"type": "WordLevel", "vocab": VOCABULARY | more}

    def split(pattern: str) -> dict[str, Any]:
        return {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": pattern}}]}

    doubling = [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40
    tokenizer("beyond the vocab_size", "an id beyond vocab_size", model=vocabulary(z=4))
    tokenizer("beyond the vocab_size", "an added id beyond", added_tokens=[{"id": 9, "content": "<x>"}])
    tokenizer("beyond the vocab_size", "Unigram with too many pieces", model={"vocab": [["x", 0.0]] * 5})
    tokenizer("has the id -1", "a negative id", model=vocabulary(z=-1))
    tokenizer("has the id True", "an id that is true", model=vocabulary(z=True))
    tokenizer("has the id 1.5", "an id that is a fraction", model=vocabulary(z=1.5))
    tokenizer("has the id 1099511627776", "an id of 2**40", model=vocabulary(z=1 << 40))
    for pattern in ("(a+)+$", r"(?:\w*)*x", "([a-z]+){2,}", r"(\p{L}+)*"):
        tokenizer("repeats a repetition", f"the pattern {pattern}", pre_tokenizer=split(pattern))
    tokenizer("more than 4096 characters", "a long pattern", pre_tokenizer=split("a|" * 5000))
    tokenizer("times as long", "doubling 40 times", normalizer={"type": "Sequence", "normalizers": doubling})
    tokenizer("times as long", "one long replacement", normalizer=doubling[0] | {"content": "a" * 5000})
    tokenizer("times as long", "a decoder that grows", decoder={"type": "Sequence", "decoders": doubling})
    larger = {"vocab_size": 99}
    add("tokenizer", "an id beyond the embedding", lambda folder, canary: (
        keys("config.json", **larger)(folder, canary), keys("tokenizer.json", model=vocabulary(z=50))(folder, canary),
    ), "tokenizer.json", f"4 rows of '{NAME}'")  # fmt: skip
    add("tokenizer", "none", without("tokenizer.json"), "sound", "no tokenizer")
    add("tokenizer", "not JSON", put("tokenizer.json", "<s>"), "tokenizer.json", "not valid JSON")

    # Headers of weights
    for name, content, words in (
        ("empty", b"", BROKEN),
        ("a length beyond the file", struct.pack("<Q", 1 << 40) + b"{}", "its length"),
        ("a length of 2**64 - 1", b"\xff" * 16, "its length"),
        ("brackets without end", raw(b'{"a":' * 100_000), "nested too deeply"),
        ("equal names", raw(b'{"w": 1, "w": 2}'), "duplicate key"),
        ("a list", raw(b"[]"), "not a JSON object"),
        ("not UTF-8", raw(b'{"\xff": 1}'), "not valid JSON"),
        ("padded with zero bytes", raw(json.dumps({NAME: EMBEDDING}).encode() + bytes(8), bytes(32)), "not valid JSON"),
        ("metadata of numbers", tensors({NAME: EMBEDDING, "__metadata__": {"n": 1}}), "__metadata__"),
        ("overlapping tensors", tensors({NAME: EMBEDDING, "v": EMBEDDING | {"data_offsets": [8, 40]}}, 40), "overlaps"),
        ("the same bytes twice", tensors({NAME: EMBEDDING, "v": EMBEDDING}), "overlaps"),
        ("a hole", tensors({NAME: EMBEDDING | {"data_offsets": [8, 40]}}, 40), "a hole"),
        ("bytes behind the last tensor", tensors({NAME: EMBEDDING}, 33), "belong to no tensor"),
        ("no tensor", tensors({}, 0), "holds no tensors"),
        ("a name with a line break", tensors({"a\nb": EMBEDDING}), "unprintable"),
        ("a name that clears the screen", tensors({"\x1b[2J": EMBEDDING}), "unprintable"),
    ):
        add("header", name, put(WEIGHTS, content), WEIGHTS, words)
    for name, changes, words in (
        ("out of range", {"data_offsets": [32, 64]}, "outside the file"),
        ("far out of range", {"shape": [1 << 40], "data_offsets": [0, 1 << 42]}, "outside the file"),
        ("reversed offsets", {"data_offsets": [32, 0]}, "no lists of sizes"),
        ("negative offsets", {"data_offsets": [-32, 0]}, "no lists of sizes"),
        ("a negative shape", {"shape": [-4, -2]}, "no lists of sizes"),
        ("a shape of fractions", {"shape": [4.0, 2]}, "no lists of sizes"),
        ("a shape of 65 dimensions", {"shape": [1] * 65}, "no lists of sizes"),
        ("a shape of 2**63", {"shape": [1 << 63, 0]}, "no lists of sizes"),
        ("an empty tensor whose strides overflow", {"shape": [1 << 62, 1 << 62, 0]}, "absurd shape"),
        ("a shape that overflows to 8", {"shape": [(1 << 62) + 1, 8]}, "absurd shape"),
        ("a smaller dtype", {"dtype": "F16"}, "do not fit"),
        ("half a byte", {"dtype": "F4", "shape": [63]}, "do not fit"),
        ("an unknown dtype", {"dtype": "O"}, "unknown dtype"),
        ("a dtype in lower case", {"dtype": "f32"}, "unknown dtype"),
        ("a dtype that is a list", {"dtype": ["F32"]}, "unknown dtype"),
        ("one key more", {"code": "x"}, "nothing else"),
    ):
        add("header", name, tensor(**changes), WEIGHTS, words)
    add("header", "33 MiB long", header_bomb, WEIGHTS, "its length")
    add("header", "none", without(WEIGHTS), "sound", "no weights")

    # Weights that are no numbers
    for dtype, bits in {
        "F32": struct.pack("<f", float("nan")),
        "F64": struct.pack("<d", float("-inf")),
        "F16": struct.pack("<e", float("nan")),
        "BF16": b"\x80\x7f",
        "F8_E5M2": b"\xfc",
        "F8_E4M3": b"\xff",
    }.items():
        add("values", f"{dtype} that is not finite", values(dtype, bits), WEIGHTS, "NaN or infinity")

    # Index and shards
    for name, make, file, words in (
        ("a shard missing", sharded(without(SECOND)), INDEX, "which is missing"),
        ("a shard outside", index(a=FIRST, b=f"../{SECOND}"), INDEX, "which is missing"),
        ("a shard at an absolute path", index(a=FIRST, b="/etc/passwd"), INDEX, "which is missing"),
        ("a shard at an address", index(a=FIRST, b="https://evil.example/w"), INDEX, "which is missing"),
        ("a shard that is not listed", index(a=FIRST), SECOND, "not listed in"),
        ("tensors swapped", index(a=SECOND, b=FIRST), FIRST, "not listed there"),
        ("a tensor that no shard holds", index(a=FIRST, b=SECOND, c=SECOND), INDEX, "does not hold it"),
        ("a tensor twice", sharded(put(SECOND, tensors({"a": EMBEDDING}))), SECOND, "is in"),
        ("numbers for files", index(a=1), INDEX, "no weight_map"),
        ("an index that is a list", sharded(put(INDEX, [])), INDEX, "no weight_map"),
        ("equal keys", sharded(put(INDEX, '{"weight_map": {"a": "x", "a": "y"}}')), INDEX, "duplicate key"),
        ("a second index", sharded(put("z.safetensors.index.json", {})), "z.safetensors.index.json", "a second index"),
        ("none", sharded(without(INDEX)), SECOND, "no index"),
        ("one shard alone", sharded(without(INDEX, without(SECOND))), FIRST, "one shard of 2"),
        (
            "weights in a subfolder",
            put("x/model.safetensors", tensors({"w": EMBEDDING})),
            "x/model.safetensors",
            "subfolder",
        ),
    ):
        add("index", name, make, file, words)

    # GGUF
    for name, content, words in (
        ("another magic", gguf(magic=b"GGML"), "begins with"),
        ("version 1", gguf(version=1), "version 1"),
        ("2**60 keys", gguf(keys=1 << 60), "do not fit"),
        ("one key more than there is", gguf(keys=2), "past the end"),
        ("cut off", gguf()[:20], "past the end"),
        ("a zip behind it", gguf(tail=zipped(b"x")), "ends like a zip"),
        ("a template that reaches in", gguf(tokenizer__chat_template=reach), "into the interpreter"),
    ):
        add("GGUF", name, without(WEIGHTS, put("m.gguf", content)), "m.gguf", words)
    add("GGUF", "beside safetensors", put("m.gguf", gguf()), "m.gguf", "ambiguous")

    # What the file system can do
    add("files", "a link out", outside(lambda folder, secret: (folder / "a.txt").symlink_to(secret)), "a.txt", "leaves")
    add("files", "a link out, relative", outside(lambda folder, secret: (folder / "a.txt").symlink_to("../secret.txt")),
        "a.txt", "leaves")  # fmt: skip
    add("files", "the configuration linked out", outside(lambda folder, secret: (
        (folder / "config.json").unlink(), (folder / "config.json").symlink_to(secret),
    )), "config.json", "leaves")  # fmt: skip
    add(
        "files",
        "a hard link out",
        outside(lambda folder, secret: os.link(secret, folder / "a.txt")),
        "a.txt",
        "hard link",
    )
    add("files", "a link to the root", link("root", "/"), "root", "leaves")
    add("files", "a link to itself", link("me", "me"), "me", "to nothing, or to itself")
    add("files", "a link to nothing", link("a.txt", "gone"), "a.txt", "to nothing")
    add("files", "a link to the folder", link("again", "."), "again", "to a folder")
    add("files", "a device", link("config2.json", "/dev/zero"), "config2.json", "leaves")
    add("files", "a pipe", lambda folder, canary: os.mkfifo(folder / "pipe.json"), "pipe.json", "a device")
    add("files", "a socket", listen, "sock", "a device")
    for name in ("two\nlines", "\x1b[2Jclear", "right\u202eleft.txt", "nul\u200b", "bytes\udcff"):
        add("files", f"a name {name!a}", put(name, "x"), repr(name), "cannot be printed")
    for name in ("..\\..\\evil.txt", "C:\\evil", "config.json ", "config.json."):
        add("files", f"a name {name!a}", put(name, "x"), name, "other systems")
    for first, second in (("notes.txt", "NOTES.txt"), ("caf\u00e9.txt", "cafe\u0301.txt"), ("stra\u00dfe", "STRASSE")):
        add("files", f"{first!a} and {second!a}", lambda folder, canary, names=(first, second): [
            write(folder / name, "x") for name in names
        ], "", "the same name as")  # fmt: skip
    for name in ("Config.json", "TOKENIZER.JSON", "Model.safetensors", "con\uff46ig.json"):
        add("files", f"{name!a} beside its double", put(name, "{}"), name, "the same name as")
    add("files", "forty folders deep", deep, "d/d/d", "nested more than")
    add("files", "a terabyte of holes", hole("notes.txt", 1 << 40), "notes.txt", "holes")

    # Odd, but harmless
    for name, make in {
        "as it is": lambda folder, canary: None,
        "a read-me with addresses": put("README.md", "---\nlicense: mit\n---\nSee https://x.org; `import os`."),
        "formulas": put("README.md", "x^2 + y^2, where copies\nare made.\n."),
        "prose that opens like a pickle": put("notes.txt", "cats\nnice\n(and so on). They sleep.\n"),
        "text that opens like a zip": put("notes.txt", "PK is short for Park."),
        "attributes": put(".gitattributes", "*.safetensors filter=lfs"),
        "a picture": put("logo.png", PNG),
        "a licence": put("LICENSE", "Apache"),
        "an empty file": put("empty", b""),
        "training arguments": put("training_args.json", {"learning_rate": 1e-5, "hub_url": "https://example.org"}),
        "broken JSON that nothing reads": put("deep/results.json", "{"),
        "YAML": put("recipe.yaml", "a: [1, 2]\n"),
        "an ONNX copy, only hashed": put("onnx/model.onnx", b"\x08\x07\x12\x07pytorch"),
        "Git's own files": lambda folder, canary: (
            put(".git/hooks/pre-commit.sample", shell)(folder, canary),
            put(".git/objects/ab/cdef", zlib.compress(b"blob 3\0abc"))(folder, canary),
        ),
        "the repository it came from": keys("config.json", _name_or_path="someone/model"),
        "a path on the maker's machine": keys("tokenizer_config.json", tokenizer_file="/root/.cache/x/tokenizer.json"),
        "auto_map of nothing": keys("config.json", auto_map=None, trust_remote_code=False),
        "infinity in a configuration": keys("config.json", time_step_limit=[0.0, float("inf")]),
        "a dtype": keys("config.json", torch_dtype="bfloat16"),
        "words that are keys elsewhere": keys(
            "tokenizer.json", model={"type": "WordLevel", "vocab": {"auto_map": 0, "__class__": 1, "https://": 2}}
        ),
        "more rows than tokens": keys("tokenizer.json", model={"type": "WordLevel", "vocab": {"a": 0}}),
        "GPT-2's pattern": keys("tokenizer.json", pre_tokenizer=split(
            r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
        )),
        "digits in threes": keys("tokenizer.json", pre_tokenizer=split(r"\d{1,3}(?=(?:\d{3})*\b)")),
        "a usual chat template": put(
            template, "{% for m in messages %}<|{{ m['role'] }}|>{{ m.content }}{% endfor %}{# from __future__ #}"
        ),
        "a link within": link("alias.txt", "config.json"),
        "two names of one file": lambda folder, canary: os.link(folder / "config.json", folder / "copy.txt"),
        "a header whose length looks like a pickle": put(
            WEIGHTS, raw(json.dumps({NAME: EMBEDDING}).encode().ljust(0x0280), bytes(32))
        ),
        "the largest finite weights": values("BF16", b"\x7f\x7f"),
        "whole numbers of all ones": values("I32", b"\xff" * 4),
        "an empty tensor": put(
            WEIGHTS, tensors({NAME: EMBEDDING, "e": {"dtype": "F16", "shape": [0, 4], "data_offsets": [32, 32]}})
        ),
        "shards": sharded(lambda folder, canary: None),
    }.items():  # fmt: skip
        add("harmless", name, make)
    return found


FOLDERS = _rows()
