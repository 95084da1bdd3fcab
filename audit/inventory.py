"""What lies in a model folder: digests, formats, refusals.

    inventory = take_inventory(Path("models/suspect"))
    inventory.digest, inventory.architecture, inventory.parameters, inventory.dtype

An audit opens folders that nobody vouches for, so this is done before anything else touches one. It reads
bytes and JSON only (no torch, no transformers), and refuses whatever could run code on loading, or could make the
weights that are loaded others than the weights that are listed here. `audit.disguises` tells what a file is,
`audit.configuration` what a folder's JSON would have a loader do, and the two headers' modules read the weights.
What an auditor may let pass nevertheless is in `audit.allowed`.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from audit.allowed import Allowed, told
from audit.configuration import (
    refuse_addresses,
    refuse_code,
    refuse_misfit,
    refuse_own_code,
    refuse_template,
    refuse_templates,
    refuse_tokenizer,
)
from audit.disguises import refuse_by_name, refuse_disguised
from audit.errors import BadInput, Refused
from audit.gguf_header import read_gguf_header
from audit.instrument import Access
from audit.record import FileEntry, ModelEntry
from audit.safetensors_header import SafetensorsHeader, read_safetensors_header, read_values
from audit.strict_json import read_json

_CHUNK = 1 << 20
_MAX_FILES = 50_000
_MAX_DEPTH = 32
_MAX_TEXT = 4 << 20

_TOKENIZERS = {"tokenizer.json", "tokenizer.model", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"}
_TOKENIZER_PARTS = {"vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"}
_TOKENIZER_PARTS |= {"tokenizer_config.json", "chat_template.jinja", "chat_template.json"}
_LOADED = _TOKENIZERS | _TOKENIZER_PARTS | {"config.json", "generation_config.json", "model.safetensors"}
_LOADED |= {"model.safetensors.index.json", "adapter_config.json", "processor_config.json", "preprocessor_config.json"}


_AGAIN = "fetch the folder again from its source, or have the model saved again"


class Identity(NamedTuple):
    """By what a change of a file is noticed. The last cannot be set, except by who can set the clock."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        """The identity that a file's status tells."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


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
    format: Literal["safetensors", "gguf", "tokenizer", "endpoint"]
    architecture: str
    parameters: int  # elements of the floating (or quantized) tensors
    dtype: str  # that of most elements
    weight_files: tuple[str, ...]
    tokenizer_files: tuple[str, ...]  # all that shapes tokenization, the chat template included
    tensors: tuple[TensorInfo, ...]
    allowed: tuple[str, ...] = ()  # exceptions that let a file pass
    aside: frozenset[str] = frozenset()  # of those, the files that must not be loaded
    identities: Mapping[str, Identity] = field(default_factory=dict, compare=False, repr=False)

    def refuse_changes(self) -> None:
        """Refuse if a file is not what was hashed: to be called once it was read, for then it was those bytes."""
        for name, was in self.identities.items():
            try:
                same = Identity.of((self.root / name).stat()) == was
            except OSError:
                same = False
            if not same:
                raise _changed(self.root / name)

    @property
    def limits(self) -> list[str]:
        """What the record says of it besides its entry: here, what was let pass."""
        return [told(exception) for exception in self.allowed]

    @property
    def access(self) -> Access:
        """What can be seen of such a model."""
        return Access.WEIGHTS

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


def take_inventory(
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
    allow: Collection[str] = (),
    *,
    tokenizer_only: bool = False,
) -> Inventory:
    """List, check and hash a model folder, or a single `.gguf` file.

    Args:
        folder: the folder, or a `.gguf` file, taken as a folder that holds nothing else.
        progress: called with (bytes hashed, bytes in all) after each chunk.
        allow: exceptions, `FILE:REASON` each, see `audit.allowed`.
        tokenizer_only: weights, and what describes them, may be missing.

    Raises:
        BadInput: no such folder, or no such exception.
        Refused: the folder holds something unsafe, ambiguous or broken, or lacks a part. The message is one
            line that names the file, the reason and what to do.
    """
    folder = Path(folder)
    Allowed(allow)  # an exception that cannot be is said before anything is looked for
    if not str(folder).isprintable():
        raise BadInput(f"{str(folder)!r}: a path with characters that cannot be printed")
    try:
        is_file = folder.suffix.lower() == ".gguf" and folder.is_file()
        if not is_file and not folder.is_dir():
            raise BadInput(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
        root = (folder.parent if is_file else folder).resolve()
        with _otherwise(_AGAIN):
            return _take(root, [folder.name] if is_file else None, progress, allow, tokenizer_only)
    except OSError as error:
        raise Refused(f"{error.filename or folder}: cannot be read ({error.strerror})", "make it readable") from None


@contextmanager
def _otherwise(todo: str) -> Iterator[None]:
    """What to do about refusals that do not say so themselves: those of files that are broken or do not fit."""
    try:
        yield
    except Refused as error:
        raise (error if error.todo else Refused(error.fault, todo, error.code)) from None


def _take(
    root: Path,
    names: list[str] | None,
    progress: Callable[[int, int], None] | None,
    allow: Collection[str],
    tokenizer_only: bool,
) -> Inventory:
    """The steps of an inventory: refuse by kind, name and first bytes before any content is interpreted."""
    listed = _list_files(root, names)
    sizes = {name: status.st_size for name, status in listed.items()}
    allowed = Allowed(allow, needed=[name for name in sizes if _is_needed(name)])
    _refuse_statuses(root, listed, allowed)
    _refuse_collisions(root, sizes)
    for name in sizes:
        with allowed.unless(name):
            _refuse_name(root / name)
    for name in sizes:
        if name not in allowed.aside:
            with allowed.unless(name):
                refuse_disguised(root / name, within_git=name.startswith(".git/"))
    parsed = {name: read_json(root / name) for name in sizes if _is_read_on_loading(name)}
    for name, value in parsed.items():
        if name.lower().endswith("config.json"):
            with allowed.unless(name):
                refuse_own_code(root / name, value)
        _refuse_configured(root / name, value)
    for name in sizes:
        if name.lower().endswith(".jinja"):
            refuse_template(root / name, _read_text(root / name))

    weights = [name for name in sizes if _are_weights(name)]
    tokenizer = _tokenizer_files(sizes)
    kind = "tokenizer" if tokenizer_only and not weights else _weight_format(root, weights)
    headers: dict[str, SafetensorsHeader] = {}
    tensors: list[TensorInfo] = []
    if kind == "tokenizer":
        architecture, has_tokenizer = "", _has_tokenizer(tokenizer)
    elif kind == "gguf":
        found = read_gguf_header(root / weights[0])
        tensors = [TensorInfo(*row, file=weights[0]) for row in found.tensors]
        architecture, has_tokenizer = found.architecture, found.tokens > 0
        for template in found.chat_templates:
            refuse_template(root / weights[0], template)
    else:
        headers = {name: read_safetensors_header(root / name) for name in weights}
        tensors = [
            TensorInfo(row.name, row.dtype, row.shape, file=name)
            for name, header in headers.items()
            for row in header.tensors
        ]
        architecture, has_tokenizer = _architecture(root, parsed), _has_tokenizer(tokenizer)
    if kind != "tokenizer":
        _check_index(root, parsed, weights, tensors)
        if not tensors:
            raise Refused(f"{root / weights[0]}: holds no tensors")
    if not has_tokenizer and not sees_images(architecture):
        what = "no tokenizer.ggml.tokens in its header" if kind == "gguf" else "no tokenizer, such as tokenizer.json"
        raise Refused(f"{root / weights[0] if kind == 'gguf' else root}: {what}")
    if isinstance(vocabulary := parsed.get("tokenizer.json"), dict):
        shapes = ((tensor.name, tensor.shape, root / tensor.file) for tensor in tensors)
        with allowed.unless("tokenizer.json"):
            refuse_misfit(root / "tokenizer.json", vocabulary, parsed.get("config.json"), shapes)

    done, total = 0, sum(sizes.values())

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    files = [_hash(root, name, size, headers.get(name), advance) for name, size in sizes.items()]
    identities = {name: Identity.of(status) for name, status in listed.items()}
    _refuse_changes(root, identities, {name: Identity.of(s) for name, s in _list_files(root, names).items()})
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
        dtype=max(sorted(elements), key=elements.__getitem__, default="unknown"),
        weight_files=tuple(weights),
        tokenizer_files=tuple(tokenizer),
        tensors=tuple(tensors),
        allowed=tuple(allowed.used),
        aside=frozenset(allowed.aside),
        identities=identities,
    )


def _list_files(root: Path, names: list[str] | None) -> dict[str, os.stat_result]:
    """Path and status of every regular file, sorted by path; nothing is opened."""
    found: dict[str, os.stat_result] = {}
    pending = [root / name for name in names] if names else sorted(root.iterdir(), reverse=True)
    while pending:
        path = pending.pop()
        if not path.name.isprintable():
            # Such a name could break the digest's lines, or rewrite the terminal that prints it.
            raise Refused(f"{path.parent}: holds a file whose name cannot be printed ({path.name!r})", "rename it")
        if "\\" in path.name or path.name.endswith((" ", ".")):
            raise Refused(f"{path}: a name that other systems read as a path, or as another name", "rename it")
        if path.is_symlink():
            _refuse_link(root, path)
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            if len(path.relative_to(root).parts) > _MAX_DEPTH:
                raise Refused(f"{path}: folders nested more than {_MAX_DEPTH} deep", _ALONE)
            pending += sorted(path.iterdir(), reverse=True)
        elif stat.S_ISREG(status.st_mode):
            found[path.relative_to(root).as_posix()] = status
        else:
            raise Refused(f"{path}: a device, pipe or socket, not a file", "remove it")
        if len(found) > _MAX_FILES:
            raise Refused(f"{root}: holds more than {_MAX_FILES} files", _ALONE)
    return dict(sorted(found.items()))


_ALONE = "audit the folder that holds the model, alone"


def _refuse_statuses(root: Path, found: dict[str, os.stat_result], allowed: Allowed) -> None:
    """Refuse files with a name elsewhere too, by which they could be changed, and files that are mostly holes."""
    names_here = Counter((s.st_dev, s.st_ino) for name, s in found.items() if not (root / name).is_symlink())
    for name, status in found.items():
        with allowed.unless(name):
            if status.st_nlink > max(1, names_here[status.st_dev, status.st_ino]):
                raise Refused(
                    f"{root / name}: a hard link to a file that lies elsewhere too",
                    "copy the model with `cp -r` and audit the copy",
                    "hard-link",
                )
        # A terabyte of nothing takes no room, and hours to hash.
        if status.st_size > 1 << 30 and status.st_blocks * 512 * 64 < status.st_size:
            raise Refused(f"{root / name}: {status.st_size} bytes that are nearly all holes", "remove it")


def _refuse_collisions(root: Path, names: Iterable[str]) -> None:
    """Refuse names that other file systems take for one another, or for a file that a loader reads."""
    seen = {_folded(name): name for name in _LOADED}
    for name in names:
        if (other := seen.setdefault(_folded(name), name)) != name:
            reason = f"the same name as {other} where case or Unicode form make no difference"
            raise Refused(f"{root / name}: {reason}", "rename or remove it")


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFKC", name).casefold())


def _refuse_changes(root: Path, before: Mapping[str, Identity], after: Mapping[str, Identity]) -> None:
    """Refuse a folder that is not, after all is hashed, what it was before the first file was read."""
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            raise _changed(root / name)


def _changed(path: Path) -> Refused:
    return Refused(f"{path}: changed while it was read", "audit a copy that nobody else writes to")


def _refuse_link(root: Path, path: Path) -> None:
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise Refused(f"{path}: a symlink to nothing, or to itself", "remove it") from None
    if not target.is_relative_to(root):
        # Also the snapshots of the Hugging Face cache, whose files are links to ../../blobs.
        raise Refused(f"{path}: a symlink that leaves the folder", _COPY)
    if target.is_dir():  # may loop, and would list the same files under two names
        raise Refused(f"{path}: a symlink to a folder", _COPY)


_COPY = "copy the model with `cp -L -r` and audit the copy"


def _refuse_name(path: Path) -> None:
    refuse_by_name(path)
    if path.name.lower() in ("adapter_config.json", "adapter_model.safetensors"):
        # transformers would add it to the weights here, or fetch the base model that it names.
        raise Refused(f"{path}: an adapter, not a whole model", "merge the adapter first, then audit the merged model")


def _are_weights(name: str) -> bool:
    return name.lower().endswith((".safetensors", ".gguf"))


def _is_needed(name: str) -> bool:
    """Whether loading the model could read this file, so that it cannot be set aside."""
    in_use = _are_weights(name) or _is_read_on_loading(name) or name.lower().endswith(".jinja")
    return in_use or name in _LOADED or name in _tokenizer_files([name])


def _is_read_on_loading(name: str) -> bool:
    """Whether transformers may read this JSON file (those deeper down are only hashed)."""
    return name.lower().endswith("config.json") or ("/" not in name and name.lower().endswith(".json"))


def _refuse_configured(path: Path, value: Any) -> None:
    """Refuse what else a JSON file that is read on loading would make a loader do. Vocabularies may hold any word."""
    if path.name.lower().endswith("config.json"):
        refuse_code(path, value)
        refuse_addresses(path, value)
        refuse_templates(path, value)
    elif path.name == "chat_template.json":
        refuse_templates(path, value)
    elif path.name == "tokenizer.json" and isinstance(value, dict):
        refuse_tokenizer(path, value)


def _read_text(path: Path) -> str:
    if path.stat().st_size > _MAX_TEXT:
        raise Refused(f"{path}: a template of more than {_MAX_TEXT} bytes", "remove it")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise Refused(f"{path}: not UTF-8") from None


def _weight_format(root: Path, weights: list[str]) -> Literal["safetensors", "gguf"]:
    gguf = [name for name in weights if name.lower().endswith(".gguf")]
    if not weights:
        raise Refused(f"{root}: no weights (no .safetensors and no .gguf file)")
    for name in weights:
        if "/" in name:
            raise Refused(f"{root / name}: weights in a subfolder", _ALONE)
    if gguf and len(gguf) < len(weights):
        raise Refused(f"{root / gguf[0]}: ambiguous, the folder holds safetensors weights too", _ONE)
    if len(gguf) > 1:
        raise Refused(f"{root / gguf[1]}: ambiguous, the folder holds more than one GGUF file", _ONE)
    return "gguf" if gguf else "safetensors"


_ONE = "leave one of them in the folder"


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


def _hash(
    root: Path, name: str, size: int, header: SafetensorsHeader | None, advance: Callable[[int], None]
) -> FileEntry:
    """Digest of one file; the weights of a safetensors file are checked in the same bytes that are hashed."""
    path, digest, count = root / name, hashlib.sha256(), 0
    with path.open("rb") as file:
        pieces: Iterator[bytes] = read_values(file, path, header) if header else iter(lambda: file.read(_CHUNK), b"")
        for piece in pieces:
            digest.update(piece)
            count += len(piece)
            advance(len(piece))
            if count > size:
                break
    if count != size:
        raise _changed(path)
    return FileEntry(path=name, size=size, sha256=digest.hexdigest())
