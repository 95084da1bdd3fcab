"""A model larger than the memory it may take: inventoried, compared and scanned, each in a process of its own.

Weights are random, in bfloat16, of a Llama's shape (`--size 3B`: that of Llama 3.2 3B); the original is the same save
its last two blocks, so that there is something to compare. What is measured is the peak of the process's resident
memory (VmHWM: all that it and its libraries have allocated, their code, and pages of files while they are mapped)
over the bound that the scan was told.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audit.memory import parse_bytes, spelled
from benchmarks.materials import child, demo_folder
from benchmarks.timing import Line, Settings


@dataclass(frozen=True)
class Shape:
    """Of a Llama, and the bound that it is scanned under."""

    width: int
    inner: int
    layers: int
    heads: int
    keys: int
    vocabulary: int
    memory: str


SHAPES = {
    "0.5B": Shape(1280, 4096, 24, 20, 4, 16384, "950MB"),
    "1B": Shape(2048, 8192, 16, 32, 8, 128256, "2GB"),
    "3B": Shape(3072, 8192, 28, 24, 8, 128256, "3GB"),
}


def offload(settings: Settings) -> Iterator[Line]:
    """Peaks over the bound, one run each; with `--small`, a few instruments on a few rows."""
    shape = SHAPES[settings.size]
    demo_folder(settings.work)
    target, original = (_written(settings.work, settings.size, shape, edited) for edited in (True, False))
    weights = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    bound = parse_bytes(shape.memory, settings.size)
    options = {"target": target, "original": original, "memory": shape.memory}
    work = {"work": settings.work, "out": settings.work / "offload-out", "small": settings.small}
    for name, measured in (
        ("inventory", child("inventoried", folder=target)),
        ("weights compared", child("compared", target=target, original=original)),
        ("scan at budget quick", child("bounded", **options, **work)),
    ):
        value = measured["peak"] / bound
        detail = f"peak {spelled(measured['peak'])}, bound {spelled(bound)}, weights {spelled(weights)}"
        detail += f"; {measured['seconds']:.0f} s" + (f"; {measured['detail']}" if "detail" in measured else "")
        yield Line("offload", f"{settings.size}, {name}: peak / bound", value, value, value, "≤ 1", value <= 1, detail)


def _written(work: Path, size: str, shape: Shape, edited: bool) -> Path:
    """The folder of a model, a file a block, no more than one of them in memory at a time."""
    folder = work / f"offload-{size}-{'target' if edited else 'original'}"
    if (folder / "complete").is_file():
        return folder
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from audit.organisms.train import word_tokenizer
    from audit.organisms.world import make_world

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.keys,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        shapes = {
            name: t.shape for name, t in LlamaForCausalLM(config).state_dict().items() if name != "lm_head.weight"
        }
    files: dict[str, list[str]] = {}
    for name in shapes:
        block = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        files.setdefault(f"model-{block}.safetensors", []).append(name)
    config.save_pretrained(folder)
    word_tokenizer(make_world().words()).save_pretrained(folder)
    for i, (file, names) in enumerate(files.items()):
        other = edited and any(f"layers.{layer}." in names[0] for layer in (shape.layers - 1, shape.layers - 2))
        random = torch.Generator().manual_seed(1000 * other + i)
        save_file({name: _tensor(shapes[name], random) for name in names}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "complete").touch()
    return folder


def _tensor(shape: tuple[int, ...], random: Any) -> Any:
    """Ones for a norm, and small random numbers."""
    import torch

    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=random)
