"""`python -m benchmarks [NAMES]`: run, and print ratios as a table or as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from benchmarks.capture import bridge, capture
from benchmarks.faults import faults, numerics
from benchmarks.growth import growth
from benchmarks.memory import memory
from benchmarks.offload import SHAPES, offload
from benchmarks.remind import remind
from benchmarks.scan import scan
from benchmarks.streaming import streaming
from benchmarks.timing import Line, Settings

BENCHMARKS: dict[str, Callable[[Settings], Iterator[Line]]] = {
    "scan": scan,
    "capture": capture,
    "bridge": bridge,
    "remind": remind,
    "streaming": streaming,
    "memory": memory,
    "faults": faults,
    "numerics": numerics,
    "growth": growth,
    "offload": offload,
}


def main() -> None:
    """Parse, run what is named, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Ratios, measured in one run.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; all if none is named")
    parser.add_argument("--work", type=Path, default=Path("benchmark-work"), help="where models are built and kept")
    parser.add_argument("--repeats", type=int, default=3, help="times each side runs")
    parser.add_argument("--small", action="store_true", help="little of everything, to see that it works")
    parser.add_argument("--size", choices=SHAPES, default=Settings.size, help="of the model that memory does not hold")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON")
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in BENCHMARKS]:
        parser.error(f"no benchmark named {unknown[0]!r}: there are {', '.join(BENCHMARKS)}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings = Settings(given.work.resolve(), max(1, given.repeats), given.small, given.size)
    settings.work.mkdir(parents=True, exist_ok=True)
    machine = _machine()
    lines: list[Line] = []
    for name in given.names or BENCHMARKS:
        for line in BENCHMARKS[name](settings):
            lines.append(line)
            print(f"{line.ratio:8.2f}  {line.measured}", file=sys.stderr, flush=True)
    machine["load average after"] = f"{os.getloadavg()[0]:.1f}"
    if given.as_json:
        print(json.dumps({"machine": machine, "lines": [asdict(line) for line in lines]}, indent=2))
    else:
        _show(lines, machine)


def _machine() -> dict[str, str]:
    import torch

    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "transformer-lens": version("transformer-lens"),
        "load average before": f"{os.getloadavg()[0]:.1f}",
    }


def _show(lines: list[Line], machine: dict[str, str]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table("benchmark", "measured", "ratio", "turns", "aim", "detail", title="Palimpsest, ratios")
    for column in table.columns[2:5]:
        column.justify, column.no_wrap = "right", True
    previous = ""
    for line in lines:
        if previous and line.benchmark != previous:
            table.add_section()
        shown = "" if line.benchmark == previous else line.benchmark
        previous = line.benchmark
        turns = "" if line.low == line.high else f"{line.low:.2f} to {line.high:.2f}"
        aim = line.aim if line.met is None else f"{line.aim} {'✓' if line.met else '✗'}"
        table.add_row(shown, line.measured, f"{line.ratio:.2f}", turns, aim, line.detail)
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in machine.items()), highlight=False)


if __name__ == "__main__":
    main()
