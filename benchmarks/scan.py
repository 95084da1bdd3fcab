"""A scan of the demo's unlearned model by eight instruments, and the passes that no such scan could do without.

*Unavoidable* is, for the same case, with the same weights, threads and batches (`Engine.batches` of the merged
requests of all instruments, for every model and every stage of every attack):

- body: the model's body on each batch's token ids, made into tensors beforehand, shared prefixes once;
- head: the unembedding at the scored positions, in the engine's chunks, and nothing done with the logits;
- answers: `model.generate`, greedy, on the same batches of prompts;
- training: the attacks' optimizer steps, forward, backward and update.

Not in it: loading models, making and merging requests, any statistic (softmax and the lens' reading of every
block among them), the numeric-noise check, files. All of these are in the scan's time, which is the wall time of
`scan()` into an empty folder in a fresh process. Imports are measured apart, since a session pays for them once;
a line with them included says what `audit scan` takes.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks.materials import child, demo_folder
from benchmarks.timing import Line, Settings, ratio

UNAVOIDABLE = ("body", "head", "answers", "training")


def scan(settings: Settings) -> Iterator[Line]:
    """Scan time over unavoidable time, and what every part of a scan takes, over the same."""
    demo_folder(settings.work)  # built before anything is timed
    out = settings.work / "scan-out"
    options = {"work": settings.work, "budget": "quick" if settings.small else "standard"}
    scans: list[dict[str, Any]] = []
    passes: list[dict[str, Any]] = []
    for turn in range(settings.repeats):
        for side in ("scan", "passes") if turn % 2 == 0 else ("passes", "scan"):
            if side == "scan":
                shutil.rmtree(out, ignore_errors=True)
                scans.append(child("scan", out=out, **options))
            else:
                passes.append(child("passes", **options))
    shutil.rmtree(out, ignore_errors=True)
    if scans[0]["tokens"] != passes[0]["tokens"]:
        raise AssertionError(f"scan passed {scans[0]['tokens']} tokens, the bare passes {passes[0]['tokens']}")
    bare = [sum(p["parts"][part] for part in UNAVOIDABLE) for p in passes]
    whole = [sum(s["parts"].values()) for s in scans]
    unimported = [total - s["parts"]["imports"] for total, s in zip(whole, scans, strict=True)]
    for label, seconds in (("scan()", unimported), ("with imports, as `audit scan`", whole)):
        value, low, high = ratio(seconds, bare)
        detail = f"{statistics.median(seconds):.1f} s over {statistics.median(bare):.1f} s"
        yield Line("scan", f"{label} / unavoidable passes", value, low, high, "≤ 1.2", value <= 1.2, detail)
    parts = {name: [s["parts"].get(name, 0.0) for s in scans] for name in scans[0]["parts"]}
    for name in sorted(parts, key=lambda part: -statistics.median(parts[part])):
        value, low, high = ratio(parts[name], bare)
        detail = f"{statistics.median(parts[name]):.2f} s"
        if name in passes[0]["parts"] and name in (*UNAVOIDABLE, "head and quantities"):
            detail += f" (bare {statistics.median([p['parts'][name] for p in passes]):.2f} s)"
        if name == "head and quantities":
            detail += f" (bare head {statistics.median([p['parts']['head'] for p in passes]):.2f} s)"
        yield Line("scan", f"  of which {name}", value, low, high, detail=detail)
