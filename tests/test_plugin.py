"""The package in `examples/plugin`, installed as its README says, and what becomes of packages that are broken."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from worlds import REPO, audit_here, build_tiny, environment, one_thread

from audit import instrument
from audit.bench.rows import run
from audit.bench.tables import tables
from audit.bench.text import markdown
from audit.organisms import families
from audit.organisms.families import Teaching
from audit.organisms.recipes import Recipe
from audit.organisms.world import make_world
from audit.record import Record

PLUGIN = REPO / "examples" / "plugin"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pip has installed it: a folder of its own, so that the environment of the tests stays as it is."""
    folder = tmp_path_factory.mktemp("plugin")
    source = shutil.copytree(PLUGIN, folder / "source")
    words = [
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--target",
        folder / "site",
        source,
    ]
    done = subprocess.run([sys.executable, "-m", "pip", *words], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(site)
    yield
    sys.modules.pop("near_miss", None)


def commands() -> list[list[str]]:
    """What the README says to type, word by word."""
    text = re.sub(r"\\\n\s*", " ", (PLUGIN / "README.md").read_text("utf-8"))
    return [shlex.split(line) for line in re.findall(r"^\$ (.+)$", text, re.MULTILINE)]


def scan_words() -> list[str]:
    [words] = [words for words in commands() if words[:2] == ["audit", "scan"]]
    return words[1:]


def desk(tmp_path: Path) -> Path:
    """A folder in which the tiny world lies as the demo's would."""
    (tmp_path / "audit-demo").symlink_to(build_tiny().folder)
    return tmp_path


# --- the walk-through


def test_the_walk_through_is_as_this_file_follows_it():
    said = [" ".join(words[: 4 if "-m" in words else 2]) for words in commands()]
    assert said == [
        "cp -r", "python -m pip install", "audit list", "python -m pytest near-miss", "audit demo", "audit scan",
        "audit bench", "python -m pip uninstall",
    ]  # fmt: skip


def test_its_own_test_passes(site: Path):
    paths = os.pathsep.join([str(site), str(REPO)])
    words = ["-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(PLUGIN), str(PLUGIN)]
    done = subprocess.run([sys.executable, *words], env=environment(PYTHONPATH=paths), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout


def test_it_is_listed(installed, monkeypatch, capsys):
    assert audit_here(monkeypatch, "list", "--json") == 0
    [row] = [row for row in json.loads(capsys.readouterr().out) if row["name"] == "near-miss"]
    assert row["title"] == "Is the right answer on the tip of its tongue?"
    assert (row["kind"], row["question"], row["access"], row["sets"]) == (
        "instrument",
        "leakage",
        "logprobs",
        ["forget"],
    )


def test_a_scan_runs_it_and_the_report_has_its_panel(installed, tmp_path, monkeypatch):
    monkeypatch.chdir(desk(tmp_path))
    assert audit_here(monkeypatch, *scan_words()) == 0
    record = Record.read(tmp_path / "near-miss-audit")
    [finding] = record.findings
    assert (finding.id, record.not_run) == ("near-miss/reciprocal-rank", [])
    # In the original every answer is the first choice; the retained rows of the unlearned one are nearly so.
    [positive] = finding.controls
    assert positive.passed
    assert finding.table is not None
    means = {row[1]: row[2] for row in finding.table.rows if row[0] == "target"}
    assert finding.estimate == pytest.approx(means["forget"] - means["holdout"])
    assert 0.0 < means["holdout"] < 0.6 < 0.9 < means["retain"] <= 1.0
    page = (tmp_path / "near-miss-audit" / "report.html").read_text("utf-8")
    assert "mean reciprocal rank of the answer&#39;s tokens" in page
    assert "right answers are nearer to being said" in page
    assert "near-miss" in page
    assert "An instrument of a third party" in page


def test_the_bench_gives_it_a_row(installed, tmp_path, monkeypatch):
    sizes = {"forget": 6, "retain": 8, "holdout": 6, "public": 4, "unknown": 1}
    monkeypatch.setattr(families, "make_world", lambda seed, **_: make_world(seed, **sizes))
    monkeypatch.setattr(families, "FROM_SCRATCH", Teaching(1, 1.4e-3, 64))
    monkeypatch.setattr("audit.organisms.recipes._fault", lambda history, measured: None)
    with one_thread():
        rows = run([Recipe("llama", "original", 0)], tmp_path, budget="quick", workers=1, only=("near-miss",))
    assert [finding.id for finding in rows[0].findings] == ["near-miss/reciprocal-rank"]
    assert "**near-miss**" in markdown(tables(rows))


# --- packages that are broken

BROKEN = {
    "absent": ("nowhere_to_be_found:Absent", ""),
    "lens": ("thief:Lens", "class Lens(Instrument):\n    name = 'lens'\n    title = question = reference = 'stolen'\n"),
    "quits": ("quits:Quits", "raise SystemExit(0)\n"),
    "titleless": ("titleless:Titleless", "class Titleless(Instrument):\n    name = 'titleless'\n" + "{rest}"),
    "forger": (
        "forger:Forger",
        "class Forger(Instrument):\n    name = title = reference = 'forger'\n    question = Question.LEAKAGE\n{rest}",
    ),
}
REST = "    def requests(self, case, target): return []\n    def measure(self, case, evidence): return ['a finding']\n"


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Five packages, as pip would leave them, each broken in its own way."""
    site = tmp_path / "broken"
    for name, (value, text) in BROKEN.items():
        info = site / f"{name}_package-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-package\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{instrument.GROUP}]\n{name} = {value}\n")
        if text:
            head = "from audit.instrument import Instrument\nfrom audit.record import Question\n"
            (site / f"{value.split(':')[0]}.py").write_text(head + text.replace("{rest}", REST))
    monkeypatch.syspath_prepend(site)
    yield
    for value, _ in BROKEN.values():
        sys.modules.pop(value.split(":")[0], None)


def test_broken_packages_are_reported_and_harm_nothing(installed, broken, tmp_path, monkeypatch, capsys):
    assert audit_here(monkeypatch, "list", "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    said = {name: row["broken"] for name, row in rows.items() if "broken" in row}
    assert set(said) == {"absent", "lens-package:lens", "quits", "titleless"}
    assert "nowhere_to_be_found" in said["absent"]
    assert "takes the name of another" in said["lens-package:lens"]
    assert "has no title" in said["titleless"]
    assert rows["lens"]["title"] != "stolen", "the project's own keeps its name"
    assert not set(said) & set(instrument.everyday()), "the bench leaves them out"

    monkeypatch.chdir(desk(tmp_path))
    own = [name for name in instrument.names() if name not in {"memorization", "near-miss", "forger", *said}]
    words = [word for word in scan_words() if word not in ("--only", "near-miss")]
    assert audit_here(monkeypatch, *words, "--skip", ",".join(own), "--budget", "quick") == 4
    record = Record.read(tmp_path / "near-miss-audit")
    assert {finding.instrument for finding in record.findings} == {"memorization", "near-miss"}
    assert {row.instrument for row in record.not_run if row.failed} == {*said, "forger"}
    page = (tmp_path / "near-miss-audit" / "report.html").read_text("utf-8")
    assert all(name in page for name in (*said, "forger", "near-miss"))
