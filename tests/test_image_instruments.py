"""The contract of `test_instruments.py`, asked of every instrument that reads images: one scan, then its findings."""

from __future__ import annotations

import importlib
import math
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
from images import CLASSES, SIDE, save_classifier

from audit.case import Case, Options
from audit.errors import AuditError
from audit.instrument import load, names
from audit.loaders import SetSpec
from audit.record import Outcome, Record
from audit.scan import scan

pytestmark = pytest.mark.usefixtures("one_thread")

OWN = [name for name in names() if load(name).modality != "text"]
ONLY_IMAGES = [name for name in OWN if load(name).modality == "image"]


@cache
def scanned(kind: str) -> tuple[Case, Record]:
    """A scan of a tiny ViT with random weights, beside two others; forgotten is a class, or single images."""
    root = Path(mkdtemp(prefix="palimpsest-images-"))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (96, SIDE, SIDE), dtype=np.uint8)
    labels = np.arange(96) % 4
    if kind == "class":
        where = {"forget": labels == 0, "holdout": labels == 3, "retain": (labels == 1) | (labels == 2)}
    else:
        where = {"forget": np.arange(96) < 32, "holdout": (np.arange(96) >= 32) & (np.arange(96) < 64)}
        where["retain"] = np.arange(96) >= 64
    where["utility"] = where["retain"]
    sets = {}
    for name, chosen in where.items():
        sets[name] = root / f"{name}.npz"
        np.savez(sets[name], X=images[chosen], y=labels[chosen], classes=np.array(CLASSES))
    roles = ("target", "original", "retrained")
    models = {role: save_classifier(root / role, "vit", seed) for seed, role in enumerate(roles)}
    options = Options.parse({"device": "cpu", "budget": "quick"}, "test")
    case = Case.build(models, {name: SetSpec(path) for name, path in sets.items()}, options)
    return case, scan(case, root / "audit", profiles=[])


@pytest.mark.parametrize("name", ONLY_IMAGES)
def test_the_module_says_source_and_traps(name):
    words = importlib.import_module(type(load(name)).__module__).__doc__ or ""
    assert "Source:" in words and "Traps:" in words and words.count("\n- ") >= 2
    assert any(character.isdigit() for character in load(name).reference)
    assert load(name).title and len(load(name).title) < 60


def test_no_instrument_for_texts_is_asked_about_images():
    for kind in ("class", "instance"):
        _, record = scanned(kind)
        asked = {f.instrument for f in record.findings} | {n.instrument for n in record.not_run}
        assert asked <= set(OWN)


@pytest.mark.parametrize("kind", ["class", "instance"])
@pytest.mark.parametrize("name", OWN)
def test_it_runs_or_says_why_not(name, kind):
    case, record = scanned(kind)
    found = [f for f in record.findings if f.instrument == name]
    absent = [n for n in record.not_run if n.instrument == name]
    assert found or absent, "an instrument that did not run is a row, never an absence"
    assert not any(n.failed for n in absent), absent
    assert not (found and load(name).missing(case))
    for finding in found:
        assert finding.id.startswith(f"{name}/") and finding.question == load(name).question
        for text in (finding.statistic, finding.split, finding.orientation, finding.null, finding.reference):
            assert text.strip()
        lo, hi = finding.ci95
        if finding.estimate is not None and lo is not None and hi is not None:
            assert lo <= finding.estimate + 1e-9 and finding.estimate <= hi + 1e-9
        assert finding.n > 0 and finding.threshold > 0
        assert finding.p_value is None or 0 <= finding.p_value <= 1
        assert finding.controls and any(c.gates == "silence" for c in finding.controls)
        assert all(c.description for c in finding.controls)
        assert all(math.isfinite(c.estimate) for c in finding.controls if c.estimate is not None)


@pytest.mark.parametrize("kind", ["class", "instance"])
def test_random_weights_know_nothing(kind):
    _, record = scanned(kind)
    assert not [f.id for f in record.findings if f.verdict == Outcome.EVIDENCE and f.decides[0]]
    assert record.verdict.label not in ("suppressed", "not-unlearned", "deleted")


def test_every_instrument_declines_without_its_sets():
    case, _ = scanned("class")
    empty = Case("empty", case.models, {}, {}, case.options)
    for name in ONLY_IMAGES:
        assert load(name).missing(empty)


def test_a_broken_set_ends_the_scan_with_its_name(tmp_path):
    np.savez(tmp_path / "a.npz", X=np.zeros((2, 4, 4), np.uint8), y=["cat", "dog"])
    model = save_classifier(tmp_path / "model", "resnet")
    case = Case.build({"target": model}, {"forget": SetSpec(tmp_path / "a.npz")}, Options(device="cpu"))
    with pytest.raises(AuditError, match="no class 'cat'"):
        raise_first(scan(case, tmp_path / "out", profiles=[]))


def raise_first(record: Record) -> None:
    """What the first instrument that did not run says."""
    reasons = [n.reason for n in record.not_run if "no class" in n.reason]
    if reasons:
        raise AuditError(reasons[0])
