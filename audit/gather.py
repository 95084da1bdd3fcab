"""What a scan captures: every model opened in turn, what instruments ask of it run and kept, attacks visited.

One model is in memory at a time. For each role, the instruments say what they need of it, the plan merges that, and the
engine runs what the evidence store does not hold yet; attacks then alter the model and ask again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audit.case import Case
from audit.errors import AuditError, BadInput, Incomplete, NoAccess, Refused
from audit.instrument import Access, Attack, Instrument
from audit.inventory import Inventory, sees_images
from audit.progress import Progress
from audit.record import Cost, InstrumentCost, NotRun, Question

if TYPE_CHECKING:
    from audit.capture import Engine
    from audit.evidence import Evidence, Store
    from audit.opened import OpenModel
    from audit.plan import AnyRequest, Generate, Patched, Request, Weights
    from audit.weights import TensorRow

_NOISE_SAMPLE = 8


@dataclass
class Run:
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
        self.not_run.append(failed_row(instrument, error))

    def charge(self, instrument: Instrument, seconds: float, tokens: int = 0) -> None:
        """Add to what an instrument cost."""
        cost = self.cost.by_instrument.setdefault(instrument.name, InstrumentCost())
        cost.seconds += seconds
        cost.forward_tokens += tokens


def failed_row(instrument: Instrument, error: Exception) -> NotRun:
    """The row of an instrument that failed, or that declined by an error made on purpose."""
    reason = str(error) if isinstance(error, AuditError) else f"{type(error).__name__}: {error}"
    failed = not isinstance(error, AuditError)
    return NotRun(instrument=instrument.name, question=instrument.question, reason=reason, failed=failed)


def capture_all(
    run: Run, inventories: dict[str, Inventory], open_target: Callable[..., OpenModel] | None = None
) -> Evidence:
    """Everything that the run's instruments ask for, of every model; those that fail are dropped from the run.

    Raises:
        Refused: a folder turned out unsafe, or changed.
        Incomplete: a pass failed, or what it gave cannot be kept.
    """
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
        target = (open_target or open_model)(
            role,
            inventory,
            device=device,
            dtype=getattr(torch, run.case.options.dtype),
            template=run.case.options.template,
            limit=run.case.options.memory,
        )
        _withdraw(run, target)
        with claimed(run.evidence_folder, target.digest) if run.shares else nullcontext():
            capture_one(run, target, evidence, run.instruments)
            for instrument in [i for i in run.instruments if isinstance(i, Attack)]:
                visit(run, target, evidence, instrument)
        if target.cut:
            run.limits.append(f"{role}: {target.cut} texts were longer than its context and were cut")
        if unused := target.unused:
            run.limits.append(f"{role}: {len(unused)} tensors that its architecture does not use, {unused[0]} first")
        target.release()
    return evidence


def _withdraw(run: Run, target: OpenModel) -> None:
    """Take out the attacks that alter a model too large for them, before anything is captured on their behalf."""
    memory = target.memory
    for attack in [i for i in run.instruments if isinstance(i, Attack)]:
        if memory is not None and not memory.holds(attack.copies):
            run.drop(attack, BadInput(memory.lacking(attack.copies)))


def open_model(role: str, inventory: Inventory, **options: Any) -> OpenModel:
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


def capture_one(run: Run, target: OpenModel, evidence: Evidence, instruments: Sequence[Instrument]) -> None:
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


def _within(run: Run, instrument: Instrument, target: OpenModel, request: AnyRequest) -> AnyRequest:
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


def _store(run: Run, target: OpenModel) -> Store:
    """Where the captures of a model lie."""
    from audit.evidence import Store, context_of

    key = target.role, target.digest
    if key not in run.stores:
        context = context_of(target.digest, dtype=str(target.dtype), device=str(target.device))
        run.stores[key] = Store(run.evidence_folder, context)
    return run.stores[key]


def _compare(run: Run, target: OpenModel, store: Store, request: Weights) -> list[TensorRow]:
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


def _digest(run: Run, request: Weights) -> str:
    """Under what a comparison is noted: the digest of what the weights are compared with."""
    return "nothing" if request.against is None else run.inventories[request.against].digest


def _run_scores(run: Run, target: OpenModel, store: Store, engine: Engine, requests: list[Request]) -> None:
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


def _run_generations(run: Run, target: OpenModel, store: Store, engine: Engine, requests: list[Generate]) -> None:
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
    run: Run, evidence: Evidence, store: Store, engine: Engine, patches: Sequence[tuple[Instrument, Patched]]
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


def visit(run: Run, target: OpenModel, evidence: Evidence, attack: Attack) -> None:
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
                capture_one(run, view, evidence, watching)
            return
        kind = "attack " if attack.question == Question.RECOVERY else ""
        with run.progress.step(f"{kind}{attack.name}{attack.cost(run.case, target)}", 1000) as tick:
            reached = attack.run(run.case, target, lambda done, total: tick(int(1000 * done / total)))
            for stage, view in zip(reached, altered, strict=True):
                assert view.role.endswith(stage.name), f"{attack.name} reached {stage.name} out of order"
                view.adopt(target)
                if stage.rows:
                    _store(run, view).write(stage.rows)
                capture_one(run, view, evidence, [i for i in watching if i in run.instruments])
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


def _holds(run: Run, evidence: Evidence, store: Store, request: AnyRequest) -> bool:
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
