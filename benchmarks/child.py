"""What runs in a process of its own, so that imports, caches and peak memory are nobody else's.

    python -m benchmarks.child scan '{"work": …, "out": …, "budget": "standard"}'

Prints one line of JSON.
"""

from __future__ import annotations

import builtins
import importlib
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.timing import Clock

_SCANNED = "knowledge,memorization,membership,remind,utility,weights,lens,relearn"
"""Instruments of every kind whose passes can be made without them: no patching, nothing optimised, no other models."""


def scan(work: str, out: str, budget: str) -> dict[str, Any]:
    """Scan the demo case, timed by part."""
    clock = Clock()
    clock.watch(builtins, "__import__", "imports")
    clock.watch(importlib, "import_module", "imports")
    import audit.capture
    import audit.evidence
    import audit.gather
    import audit.passes
    import audit.plan
    import audit.scan
    from benchmarks.materials import demo_case

    _watch_models(clock)
    for owner, attribute, name in (
        (audit.plan, "merge", "planning"),
        (audit.capture.Engine, "batches", "planning"),
        (audit.passes.TextPass, "prepare", "self-checks"),
        (audit.gather, "_noise", "self-checks"),
        (audit.passes.TextPass, "run", "body"),
        (audit.capture.Engine, "_reduce", "head and quantities"),
        (audit.capture.Engine, "generate", "answers"),
        (audit.evidence.Store, "__init__", "store"),
        (audit.evidence.Store, "write", "store"),
        (audit.evidence.Store, "write_continuations", "store"),
        (audit.evidence.Store, "read", "store"),
        (audit.evidence.Store, "read_continuation", "store"),
        (audit.gather, "_run_scores", "store"),
        (audit.gather, "visit", "store"),
        (audit.scan, "take_inventories", "inventory"),
        (audit.scan, "judge", "statistics"),
    ):
        clock.watch(owner, attribute, name)
    case = demo_case(Path(work), budget, _SCANNED)
    record = audit.scan.scan(case, Path(out))
    failed = [entry.reason for entry in record.not_run if entry.failed]
    if failed:
        raise RuntimeError(f"the scan is incomplete: {failed}")
    return {"parts": clock.seconds(), "tokens": record.cost.forward_tokens}


def passes(work: str, budget: str) -> dict[str, Any]:
    """The unavoidable passes of the same scan, timed by part (see `benchmarks.scan`)."""
    from audit.instrument import Attack
    from audit.inventory import take_inventory
    from audit.scan import _choose
    from audit.target import Target
    from benchmarks.bare import Passes
    from benchmarks.materials import demo_case

    clock = Clock()
    _watch_models(clock)
    case = demo_case(Path(work), budget, _SCANNED)
    instruments, _ = _choose(case)
    tokens = 0
    for role, folder in case.models.items():
        target = Target(role, take_inventory(folder), template=case.options.template)
        plain = Passes(target, [r for i in instruments for r in i.requests(case, target)])
        plain.run(clock)
        tokens += plain.tokens
        for attack in (i for i in instruments if isinstance(i, Attack)):
            views = [target.altered(stage.name, stage.recipe) for stage in attack.stages(case, target)]
            if not views:
                continue
            again = [Passes(view, list(attack.requests(case, view))) for view in views]
            for _, view, after in zip(attack.run(case, target, _no_tick), views, again, strict=True):
                view.adopt(target)
                after.run(clock)
                tokens += after.tokens
        target.release()
    return {"parts": clock.seconds(), "tokens": tokens}


def _watch_models(clock: Clock) -> None:
    """What both sides do alike: opening models, making requests, training, statistics."""
    from audit.instrument import Attack, Instrument, load_all
    from audit.target import Target

    clock.watch(Target, "__init__", "opening models")
    clock.watch(Target, "_load", "opening models")
    for kind in {type(item) for item in load_all() if isinstance(item, Instrument)}:
        clock.watch(kind, "requests", "requests")
        clock.watch(kind, "measure", "statistics")
        clock.watch(kind, "examples", "statistics")
        if issubclass(kind, Attack):
            clock.watch(kind, "stages", "requests")
            clock.watch_steps(kind, "run", "training")


def _no_tick(_done: int, _total: int) -> None:
    """No progress is shown."""


def memory(work: str, folder: str, out: str, rows: int, skip: list[str]) -> dict[str, Any]:
    """Scan a few rows of the demo's sets on a model; the peak of this process's memory."""
    from audit.scan import scan as run_scan
    from benchmarks.materials import small_case

    case = small_case(Path(folder), Path(work), rows, tuple(skip))
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    record = run_scan(case, Path(out))
    seconds = time.perf_counter() - began
    shutil.rmtree(out)
    return {
        "peak": _peak(),
        "seconds": seconds,
        "not_run": {entry.instrument: entry.reason for entry in record.not_run},
    }


def grown(folder: str, sets: dict[str, str], out: str) -> dict[str, Any]:
    """Scan texts by instruments that score and continue all of them."""
    from audit.case import Case, Options
    from audit.inventory import take_inventory
    from audit.loaders import SetSpec
    from audit.scan import scan as run_scan

    options = Options.parse({"budget": "thorough", "template": "plain", "only": "memorization,membership"}, "growth")
    specs = {name: SetSpec(Path(path)) for name, path in sets.items()}
    case = Case.build({"target": Path(folder)}, specs, options, "growth")
    libraries()
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    record = run_scan(case, Path(out))
    seconds = time.perf_counter() - began
    shutil.rmtree(out)
    if failed := [row.reason for row in record.not_run]:
        raise RuntimeError(f"the scan is incomplete: {failed}")
    return {"peak": _peak(), "seconds": seconds, "parameters": take_inventory(Path(folder)).parameters}


def inventoried(folder: str) -> dict[str, Any]:
    """Take the inventory of a folder."""
    from audit.inventory import take_inventory

    began = time.perf_counter()
    take_inventory(Path(folder))
    return {"peak": _peak(), "seconds": time.perf_counter() - began}


def compared(target: str, original: str) -> dict[str, Any]:
    """Compare the weights of two folders."""
    from audit.weights import compare

    began = time.perf_counter()
    rows = compare(Path(target), Path(original))
    changed = sum(bool(row.largest) for row in rows)
    detail = f"{changed} of {len(rows)} tensors differ"
    return {"peak": _peak(), "seconds": time.perf_counter() - began, "detail": detail}


def bounded(target: str, original: str, memory: str, work: str, out: str, small: bool) -> dict[str, Any]:
    """Scan a model under a bound on memory."""
    from audit.case import Case, Options
    from audit.loaders import SetSpec
    from audit.scan import scan as run_scan
    from benchmarks.materials import demo_folder

    names = ("forget", "retain", "holdout", "utility")
    rows = 4 if small else 12
    sets = {name: SetSpec(demo_folder(Path(work)) / "data" / f"{name}.jsonl", limit=rows) for name in names}
    options = {"budget": "quick", "template": "plain", "dtype": "bfloat16", "memory": memory}
    if small:
        options["only"] = "knowledge,memorization,lens,weights,relearn,noise"
    models = {"target": Path(target), "original": Path(original)}
    case = Case.build(models, sets, Options.parse(options, "offload"), "offload")
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    record = run_scan(case, Path(out))
    seconds = time.perf_counter() - began
    shutil.rmtree(out)
    if failed := [f"{row.instrument}: {row.reason}" for row in record.not_run if row.failed]:
        raise RuntimeError(f"the scan is incomplete: {failed}")
    left_out = sum("stated memory" in row.reason for row in record.not_run)
    detail = f"{len(record.findings)} findings, {left_out} instruments left out for want of memory"
    return {"peak": _peak(), "seconds": seconds, "detail": detail}


def streaming(count: int, kind: str, out: str) -> dict[str, Any]:
    """Peak memory with stories260k open, after capturing so many passages to disk, and after reading them once."""
    from audit.evidence import Evidence
    from benchmarks.materials import STORIES, open_target, passages
    from benchmarks.streaming import request_for, stream

    target = open_target(STORIES)
    found = {"opened": _peak()}
    request, folder = request_for(target, passages(count), kind), Path(out)
    store = stream(target, request, folder, Clock())
    found["captured"] = _peak()
    evidence = Evidence()
    evidence.register("target", store, [request])
    for _ in evidence.iterate("target", request.name):
        pass  # an instrument that keeps nothing of what it reads
    found["captured and read once"] = _peak()
    found["disk"] = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    shutil.rmtree(folder)
    return found


def opened(folder: str) -> dict[str, Any]:
    """Peak memory of a process that has imported what a scan imports, opened a model and passed two tokens."""
    from audit.capture import Engine
    from audit.tokens import Tokens
    from benchmarks.materials import open_target

    libraries()
    Engine(open_target(Path(folder))).plain(Tokens((1, 1), 1))
    return {"peak": _peak()}


def libraries() -> dict[str, Any]:
    """Peak memory of a process that has imported what a scan imports, and done nothing."""
    import transformer_lens.factories.architecture_adapter_factory  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import audit.scan  # noqa: F401
    from audit.instrument import load_all

    load_all()
    return {"peak": _peak()}


def _peak() -> int:
    """Bytes. `ru_maxrss` would not do: a child starts with its parent's peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


if __name__ == "__main__":
    actions: dict[str, Callable[..., dict[str, Any]]] = {
        "scan": scan,
        "passes": passes,
        "memory": memory,
        "streaming": streaming,
        "libraries": libraries,
        "opened": opened,
        "grown": grown,
        "inventoried": inventoried,
        "compared": compared,
        "bounded": bounded,
    }
    action = actions[sys.argv[1]]
    print(json.dumps(action(**json.loads(sys.argv[2]))))
