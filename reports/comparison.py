"""What `audit diff --json` prints: two audits side by side, as data. Made by `reports.diff.compare`."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from audit.record import (
    Cost,
    ExampleRow,
    FileEntry,
    Finding,
    MaybeNumber,
    ModelEntry,
    NotRun,
    Question,
    SetEntry,
    Tool,
    Verdict,
)
from reports import words

SCHEMA_VERSION = "1.0"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Mismatch(_Model):
    """One thing in which the audits themselves differ, rather than the models they audit."""

    what: str
    a: str
    b: str
    refuses: bool = Field(description="whether it takes --force to compare such audits")
    touches: str = Field(description="which rows it touches, in words")
    scope: Literal["all", "named", "verdict", "none"] = Field(
        description="what is marked. all: every finding; named: those that name `name`, the others with a perhaps; "
        "verdict: the verdict; none: nothing"
    )
    name: str = Field(default="", description="of the set or role, where scope is named")


class Caveat(_Model):
    """A mark on a row: what a mismatch, or the row itself, takes from the comparison."""

    what: str
    sure: bool = Field(default=True, description="false: the record does not say whether the row depends on it")


class Relation(StrEnum):
    """How the numbers of two findings stand to each other."""

    SAME = "same"  # number for number
    OVERLAP = "overlap"  # nothing follows
    HIGHER = "higher"  # B's interval lies wholly above A's
    LOWER = "lower"  # … below
    UNKNOWN = "unknown"  # a number or an interval is missing
    OTHERWISE = "otherwise"  # not the same quantity
    ONE = "one"  # only one of them has it


class Audit(_Model):
    """One of the two audits, as a whole."""

    name: str
    target: str
    created: str
    tool: Tool
    schema_version: str
    seed: int
    device: str
    record_sha256: str
    verdict: Verdict
    spike: str = Field(default="", description="what the spike-in control showed, where there was one")
    cost: Cost


class QuestionPair(_Model):
    """One of the five questions, as both audits answer it."""

    a: words.Answer
    b: words.Answer
    outcome: str
    tally: str = Field(description="of its findings")
    caveats: list[Caveat]


class FindingPair(_Model):
    """One finding as both audits have it, figures and tables left to the records."""

    id: str
    instrument: str
    question: Question
    a: Finding | None
    b: Finding | None
    difference: MaybeNumber = Field(description="B minus A; it has no interval, see the page on reading")
    relation: Relation
    outcome: str = Field(description="what both say, in plain words")
    numbers: str = Field(description="how the numbers stand to each other, or why one audit has none, in plain words")
    caveats: list[Caveat]

    @property
    def either(self) -> Finding:
        """A's finding, or B's where A has none."""
        found = self.a or self.b
        assert found is not None
        return found

    @property
    def changed(self) -> bool:
        """Whether it says something else in B: another outcome, intervals apart, or in one audit only."""
        if self.a is None or self.b is None:
            return True
        apart = self.relation in (Relation.HIGHER, Relation.LOWER)
        return apart or words.mark_of(self.a) != words.mark_of(self.b)


class NotRunPair(_Model):
    """An instrument that did not run in one of the audits, or in both."""

    instrument: str
    question: Question | None
    a: NotRun | None
    b: NotRun | None
    findings_a: int
    findings_b: int


class ExamplePair(_Model):
    """One forget example, and what each target did on it."""

    id: str
    entity: str
    a: ExampleRow | None
    b: ExampleRow | None
    same_question: bool = Field(description="prompt, taught answer and image are the same in both")
    answers: Literal["same", "differ", "unknown"] = Field(description="the generated texts, letter by letter")


class ScorePair(_Model):
    """One per-example score over the rows that have it in both. A description: no control, no interval."""

    name: str
    n: int
    mean_a: MaybeNumber
    mean_b: MaybeNumber
    higher: int = Field(description="rows where it is higher in B")
    lower: int
    same: int


class FilePair(_Model):
    """A file of a model folder that is not the same in both."""

    path: str
    a: FileEntry | None
    b: FileEntry | None


class ModelPair(_Model):
    """One role's model in both audits. `files` of the entries are left out; those that differ are listed."""

    a: ModelEntry | None
    b: ModelEntry | None
    differing: list[FilePair]
    same_files: int


class SetPair(_Model):
    """One example set in both audits."""

    a: SetEntry | None
    b: SetEntry | None


class Limits(_Model):
    """What the audits say they do not show."""

    both: list[str]
    only_a: list[str]
    only_b: list[str]


class Comparison(_Model):
    """Two audits side by side."""

    schema_version: str = SCHEMA_VERSION
    forced: bool = Field(description="compared although not comparable")
    a: Audit
    b: Audit
    relations: list[str] = Field(description="models that both audits know, by digest")
    mismatches: list[Mismatch]
    verdict_change: str
    verdict_caveats: list[Caveat]
    questions: list[QuestionPair]
    findings: list[FindingPair]
    not_run: list[NotRunPair]
    examples: list[ExamplePair]
    example_caveats: list[Caveat] = Field(description="marks that hold for every example")
    scores: list[ScorePair]
    models: dict[str, ModelPair]
    sets: dict[str, SetPair]
    limits: Limits

    def to_json(self) -> str:
        """Stable, readable JSON, as the record's."""
        return json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of what `audit diff --json` prints."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Comparison.model_json_schema()}
