"""A tiny trained world for scans: three models of 60 thousand weights that know their people, made once a session.

Everything runs on one thread: models this small gain nothing from two, and on a busy machine lose a factor of ten.
The builders are cached functions, because a session fixture imported into two modules would run twice.
"""

from __future__ import annotations

import atexit
import gc
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import cli
from audit.case import Case, Options, read_case
from audit.evidence import Evidence
from audit.gather import capture_all
from audit.inventory import take_inventory
from audit.organisms.demo import Recipe, build_demo
from audit.organisms.train import new_model, save, word_tokenizer
from audit.organisms.world import make_world
from audit.record import Record
from audit.scan import scan
from audit.target import Target

REPO = Path(__file__).parents[1]
SETS = ("forget", "retain", "holdout", "utility")


@dataclass(frozen=True)
class Tiny:
    """Where the tiny world lies."""

    folder: Path
    models: dict[str, Path]
    """Folders by how they were made: original, retrained, unlearned."""
    sets: dict[str, Path]
    case_file: Path


@dataclass(frozen=True)
class Scanned:
    """One undisturbed scan of it, what it captured, and the digests of the model folders before and after."""

    out: Path
    record: Record
    evidence: Evidence
    before: dict[str, str]
    after: dict[str, str]


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread, and garbage collections that look at new objects only: a scan collects a dozen times."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)


@cache
def _scratch() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="palimpsest-tiny-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@cache
def build_tiny() -> Tiny:
    """Twelve people a group; the models learn them by heart, and NPO hides them again in the upper layer."""
    folder = _scratch()
    world = make_world(0, forget=12, retain=12, holdout=12, public=4, unknown=2)
    tokenizer = word_tokenizer(world.words())
    with one_thread():
        base = new_model(tokenizer, seed=0, hidden=64, intermediate=128, layers=2, heads=2)
        save(base, tokenizer, folder / "base")
        recipe = Recipe(epochs=12, lr=3e-3, batch=32, npo_lr=3e-3, npo_max_steps=40)
        demo = build_demo(folder, base=folder / "base", world=world, recipe=recipe)
    case_file = folder / "case.toml"
    models = {"target": "unlearned", "original": "original", "retrained": "retrained"}
    lines = ["[models]", *(f'{role} = "models/{name}"' for role, name in models.items())]
    lines += ["[sets]", *(f'{name} = "data/{name}.jsonl"' for name in SETS)]
    lines += ["[options]", 'budget = "quick"', 'template = "plain"', 'device = "cpu"']
    case_file.write_text("\n".join(['name = "tiny"', *lines]) + "\n")
    return Tiny(folder, dict(demo.models), dict(demo.sets), case_file)


def tiny_case(models: dict[str, str] | None = None, sets: tuple[str, ...] | None = None, **options: Any) -> Case:
    """The case of `case_file`, or less of it: `models` by role, some of the sets, other options."""
    tiny = build_tiny()
    name, known, specs, raw = read_case(tiny.case_file)
    if models is not None:
        known = {role: tiny.models[made] for role, made in models.items()}
    if sets is not None:
        specs = {set_name: specs[set_name] for set_name in sets}
    return Case.build(known, specs, Options.parse(raw | options, "test"), name)


def small_case(**options: Any) -> Case:
    """The least a scan can do in a second: one instrument that only scores and continues, on the target alone."""
    return tiny_case({"target": "original"}, ("forget", "retain", "holdout"), **{"only": "memorization"} | options)


def quiet_scan(case: Case, out: Path, **more: Any) -> Record:
    """A scan on one thread."""
    with one_thread():
        return scan(case, out, **more)


@cache
def scan_tiny() -> Scanned:
    """The tiny case scanned once, undisturbed."""
    tiny = build_tiny()
    out = tiny.folder / "undisturbed"
    before = {name: folder_digest(path) for name, path in tiny.models.items()}
    captured: list[Evidence] = []

    def capture(*words: Any) -> Evidence:
        captured.append(capture_all(*words))
        return captured[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("audit.scan.capture_all", capture)
        record = quiet_scan(tiny_case(), out)
    after = {name: folder_digest(path) for name, path in tiny.models.items()}
    return Scanned(out, record, captured[-1], before, after)


def tiny_evidence() -> Evidence:
    """What that scan captured."""
    return scan_tiny().evidence


def open_target(made: str = "unlearned", role: str = "target") -> Target:
    """One of the three models, opened."""
    return Target(role, take_inventory(build_tiny().models[made]), template="plain")


def folder_digest(folder: Path) -> str:
    """SHA-256 over names and bytes of all files: independent of the inventory's."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def environment(**more: str) -> dict[str, str]:
    """Of a process that scans on one thread, offline, as a user's would: without the test runner's variables."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    kept |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "COLUMNS": "200"}
    return kept | more


def audit(*words: str | Path, cwd: Path = REPO, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "cli", *map(str, words)]
    path = os.pathsep.join(p for p in (str(REPO), more.pop("PYTHONPATH", "")) if p)
    return subprocess.run(
        command, cwd=cwd, env=environment(PYTHONPATH=path, **more), capture_output=True, text=True, timeout=300
    )


def audit_here(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Run the command line in this process, which spares the imports and sees what is patched; its exit code."""
    monkeypatch.setattr("sys.argv", ["audit", *map(str, words)])
    with one_thread(), pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0)
