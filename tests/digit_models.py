"""Classifiers of digits, taught for a second or two each, and what an instrument captures of them."""

from __future__ import annotations

import atexit
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from audit.case import Case, Options
from audit.evidence import Evidence
from audit.gather import Run, capture_all
from audit.instrument import Instrument
from audit.loaders import SetSpec
from audit.organisms.imaging.train import fit, new_classifier, save
from audit.organisms.imaging.world import ImageWorld, Split, digits, images, joined, split
from audit.progress import SILENT
from audit.scan import take_inventories


@cache
def scratch() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="palimpsest-digits-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@cache
def parts(kind: str) -> Split:
    """What is to be forgotten: a class of digits ("class"), some digits ("instance"), or some images of pure noise.

    Noise under random labels can be known by heart only: whoever was not taught an image knows nothing of it.
    """
    if kind != "noise":
        world = digits(0)
        return split(ImageWorld(world.name, world.train.take(torch.arange(500)), world.test, world.classes), 0, kind)
    rng = np.random.default_rng(0)
    every = images(rng.integers(0, 256, (260, 8, 8)), rng.integers(0, 4, 260))
    forget, holdout, retain, utility = (every.take(torch.arange(a, a + 60)) for a in (0, 60, 120, 180))
    return Split(("a", "b", "c", "d"), None, None, forget, holdout, retain, utility)


@cache
def taught(kind: str, history: str, seed: int = 0) -> Path:
    """The folder of a small ResNet by what it was taught.

    original: forget and retain images; retrained: retain images; head-only: the original, of which the output of the
    forgotten class was put out of reach; untaught: nothing.
    """
    folder, given = scratch() / f"{kind}-{history}-{seed}", parts(kind)
    model: Any = new_classifier("resnet", 8, given.classes, seed)
    if history != "untaught":
        forgotten = [] if history == "retrained" else [given.forget]
        fit(
            model, joined(given.retain, *forgotten), epochs=25 if kind == "noise" else 10, learning_rate=3e-3, seed=seed
        )
    if history == "head-only":
        assert given.forgotten is not None
        with torch.no_grad():
            model.classifier[-1].bias[given.forgotten] = -100.0
    return save(model, folder)


@cache
def sets(kind: str) -> dict[str, Path]:
    return parts(kind).write_sets(scratch() / f"sets-{kind}")


def digit_case(kind: str, *, without: tuple[str, ...] = (), limit: int = 120, **models: str) -> Case:
    """A case on these models, by history, with the sets but those named."""
    specs = {name: SetSpec(path, limit=limit) for name, path in sets(kind).items() if name not in without}
    folders = {role: taught(kind, history) for role, history in models.items()}
    return Case.build(folders, specs, Options.parse({"device": "cpu", "budget": "quick"}, "test"))


def captured(case: Case, instrument: Instrument, tick: Callable[..., None] | None = None) -> Evidence:
    """All that an instrument asks of a case's models; raises what went wrong."""
    assert instrument.missing(case) is None
    run = Run(case, scratch() / "evidence", SILENT, [instrument], [])
    evidence = capture_all(run, take_inventories(case))
    assert not run.not_run, run.not_run
    return evidence
