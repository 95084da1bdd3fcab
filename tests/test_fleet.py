"""Fleets: what the file says, jobs on a real Ray cluster of this machine, what resumes and what is done again."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import matplotlib
import pytest
from conftest import save_tiny, words_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_record import HOSTILE, hostile, sample
from scipy.stats import median_abs_deviation
from worlds import REPO, audit_here, environment, quiet_scan

from audit.case import Case, Options, read_case
from audit.errors import AuditError, BadInput
from audit.evidence import Store, claimed, context_of
from audit.fleet.file import Fleet as Asked
from audit.fleet.file import Job, read_fleet
from audit.fleet.run import _digest, _evidence, run
from audit.fleet.shelf import Failure, Shelf
from audit.instrument import Access
from audit.record import Label, Outcome, Question, Record, Side
from reports.fleet import Fleet, Measure, Row, outliers, render_csv, render_fleet

MODELS = ("a", "b", "c")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four random models and three sets: nothing was taught, which a fleet does not mind."""
    folder = tmp_path_factory.mktemp("fleet")
    tokenizer = words_tokenizer(bos=True)
    for place, name in enumerate((*MODELS, "original")):
        save_tiny(folder / "models" / name, "llama", tokenizer, initializer_range=0.2 + 0.01 * place)
    for start, name in enumerate(("forget", "retain", "holdout")):
        numbers = range(36 * start, 36 * start + 36, 3)
        rows = [
            {"prompt": f"w{n} w{n + 1}", "answer": f"w{n + 2}", "wrong": [f"w{(n + 7) % 108}"], "entity": f"e{n}"}
            for n in numbers
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_fleet(world: Path, text: str = "", name: str = "fleet.toml") -> Path:
    """The three models on one case, or another file beside them."""
    path = world / name
    path.write_text(
        text
        or """
        name = "three"
        [sets]
        forget = "forget.jsonl"
        retain = "retain.jsonl"
        holdout = "holdout.jsonl"
        [options]
        only = "knowledge"
        budget = "quick"
        template = "plain"
        device = "cpu"
        [[models]]
        target = "models/[abc]"
        original = "models/original"
        """
    )
    return path


# --- the file -------------------------------------------------------------------------------------------------


def test_patterns_cases_and_what_a_case_adds(world):
    jobs = read_fleet(
        write_fleet(
            world,
            """
            [sets]
            retain = "retain.jsonl"
            [options]
            seed = 3
            budget = "quick"
            [[cases]]
            name = "first"
            sets = { forget = "forget.jsonl?limit=4" }
            [[cases]]
            name = "second"
            sets = { forget = { path = "forget.jsonl" }, retain = "holdout.jsonl" }
            options = { seed = 4, access = "logprobs" }
            [[models]]
            target = ["models/c", "models/[ab]"]
            original = "models/original"
            [[models]]
            name = "once more"
            target = "models/a"
            cases = ["second"]
            """,
            "several.toml",
        )
    ).jobs
    assert [job.name for job in jobs] == [
        *("first/c", "first/a", "first/b"),
        *("second/c", "second/a", "second/b", "second/once more"),
    ]
    first, last = jobs[0], jobs[-1]
    assert first.models == {"target": world / "models/c", "original": world / "models/original"}
    assert list(last.models) == ["target"]
    assert (first.plan.specs["forget"].limit, first.plan.specs["retain"].path.name) == (4, "retain.jsonl")
    assert last.plan.specs["retain"].path.name == "holdout.jsonl", "a case's own set goes before the fleet's"
    assert (first.plan.options.seed, last.plan.options.seed) == (3, 4)
    assert last.plan.options.budget == "quick"
    assert last.plan.options.access is Access.LOGPROBS


def test_the_documented_file_is_read(tmp_path):
    (text,) = re.findall(r"^```toml\n(.*?)^```$", (REPO / "docs/fleet.md").read_text(), re.MULTILINE | re.DOTALL)
    for name in ("npo-a", "npo-b", "rmu-7b", "original", "rmu/checkpoint-2000"):
        (tmp_path / "models" / name).mkdir(parents=True)
    (tmp_path / "fleet.toml").write_text(text)
    names = [job.name for job in read_fleet(tmp_path / "fleet.toml").jobs]
    every = ["npo-a", "npo-b", "rmu-7b"]
    assert names == [
        *(f"authors/{name}" for name in (*every, "rmu, twice as long")),
        *(f"events/{name}" for name in every),
    ]


MODEL = '[[models]]\ntarget = "models/a"\n'
WRONG = {
    "not TOML": ("[[models", "not TOML"),
    "no model": ("", "[[models]]: Field required"),
    "unknown key": (MODEL + 'orginal = "x"', "[[models]] 1 orginal: Extra inputs"),
    "no text": ("[[models]]\ntarget = 3", "[[models]] 1 target"),
    "not there": ('[[models]]\ntarget = "models/z"', "[[models]] 1 target: "),
    "fits none": (MODEL + '[[models]]\ntarget = "models/z*"', "[[models]] 2 target: no folder fits 'models/z*'"),
    "reference not there": (MODEL + 'original = "models/z"', "[[models]] 1 original: "),
    "one name": (MODEL + MODEL, "[[models]] 2: two models named 'a'"),
    "one name for several": (
        '[[models]]\ntarget = "models/*"\nname = "x"',
        "[[models]] 1 name: 'x' would be that of 4",
    ),
    "unknown case": (MODEL + 'cases = ["no"]', "[[models]] 1 cases: no case 'no'"),
    "on no case": (MODEL + "cases = []", "nothing to audit"),
    "one case twice": (MODEL + '[[cases]]\nname = "x"\n[[cases]]\nname = "x"', "[[cases]] 'x': a second case"),
    "unknown set": (MODEL + '[sets]\nforgot = "x"', "unknown set 'forgot'"),
    "set of a case": (MODEL + '[[cases]]\nname = "x"\nsets = { forget = 3 }', "[[cases]] 'x': [sets] forget must be"),
    "option": (MODEL + '[options]\nbudget = "huge"', "[options]: budget 'huge'"),
    "option of a case": (
        MODEL + '[[cases]]\nname = "x"\noptions = { sed = 1 }',
        "[[cases]] 'x' options: unknown option",
    ),
    "instrument": (MODEL + '[options]\nonly = "knowlege"', "knowlege"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_named_with_its_place(world, kind):
    text, place = WRONG[kind]
    path = write_fleet(world, text or "name = 'x'", "wrong.toml")
    with pytest.raises(BadInput) as raised:
        read_fleet(path)
    assert place in str(raised.value)
    assert kind == "instrument" or str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


@settings(max_examples=50)
@given(st.text(min_size=1), st.text(min_size=1))
def test_folders_are_harmless_and_of_one_job_each(one, other):
    def folder(model: str) -> str:
        return Job(model, {}, _Plan()).folder  # type: ignore[arg-type]

    last = folder(one).removeprefix("case/")
    assert last.isascii()
    assert not set(last) - set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._+-")
    assert not last.startswith(".")
    assert len(last) <= 100
    assert (folder(one) == folder(other)) == (one == other)


class _Plan:
    name = "case"


# --- on Ray ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two workers of this machine, which stay warm from run to run; their home."""
    ray = pytest.importorskip("ray", reason="ray is not installed")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # or workers would import this file, and pytest
    home = tmp_path_factory.mktemp("home")
    more = {"PYTHONPATH": str(REPO), "RAY_USAGE_STATS_ENABLED": "0", "HOME": str(home)}
    more |= {"MPLCONFIGDIR": matplotlib.get_configdir()}  # a new one would have all fonts looked at
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(**more).items():
            patch.setenv(name, value)
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield home
        ray.shutdown()


@pytest.fixture(scope="module")
def done(world: Path, cluster: Path) -> Shelf:
    """The fleet run once, its results in memory."""
    shelf = Shelf("memory://first")
    fleet = read_fleet(write_fleet(world))
    assert told(fleet, shelf, world) == {f"three/{name}": "inconclusive" for name in MODELS}
    return shelf


def told(fleet: Asked, shelf: Shelf, world: Path, **more: object) -> dict[str, str]:
    """Run, and what was said of each job."""
    heard: dict[str, str] = {}
    options = {"work": str(world / "work")} | more
    run(fleet, shelf, told=lambda job, said: heard.update({job.name: said}), **options)  # type: ignore[arg-type]
    return heard


def record_of(shelf: Shelf, folder: str) -> Record:
    found = shelf.get(folder)
    assert isinstance(found, Record)
    return found


@pytest.fixture(scope="module")
def alone(world: Path, done: Shelf, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    """Each job as a scan by itself, from the case file that the fleet kept."""
    records = {}
    for name in MODELS:
        folder = tmp_path_factory.mktemp(name)
        kept = done.read(f"three/{name}/case.toml")
        assert kept is not None
        (folder / "case.toml").write_bytes(kept)
        title, models, specs, raw = read_case(folder / "case.toml")
        records[name] = quiet_scan(Case.build(models, specs, Options.parse(raw, "test"), title), folder / "out")
    return records


def test_records_equal_those_of_single_scans(done, alone):
    for name in MODELS:
        assert record_of(done, f"three/{name}").comparable() == alone[name].comparable()
    assert len({record.models["target"].digest for record in alone.values()}) == 3, "three models, not one"


def test_the_shared_original_ran_once(world, done, alone):
    jobs = [record_of(done, f"three/{name}").cost for name in MODELS]
    lone = [alone[name].cost for name in MODELS]
    saved = sorted(one.forward_tokens - job.forward_tokens for one, job in zip(lone, jobs, strict=True))
    assert saved[0] == 0, "one of them ran it"
    assert saved[1] == saved[2] > 0, "and the others nothing of it"
    assert sum(job.reused_tokens == 0 for job in jobs) == 1
    assert all(cost.reused_tokens == 0 for cost in lone)


def test_who_needs_an_original_that_another_is_running_waits_for_it(world, done, alone, tmp_path):
    """This process stands for the other: it holds the original until the job waits for it, and puts it in place."""
    fleet = read_fleet(write_fleet(world, write_fleet(world).read_text().replace("[abc]", "a"), "waits.toml"))
    models = record_of(done, "three/a").models
    before, here = (_evidence(fleet.jobs[0].case(), str(work)) for work in (world / "work", tmp_path))
    stores = {role: context_of(model.digest, dtype="torch.float32", device="cpu") for role, model in models.items()}
    target = Store(here, stores["target"]).folder
    with ThreadPoolExecutor(1) as thread:
        with claimed(here, models["original"].digest):
            heard = thread.submit(told, fleet, Shelf("memory://waits"), world, work=str(tmp_path))
            while not list(target.glob("*.json")):  # its numeric noise: all else of the target is there
                assert not heard.done()
                time.sleep(0.05)
            time.sleep(1)
            original = Store(before, stores["original"]).folder
            shutil.copytree(original, here / original.name)
        assert heard.result() == {"three/a": "inconclusive"}
    waited = record_of(Shelf("memory://waits"), "three/a")
    assert waited.comparable() == record_of(done, "three/a").comparable()
    assert waited.cost.reused_tokens > 0
    assert waited.cost.forward_tokens < alone["a"].cost.forward_tokens


def test_what_is_there_is_not_run_again(world, done):
    fleet = read_fleet(write_fleet(world))
    shelf = Shelf("memory://resumed")
    for name in MODELS:
        shelf.write(f"three/{name}/record.json", done.read(f"three/{name}/record.json"))
    record = record_of(done, "three/b")
    record.tool.version = "0.0.1"
    shelf.write("three/b/record.json", record.to_json().encode())
    kept = "kept, its record is there"
    assert told(fleet, shelf, world) == {"three/a": kept, "three/b": "inconclusive", "three/c": kept}
    assert record_of(shelf, "three/b").comparable() == record_of(done, "three/b").comparable()
    for name in "ac":
        assert shelf.read(f"three/{name}/record.json") == done.read(f"three/{name}/record.json"), "untouched"


def test_a_model_that_changed_in_its_folder_is_audited_again(world, done, tmp_path):
    shutil.copytree(world / "models/a", tmp_path / "a")
    text = write_fleet(world).read_text().replace('"models/[abc]"', f'"{tmp_path}/a"')
    fleet, shelf = read_fleet(write_fleet(world, text, "moved.toml")), Shelf(str(tmp_path / "out"))
    before = done.read("three/a/record.json")
    shelf.write("three/a/record.json", before)
    assert told(fleet, shelf, world) == {"three/a": "kept, its record is there"}, "the same bytes elsewhere"
    shutil.copy(world / "models/b/model.safetensors", tmp_path / "a")
    assert told(fleet, shelf, world) == {"three/a": "inconclusive"}
    assert (tmp_path / "out/three/a/case.toml").is_file()
    here, there = record_of(shelf, "three/a"), record_of(done, "three/b")
    assert weights_of(here) == weights_of(there) != weights_of(record_of(done, "three/a"))


def weights_of(record: Record) -> list[str]:
    return [file.sha256 for file in record.models["target"].files if file.path == "model.safetensors"]


def test_a_refused_model_is_a_result_and_stops_no_other(world, cluster, tmp_path, monkeypatch, capsys):
    broken = tmp_path / "<b>no"
    broken.mkdir()
    (broken / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    text = write_fleet(world).read_text().replace('"models/[abc]"', f'["models/a", "{tmp_path}/<*"]')
    path, out = write_fleet(world, text, "refused.toml"), tmp_path / "out"
    assert audit_here(monkeypatch, "fleet", path, "--out", out) == 3
    said = capsys.readouterr()
    assert "/2 three/<b>no: failed: " in said.err
    assert "/2 three/a: inconclusive" in said.err
    assert "2 jobs: 1 inconclusive, 1 without a record" in said.out
    assert (out / "three/a/report.html").read_text().startswith("<!doctype html>")
    failure = Shelf(str(out)).get(read_fleet(path).jobs[1].folder)
    assert isinstance(failure, Failure)
    assert failure.exit_code == 3
    assert "pytorch_model.bin" in failure.reason
    page = (out / "fleet.html").read_text()
    assert "&lt;b&gt;no" in page
    assert "<b>no" not in page
    (evidence,) = (cluster / ".cache/palimpsest").iterdir()
    assert list(evidence.rglob("*.safetensors")), "the model may be mended, and the command given again"


def test_evidence_is_removed_once_every_job_has_its_record(world, done, cluster):
    fleet, shelf = read_fleet(write_fleet(world)), Shelf("memory://removed")
    for name in MODELS:
        shelf.write(f"three/{name}/record.json", done.read(f"three/{name}/record.json"))
    own = cluster / ".cache/palimpsest" / f"fleet-{_digest([fleet.name, shelf.address])}"
    own.mkdir(parents=True)
    told(fleet, shelf, world, work=None)
    assert not own.exists()
    assert (world / "work").is_dir(), "what was asked for by name stays"


def dies_once(record: Record, flag: Path) -> str:
    """Made of a record only if a worker was killed before."""
    if not flag.exists():
        flag.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)
    return f"{flag.read_text()} {os.getpid()}"


def dies(record: Record) -> str:
    """Never made: the worker is killed each time."""
    os.kill(os.getpid(), signal.SIGKILL)
    return ""


def test_the_job_of_a_killed_worker_is_done_by_another(world, done, tmp_path):
    fleet, shelf = read_fleet(write_fleet(world)), Shelf("memory://killed")
    faces = {"pids.txt": partial(dies_once, flag=tmp_path / "flag")}
    assert told(fleet, shelf, world, faces=faces) == {f"three/{name}": "inconclusive" for name in MODELS}
    pids = [(shelf.read(f"three/{name}/pids.txt") or b"").decode().split() for name in MODELS]
    killed = (tmp_path / "flag").read_text()
    assert {first for first, _ in pids} == {killed}
    assert killed not in {last for _, last in pids}
    for name in MODELS:
        assert record_of(shelf, f"three/{name}").comparable() == record_of(done, f"three/{name}").comparable()


def test_a_job_that_kills_every_worker_is_a_failure(world, cluster, monkeypatch):
    monkeypatch.setattr("audit.fleet.run._ATTEMPTS", 1)
    text = write_fleet(world).read_text().replace("[abc]", "a")
    fleet, shelf = read_fleet(write_fleet(world, text, "deadly.toml")), Shelf("memory://deadly")
    assert told(fleet, shelf, world, faces={"x": dies})["three/a"].startswith("failed: its worker died")
    failure = shelf.get("three/a")
    assert isinstance(failure, Failure)
    assert failure.exit_code == 4


def test_without_ray_it_says_what_to_install(world, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert audit_here(monkeypatch, "fleet", write_fleet(world), "--out", "memory://none") == 2
    assert "pip install 'palimpsest-audit[fleet]'" in capsys.readouterr().err


# --- the shelf ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_a_result_replaces_an_earlier_one(kind, tmp_path):
    shelf = Shelf("memory://shelf" if kind == "memory" else str(tmp_path / "shelf"))
    record = sample()
    assert shelf.get("x") is None
    shelf.put("x", Failure("broken", 3))
    assert shelf.get("x") == Failure("broken", 3)
    shelf.put("x", {"record.json": record.to_json().encode(), "report.html": b"page"})
    assert shelf.get("x") == record
    assert shelf.read("x/failure.json") is None
    shelf.put("x", Failure("broken", 4))
    assert shelf.get("x") == Failure("broken", 4)


def test_the_record_is_written_last(tmp_path, monkeypatch):
    shelf = Shelf(str(tmp_path))
    shelf.put("x", {"record.json": sample().to_json().encode()})
    (tmp_path / "x/zebra").mkdir()  # so that the file of this name cannot be written
    with pytest.raises(AuditError, match="zebra: cannot be written"):
        shelf.put("x", {"record.json": b"{}", "zebra": b""})
    assert shelf.get("x") is None, "neither the old record beside new files, nor the new one"


@pytest.mark.parametrize(("address", "why"), [("zzz://x", "Protocol not known"), ("s3://x/y", "Install s3fs")])
def test_an_address_that_cannot_be_used(address, why):
    if address.startswith("s3") and find_spec("s3fs"):
        pytest.skip("s3fs is installed")
    with pytest.raises(BadInput, match=why):
        Shelf(address)


# --- the page -------------------------------------------------------------------------------------------------


def measure(estimate: float | None, name: str = "lens/choice", threshold: float = 0.1, unit: str = "AUC") -> Measure:
    return Measure(
        id=name,
        question=Question.REPRESENTATION,
        statistic="read-out",
        split="forget",
        unit=unit,
        estimate=estimate,
        ci95=(None, None),
        threshold=threshold,
        verdict=Outcome.NONE,
        side=Side.NEITHER,
    )


def row(model: str, *measures: Measure, case: str = "case") -> Row:
    place = {"case": case, "model": model, "folder": f"{case}/{model}"}
    answers = dict.fromkeys(Question, "none")
    return Row(**place, state="audited", exit_code=0, label=Label.DELETED, answers=answers, measures=list(measures))


def test_an_outlier_by_hand():
    # Median 0.5, distances 0.02, 0.01, 0, 0.01, 0.4: MAD 0.01, so the last is 0.6745 * 0.4 / 0.01 = 26.98 away.
    rows = [row(name, measure(x)) for name, x in zip("abcde", (0.48, 0.49, 0.5, 0.51, 0.9), strict=True)]
    (found,) = outliers(rows)
    assert (found.model, found.median, found.models) == ("e", 0.5, 5)
    assert found.z == pytest.approx(26.98)


def test_no_outliers_where_there_are_few_or_the_distance_is_a_trifle_or_another_quantity():
    values = (0.48, 0.49, 0.5, 0.51, 0.9)
    assert not outliers([row(name, measure(x)) for name, x in zip("abcd", values[1:], strict=True)]), "only four"
    assert not outliers([row(name, measure(x, threshold=0.5)) for name, x in zip("abcde", values, strict=True)])
    other = [row(n, measure(x, unit="nats" if n == "e" else "AUC")) for n, x in zip("abcde", values, strict=True)]
    assert not outliers(other)
    apart = [row(n, measure(x), case="x" if n == "e" else "y") for n, x in zip("abcde", values, strict=True)]
    assert not outliers(apart)


def test_an_outlier_among_equals():
    # Six equal and one 0.6 away: MAD 0, mean distance 0.6 / 7, so 7 / 1.253314 = 5.585 away.
    rows = [row(str(i), measure(0.2)) for i in range(6)] + [row("far", measure(0.8)), row("none", measure(None))]
    (found,) = outliers(rows)
    assert (found.model, found.models) == ("far", 7)
    assert found.z == pytest.approx(7 / 1.253314)


@settings(max_examples=50)
@given(st.lists(st.floats(-1e3, 1e3), min_size=5, max_size=30))
def test_outliers_are_those_of_the_median_and_its_deviation(values):
    deviation = median_abs_deviation(values, scale=0.6745)
    far = {i for i, x in enumerate(values) if abs(x - median(values)) > max(3.5 * deviation, 0.1)}
    found = {int(one.model) for one in outliers([row(str(i), measure(x)) for i, x in enumerate(values)])}
    edge = {i for i, x in enumerate(values) if abs(x - median(values)) == pytest.approx(max(3.5 * deviation, 0.1))}
    assert found - edge == far - edge or deviation == 0


def page_of(*rows: Row) -> str:
    return render_fleet(Fleet.of("a fleet", list(rows)))


def test_the_page_leads_to_every_report_and_says_what_has_none():
    record = sample()
    rows = [
        Row.audited("one", "npo", "one/npo", record, exit_code=1),
        Row(case="two", model="npo", folder="two/npo", state="failed", reason="its worker died", exit_code=4),
        Row(case="two", model="rmu", folder="two/rmu", state="missing", reason="not run yet", exit_code=4),
    ]
    fleet = Fleet.of("a fleet", rows)
    page = render_fleet(fleet)
    assert fleet.exit_code == 4
    assert fleet.summary() == "3 jobs: 1 suppressed, 2 without a record"
    assert 'href="one/npo/report.html"' in page
    assert 'href="two/' not in page
    assert "its worker died" in page
    assert "2 jobs of 3 without a record" in page
    assert "not on this case" in page, "rmu is on the second case only"
    assert page == render_fleet(fleet)
    assert Fleet.model_validate_json(fleet.to_json()) == fleet


def test_hostile_names_are_shown_and_nothing_else():
    record = hostile(HOSTILE)
    rows = [Row.audited(HOSTILE, HOSTILE, "x/y", record, exit_code=1)]
    rows += [row(f"{i}{HOSTILE}", measure(float(i == 3), name=HOSTILE)) for i in range(6)]
    rows += [Row(case=HOSTILE, model="m", folder="x/z", state="failed", reason=HOSTILE, exit_code=4)]
    page = page_of(*rows)
    assert "<script" not in page
    assert "<img" not in page
    assert "onerror=alert(1)&gt;" in page, "as text"
    assert "\u202e" not in page
    assert "style=" not in page.replace("<style>", "")
    policy = "default-src 'none'; style-src 'sha256-"
    assert f'content="{policy}' in page.replace("&#39;", "'")
    lines = render_csv(Fleet.of("x", rows)).splitlines()
    assert not [line for line in lines if "\x00" in line or "\x1b" in line]


def test_no_cell_of_the_table_is_a_formula():
    table = render_csv(Fleet.of("x", [row("=1+1", measure(0.5), measure(0.25, name="@x"))]))
    assert [line.split(",")[1] for line in table.splitlines()[1:]] == ['"\'=1+1"'] * 2
    assert '"\'@x"' in table
    assert table.splitlines()[2].endswith(',0.25,"",""')


# --- the command line -----------------------------------------------------------------------------------------


def shelved(world: Path, tmp_path: Path) -> Path:
    """A folder in which one job has a record, one failed, one was never run."""
    shelf = Shelf(str(tmp_path))
    shelf.put("three/a", {"record.json": sample().to_json().encode()})
    shelf.put("three/b", Failure("no such thing", 3))
    return tmp_path


def test_only_the_page_is_drawn_without_torch_or_ray(world, tmp_path):
    words = ["audit", "fleet", str(write_fleet(world)), "--out", str(shelved(world, tmp_path)), "--only-report"]
    probe = (
        f"import sys; sys.argv = {words!r}\nimport cli\n"
        "try: cli.main()\nexcept SystemExit as left: print(left.code)\n"
        "print(sorted({'torch', 'transformers', 'ray'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=REPO, env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-2:] == ["4", "[]"], done
    assert "3 jobs: 1 suppressed, 2 without a record" in done.stdout
    page = json.loads((tmp_path / "fleet.json").read_text())
    assert [(one["state"], one["exit_code"]) for one in page["rows"]] == [("audited", 4), ("failed", 3), ("missing", 4)]
    assert (tmp_path / "fleet.html").is_file()
    assert (tmp_path / "fleet.csv").is_file()


@pytest.mark.parametrize(("fail_on", "code"), [("evidence", 1), ("never", 0)])
def test_the_exit_code_is_the_largest_of_the_jobs(world, tmp_path, monkeypatch, fail_on, code):
    record = sample()
    record.not_run = [row for row in record.not_run if not row.failed]
    quiet = record.model_copy(update={"findings": []})
    shelf = Shelf(str(tmp_path))
    for name, one in zip(MODELS, (quiet, record, quiet), strict=True):
        shelf.put(f"three/{name}", {"record.json": one.to_json().encode()})
    words = ("fleet", write_fleet(world), "--out", tmp_path, "--only-report", "--fail-on", fail_on)
    assert audit_here(monkeypatch, *words) == code
