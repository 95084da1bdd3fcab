"""The same audit of a folder and of llama.cpp's server with it: `python -m benchmarks.endpoints MODEL_DIR SETS_DIR`.

The server runs twice: in float32 throughout, and as it comes (on a processor: flash attention, and keys and values kept
in half precision). Prints one row a finding, and by how much the log-probabilities of all scored tokens differ.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from audit.case import Case, Options
from audit.endpoint.address import Endpoint
from audit.loaders import SetSpec
from audit.progress import SILENT
from audit.quantities import TOKEN
from audit.record import Record
from audit.scan import _capture_all, _choose, _Run, _seen, scan, take_inventories
from tests.servers import llama_server, write_gguf

SETS = ("forget", "retain", "holdout")


def main() -> None:
    """Write the model as GGUF, audit it three times, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.endpoints")
    parser.add_argument("model", type=Path, help="a Llama folder in float32")
    parser.add_argument("sets", type=Path, help="a folder with forget.jsonl, retain.jsonl and holdout.jsonl")
    parser.add_argument("--rows", type=int, default=40, help="of a set")
    parser.add_argument("--only", default="knowledge,membership,remind,trace-text", help="instruments")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        _compare(given.model, given.sets, given.rows, given.only, Path(name))


def _compare(model: Path, sets: Path, rows: int, only: str, work: Path) -> None:
    gguf = write_gguf(model, work / "model.gguf")
    specs = {name: SetSpec(sets / f"{name}.jsonl", limit=rows) for name in SETS}
    options = Options.parse({"only": only, "budget": "quick", "template": "plain", "device": "cpu"}, "benchmark")
    sides: dict[str, tuple[Record, dict[object, np.ndarray]]] = {}
    seconds: dict[str, float] = {}
    for side in ("weights", "server, float32", "server, as it comes"):
        began, out = time.monotonic(), work / side
        if side == "weights":
            sides[side] = _audited(Case.build({"target": model}, specs, options), out)
        else:
            with llama_server(gguf, exact="float32" in side) as server:
                place = Endpoint(server.url, "stories", tokenizer=model)
                sides[side] = _audited(Case.build({"target": place}, specs, options), out)
        seconds[side] = time.monotonic() - began
    names = list(sides)
    print(f"| {model.name} | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    ids = [finding.id for finding in sides["weights"][0].findings]
    for one in ids:
        values = [next((f.estimate for f in record.findings if f.id == one), None) for record, _ in sides.values()]
        print(f"| {one} | {' | '.join('not run' if v is None else f'{v:.4f}' for v in values)} |")
    print(f"| verdict | {' | '.join(record.verdict.label.value for record, _ in sides.values())} |")
    theirs = sides["weights"][1]
    gaps = {s: np.concatenate([np.abs(found[key] - theirs[key]) for key in theirs]) for s, (_, found) in sides.items()}
    largest, mean = ([f"{of(gap):.1e}" for gap in gaps.values()] for of in (np.max, np.mean))
    print(f"| largest difference of a log-probability, {gaps['weights'].size:,} tokens | {' | '.join(largest)} |")
    print(f"| mean difference | {' | '.join(mean)} |")
    print(f"| seconds | {' | '.join(f'{value:.0f}' for value in seconds.values())} |")


def _audited(case: Case, out: Path) -> tuple[Record, dict[object, np.ndarray]]:
    """An audit, and all log-probabilities that it captured, by the tokens they are of."""
    record = scan(case, out)
    inventories = take_inventories(case, SILENT, out / "evidence")
    case = _seen(case, inventories)
    run = _Run(case, out / "evidence", SILENT, *_choose(case))
    evidence = _capture_all(run, inventories)
    store = evidence.store("target")
    assert store is not None
    found = {}
    for request in evidence._requests.values():
        for tokens in getattr(request, "sequences", ()):
            if store.knows(tokens, TOKEN):
                found[tokens.key, tokens.start] = store.read(tokens, "token")["logprob"]
    return record, found


if __name__ == "__main__":
    main()
