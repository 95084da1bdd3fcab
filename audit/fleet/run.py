"""A fleet's jobs as tasks of a Ray cluster: this machine's own, made for the occasion, or another by its address.

A job is one scan in one process on one thread, whose sums are the same everywhere. Jobs begin in order of what they are
expected to cost, the dearest first, so that none is left over at the end. A worker that dies, or a node with all of its
workers, has its jobs done again elsewhere, by Ray; an error that a scan raises on purpose is the job's result, and not
tried again. Results come to the driver, which alone writes them; if it dies, the same command goes on: a job is kept
if its record is there, by this version of the tool, of the same case, and of models that are still the same.

Evidence stays on the node, in a folder that its jobs share: the first to need an original runs it, the others wait for
it and find what it wrote (`audit.evidence.claimed`). Nodes that share a disk share that too.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from audit.case import Case
from audit.errors import AuditError, BadInput, Incomplete
from audit.fleet.file import Fleet, Job
from audit.fleet.shelf import RECORD, Failure, Shelf
from audit.record import Record
from audit.scan import case_entry, scan, take_inventories

Faces = Mapping[str, Callable[[Record], str]]
"""What is made of every record, beside it: by file name."""

Told = Callable[[Job, str], None]
"""Called with each job that is done, and what came of it."""

_ATTEMPTS = 4
_EVERY_WORKER = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}


def run(
    fleet: Fleet,
    shelf: Shelf,
    *,
    told: Told,
    faces: Faces | None = None,
    address: str | None = None,
    workers: int | None = None,
    work: str | None = None,
    command: str = "",
) -> None:
    """Audit every job of the fleet that has no record on the shelf yet.

    Args:
        fleet: its jobs. Model folders must be found under the same path on every node; sets are sent along.
        shelf: where results go.
        told: hears of every job.
        faces: what is made of every record.
        address: of a Ray cluster; None: one of this machine alone, for as long as this takes (or the one that this
            process is connected to already).
        workers: jobs at a time; None: as many as there are processors.
        work: folder on every node for evidence, which stays there; None: one in the user's cache, removed when every
            job has its record.
        command: for the records.

    Raises:
        BadInput: sets that cannot be loaded, no such cluster, Ray is not installed, or the shelf cannot be written to.
    """
    own = f"~/.cache/palimpsest/fleet-{_digest([fleet.name, shelf.address])}"
    shared: dict[str, Case] = {}
    for job in fleet.jobs:  # sets are loaded once a case
        shared[job.plan.name] = shared.get(job.plan.name) or job.case()
    todo = sorted(fleet.jobs, key=lambda job: _expected_cost(job, shared[job.plan.name]), reverse=True)
    whole = True
    with _connected(address, workers) as ray:
        cases = {name: ray.put(case) for name, case in shared.items()}
        task = ray.remote(_attend).options(num_cpus=1, num_gpus=_gpus(ray, fleet), max_retries=_ATTEMPTS - 1)
        running: dict[Any, Job] = {}
        while todo or running:
            while todo and len(running) < (workers or len(fleet.jobs)):
                job = todo.pop(0)
                kept = _known(shelf, job, _case_of(job, shared[job.plan.name]))
                begun = task.remote(cases[job.plan.name], job, kept, dict(faces or {}), work or own, command)
                running[begun] = job
            (done, *_), _ = ray.wait(list(running))
            job = running.pop(done)
            result = _result(ray, done)
            whole = whole and not isinstance(result, Failure)
            if result is not None:
                shelf.put(job.folder, result)
            told(job, _said(result))
        if whole and work is None:
            _clear(ray, own)


def _case_of(job: Job, shared: Case) -> Case:
    return replace(shared, name=job.name, models=job.models)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _expected_cost(job: Job, case: Case) -> int:
    """Bytes of weights times rows: an order, no more."""
    weights = (".safetensors", ".gguf")
    size = sum(f.stat().st_size for m in job.models.values() for f in m.iterdir() if f.suffix in weights)
    return size * sum(len(rows) for rows in case.sets.values())


def _known(shelf: Shelf, job: Job, case: Case) -> dict[str, str] | None:
    """Digests of the models by role in the job's record, if all else about it is as it would be now."""
    record = shelf.get(job.folder)
    if not isinstance(record, Record) or record.tool.version != version("palimpsest-audit"):
        return None
    if record.case != case_entry(case) or any(row.failed for row in record.not_run):
        return None
    return {role: model.digest for role, model in record.models.items()}


def _said(result: dict[str, bytes] | Failure | None) -> str:
    if result is None:
        return "kept, its record is there"
    if isinstance(result, Failure):
        return f"failed: {result.reason}"
    return str(json.loads(result[RECORD])["verdict"]["label"])


# --- on a worker ----------------------------------------------------------------------------------------------


def _attend(
    shared: Case, job: Job, kept: dict[str, str] | None, faces: Faces, work: str, command: str
) -> dict[str, bytes] | Failure | None:
    """Do a job: the files that it ends in, or why there are none; None if the models are those of the kept record."""
    os.environ.update(_EVERY_WORKER)
    case = _case_of(job, shared)
    try:
        if kept is not None and kept == {role: one.digest for role, one in take_inventories(case).items()}:
            return None
        import torch

        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as out:
            record = scan(case, Path(out), command=command, evidence_folder=_evidence(case, work))
            files = {name: face(record).encode() for name, face in faces.items()}
            return files | {name: (Path(out) / name).read_bytes() for name in ("case.toml", RECORD)}
    except AuditError as error:
        return Failure(str(error), error.exit_code)


def _evidence(case: Case, work: str) -> Path:
    """Where a case's evidence goes: one folder for all scans that ask the same of the same references.

    Numbers depend in their last digits on what a text shared a batch with. Scans that ask otherwise, as a scan of
    the original itself does, do not share; so each record is the one that a scan by itself would have made.
    """
    references = {role: str(path) for role, path in case.models.items() if role != "target"}
    entry = case_entry(replace(case, name="")).model_dump(mode="json")
    itself = str(case.models["target"]) in references.values()
    return Path(work).expanduser() / _digest([entry, references, itself])


def _remove(work: str) -> None:
    shutil.rmtree(Path(work).expanduser(), ignore_errors=True)


# --- Ray ------------------------------------------------------------------------------------------------------


@contextmanager
def _connected(address: str | None, workers: int | None) -> Iterator[Any]:
    """Ray, connected; what was connected before stays so."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is reported to anyone
    try:
        import ray
    except ImportError:
        raise BadInput("a fleet runs on Ray, which is not installed: pip install 'palimpsest-audit[fleet]'") from None
    if ray.is_initialized():
        yield ray
        return
    local: dict[str, Any] = {} if address else {"num_cpus": workers, "include_dashboard": False}
    try:
        # A cluster of its own, even where another runs on this machine: that one has its own users.
        ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **local)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise BadInput(f"no Ray cluster at {address or 'this machine'}: {error}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _gpus(ray: Any, fleet: Fleet) -> int:
    """GPUs a job asks for: one where the cluster has any and the options do not say `cpu`."""
    devices, any_there = {job.plan.options.device for job in fleet.jobs}, bool(ray.cluster_resources().get("GPU"))
    if "cuda" in devices and not any_there:
        raise BadInput("device cuda: no node of the cluster has a GPU")
    return int(any_there and devices != {"cpu"})


def _result(ray: Any, done: Any) -> dict[str, bytes] | Failure | None:
    try:
        result: dict[str, bytes] | Failure | None = ray.get(done)
    except ray.exceptions.RayTaskError as error:  # a fault in the scan, which another attempt would only repeat
        return Failure(_first_line(error.cause), Incomplete.exit_code)
    except ray.exceptions.RayError as error:  # the worker died, or its node
        return Failure(f"its worker died, on {_ATTEMPTS} attempts: {_first_line(error)}", Incomplete.exit_code)
    return result


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _clear(ray: Any, work: str) -> None:
    """Remove the evidence from every node that is still there."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0)(_remove)
    strategies = [NodeAffinitySchedulingStrategy(n["NodeID"], soft=False) for n in ray.nodes() if n["Alive"]]
    tasks = [task.options(scheduling_strategy=strategy).remote(work) for strategy in strategies]
    ray.wait(tasks, num_returns=len(tasks), timeout=60)
