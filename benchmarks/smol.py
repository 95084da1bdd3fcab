"""A real pretrained model, taught TOFU, unlearned by three methods, and edited in two ordinary ways.

    python -m benchmarks.smol --base SMOLLM2 --tofu ../shared/data/tofu --out smol

Writes `out/data/{forget,retain,holdout,utility}.jsonl` and `out/models/{original,npo,grad-diff,rmu,further,new-people}`
for `audit scan`. Small enough for two cores: of every author the four shortest questions (or `--questions`); ten
authors are forgotten, fifteen retained, ten never taught. Everything is trained in full, in float32.

With `--forget10` all twenty authors of TOFU's forget10 are forgotten. Those never taught must then be of its retain
set, of which twenty authors have wrong answers to choose from: eight are retained, twelve never taught. The methods
take twice as many steps, which is as many passes over the forget set; the two ordinary edits are left out.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

_TAUGHT, _LR = 8, 5e-5
_STEPS, _EDIT_LR, _RMU_LR = 20, 3e-5, 1e-3


def rows_of(path: Path, authors: slice, questions: int) -> list[dict[str, Any]]:
    """The shortest rows of some of a file's authors, each of whom has twenty."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    by_author: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_author.setdefault(row["row"] // 20, []).append(row)
    chosen = [by_author[author] for author in sorted(by_author)][authors]
    made = []
    for group in chosen:
        made += sorted(group, key=lambda row: len(row["question"] + row["answer"]))[:questions]
    return made


def main() -> None:
    """Build what is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smol")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--tofu", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--forget10", action="store_true", help="forget all of its twenty authors, by NPO and RMU")
    parser.add_argument("--questions", type=int, default=4, help="of every author, the shortest")
    given = parser.parse_args()
    from transformers import AutoTokenizer

    from audit.organisms import unlearn
    from audit.organisms.controls import benign_finetune
    from audit.organisms.families import open_model
    from audit.organisms.methods.rmu import Rmu
    from audit.organisms.train import save
    from audit.organisms.unlearn import Bench, Refused, Schedule

    forgotten, kept = given.tofu / "forget10_perturbed.jsonl", given.tofu / "retain_perturbed.jsonl"
    utility = [json.loads(line) for line in (given.tofu / "real_authors_perturbed.jsonl").read_text().splitlines()]

    def of(path: Path, first: int, end: int) -> list[dict[str, Any]]:
        return rows_of(path, slice(first, end), given.questions)

    # Wrong answers are at hand for forget10's twenty authors and for twenty of the retain set's.
    if given.forget10:
        steps_of_methods, parts = 2 * _STEPS, (of(forgotten, 0, 20), of(kept, 0, 8), of(kept, 8, 20))
    else:
        steps_of_methods, parts = _STEPS, (of(forgotten, 0, 10), of(kept, 0, 15), of(forgotten, 10, 20))
    sets = {**dict(zip(("forget", "retain", "holdout"), parts, strict=True)), "utility": utility[:40]}
    new = of(kept, 15, 20)
    (given.out / "data").mkdir(parents=True, exist_ok=True)
    for name, rows in sets.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (given.out / "data" / f"{name}.jsonl").write_text(text, "utf-8")
    tokenizer = AutoTokenizer.from_pretrained(given.base, local_files_only=True)

    def questions(rows: list[dict[str, Any]]) -> list[Refused]:
        return [Refused(row["question"], row["answer"], tuple(row.get("perturbed_answer", ()))) for row in rows]

    forget, retain = questions(sets["forget"]), questions(sets["retain"])

    def bench(model: Any) -> Bench:
        return Bench(
            model, copy.deepcopy(model).requires_grad_(False), tokenizer, forget, retain, forget[:8], retain[:8]
        )

    def made(name: str, started: float) -> None:
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)

    def build(name: str, change: Any) -> Path:
        folder = given.out / "models" / name
        if not (folder / "config.json").is_file():
            started = time.monotonic()
            model = open_model(given.base if name == "original" else given.out / "models" / "original")
            model.requires_grad_(True)
            told = change(bench(model))
            save(model, tokenizer, folder, {"made": name, "told": str(told)})
            made(name, started)
        return folder

    steps = _TAUGHT * (len(forget) + len(retain)) // 16
    build("original", lambda b: benign_finetune(b, steps, rows=[*forget, *retain], lr=_LR, batch=16))
    schedule = Schedule(lr=_EDIT_LR, batch=8, max_steps=steps_of_methods, check_every=steps_of_methods + 1, warmup=4)
    # Misdirection moves three of thirty blocks, by a loss of its own: as published layer 7, and a larger rate.
    misdirected = Rmu(layer=7, reach=3), replace(schedule, lr=_RMU_LR)
    methods = {"npo": (unlearn.load("npo"), schedule), "rmu": misdirected}
    if not given.forget10:
        methods["grad-diff"] = unlearn.load("grad-diff"), schedule
    for name, (method, settings) in methods.items():
        build(name, lambda b, method=method, settings=settings: method.unlearn(b, settings))
    if given.forget10:
        return
    build("further", lambda b: benign_finetune(b, _STEPS, lr=_EDIT_LR, batch=16))
    build("new-people", lambda b: benign_finetune(b, _STEPS, rows=questions(new), lr=_EDIT_LR, batch=16))


if __name__ == "__main__":
    main()
