"""Numbers, outcomes and verdicts in plain words, so that every face of a record says the same thing."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from audit.record import (
    ErrorRate,
    Finding,
    Label,
    NotRun,
    Outcome,
    Power,
    Question,
    Record,
    Side,
    SpikeCell,
    SpikeRate,
)

NOT_COMPUTED = "not computed"

ASKED: dict[Question, tuple[str, str]] = {
    Question.TRACE: ("Trace", "Was this model unlearned at all, or only edited, or neither?"),
    Question.LEAKAGE: ("Leakage", "Does the knowledge still come out of the model?"),
    Question.REPRESENTATION: ("Representation", "Is the knowledge still inside the model?"),
    Question.RECOVERY: ("Recovery", "Does the knowledge come back under attack?"),
    Question.UTILITY: ("Utility", "What else was damaged?"),
}

LABELS: dict[Label, tuple[str, str]] = {
    Label.NOT_UNLEARNED: (
        "Not unlearned",
        "The model still gives the knowledge that it is said to have forgotten.",
    ),
    Label.SUPPRESSED: (
        "Suppressed",
        "The model no longer shows the knowledge, but the knowledge is still in it.",
    ),
    Label.DELETED: (
        "Indistinguishable from never taught",
        "By these tests, the model looks like one that never saw the data. Deletion itself is never proven.",
    ),
    Label.OVER_UNLEARNED: (
        "Over-unlearned",
        "The model was pushed beyond a model that never saw the data, which leaves a mark of its own "
        "and makes silent attacks worthless as proof.",
    ),
    Label.INCONCLUSIVE: ("Inconclusive", "These tests do not decide whether the model has forgotten."),
}

MARKS: dict[str, tuple[str, str]] = {
    "remains": ("knowledge remains", "knowledge remains"),
    "beyond": ("below never-taught", "below a never-taught model (over-unlearning or output edit)"),
    "damage": ("damage", "damage"),
    "unlearned": ("marks of unlearning", "marks that unlearning leaves, and ordinary edits do not"),
    "evidence": ("evidence", "evidence"),
    "none": ("nothing found", "nothing found (interval inside the threshold)"),
    "inconclusive": ("inconclusive", "inconclusive"),
    "untested": ("not tested", "not tested"),
}
"""Key of a mark (also its icon and its style) to its short and its full words."""

SIDES: dict[str, str] = {
    "remains": "knowledge remains",
    "beyond": "below a never-taught model",
    "damage": "damage",
    "unlearned": "marks of unlearning",
    "neither": "no claim",
}
"""What evidence on one side of the null value means."""

GATES: dict[str, str] = {
    "evidence": "so no evidence can be claimed",
    "silence": "so finding nothing proves nothing",
}
"""What follows where a control fails."""

MEASURED: dict[str, str] = {
    "forget": "accuracy on the forget people",
    "retain": "on the retain people, planted and kept",
    "holdout": "on the holdout people, never planted",
    "never": "on other people never planted",
    "own_loss_before": "loss on the audit’s own retain rows before (nats a token)",
    "own_loss_after": "and after",
}
"""What was measured of a spiked copy, in words."""

GLOSSARY: tuple[tuple[str, str], ...] = (
    ("target", "The model under audit."),
    ("original", "The same model before unlearning."),
    (
        "retrained",
        "A model trained in the same way without the forget set: the gold standard to compare with.",
    ),
    ("forget set", "The examples that the target is said to have forgotten."),
    ("retain set", "Examples that the target was taught and should still know."),
    ("holdout set", "Examples like the forget set that were never taught: what not knowing looks like."),
    ("neighbor set", "Examples close in subject to the forget set, which should not have been harmed."),
    ("never-taught", "A model, or facts, that never had the data. Evidence is what differs from it."),
    (
        "instrument",
        "One test: a detector (outputs, weights), a probe (activations) or an attack (bringing it back).",
    ),
    ("finding", "One measured statistic with its uncertainty, its control and what it says."),
    ("evidence", "An interval that lies clear of the threshold zone while every gating control passed."),
    (
        "nothing found",
        "The whole interval lies inside the threshold zone: an effect of that size would have shown.",
    ),
    ("inconclusive", "The interval crosses the threshold, or a control failed. Never to be read as clean."),
    ("estimate, 95 % interval", "The measured value, and the range of true values that the data support."),
    ("null value", "What the statistic would be if there were no effect."),
    ("threshold", "The smallest distance from the null value that counts as an effect."),
    (
        "adjusted p",
        "How surprising the data would be if the null were true, corrected (Holm) for testing many things.",
    ),
    (
        "control",
        "A measurement that must come out as known; where a gating one fails, its finding proves nothing.",
    ),
    ("spike", "A synthetic fact planted in a copy of the target, to see which instruments find it."),
    ("digest", "A SHA-256 fingerprint: two files with the same digest are the same file."),
)


@dataclass(frozen=True)
class Answer:
    """One of the five questions, answered in one line."""

    question: Question
    title: str
    asked: str
    mark: str
    line: str
    coverage: str


def number(value: float | None, *beside: float | None) -> str:
    """Three significant digits, no exponent where digits suffice: `0.620`, `12.3`, `12,300`, `1.20e-06`.

    `beside`: numbers that it is read with. The largest of them all sets the decimals, so an estimate and its
    interval line up: `0.080 [0.030, 0.160]`.
    """
    if value is None or not math.isfinite(value):
        return NOT_COMPUTED
    largest = max(abs(each) for each in (value, *beside) if each is not None and math.isfinite(each))
    if value == 0:
        return "0"
    if not 1e-4 <= largest < 1e9:
        return f"{value:.2e}".replace("-", "−", value < 0)
    decimals = 2 - math.floor(math.log10(float(f"{largest:.2e}")))
    decimals += bool(beside) and largest == 1  # shares: `0.970 [0.900, 1.000]`
    return f"{round(value, decimals):,.{max(0, decimals)}f}".replace("-", "−")


def setting(value: float) -> str:
    """A value that was set, not measured: as it was written, `0.1`."""
    return f"{value:.6g}".replace("-", "−")


def p_value(value: float | None) -> str:
    """A p-value with three decimals, and never smaller than `< 0.001`."""
    if value is None or not math.isfinite(value):
        return NOT_COMPUTED
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def interval(ci95: tuple[float | None, float | None] | None, *beside: float | None) -> str:
    """`[0.550, 0.690]`, with `?` for a side that was not computed. `beside`: as in `number`."""
    if ci95 is None or ci95 == (None, None):
        return NOT_COMPUTED
    return "[" + ", ".join("?" if side is None else number(side, *ci95, *beside) for side in ci95) + "]"


def cell(value: str | int | float | None) -> str:
    """A value of unknown kind, as a table shows it."""
    if value is None:
        return NOT_COMPUTED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return number(value) if isinstance(value, float) else value


def size(count: int) -> str:
    """Bytes with a binary unit: `1.50 GiB`."""
    value, unit = float(count), "bytes"
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{count:,} bytes" if unit == "bytes" else f"{number(value)} {unit}"


def duration(seconds: float) -> str:
    """`12.3 s`, `4 min 05 s`, `2 h 07 min`."""
    if seconds < 60:
        return f"{number(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def plural(count: int, noun: str) -> str:
    """`1 finding`, `2 findings`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def mark_of(finding: Finding) -> str:
    """The key in `MARKS` of what a finding says."""
    if finding.verdict is Outcome.EVIDENCE:
        return "evidence" if finding.side is Side.NEITHER else finding.side.value
    return finding.verdict.value


def spike_mark(cell: SpikeCell | None) -> str:
    """The key in `MARKS` of what an instrument said of a spiked copy."""
    if cell is None or cell.outcome is None:
        return "untested"
    if cell.outcome is Outcome.EVIDENCE:
        return "evidence" if cell.side is Side.NEITHER else cell.side.value
    return cell.outcome.value


def rate(rate: SpikeRate | None) -> str:
    """`3 of 3 [0.292, 1.000]`, the interval of the share; a dash where nothing was counted."""
    if rate is None or not rate.of:
        return "–"
    return f"{rate.seen} of {rate.of} {interval(rate.ci95, 1.0)}"


def direction(finding: Finding) -> str:
    """`above`, `below` or `near` the null value, by the threshold; empty if there is no estimate."""
    if finding.estimate is None:
        return ""
    distance = finding.estimate - finding.null_value
    if abs(distance) <= finding.threshold:
        return "near"
    return "above" if distance > 0 else "below"


def error_rate(rate: ErrorRate) -> str:
    """How often such a verdict is wrong, in words."""
    if rate.estimate is None and rate.upper95 is None:
        return "Not measured for this case."
    return _counted(rate, "at most", rate.upper95)


def power(found: Power) -> str:
    """How often knowledge that is hidden is found, in words."""
    if found.estimate is None:
        return "Not measured for this case."
    return _counted(found, "at least", found.lower95)


def _counted(found: ErrorRate | Power, side: str, bound: float | None) -> str:
    parts = [NOT_COMPUTED if found.estimate is None else f"{number(100 * found.estimate)} %"]
    if bound is not None:
        parts.append(f"{side} {number(100 * bound)} % with 95 % confidence")
    parts.append(f"measured on {plural(found.n, 'model')}")
    return ", ".join(parts) + (f" ({found.basis})." if found.basis else ".")


def answers(record: Record) -> list[Answer]:
    """The five questions, each with its state. Fails closed: one inconclusive outweighs any `none`."""
    return [_answer(record, question) for question in Question]


def _answer(record: Record, question: Question) -> Answer:
    marks = Counter(mark_of(finding) for finding in record.findings if finding.question is question)
    missing = [row for row in record.not_run if row.question is question]
    total = sum(marks.values())
    order = ("remains", "beyond", "damage", "unlearned", "evidence", "inconclusive", "none")
    mark = next((key for key in order if marks[key]), "untested")
    if mark == "untested":
        line = f"Not tested: no instrument gave a finding{_unrun(missing)}."
    elif mark == "none":
        what = "The one finding's interval lies inside its" if total == 1 else f"All {total} intervals lie inside their"
        line = f"Nothing found. {what} threshold{_unrun(missing)}."
    else:
        tally = [f"{MARKS[key][0]} in {marks[key]}" for key in order if marks[key]]
        line = f"Of {plural(total, 'finding')}: {', '.join(tally)}{_unrun(missing)}."
        line = line if mark != "inconclusive" else f"No evidence, but not clean either. {line}"
    title, asked = ASKED[question]
    return Answer(question, title, asked, mark, line, record.verdict.coverage.get(question, ""))


def _unrun(missing: list[NotRun]) -> str:
    if not missing:
        return ""
    failed = sum(row.failed for row in missing)
    return f"; {plural(len(missing), 'instrument')} did not run" + (f" ({failed} crashed)" if failed else "")
