"""A fleet of audits on one page: models by cases, what stands out, what has no record.

    from reports.fleet import Fleet, Row, render_fleet

    fleet = Fleet.of("spring audit", [Row.audited("authors", "npo", "authors/npo", record, exit_code=1), ...])
    page = render_fleet(fleet)

A pure function of records. Equal records give equal bytes.

The page holds no script, so no column sorts itself: the matrix is by model, and every case has a table with the worst
verdict first. Any other order is a matter of `fleet.csv`.

What stands out is a description and no evidence: a model whose estimate lies far from those of the other models on the
same case, by the modified z-score of Iglewicz and Hoaglin (1993), 0.6745 (x - median) / MAD, with the mean absolute
deviation where more than half of the estimates are equal. It is shown from 3.5 on, as they advise, if the distance is
also larger than the finding's threshold: among equal models any trifle is far. A fleet of which half are alike says
what is usual in this fleet, and not what is right.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable
from statistics import fmean, median
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from audit.record import Finding, Label, MaybeNumber, Outcome, Question, Record, Side
from reports import words
from reports.faces.findings_csv import guarded
from reports.html import render

SCHEMA_VERSION = "1.0"
LEAST = 5
"""Models from which on one can be said to stand out from the others."""
FAR = 3.5
"""Modified z-score from which on it is."""
WORST_FIRST = (Label.NOT_UNLEARNED, Label.SUPPRESSED, Label.OVER_UNLEARNED, Label.INCONCLUSIVE, Label.DELETED)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Measure(_Model):
    """One finding of a record, as far as it is compared across models."""

    id: str
    question: Question
    statistic: str
    split: str
    unit: str
    estimate: MaybeNumber
    ci95: tuple[MaybeNumber, MaybeNumber]
    threshold: float
    verdict: Outcome
    side: Side

    @classmethod
    def of(cls, finding: Finding) -> Measure:
        """The part of a finding that is kept here."""
        return cls(**{name: getattr(finding, name) for name in cls.model_fields})


class Row(_Model):
    """One model on one case."""

    case: str
    model: str
    folder: str = Field(description="of its report and record, below the fleet's")
    state: Literal["audited", "failed", "missing"]
    reason: str = Field(default="", description="why there is no record")
    exit_code: int = Field(description="that a scan of it by itself would have left with")
    label: Label | None = None
    digest: str = Field(default="", description="of the target's folder")
    parameters: int = 0
    answers: dict[Question, str] = Field(default_factory=dict, description="the mark of each question's answer")
    measures: list[Measure] = []
    crashed: list[str] = Field(default=[], description="instruments that failed")
    not_run: int = 0
    seconds: float = 0.0
    forward_tokens: int = 0
    reused_tokens: int = 0

    @classmethod
    def audited(cls, case: str, model: str, folder: str, record: Record, *, exit_code: int) -> Row:
        """Of a job with a record."""
        target, cost = record.models["target"], record.cost
        return cls(
            case=case,
            model=model,
            folder=folder,
            state="audited",
            exit_code=exit_code,
            label=record.verdict.label,
            digest=target.digest,
            parameters=target.parameters,
            answers={answer.question: answer.mark for answer in words.answers(record)},
            measures=[Measure.of(finding) for finding in record.findings],
            crashed=[row.instrument for row in record.not_run if row.failed],
            not_run=len(record.not_run),
            seconds=cost.seconds,
            forward_tokens=cost.forward_tokens,
            reused_tokens=cost.reused_tokens,
        )


class Outlier(_Model):
    """A model far from the others of its case in one statistic. A description: nothing was tested."""

    case: str
    model: str
    folder: str
    finding: str
    statistic: str
    unit: str
    estimate: float
    median: float
    z: float = Field(description="modified z-score")
    models: int = Field(description="with an estimate of this statistic")


class Fleet(_Model):
    """Everything that `fleet.html` shows."""

    schema_version: str = SCHEMA_VERSION
    name: str
    rows: list[Row]
    outliers: list[Outlier]
    exit_code: int = Field(description="the largest of all jobs'")

    @classmethod
    def of(cls, name: str, rows: list[Row]) -> Fleet:
        """The rows, and which stand out."""
        return cls(name=name, rows=rows, outliers=outliers(rows), exit_code=max(row.exit_code for row in rows))

    def summary(self) -> str:
        """How many jobs ended how, in one line."""
        count = Counter(row.label for row in self.rows)
        parts = [f"{count[label]} {label.value}" for label in WORST_FIRST if count[label]]
        parts += [f"{count[None]} without a record"] if count[None] else []
        return f"{words.plural(len(self.rows), 'job')}: {', '.join(parts)}"

    def to_json(self) -> str:
        """Stable, readable JSON."""
        return json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def outliers(rows: Iterable[Row]) -> list[Outlier]:
    """The models that stand out, the farthest first; see the module's text."""
    columns: dict[tuple[str, ...], list[tuple[Row, Measure, float]]] = {}
    for row in rows:
        for measure in row.measures:
            if measure.estimate is not None:  # one id may be two quantities, as with and without a retrained model
                key = (row.case, measure.id, measure.statistic, measure.split, measure.unit)
                columns.setdefault(key, []).append((row, measure, measure.estimate))
    found = []
    for column in columns.values():
        if len(column) < LEAST:
            continue
        values = [estimate for *_, estimate in column]
        middle = median(values)
        spread = _spread([abs(value - middle) for value in values])
        found += [
            Outlier(
                case=row.case,
                model=row.model,
                folder=row.folder,
                finding=measure.id,
                statistic=measure.statistic,
                unit=measure.unit,
                estimate=estimate,
                median=middle,
                z=(estimate - middle) / spread,
                models=len(column),
            )
            for row, measure, estimate in column
            if abs(estimate - middle) > measure.threshold and abs(estimate - middle) > FAR * spread
        ]
    return sorted(found, key=lambda one: (-abs(one.z), one.case, one.model, one.finding))


def _spread(distances: list[float]) -> float:
    """What a standard deviation would be, from the distances to the median."""
    return median(distances) / 0.6745 or fmean(distances) * 1.253314


# --- the page -------------------------------------------------------------------------------------------------


class Chapter(NamedTuple):
    """One case: its audited models, the worst verdict first, and how many have which."""

    case: str
    rows: list[Row]
    tally: list[tuple[Label, int]]


def render_fleet(fleet: Fleet) -> str:
    """The whole page as one string; byte-identical for equal fleets."""
    cases = list(dict.fromkeys(row.case for row in fleet.rows))
    audited = [row for row in fleet.rows if row.state == "audited"]
    cells = {(row.model, row.case): row for row in fleet.rows}
    return render(
        "fleet.html.j2",
        ("report.css", "fleet.css"),
        images=False,
        fleet=fleet,
        cases=cases,
        matrix=[(model, [cells.get((model, case)) for case in cases]) for model in sorted({m for m, _ in cells})],
        chapters=[_chapter(case, [row for row in audited if row.case == case]) for case in cases],
        audited=audited,
        without=[row for row in fleet.rows if row.state != "audited"],
        crashed=[row for row in audited if row.crashed],
        questions=list(Question),
        titles={question: title for question, (title, _) in words.ASKED.items()},
        seconds=sum(row.seconds for row in audited),
        tokens=sum(row.forward_tokens for row in audited),
        reused=sum(row.reused_tokens for row in audited),
        least=LEAST,
        far=FAR,
    )


def _chapter(case: str, rows: list[Row]) -> Chapter:
    rank = {label: place for place, label in enumerate(WORST_FIRST)}
    count = Counter(row.label for row in rows)
    ordered = sorted(rows, key=lambda row: (rank.get(row.label, len(rank)) if row.label else len(rank), row.model))
    return Chapter(case, ordered, [(label, count[label]) for label in WORST_FIRST if count[label]])


def render_csv(fleet: Fleet) -> str:
    """One row a job and finding, and one for a job without any: to be sorted in a spreadsheet."""
    out = io.StringIO()
    writer = csv.writer(out, quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(_COLUMNS)
    for row in fleet.rows:
        label = row.label.value if row.label else ""
        head = [guarded(text) for text in (row.case, row.model, row.state, label, row.reason)]
        for one in row.measures:
            texts = (one.id, one.question.value, one.verdict.value, one.side.value, one.unit)
            writer.writerow([*head, row.exit_code, *map(guarded, texts), one.estimate, *one.ci95])
        if not row.measures:
            writer.writerow([*head, row.exit_code, *[""] * 8])
    return out.getvalue()


_COLUMNS = (
    *("case", "model", "state", "label", "reason", "exit_code", "finding", "question", "verdict", "side", "unit"),
    *("estimate", "ci95_low", "ci95_high"),
)


FACES: dict[str, Callable[[Fleet], str]] = {
    "fleet.json": Fleet.to_json,
    "fleet.csv": render_csv,
    "fleet.html": render_fleet,
}
"""What is written of a fleet, by file name."""
