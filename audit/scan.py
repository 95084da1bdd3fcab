"""A scan: case -> plan -> capture -> measure -> judge -> record.

One model is in memory at a time. For each role, the instruments say what they need of it, the plan merges that,
and the engine runs what the evidence store does not hold yet; attacks then alter the model and ask again. Only
when all evidence lies on disk are findings computed. A killed scan starts again at the first missing batch, with
the same batches, and ends in the same record.
"""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audit.case import Case
from audit.errors import AuditError, BadInput, Incomplete
from audit.instrument import Access, Attack, Broken, Instrument, select
from audit.inventory import Inventory, sees_images, take_inventory
from audit.profile import Domain, Profile, fitting, shipped
from audit.progress import SILENT, Progress
from audit.record import (
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
    write_atomically,
)
from audit.verdict import KNOWLEDGE, conclude, judge

if TYPE_CHECKING:
    from audit.capture import Engine
    from audit.evidence import Evidence, Store
    from audit.opened import OpenModel
    from audit.plan import AnyRequest, Generate, Patched, Request, Weights
    from audit.weights import TensorRow

_NOISE_SAMPLE = 8
_MOST_EXAMPLES = 400
_MOST_IMAGES = 60


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
    shares: bool = False  # its evidence folder, with other scans that may be under way

    def drop(self, instrument: Instrument, error: Exception) -> None:
        """Take a failed instrument out of the scan: a row in `not_run`, never an absence."""
        self.instruments = [i for i in self.instruments if i is not instrument]
        reason = str(error) if isinstance(error, AuditError) else f"{type(error).__name__}: {error}"
        failed = not isinstance(error, AuditError)
        self.not_run.append(
            NotRun(instrument=instrument.name, question=instrument.question, reason=reason, failed=failed)
        )

    def charge(self, instrument: Instrument, seconds: float, tokens: int = 0) -> None:
        """Add to what an instrument cost."""
        cost = self.cost.by_instrument.setdefault(instrument.name, InstrumentCost())
        cost.seconds += seconds
        cost.forward_tokens += tokens


def take_inventories(case: Case, progress: Progress = SILENT) -> dict[str, Inventory]:
    """The inventory of every model folder; raises `Refused` before anything of them is opened."""
    found = {}
    for role, path in case.models.items():
        with progress.step(f"inventory of {role}", 1) as tick:
            found[role] = take_inventory(path)
            tick(1)
    return found


def scan(
    case: Case,
    out: Path,
    *,
    progress: Progress = SILENT,
    command: str = "",
    open_target: Callable[..., OpenModel] | None = None,
    evidence_folder: Path | None = None,
    profiles: Sequence[Profile] | None = None,
) -> Record:
    """Audit `case`, keep evidence and record in `out`, and return the record.

    `evidence_folder` is where evidence is kept instead, for scans that share an original. Of `profiles` (those that
    come with the package, if not given) the first that fits the case sets the thresholds.
    Models are opened by `open_target(role, inventory, device=..., dtype=..., template=...)`; if not given, as the
    language models or image classifiers that they are: nothing else in a folder can make it another.

    Raises:
        Refused: a model folder is unsafe or not whole.
        BadInput: the case cannot be audited as given.
        Incomplete: a pass through a model failed.
    """
    began = time.monotonic()
    inventories = take_inventories(case, progress)
    for inventory in inventories.values():
        if sees_images(inventory.architecture) != (case.modality == "image"):
            held = "images" if case.modality == "image" else "no images"
            raise BadInput(f"{inventory.root}: {inventory.architecture} does not fit the sets, which hold {held}")
    run = _Run(case, evidence_folder or out / "evidence", progress, *_choose(case))
    run.shares = evidence_folder is not None
    run.limits += _limits(case)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "case.toml", case.to_toml().encode())
    evidence = _capture_all(run, inventories, open_target)
    findings, examples = _measure_all(run, evidence)
    models = {role: inventory.to_entry(case.models[role].name) for role, inventory in inventories.items()}
    profile, misfits = fitting(_domain(case, findings, models), shipped() if profiles is None else profiles)
    if profile is not None and (unmeasured := profile.unmeasured(findings)):
        named = ", ".join(unmeasured)
        misfits.append(f"decide nothing, for profile {profile.name} has not measured them: {named}")
    judged = judge(findings if profile is None else profile.applied(findings))
    run.cost.seconds = time.monotonic() - began
    run.cost.peak_memory_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    record = Record(
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
    record.write(out / "record.json")
    return record


def _choose(case: Case) -> tuple[list[Instrument], list[NotRun]]:
    chosen: list[Instrument] = []
    not_run: list[NotRun] = []
    for item in select(case.options.only, case.options.skip):
        if isinstance(item, Instrument) and item.modality not in (case.modality, "any"):
            continue  # no part of an audit of this kind of model
        if isinstance(item, Broken):
            not_run.append(NotRun(instrument=item.name, reason=item.reason, failed=True))
        elif reason := item.missing(case):
            not_run.append(NotRun(instrument=item.name, question=item.question, reason=reason))
        else:
            chosen.append(item)
            not_run += [
                NotRun(instrument=finding, question=item.question, reason=reason)
                for finding, reason in item.withheld(case).items()
            ]
    return chosen, not_run


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

    device = run.case.options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
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
        )
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


def _open(role: str, inventory: Inventory, **options: Any) -> OpenModel:
    """The model of a folder, as what its architecture says it is."""
    if sees_images(inventory.architecture):
        from audit.image_target import ImageTarget

        return ImageTarget(role, inventory, **options)
    from audit.target import Target

    return Target(role, inventory, **options)


def _capture(run: _Run, target: OpenModel, evidence: Evidence, instruments: Sequence[Instrument]) -> None:
    """Ask the instruments what they need of this model, and run what the store does not hold."""
    from audit.capture import Engine
    from audit.plan import Generate, Patched, Request, Weights

    requests: list[AnyRequest] = []
    patches: list[tuple[Instrument, Patched]] = []
    asked: dict[str, AnyRequest] = {}
    store = _store(run, target)
    for instrument in instruments:
        began = time.monotonic()
        try:
            wanted = list(instrument.requests(run.case, target))
            if run.case.options.access < Access.LOGPROBS and any(isinstance(r, Request) for r in wanted):
                raise ValueError("asks for log-probabilities, and the audit has access to text only")
            for request in wanted:
                if not _alike(asked.get(request.name, request), request):
                    raise ValueError(f"request {request.name!r} is another instrument's, for other sequences")
            compared = {r.name: _compare(run, target, store, r) for r in wanted if isinstance(r, Weights)}
            asked |= {request.name: request for request in wanted}
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
    if store.damaged:
        run.limits.append(f"evidence of {target.role}: {len(store.damaged)} damaged blocks set aside, computed again")
    engine = Engine(target)
    try:
        _run_scores(run, target, store, engine, [r for r in requests if isinstance(r, Request)])
        _run_generations(run, target, store, engine, [r for r in requests if isinstance(r, Generate)])
        requests += _run_patches(run, evidence, store, engine, patches)
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise Incomplete(f"{target.inventory.root}: a pass failed: {type(error).__name__}: {error}") from error
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


def _store(run: _Run, target: OpenModel) -> Store:
    """Where the captures of a model lie."""
    from audit.evidence import Store, context_of

    return Store(run.evidence_folder, context_of(target.digest, dtype=str(target.dtype), device=str(target.device)))


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


def _noise(store: Store, engine: Engine, requests: list[Request]) -> float:
    """Largest difference between captured and plain log-probabilities, over a few texts of all lengths."""
    known = store.note("noise")
    if known is None:
        texts = sorted(
            {t for r in requests for t in r.sequences if any(q.name == "token" for q in r.quantities)},
            key=lambda tokens: (len(tokens.ids), tokens.ids),
        )
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
                found = instrument.measure(run.case, evidence)
                for row, values in instrument.examples(run.case, evidence).items():
                    drill.setdefault(row, {}).update(values)
                findings += found
            except Exception as error:
                run.drop(instrument, error)
            run.charge(instrument, time.monotonic() - began)
            tick(i + 1)
    return findings, _examples(run.case, drill)


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
