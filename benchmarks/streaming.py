"""The states after all blocks, captured and written to disk, against the plain passes; and what stays in memory.

Passages of a hundred words of a novel go through stories260k. Asked for are the states after every block, as probes ask
for them (`probes.readout.block_outputs`): at the one position that decides (`Target.decision`), or at every position.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from audit.capture import Engine
from audit.evidence import Store, context_of
from audit.loaders import Example
from audit.plan import Request, merge
from audit.target import Target
from audit.tokens import Tokens
from benchmarks.bare import Passes
from benchmarks.materials import PASSAGES, STORIES, child, open_target, passages
from benchmarks.timing import Clock, Line, Settings, ratio, seconds_of, take_turns
from probes.lens import read_layers
from probes.readout import block_outputs

KINDS = {"last": "the last position", "every": "every position"}
_NO_GROWTH = 1.03  # of a process of 0.6 GB: token ids and the store's index grow a little with the number of passages


def streaming(settings: Settings) -> Iterator[Line]:
    """Time from token ids to blocks on disk over the plain passes; peak memory by number of passages.

    The engine's side is what a scan does: planning, self-checks, passes, and the store's writing; it begins by removing
    the blocks of its last turn. The plain side is the same batches through body and head (`benchmarks.bare`), the head
    at the positions asked for, though no state needs it: how much of the time that is stands beside. The peaks are of
    processes of their own, one run each, after capturing and after an instrument has then read everything once.
    """
    if not (STORIES.is_dir() and PASSAGES.is_file()):
        return
    counts = (5, 10, 20) if settings.small else (250, 500, 1000)
    target, out = open_target(STORIES), settings.work / "streaming-out"
    for kind in KINDS:
        yield _time(target, kind, counts[-1], out, settings.repeats)
    for kind in KINDS:
        yield from _memory(kind, counts, out)


def request_for(target: Target, examples: Sequence[Example], kind: str) -> Request:
    """The states after all blocks, at every position of the passages or at the last."""
    ask = target.encode if kind == "every" else target.decision
    texts = tuple(dict.fromkeys(ask(example.prompt, example.answer) for example in examples))
    return Request("streaming", texts, (block_outputs(read_layers(target.layers)),))


def stream(target: Target, request: Request, out: Path, clock: Clock) -> Store:
    """Capture a request into an empty store, as a scan does, timed by part."""
    shutil.rmtree(out, ignore_errors=True)
    engine = Engine(target)
    store = Store(out, context_of(target.digest, dtype=str(target.dtype), device=str(target.device)))
    with clock.part("planning"):
        batches = engine.batches(merge([request]))
    for batch in batches:
        with clock.part("capturing"):
            rows = engine.run(batch)
        with clock.part("storing"):
            store.write((row.tokens, row.values) for row in rows)
    return store


def _time(target: Target, kind: str, count: int, out: Path, repeats: int) -> Line:
    request = request_for(target, passages(count), kind)
    clock, bare = Clock(), Clock()
    passes = Passes(target, [request])
    times, results = take_turns(
        {"engine": partial(stream, target, request, out, clock), "passes": partial(passes.run, bare)}, repeats
    )
    value, low, high = ratio(times["engine"], times["passes"])
    worst, size = _difference(target, request, results["engine"]), _size(out)
    shutil.rmtree(out)
    detail = (
        f"{seconds_of(times)}; of which {_parts(clock, 1 + repeats)}; bare {_parts(bare, 1 + repeats)}; "
        f"{_mb(size)} on disk; max difference hidden {worst:.1e}"
    )
    named = f"{len(request.sequences)} passages, all blocks at {KINDS[kind]}: captured to disk / plain passes"
    return Line("streaming", f"stories260k, {named}", value, low, high, "≤ 1.3", value <= 1.3, detail)


def _difference(target: Target, request: Request, store: Store) -> float:
    """Largest between stored states and those of plain passes over the first texts, the last block apart."""
    [quantity] = request.quantities
    worst = 0.0
    for tokens in request.sequences[:8]:
        stored = _hidden(store, tokens, quantity.name)
        with torch.inference_mode():
            ids = torch.tensor([tokens.ids[:-1]])
            # After the last block transformers shows the state normed.
            plain = target.model(input_ids=ids, output_hidden_states=True).hidden_states[1:-1]
        expected = torch.stack(plain, dim=2)[0, tokens.start - 1 :].numpy()
        worst = max(worst, float(np.abs(stored[:, :-1] - expected).max()))
    return worst


def _hidden(store: Store, tokens: Tokens, quantity: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return store.read(tokens, quantity)["hidden"]


def _memory(kind: str, counts: Sequence[int], out: Path) -> Iterator[Line]:
    found = [child("streaming", count=count, kind=kind, out=out) for count in counts]
    for moment in ("captured", "captured and read once"):
        least = found[0][moment]
        for count, measured in zip(counts[1:], found[1:], strict=True):
            value = measured[moment] / least
            yield Line(
                "streaming",
                f"all blocks at {KINDS[kind]}, {moment}: peak of {count} passages / of {counts[0]}",
                value,
                value,
                value,
                f"≤ {_NO_GROWTH}",
                value <= _NO_GROWTH,
                f"peaks {_mb(measured[moment])} and {_mb(least)}, {_mb(measured['opened'])} before capturing; "
                f"{_mb(measured['disk'])} and {_mb(found[0]['disk'])} on disk",
            )


def _parts(clock: Clock, rounds: int) -> str:
    """Mean seconds of a round by part, what lies between the parts left out."""
    parts = {name: seconds / rounds for name, seconds in clock.seconds().items() if name != "other"}
    return ", ".join(f"{name} {seconds:.3g} s" for name, seconds in parts.items())


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
