"""Faults: kills, damage, full disks, two scans at once, Ctrl-C, clocks, memory; the study at length is
`python -m benchmarks faults`."""

from __future__ import annotations

import ast
import itertools
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from worlds import REPO, audit_here, build_tiny, quiet_scan, small_case, tiny_case

from audit.capture import Engine
from audit.case import Case, read_case
from audit.errors import BadInput, Damaged, Unwritable
from audit.evidence import Store
from audit.holding import LOCK, held
from audit.record import INTERRUPTED, Label, Record, write_atomically
from benchmarks import faults
from benchmarks.faults import AtStep, Undisturbed, contents, cut, differs, flip

ONLY = "memorization,knowledge,relearn"


@cache
def case() -> Case:
    """Two instruments and an attack on the unlearned model: a scan of a second or two."""
    return tiny_case({"target": "unlearned"}, ("forget", "retain", "holdout"), only=ONLY)


@cache
def work() -> Path:
    folder = build_tiny().folder / "faults"
    folder.mkdir()
    return folder


@cache
def expected() -> Undisturbed:
    return faults.undisturbed(case(), work() / "undisturbed")


# --- kills and damage


def test_killed_at_any_moment_it_ends_in_the_same_record():
    lay: list[int] = []
    assert list(faults.kills(case(), expected(), work(), 3, lay)) == [""] * 3
    assert len(lay) == 3
    assert max(lay) <= len(expected().files)


@pytest.mark.parametrize(("damage", "count"), [(flip, 3), (cut, 1)])
def test_damage_is_found_said_and_computed_again(damage, count):
    expected()
    assert list(faults.damages(case(), expected(), work(), count, damage)) == [""] * count


def test_damage_under_a_running_scan_is_found():
    expected()
    assert list(faults.damages_under_way(case(), expected(), work(), 1)) == [""]


def test_the_comparison_can_fail(tmp_path):
    """Another record, other evidence, damage that nobody said: each is told."""
    expected()
    out = Path(shutil.copytree(work() / "undisturbed", tmp_path / "out"))
    assert differs(out, expected()) == ""
    assert differs(out, expected(), damaged=True) == "damage not said"
    (block, *_) = (out / "evidence").glob("*/*.safetensors")
    block.write_bytes(block.read_bytes()[:-1])
    assert differs(out, expected()) == "other evidence"
    record = Record.read(out)
    record.findings.pop()
    record.write(out / "record.json")
    assert differs(out, expected()) == "another record"


@pytest.fixture
def forgetful(monkeypatch):
    """Many blocks, of which a store keeps one at hand: most are read from disk when they are measured."""
    monkeypatch.setattr("audit.evidence._MOST_IN_MEMORY", 0)
    monkeypatch.setattr("audit.capture.Engine", partial(Engine, token_budget=512))


@pytest.mark.usefixtures("forgetful")
def test_evidence_that_is_damaged_again_and_again_ends_the_scan(tmp_path):
    """As on a disk that fails: no endless loop, and no record."""
    out, times = tmp_path / "out", 0

    class Failing:
        @contextmanager
        def step(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
            nonlocal times
            if label == "statistics":
                times += 1
                for path in (out / "evidence").glob("*/*.safetensors"):
                    path.write_bytes(b"x")
            yield lambda _: None

    with pytest.raises(Damaged, match="damaged since it was written"):
        quiet_scan(small_case(), out, progress=Failing())
    assert not (out / "record.json").exists()
    assert 2 <= times <= 4


@pytest.mark.usefixtures("forgetful")
def test_a_block_that_is_gone_under_a_running_scan_is_captured_again(tmp_path):
    reference, out = quiet_scan(small_case(), tmp_path / "reference"), tmp_path / "out"

    def remove() -> None:
        for path in (out / "evidence").glob("*/*.safetensors"):
            path.unlink()

    record = quiet_scan(small_case(), out, progress=AtStep("statistics", remove))
    assert record.findings == reference.findings
    assert any("damaged" in limit for limit in record.verdict.limits)


CONTEXT = {"model": "m", "dtype": "torch.float32", "device": "cpu"}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10**6), bit=st.integers(0, 7), value=st.sampled_from([1e-06, "Ä é", [1, {"a": None}], 3]))
@example(at=83, bit=5, value=1e-06)  # 1E-06 is the same number
def test_any_bit_of_a_note(tmp_path, at, bit, value):
    store = Store(tmp_path, CONTEXT)
    store.remember("x", value)
    assert store.recall("x") == value
    path = store.folder / "x.json"
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1 << bit
    path.write_bytes(data)
    assert store.recall("x") is None
    assert store.damaged == ["x.json"]
    assert path.with_suffix(".damaged").read_bytes() == data
    store.remember("x", value)
    assert Store(tmp_path, CONTEXT).recall("x") == value


def test_a_note_is_of_its_name_and_its_model_alone(tmp_path):
    store, other = Store(tmp_path, CONTEXT), Store(tmp_path, {**CONTEXT, "model": "n"})
    store.remember("x", 1)
    for carried in (store.folder / "y.json", other.folder / "x.json"):
        carried.parent.mkdir(exist_ok=True)
        carried.write_bytes((store.folder / "x.json").read_bytes())
    assert store.recall("x") == 1
    assert store.recall("y") is None
    assert other.recall("x") is None


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=60))
@example(data=b"")
@example(data=(2).to_bytes(8, "little") + b"[]")
@example(data=(1 << 63).to_bytes(8, "little") + b"{}")
@example(data=(31).to_bytes(8, "little") + b'{"__metadata__":{"block":"[1]"}}')
def test_bytes_that_are_named_rightly_and_are_no_block(tmp_path, data):
    from audit.evidence import _digest

    folder = Store(tmp_path, CONTEXT).folder
    write_atomically(folder / f"{_digest(data)}.safetensors", data)
    assert Store(tmp_path, CONTEXT).damaged == [f"{_digest(data)}.safetensors"]


# --- two scans


def test_a_second_scan_of_a_folder_stops_at_once_and_names_the_first(tmp_path, monkeypatch):
    out, (ready, go) = tmp_path / "out", os.pipe()
    if not (process := os.fork()):
        with held(out):
            os.write(go, b"x")
            time.sleep(600)
        os._exit(0)
    try:
        os.read(ready, 1)
        monkeypatch.setattr("audit.scan.take_inventories", lambda *_: pytest.fail("it began"))
        with pytest.raises(BadInput, match=rf"{out}: in use by process {process} on "):
            quiet_scan(small_case(), out)
        monkeypatch.undo()
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    assert (out / LOCK).exists(), "left by the kill, and held by nobody"
    quiet_scan(small_case(), out)
    assert sorted(path.name for path in out.iterdir()) == ["case.toml", "evidence", "record.json"]


def test_a_lock_is_not_a_way_to_write_elsewhere(tmp_path):
    (tmp_path / "precious").write_text("text")
    (tmp_path / LOCK).symlink_to("precious")
    with pytest.raises(BadInput, match="cannot be written to"), held(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "text"


def test_scans_may_share_evidence():
    expected()
    assert list(faults.shared(case(), expected(), work(), 1)) == [""]


def test_two_writers_of_one_file_in_one_process(tmp_path, monkeypatch):
    """Also where process ids are equal, as in containers: each has a temporary file of its own."""
    seen: list[Path] = []
    monkeypatch.setattr(Path, "replace", lambda path, _: seen.append(path))
    for _ in range(2):
        write_atomically(tmp_path / "x", b"1", sync=False)
    assert len(set(seen)) == 2


def test_what_killed_writers_left_goes_with_the_next_scan(tmp_path):
    quiet_scan(small_case(), tmp_path)
    [store] = (tmp_path / "evidence").iterdir()
    litter = [store / ".ab.safetensors.9-0123abcd.tmp", tmp_path / ".record.json.9-0123abcd.tmp"]
    others = [tmp_path / ".mine.tmp", tmp_path / ".mine.9-0123abcd.tmp"]
    for path in (*litter, *others):
        path.write_bytes(b"half")
    quiet_scan(small_case(), tmp_path)
    assert not any(path.exists() for path in litter)
    assert all(path.exists() for path in others)


# --- Ctrl-C


def stop() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("step", ["attack relearn", "statistics"])
def test_interrupted_it_leaves_a_record_that_says_so_and_goes_on(tmp_path, step):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quiet_scan(case(), out, progress=AtStep(step, stop))
    record = Record.read(out)
    assert record.findings == []
    assert record.verdict.label == Label.INCONCLUSIVE
    assert record.verdict.limits[0] == INTERRUPTED
    assert {(row.instrument, row.reason, row.failed) for row in record.not_run} == {
        (name, INTERRUPTED, True) for name in ONLY.split(",")
    }
    assert record.models["target"].files
    assert read_case(out / "case.toml")[0] == case().name
    quiet_scan(case(), out)
    assert differs(out, expected()) == ""


def test_an_interrupted_scan_takes_no_findings_away(tmp_path):
    quiet_scan(small_case(), tmp_path)
    whole = {name: (tmp_path / name).read_bytes() for name in ("record.json", "case.toml")}
    with pytest.raises(KeyboardInterrupt):
        quiet_scan(small_case(seed=3), tmp_path, progress=AtStep("statistics", stop))
    assert {name: (tmp_path / name).read_bytes() for name in whole} == whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_exit_130_and_one_line(tmp_path, monkeypatch, capsys, number):
    def signalled(*_: object) -> None:
        os.kill(os.getpid(), number)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Engine, "run", signalled)
    (tmp_path / "case.toml").write_text(small_case().to_toml())
    code = audit_here(monkeypatch, "scan", "--case", tmp_path / "case.toml", "--out", tmp_path / "out")
    assert code == 130
    assert "audit: interrupted; what was captured is kept" in capsys.readouterr().err
    assert INTERRUPTED in Record.read(tmp_path / "out").verdict.limits
    assert signal.getsignal(signal.SIGTERM) is before


# --- disks and memory


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel lets this process write no file beyond `size` bytes: an error at the same places as a full disk's."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [5, 50_000])
def test_without_room_it_says_where_and_goes_on_when_there_is(tmp_path, monkeypatch, capsys, room):
    out = tmp_path / "out"
    (tmp_path / "case.toml").write_text(case().to_toml())
    words = ("scan", "--case", tmp_path / "case.toml", "--out", out, "--fail-on", "never")
    with largest_file(room):
        code = audit_here(monkeypatch, *words)
    [said] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("audit: ")]
    assert code == (2 if room == 5 else 4)
    assert str(out) in said
    assert "File too large" in said
    assert not list(tmp_path.rglob("*.tmp")), "nothing half-written"
    assert not (out / "record.json").exists()
    quiet_scan(case(), out)
    assert differs(out, expected()) == ""


def test_an_output_that_cannot_be_written_is_exit_2_before_anything_is_read(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "case.toml").write_text(small_case().to_toml())
    out = tmp_path / "file" / "out"
    monkeypatch.setattr("audit.scan.take_inventories", lambda *_: pytest.fail("it began"))
    assert audit_here(monkeypatch, "scan", "--case", tmp_path / "case.toml", "--out", out) == 2
    assert f"audit: {out}: cannot be written to: Not a directory" in capsys.readouterr().err


def test_a_failed_write_leaves_what_was_there(tmp_path):
    write_atomically(tmp_path / "x", b"before")
    with largest_file(10), pytest.raises(Unwritable, match=r"x: cannot be written: File too large"):
        write_atomically(tmp_path / "x", bytes(1000))
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", b"before")]


def test_memory_that_runs_out_in_one_instrument_costs_that_one(tmp_path, monkeypatch):
    alone = quiet_scan(small_case(only="memorization"), tmp_path)
    for error in (MemoryError("no room"), torch.OutOfMemoryError("CUDA out of memory")):

        def fails(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("detectors.knowledge.Knowledge.measure", fails)
        record = quiet_scan(small_case(only="memorization,knowledge"), tmp_path)
        [row] = record.not_run
        assert (row.instrument, row.failed) == ("knowledge", True)
        assert str(error) in row.reason
        assert [f.statistic for f in record.findings] == [f.statistic for f in alone.findings]
        for one, two in zip(record.findings, alone.findings, strict=True):
            assert one.estimate == pytest.approx(two.estimate, abs=1e-5)


# --- clocks


def test_clocks_that_jump_change_nothing(tmp_path, monkeypatch):
    """The wall clock goes backwards by years while a scan runs, and files are of times to come."""
    jumps = itertools.count()

    class Jumping(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2026, 1, 1, tzinfo=tz) - timedelta(days=365 * next(jumps))

    monkeypatch.setattr("audit.scan.datetime", Jumping)
    monkeypatch.setattr("time.time", lambda: 1e9 - 1e7 * next(jumps))
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quiet_scan(case(), out, progress=AtStep("attack relearn", stop))
    for i, path in enumerate(sorted(out.rglob("*"))):
        os.utime(path, (4e9 * (i % 2), 4e9 * (i % 2)))
    record = quiet_scan(case(), out)
    assert differs(out, expected()) == ""
    assert record.cost.seconds > 0
    assert datetime.fromisoformat(record.created) < datetime.now(UTC)


def test_nothing_is_decided_by_the_wall_clock():
    """It is asked for what a record or signature says of when it was made, and whether a certificate holds; and until
    when a server asks one to wait."""
    allowed = {"audit/endpoint/client.py", "audit/scan.py", "reports/attestation.py", "reports/signing.py"}
    asking = set()
    for path in (REPO / "cli.py", *(p for part in PARTS for p in (REPO / part).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("time", "now", "utcnow", "today", "time_ns"):
                base = node.value
                if isinstance(base, ast.Name) and base.id in ("time", "datetime", "date"):
                    asking.add(str(path.relative_to(REPO)))
    assert asking == allowed


PARTS = ("audit", "probes", "detectors", "attacks", "reports")


# --- other batches, other threads


@pytest.mark.parametrize(("tokens", "threads"), [(64, 1), (4096, 2)])
def test_batches_and_threads_change_no_verdict_and_nothing_beyond_the_noise(tmp_path, tokens, threads):
    """The noise is what the record itself measured: how far a batched log-probability lies from a plain pass's."""
    usual = Record.read(work() / "undisturbed")
    assert expected().record == usual.comparable()
    faults._whole(case(), tmp_path / "out", prepare=partial(faults.batched, tokens, threads))
    other = Record.read(tmp_path / "out")
    changes, flips = faults.compared(usual, other)
    assert flips == []
    assert len(changes) == len(usual.findings) == len(other.findings) > 5
    assert max(changes.values()) <= 1
    if tokens == 64:
        assert contents(tmp_path / "out" / "evidence") != expected().files, "they were other batches"
