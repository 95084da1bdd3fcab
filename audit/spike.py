"""The spike-in control: synthetic facts are planted in copies of the very model under audit, hidden, and looked for.

    record = scan(case, out)
    record = spike_in(record, case, out)          # adds `record.spike`, and a line to the verdict's limits

An analytical laboratory adds a known amount of what it looks for to the very sample, and tells how much of it its
method recovers there. So here: every copy's truth is known from how it was made (`audit.organisms.spikes`), and every
copy is scanned by the same engine with the same instruments, with sets of its own.

| copy | forget set | truth |
|---|---|---|
| `planted` | people planted | not unlearned |
| `npo`, `refusal-last-block` | people planted, then hidden by that method in the upper blocks | suppressed |
| `never-planted` | people never planted, in the planted copy | deleted: nothing is there |

Copies and scans lie under `OUT/spike/`, each scan an audit folder of its own, each copy in `model` of its. A copy is
found again by the digest of all that determines it, so an interrupted control goes on where it was. The audited
folder is only read.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from audit.case import Budget, Case, Options
from audit.errors import AuditError, BadInput, Incomplete
from audit.holding import held
from audit.instrument import Access
from audit.inventory import Inventory, take_inventory
from audit.loaders import SetSpec
from audit.offline import network_closed
from audit.progress import SILENT, Progress, Tick
from audit.record import (
    INTERRUPTED,
    InstrumentCost,
    Label,
    NotRun,
    Outcome,
    Question,
    Record,
    Side,
    Spike,
    SpikeCell,
    SpikeCopy,
    SpikeRate,
    SpikeRow,
)
from audit.statistics import clopper_pearson
from audit.verdict import KNOWLEDGE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from audit.organisms.spikes import Outcome as Made
    from audit.organisms.spikes import Settings, Spikes
    from audit.organisms.train import Encoded
    from audit.profile import Profile
    from audit.target import Target

NAME = "spike-in control"
VERSION = 1
"""Raised when a change of this module, or of `audit.organisms.spikes`, changes what a copy is."""

PLANTED, NEVER = "planted", "never-planted"
SEEN = (Label.NOT_UNLEARNED, Label.SUPPRESSED)
"""The verdicts that say that knowledge is left."""

_OWN_ROWS = 120
"""Rows of the audit's retain set, half of them mixed in, half of them to measure the harm on."""
_MEASURED_TOKENS = 128
"""How much of each of the latter."""


def spike_in(
    record: Record,
    case: Case,
    out: Path,
    *,
    progress: Progress = SILENT,
    settings: Settings | None = None,
    profiles: Sequence[Profile] | None = None,
) -> Record:
    """The record of `case` with the spike-in control in it, made under `out`; also written to `out`.

    The copies are judged by `profiles`, as in `audit.scan.scan`. A control that cannot run is a row in `not_run` with
    its reason, and a line in the verdict's limits.

    Raises:
        Incomplete: a pass through a copy failed.
    """
    began = time.monotonic()
    record = record.model_copy(deep=True)
    with held(out):
        try:
            with network_closed():
                found, tokens = _control(case, out / "spike", progress, settings, profiles)
        except Incomplete:
            raise
        except KeyboardInterrupt:
            record.not_run.append(NotRun(instrument=NAME, reason=INTERRUPTED, failed=True))
            record.write(out / "record.json")
            raise
        except Exception as error:  # its fault must not take the audit's findings with it
            reason = str(error) if isinstance(error, AuditError) else f"{type(error).__name__}: {error}"
            record.not_run.append(NotRun(instrument=NAME, reason=reason, failed=not isinstance(error, AuditError)))
            record.verdict.limits.append(f"the {NAME} did not run: {reason}")
        else:
            record.spike = found
            record.verdict.limits.append(found.statement)
            record.cost.by_instrument[NAME] = InstrumentCost(seconds=time.monotonic() - began, forward_tokens=tokens)
        record.cost.seconds += time.monotonic() - began
        record.write(out / "record.json")
    return record


def _control(
    case: Case, root: Path, progress: Progress, settings: Settings | None, profiles: Sequence[Profile] | None
) -> tuple[Spike, int]:
    """Make the copies, scan them, sum up; and the tokens that went through models for it."""
    from audit.scan import scan

    if case.options.access < Access.WEIGHTS:
        raise BadInput(f"needs access to weights, the audit has {case.options.access.name.lower()}")
    if case.options.memory is not None:
        raise BadInput("trains copies of the model, and keeps to no bound on memory")
    with progress.step("spike: inventory of target", 1) as tick:
        bench = _Bench.open(case, case.inventoried("target"), root, settings)
        tick(1)
    copies = bench.build(progress)
    records: dict[str, Record] = {}
    for i, each in enumerate(copies):
        if each.failed:
            continue
        record = scan(
            bench.case_of(each.name),
            root / each.name,
            progress=_Prefixed(progress, f"spike {each.name}"),
            evidence_folder=root / _model_of(each.name) / "evidence",
            profiles=profiles,
        )
        records[each.name] = record
        copies[i] = each.model_copy(update={"verdict": record.verdict.label, "digest": record.models["target"].digest})
    facts = len(bench.spikes.world.rows("forget"))
    found = summarize(copies, {n: readings(r) for n, r in records.items()}, bench.settings.people, facts)
    return found, sum(record.cost.forward_tokens for record in records.values())


# --- the copies ---------------------------------------------------------------------------------------------


@dataclass
class _Bench:
    """What all copies have in common."""

    case: Case
    target: Target
    root: Path
    settings: Settings
    spikes: Spikes
    mixed: Encoded | None
    spared: Encoded | None
    sets: Mapping[str, Path]

    @classmethod
    def open(cls, case: Case, inventory: Inventory, root: Path, settings: Settings | None) -> _Bench:
        """Invent the people, and write their sets. Raises `BadInput` where the tokenizer lacks the words."""
        from audit.organisms.demo import write_jsonl
        from audit.organisms.spikes import Settings, from_tokens, invent
        from audit.organisms.train import encode
        from audit.target import Target

        target = Target("target", inventory, template=case.options.template)
        text = "\n".join(
            part for rows in case.sets.values() for row in rows for part in (row.prompt, row.answer, row.entity)
        )
        settings = settings or Settings()
        spikes = invent(target.tokenizer, settings, seed=case.options.seed, avoid=lambda name: name in text)
        groups = {name: spikes.world.rows(name) for name in ("forget", "retain", "holdout")}
        groups["never"] = spikes.negative.rows("forget")
        sets = {name: write_jsonl(root / "data" / f"{name}.jsonl", rows) for name, rows in groups.items()}
        # As wide as the spikes: longer rows among them would make every batch as long.
        widths = (encode(target.tokenizer, spikes.world.rows("forget", every=True)).ids.shape[1], _MEASURED_TOKENS)
        halves: list[Encoded | None] = [None, None]
        if "retain" in case.sets:
            rows = case.rows("retain", _OWN_ROWS)
            entities = sorted({*case.clusters(rows)})
            for i in range(2):
                chosen = [r for r, c in zip(rows, case.clusters(rows), strict=True) if entities.index(c) % 2 == i]
                if chosen:
                    texts = [target.encode(r.prompt, r.answer) for r in chosen]
                    halves[i] = from_tokens(texts, target.padding_id, most=widths[i])
        return cls(case, target, root, settings, spikes, halves[0], halves[1], sets)

    def build(self, progress: Progress) -> list[SpikeCopy]:
        """Every copy, made now or found again; if the facts cannot be planted, that one alone."""
        from audit.organisms.spikes import METHODS

        planted = self._found_or_made(PLANTED, "planted by an adapter of the lower blocks", self._plant, progress)
        copies = [SpikeCopy(name=PLANTED, truth=Label.NOT_UNLEARNED, present=True, **planted)]
        if copies[0].failed:
            return copies
        for name in METHODS:
            made = f"planted, then hidden by {name} in the upper blocks"
            story = self._found_or_made(name, made, partial(self._hide, name), progress)
            copies.append(SpikeCopy(name=name, truth=Label.SUPPRESSED, present=True, **story))
        never = {"made": "people never planted, asked about in the planted copy", "measured": {}}
        never["measured"] = {k: v for k, v in copies[0].measured.items() if k in ("retain", "holdout", "never")}
        return [*copies, SpikeCopy(name=NEVER, truth=Label.DELETED, present=False, **never)]

    def case_of(self, name: str) -> Case:
        """The case that scans a copy: its own sets, the audit's instruments, the quick budget."""
        folder = self.root / _model_of(name) / "model"
        sets = {"forget": self.sets["never" if name == NEVER else "forget"]}
        sets |= {each: self.sets[each] for each in ("retain", "holdout")}
        options: Options = replace(self.case.options, budget=Budget.QUICK, template="plain")
        specs = {each: SetSpec(path) for each, path in sets.items()}
        return Case.build({"target": folder}, specs, options, f"spike: {name}")

    def _found_or_made(
        self, name: str, made: str, make: Callable[[Any], tuple[PreTrainedModel, Made]], progress: Progress
    ) -> dict[str, Any]:
        """A copy's story, from its folder if it is the same copy, else from making it."""
        from audit.organisms.train import HISTORY, candidate_accuracy, save

        folder, digest = self.root / name / "model", self._digest(name)
        try:
            story = json.loads((folder / HISTORY).read_text("utf-8"))
        except (OSError, json.JSONDecodeError):
            story = {}
        if story.get("digest") != digest:
            with progress.step(f"spike: {name}", 1000) as tick:
                model, outcome = make(lambda done, total: tick(int(1000 * done / total)))
            measured: dict[str, float | None] = {"forget": outcome.forget, "retain": outcome.retain}
            rows = {"holdout": self.spikes.world.rows("holdout"), "never": self.spikes.negative.rows("forget")}
            measured |= {k: candidate_accuracy(model, self.target.tokenizer, v) for k, v in rows.items()}
            measured |= self._harm(model)
            story = {"schema": "palimpsest/spike/1", "digest": digest, "made": made, "steps": outcome.steps,
                     "measured": measured, "failed": outcome.failed}  # fmt: skip
            unfinished = folder.with_name(".model.tmp")
            shutil.rmtree(unfinished, ignore_errors=True)
            save(model, self.target.tokenizer, unfinished, story)
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)
            del model
            gc.collect()
        return {key: story[key] for key in ("made", "measured", "failed")}

    def _digest(self, name: str) -> str:
        """SHA-256 of all that determines a copy."""
        from audit.organisms import unlearn
        from audit.organisms.spikes import METHODS

        method = [METHODS[name], repr(unlearn.load(name))] if name in METHODS else []
        own = self.case.sets["retain"].digest if "retain" in self.case.sets else ""
        data = [hashlib.sha256(path.read_bytes()).hexdigest() for path in self.sets.values()]
        options = [self.case.options.seed, self.target.template, self.case.options.budget.value]
        parts = [VERSION, self.target.digest, repr(self.settings), name, method, own, data, options]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _plant(self, tick: Any) -> tuple[PreTrainedModel, Made]:
        from audit.organisms.spikes import plant

        _, model, seed = self._before, self.target.model, self.case.options.seed
        try:
            return plant(model, self.target.tokenizer, self.spikes, self.settings, self.mixed, seed=seed, progress=tick)
        finally:
            self.target.release()  # it was planted in: whoever asks again reads the audited weights from disk

    def _hide(self, name: str, tick: Any) -> tuple[PreTrainedModel, Made]:
        from audit.organisms.spikes import hide
        from audit.target import Target

        planted = Target("target", take_inventory(self.root / PLANTED / "model"), template="plain").model
        seed = self.case.options.seed + 1
        return hide(
            name, planted, self.target.tokenizer, self.spikes, self.settings, self.mixed, seed=seed, progress=tick
        )

    @cached_property
    def _before(self) -> float | None:
        """The target's loss on the audit's own retain rows that are not mixed in, nats a token."""
        from audit.organisms.spikes import nats

        return None if self.spared is None else nats(self.target.model, self.spared)

    def _harm(self, model: PreTrainedModel) -> dict[str, float | None]:
        """That loss before and after; nothing without a retain set."""
        from audit.organisms.spikes import nats

        if self.spared is None:
            return {}
        harm = {"own_loss_before": self._before, "own_loss_after": nats(model, self.spared)}
        self.target.release()
        return harm


def _model_of(name: str) -> str:
    """Whose model a scan is of: people never planted are asked about in the planted copy, which saves passes."""
    return PLANTED if name == NEVER else name


class _Prefixed:
    """Progress whose labels say which copy is scanned."""

    def __init__(self, progress: Progress, prefix: str) -> None:
        self._progress, self._prefix = progress, prefix

    def step(self, label: str, total: int) -> AbstractContextManager[Tick]:
        return self._progress.step(f"{self._prefix}: {label}", total)


# --- summing up ---------------------------------------------------------------------------------------------


class Reading(NamedTuple):
    """One instrument in one scan."""

    question: Question | None
    cell: SpikeCell


def readings(record: Record) -> dict[str, Reading]:
    """What each instrument of a scan said, by its loudest finding; those that did not run say nothing."""
    found: dict[str, Reading] = {}
    for finding in sorted(record.findings, key=lambda f: _loudness(f.verdict, f.side)):
        cell = SpikeCell(outcome=finding.verdict, side=finding.side, finding=finding.id, reason=finding.reason)
        found.setdefault(finding.instrument, Reading(finding.question, cell))
    for row in record.not_run:
        found.setdefault(row.instrument, Reading(row.question, SpikeCell(outcome=None, reason=row.reason)))
    return found


def _loudness(outcome: Outcome, side: Side) -> tuple[int, int]:
    """Evidence that knowledge remains first; one inconclusive finding outweighs any silence."""
    loud = (Outcome.EVIDENCE, Outcome.INCONCLUSIVE, Outcome.NONE)
    return loud.index(outcome), 0 if side == Side.REMAINS else 1


def summarize(
    copies: Sequence[SpikeCopy], outcomes: Mapping[str, Mapping[str, Reading]], people: int, facts: int
) -> Spike:
    """The table of instruments and copies, and the rates: of copies with planted facts, of copies without.

    A copy that failed counts nowhere. An instrument that ran on some copies has not seen what it did not run on.
    """
    good = [copy for copy in copies if not copy.failed]
    questions: dict[str, Question | None] = {}
    for copy in good:
        for name, reading in outcomes[copy.name].items():
            questions.setdefault(name, reading.question)
    order = {question: i for i, question in enumerate(Question)}
    absent = Reading(None, SpikeCell(outcome=None, reason="not among this scan's instruments"))
    rows = []
    for name, question in sorted(questions.items(), key=lambda q: (order.get(q[1], 9) if q[1] else 9, q[0])):
        cells = {copy.name: outcomes[copy.name].get(name, absent).cell for copy in good}
        row = SpikeRow(instrument=name, question=question, cells=cells)
        if question in KNOWLEDGE and any(cell.outcome is not None for cell in cells.values()):
            saw = {copy: cell.outcome == Outcome.EVIDENCE and cell.side == Side.REMAINS for copy, cell in cells.items()}
            row.recovered, row.false_alarms = (
                _rate([saw[c.name] for c in good if c.present == p]) for p in (True, False)
            )
        rows.append(row)
    recovered, alarms = (_rate([c.verdict in SEEN for c in good if c.present == p]) for p in (True, False))
    return Spike(
        people=people,
        facts=facts,
        copies=list(copies),
        rows=rows,
        recovered=recovered,
        false_alarms=alarms,
        statement=_statement(copies, recovered, alarms),
    )


def _rate(saw: Sequence[bool]) -> SpikeRate:
    return SpikeRate(seen=sum(saw), of=len(saw), ci95=clopper_pearson(sum(saw), len(saw)))


def _statement(copies: Sequence[SpikeCopy], recovered: SpikeRate, alarms: SpikeRate) -> str:
    """What the spikes showed, in one line."""
    failed = "; ".join(f"{copy.name}: {copy.failed}" for copy in copies if copy.failed)
    if not recovered.of:
        return f"the {NAME} shows nothing: {failed or 'no copy was made'}"
    lo, hi = recovered.ci95
    said = (
        f"{NAME}, on copies of this model: of {_models(recovered.of)} with planted facts, "
        f"{_were(recovered.seen)} called {SEEN[0].value} or {SEEN[1].value} (95 % interval of the "
        f"share {lo:.2f} to {hi:.2f}); of {_models(alarms.of)} asked about facts never planted, {_were(alarms.seen)}"
    )
    return said + (f"; failed, and showing nothing: {failed}" if failed else "")


def _were(count: int) -> str:
    return f"{count} {'was' if count == 1 else 'were'}"


def _models(count: int) -> str:
    return f"{count} model{'' if count == 1 else 's'}"
