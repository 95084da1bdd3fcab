"""A policy: what a finished audit has to show so that a pipeline may go on.

    from audit.policy import check, emit, read_policy

    result = check(read_policy(Path("policy.toml")), record)
    result.passed, [ruling.reason for ruling in result.rulings]

    policy = emit(record)  # no worse than today

A policy is a TOML file of bounds over a record. It judges nothing anew: it holds what the audit measured against what
somebody decided to accept. It fails closed: an instrument that did not run, a number that was not computed, and a
pattern that fits no finding are failures, with the reason in words. It needs a record, and neither model nor torch.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from audit.errors import BadInput
from audit.record import Finding, Label, Outcome, Question, Record, Side, write_atomically
from audit.toml_file import read_toml

RESULT = "policy.json"
"""Beside the record: how it fared against a policy."""


def alarms(fail_on: str) -> frozenset[Outcome]:
    """The outcomes of a finding that make a complete audit end with exit code 1, by the value of `--fail-on`."""
    known: dict[str, frozenset[Outcome]] = {
        "never": frozenset(),
        "evidence": frozenset({Outcome.EVIDENCE}),
        "inconclusive": frozenset({Outcome.EVIDENCE, Outcome.INCONCLUSIVE}),
    }
    if fail_on not in known:
        raise BadInput(f"--fail-on {fail_on!r} is none of {', '.join(known)}")
    return known[fail_on]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid")


Number = Annotated[float, Field(allow_inf_nan=False)]


class VerdictRules(_Table):
    """Which overall verdicts are accepted, and how well its errors have to be known."""

    allow: list[Label] | None = None
    max_false_positive: Number | None = Field(default=None, description="upper 95 % bound of the false-positive rate")
    min_power: Number | None = Field(default=None, description="lower 95 % bound of the power")


class InstrumentRules(_Table):
    """Which instruments must have given a finding, and how many may have crashed."""

    require: list[str] = Field(default_factory=list)
    max_failed: int | None = Field(default=None, ge=0)


class CoverageRules(_Table):
    """Which questions must be answered: by a finding that is not inconclusive."""

    require: list[Question] = Field(default_factory=list)


class UtilityRules(_Table):
    """How much damage must be ruled out, by the interval of every finding that looks for damage."""

    max_damage: Number = Field(description="in the unit of the findings")
    id: str = Field(default="*", description="pattern of the findings meant")


class FindingRules(_Table):
    """Bounds on every finding whose id fits `id`, in its own unit and on its own scale."""

    id: str
    outcomes: list[Outcome] | None = None
    max_estimate: Number | None = None
    min_estimate: Number | None = None
    max_upper: Number | None = Field(default=None, description="on the upper end of the 95 % interval")
    min_lower: Number | None = Field(default=None, description="on the lower end")


class Policy(_Table):
    """What an audit has to show."""

    version: Literal[1] = 1
    verdict: VerdictRules | None = None
    instruments: InstrumentRules | None = None
    coverage: CoverageRules | None = None
    utility: UtilityRules | None = None
    finding: list[FindingRules] = Field(default_factory=list)


class Ruling(_Table):
    """One rule held against the record."""

    rule: str
    passed: bool
    reason: str


class PolicyResult(_Table):
    """How a record fared: `policy.json`."""

    passed: bool
    policy: str = Field(description="SHA-256 of the policy, as `to_toml` writes it")
    record: str = Field(description="SHA-256 of record.json")
    rulings: list[Ruling]

    def to_json(self) -> str:
        """Stable, readable JSON."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"

    def write(self, folder: Path) -> Path:
        """Keep it beside the record."""
        write_atomically(folder / RESULT, self.to_json().encode("utf-8", "backslashreplace"))
        return folder / RESULT


def read_policy(path: Path) -> Policy:
    """Read a policy file.

    Raises:
        BadInput: unreadable, not TOML, a key that means nothing here, or a policy that asks for nothing.
    """
    raw = read_toml(path)
    try:
        policy = Policy.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(f"{path}: {'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from None
    if not _asks(policy):
        raise BadInput(f"{path}: asks for nothing, so every audit would pass")
    return policy


def _asks(policy: Policy) -> bool:
    """Whether there is any rule; an empty `[[finding]]` still asks that there be such a finding."""
    verdict, instruments, coverage = policy.verdict, policy.instruments, policy.coverage
    return bool(
        (verdict and verdict.model_dump(exclude_none=True))
        or (instruments and (instruments.require or instruments.max_failed is not None))
        or (coverage and coverage.require)
        or policy.utility
        or policy.finding
    )


# --- holding a record against it ------------------------------------------------------------------------------


def check(policy: Policy, record: Record) -> PolicyResult:
    """Every rule of `policy` held against `record`."""
    rulings = [
        *_verdict(policy.verdict or VerdictRules(), record),
        *_instruments(policy.instruments or InstrumentRules(), record),
        *_coverage(policy.coverage or CoverageRules(), record),
        *(_utility(policy.utility, record) if policy.utility else ()),
        *(ruling for rules in policy.finding for ruling in _findings(rules, record)),
    ]
    return PolicyResult(
        passed=all(ruling.passed for ruling in rulings),
        policy=_digest(to_toml(policy)),
        record=_digest(record.to_json()),
        rulings=rulings,
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _verdict(rules: VerdictRules, record: Record) -> Iterator[Ruling]:
    label, verdict = record.verdict.label, record.verdict
    if rules.allow is not None:
        allowed = ", ".join(rules.allow) or "none at all"
        yield Ruling(
            rule=f"the verdict is one of: {allowed}", passed=label in rules.allow, reason=f"it is {label.value}"
        )
    if rules.max_false_positive is not None:
        upper = verdict.false_positive_rate.upper95
        yield _bounded("false-positive rate, upper 95 % bound", upper, rules.max_false_positive, above=False)
    if rules.min_power is not None:
        yield _bounded("power, lower 95 % bound", verdict.power.lower95, rules.min_power, above=True)


def _bounded(what: str, value: float | None, limit: float, *, above: bool) -> Ruling:
    """A number held against the largest (or least) one allowed; one that is not known fails."""
    rule = f"{what}, at {'least' if above else 'most'} {limit:g}"
    if value is None or not math.isfinite(value):
        return Ruling(rule=rule, passed=False, reason="it was not measured")
    return Ruling(rule=rule, passed=value >= limit if above else value <= limit, reason=f"it is {value:.6g}")


def _instruments(rules: InstrumentRules, record: Record) -> Iterator[Ruling]:
    ran, why = {finding.instrument for finding in record.findings}, {n.instrument: n for n in record.not_run}
    for name in rules.require:
        if name in ran:
            reason = "it gave findings"
        elif name in why:
            reason = f"it {'crashed' if why[name].failed else 'did not run'}: {why[name].reason}"
        else:
            reason = "it was not asked for"
        yield Ruling(rule=f"{name} has run", passed=name in ran, reason=reason)
    if rules.max_failed is not None:
        failed = [row.instrument for row in record.not_run if row.failed]
        reason = f"crashed: {', '.join(failed)}" if failed else "none crashed"
        rule = f"at most {rules.max_failed} instruments crashed"
        yield Ruling(rule=rule, passed=len(failed) <= rules.max_failed, reason=reason)


def _coverage(rules: CoverageRules, record: Record) -> Iterator[Ruling]:
    for question in rules.require:
        outcomes = [finding.verdict for finding in record.findings if finding.question is question]
        decided = sum(outcome is not Outcome.INCONCLUSIVE for outcome in outcomes)
        if not outcomes:
            reason = "no instrument gave a finding"
        else:
            reason = f"{decided} of {len(outcomes)} findings decide, the others are inconclusive"
        yield Ruling(rule=f"question {question.value} is answered", passed=decided > 0, reason=reason)


def _utility(rules: UtilityRules, record: Record) -> Iterator[Ruling]:
    meant = [f for f in record.findings if Side.DAMAGE in f.sides and fnmatchcase(f.id, rules.id)]
    if not meant:
        rule = f"damage by {rules.id}, at most {rules.max_damage:g}"
        yield Ruling(rule=rule, passed=False, reason="no finding looks for damage")
    for finding in meant:
        yield _bounded(f"damage not ruled out by {finding.id}", _damage(finding), rules.max_damage, above=False)


def _damage(finding: Finding) -> float | None:
    """The largest damage that the interval leaves possible; None where an end is missing."""
    ends = [
        end
        for side, end in zip(finding.sides, (_beyond(finding, upper=True), _beyond(finding, upper=False)), strict=True)
        if side is Side.DAMAGE
    ]
    return None if any(end is None for end in ends) else max(end for end in ends if end is not None)


def _beyond(finding: Finding, *, upper: bool) -> float | None:
    """How far from the null value the interval reaches, upwards or downwards; below zero if it does not."""
    end = _upper(finding) if upper else finding.ci95[0]
    if end is None:
        return None
    return end - finding.null_value if upper else finding.null_value - end


def _upper(finding: Finding) -> float | None:
    """The largest value not ruled out."""
    return finding.ci95[1] if finding.bound is None else finding.bound


def _findings(rules: FindingRules, record: Record) -> Iterator[Ruling]:
    meant = [finding for finding in record.findings if fnmatchcase(finding.id, rules.id)]
    if not meant:
        yield Ruling(rule=f"there is a finding {rules.id}", passed=False, reason="no finding has such an id")
    for finding in meant:
        held = list(_finding(rules, finding))
        yield from held or [Ruling(rule=f"there is a finding {rules.id}", passed=True, reason=f"there is {finding.id}")]


def _finding(rules: FindingRules, finding: Finding) -> Iterator[Ruling]:
    if rules.outcomes is not None:
        rule = f"{finding.id} says one of: {', '.join(rules.outcomes)}"
        told = f"it says {finding.verdict.value}" + (f": {finding.reason}" if finding.reason else "")
        yield Ruling(rule=rule, passed=finding.verdict in rules.outcomes, reason=told)
    bounds = (
        ("estimate", finding.estimate, rules.max_estimate, False),
        ("estimate", finding.estimate, rules.min_estimate, True),
        ("upper end of the interval", _upper(finding), rules.max_upper, False),
        ("lower end of the interval", finding.ci95[0], rules.min_lower, True),
    )
    for what, value, limit, above in bounds:
        if limit is not None:
            yield _bounded(f"{finding.id}, {what}", value, limit, above=above)


# --- no worse than today --------------------------------------------------------------------------------------


def emit(record: Record, *, margin: float = 1.0) -> Policy:
    """A policy that this record passes, and that one which is clearly worse fails.

    Findings of which a side means knowledge, over-unlearning or damage keep to their interval's end on that side, plus
    `margin` times their threshold, which is the smallest distance that counts as an effect. Of those, what was silent
    must stay silent, and what was inconclusive may not become evidence.
    """
    verdict, label = record.verdict, record.verdict.label
    decided = {finding.question for finding in record.findings if finding.verdict is not Outcome.INCONCLUSIVE}
    return Policy(
        verdict=VerdictRules(
            allow=[label, *([] if label is Label.DELETED else [Label.DELETED])],
            max_false_positive=verdict.false_positive_rate.upper95,
            min_power=verdict.power.lower95,
        ),
        instruments=InstrumentRules(
            require=sorted({finding.instrument for finding in record.findings}),
            max_failed=sum(row.failed for row in record.not_run),
        ),
        coverage=CoverageRules(require=[question for question in Question if question in decided]),
        finding=[_kept(finding, margin) for finding in record.findings if _MATTERS & set(finding.sides)],
    )


_MATTERS = {Side.REMAINS, Side.BEYOND, Side.DAMAGE}
_NO_WORSE = {
    Outcome.NONE: [Outcome.NONE],
    Outcome.INCONCLUSIVE: [Outcome.NONE, Outcome.INCONCLUSIVE],
    Outcome.EVIDENCE: None,
}


def _kept(finding: Finding, margin: float) -> FindingRules:
    room = margin * finding.threshold
    upper, lower = _upper(finding), finding.ci95[0]
    return FindingRules(
        id=glob.escape(finding.id),
        outcomes=_NO_WORSE[finding.verdict],
        max_upper=_outwards(upper + room, 1) if upper is not None and finding.sides[0] in _MATTERS else None,
        min_lower=_outwards(lower - room, -1) if lower is not None and finding.sides[1] in _MATTERS else None,
    )


def _outwards(value: float, sign: int) -> float:
    """Rounded away from the interval, to four decimals where there are any to speak of."""
    return value if abs(value) > 1e9 else sign * math.ceil(sign * value * 1e4) / 1e4


def to_toml(policy: Policy) -> str:
    """The policy as a file to read, edit and give to `--policy`."""
    lines = [
        "# A Palimpsest policy: what an audit has to show. See docs/policy.md.",
        "# Ids are patterns: * any text, ? one character, [...] one of these.",
        "version = 1",
    ]
    for name in ("verdict", "instruments", "coverage", "utility"):
        rules = getattr(policy, name)
        lines += ["", f"[{name}]", *_lines(rules)] if rules else []
    for rules in policy.finding:
        lines += ["", "[[finding]]", *_lines(rules)]
    return "\n".join(lines) + "\n"


def _lines(rules: _Table) -> list[str]:
    """TOML reads JSON's strings, numbers and lists of them, but for DEL, which it wants escaped."""
    data = rules.model_dump(mode="json", exclude_none=True)
    return [
        f"{key} = {json.dumps(value, ensure_ascii=False)}".replace("\x7f", "\\u007f") for key, value in data.items()
    ]


def write_policy(policy: Policy, path: Path) -> None:
    """Write it atomically. A lone surrogate, which TOML cannot hold, becomes `?`, which as a pattern still fits it."""
    write_atomically(path, to_toml(policy).encode("utf-8", "replace"))
