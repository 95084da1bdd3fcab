"""A scan: case -> plan -> capture -> measure -> judge -> record.

One model is in memory at a time. For each role, the instruments say what they need of it, the plan merges that,
and the engine runs what the evidence store does not hold yet; attacks then alter the model and ask again. Only
when all evidence lies on disk are findings computed. A killed scan starts again at the first missing batch, with
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
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audit.case import Case
from audit.errors import AuditError, BadInput, Damaged, Incomplete, NoAccess, Refused
from audit.holding import held
from audit.instrument import Access, Attack, Broken, Instrument, guests, select
from audit.inventory import Inventory, sees_images
from audit.offline import network_closed
from audit.profile import Domain, Profile, fitting, shipped
from audit.progress import SILENT, Progress
from audit.record import (
    INTERRUPTED,
    CaseEntry,
    Cost,
    Environment,
    ExampleRow,
    Finding,
    InstrumentCost,
    ModelEntry,
    NotRun,
    Question,
    Record,
    SetEntry,
    Tool,
    sweep,
    write_atomically,
)
from audit.verdict import KNOWLEDGE, conclude, judge

if TYPE_CHECKING:
    from audit.capture import Engine
    from audit.endpoint.address import Endpoint
    from audit.evidence import Evidence, Store
    from audit.opened import OpenModel
    from audit.plan import AnyRequest, Generate, Patched, Request, Weights
    from audit.weights import TensorRow

_NOISE_SAMPLE = 8
_MOST_EXAMPLES = 400
_MOST_IMAGES = 60
_MOST_RESTARTS = 3


@dataclass
class _Run:
    """A scan under way: the instruments still in it, those out of it and why, and what it cost so far."""

    case: Case
    evidence_folder: Path
    progress: Progress
    instruments: list[Instrument]
    not_run: list[NotRun]
    limits: list[str] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)
    inventories: dict[str, Inventory] = field(default_factory=dict)
    stores: dict[tuple[str, str], Store] = field(default_factory=dict)
    shares: bool = False  # its evidence folder, with other scans that may be under way

    def drop(self, instrument: Instrument, error: Exception) -> None:
        """Take a failed instrument out of the scan: a row in `not_run`, never an absence.

        A model folder that turns out unsafe is no instrument's fault: it ends the scan.
        """
        if isinstance(error, Refused):
            raise error
        self.instruments = [i for i in self.instruments if i is not instrument]
        self.not_run.append(_failed(instrument, error))

    def charge(self, instrument: Instrument, seconds: float, tokens: int = 0) -> None:
        """Add to what an instrument cost."""
        cost = self.cost.by_instrument.setdefault(instrument.name, InstrumentCost())
        cost.seconds += seconds
        cost.forward_tokens += tokens


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

        def begin() -> _Run:
            run = _Run(case, kept, progress, *_choose(case, instruments))
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
    begin: Callable[[], _Run], open_target: Callable[..., OpenModel] | None
) -> tuple[_Run, Evidence, list[Finding], list[ExampleRow]]:
    """Capture and measure; where evidence is found damaged after all, begin again with what is left of it."""
    damaged: Counter[str] = Counter()
    for left in reversed(range(_MOST_RESTARTS + 1)):
        run = begin()
        try:
            evidence = _capture_all(run, run.inventories, open_target)
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
    run: _Run,
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


def _interrupted(run: _Run, command: str, began: float) -> Record:
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
        return _capture_all(_Run(case, evidence_folder, progress, chosen, not_run), inventories)


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
            not_run.append(_failed(item, error))
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


def _failed(instrument: Instrument, error: Exception) -> NotRun:
    """The row of an instrument that failed, or that declined by an error made on purpose."""
    reason = str(error) if isinstance(error, AuditError) else f"{type(error).__name__}: {error}"
    failed = not isinstance(error, AuditError)
    return NotRun(instrument=instrument.name, question=instrument.question, reason=reason, failed=failed)


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


# --- capture ------------------------------------------------------------------------------------------------


def _capture_all(
    run: _Run, inventories: dict[str, Inventory], open_target: Callable[..., OpenModel] | None = None
) -> Evidence:
    import torch

    from audit.evidence import Evidence, claimed
    from audit.memory import give_back

    device = run.case.options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if run.case.options.memory is not None:
        give_back()
    evidence = Evidence()
    run.inventories = inventories
    for role in sorted(inventories, key=lambda role: role == "original"):  # last: others' states are put into it
        inventory = inventories[role]
        target = (open_target or _open)(
            role,
            inventory,
            device=device,
            dtype=getattr(torch, run.case.options.dtype),
            template=run.case.options.template,
            limit=run.case.options.memory,
        )
        _withdraw(run, target)
        with claimed(run.evidence_folder, target.digest) if run.shares else nullcontext():
            _capture(run, target, evidence, run.instruments)
            for instrument in [i for i in run.instruments if isinstance(i, Attack)]:
                _attack(run, target, evidence, instrument)
        if target.cut:
            run.limits.append(f"{role}: {target.cut} texts were longer than its context and were cut")
        if unused := target.unused:
            run.limits.append(f"{role}: {len(unused)} tensors that its architecture does not use, {unused[0]} first")
        target.release()
    return evidence


def _withdraw(run: _Run, target: OpenModel) -> None:
    """Take out the attacks that alter a model too large for them, before anything is captured on their behalf."""
    memory = target.memory
    for attack in [i for i in run.instruments if isinstance(i, Attack)]:
        if memory is not None and not memory.holds(attack.copies):
            run.drop(attack, BadInput(memory.lacking(attack.copies)))


def _open(role: str, inventory: Inventory, **options: Any) -> OpenModel:
    """The model of an inventory: behind an API, or of a folder, as what its architecture says it is."""
    from audit.endpoint.probe import Probed

    if isinstance(inventory, Probed):
        from audit.endpoint.target import EndpointTarget

        return EndpointTarget(role, inventory, **options)
    if sees_images(inventory.architecture):
        from audit.image_target import ImageTarget

        return ImageTarget(role, inventory, **options)
    from audit.target import Target

    return Target(role, inventory, **options)


def _capture(run: _Run, target: OpenModel, evidence: Evidence, instruments: Sequence[Instrument]) -> None:
    """Ask the instruments what they need of this model, and run what the store does not hold."""
    from audit.plan import Generate, Patched, Request, Weights

    requests: list[AnyRequest] = []
    patches: list[tuple[Instrument, Patched]] = []
    asked: dict[str, AnyRequest] = {}
    store = _store(run, target)
    for instrument in instruments:
        began = time.monotonic()
        try:
            wanted = [_within(run, instrument, target, r) for r in instrument.requests(run.case, target)]
            if run.case.options.access < Access.LOGPROBS and any(isinstance(r, Request) for r in wanted):
                raise ValueError("asks for log-probabilities, and the audit has access to text only")
            for request in wanted:
                if not _alike(asked.get(request.name, request), request):
                    raise ValueError(f"request {request.name!r} is another instrument's, for other sequences")
            compared = {r.name: _compare(run, target, store, r) for r in wanted if isinstance(r, Weights)}
            asked |= {request.name: request for request in wanted}
        except Incomplete:
            raise
        except Exception as error:  # one instrument's fault must not take the others' findings with it
            run.drop(instrument, error)
            continue
        requests += [request for request in wanted if not isinstance(request, Patched)]
        patches += [(instrument, request) for request in wanted if isinstance(request, Patched)]
        for name, rows in compared.items():
            evidence.add_weights(target.role, name, rows)
        tokens = sum(len(t.ids) for r in wanted if isinstance(r, Request) for t in r.sequences)
        run.charge(instrument, time.monotonic() - began, tokens)
    if not requests and not patches:
        return
    engine = target.engine()
    if forecast := engine.forecast(requests):
        with run.progress.step(forecast, 1) as tick:
            tick(1)
    try:
        _run_scores(run, target, store, engine, [r for r in requests if isinstance(r, Request)])
        _run_generations(run, target, store, engine, [r for r in requests if isinstance(r, Generate)])
        requests += _run_patches(run, evidence, store, engine, patches)
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, MemoryError) as error:
        raise Incomplete(f"{target.inventory.root}: a pass failed: {type(error).__name__}: {error}") from error
    finally:
        halved = _halved(store, engine)
    if halved:
        run.limits.append(f"{target.role}: memory did not suffice for {halved} batches, which ran in halves")
    run.cost.forward_tokens += engine.forward_tokens
    evidence.register(target.role, store, requests)
    for request in requests:
        if isinstance(request, Generate):
            texts = [
                target.decode(store.read_continuation(prompt, request.new_tokens, way))
                for prompt in request.prompts
                for way in request.ways
            ]
            evidence.add_texts(target.role, request.name, texts)
    if "+" not in target.role:
        evidence.noise[target.role] = _noise(store, engine, [r for r in requests if isinstance(r, Request)])


def _within(run: _Run, instrument: Instrument, target: OpenModel, request: AnyRequest) -> AnyRequest:
    """A request without what the model does not give. Raises NoAccess where the instrument cannot spare it."""
    from audit.plan import Request

    lacking = {q.name for q in request.quantities if not target.gives(q)} if isinstance(request, Request) else set()
    if not lacking or not isinstance(request, Request):
        return request
    spared = {finding: q.name for finding, q in instrument.spares.items() if q.name in lacking}
    if unspared := sorted(lacking - set(spared.values())):
        raise NoAccess(
            f"needs {', '.join(unspared)} of next-token distributions, which the {target.role} does not give"
        )
    for finding, name in spared.items():
        row = NotRun(
            instrument=f"{instrument.name}/{finding}",
            question=instrument.question,
            reason=f"needs {name} of next-token distributions, which the {target.role} does not give",
        )
        if row not in run.not_run:
            run.not_run.append(row)
    return replace(request, quantities=tuple(q for q in request.quantities if q.name not in lacking))


def _store(run: _Run, target: OpenModel) -> Store:
    """Where the captures of a model lie."""
    from audit.evidence import Store, context_of

    key = target.role, target.digest
    if key not in run.stores:
        context = context_of(target.digest, dtype=str(target.dtype), device=str(target.device))
        run.stores[key] = Store(run.evidence_folder, context)
    return run.stores[key]


def _compare(run: _Run, target: OpenModel, store: Store, request: Weights) -> list[TensorRow]:
    """A model's weights against another role's, or nothing: as noted in its store, or compared now and noted.

    An altered model has no files: what it has in memory is compared.
    """
    from audit import weights

    if run.case.options.access < Access.WEIGHTS:
        raise ValueError("asks for weights, and the audit has no access to them")
    here = run.inventories[target.role.split("+")[0]]
    there, against = None if request.against is None else run.inventories[request.against], _digest(run, request)
    for inventory in (here,) if there is None else (here, there):
        if inventory.format != "safetensors":
            raise BadInput(f"{inventory.root}: {inventory.format} weights are not compared, only safetensors are")
    rows = weights.recall(store, against)
    if rows is None and "+" in target.role:
        altered = weights.InMemory(target.model)
        other = weights.Zeros(altered) if there is None else weights.Folder(there.root)
        rows = list(weights.compare_tensors(altered, other, device=str(target.device)))
        weights.remember(store, against, rows)
    if rows is None:
        names = {tensor.name for tensor in (*here.tensors, *(() if there is None else there.tensors))}
        with run.progress.step(f"weights of {target.role} against {request.against or 'nothing'}", len(names)) as tick:
            root = None if there is None else there.root
            rows = weights.compare(here.root, root, device=str(target.device), tick=tick)
        weights.remember(store, against, rows)
    return rows


def _digest(run: _Run, request: Weights) -> str:
    """Under what a comparison is noted: the digest of what the weights are compared with."""
    return "nothing" if request.against is None else run.inventories[request.against].digest


def _run_scores(run: _Run, target: OpenModel, store: Store, engine: Engine, requests: list[Request]) -> None:
    from audit.plan import Batch, merge

    batches = engine.batches(merge(requests))
    run.cost.unique_tokens += sum(batch.forward_tokens for batch in batches)

    def missing(batch: Batch) -> bool:
        return not all(store.knows(work.tokens, q) for work in batch.works for q in work.quantities)

    todo = [batch for batch in batches if missing(batch)]
    run.cost.reused_tokens += sum(batch.forward_tokens for batch in batches) - sum(b.forward_tokens for b in todo)
    if not todo:
        return
    with run.progress.step(f"passes through {target.role}", sum(b.forward_tokens for b in todo)) as tick:
        done = 0
        for batch in todo:
            store.write((row.tokens, row.values) for row in engine.run(batch))
            done += batch.forward_tokens
            tick(done)


def _run_generations(run: _Run, target: OpenModel, store: Store, engine: Engine, requests: list[Generate]) -> None:
    todo = [
        (prompts, request)
        for request in {r.name: r for r in requests}.values()
        for prompts in engine.prompt_batches(request)
        if not _continued(store, request, prompts)
    ]
    if not todo:
        return
    with run.progress.step(f"answers of {target.role}", len(todo)) as tick:
        for i, (prompts, request) in enumerate(todo):
            each = [prompt for prompt in prompts for _ in request.ways]
            pairs = list(zip(each, engine.answer(request, prompts), strict=True))
            store.write_continuations(pairs, request.new_tokens, request.ways)
            tick(i + 1)


def _continued(store: Store, request: Generate, prompts: Sequence[tuple[int, ...]]) -> bool:
    """Is all that a request asks for of these prompts recorded?"""
    return all(store.knows_continuation(p, request.new_tokens, way) for p in prompts for way in request.ways)


def _run_patches(
    run: _Run, evidence: Evidence, store: Store, engine: Engine, patches: Sequence[tuple[Instrument, Patched]]
) -> list[Patched]:
    """Go on from other models' states; the requests that could be answered. The instrument of another is dropped."""
    from audit import patching

    answered: list[Patched] = []
    for instrument, request in patches:
        if instrument not in run.instruments:  # dropped for another of its requests
            continue
        try:
            source = evidence.store(request.source)
            if source is None:
                raise BadInput(f"{request.name}: the {request.source} was not captured before")
            todo = patching.missing(request, store, source)
            whole, new = (patching.forward_tokens(request, texts) for texts in (set(request.sequences), todo))
            run.cost.unique_tokens += whole
            run.cost.reused_tokens += whole - new
            run.charge(instrument, 0.0, whole)
            if todo:
                with run.progress.step(f"{request.source} put into {engine.target.role}", len(todo)) as tick:
                    patching.run(engine, request, todo, store, source, tick)
        except BadInput as error:
            run.drop(instrument, error)
        else:
            answered.append(request)
    return answered


def _halved(store: Store, engine: Engine) -> int:
    """How many batches of this model ran in halves, in this scan or in one that was killed before it."""
    known = int(store.note("halved") or 0)
    if engine.halved:
        store.write_note("halved", known + engine.halved)
    return known + engine.halved


def _noise(store: Store, engine: Engine, requests: list[Request]) -> float:
    """Largest difference between captured and plain log-probabilities, over a few texts of all lengths."""
    known = store.note("noise")
    if known is None:
        texts = sorted(
            {t for r in requests for t in r.sequences if any(q.name == "token" for q in r.quantities)},
            key=lambda tokens: (len(tokens.ids), tokens.ids),
        )
        texts = [text for text in texts if engine.affords(text)] or texts[:1]
        sample = texts[:: max(1, len(texts) // _NOISE_SAMPLE)][:_NOISE_SAMPLE]
        known = engine.noise((tokens, store.read(tokens, "token")) for tokens in sample)
        if sample:  # or a scan that scored nothing would tell the next one that there is no noise
            store.write_note("noise", known)
    return known


def _attack(run: _Run, target: OpenModel, evidence: Evidence, attack: Attack) -> None:
    """Visit the altered models of an attack, unless every one's captures are on disk already."""
    began = time.monotonic()
    watching = [attack, *(i for i in run.instruments if attack.name in i.watches)]
    try:
        stages, release = attack.stages(run.case, target), version("palimpsest-audit")
        if not stages:
            return
        altered = [target.altered(stage.name, f"{attack.name}/{release}/{stage.recipe}") for stage in stages]
        complete = True
        for view in altered:
            store = _store(run, view)
            complete = complete and all(
                _holds(run, evidence, store, r) for i in watching for r in i.requests(run.case, view)
            )
        if complete:
            for view in altered:
                _capture(run, view, evidence, watching)
            return
        kind = "attack " if attack.question == Question.RECOVERY else ""
        with run.progress.step(f"{kind}{attack.name}{attack.cost(run.case, target)}", 1000) as tick:
            reached = attack.run(run.case, target, lambda done, total: tick(int(1000 * done / total)))
            for stage, view in zip(reached, altered, strict=True):
                assert view.role.endswith(stage.name), f"{attack.name} reached {stage.name} out of order"
                view.adopt(target)
                if stage.rows:
                    _store(run, view).write(stage.rows)
                _capture(run, view, evidence, [i for i in watching if i in run.instruments])
                view.let_go()  # or the weights of one half would stay while the other is taught
    except Incomplete:
        raise
    except Exception as error:
        run.drop(attack, error)
    finally:
        target.release()
        run.charge(attack, time.monotonic() - began)


def _alike(a: AnyRequest, b: AnyRequest) -> bool:
    """Do two requests of one name ask about the same sequences?"""
    from audit.plan import Request

    if isinstance(a, Request) and isinstance(b, Request):
        return a.sequences == b.sequences
    return a == b


def _holds(run: _Run, evidence: Evidence, store: Store, request: AnyRequest) -> bool:
    from audit import patching, weights
    from audit.plan import Generate, Request, Weights

    if isinstance(request, Request):
        return all(store.knows(tokens, q) for tokens in request.sequences for q in request.quantities)
    if isinstance(request, Generate):
        return _continued(store, request, request.prompts)
    if isinstance(request, Weights):
        return weights.recall(store, _digest(run, request)) is not None
    source = evidence.store(request.source)
    return source is not None and not patching.missing(request, store, source)


# --- measure ------------------------------------------------------------------------------------------------


def _measure_all(run: _Run, evidence: Evidence) -> tuple[list[Finding], list[ExampleRow]]:
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
