"""A scan: case -> plan -> capture -> measure -> judge -> record.

Evidence of every model is gathered first (`audit.gather`); only when all of it lies on disk are findings computed. A
killed scan starts again at the first missing batch, with
the same batches, and ends in the same record; so does one whose evidence is found damaged, at what is left of it.
"""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

from audit.case import Case
from audit.errors import BadInput, Damaged, Incomplete
from audit.gather import Run, capture_all, failed_row
from audit.holding import held
from audit.instrument import Broken, Instrument, guests, select
from audit.inventory import Inventory, sees_images
from audit.offline import network_closed
from audit.profile import Domain, Profile, fitting, shipped
from audit.progress import SILENT, Progress
from audit.record import (
    INTERRUPTED,
    CaseEntry,
    Environment,
    ExampleRow,
    Finding,
    ModelEntry,
    NotRun,
    Record,
    SetEntry,
    Tool,
    sweep,
    write_atomically,
)
from audit.verdict import KNOWLEDGE, conclude, judge

if TYPE_CHECKING:
    from audit.endpoint.address import Endpoint
    from audit.evidence import Evidence
    from audit.opened import OpenModel

_MOST_EXAMPLES = 400
_MOST_IMAGES = 60
_MOST_RESTARTS = 3


def take_inventories(case: Case, progress: Progress = SILENT, answers: Path | None = None) -> dict[str, Inventory]:
    """The inventory of every model; raises `Refused` before anything of a folder is opened.

    `answers` is where those of endpoints are kept, each endpoint's in a folder of its own.
    """
    found: dict[str, Inventory] = {}
    for role, place in case.models.items():
        with progress.step(f"inventory of {role}", 1) as tick:
            found[role] = case.inventory(role) if isinstance(place, Path) else _probe(place, answers)
            tick(1)
    return found


def _probe(endpoint: Endpoint, answers: Path | None) -> Inventory:
    from audit.endpoint.client import Client
    from audit.endpoint.probe import probe

    client = Client(endpoint)
    found = probe(client)
    if answers is not None:
        client.keep(answers / f"answers-{found.digest[:16]}")
    return found


def _servers(case: Case) -> list[tuple[str, int]]:
    """The hosts and ports that a scan may reach: those of the models that lie behind an API."""
    return [place.server for place in case.models.values() if not isinstance(place, Path)]


def _seen(case: Case, inventories: Mapping[str, Inventory]) -> Case:
    """The case at the access that all its models give."""
    access = min(case.options.access, *(inventory.access for inventory in inventories.values()))
    if access == case.options.access:
        return case
    return replace(case, options=replace(case.options, access=access))


def scan(
    case: Case,
    out: Path,
    *,
    progress: Progress = SILENT,
    command: str = "",
    open_target: Callable[..., OpenModel] | None = None,
    evidence_folder: Path | None = None,
    profiles: Sequence[Profile] | None = None,
    instruments: Sequence[Instrument] | None = None,
) -> Record:
    """Audit `case`, keep evidence and record in `out`, and return the record.

    `instruments` run instead of those that the case names (all that are registered, if it names none).

    `evidence_folder` is where evidence is kept instead, for scans that share an original. Of `profiles` (those that
    come with the package, if not given) the first that fits the case sets the thresholds.
    Models are opened by `open_target(role, inventory, device=..., dtype=..., template=...)`; if not given, as the
    language models or image classifiers that they are: nothing else in a folder can make it another.

    Interrupted (Ctrl-C), it leaves a record without findings that says so, unless one with findings lies there.

    Raises:
        Refused: a model folder is unsafe or not whole.
        BadInput: the case cannot be audited as given, or another scan is at work in `out`.
        Incomplete: a pass through a model failed, or what it gave cannot be written.
    """
    began = time.monotonic()
    kept = evidence_folder or out / "evidence"
    with held(out):
        inventories = take_inventories(case, progress, kept)
        case = _seen(case, inventories)
        for inventory in inventories.values():
            if sees_images(inventory.architecture) != (case.modality == "image"):
                held_by_sets = "images" if case.modality == "image" else "no images"
                raise BadInput(
                    f"{inventory.root}: {inventory.architecture} does not fit the sets, which hold {held_by_sets}"
                )
        _sweep(out, evidence_folder)

        def begin() -> Run:
            run = Run(case, kept, progress, *_choose(case, instruments))
            run.limits += [*_limits(case), *(f"{role}: {said}" for role, i in inventories.items() for said in i.limits)]
            run.inventories = inventories
            run.shares = evidence_folder is not None
            return run

        try:
            with network_closed(_servers(case)) as attempts:
                run, evidence, findings, examples = _gather(begin, open_target)
            run.limits += [f"the network was closed, and something tried to reach {where}" for where in attempts]
            for inventory in inventories.values():
                inventory.refuse_changes()
            record = _conclude(run, evidence, findings, examples, command, profiles, began)
        except KeyboardInterrupt:
            if not _stands(out):
                _keep(_interrupted(begin(), command, began), case, out)
            raise
        _keep(record, case, out)
    return record


def _gather(
    begin: Callable[[], Run], open_target: Callable[..., OpenModel] | None
) -> tuple[Run, Evidence, list[Finding], list[ExampleRow]]:
    """Capture and measure; where evidence is found damaged after all, begin again with what is left of it."""
    damaged: Counter[str] = Counter()
    for left in reversed(range(_MOST_RESTARTS + 1)):
        run = begin()
        try:
            evidence = capture_all(run, run.inventories, open_target)
            findings, examples = _measure_all(run, evidence)
            break
        except Damaged:
            if not left:
                raise
        finally:
            damaged.update(role for (role, _), store in run.stores.items() for _ in store.damaged)
    run.limits += [
        f"evidence of {role}: {count} damaged {'file' if count == 1 else 'files'} set aside, computed again"
        for role, count in damaged.items()
    ]
    return run, evidence, findings, examples


def _conclude(
    run: Run,
    evidence: Evidence,
    findings: list[Finding],
    examples: list[ExampleRow],
    command: str,
    profiles: Sequence[Profile] | None,
    began: float,
) -> Record:
    """The record of what was measured, or of what was not."""
    case = run.case
    models = {role: inventory.to_entry(case.models[role].name) for role, inventory in run.inventories.items()}
    profile, misfits = fitting(_domain(case, findings, models), shipped() if profiles is None else profiles)
    if profile is not None and (unmeasured := profile.unmeasured(findings)):
        named = ", ".join(unmeasured)
        misfits.append(f"decide nothing, for profile {profile.name} has not measured them: {named}")
    judged = judge(findings if profile is None else profile.applied(findings))
    run.cost.seconds = time.monotonic() - began
    run.cost.peak_memory_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Record(
        tool=Tool(version=version("palimpsest-audit"), command=command),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        case=case_entry(case),
        models=models,
        environment=_environment(case, evidence),
        findings=judged,
        not_run=run.not_run,
        verdict=conclude(judged, run.not_run, [*run.limits, *misfits], profile=profile),
        examples=examples,
        cost=run.cost,
    )


def _interrupted(run: Run, command: str, began: float) -> Record:
    """The record of a scan that was broken off: every instrument of it a row that says so, and no finding.

    What was captured answers questions only once all of it is there: a finding of half the models, or of half an
    attack's stages, would not be the finding that the scan was asked for.
    """
    from audit.evidence import Evidence

    run.not_run += [
        NotRun(instrument=i.name, question=i.question, reason=INTERRUPTED, failed=True) for i in run.instruments
    ]
    run.limits.insert(0, INTERRUPTED)
    return _conclude(run, Evidence(), [], [], command, [], began)


def _stands(out: Path) -> bool:
    """Is there a record that an interrupted scan must not take the place of?"""
    try:
        record = Record.read(out)
    except BadInput:
        return False
    return INTERRUPTED not in record.verdict.limits


def _keep(record: Record, case: Case, out: Path) -> None:
    """Write the record and its case: together, so that the one in `out` is always the case of the other."""
    write_atomically(out / "case.toml", case.to_toml().encode())
    record.write(out / "record.json")


def capture(
    case: Case,
    evidence_folder: Path,
    *,
    instruments: Sequence[Instrument] | None = None,
    progress: Progress = SILENT,
) -> Evidence:
    """What a scan of the case would read: passes only, nothing measured; those that the folder holds are not run.

    For the instruments that the case chooses, or others: who wants numbers of their own needs an `Instrument` that asks
    for them, registered or not.

    Raises:
        Refused, BadInput, Incomplete: as `scan`.
    """
    inventories = take_inventories(case, progress, evidence_folder)
    case = _seen(case, inventories)
    chosen, not_run = _choose(case) if instruments is None else (list(instruments), [])
    with network_closed(_servers(case)):
        return capture_all(Run(case, evidence_folder, progress, chosen, not_run), inventories)


def _sweep(out: Path, evidence_folder: Path | None) -> None:
    """Remove what scans left half-written when they were killed; not where others may be at work."""
    for name in ("record.json", "case.toml", "report.html"):
        sweep(out, name)
    if evidence_folder is None:
        for store in (out / "evidence").glob("*"):
            sweep(store)


def _choose(case: Case, given: Sequence[Instrument] | None = None) -> tuple[list[Instrument], list[NotRun]]:
    chosen: list[Instrument] = []
    not_run: list[NotRun] = []
    for item in select(case.options.only, case.options.skip) if given is None else given:
        if isinstance(item, Instrument) and item.modality not in (case.modality, "any"):
            continue  # no part of an audit of this kind of model
        if isinstance(item, Broken):
            not_run.append(NotRun(instrument=item.name, reason=item.reason, failed=True))
            continue
        try:
            reason, withheld = item.missing(case), item.withheld(case)
        except Exception as error:
            not_run.append(failed_row(item, error))
            continue
        if reason:
            not_run.append(NotRun(instrument=item.name, question=item.question, reason=reason))
        else:
            chosen.append(item)
            not_run += [
                NotRun(instrument=finding, question=item.question, reason=why) for finding, why in withheld.items()
            ]
    # Where two ask differently under one name, the later one is dropped: let it be the third party's.
    third_party = guests()
    return sorted(chosen, key=lambda instrument: instrument.name in third_party), not_run


def _limits(case: Case) -> list[str]:
    limits = [*case.notes]
    limits += [
        f"{name}: {len(case.rows(name))} of {len(examples)} rows used (budget {case.options.budget.value})"
        for name, examples in case.sets.items()
        if len(case.rows(name)) < len(examples)
    ]
    limits += [
        f"{name}: rows carry no entity, so each counts as independent"
        for name, examples in case.sets.items()
        if not any(example.entity for example in examples)
    ]
    return limits


# --- measure ------------------------------------------------------------------------------------------------


def _measure_all(run: Run, evidence: Evidence) -> tuple[list[Finding], list[ExampleRow]]:
    findings: list[Finding] = []
    drill: dict[str, dict[str, float | str]] = {}
    with run.progress.step("statistics", len(run.instruments)) as tick:
        for i, instrument in enumerate(list(run.instruments)):
            began = time.monotonic()
            try:
                found = _own(instrument, instrument.measure(run.case, evidence))
                shown = instrument.examples(run.case, evidence)
                if odd := [v for values in shown.values() for v in values.values() if not isinstance(v, Real | str)]:
                    raise TypeError(f"examples gave a {type(odd[0]).__name__}, neither number nor text")
                for row, values in shown.items():
                    drill.setdefault(row, {}).update(values)
                findings += found
            except Incomplete:
                raise
            except Exception as error:
                run.drop(instrument, error)
            run.charge(instrument, time.monotonic() - began)
            tick(i + 1)
    return findings, _examples(run.case, drill)


def _own(instrument: Instrument, found: Sequence[Finding]) -> list[Finding]:
    """The findings, if all are of this instrument: in another's name they would be judged as the other's."""
    for finding in found:
        if not isinstance(finding, Finding):
            raise TypeError(f"measure gave a {type(finding).__name__}, which is no Finding")
        if finding.instrument != instrument.name or not finding.id.startswith(f"{instrument.name}/"):
            raise ValueError(f"measure gave a finding {finding.id!r} of {finding.instrument!r}, which is not its own")
    if len({finding.id for finding in found}) < len(found):
        raise ValueError("measure gave two findings of one name")
    return list(found)


def _examples(case: Case, drill: dict[str, dict[str, float | str]]) -> list[ExampleRow]:
    from audit.pictures import png

    rows: list[ExampleRow] = []
    for row in case.rows("forget") if "forget" in case.sets else ():
        values = drill.get(row.id, {})
        said = values.get("generated")
        rows.append(
            ExampleRow(
                id=row.id,
                prompt=row.prompt,
                answer=row.answer,
                entity=row.entity,
                generated=said if isinstance(said, str) else None,
                scores={key: value for key, value in values.items() if not isinstance(value, str)},
                image=b64encode(png(row.picture)).decode() if row.picture and len(rows) < _MOST_IMAGES else None,
            )
        )
    return rows[:_MOST_EXAMPLES]


def _domain(case: Case, findings: Sequence[Finding], models: Mapping[str, ModelEntry]) -> Domain:
    """What a reference profile must cover to hold for this case."""
    size, entities = models["target"].parameters, case.sets["forget"].entities if "forget" in case.sets else 0
    return Domain(
        access=case.options.access.name.lower(),
        budget=case.options.budget.value,
        sets=tuple(case.sets),
        roles=tuple(case.models),
        statistics=tuple(f.id for f in findings if f.question in KNOWLEDGE),
        parameters=(size, size),
        entities=(entities, entities),
    )


def case_entry(case: Case) -> CaseEntry:
    """What a record says of its case."""
    sets = {
        name: SetEntry(digest=s.digest, count=len(s), entities=s.entities, source=s.source)
        for name, s in case.sets.items()
    }
    return CaseEntry(name=case.name, sets=sets, options=case.options.dump(), notes=list(case.notes))


def _environment(case: Case, evidence: Evidence) -> Environment:
    import torch

    packages = ("torch", "transformers", "transformer-lens", "numpy", "scipy", "scikit-learn", "safetensors")
    device = case.options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Environment(
        python=sys.version.split()[0],
        platform=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        packages={name: version(name) for name in packages},
        device=device,
        dtype=case.options.dtype,
        threads=torch.get_num_threads(),
        seed=case.options.seed,
        noise=dict(evidence.noise),
    )
