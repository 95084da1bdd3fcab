"""What lies in a model folder: digests, formats, refusals.

    inventory = take_inventory(Path("models/suspect"))
    inventory.digest, inventory.architecture, inventory.parameters, inventory.dtype

An audit opens folders that nobody vouches for, so this is done before anything else touches one. It reads
bytes and JSON only (no torch, no transformers, no numpy), and refuses whatever could run code on loading, or
could make the weights that are loaded others than the weights that are listed here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from audit.errors import BadInput, Refused
from audit.gguf_header import read_gguf_header
from audit.record import FileEntry, ModelEntry

_CHUNK = 1 << 20
_MAX_JSON = 64 << 20  # the largest vocabularies in use take about half of it
_MAX_HEADER = 100_000_000  # safetensors' own limit

_PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".dill", ".msgpack"}
_PICKLED |= {".h5", ".hdf5", ".joblib", ".npy", ".npz"}
_CODE = (".py", ".pyc", ".pyd", ".so", ".dll", ".dylib")
_MAGIC = {
    **{bytes((0x80, protocol)): "a pickle" for protocol in (2, 3, 4, 5)},
    b"PK\x03\x04": "a zip archive (how torch.save packs pickles)",
    b"\x89HDF\r\n\x1a\n": "HDF5",
    b"\x93NUMPY": "a numpy array file",
    b"\x7fELF": "compiled code",
}

_TOKENIZERS = {"tokenizer.json", "tokenizer.model", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"}
_TOKENIZER_PARTS = {"vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"}
_TOKENIZER_PARTS |= {"tokenizer_config.json", "chat_template.jinja", "chat_template.json"}

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


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its file's header describes it; dtype in torch's spelling, or ggml's if quantized."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def parameters(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Inventory:
    """All that lies in a model folder, and what its headers say. Paths are POSIX, relative to `root`."""

    root: Path
    files: tuple[FileEntry, ...]  # sorted by path
    digest: str
    format: Literal["safetensors", "gguf"]
    architecture: str
    parameters: int  # elements of the floating (or quantized) tensors
    dtype: str  # that of most elements
    weight_files: tuple[str, ...]
    tokenizer_files: tuple[str, ...]  # all that shapes tokenization, the chat template included
    tensors: tuple[TensorInfo, ...]

    def to_entry(self, name: str) -> ModelEntry:
        """The record's entry for this model, under the name of its role."""
        return ModelEntry(
            name=name,
            digest=self.digest,
            architecture=self.architecture,
            parameters=self.parameters,
            dtype=self.dtype,
            files=list(self.files),
        )


def sees_images(architecture: str) -> bool:
    """Is a model of this architecture an image classifier, which needs no tokenizer?"""
    return architecture.endswith("ForImageClassification")


def take_inventory(folder: Path, progress: Callable[[int, int], None] | None = None) -> Inventory:
    """List, check and hash a model folder, or a single `.gguf` file.

    Args:
        folder: the folder, or a `.gguf` file, taken as a folder that holds nothing else.
        progress: called with (bytes hashed, bytes in all) after each chunk.

    Raises:
        BadInput: no such folder.
        Refused: the folder holds something unsafe, ambiguous or broken, or lacks a part. The message is one
            line that names the file and the reason.
    """
    folder = Path(folder)
    if not str(folder).isprintable():
        raise BadInput(f"{str(folder)!r}: a path with characters that cannot be printed")
    try:
        is_file = folder.suffix.lower() == ".gguf" and folder.is_file()
        if not is_file and not folder.is_dir():
            raise BadInput(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
        root = (folder.parent if is_file else folder).resolve()
        return _take(root, [folder.name] if is_file else None, progress)
    except OSError as error:
        raise Refused(f"{error.filename or folder}: cannot be read ({error.strerror})") from None


def _take(root: Path, names: list[str] | None, progress: Callable[[int, int], None] | None) -> Inventory:
    """The steps of an inventory: refuse by kind, name and first bytes before any content is interpreted."""
    sizes = _list_files(root, names)
    for name in sizes:
        _refuse_by_name(root, name)
    for name in sizes:
        _refuse_by_magic(root, name)
    parsed = {name: _read_json(root / name) for name in sizes if _is_read_on_loading(name)}
    for name, value in parsed.items():
        if name.endswith("config.json"):
            _refuse_code(root / name, value)

    weights = [name for name in sizes if name.lower().endswith((".safetensors", ".gguf"))]
    tokenizer = _tokenizer_files(sizes)
    kind = _weight_format(root, weights)
    if kind == "gguf":
        header = read_gguf_header(root / weights[0])
        tensors = [TensorInfo(*row, file=weights[0]) for row in header.tensors]
        architecture, has_tokenizer = header.architecture, header.tokens > 0
    else:
        tensors = [tensor for name in weights for tensor in _read_safetensors(root, name)]
        architecture, has_tokenizer = _architecture(root, parsed), _has_tokenizer(tokenizer)
    _check_index(root, parsed, weights, tensors)
    if not tensors:
        raise Refused(f"{root / weights[0]}: holds no tensors")
    if not has_tokenizer and not sees_images(architecture):
        what = "no tokenizer.ggml.tokens in its header" if kind == "gguf" else "no tokenizer, such as tokenizer.json"
        raise Refused(f"{root / weights[0] if kind == 'gguf' else root}: {what}")

    done, total = 0, sum(sizes.values())

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    files = [_hash(root, name, size, advance) for name, size in sizes.items()]
    elements = Counter[str]()
    for tensor in tensors:
        elements[tensor.dtype] += tensor.parameters
    return Inventory(
        root=root,
        files=tuple(files),
        digest=hashlib.sha256("".join(f"{f.path} {f.size} {f.sha256}\n" for f in files).encode()).hexdigest(),
        format=kind,
        architecture=architecture,
        parameters=sum(count for dtype, count in elements.items() if _is_floating(dtype)),
        dtype=max(sorted(elements), key=elements.__getitem__),
        weight_files=tuple(weights),
        tokenizer_files=tuple(tokenizer),
        tensors=tuple(tensors),
    )


def _list_files(root: Path, names: list[str] | None) -> dict[str, int]:
    """Path and size of every regular file, sorted by path; nothing is opened."""
    sizes: dict[str, int] = {}
    pending = [root / name for name in names] if names else sorted(root.iterdir(), reverse=True)
    while pending:
        path = pending.pop()
        if not path.name.isprintable():
            # Such a name could break the digest's lines, or rewrite the terminal that prints it.
            raise Refused(f"{path.parent}: holds a file whose name cannot be printed: {path.name!r}")
        if path.is_symlink():
            _refuse_link(root, path)
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            pending += sorted(path.iterdir(), reverse=True)
        elif stat.S_ISREG(mode):
            sizes[path.relative_to(root).as_posix()] = path.stat().st_size
        else:
            raise Refused(f"{path}: a device, pipe or socket, not a file")
    return dict(sorted(sizes.items()))


def _refuse_link(root: Path, path: Path) -> None:
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise Refused(f"{path}: a symlink to nothing, or to itself") from None
    if not target.is_relative_to(root):
        # Also the snapshots of the Hugging Face cache, whose files are links to ../../blobs.
        raise Refused(f"{path}: a symlink that leaves the folder; copy the model with `cp -L -r` and audit the copy")
    if target.is_dir():  # may loop, and would list the same files under two names
        raise Refused(f"{path}: a symlink to a folder; copy the model with `cp -L -r` and audit the copy")


def _refuse_by_name(root: Path, name: str) -> None:
    path = root / name
    base, suffix = path.name.lower(), path.suffix.lower()
    if suffix in _PICKLED:
        raise Refused(
            f"{path}: weights or data in a format ({suffix}) that can run code; only safetensors and GGUF are"
        )
    if suffix in _CODE or ".so." in base:
        raise Refused(f"{path}: custom code, which an audit never runs")
    if base in ("adapter_config.json", "adapter_model.safetensors"):
        # transformers would add it to the weights here, or fetch the base model that it names.
        raise Refused(f"{path}: an adapter, not a whole model: merge the adapter first, then audit the merged model")


def _refuse_by_magic(root: Path, name: str) -> None:
    # A safetensors file begins with its header's length, which may be 0x0280; its header is parsed in full.
    if name.lower().endswith(".safetensors"):
        return
    with (root / name).open("rb") as file:
        head = file.read(8)
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            raise Refused(f"{root / name}: begins like {what}, which can run code, whatever its name says")


def _is_read_on_loading(name: str) -> bool:
    """Whether transformers may read this JSON file (those deeper down are only hashed)."""
    return name.endswith("config.json") or ("/" not in name and name.lower().endswith(".json"))


def _read_json(path: Path) -> Any:
    if path.stat().st_size > _MAX_JSON:
        raise Refused(f"{path}: JSON of more than {_MAX_JSON} bytes")
    return _parse_json(path, path.read_bytes())


def _parse_json(path: Path, data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise Refused(f"{path}: JSON nested too deeply") from None
    except ValueError as error:
        raise Refused(f"{path}: not valid JSON ({error})") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two parsers may each take another one of two equal keys, so what was checked is not what is loaded."""
    result = dict(pairs)
    if len(result) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"duplicate key {key[:80]!r}")
    return result


def _refuse_code(path: Path, value: Any) -> None:
    """Refuse any configuration key, however deep, that makes transformers load code or foreign weights."""
    pending = [value]
    while pending:
        node = pending.pop()
        pending += node if isinstance(node, list) else node.values() if isinstance(node, dict) else []
        for key, item in node.items() if isinstance(node, dict) else ():
            if key in ("auto_map", "trust_remote_code", "custom_pipelines") and item not in (None, False):
                raise Refused(f"{path}: custom code, which an audit never runs ({key})")
            texts = item.values() if isinstance(item, dict) else [item]
            if "_implementation" in key and any(isinstance(text, str) and "/" in text for text in texts):
                # attn_implementation = "someone/kernel": transformers fetches that from the Hub and runs it.
                raise Refused(f"{path}: custom code, which an audit never runs ({key[:80]!r} names a repository)")
            if key in ("transformers_weights", "fast_tokenizer_files") and item is not None:
                raise Refused(f"{path}: {key} makes transformers load other files than the usual ones")


def _weight_format(root: Path, weights: list[str]) -> Literal["safetensors", "gguf"]:
    gguf = [name for name in weights if name.lower().endswith(".gguf")]
    if not weights:
        raise Refused(f"{root}: no weights (no .safetensors and no .gguf file)")
    for name in weights:
        if "/" in name:
            raise Refused(f"{root / name}: weights in a subfolder; audit the folder that holds the model, alone")
    if gguf and len(gguf) < len(weights):
        raise Refused(f"{root / gguf[0]}: ambiguous, the folder holds safetensors weights too")
    if len(gguf) > 1:
        raise Refused(f"{root / gguf[1]}: ambiguous, the folder holds more than one GGUF file")
    return "gguf" if gguf else "safetensors"


def _architecture(root: Path, parsed: dict[str, Any]) -> str:
    path = root / "config.json"
    if "config.json" not in parsed:
        raise Refused(f"{path}: missing")
    config = parsed["config.json"]
    if not isinstance(config, dict):
        raise Refused(f"{path}: not a JSON object")
    names = config.get("architectures") or [config.get("model_type")]
    first = names[0] if isinstance(names, list) else None
    if not isinstance(first, str) or not re.fullmatch(r"[A-Za-z_][\w.-]{0,127}", first, re.ASCII):
        raise Refused(f"{path}: names no architecture")
    return first


def _tokenizer_files(names: Iterable[str]) -> list[str]:
    known = _TOKENIZERS | _TOKENIZER_PARTS
    return [
        name
        for name in names
        if name in known
        or ("/" not in name and name.endswith(".tiktoken"))
        or name.startswith("additional_chat_templates/")
    ]


def _has_tokenizer(names: list[str]) -> bool:
    whole = any(name in _TOKENIZERS or name.endswith(".tiktoken") for name in names)
    return whole or {"vocab.json", "merges.txt"} <= set(names)


def _read_safetensors(root: Path, name: str) -> list[TensorInfo]:
    """The tensors of one file, whose bytes must be covered by them once, without holes, to the last one."""
    path = root / name
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER):
            raise Refused(f"{path}: broken safetensors header: its length exceeds the file or {_MAX_HEADER} bytes")
        raw = file.read(length)
    header = _parse_json(path, raw) if raw.startswith(b"{") else None
    if not isinstance(header, dict):
        raise Refused(f"{path}: broken safetensors header: not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Refused(f"{path}: broken safetensors header: __metadata__ does not map text to text")

    spans, tensors = [], []
    for tensor, info in header.items():
        where = f"{path}: broken safetensors header: tensor {tensor[:80]!r}"
        if not tensor or not tensor.isprintable():
            raise Refused(f"{where} has an empty or unprintable name")
        if not isinstance(info, dict) or info.keys() != {"dtype", "shape", "data_offsets"}:
            raise Refused(f"{where} needs dtype, shape and data_offsets, and nothing else")
        dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise Refused(f"{where} has the unknown dtype {str(dtype)[:40]!r}")
        if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise Refused(f"{where} has a shape or offsets that are no lists of sizes")
        if offsets[1] > size - 8 - length:
            raise Refused(f"{where} ends outside the file")
        torch_name, bits = _DTYPES[dtype]
        found = TensorInfo(tensor, torch_name, tuple(shape), name)
        if (offsets[1] - offsets[0]) * 8 != found.parameters * bits:
            raise Refused(f"{where} has offsets that do not fit its shape and dtype")
        spans.append((offsets[0], offsets[1], where))
        tensors.append(found)
    position = 0
    for begin, end, where in sorted(spans):
        if begin != position:
            raise Refused(f"{where} {'overlaps the one before it' if begin < position else 'begins after a hole'}")
        position = end
    if position != size - 8 - length:
        raise Refused(f"{path}: {size - 8 - length - position} bytes at the end that belong to no tensor")
    return tensors


def _are_sizes(value: Any) -> bool:
    """A list of at most 64 (torch's limit) whole numbers from 0 to 2**63 - 1; True is no number here."""
    return isinstance(value, list) and len(value) <= 64 and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _check_index(root: Path, parsed: dict[str, Any], weights: list[str], tensors: list[TensorInfo]) -> None:
    """Shards and index must name the same files and the same tensors in each."""
    indexes = [name for name in parsed if name.lower().endswith(".safetensors.index.json") and "/" not in name]
    if not indexes:
        if len(weights) > 1:
            raise Refused(f"{root / weights[1]}: more than one safetensors file and no index that says which to load")
        shard = re.search(r"-of-0*(\d+)\.\w+$", weights[0])
        if shard and shard[1] != "1":
            raise Refused(f"{root / weights[0]}: one shard of {shard[1]}, without the others and their index")
        return
    if len(indexes) > 1:
        raise Refused(f"{root / indexes[1]}: a second index of safetensors shards")
    path, index = root / indexes[0], parsed[indexes[0]]
    expected = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(expected, dict) or not all(isinstance(shard, str) for shard in expected.values()):
        raise Refused(f"{path}: no weight_map from tensors to files")
    for name in sorted(set(expected.values()) - set(weights)):
        raise Refused(f"{path}: lists the shard {name[:80]!r}, which is missing")
    for name in sorted(set(weights) - set(expected.values())):
        raise Refused(f"{root / name}: not listed in {indexes[0]}")
    held: dict[str, str] = {}
    for tensor in tensors:
        if tensor.name in held:
            raise Refused(f"{root / tensor.file}: tensor {tensor.name[:80]!r} is in {held[tensor.name]} too")
        held[tensor.name] = tensor.file
        if expected.get(tensor.name) != tensor.file:
            raise Refused(f"{root / tensor.file}: tensor {tensor.name[:80]!r} is not listed there by {indexes[0]}")
    for name in sorted(expected.keys() - held.keys()):
        raise Refused(f"{path}: lists tensor {name[:80]!r} in {expected[name]}, which does not hold it")


def _is_floating(dtype: str) -> bool:
    return not dtype.startswith(("int", "uint", "bool", "complex"))


def _hash(root: Path, name: str, size: int, advance: Callable[[int], None]) -> FileEntry:
    digest, count = hashlib.sha256(), 0
    with (root / name).open("rb") as file:
        while count <= size and (chunk := file.read(_CHUNK)):
            digest.update(chunk)
            count += len(chunk)
            advance(len(chunk))
    if count != size:
        raise Refused(f"{root / name}: changed while it was read")
    return FileEntry(path=name, size=size, sha256=digest.hexdigest())
