"""Build an organism, scan it, keep what was found: one row, one file.

A row is kept under the digest of what it depends on: the organism's recipe, the budget and the release. It names the
instruments that ran; one that was installed since runs alone, its findings join the others, and all are judged together
again. Organisms are scanned as an auditor who holds the original would scan them: with forget, retain, holdout and
utility set and the original, without the retrained model, which is seldom at hand. A guarded organism is scanned at
text access, a two-faced one at access to log-probabilities, both without the original.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from audit.bench.pool import in_turn
from audit.errors import AuditError, BadInput
from audit.instrument import everyday
from audit.organisms.recipes import Recipe, build, history_of, read_history
from audit.record import Finding, InstrumentCost, Label, NotRun, Question, write_atomically
from audit.verdict import conclude, judge

if TYPE_CHECKING:
    from audit.target import Target

Told = Callable[[str, int, int], None]
"""Called with what was just done, how many are done, and how many there are."""


class Row(BaseModel):
    """What one organism is, and what a scan found in it."""

    model_config = ConfigDict(extra="forbid")

    key: str
    name: str
    family: str
    seed: int
    history: str
    label: str
    control: bool
    broken: str | None = None
    method: str = ""
    access: str = "weights"
    instruments: list[str] = []
    parameters: int = 0
    entities: int = 0
    findings: list[Finding] = []
    not_run: list[NotRun] = []
    verdict: Label | None = None
    cost: dict[str, InstrumentCost] = {}
    seconds: float = 0.0

    @property
    def afterwards(self) -> bool:
        """Is it an organism that was attacked afterwards, which no pool holds?"""
        return "+" in self.history


@dataclass(frozen=True, slots=True)
class Work:
    """One organism to build and scan."""

    recipe: Recipe
    budget: str
    only: tuple[str, ...] = ()

    @property
    def instruments(self) -> Sequence[str]:
        """The names of those that its row should hold: those asked for, else all that are part of every scan."""
        return self.only or everyday()

    @property
    def key(self) -> str:
        """SHA-256 of what the row depends on: 16 hex digits."""
        text = json.dumps([self.recipe.digest, self.budget, version("palimpsest-audit")])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def run(
    recipes: Sequence[Recipe],
    root: Path,
    *,
    budget: str,
    workers: int = 2,
    only: Sequence[str] = (),
    told: Told | None = None,
) -> list[Row]:
    """Rows of these organisms in their order; those that exist are read, the others built and scanned.

    Every instrument that is part of every scan runs, or `only` these.

    Works in processes of one thread each: small models gain nothing from more, and one thread's sums are the same
    everywhere. One worker is this process itself.
    """
    wanted = set(recipes)
    rows: dict[Recipe, Row] = {}
    waves = in_turn(recipes)
    total, done = sum(len(wave) for wave in waves), 0
    for wave in waves:
        tasks = [(Work(recipe, budget, tuple(only)), root, recipe in wanted) for recipe in wave]
        for recipe, row in _done(tasks, workers):
            done += 1
            if row is not None:
                rows[recipe] = row
            if told is not None:
                told(recipe.name, done, total)
    return [rows[recipe] for recipe in recipes]


def _done(tasks: Sequence[tuple[Work, Path, bool]], workers: int) -> Iterator[tuple[Recipe, Row | None]]:
    """Each task's row as soon as it is there."""
    if workers == 1:
        yield from ((task[0].recipe, _row(*task)) for task in tasks)
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_row, *task): task[0].recipe for task in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()


def usable(rows: Iterable[Row]) -> list[Row]:
    """The rows that a pool may hold: whole, seen through their weights, and not attacked afterwards."""
    return [row for row in rows if not row.broken and not row.afterwards and row.access == "weights"]


def read_rows(path: Path) -> list[Row]:
    """Rows from a file with one JSON object a line (as `write_rows` makes), or a bench's folder."""
    try:
        if path.is_dir():
            return [Row.model_validate_json(file.read_bytes()) for file in sorted((path / "rows").glob("*.json"))]
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as file:
            return [Row.model_validate_json(line) for line in file]
    except (OSError, ValidationError, UnicodeDecodeError, EOFError) as error:
        raise BadInput(f"{path}: no rows of a bench ({str(error).splitlines()[0]})") from None


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """All rows in one gzipped file, one JSON object a line, byte for byte the same for the same rows."""
    text = "".join(row.model_dump_json(exclude_defaults=True) + "\n" for row in rows)
    write_atomically(path, gzip.compress(text.encode(), mtime=0))


def _row(work: Work, root: Path, wanted: bool) -> Row | None:
    """Build one organism, and scan it if it is wanted for itself."""
    import torch

    torch.set_num_threads(1)
    path = root / "rows" / f"{work.recipe.name}.json"
    known = _known(path, work.key) if wanted else None
    missing = [name for name in work.instruments if known is None or name not in known.instruments]
    if known is not None and (known.broken or not missing):
        return known
    folder = build(work.recipe, root / "organisms")
    if not wanted:
        return None
    row = known or _unscanned(work, folder)
    if row.broken is None:
        try:
            row = _scanned(row, work, root, folder, missing)
        except AuditError as error:  # said in the tables, and tried again next time
            return row.model_copy(update={"broken": f"scan failed: {error}"})
    write_atomically(path, row.model_dump_json(exclude_defaults=True).encode())
    return row


def _unscanned(work: Work, folder: Path) -> Row:
    """What the organism's history says."""
    story = read_history(folder)
    assert story is not None, "just built"
    return Row(
        key=work.key,
        name=work.recipe.name,
        family=work.recipe.family,
        seed=work.recipe.seed,
        history=work.recipe.history,
        label=story["label"],
        control=story["control"],
        broken=story["broken"],
        method=story["history"]["method"],
        access=history_of(work.recipe.history).access,
    )


def _known(path: Path, key: str) -> Row | None:
    try:
        row = Row.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
    return row if row.key == key else None


def _scanned(row: Row, work: Work, root: Path, folder: Path, instruments: Sequence[str]) -> Row:
    """The row with what these instruments found in the organism; all findings are judged anew."""
    from audit.case import Case, Options
    from audit.loaders import SetSpec
    from audit.organisms.families import Family
    from audit.scan import scan

    recipe = work.recipe
    sets = Family(recipe.base, recipe.seed, recipe.world).write_sets(root / "data", f"{recipe.family}-{recipe.seed}")
    options = {
        "seed": 0,
        "budget": work.budget,
        "template": "plain",
        "access": row.access,
        "device": "cpu",
        "only": list(instruments),
    }
    models = {"target": folder}
    if row.access == "weights":
        models["original"] = root / "organisms" / replace(recipe, history="original").name
    case = Case.build(models, {n: SetSpec(p) for n, p in sets.items()}, Options.parse(options, "bench"), recipe.name)
    out = root / "scans" / recipe.name
    shutil.rmtree(out, ignore_errors=True)
    began = time.monotonic()
    # The original's evidence serves every scan of the family.
    record = scan(
        case,
        out,
        evidence_folder=root / "evidence" / f"{recipe.family}-{recipe.seed}",
        open_target=_opened(row.access),
        profiles=[],
    )
    shutil.rmtree(out, ignore_errors=True)
    bare = [f.model_copy(update={"figure": None, "table": None}) for f in record.findings]
    findings = judge(sorted([*row.findings, *bare], key=_place))
    not_run = [*row.not_run, *record.not_run]
    return row.model_copy(
        update={
            "instruments": sorted({*row.instruments, *instruments}),
            "findings": findings,
            "not_run": not_run,
            "verdict": conclude(findings, not_run).label,
            "parameters": record.models["target"].parameters,
            "entities": record.case.sets["forget"].entities,
            "cost": {**row.cost, **record.cost.by_instrument},
            "seconds": row.seconds + time.monotonic() - began,
        }
    )


def _place(finding: Finding) -> tuple[int, str]:
    """By question, then instrument: as a scan orders them."""
    return list(Question).index(finding.question), finding.instrument


def _opened(access: str) -> Callable[..., Target] | None:
    """How an organism is opened that its weights alone are not."""
    from audit.organisms.guarded import open_guarded
    from audit.organisms.two_faced import open_two_faced

    return {"text": open_guarded, "logprobs": open_two_faced}.get(access)
