"""Faults: a scan that was killed, starved of room, or whose evidence was damaged must end in the undisturbed record.
And numerics: one with other batches or threads must find the same.

Each scan runs in a forked process, so that a kill is a kill, and a moment is drawn from the scan's own time: the
imports, in which nothing can be lost, are made before. Records are compared without times and costs, evidence by the
digests of all its files.

    python -m benchmarks faults numerics
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from audit.case import Case, Options
from audit.loaders import SetSpec
from audit.progress import SILENT, Tick
from audit.record import Record
from benchmarks.materials import ROOT, demo_case, demo_folder
from benchmarks.timing import Line, Settings

INSTRUMENTS = "memorization,knowledge,lens,relearn"
"""Cheap ones of three questions, and an attack."""
SEED = 0


@dataclass(frozen=True)
class Undisturbed:
    """What every disturbed scan must end in."""

    record: dict[str, Any]
    files: dict[str, str]
    seconds: float


def faults(settings: Settings) -> Iterator[Line]:
    """Shares of faults after which record and evidence equal the undisturbed ones."""
    folder, work = demo_folder(settings.work), settings.work / "faults"
    shutil.rmtree(work, ignore_errors=True)
    sets = {name: SetSpec(folder / "data" / f"{name}.jsonl", limit=60) for name in ("forget", "retain", "holdout")}
    options = Options.parse({"budget": "quick", "template": "plain", "only": INSTRUMENTS, "device": "cpu"}, "faults")
    case = Case.build({"target": folder / "models" / "unlearned"}, sets, options, "faults")
    _warm_up(case, work / "warm")
    expected = undisturbed(case, work / "undisturbed")
    many, some, few = (5, 3, 2) if settings.small else (100, 30, 10)
    lay: list[int] = []
    line = _line("kill -9 at a random moment, then again to the end", kills(case, expected, work, many, lay))
    there = f"{min(lay)} to {max(lay)} (median {np.median(lay):g}) of {len(expected.files)} files of evidence lay there"
    yield replace(line, detail=f"{line.detail}; scan of {expected.seconds:.1f} s; {there}")
    yield _line("a bit flipped in evidence, then again", damages(case, expected, work, some, flip))
    yield _line("a file of evidence cut short, then again", damages(case, expected, work, few, cut))
    yield _line("a bit flipped in every file while a scan runs", damages_under_way(case, expected, work, few))
    yield _line("two scans at once that share evidence", shared(case, expected, work, few))
    yield _line("another process, with another hash seed", other_processes(case, expected, work, 1 if few < 3 else 3))
    yield _line("disk full, then with room", full_disks(case, expected, work, few))


def _warm_up(case: Case, out: Path) -> None:
    """Scan here: what is imported on the way need not be imported again by every process forked."""
    import torch

    from audit.scan import scan

    torch.set_num_threads(1)
    scan(case, out)


def _line(measured: str, outcomes: Iterator[str]) -> Line:
    """The share of outcomes without a complaint; the others are told."""
    told = list(outcomes)
    wrong = [outcome for outcome in told if outcome]
    share = 1 - len(wrong) / len(told) if told else float("nan")
    detail = f"{len(told) - len(wrong)} of {len(told)}" if told else "could not be tried here"
    return Line("faults", measured, share, share, share, "1.00", not wrong and bool(told), "; ".join([detail, *wrong]))


# --- scans in processes of their own ------------------------------------------------------------------------


def undisturbed(case: Case, out: Path) -> Undisturbed:
    """A scan that nothing happens to."""
    began = time.monotonic()
    _whole(case, out)
    seconds = time.monotonic() - began
    return Undisturbed(Record.read(out).comparable(), contents(out / "evidence"), seconds)


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file, by its path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def start(case: Case, out: Path, *, prepare: Callable[[], object] | None = None, **more: Any) -> int:
    """Fork a scan, after `prepare` there; the process's id."""
    from audit.scan import scan

    sys.stdout.flush()
    sys.stderr.flush()
    if process := os.fork():
        return process
    code = 1
    try:
        import torch

        torch.set_num_threads(1)  # a pool of the parent's has no threads here
        if prepare is not None:
            prepare()
        scan(case, out, **more)
        code = 0
    finally:
        os._exit(code)


def _whole(case: Case, out: Path, **more: Any) -> None:
    _end(start(case, out, **more), out)


def _end(process: int, out: Path) -> None:
    if status := os.waitpid(process, 0)[1]:
        raise RuntimeError(f"{out}: a scan ended with status {status}")


def differs(out: Path, expected: Undisturbed, evidence: Path | None = None, *, damaged: bool = False) -> str:
    """What is other than in the undisturbed scan; empty if nothing is. `damaged`: that must be said, and is left."""
    record = Record.read(out).comparable()
    limits = record["verdict"]["limits"]
    said = [limit for limit in limits if "damaged" in limit]
    record["verdict"]["limits"] = [limit for limit in limits if limit not in said]
    files = {name: digest for name, digest in contents(evidence or out / "evidence").items() if name[-5:] != ".lock"}
    aside = [name for name in files if name.endswith(".damaged")]
    if record != expected.record:
        return "another record"
    if {name: digest for name, digest in files.items() if name not in aside} != expected.files:
        return "other evidence"
    if damaged and not said:
        return "damage not said"
    return "" if damaged or not (said or aside) else "damage where there was none"


# --- numerics -----------------------------------------------------------------------------------------------


def numerics(settings: Settings) -> Iterator[Line]:
    """Per setting: the largest change of an estimate, over the noise that the records measured themselves."""
    case, work = demo_case(settings.work, "quick"), settings.work / "numerics"
    if settings.small:
        case = replace(case, options=replace(case.options, only=tuple(INSTRUMENTS.split(","))))
    shutil.rmtree(work, ignore_errors=True)
    _whole(case, work / "usual", prepare=partial(batched, 4096, 1))
    usual = Record.read(work / "usual")
    for tokens, threads in ((512, 1), (64, 1), (4096, 2)):
        out = work / f"tokens-{tokens}-threads-{threads}"
        _whole(case, out, prepare=partial(batched, tokens, threads))
        changes, flips = compared(usual, Record.read(out))
        name, largest = max(changes.items(), key=lambda item: item[1])
        inside = sum(change <= 1 for change in changes.values())
        detail = f"{inside} of {len(changes)} findings inside, {len(flips)} verdicts flipped; largest: {name}"
        measured = f"estimates with batches of {tokens} tokens, {threads} threads: change / measured noise"
        yield Line("faults", measured, largest, largest, largest, "≤ 1", largest <= 1 and not flips, detail)


def batched(tokens: int, threads: int) -> None:
    """Make this process scan with other batches and threads."""
    import torch

    import audit.capture

    torch.set_num_threads(threads)
    audit.capture.Engine = partial(audit.capture.Engine, token_budget=tokens)  # type: ignore[assignment, misc]


def compared(one: Record, other: Record) -> tuple[dict[str, float], list[str]]:
    """By finding, how far its estimates lie apart, in units of the noise of a log-probability; verdicts that differ.

    The noise is what either scan measured: how far batched log-probabilities lay from those of plain passes.
    """
    noise = max(value or 0.0 for record in (one, other) for value in record.environment.noise.values())
    others = {finding.id: finding for finding in other.findings}
    changes, flips = {}, [] if one.verdict.label == other.verdict.label else ["the verdict"]
    flips += sorted({f.id for f in one.findings} ^ others.keys())
    for finding in one.findings:
        twin = others.get(finding.id)
        if twin is None:
            continue
        if (finding.verdict, finding.side) != (twin.verdict, twin.side):
            flips.append(finding.id)
        if finding.estimate is None or twin.estimate is None:
            changes[finding.id] = 0.0 if finding.estimate is twin.estimate else float("inf")
        else:
            changes[finding.id] = abs(finding.estimate - twin.estimate) / noise
    return changes, flips


# --- the faults ---------------------------------------------------------------------------------------------


def kills(case: Case, expected: Undisturbed, work: Path, count: int, lay: list[int]) -> Iterator[str]:
    """Kill a scan at moments drawn evenly over its time, and let another go on; `lay` is told how far each had come."""
    draw, out = np.random.default_rng(SEED), work / "killed"
    done = 0
    while done < count:
        shutil.rmtree(out, ignore_errors=True)
        process = start(case, out)
        time.sleep(draw.uniform(0, expected.seconds))
        os.kill(process, signal.SIGKILL)
        if os.waitpid(process, 0)[1] == 0:
            continue  # it was quicker than the one that was timed
        lay.append(sum(name in expected.files for name in contents(out / "evidence")))
        _whole(case, out)
        done += 1
        yield differs(out, expected)


def flip(data: bytearray, draw: np.random.Generator) -> None:
    """Flip one bit."""
    data[draw.integers(len(data))] ^= 1 << int(draw.integers(8))


def cut(data: bytearray, draw: np.random.Generator) -> None:
    """Cut off an end."""
    del data[draw.integers(len(data)) :]


def damages(
    case: Case,
    expected: Undisturbed,
    work: Path,
    count: int,
    damage: Callable[[bytearray, np.random.Generator], None],
) -> Iterator[str]:
    """Damage a file of evidence, scan again."""
    draw, out = np.random.default_rng(SEED), work / damage.__name__
    for _ in range(count):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(work / "undisturbed", out)
        _damage(out / "evidence" / str(draw.choice(sorted(expected.files))), damage, draw)
        _whole(case, out)
        yield differs(out, expected, damaged=True)


def _damage(path: Path, damage: Callable[[bytearray, np.random.Generator], None], draw: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    damage(data, draw)
    path.write_bytes(data)


@dataclass
class AtStep:
    """Does something once, when a step of this name begins."""

    label: str
    action: Callable[[], object]

    @contextmanager
    def step(self, label: str, total: int) -> Iterator[Tick]:
        """A step; the first of that name begins with the action."""
        if label.startswith(self.label):
            self.label = "\0"
            self.action()
        with SILENT.step(label, total) as tick:
            yield tick


def damages_under_way(case: Case, expected: Undisturbed, work: Path, count: int) -> Iterator[str]:
    """Flip a bit in every file when all is captured and not yet measured: the scan finds it, or the next one does."""
    draw, out = np.random.default_rng(SEED), work / "under-way"

    def flip_all() -> None:
        for name in expected.files:
            _damage(out / "evidence" / name, flip, draw)

    for _ in range(count):
        shutil.rmtree(out, ignore_errors=True)
        _whole(case, out, progress=AtStep("statistics", flip_all))
        found = differs(out, expected, damaged=True)
        if found == "other evidence":  # what the scan had in memory it had no need to read
            _whole(case, out)
            found = differs(out, expected, damaged=True)
        yield found


def shared(case: Case, expected: Undisturbed, work: Path, count: int) -> Iterator[str]:
    """Two scans into folders of their own, with one folder of evidence."""
    evidence, outs = work / "shared", [work / "one", work / "two"]
    for _ in range(count):
        for folder in (evidence, *outs):
            shutil.rmtree(folder, ignore_errors=True)
        processes = [start(case, out, evidence_folder=evidence) for out in outs]
        for process, out in zip(processes, outs, strict=True):
            _end(process, out)
        yield next((found for out in outs if (found := differs(out, expected, evidence))), "")


def other_processes(case: Case, expected: Undisturbed, work: Path, count: int) -> Iterator[str]:
    """The same by the command line: nothing hangs on the order of a set."""
    (work / "case.toml").write_text(case.to_toml())
    for seed in range(count):
        out = work / f"hash-{seed}"
        done = _audit(["scan", "--case", str(work / "case.toml"), "--out", str(out)], PYTHONHASHSEED=str(seed))
        yield differs(out, expected) if done.returncode in (0, 1) else done.stderr[-200:]


def _audit(words: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}
    command = [sys.executable, "-m", "cli", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def full_disks(case: Case, expected: Undisturbed, work: Path, count: int) -> Iterator[str]:
    """Scan on a file system that is too small, then let it grow: needs the right to mount one."""
    needed = sum(path.stat().st_size for path in (work / "undisturbed").rglob("*") if path.is_file())
    mounted = work / "small"
    mounted.mkdir(exist_ok=True)
    size = partial(_sized, mounted)
    if not size("size=64k"):
        return
    try:
        for part in range(count):
            out = mounted / "out"
            room = 4096 * max(1, (part * needed) // (count * 4096))
            shutil.rmtree(out, ignore_errors=True)
            size(f"remount,size={room}")
            (work / "case.toml").write_text(case.to_toml())
            done = _audit(["scan", "--case", str(work / "case.toml"), "--out", str(out)])
            said = [line for line in done.stderr.splitlines() if line.startswith("audit: ")]
            left = [path.name for path in out.rglob("*.tmp")]
            size("remount,size=1g")
            if done.returncode not in (2, 4) or len(said) != 1 or "No space left" not in said[0] or left:
                yield f"with {room} bytes: exit {done.returncode}, {done.stderr[-300:]!r}, left {left}"
                continue
            _whole(case, out)
            yield differs(out, expected)
    finally:
        subprocess.run(["umount", str(mounted)], check=False)


def _sized(mounted: Path, options: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(mounted)]
    return subprocess.run(command, capture_output=True).returncode == 0
