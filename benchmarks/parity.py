"""Our values beside independent implementations on the same model and rows: the tables of `docs/parity.md`.

    python -m benchmarks.parity --model ../shared/models/stories260k --data ../shared/data/tofu

The model stands for a retrained one. From it an original is made that has learned TOFU's rows, by a few steps of plain
fine-tuning, and a target part of the way back. Ours are numbers captured by the engine as in a scan (float32, packed
batches, shared beginnings) and given to the plain functions of the instruments (`benchmarks.sides`). The others are
`benchmarks.published`: plain transformers, one text at a time, in float64 unless `--dtype float32` is given.

The first table compares definitions, the second says what published code does otherwise than its definition, on the
same rows. Exit code 1 where a definition's largest difference over rows exceeds 1e-4.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers.utils import logging

from audit.case import Case, Options
from audit.loaders import Example, SetSpec
from benchmarks.published import Plain
from benchmarks.sides import AIM, BothSides, before

_FILES = {
    "forget": "forget10_perturbed.jsonl",
    "retain": "retain_perturbed.jsonl",
    "neighbor": "real_authors_perturbed.jsonl",
    "utility": "world_facts_perturbed.jsonl",
}
_KEPT = 0.8  # of the way from the model to the original: where the target lies


def make_models(model: Path, rows: Sequence[Example], folder: Path, steps: int) -> dict[str, Path]:
    """An original that was fine-tuned on the rows, and a target part of the way back to the model."""
    plain = Plain(model, torch.float32)
    texts = [plain.tokens(before(row), row.answer) for row in rows]
    old = {name: weight.clone() for name, weight in plain.model.state_dict().items()}
    optimizer = torch.optim.AdamW(plain.model.parameters(), lr=3e-3)
    order = random.Random(0)
    for _ in range(steps):
        for ids, first in order.sample(texts, min(8, len(texts))):
            labels = torch.tensor([[-100] * first + list(ids[first:])])
            (plain.model(torch.tensor([list(ids)]), labels=labels).loss / 8).backward()
        optimizer.step()
        optimizer.zero_grad()
    new = {name: weight.clone() for name, weight in plain.model.state_dict().items()}
    for role, part in (("original", 1.0), ("target", _KEPT)):
        plain.model.load_state_dict({name: old[name] + part * (new[name] - old[name]) for name in old})
        plain.model.save_pretrained(folder / role)
        plain.tokenizer.save_pretrained(folder / role)
    return {"target": folder / "target", "original": folder / "original", "retrained": model}


def case_of(model: Path, data: Path, rows: int, folder: Path, steps: int) -> Case:
    """TOFU rows and the three models. Holdout rows are TOFU's too, of other authors, and never learned."""
    specs = {name: SetSpec(data / file, limit=rows) for name, file in _FILES.items()}
    specs["holdout"] = SetSpec(data / _FILES["retain"], offset=200, limit=rows)
    options = Options.parse({"template": "qa", "device": "cpu", "budget": "standard"}, "benchmarks.parity")
    sets = Case.build({"target": model}, specs, options).sets
    learned = [row for name in _FILES for row in sets[name]]
    return Case.build(make_models(model, learned, folder, steps), specs, options, "parity")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Make the models, compare, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity")
    parser.add_argument("--model", type=Path, default=Path("../shared/models/stories260k"), help="a Llama-like model")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/tofu"), help="TOFU as JSONL")
    parser.add_argument("--rows", type=int, default=40, help="of each set")
    parser.add_argument("--steps", type=int, default=150, help="of fine-tuning, to make an original")
    parser.add_argument("--dtype", choices=["float64", "float32"], default="float64", help="of the independent side")
    given = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        case = case_of(given.model, given.data, given.rows, work, given.steps)
        sides = BothSides(case, work / "evidence", getattr(torch, given.dtype))
        lines = list(sides.lines())
        columns = ["metric", "ours", "independent", "largest difference", "n", "independent implementation"]
        print(table(columns, [line.cells for line in lines]))
        print()
        columns = ["metric: code", "published code", "ours", "why"]
        print(table(columns, [deviation.cells for deviation in sides.deviations()]))
    worst = max(lines, key=lambda line: line.difference)
    print(f"\nLargest difference: {worst.difference:.1e} ({worst.metric}); aim: {AIM:g}.")
    sys.exit(worst.difference > AIM)


if __name__ == "__main__":
    main()
