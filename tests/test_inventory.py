"""The inventory of a model folder: what it says, and everything that it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from audit.errors import BadInput, Refused
from audit.inventory import TensorInfo, take_inventory

ROOT = Path(__file__).parents[1]
STORIES = Path(__file__).parents[2] / "shared" / "models" / "stories260k"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason=f"{STORIES} is not on this machine")

F32 = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def raw_safetensors(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def safetensors(tensors: dict[str, Any], data: int = 24) -> bytes:
    return raw_safetensors(json.dumps(tensors).encode(), bytes(data))


def write(folder: Path, name: str, content: bytes | str | dict[str, Any]) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict):
        content = json.dumps(content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The smallest folder that is accepted."""
    folder = tmp_path / "model"
    write(folder, "config.json", {"architectures": ["TinyForCausalLM"], "model_type": "tiny"})
    write(folder, "tokenizer.json", {"model": {"vocab": {"auto_map": 0}}})
    write(folder, "model.safetensors", safetensors({"w": F32, "__metadata__": {"format": "pt"}}))
    return folder


def shard(folder: Path) -> None:
    """Replace the weights by two shards with their index."""
    (folder / "model.safetensors").unlink()
    write(folder, "model-00001-of-00002.safetensors", safetensors({"a": F32}))
    write(folder, "model-00002-of-00002.safetensors", safetensors({"b": F32}))
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    write(folder, "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def gguf(path: Path, *, tokens: bool = True, extra: Callable[[Any], object] | None = None) -> Path:
    import numpy as np
    from gguf import GGUFWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, "llama")
    if tokens:
        writer.add_token_list(["<s>", "a", "b"])
        writer.add_token_scores([0.0, 1.0, 2.0])
    if extra:
        extra(writer)
    writer.add_tensor("token_embd.weight", np.zeros((3, 32), np.float32))
    writer.add_tensor("output.weight", np.zeros((5, 7), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(Refused) as caught:
        take_inventory(path, **options)
    message = str(caught.value)
    assert message.isprintable(), "one line, and nothing that moves a terminal's cursor"
    return message


# What is accepted


@needs_stories
def test_a_real_folder() -> None:
    seen: list[tuple[int, int]] = []
    inventory = take_inventory(STORIES, lambda done, total: seen.append((done, total)))
    names = sorted(path.name for path in STORIES.iterdir())
    assert [entry.path for entry in inventory.files] == names
    assert inventory.format == "safetensors"
    assert inventory.architecture == "LlamaForCausalLM"
    assert inventory.parameters == 260_032
    assert inventory.dtype == "float32"
    assert inventory.weight_files == ("model.safetensors",)
    assert inventory.tokenizer_files == ("tokenizer.json", "tokenizer_config.json")
    assert TensorInfo("model.norm.weight", "float32", (64,), "model.safetensors") in inventory.tensors
    total = sum(path.stat().st_size for path in STORIES.iterdir())
    assert seen[-1] == (total, total)
    entry = inventory.to_entry("target")
    assert (entry.name, entry.digest, len(entry.files)) == ("target", inventory.digest, len(names))


@needs_stories
def test_tensors_agree_with_the_safetensors_package() -> None:
    from safetensors import safe_open

    with safe_open(STORIES / "model.safetensors", "pt") as file:
        expected = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert {tensor.name: tensor.shape for tensor in take_inventory(STORIES).tensors} == expected


def test_digest_by_hand(model: Path) -> None:
    write(model, "extra/notes file.txt", "x")
    lines = []
    for name in ("config.json", "extra/notes file.txt", "model.safetensors", "tokenizer.json"):
        data = (model / name).read_bytes()
        lines.append(f"{name} {len(data)} {hashlib.sha256(data).hexdigest()}\n")
    assert take_inventory(model).digest == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_digest_sees_one_byte_a_name_and_nothing_else(model: Path, tmp_path: Path) -> None:
    before = take_inventory(model).digest
    copy = shutil.copytree(model, tmp_path / "elsewhere")
    assert take_inventory(copy).digest == before
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    flipped = take_inventory(copy).digest
    write(copy, "LICENSE", "")
    assert len({before, flipped, take_inventory(copy).digest}) == 3


def test_a_file_longer_than_one_chunk(model: Path) -> None:
    data = os.urandom((2 << 20) + 5)
    write(model, "picture.jpg", b"\xff\xd8" + data)
    by_name = {entry.path: entry.sha256 for entry in take_inventory(model).files}
    assert by_name["picture.jpg"] == hashlib.sha256(b"\xff\xd8" + data).hexdigest()


def test_shards_and_majority_dtype(model: Path) -> None:
    shard(model)
    tensors = {
        "b": F32,
        "ids": {"dtype": "I64", "shape": [1], "data_offsets": [24, 32]},
        "half": {"dtype": "BF16", "shape": [20], "data_offsets": [32, 72]},
        "none": {"dtype": "F16", "shape": [0, 4], "data_offsets": [72, 72]},
        "scalar": {"dtype": "F8_E4M3", "shape": [], "data_offsets": [72, 73]},
    }
    write(model, "model-00002-of-00002.safetensors", safetensors(tensors, data=73))
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(tensors, "model-00002-of-00002.safetensors")
    write(model, "model.safetensors.index.json", index)
    inventory = take_inventory(model)
    assert inventory.parameters == 6 + 6 + 20 + 0 + 1
    assert inventory.dtype == "bfloat16"
    assert len(inventory.weight_files) == 2
    assert {t.name: t.dtype for t in inventory.tensors}["scalar"] == "float8_e4m3fn"


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580])
def test_a_header_length_that_looks_like_a_pickle(model: Path, length: int) -> None:
    # 0x0280 in little-endian is a pickle's first two bytes; such a safetensors file is sound.
    header = json.dumps({"w": F32}).encode().ljust(length)
    path = write(model, "model.safetensors", raw_safetensors(header, bytes(24)))
    assert path.read_bytes()[0] == 0x80
    assert take_inventory(model).parameters == 6


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("README.md", "PK is not a zip"),
        (".gitattributes", "*.safetensors filter=lfs"),
        ("image.png", b"\x89PNG\r\n\x1a\n\x00"),
        ("tokenizer.model", b"\x0a\x0e\x0a\x05<unk>"),
        ("chat_template.jinja", "{{ messages }}"),
        (".git/HEAD", "ref: refs/heads/main"),
        ("deep/results.json", "not JSON, and nothing loads it"),
        ("generation_config.json", '{"trust_remote_code": false, "auto_map": null}'),
        ("empty", b""),
    ],
)
def test_harmless_files(model: Path, name: str, content: bytes | str) -> None:
    write(model, name, content)
    assert name in [entry.path for entry in take_inventory(model).files]


@pytest.mark.parametrize(
    "names",
    [["tokenizer.model"], ["vocab.json", "merges.txt"], ["vocab.txt"], ["spiece.model"], ["x.tiktoken"]],
)
def test_tokenizer_formats(model: Path, names: list[str]) -> None:
    (model / "tokenizer.json").unlink()
    for name in names:
        write(model, name, "{}")
    assert take_inventory(model).tokenizer_files == tuple(sorted(names))


def test_an_image_classifier_needs_no_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    write(model, "preprocessor_config.json", {"image_processor_type": "ViTImageProcessor"})
    assert "no tokenizer" in refusal(model)
    write(model, "config.json", {"architectures": ["TinyForImageClassification"], "model_type": "tiny"})
    assert take_inventory(model).tokenizer_files == ()


def test_gguf_alone_or_in_a_folder(tmp_path: Path) -> None:
    path = gguf(tmp_path / "m" / "tiny.gguf")
    inventory = take_inventory(path)
    assert (inventory.format, inventory.architecture, inventory.dtype) == ("gguf", "llama", "float32")
    assert inventory.parameters == 3 * 32 + 5 * 7
    assert {t.name: t.shape for t in inventory.tensors}["token_embd.weight"] == (3, 32)
    assert inventory.root / inventory.weight_files[0] == path.resolve()
    assert take_inventory(path.parent).digest == inventory.digest
    write(path.parent, "setup.py", "import os")
    assert take_inventory(path).digest == inventory.digest, "the file alone, not its neighbours"
    assert "setup.py" in refusal(path.parent)


def test_a_symlink_inside_the_folder(model: Path) -> None:
    (model / "alias.txt").symlink_to("config.json")
    by_name = {entry.path: entry.sha256 for entry in take_inventory(model).files}
    assert by_name["alias.txt"] == by_name["config.json"]


# What is refused


@pytest.mark.parametrize(
    "suffix", ["bin", "pt", "pth", "ckpt", "pkl", "pickle", "msgpack", "h5", "joblib", "npy", "npz", "PT"]
)
def test_pickled_by_name(model: Path, suffix: str) -> None:
    write(model, f"sub/weights.{suffix}", "harmless text")
    assert f"weights.{suffix}:" in refusal(model)


@pytest.mark.parametrize(
    "head",
    [
        *(bytes((0x80, n)) for n in (2, 3, 4, 5)),
        b"PK\x03\x04",
        b"\x89HDF\r\n\x1a\n",
        b"\x93NUMPY",
        b"\x7fELF",
    ],
)
@pytest.mark.parametrize("name", ["README.md", "tokenizer.model", "deep/er/data", "config.json"])
def test_pickled_by_magic(model: Path, head: bytes, name: str) -> None:
    write(model, name, head + b"rest")
    assert f"{name}: begins like" in refusal(model)


@pytest.mark.parametrize("name", ["modeling_tiny.py", "a/b/kernel.so", "libx.so.1", "X.PY", "ext.dll"])
def test_code_by_name(model: Path, name: str) -> None:
    write(model, name, "")
    assert f"{name}: custom code" in refusal(model)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer_config.json",
        "generation_config.json",
        "processor_config.json",
        "preprocessor_config.json",
    ],
)
@pytest.mark.parametrize(
    "content",
    [
        {"auto_map": {"AutoModel": "evil--modeling.Evil"}},
        {"text_config": {"layers": [{"auto_map": {"AutoConfig": "m.C"}}]}},
        {"trust_remote_code": True},
        {"custom_pipelines": {"x": {"impl": "p.P"}}},
        {"attn_implementation": "someone/kernel"},
        {"vision_config": {"_attn_implementation": {"": "someone/kernel@main"}}},
        {"transformers_weights": "other.safetensors"},
        {"fast_tokenizer_files": ["../elsewhere/tokenizer.4.0.json"]},
    ],
)
def test_code_by_configuration(model: Path, name: str, content: dict[str, Any]) -> None:
    write(model, name, {"architectures": ["TinyForCausalLM"], **content})
    assert f"{name}: " in refusal(model)


def test_a_key_hidden_by_escapes_or_a_duplicate(model: Path) -> None:
    write(model, "config.json", r'{"architectures": ["T"], "auto\u005fmap": {"AutoModel": "m.M"}}')
    assert "auto_map" in refusal(model)
    write(model, "config.json", '{"architectures": ["T"], "architectures": ["U"]}')
    assert "config.json: not valid JSON (duplicate key 'architectures')" in refusal(model)


@pytest.mark.parametrize("where", ["file", "folder", "chain", "nothing", "itself", "inner folder"])
def test_symlinks(model: Path, tmp_path: Path, where: str) -> None:
    outside = write(tmp_path, "outside/blob", "text")
    link = model / "linked.txt"
    if where == "chain":
        (model / "between").symlink_to(outside)
    (model / "sub").mkdir()
    targets = {
        "folder": outside.parent,
        "chain": "between",
        "nothing": "gone",
        "itself": "linked.txt",
        "inner folder": "sub",
    }
    link.symlink_to(targets.get(where, outside))
    message = refusal(model)
    assert "linked.txt: a symlink" in message or (where == "chain" and "between: a symlink" in message)
    if where in ("file", "folder", "chain"):
        assert "cp -L" in message


def test_a_hugging_face_snapshot(model: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    shutil.copytree(model, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert "config.json: a symlink that leaves the folder; copy the model with `cp -L" in refusal(snapshot)
    root = tmp_path / "by-link"
    root.symlink_to(model)
    assert take_inventory(root).digest == take_inventory(model).digest, "the folder itself may be a link"


def test_special_files(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(model / "pipe.json")
    assert "pipe.json: a device" in refusal(model)
    (model / "pipe.json").unlink()
    monkeypatch.chdir(model)  # a socket's path is limited to some hundred characters
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("sock")
        assert "sock: a device" in refusal(model)


@pytest.mark.parametrize("name", ["two\nlines.txt", "\x1b[2Jclear", "bytes\udcff", "right\u202eleft"])
def test_names_that_cannot_be_printed(model: Path, name: str) -> None:
    (model / name).write_text("x")
    assert repr(name) in refusal(model)


def tensor(**changes: Any) -> bytes:
    return safetensors({"w": F32 | changes})


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "length"),
    "only a prefix": (struct.pack("<Q", 2), "length"),
    "prefix beyond the file": (struct.pack("<Q", 1 << 40) + b"{}", "length"),
    "prefix with the sign bit": (b"\xff" * 16, "length"),
    "not JSON": (raw_safetensors(b"{nope}", b""), "not valid JSON"),
    "not UTF-8": (raw_safetensors(b'{"\xff": 1}', b""), "not valid JSON"),
    "not an object": (raw_safetensors(b"[1, 2]", b""), "not a JSON object"),
    "space before": (raw_safetensors(b' {"a": 1}', b""), "not a JSON object"),
    "nested": (raw_safetensors(b'{"a":' * 100_000, b""), "nested too deeply"),
    "huge number": (raw_safetensors(b'{"a": ' + b"9" * 5000 + b"}", b""), "not valid JSON"),
    "duplicate key": (raw_safetensors(b'{"w": 1, "w": 2}', b""), "duplicate key 'w'"),
    "metadata": (safetensors({"w": F32, "__metadata__": {"n": 1}}), "__metadata__"),
    "metadata list": (safetensors({"w": F32, "__metadata__": []}), "__metadata__"),
    "tensor not an object": (safetensors({"w": [1]}), "needs dtype"),
    "key missing": (safetensors({"w": {"dtype": "F32", "shape": [2, 3]}}), "needs dtype"),
    "key too many": (tensor(code="x"), "nothing else"),
    "dtype": (tensor(dtype="F128"), "unknown dtype 'F128'"),
    "dtype list": (tensor(dtype=["F32"]), "unknown dtype"),
    "shape text": (tensor(shape="23"), "shape or offsets"),
    "shape negative": (tensor(shape=[-2, -3]), "shape or offsets"),
    "shape boolean": (tensor(shape=[True, 6]), "shape or offsets"),
    "shape float": (tensor(shape=[2.0, 3]), "shape or offsets"),
    "shape too large": (tensor(shape=[1 << 64, 0]), "shape or offsets"),
    "rank": (tensor(shape=[1] * 65), "shape or offsets"),
    "offsets three": (tensor(data_offsets=[0, 24, 24]), "shape or offsets"),
    "offsets reversed": (tensor(data_offsets=[24, 0]), "shape or offsets"),
    "offsets beyond": (tensor(data_offsets=[8, 32]), "outside the file"),
    "size mismatch": (tensor(shape=[2, 2]), "do not fit its shape"),
    "hole": (safetensors({"w": F32 | {"data_offsets": [8, 32]}}, 32), "begins after a hole"),
    "overlap": (safetensors({"w": F32, "v": F32 | {"data_offsets": [8, 32]}}, 32), "overlaps"),
    "trailing": (safetensors({"w": F32}, 25), "1 bytes at the end"),
    "half a byte": (
        safetensors({"w": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, 1),
        "do not fit",
    ),
    "name with a line break": (safetensors({"a\nb": F32}), "unprintable"),
    "name that is half a character": (safetensors({"\ud800": F32}), "unprintable"),
    "name empty": (safetensors({"": F32}), "empty or unprintable"),
    "no tensors": (safetensors({}, 0), "holds no tensors"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_safetensors(model: Path, case: str) -> None:
    content, reason = BROKEN[case]
    write(model, "model.safetensors", content)
    message = refusal(model)
    assert "model.safetensors: " in message
    assert reason in message
    assert len(message) < 600


def test_a_header_of_more_than_100_megabytes(model: Path) -> None:
    with (model / "model.safetensors").open("wb") as file:  # sparse: takes no room on disk
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(200_000_000)
    assert "model.safetensors: broken safetensors header: its length" in refusal(model)


def test_json_of_more_than_64_megabytes(model: Path) -> None:
    with (model / "tokenizer.json").open("wb") as file:
        file.truncate((64 << 20) + 1)
    assert "tokenizer.json: JSON of more than" in refusal(model)


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def rewrite_index(folder: Path, **weight_map: str) -> None:
    write(folder, INDEX, {"weight_map": weight_map})


SHARDS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "shard missing": (lambda m: (m / SECOND).unlink(), INDEX, f"shard '{SECOND}', which is missing"),
    "shard outside": (lambda m: rewrite_index(m, a=FIRST, b=f"../{SECOND}"), INDEX, "which is missing"),
    "shard not listed": (lambda m: rewrite_index(m, a=FIRST), SECOND, "not listed in"),
    "other file not listed": (
        lambda m: write(m, "consolidated.safetensors", safetensors({"c": F32})),
        "consolidated.safetensors",
        "not listed in",
    ),
    "default file not listed": (
        lambda m: write(m, "model.safetensors", safetensors({"a": F32})),
        "model.safetensors",
        "not listed in",
    ),
    "tensor not held": (lambda m: rewrite_index(m, a=FIRST, b=SECOND, c=SECOND), INDEX, "lists tensor 'c'"),
    "tensors swapped": (lambda m: rewrite_index(m, a=SECOND, b=FIRST), FIRST, "'a' is not listed there"),
    "tensor not listed": (
        lambda m: write(m, SECOND, safetensors({"b": F32, "c": F32 | {"data_offsets": [24, 48]}}, 48)),
        SECOND,
        "'c' is not listed there",
    ),
    "tensor twice": (
        lambda m: write(m, SECOND, safetensors({"b": F32, "a": F32 | {"data_offsets": [24, 48]}}, 48)),
        SECOND,
        "'a' is in",
    ),
    "no weight_map": (lambda m: write(m, INDEX, {"weight_map": ["a"]}), INDEX, "no weight_map"),
    "index not an object": (lambda m: write(m, INDEX, "[]"), INDEX, "no weight_map"),
    "index names numbers": (lambda m: write(m, INDEX, '{"weight_map": {"a": 1}}'), INDEX, "no weight_map"),
    "index with duplicates": (
        lambda m: write(m, INDEX, f'{{"weight_map": {{"a": "{FIRST}", "a": "{SECOND}"}}}}'),
        INDEX,
        "duplicate key 'a'",
    ),
    "two indexes": (
        lambda m: shutil.copy(m / INDEX, m / "z.safetensors.index.json"),
        "z.safetensors.index.json",
        "a second index",
    ),
    "no index": (lambda m: (m / INDEX).unlink(), SECOND, "more than one safetensors file and no index"),
    "one shard alone": (lambda m: [(m / n).unlink() for n in (INDEX, SECOND)], FIRST, "one shard of 2"),
}


@pytest.mark.parametrize("case", SHARDS)
def test_shards(model: Path, case: str) -> None:
    change, name, reason = SHARDS[case]
    shard(model)
    take_inventory(model)
    change(model)
    message = refusal(model)
    assert f"{name}: " in message
    assert reason in message


PARTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "model: no weights"),
    "no config": (lambda m: (m / "config.json").unlink(), "config.json: missing"),
    "config not JSON": (lambda m: write(m, "config.json", "{"), "config.json: not valid JSON"),
    "config not an object": (lambda m: write(m, "config.json", "[]"), "config.json: not a JSON object"),
    "config without architecture": (
        lambda m: write(m, "config.json", "{}"),
        "config.json: names no architecture",
    ),
    "architecture with a line break": (
        lambda m: write(m, "config.json", {"architectures": ["A\nB"]}),
        "config.json: names no architecture",
    ),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), "model: no tokenizer"),
    "half a tokenizer": (lambda m: (m / "tokenizer.json").rename(m / "vocab.json"), "model: no tokenizer"),
    "tokenizer not JSON": (lambda m: write(m, "tokenizer.json", "x"), "tokenizer.json: not valid JSON"),
    "weights in a subfolder": (
        lambda m: write(m, "checkpoint-5/model.safetensors", safetensors({"w": F32})),
        "checkpoint-5/model.safetensors: weights in a subfolder",
    ),
    "adapter beside": (
        lambda m: write(m, "adapter_config.json", {"base_model_name_or_path": "x/y"}),
        "adapter_config.json: an adapter",
    ),
    "adapter alone": (
        lambda m: (m / "model.safetensors").rename(m / "adapter_model.safetensors"),
        "adapter_model.safetensors: an adapter, not a whole model; merge the adapter first",
    ),
    "GGUF and safetensors": (lambda m: gguf(m / "x.gguf"), "x.gguf: ambiguous"),
}


@pytest.mark.parametrize("case", PARTS)
def test_parts(model: Path, case: str) -> None:
    change, reason = PARTS[case]
    change(model)
    assert reason in refusal(model)


def test_gguf_refusals(tmp_path: Path) -> None:
    path = gguf(tmp_path / "a" / "tiny.gguf")
    gguf(path.with_name("also.gguf"))
    assert "tiny.gguf: ambiguous, the folder holds more than one" in refusal(path.parent)
    no_tokens = gguf(tmp_path / "b" / "tiny.gguf", tokens=False)
    assert "tiny.gguf: no tokenizer.ggml.tokens" in refusal(no_tokens)
    split = gguf(tmp_path / "c" / "tiny.gguf", extra=lambda w: w.add_uint16("split.count", 2))
    assert "tiny.gguf: one part of a GGUF model split over files" in refusal(split)


def test_every_truncation_of_a_gguf_is_refused(tmp_path: Path) -> None:
    path = gguf(tmp_path / "tiny.gguf")
    data = path.read_bytes()
    # The writer pads the last tensor to 32 bytes, and 70 of its 96 bytes are data.
    for size in range(len(data) - 26):
        path.write_bytes(data[:size])
        assert "tiny.gguf: " in refusal(path)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"GGUF\x03", b"GGML\x03", "begins with"),
        (b"GGUF\x03", b"GGUF\x01", "version 1"),
        (b"GGUF\x03\0\0\0\x02\0\0\0\0\0\0\0", b"GGUF\x03\0\0\0\x02\0\0\0\0\0\0\x7f", "do not fit"),
        (b"general.architecture", b"general.architectura", "general.architecture is missing"),
        (b"llama", b"ll\nma", "general.architecture is missing"),
        (b"tokenizer.ggml.scores", b"tokenizer.ggml.tokens", "duplicate key"),
        (b"tokenizer.ggml.scores", b"tokenizer.ggml.sco\xffes", "not UTF-8"),
        (b"output.weight", b"output\nweight", "not printable"),
        (b"output.weight\x02", b"output.weight\x05", "5 dimensions"),
        (b"\x01\0\0\0\x80\x01\0\0\0\0\0\0", b"\x63\0\0\0\x80\x01\0\0\0\0\0\0", "unknown type 99"),
        (b"\x01\0\0\0\x80\x01\0\0\0\0\0\0", b"\x02\0\0\0\x80\x01\0\0\0\0\0\0", "no whole number"),
        (b"\x01\0\0\0\x80\x01\0\0\0\0\0\0", b"\x01\0\0\0\x60\x01\0\0\0\0\0\0", "expected 384"),
        (b"\x01\0\0\0\x80\x01\0\0\0\0\0\0", b"\x01\0\0\0\xa0\x01\0\0\0\0\0\0", "expected 384"),
        (b"\x01\0\0\0\x80\x01\0\0\0\0\0\0", b"\x18\0\0\0\x80\x01\0\0\0\0\0\0", "belong to none"),
    ],
)
def test_broken_gguf(tmp_path: Path, old: bytes, new: bytes, reason: str) -> None:
    path = gguf(tmp_path / "tiny.gguf")
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    message = refusal(path)
    assert "tiny.gguf: broken GGUF header" in message
    assert reason in message


def test_bad_input(tmp_path: Path, model: Path) -> None:
    for path in (
        tmp_path / "gone",
        model / "config.json",
        model / "model.safetensors",
        Path("a\0b"),
        Path("a\nb"),
    ):
        with pytest.raises(BadInput) as caught:
            take_inventory(path)
        assert str(caught.value).isprintable()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable(model: Path) -> None:
    (model / "config.json").chmod(0)
    assert "config.json: cannot be read (Permission denied)" in refusal(model)


def test_a_file_that_grows_while_it_is_hashed(model: Path) -> None:
    def grow(done: int, total: int) -> None:
        with (model / "tokenizer.json").open("ab") as file:
            file.write(b" ")

    assert "tokenizer.json: changed while it was read" in refusal(model, progress=grow)


def test_imports_nothing_heavy() -> None:
    code = (
        "import audit.inventory, sys; "
        "print(sorted({'torch', 'transformers', 'numpy', 'safetensors', 'gguf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Whatever the bytes, nothing but a refusal comes out

fuzz = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["F32", "F4", "I8"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "dtype",
                    "shape",
                    "data_offsets",
                    "__metadata__",
                    "weight_map",
                    "architectures",
                    "auto_map",
                    "w",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


def survives(path: Path) -> None:
    try:
        take_inventory(path)
    except (Refused, BadInput) as error:
        assert str(error).isprintable()


@fuzz
@given(
    name=st.sampled_from(["model.safetensors", "config.json", "tokenizer.json", INDEX, "m.gguf", "other"]),
    data=st.binary(max_size=200),
)
def test_fuzz_random_bytes(model: Path, name: str, data: bytes) -> None:
    path = model / name
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(data)
    survives(model)
    path.unlink() if before is None else path.write_bytes(before)


@fuzz
@given(value=json_values, info=st.dictionaries(st.sampled_from(list(F32)), json_values), data=st.integers(0, 40))
def test_fuzz_headers_and_configurations(model: Path, value: Any, info: dict[str, Any], data: int) -> None:
    write(model, "model.safetensors", safetensors({"w": F32 | info}, data))
    survives(model)
    write(model, "model.safetensors", safetensors({"w": F32, "v": value}))
    survives(model)
    write(model, "model.safetensors", safetensors({"w": F32}))
    for name in ("config.json", INDEX):
        path = model / name
        before = path.read_bytes() if path.exists() else None
        write(model, name, json.dumps(value))
        survives(model)
        path.unlink() if before is None else path.write_bytes(before)


@fuzz
@given(edits=st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), min_size=1, max_size=4))
def test_fuzz_gguf(tmp_path: Path, edits: list[tuple[int, int]]) -> None:
    source = tmp_path / "source"
    if not source.exists():
        gguf(source)
    data = bytearray(source.read_bytes())
    for position, value in edits:
        data[position % len(data)] = value
    path = tmp_path / "mutated.gguf"
    path.write_bytes(data)
    survives(path)
