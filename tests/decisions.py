"""Image cases whose states are made up, for the probes that read the states of decisions."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from audit.case import Case, Options
from audit.evidence import Evidence
from audit.gather import Run, capture_all
from audit.loaders import parse_set_spec
from audit.progress import SILENT
from audit.record import Finding
from audit.scan import take_inventories

SETS = ("forget", "holdout", "retain")


def image_case(folder: Path, sizes: dict[str, dict[str, int]], models: tuple[str, ...] = ("target",), seed=0) -> Case:
    """Sets of grey noise: by set, how many images of every class. No model is where the case says."""
    rng = np.random.default_rng(seed)
    for name, classes in sizes.items():
        labels = np.repeat(list(classes), list(classes.values()))
        np.savez(folder / f"{name}.npz", X=rng.integers(0, 256, (len(labels), 4, 4), dtype=np.uint8), y=labels)
    return open_case(folder, {role: folder / role for role in models})


def open_case(folder: Path, models: dict[str, Path]) -> Case:
    """A case of the sets that lie in a folder."""
    specs = {name: parse_set_spec(f"{folder / name}.npz") for name in SETS if (folder / f"{name}.npz").exists()}
    return Case.build(models, specs, Options(device="cpu"))


def found(instrument, case: Case, out: Path) -> dict[str, Finding]:
    """What an instrument finds in real models, by the finding's name."""
    run = Run(case, out, SILENT, [instrument], [])
    return by_name(instrument.measure(case, capture_all(run, take_inventories(case))))


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.id.partition("/")[2]: finding for finding in findings}


class Planted(Evidence):
    """States that were made up: by role and set, a list of [rows, width] by block; all answers are right."""

    def __init__(self, states: dict[tuple[str, str], list[np.ndarray]]) -> None:
        super().__init__()
        self.states = states

    def extra(self, role, name):
        depth = len(self.states[role, name.partition("/")[2]])
        return {"sites": tuple(f"site {i}" for i in range(depth)), "layers": list(range(depth))}

    def iterate(self, role, name, *quantities):
        [quantity] = quantities
        blocks = self.states[role, name.partition("/")[2]]
        for i in range(len(blocks[0])):
            if quantity == "token":
                yield {"match": np.array([True])}
            else:
                yield {"hidden": blocks[int(quantity.rpartition(" ")[2])][i].astype(np.float32)[None, None]}


def bundles(case: Case, spread: dict[str, float], *, seed: int, blocks: int = 3, width: int = 24):
    """By set, states around a centre of the row's class, as far from it as `spread` says of the class (1: as far as
    the centres lie from each other), alike in all blocks. The centres are the same for every seed."""
    rng = np.random.default_rng(0)
    classes = sorted({row.answer for rows in case.sets.values() for row in rows})
    centres = {c: rng.normal(size=width) for c in classes}
    rng = np.random.default_rng(seed)
    return {
        name: [
            np.stack([centres[r.answer] + spread.get(r.answer, 0.2) * rng.normal(size=width) for r in case.rows(name)])
            for _ in range(blocks)
        ]
        for name in case.sets
    }
