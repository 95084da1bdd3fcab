"""The examples, in their quick form: they run, say what is so, and draw."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from worlds import REPO, build_tiny, one_thread

from audit.organisms import methods
from audit.organisms.unlearn import names

EXAMPLES = REPO / "examples"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where they work; the tiny world, which is as small as the one they would build, is there already."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "world").symlink_to(build_tiny().folder)
    return folder


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A script may do to its process what a test process must not keep."""
    import matplotlib

    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(methods, "__path__", list(methods.__path__))
    with one_thread(), matplotlib.rc_context():
        yield
    for module in ("setting", "audit.organisms.methods.shrug"):
        sys.modules.pop(module, None)


def run(name: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a script has made by its end; its picture was drawn, and shows something."""
    script = EXAMPLES / f"{name}.py"
    monkeypatch.setattr("sys.argv", [str(script), "--quick", "--out", str(out)])
    made = runpy.run_path(str(script), run_name="__main__")
    with Image.open(out / f"{name.replace('_', '-')}.png") as picture:
        assert picture.width >= 800
        assert np.asarray(picture.convert("L")).std() > 10
    return made


def test_every_script_is_tested_here_and_says_what_one_will_see():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} - {"setting"}
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert scripts <= tests
    for name in scripts:
        text = (EXAMPLES / f"{name}.py").read_text("utf-8")
        assert re.match(r'""".+\n\nYou will see: ', text), name
        assert f"python examples/{name}.py [--quick]" in text
        assert text.count("\n# %% ") >= 4, "cells, for a notebook"


def test_one_detector(out, monkeypatch):
    areas = run("one_detector", out, monkeypatch)["areas"]
    assert areas["original"].lo > 0.5, "told from what was never seen"
    assert areas["unlearned"].value < areas["original"].value - 0.2
    assert areas["retrained"].lo < 0.5 < areas["retrained"].hi


def test_sparse_steering(out, monkeypatch):
    made = run("sparse_steering", out, monkeypatch)
    assert (out / "sae-hidden" / "cfg.json").is_file()
    assert type(made["sae"]).__name__ == "TopKSAE"
    for found in made["found"].values():
        middle = made["ALPHAS"].index(0)
        for name in made["SETS"]:
            # Nothing is put in at α = 0, whatever is pushed.
            assert found[name, "experts"][middle].value == found[name, "random"][middle].value
        assert found["retain", "experts"][middle].value > found["holdout", "experts"][middle].value + 0.3


def test_write_a_detector(out, monkeypatch):
    found = run("write_a_detector", out, monkeypatch)["found"]
    [original], [retrained] = found["original"], found["retrained"]
    assert (original.id, original.verdict) == ("sure/lead", "evidence")
    assert original.controls[0].passed
    assert retrained.verdict != "evidence"


def test_write_a_method(out, monkeypatch):
    before = names()
    made = run("write_a_method", out, monkeypatch)
    assert set(names()) - set(before) == {"shrug"}
    assert made["done"].stopped, "quiet about the forget set, right about the rest"
    choice = {
        name: finding.estimate
        for name, record in made["found"].items()
        for finding in record.findings
        if finding.id == "knowledge/choice"
    }
    assert choice["original"] > 0.7
    assert abs(choice["shrug"]) < 0.2, "by what it says, it was never told"


def test_audit_an_endpoint(out, monkeypatch):
    audits = run("audit_an_endpoint", out, monkeypatch)["audits"]
    by_text, by_logprobs = ({f.id for f in audits["original", access].findings} for access in ("text", "logprobs"))
    assert by_text < by_logprobs
    assert audits["original", "logprobs"].verdict.label == "not-unlearned"
    assert all(record.verdict.label != "deleted" for record in audits.values()), "an endpoint cannot show that"
