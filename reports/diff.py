"""Two audits side by side: what each says, where they part, and whether they may be compared at all.

    from reports.diff import compare

    comparison = compare(Record.read(before), Record.read(after))     # BadInput where they are not comparable
    comparison = compare(before, after, force=True)                   # compares anyway, and marks what that touches

A pure function of two records: before and after, method against method, target against retrained. Findings are
joined by id, examples by id; `difference` is always B minus A.

What may be said of a difference. The two intervals come from two models asked the same rows, so the estimates are
correlated, and a record does not hold how much: an interval of the difference cannot be computed from it, and none is
given. What holds without any assumption is this: each interval misses its true value in 5 % of audits, so both hold
in at least 90 %, and where both hold and do not touch, the true values differ. Overlap shows nothing either way.

Traps:

- *One id, two quantities.* With a retrained model at hand, `knowledge/choice` is the target's contrast minus the
  retrained model's; without one, the target's contrast. Such a pair keeps its outcomes and gets no difference.
- *Evidence in one and none in the other is no difference by itself*: the two may lie on either side of a threshold
  while their intervals overlap. The words say so.
- *One id, two examples.* Rows are named by their place in the set; in another set the same name is another question.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Literal, TypeVar

from audit.errors import BadInput
from audit.record import ExampleRow, Finding, Question, Record
from reports import words
from reports.comparable import caveats, example_caveats, mismatches, paired, unasked
from reports.comparison import (
    Audit,
    Caveat,
    Comparison,
    ExamplePair,
    FilePair,
    FindingPair,
    Limits,
    Mismatch,
    ModelPair,
    NotRunPair,
    QuestionPair,
    Relation,
    ScorePair,
    SetPair,
)

_IDENTITY = {
    "statistic": "what is computed",
    "split": "what is compared",
    "unit": "the unit",
    "orientation": "what larger means",
    "null": "the null hypothesis",
}
"""Fields of a finding that say what was measured: where one differs, so does the quantity."""
_JUDGED = {
    "null_value": "null value",
    "threshold": "threshold",
    "fitted": "fitted threshold",
    "layer": "layer",
    "n": "n",
    "sides": "what evidence means",
}
"""Fields that leave the quantity what it is, and say where it was taken and how it was judged."""
_Item = TypeVar("_Item")


def compare(a: Record, b: Record, *, force: bool = False) -> Comparison:
    """Both records side by side.

    Raises:
        BadInput: other sets, reference models, seeds, options or tool versions, all named, unless `force`.
    """
    differing = list(mismatches(a, b))
    refusing = [row for row in differing if row.refuses]
    if refusing and not force:
        named = "; ".join(f"{row.what} (A: {row.a}, B: {row.b})" for row in refusing)
        raise BadInput(f"not comparable: {named}. --force compares them anyway and marks what this touches")
    findings = [_finding_pair(key[0], x, y, a, b, differing) for key, x, y in _joined(a.findings, b.findings, _by_id)]
    findings.sort(key=lambda pair: list(Question).index(pair.question))
    examples = [_example_pair(key[0], x, y) for key, x, y in _joined(a.examples, b.examples, _by_id)]
    labels = [words.LABELS[record.verdict.label][0] for record in (a, b)]
    return Comparison(
        forced=bool(refusing),
        a=_audit(a),
        b=_audit(b),
        relations=_relations(a, b),
        mismatches=differing,
        verdict_change=f"{labels[0]} in both" if labels[0] == labels[1] else f"{labels[0]} in A, {labels[1]} in B",
        verdict_caveats=[Caveat(what=row.what) for row in differing if row.scope != "none"],
        questions=[_question_pair(x, y, findings) for x, y in zip(words.answers(a), words.answers(b), strict=True)],
        findings=findings,
        not_run=_not_run_pairs(a, b),
        examples=examples,
        example_caveats=example_caveats(differing),
        scores=_scores(examples),
        models=_model_pairs(a, b),
        sets={name: SetPair(a=x, b=y) for name, x, y in paired(a.case.sets, b.case.sets)},
        limits=_limits(a.verdict.limits, b.verdict.limits),
    )


# --- findings -----------------------------------------------------------------------------------------------


def _finding_pair(
    name: str, a: Finding | None, b: Finding | None, one: Record, other: Record, differing: list[Mismatch]
) -> FindingPair:
    found = a or b
    assert found is not None
    marks, difference = caveats(differing, a, b), None
    if a is None or b is None:
        lacking, has = (("A", one), "B") if a is None else (("B", other), "A")
        relation, outcome = Relation.ONE, f"{words.MARKS[words.mark_of(found)][0]} in {has}"
        numbers = _missing(found, *lacking)
    else:
        relation = _relation(a, b)
        outcome, numbers = _in_both(words.mark_of(a), words.mark_of(b)), _numbers(a, b, relation)
        marks += [Caveat(what=what) for name, what in _JUDGED.items() if getattr(a, name) != getattr(b, name)]
        if relation is not Relation.OTHERWISE and a.estimate is not None and b.estimate is not None:
            difference = b.estimate - a.estimate
    return FindingPair(
        id=name,
        instrument=found.instrument,
        question=found.question,
        a=a and a.model_copy(update={"figure": None, "table": None}),
        b=b and b.model_copy(update={"figure": None, "table": None}),
        difference=difference,
        relation=relation,
        outcome=outcome,
        numbers=numbers,
        caveats=marks,
    )


def _relation(a: Finding, b: Finding) -> Relation:
    if any(getattr(a, name) != getattr(b, name) for name in _IDENTITY):
        return Relation.OTHERWISE
    if (a.estimate, a.ci95) == (b.estimate, b.ci95):
        return Relation.SAME
    if None in (a.estimate, b.estimate) or (None, None) in (a.ci95, b.ci95):
        return Relation.UNKNOWN
    (low_a, high_a), (low_b, high_b) = _ends(a), _ends(b)
    if low_b > high_a:
        return Relation.HIGHER
    return Relation.LOWER if high_b < low_a else Relation.OVERLAP


def _ends(finding: Finding) -> tuple[float, float]:
    """The interval, open where a side was not computed."""
    low, high = finding.ci95
    return -math.inf if low is None else low, math.inf if high is None else high


def _in_both(a: str, b: str) -> str:
    """Two marks in words."""
    return f"{words.MARKS[a][0]} in both" if a == b else f"{words.MARKS[a][0]} in A, {words.MARKS[b][0]} in B"


def _numbers(a: Finding, b: Finding, relation: Relation) -> str:
    if relation is Relation.OTHERWISE:
        names = ", ".join(what for name, what in _IDENTITY.items() if getattr(a, name) != getattr(b, name))
        return f"not the same quantity, so no difference (another: {names})"
    if relation is Relation.OVERLAP and words.mark_of(a) != words.mark_of(b):
        return "yet the intervals overlap: the two may lie on either side of a threshold and not differ"
    if relation is Relation.SAME and a.estimate is None:
        return "no number in either"
    return {
        Relation.SAME: "the same numbers",
        Relation.OVERLAP: "no change to speak of: the intervals overlap",
        Relation.HIGHER: "higher in B: the intervals do not touch",
        Relation.LOWER: "lower in B: the intervals do not touch",
        Relation.UNKNOWN: "a number or an interval is missing, so nothing can be said of a difference",
    }[relation]


def _missing(finding: Finding, label: str, record: Record) -> str:
    """Why an audit lacks a finding that the other has, as far as its record says."""
    rows = [row for row in record.not_run if row.instrument in (finding.instrument, finding.id)]
    if rows:
        state = "crashed" if rows[0].failed else "did not run"
        return f"{state} in {label}: {rows[0].reason}"
    if unasked(finding.instrument, record):
        return f"not asked for in {label}"
    if any(other.instrument == finding.instrument for other in record.findings):
        return f"the instrument ran in {label}, and did not give this finding there"
    return f"{label} has no such finding, and does not say why"


def _question_pair(a: words.Answer, b: words.Answer, findings: Iterable[FindingPair]) -> QuestionPair:
    pairs = [pair for pair in findings if pair.question is a.question]
    counts = Counter(pair.relation for pair in pairs)
    apart, missing = counts[Relation.HIGHER] + counts[Relation.LOWER], counts[Relation.ONE]
    both = len(pairs) - missing
    tally = [f"{words.plural(both, 'finding')} in both"] if both else []
    tally += [f"{apart} with intervals apart"] if apart else []
    tally += [f"{counts[Relation.OTHERWISE]} not the same quantity"] if counts[Relation.OTHERWISE] else []
    tally += [f"{missing} in one audit only"] if missing else []
    sure: dict[str, bool] = {}
    for caveat in (caveat for pair in pairs for caveat in pair.caveats):
        if caveat.what not in _JUDGED.values():
            sure[caveat.what] = sure.get(caveat.what, False) or caveat.sure
    return QuestionPair(
        a=a,
        b=b,
        outcome=_in_both(a.mark, b.mark),
        tally=", ".join(tally) or "no finding in either",
        caveats=[Caveat(what=what, sure=known) for what, known in sure.items()],
    )


def _not_run_pairs(a: Record, b: Record) -> list[NotRunPair]:
    counts = [Counter(finding.instrument for finding in record.findings) for record in (a, b)]
    return [
        NotRunPair(
            instrument=key[0],
            question=(x or y).question,  # type: ignore[union-attr]
            a=x,
            b=y,
            findings_a=counts[0][key[0]],
            findings_b=counts[1][key[0]],
        )
        for key, x, y in _joined(a.not_run, b.not_run, lambda row: row.instrument)
    ]


# --- examples, models, the rest -----------------------------------------------------------------------------


def _example_pair(name: str, a: ExampleRow | None, b: ExampleRow | None) -> ExamplePair:
    found = a or b
    assert found is not None
    same = (
        a is not None and b is not None and all(getattr(a, x) == getattr(b, x) for x in ("prompt", "answer", "image"))
    )
    answers: Literal["same", "differ", "unknown"] = "unknown"
    if same and a and b and a.generated is not None and b.generated is not None:
        answers = "same" if a.generated == b.generated else "differ"
    return ExamplePair(id=name, entity=found.entity, a=a, b=b, same_question=same, answers=answers)


def _scores(examples: Iterable[ExamplePair]) -> list[ScorePair]:
    values: dict[str, list[tuple[float, float]]] = {}
    for pair in examples:
        if not (pair.same_question and pair.a and pair.b):
            continue
        for name, one in pair.a.scores.items():
            other = pair.b.scores.get(name)
            if one is not None and other is not None:
                values.setdefault(name, []).append((one, other))
    return [
        ScorePair(
            name=name,
            n=len(rows),
            mean_a=math.fsum(x for x, _ in rows) / len(rows),
            mean_b=math.fsum(y for _, y in rows) / len(rows),
            higher=sum(y > x for x, y in rows),
            lower=sum(y < x for x, y in rows),
            same=sum(x == y for x, y in rows),
        )
        for name, rows in sorted(values.items())
    ]


def _model_pairs(a: Record, b: Record) -> dict[str, ModelPair]:
    pairs = {}
    for role, x, y in paired(a.models, b.models):
        files = _joined(x.files if x else [], y.files if y else [], lambda file: file.path)
        differing = [FilePair(path=key[0], a=one, b=other) for key, one, other in files if one != other]
        pairs[role] = ModelPair(
            a=x and x.model_copy(update={"files": []}),
            b=y and y.model_copy(update={"files": []}),
            differing=differing,
            same_files=len(files) - len(differing),
        )
    return pairs


def _relations(a: Record, b: Record) -> list[str]:
    """Where one model has a part in both audits, which says what is compared with what."""
    found = []
    for role, one in sorted(a.models.items()):
        for other_role, other in sorted(b.models.items()):
            if one.digest == other.digest and "target" in (role, other_role):
                found.append(f"The {role} of A is the {other_role} of B: the same model, by its digest.")
    return found


def _audit(record: Record) -> Audit:
    return Audit(
        name=record.case.name,
        target=record.models["target"].name if "target" in record.models else "",
        created=record.created,
        tool=record.tool,
        schema_version=record.schema_version,
        seed=record.environment.seed,
        device=f"{record.environment.device}, {record.environment.dtype}",
        record_sha256=hashlib.sha256(record.to_json().encode("utf-8", "surrogatepass")).hexdigest(),
        verdict=record.verdict,
        spike=record.spike.statement if record.spike else "",
        cost=record.cost,
    )


def _limits(a: list[str], b: list[str]) -> Limits:
    return Limits(
        both=[limit for limit in a if limit in b],
        only_a=[limit for limit in a if limit not in b],
        only_b=[limit for limit in b if limit not in a],
    )


# --- joining ------------------------------------------------------------------------------------------------


def _by_id(item: Finding | ExampleRow) -> str:
    return item.id


def _joined(
    a: Iterable[_Item], b: Iterable[_Item], name: Callable[[_Item], str]
) -> list[tuple[tuple[str, int], _Item | None, _Item | None]]:
    """Both lists by name, in an order that neither decides. Of a name that is there twice, first meets first."""
    one, other = _numbered(a, name), _numbered(b, name)
    keys = sorted({*one, *other}, key=lambda key: (_natural(key[0]), key))
    return [(key, one.get(key), other.get(key)) for key in keys]


def _numbered(items: Iterable[_Item], name: Callable[[_Item], str]) -> dict[tuple[str, int], _Item]:
    seen: Counter[str] = Counter()
    found = {}
    for item in items:
        found[name(item), seen[name(item)]] = item
        seen[name(item)] += 1
    return found


def _natural(text: str) -> list[tuple[int, str]]:
    """`forget:2` before `forget:10`: runs of digits by their length, then by their digits."""
    parts = re.split(r"([0-9]+)", text)
    return [(len(part.lstrip("0")) if index % 2 else 0, part) for index, part in enumerate(parts)]
