"""The study of image classifiers: what each unlearning method leaves inside, by every instrument.

    python -m benchmarks.images --out images --worlds digits,../shared/data/images/fashion_5000.npz --seeds 0,1,2

Builds a family of organisms a world and seed (`audit.organisms.imaging`), scans each beside its original and its
retrained model, and prints one table a world: mean over seeds, with the least and the greatest. A row is kept as soon
as it is there (`out/rows`), so that a study that was stopped goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

COLUMNS: dict[str, tuple[str, str]] = {
    "forget accuracy": ("recognition/accuracy", "level"),
    "restored, own": ("restoration/own", "estimate"),
    "restored, original's": ("restoration/original", "estimate"),
    "head re-fit": ("head-refit/one-shot", "estimate"),
    "k-NN": ("image-geometry/knn", "estimate"),
    "CKA to retrained": ("image-geometry/cka", "estimate"),
    "relearned": ("relearn/untaught-half", "estimate"),
    "2^-epsilon": ("image-membership/worst-case", "estimate"),
}
"""Head of a column, and which number of which finding stands in it; estimates are excesses over the never-taught."""

_ONLY = ("recognition", "image-utility", "head-refit", "image-geometry", "restoration", "image-membership", "relearn")


def row_of(recipe: Any, out: Path) -> dict[str, Any]:
    """What is known of one organism and found in it; read, or made now."""
    from audit.case import Case, Options
    from audit.errors import BadInput
    from audit.loaders import SetSpec
    from audit.organisms.imaging.build import build, parts_of
    from audit.organisms.imaging.histories import history_of
    from audit.organisms.recipes import read_history
    from audit.scan import scan

    key = hashlib.sha256(json.dumps([recipe.digest, _ONLY]).encode()).hexdigest()[:16]
    path = out / "rows" / f"{recipe.name}-{key}.json"
    if path.is_file():
        known: dict[str, Any] = json.loads(path.read_bytes())
        return known
    from dataclasses import replace

    try:
        folder = build(recipe, out / "organisms")
    except BadInput as error:  # a method that is not for this kind of model
        story = {"history": recipe.history, "label": history_of(recipe.history).label, "measured": {}}
        return {"name": recipe.name, "seed": recipe.seed, "broken": str(error), **story}
    family = f"{recipe.base}-{Path(recipe.world).stem}-{recipe.seed}"
    sets = parts_of(recipe)[1].write_sets(out / "data" / family, 300)
    models = {"target": folder, "original": build(replace(recipe, history="original"), out / "organisms")}
    models["retrained"] = build(replace(recipe, history="retrained"), out / "organisms")
    story = read_history(folder)
    assert story is not None, "just built"
    row: dict[str, Any] = {"name": recipe.name, "history": recipe.history, "seed": recipe.seed, "label": story["label"]}
    row |= {"broken": story["broken"], "measured": story["measured"]}
    if not story["broken"]:
        options = Options.parse({"device": "cpu", "only": list(_ONLY)}, "benchmarks.images")
        case = Case.build(models, {name: SetSpec(p) for name, p in sets.items()}, options, recipe.name)
        record = scan(case, out / "scans" / recipe.name, evidence_folder=out / "evidence" / family, profiles=[])
        shutil.rmtree(out / "scans" / recipe.name, ignore_errors=True)
        row["verdict"] = record.verdict.label.value
        row["findings"] = {
            f.id: {"estimate": f.estimate, "ci95": list(f.ci95), "level": f.level, "verdict": f.verdict.value}
            for f in record.findings
        }
        row["seconds"] = record.cost.seconds
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row))
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a history: means over seeds, least and greatest in brackets; and the verdicts."""
    lines = ["| history | label | retain accuracy | " + " | ".join(COLUMNS) + " | verdicts |"]
    lines.append("|" + "---|" * (len(COLUMNS) + 4))
    for history in dict.fromkeys(row["history"] for row in rows):
        group = [row for row in rows if row["history"] == history and not row["broken"]]
        broken = [row for row in rows if row["history"] == history and row["broken"]]
        cells = [history, (group or broken)[0]["label"]]
        cells.append(_spread([row["measured"].get("retain_accuracy") for row in group]))
        for finding, field in COLUMNS.values():
            cells.append(_spread([row["findings"].get(finding, {}).get(field) for row in group]))
        verdicts = [row["verdict"] for row in group] + [f"broken ({row['broken']})" for row in broken]
        cells.append(", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts)))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: Sequence[float | None]) -> str:
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "–"
    if len(numbers) == 1:
        return f"{numbers[0]:.2f}"
    return f"{fmean(numbers):.2f} [{min(numbers):.2f}, {max(numbers):.2f}]"


def main() -> None:
    """Build, scan and print what is asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.images")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--worlds", default="digits")
    parser.add_argument("--bases", default="vit")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--histories", default="")
    given = parser.parse_args()
    import torch

    from audit.organisms.imaging.build import ImageRecipe
    from audit.organisms.imaging.histories import histories

    torch.set_num_threads(1)
    wanted = given.histories.split(",") if given.histories else histories()
    for base in given.bases.split(","):
        for world in given.worlds.split(","):
            rows = []
            for seed in map(int, given.seeds.split(",")):
                for history in wanted:
                    rows.append(row_of(ImageRecipe(base, history, seed, world), given.out))
                    print(rows[-1]["name"], rows[-1].get("verdict", rows[-1]["broken"]), file=sys.stderr, flush=True)
            print(f"\n### {base}, {Path(world).stem}\n\n{table(rows)}\n")


if __name__ == "__main__":
    main()
