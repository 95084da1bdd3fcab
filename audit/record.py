"""The record: everything an audit found, as one JSON document (`record.json`).

The record is the product. The report, the exit code and every later face of an audit are pure functions of
it, so this module holds its schema and nothing else: no torch, no numpy, no model. Times and costs apart,
the same case and seed give the same record.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from audit.errors import BadInput, Unwritable

if TYPE_CHECKING:
    from pandas import DataFrame

SCHEMA_VERSION = "1.0"

INTERRUPTED = "interrupted: the same command goes on from here"
"""The reason, and the limit, in the record of a scan that was broken off."""


class Question(StrEnum):
    """The five questions that an audit answers, in the order of the report."""

    TRACE = "trace"
    LEAKAGE = "leakage"
    REPRESENTATION = "representation"
    RECOVERY = "recovery"
    UTILITY = "utility"


class Outcome(StrEnum):
    """What one finding says. `NONE` needs the power to have seen something: an interval inside the threshold."""

    EVIDENCE = "evidence"
    NONE = "none"
    INCONCLUSIVE = "inconclusive"


class Side(StrEnum):
    """What evidence shows; for knowledge, on which side of a never-taught model it lies."""

    REMAINS = "remains"  # more than a model that never saw the data: knowledge is left
    BEYOND = "beyond"  # less than such a model: over-unlearning, or an edit of the output
    DAMAGE = "damage"  # something other than the forget set was changed
    UNLEARNED = "unlearned"  # marks that unlearning leaves, and ordinary edits do not
    EVASION = "evasion"  # what was read contradicts itself: somebody, or something, was made to pass a test
    NEITHER = "neither"


class Label(StrEnum):
    """The overall verdict."""

    NOT_UNLEARNED = "not-unlearned"
    SUPPRESSED = "suppressed"
    DELETED = "deleted"
    OVER_UNLEARNED = "over-unlearned"
    INCONCLUSIVE = "inconclusive"


def _finite_or_none(value: Any) -> Any:
    """JSON has no NaN: a number that could not be computed is recorded as null, never as a zero."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


MaybeNumber = Annotated[float | None, BeforeValidator(_finite_or_none)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Control(_Model):
    """One control beside a finding: what it was, what it gave, and whether it leaves the finding valid."""

    name: str
    description: str
    estimate: MaybeNumber = None
    ci95: tuple[MaybeNumber, MaybeNumber] | None = None
    n: int | None = None
    passed: bool | None = Field(default=None, description="null: recorded for comparison, gates nothing")
    gates: Literal["evidence", "silence"] | None = Field(
        default=None, description="what cannot be claimed while this control fails"
    )


class Table(_Model):
    """A small table that belongs to a finding (and to its figure, as the figure's text alternative)."""

    columns: list[str]
    rows: list[list[str | int | MaybeNumber]]


class Series(_Model):
    """One line of a figure: y over x, with an optional 95 % band."""

    label: str
    x: list[float]
    y: list[MaybeNumber]
    lo: list[MaybeNumber] | None = None
    hi: list[MaybeNumber] | None = None
    role: str = Field(default="target", description="target | control | reference: sets the line's style")


class Figure(_Model):
    """A plot described by its data; the report draws it. `kind`: profile, distribution or bars."""

    kind: str
    title: str
    alt: str
    x_label: str
    y_label: str
    series: list[Series]
    ticks: list[str] = Field(default_factory=list, description="names of x = 0, 1, …, where they are no numbers")
    reference_lines: dict[str, float] = Field(default_factory=dict)


class Finding(_Model):
    """One measured statistic with its uncertainty, its control and what it says."""

    id: str = Field(description="stable: instrument/statistic[/split]")
    instrument: str
    question: Question
    statistic: str = Field(description="what was computed, in the field's terms")
    split: str = Field(description="the sets compared, e.g. 'forget vs holdout'")
    layer: str | None = Field(default=None, description="layer or step of the estimate, as 'after block 3'")
    estimate: MaybeNumber
    ci95: tuple[MaybeNumber, MaybeNumber]
    level: MaybeNumber = Field(default=None, description="the statistic on the target's forget rows by themselves")
    bound: MaybeNumber = Field(
        default=None,
        description="largest value not ruled out on the alarming side, where it is not the interval's end: over "
        "layers, the largest pointwise upper end (an intersection-union test needs no correction)",
    )
    n: int = Field(description="independent units behind the estimate")
    unit: str = Field(default="", description="of the estimate, e.g. 'accuracy', 'nats', 'AUC'")
    orientation: str = Field(description="what a larger value means")
    null: str = Field(description="the null hypothesis in words")
    null_value: float = 0.0
    p_value: MaybeNumber = None
    smallest_p: MaybeNumber = Field(default=None, description="the least p-value so few entities can give")
    p_adjusted: MaybeNumber = Field(default=None, description="Holm, across the findings of this question")
    noise: float = Field(default=0.0, description="measured numeric noise of a log-probability, nats")
    threshold: float = Field(description="smallest distance from null_value that counts as an effect")
    fitted: tuple[float, float] | None = Field(
        default=None,
        description="distance above, and below, null_value from which on there is evidence, as fitted on models of "
        "known history; null: the threshold",
    )
    decides: tuple[bool, bool] = Field(
        default=(True, False),
        description="whether evidence above, and below, the null value can decide a verdict alone: false where an edit "
        "of the output does the same to a model that knows nothing",
    )
    sides: tuple[Side, Side] = Field(
        default=(Side.REMAINS, Side.BEYOND),
        description="what evidence above, and below, the null value means",
    )
    verdict: Outcome = Outcome.INCONCLUSIVE
    side: Side = Side.NEITHER
    reason: str = Field(default="", description="why the verdict is what it is, in plain words")
    controls: list[Control] = Field(default_factory=list)
    reference: str = Field(description="the paper the statistic comes from")
    figure: Figure | None = None
    table: Table | None = None

    def reach(self) -> float | None:
        """The largest effect that the interval allows towards sides that raise an alarm; either way if none does."""
        lo, hi = self.ci95
        if lo is None or hi is None:
            return None
        effects = ((hi if self.bound is None else self.bound) - self.null_value, self.null_value - lo)
        alarming = (Side.REMAINS, Side.DAMAGE, Side.UNLEARNED, Side.EVASION)
        towards = [effect for effect, side in zip(effects, self.sides, strict=True) if side in alarming]
        return max(towards or [hi - self.null_value, self.null_value - lo])

    def known_effect(self) -> float | None:
        """What the statistic shows where the effect certainly is: its positive control, if that passed."""
        seen = (c.estimate for c in self.controls if c.name == "positive control" and c.passed)
        return next((estimate - self.null_value for estimate in seen if estimate is not None), None)

    def row(self) -> dict[str, str | int | float | None]:
        """The finding as one row of a table: `FINDING_COLUMNS`, without figure, table and the controls' words."""
        known = [control.passed for control in self.controls]
        values: dict[str, Any] = {
            "ci95_low": self.ci95[0],
            "ci95_high": self.ci95[1],
            "controls_passed": known.count(True),
            "controls_failed": known.count(False),
            "larger_means": self.orientation,
            "null_hypothesis": self.null,
        }
        values |= {name: getattr(self, name) for name in FINDING_COLUMNS if name not in values}
        return {name: str(v) if isinstance(v := values[name], StrEnum) else v for name in FINDING_COLUMNS}


FINDING_COLUMNS = (
    *("id", "question", "instrument", "statistic", "split", "layer"),
    *("estimate", "ci95_low", "ci95_high", "bound", "level", "unit", "n", "noise"),
    *("null_value", "threshold", "p_value", "p_adjusted", "verdict", "side", "controls_passed", "controls_failed"),
    *("reason", "larger_means", "null_hypothesis", "reference"),
)
"""Columns of a finding as a row. `larger_means` is its orientation, `null_hypothesis` its null in words, and
`controls_passed` and `controls_failed` count controls; all others are fields of `Finding`."""


class NotRun(_Model):
    """An instrument that gave no finding, and why. `failed`: it crashed, rather than lacking an input."""

    instrument: str
    question: Question | None = None
    reason: str
    failed: bool = False


class FileEntry(_Model):
    """One file of a model folder."""

    path: str
    size: int
    sha256: str


class ModelEntry(_Model):
    """One audited or reference model."""

    name: str
    digest: str = Field(description="SHA-256 over the folder's sorted paths, sizes and file digests")
    architecture: str
    parameters: int
    dtype: str
    files: list[FileEntry]


class SetEntry(_Model):
    """One example set of the case."""

    digest: str
    count: int
    entities: int
    source: str


class CaseEntry(_Model):
    """The audited case: its sets and the options that change what is measured."""

    name: str
    sets: dict[str, SetEntry]
    options: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list, description="e.g. rows shared by forget and retain")


class Environment(_Model):
    """Where the audit ran."""

    python: str
    platform: str
    packages: dict[str, str]
    device: str
    dtype: str
    threads: int
    seed: int
    noise: dict[str, MaybeNumber] = Field(
        default_factory=dict,
        description="per role: largest log-probability difference between the batched and the plain pass",
    )


class ErrorRate(_Model):
    """How often such a verdict is wrong. All null: not measured for this case, and the report says so."""

    estimate: MaybeNumber = None
    upper95: MaybeNumber = None
    n: int = 0
    basis: str = ""


class Power(_Model):
    """How often knowledge that is hidden in a model is found. All null: not measured for this case."""

    estimate: MaybeNumber = None
    lower95: MaybeNumber = None
    n: int = 0
    basis: str = ""


class Verdict(_Model):
    """The overall verdict."""

    label: Label
    statement: str
    reasons: list[str] = Field(default_factory=list, description="the rules that led here, in order")
    coverage: dict[Question, str] = Field(description="per question: what was tested, and what was not")
    false_positive_rate: ErrorRate = Field(default_factory=ErrorRate)
    power: Power = Field(default_factory=Power)
    profile: str = Field(default="", description="the reference profile the verdict was made by; empty: none fits")
    limits: list[str] = Field(default_factory=list)


class InstrumentCost(_Model):
    """What one instrument cost: its own time, and the tokens it asked for, passes shared with others included."""

    seconds: float = 0.0
    forward_tokens: int = 0


class Cost(_Model):
    """What the audit cost. Left out when two records are compared for equality."""

    seconds: float = 0.0
    forward_tokens: int = 0
    unique_tokens: int = 0
    reused_tokens: int = Field(default=0, description="found in the evidence store, so not computed again")
    peak_memory_bytes: int = 0
    by_instrument: dict[str, InstrumentCost] = Field(default_factory=dict)


class Tool(_Model):
    """What wrote the record."""

    name: str = "palimpsest-audit"
    version: str
    command: str = ""


class ExampleRow(_Model):
    """One forget example with what the target did on it, for the report's drill-down."""

    id: str
    prompt: str
    answer: str
    entity: str = ""
    generated: str | None = None
    scores: dict[str, MaybeNumber] = Field(default_factory=dict)
    image: str | None = Field(default=None, description="what was shown, as a small PNG in base64")


class SpikeCell(_Model):
    """What one instrument said of one spiked copy, by its loudest finding. `outcome` null: it did not run."""

    outcome: Outcome | None
    side: Side = Side.NEITHER
    finding: str = Field(default="", description="id of the finding that decided")
    reason: str = ""


class SpikeRate(_Model):
    """How many of so many copies, with the exact (Clopper-Pearson) 95 % interval of the share."""

    seen: int
    of: int
    ci95: tuple[float, float]


class SpikeRow(_Model):
    """One instrument on every copy. Rates only where its question is whether knowledge is left."""

    instrument: str
    question: Question | None = None
    cells: dict[str, SpikeCell] = Field(description="by the copy's name")
    recovered: SpikeRate | None = Field(default=None, description="copies with planted facts where it saw them")
    false_alarms: SpikeRate | None = Field(default=None, description="copies without, where it saw some")


class SpikeCopy(_Model):
    """One scan of a copy of the target with synthetic facts, whose truth is known from how it was made."""

    name: str
    made: str = Field(description="how, in words")
    truth: Label
    present: bool = Field(description="whether what its forget set asks was planted")
    digest: str = Field(default="", description="of the copy's folder")
    measured: dict[str, MaybeNumber] = Field(
        default_factory=dict, description="accuracy on the sets when it was made; harm done to the audit's retain set"
    )
    failed: str | None = Field(default=None, description="why it proves nothing; null if it is what it should be")
    verdict: Label | None = None


class Spike(_Model):
    """The spike-in control: which instruments saw synthetic facts that were planted in this very model."""

    people: int = Field(description="in each group: planted and kept, planted and forgotten, never planted")
    facts: int = Field(description="asked about in each group")
    copies: list[SpikeCopy]
    rows: list[SpikeRow]
    recovered: SpikeRate = Field(description="by the verdict: copies with planted facts called so")
    false_alarms: SpikeRate = Field(description="by the verdict: copies without, called so")
    statement: str = Field(description="what the spikes showed, in one line")


class Record(_Model):
    """Everything an audit found."""

    schema_version: str = SCHEMA_VERSION
    tool: Tool
    created: str = Field(default="", description="UTC, ISO 8601; not part of the comparison of two records")
    case: CaseEntry
    models: dict[str, ModelEntry]
    environment: Environment
    findings: list[Finding]
    not_run: list[NotRun]
    verdict: Verdict
    examples: list[ExampleRow] = Field(default_factory=list)
    spike: Spike | None = Field(default=None, description="the spike-in control, where one was asked for")
    cost: Cost = Field(default_factory=Cost)

    def to_json(self) -> str:
        """The record as stable, readable JSON (sorted keys, two spaces, newline at the end)."""
        return json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    def to_frame(self) -> DataFrame:
        """The findings as a pandas DataFrame, one row each; columns: `FINDING_COLUMNS`.

        Numbers that could not be computed are NaN, and a finding without a layer has None there. Several audits go
        together with `pandas.concat({name: record.to_frame() for ...})`.
        """
        from pandas import DataFrame

        frame = DataFrame([finding.row() for finding in self.findings], columns=list(FINDING_COLUMNS))
        counts = ["n", "controls_passed", "controls_failed"]
        numbers = ["estimate", "ci95_low", "ci95_high", "bound", "level", "noise"]
        numbers += ["null_value", "threshold", "p_value", "p_adjusted"]
        return frame.astype(dict.fromkeys(numbers, float) | dict.fromkeys(counts, int))

    def comparable(self) -> dict[str, Any]:
        """The record without times, costs and the command line: equal for the same case, seed and machine."""
        data = self.model_dump(mode="json")
        for key in ("created", "cost"):
            data.pop(key)
        data["tool"].pop("command")
        return data

    def write(self, path: Path) -> None:
        """Write atomically: a reader sees the old record or the new one, never half of one."""
        write_atomically(path, self.to_json().encode())

    @classmethod
    def read(cls, path: Path) -> Record:
        """Read `record.json`, or the one inside an audit folder: see `parse`.

        Raises:
            BadInput: no such file, or what `parse` refuses.
        """
        path = path / "record.json" if path.is_dir() else path
        try:
            return cls.parse(path.read_bytes(), str(path))
        except FileNotFoundError:
            raise BadInput(f"{path}: no such record") from None
        except OSError as error:
            raise BadInput(f"{path}: not a readable JSON record ({error})") from None

    @classmethod
    def parse(cls, text: bytes, where: str) -> Record:
        """A record from its bytes, as read from `where`; of this schema version, or an older minor one.

        A newer minor one is refused: what its new fields say could change what the old ones mean, and nobody would
        see that it was left out.

        Raises:
            BadInput: not JSON, another schema version, or a field that does not fit it.
        """
        try:
            data = json.loads(text.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{where}: not a readable JSON record ({error})") from None
        version = str(data.get("schema_version", "")) if isinstance(data, dict) else ""
        (major, minor), (ours, newest) = (each.partition(".")[::2] for each in (version, SCHEMA_VERSION))
        if major != ours or not minor.isdecimal():
            raise BadInput(f"{where}: schema_version {version!r}, this tool reads {SCHEMA_VERSION!r}")
        if int(minor) > int(newest):
            raise BadInput(
                f"{where}: schema_version {version!r} is newer than {SCHEMA_VERSION!r}, the newest this tool reads; "
                "read it with the version of the tool that wrote it, or a later one"
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise BadInput(f"{where}: field {place}: {first['msg']}") from None


def write_atomically(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Write `data` beside `path`, then rename it into place.

    `sync` flushes it to disk first. Without, a killed process still leaves no half file; only a power cut can.

    Raises:
        Unwritable: no space, no rights. What was there before is there still.
    """
    # Of this writer alone: others may write the same, in other processes and on other machines.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:  # an interruption too
            with suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        raise Unwritable(f"{path}: cannot be written: {error.strerror or error}") from None


def sweep(folder: Path, name: str = "*") -> None:
    """Remove what writers of such files left when they were killed. Only where no other writer is at work."""
    for left in folder.glob(f".{name}.*-????????.tmp"):
        with suppress(OSError):
            left.unlink()


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of `record.json`."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Record.model_json_schema()}
