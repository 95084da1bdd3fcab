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

SAID: dict[tuple[Question, str], str] = {
    (
        Question.TRACE,
        "evasion",
    ): "What was read contradicts itself, as where a model, or what serves it, was made to pass "
    "a test: what was not found proves nothing here.",
    (Question.TRACE, "unlearned"): "Unlearned: it bears marks that unlearning leaves, and ordinary edits do not.",
    (Question.TRACE, "none"): "No mark of unlearning was found, by tests that would have seen one.",
    (Question.LEAKAGE, "remains"): "Yes: it comes out, as it does not from a model that was never taught it.",
    (Question.LEAKAGE, "beyond"): "Not seen to come out; but the forgotten answers are shunned more than answers that "
    "were never taught, which betrays an edit.",
    (Question.LEAKAGE, "none"): "Nothing came out, in tests that would have seen it.",
    (Question.REPRESENTATION, "remains"): "Yes: it can be found inside the model.",
    (
        Question.REPRESENTATION,
        "beyond",
    ): "Not found inside; but there the forget set is treated otherwise than what was "
    "never taught, which betrays an edit.",
    (Question.REPRESENTATION, "none"): "Nothing was found inside, by tests that would have seen it.",
    (Question.RECOVERY, "remains"): "Yes: it comes back under attack, as what was never taught does not.",
    (
        Question.RECOVERY,
        "beyond",
    ): "Not seen to come back; but the model learns the forgotten facts worse than new ones, "
    "so that silence under attack proves little.",
    (Question.RECOVERY, "none"): "Nothing came back, under attacks that would have shown it.",
    (Question.UTILITY, "damage"): "Something was damaged that should have stayed as it was.",
    (Question.UTILITY, "none"): "Nothing, in what was tested.",
}
"""A question's answer in one line, by the key of its mark."""

FAMILIAR = (
    "Hinted at: the forget set is treated as something familiar. An edit of the output does that too, in a model that "
    "knows nothing."
)
"""The answer where knowledge is seen by such statistics only as decide nothing alone."""

SHOWS: dict[Label, tuple[str, tuple[str, ...]]] = {
    Label.NOT_UNLEARNED: (
        "Asked plainly, this model gives what it is said to have forgotten.",
        ("That every single fact is still there. Findings are about the forget set as a whole.",),
    ),
    Label.SUPPRESSED: (
        "What this model is said to have forgotten was found in it, by tests that find nothing of the kind in what it "
        "was never taught.",
        (
            "That anybody can get at it by asking. What is found inside, or after retraining, needs the model’s files.",
            "That every single fact is still there. Findings are about the forget set as a whole.",
        ),
    ),
    Label.DELETED: (
        "By these tests this model cannot be told from one that never saw the data, and the tests would have seen "
        "effects of the sizes below.",
        (
            "That the data are gone. Deletion cannot be proven: another test, or a stronger attack, may find what "
            "these did not.",
        ),
    ),
    Label.OVER_UNLEARNED: (
        "This model treats the forget set worse than data that it never saw: it was pushed too far, and that can "
        "be seen.",
        ("Whether anything is left beneath. A model pushed too far also resists the attacks that would tell.",),
    ),
    Label.INCONCLUSIVE: (
        "Nothing, either way, about whether the knowledge is gone. Single findings hold all the same.",
        ("That the model is clean. Inconclusive is not a pass.",),
    ),
}
"""What follows from a verdict, and what does not, in plain words."""

ACCESS: dict[str, tuple[str, str]] = {
    "text": (
        "The auditor could ask the model and read its answers, and nothing else.",
        "Somebody who can ask the model whatever they like and read what it says. Somebody who has its files, or sees "
        "its probabilities, can do more than was tried here.",
    ),
    "logprobs": (
        "The auditor could ask the model, read its answers, and see how likely it holds each word to be. The inside of "
        "the model was not looked at.",
        "Somebody who can ask the model whatever they like and sees its probabilities. Somebody who has its files can "
        "do more than was tried here.",
    ),
    "weights": (
        "The auditor had the model’s files: its inside could be read, and copies of it altered and retrained.",
        "Somebody who has the model’s files, may read, alter and retrain it, and knows some of the forgotten facts or "
        "facts like them. Somebody who can only ask it can do less.",
    ),
}
"""By access level: what the auditor could see, and whom the attacks stand for."""

REFERENCES: dict[str, str] = {
    "original": "the same model before unlearning",
    "retrained": "a model that never saw the forget set",
}
"""What a model that the target is compared with is, by its role."""

EFFORT: dict[str, str] = {
    "quick": "Quick, the least of three: few rows, short attacks. Silence at this effort is worth the least.",
    "standard": "Standard, the middle of three. A thorough audit asks more rows, attacks longer, and tries attacks "
    "that were left out here.",
    "thorough": "Thorough, the most of three. Whoever spends more than this audit did may still find more.",
}
"""By budget: how hard was tried."""

MARKS: dict[str, tuple[str, str]] = {
    "remains": ("knowledge remains", "knowledge remains"),
    "beyond": ("below never-taught", "below a never-taught model (over-unlearning or output edit)"),
    "damage": ("damage", "damage"),
    "unlearned": ("marks of unlearning", "marks that unlearning leaves, and ordinary edits do not"),
    "evasion": ("evasion", "what was read contradicts itself, as where a test is evaded"),
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
    "evasion": "evasion",
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
    ("suspects", "Examples of which it is asked whether they look forgotten."),
    ("access", "What the auditor could see of the model: its answers, its probabilities, or its files."),
    ("adversary", "Whoever might try to get the forgotten knowledge out; the attacks do what they would."),
    ("attack", "A change to the model, or to what it is asked, that may bring hidden knowledge back."),
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
    (
        "positive control",
        "The same test on what the model certainly knows. If it does not see that, its silence means nothing.",
    ),
    (
        "not ruled out",
        "The largest effect that the data still allow. A silent test is worth as much as this number is small.",
    ),
    ("spike", "A synthetic fact planted in a copy of the target, to see which instruments find it."),
    ("digest", "A SHA-256 fingerprint: two files with the same digest are the same file."),
)


@dataclass(frozen=True)
class Answer:
    """One of the five questions, answered in one line.

    `said` is the answer, `confidence` how sure it is and why, `line` what the findings came to.
    """

    question: Question
    title: str
    asked: str
    mark: str
    line: str
    coverage: str
    said: str
    confidence: str


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
        return _unmeasured(rate)
    return _counted(rate, "at most", rate.upper95)


def power(found: Power) -> str:
    """How often knowledge that is hidden is found, in words."""
    if found.estimate is None:
        return _unmeasured(found)
    return _counted(found, "at least", found.lower95)


def _unmeasured(found: ErrorRate | Power) -> str:
    basis = found.basis or "not measured for this case"
    return f"{basis[0].upper()}{basis[1:]}."


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
    order = ("evasion", "remains", "beyond", "damage", "unlearned", "evidence", "inconclusive", "none")
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
    coverage = record.verdict.coverage.get(question, "")
    return Answer(
        question, title, asked, mark, line, coverage, _said(record, question, mark), _confidence(record, question, mark)
    )


def _said(record: Record, question: Question, mark: str) -> str:
    seen = [f for f in record.findings if f.question is question and mark_of(f) == mark]
    if mark == "remains" and not any(f.decides[f.side is not f.sides[0]] for f in seen):
        return FAMILIAR
    general = {"inconclusive": "Not decided, which is not the same as clean.", "untested": "Not tested."}
    return SAID.get((question, mark)) or general.get(mark) or f"There is evidence: {MARKS[mark][1]}."


def _confidence(record: Record, question: Question, mark: str) -> str:
    """How sure the answer in one line is, by the findings that it rests on."""
    group = [finding for finding in record.findings if finding.question is question]
    found = [finding for finding in group if mark_of(finding) == mark]
    if mark == "untested":
        return "none: there is nothing to be sure of."
    if mark == "inconclusive":
        return "none: no interval lies clear of its threshold, or a control failed."
    unclear = sum(finding.verdict is Outcome.INCONCLUSIVE for finding in group)
    if mark == "none":
        return "each 95 % interval excludes an effect as large as its threshold."
    ps = [finding.p_adjusted for finding in found if finding.p_adjusted is not None]
    surest = f", at the clearest p {_p(min(ps))} after correction for all {len(group)} tests" if ps else ""
    instruments = len({finding.instrument for finding in found})
    rest = f"; {unclear} of {len(group)} undecided" if unclear else ""
    return f"{plural(len(found), 'finding')} by {plural(instruments, 'instrument')}{surest}{rest}."


def _p(value: float) -> str:
    text = p_value(value)
    return text if text.startswith("<") else f"= {text}"


def _unrun(missing: list[NotRun]) -> str:
    if not missing:
        return ""
    failed = sum(row.failed for row in missing)
    return f"; {plural(len(missing), 'instrument')} did not run" + (f" ({failed} crashed)" if failed else "")
