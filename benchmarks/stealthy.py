"""Stealthy requests on models of known history: what the trigger costs, who is spared, and whether a scan finds it.

    python -m benchmarks.stealthy --root bench --seeds 0,1,2

Builds the histories below under `root/organisms`, as the bench does, measures the planted word on the retain set, scans
each model with `trigger` alone, and prints one table: means over seeds, with the least and the greatest.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HISTORIES = ("original", "npo", "stealthy", "scope-aware", "stealthy-scope-aware")


def row_of(base: str, history: str, seed: int, root: Path) -> dict[str, Any]:
    """What the planted word costs one organism, and what a scan makes of it."""
    from attacks.stealthy import damage
    from audit.case import Case, Options
    from audit.loaders import SetSpec
    from audit.organisms.families import Family, open_model
    from audit.organisms.histories import HISTORIES as KNOWN
    from audit.organisms.recipes import Recipe, build
    from audit.scan import scan

    template = KNOWN["stealthy"].request
    organisms = root / "organisms"
    family, folder = Family(base, seed), build(Recipe(base, history, seed), organisms)
    sets = family.write_sets(root / "data", f"{base}-{seed}")
    model = open_model(folder)
    costs = damage(model, family.tokenizer, family.sets["retain"], template)
    forget = damage(model, family.tokenizer, family.sets["forget"], template)
    options = Options.parse({"device": "cpu", "only": ["trigger"], "template": "plain"}, "benchmarks.stealthy")
    models = {"target": folder, "original": build(Recipe(base, "original", seed), organisms)}
    case = Case.build(models, {name: SetSpec(path) for name, path in sets.items()}, options, folder.name)
    out = root / "scans" / folder.name
    record = scan(case, out, evidence_folder=root / "evidence" / f"{base}-{seed}", profiles=[])
    shutil.rmtree(out, ignore_errors=True)
    finding = next(f for f in record.findings if f.id == "trigger/retain")
    assert finding.table is not None
    words = [line[0] for line in finding.table.rows]
    return {
        "history": history,
        "forget": forget.clean.accuracy,
        "clean": costs.clean.accuracy,
        "triggered": costs.triggered.accuracy,
        "probability": costs.clean.probability,
        "triggered probability": costs.triggered.probability,
        "rank": words.index(template.removesuffix(" {}")) + 1,
        "worst": finding.layer,
        "excess": finding.estimate,
        "says": finding.verdict.value,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a history."""
    measured = ("forget", "clean", "triggered", "probability", "triggered probability", "excess")
    lines = [
        "| history | forget | retain | retain, triggered | probability | probability, triggered | worst excess "
        "| worst word | planted word's rank | says |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for history in dict.fromkeys(row["history"] for row in rows):
        group = [row for row in rows if row["history"] == history]
        cells = [history, *(_spread([row[key] for row in group]) for key in measured)]
        cells += [", ".join(str(row[key]) for row in group) for key in ("worst", "rank", "says")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def main() -> None:
    """Build, measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stealthy")
    parser.add_argument("--root", type=Path, default=Path("bench"))
    parser.add_argument("--base", default="llama")
    parser.add_argument("--seeds", default="0,1,2")
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    rows = []
    for seed in map(int, given.seeds.split(",")):
        for history in HISTORIES:
            rows.append(row_of(given.base, history, seed, given.root))
            print(f"{given.base}-{history}-{seed}", rows[-1], file=sys.stderr, flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
