"""What of an audit speaks to which rule: GDPR with the EDPB's opinion on AI models, the EU AI Act, NIST's AI RMF.

    from reports.mapping import render_mapping

    text = render_mapping(record, ["gdpr", "nist"])

A table of passages, and of the topics in each that an audit can say something about. A topic names the questions or
instruments whose findings speak to it, or what of the record does; nothing here says that a rule is met, or is not.
Topics for which there is no finding, or no instrument at all, are listed as not tested. Articles and sections are
cited; paragraphs of the opinion only where its wording is quoted.

The table is data: a reader who knows the law better can correct a line without reading any code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from audit.record import Finding, Question, Record
from reports import words
from reports.faces.markdown import escaped, table
from reports.faces.parts import NAME, NOT_ADVICE, digest

TRACE, LEAKAGE, REPRESENTATION, RECOVERY, UTILITY = Question
LEFT = (LEAKAGE, REPRESENTATION, RECOVERY)


@dataclass(frozen=True)
class Topic:
    """One thing a passage is about. Findings speak to it by question, or by instrument where those are named."""

    name: str
    questions: tuple[Question, ...] = ()
    instruments: tuple[str, ...] = ()
    told: Callable[[Record], str] | None = None
    """What the record says of it, where it is no finding."""

    def findings(self, record: Record) -> list[Finding]:
        """Those of the record that speak to this."""
        return [f for f in record.findings if f.question in self.questions or f.instrument in self.instruments]


@dataclass(frozen=True)
class Passage:
    """An article, section or subcategory: what it asks, in short, and what stays outside of an audit."""

    cited: str
    asks: str
    topics: tuple[Topic, ...]
    outside: str


@dataclass(frozen=True)
class Framework:
    """One set of rules, with what has to be said of all of it."""

    title: str
    source: str
    note: str
    passages: tuple[Passage, ...]


# --- what a record says besides its findings ------------------------------------------------------------------


def _models(record: Record) -> str:
    named = [f"{role}: {model.name} (SHA-256 {model.digest[:16]}…)" for role, model in sorted(record.models.items())]
    return "; ".join(named) or "no model is recorded"


def _sets(record: Record) -> str:
    sets = sorted(record.case.sets.items())
    named = [f"{name}: {entry.count:,} rows, SHA-256 {entry.digest[:16]}…" for name, entry in sets]
    return "; ".join(named) or "no set is recorded"


def _made(record: Record) -> str:
    when = f", {record.created}" if record.created else ", without a date"
    return f"{record.tool.name} {record.tool.version}{when}, seed {record.environment.seed}"


def _access(record: Record) -> str:
    option = record.case.options
    return f"access {option.get('access', 'not recorded')}, budget {option.get('budget', 'not recorded')}"


def _limits(record: Record) -> str:
    return f"{words.plural(len(record.verdict.limits), 'limit')} stated: " + "; ".join(record.verdict.limits)


def _errors(record: Record) -> str:
    wrong, power = words.error_rate(record.verdict.false_positive_rate), words.power(record.verdict.power)
    return f"wrong verdicts: {wrong} Power: {power}"


def _verdict(record: Record) -> str:
    title, plain = words.LABELS[record.verdict.label]
    return f"{title}. {plain}"


def _controls(record: Record) -> str:
    passed = Counter(control.passed for finding in record.findings for control in finding.controls)
    return f"{passed[True]} controls passed, {passed[False]} failed, {passed[None]} for comparison only"


def _unrun(record: Record) -> str:
    failed = sum(row.failed for row in record.not_run)
    return f"{words.plural(len(record.not_run), 'instrument')} did not run, of which {failed} crashed"


# --- the frameworks -------------------------------------------------------------------------------------------

_OPINION = "EDPB Opinion 28/2024 of 17 December 2024"

GDPR = Framework(
    "GDPR, Article 17, and EDPB Opinion 28/2024",
    "Regulation (EU) 2016/679; " + _OPINION + " on certain data protection aspects related to the processing of "
    "personal data in the context of AI models",
    "Whether the forget set holds personal data, whether a ground for erasure applies, and whether a controller has "
    "met a duty is not for an audit to say. The audit concerns the rows of the forget set, and no other data.",
    (
        Passage(
            "GDPR Article 17(1)",
            "A data subject may obtain from the controller the erasure of personal data concerning them without undue "
            "delay, where one of the grounds (a) to (f) applies.",
            (
                Topic("what the audit says of the forget set as a whole", told=_verdict),
                Topic("whether the model was unlearned at all, or only edited", (TRACE,)),
                Topic("whether what was to be erased still comes out", (LEAKAGE,)),
                Topic("whether it is still inside", (REPRESENTATION,)),
                Topic("whether it comes back", (RECOVERY,)),
            ),
            "The grounds of Article 17(1)(a) to (f), the exceptions of Article 17(3), other copies of the data "
            "(training sets, backups, logs, models derived from this one), and how long erasure took.",
        ),
        Passage(
            f"{_OPINION}, paragraph 43: extraction",
            "For a model to be considered anonymous, the likelihood of direct (including probabilistic) extraction of "
            "personal data of those whose data were used to train it should be insignificant, taking into account all "
            "the means reasonably likely to be used by the controller or another person.",
            (
                Topic("readable from the weights or the inner states", (REPRESENTATION,)),
                Topic("brought back by someone who holds the weights", (RECOVERY,)),
                Topic("the means that were tried", told=_access),
                Topic("how often such a verdict is wrong", told=_errors),
            ),
            "Which means are reasonably likely to be used depends on cost, time, technology and who may reach the "
            "model: the audit says which it tried. An interval that stays inside a threshold is no proof of "
            "insignificance.",
        ),
        Passage(
            f"{_OPINION}, paragraph 43: queries",
            "Likewise the likelihood of obtaining such personal data from queries, intentionally or not, should be "
            "insignificant for any data subject.",
            (
                Topic("said in answer to plain questions, or more likely than it should be", (LEAKAGE,)),
                Topic(
                    "said in answer to prompts made to bring it out",
                    instruments=("in-context", "rwku", "sampling", "gcg", "soft-prompt", "dynamic", "reasoning"),
                ),
            ),
            "“For any data subject”: findings are means over the forget set; the table of examples in the record shows "
            "rows one by one, without an interval each. Filters around a deployed model are not part of the model "
            "folder.",
        ),
        Passage(
            f"{_OPINION}, section 3.2: testing and resistance to attacks",
            "Supervisory authorities may consider the scope, frequency, quantity and quality of the tests that a model "
            "was put to, among them structured tests against state-of-the-art attacks.",
            (
                Topic("membership inference", instruments=("membership", "shadow", "image-membership")),
                Topic("regurgitation of training data", instruments=("memorization", "sampling")),
                Topic(
                    "exfiltration, by prompts made to bring it out",
                    instruments=("in-context", "rwku", "gcg", "soft-prompt", "dynamic"),
                ),
                Topic("other attacks, which need the weights or further training", (RECOVERY,)),
                Topic("attribute inference"),
                Topic("model inversion"),
                Topic("reconstruction attacks"),
            ),
            "Attribute inference, model inversion and reconstruction, in the sense of those attacks, have no "
            "instrument here; reading an attribute from inner states (question 3) is something else.",
        ),
        Passage(
            f"{_OPINION}, section 3.2: documentation",
            "A claim of anonymity is to be judged by its documentation, tests included.",
            (
                Topic("what was tested", told=_models),
                Topic("with which data", told=_sets),
                Topic("by what, and when", told=_made),
                Topic("what did not run", told=_unrun),
                Topic("what the audit does not show", told=_limits),
            ),
            "Documents on the training data, on the design of the model, and any data protection impact assessment.",
        ),
    ),
)

AI_ACT = Framework(
    "EU AI Act, Articles 11 to 15 and Annex IV",
    "Regulation (EU) 2024/1689",
    "Articles 11 to 15 are requirements on high-risk AI systems. Whether the audited model is part of one is not for "
    "an audit to say; a model is not a system.",
    (
        Passage(
            "Article 11(1) and Annex IV, point 2(g)",
            "Technical documentation holds the validation and testing procedures used, the data used for them and "
            "their main characteristics, the metrics, and test logs and reports, dated and signed by those "
            "responsible.",
            (
                Topic("what was tested", told=_models),
                Topic("the data and their characteristics", told=_sets),
                Topic("log and date", told=_made),
                Topic("tests of unlearning, with metrics and intervals", (TRACE, *LEFT)),
                Topic("tests of what was to be kept", (UTILITY,)),
            ),
            "A signature is made by people: `audit sign` makes one over the audit. All other points of Annex IV.",
        ),
        Passage(
            "Annex IV, points 3 and 4",
            "Capabilities and limitations in performance, foreseeable unintended outcomes; and why the performance "
            "metrics are appropriate.",
            (
                Topic("damage done by unlearning", (UTILITY,)),
                Topic("limits of the audit", told=_limits),
                Topic("whether each metric could have been misled", told=_controls),
            ),
            "Performance for the intended purpose, and for particular persons or groups.",
        ),
        Passage(
            "Article 12(1)",
            "High-risk AI systems technically allow for the automatic recording of events (logs) over their lifetime.",
            (Topic("a record of this audit, which is one event", told=_made),),
            "Logging of the system in use. An audit record is no such log, and can only be kept beside it.",
        ),
        Passage(
            "Article 13(3)(b)",
            "Instructions for use state the level of accuracy, robustness and cybersecurity against which the system "
            "was tested, and known or foreseeable circumstances that may affect it.",
            (
                Topic("measured accuracy on what was to be kept", (UTILITY,)),
                Topic("circumstances in which forgotten knowledge comes back", (RECOVERY,)),
                Topic("errors of the audit itself", told=_errors),
            ),
            "The intended purpose, and the wording of the instructions.",
        ),
        Passage(
            "Article 14(4)(a) and (b)",
            "Those who oversee a system can understand its capacities and limitations, and stay aware of automation "
            "bias.",
            (
                Topic("the verdict in words", told=_verdict),
                Topic("what the audit does not show", told=_limits),
                Topic("what did not run", told=_unrun),
            ),
            "Measures of oversight in the system, and who carries them out. The verdict is for a person to weigh.",
        ),
        Passage(
            "Article 15(1) and (3)",
            "An appropriate level of accuracy, declared with its metrics.",
            (Topic("accuracy on retained and neighbouring data", (UTILITY,)),),
            "What level is appropriate to the intended purpose.",
        ),
        Passage(
            "Article 15(4)",
            "Resilience as regards errors, faults or inconsistencies.",
            (
                Topic(
                    "whether ordinary changes undo the unlearning",
                    instruments=("quantize", "prune", "noise", "relearn-tiers", "continual"),
                ),
            ),
            "Faults of hardware, of the environment and of other systems; feedback loops.",
        ),
        Passage(
            "Article 15(5)",
            "Resilience against attempts by unauthorised third parties to alter use, outputs or performance by "
            "exploiting vulnerabilities; where appropriate, measures against data poisoning, model poisoning, "
            "adversarial examples, confidentiality attacks and model flaws.",
            (
                Topic("confidentiality: does it come out", (LEAKAGE,)),
                Topic("confidentiality: does it come back under attack", (RECOVERY,)),
                Topic("forget requests made to do harm", instruments=("trigger", "shortcut")),
                Topic("data poisoning, model poisoning, adversarial examples"),
            ),
            "Every measure around the model: access, monitoring, response.",
        ),
    ),
)

NIST = Framework(
    "NIST AI RMF 1.0, MEASURE",
    "NIST AI 100-1 (January 2023), table 3",
    "The framework is voluntary. Its outcomes are an organisation’s; an audit is one input to some of them.",
    (
        Passage(
            "MEASURE 1.1",
            "Approaches and metrics for the most significant risks are selected; risks that will not or cannot be "
            "measured are documented.",
            (
                Topic("what was measured of what is left", LEFT),
                Topic("what could not be measured", told=_unrun),
                Topic("limits", told=_limits),
            ),
            "Which risks are the most significant, which the MAP function finds.",
        ),
        Passage(
            "MEASURE 1.3",
            "Internal experts who were not front-line developers, or independent assessors, take part in assessments.",
            (Topic("who made the record", told=_made),),
            "Who ran the audit and how independent they are: a signature and reviewer’s notes can say so.",
        ),
        Passage(
            "MEASURE 2.1",
            "Test sets, metrics and details about the tools used during TEVV are documented.",
            (
                Topic("test sets", told=_sets),
                Topic("tools", told=_made),
                Topic("models", told=_models),
            ),
            "Tests made outside of this audit.",
        ),
        Passage(
            "MEASURE 2.3",
            "Performance is measured for conditions similar to deployment, and documented.",
            (Topic("what was to be kept", (UTILITY,)),),
            "Conditions of deployment are not known to the audit.",
        ),
        Passage(
            "MEASURE 2.5",
            "The system is demonstrated to be valid and reliable; limits of generalizability are documented.",
            (
                Topic("general ability after unlearning", (UTILITY,)),
                Topic("limits", told=_limits),
            ),
            "Validity for the intended use.",
        ),
        Passage(
            "MEASURE 2.7",
            "Security and resilience are evaluated and documented.",
            (
                Topic("attacks that bring knowledge back", (RECOVERY,)),
                Topic("attacks tried, and with what access", told=_access),
                Topic("requests that plant a harmless word as a trigger", instruments=("trigger", "shortcut")),
            ),
            "Security of the system around the model.",
        ),
        Passage(
            "MEASURE 2.9",
            "The model is explained, validated and documented, and output is interpreted within its context.",
            (Topic("where inside the knowledge was found, or not", (REPRESENTATION,)),),
            "Explanation of decisions to those affected.",
        ),
        Passage(
            "MEASURE 2.10",
            "Privacy risk is examined and documented.",
            (
                Topic("leakage of the forget set", (LEAKAGE,)),
                Topic("membership inference", instruments=("membership", "shadow", "image-membership")),
                Topic("still inside, or brought back", (REPRESENTATION, RECOVERY)),
            ),
            "Privacy of all other data, and of the people who use the system.",
        ),
        Passage(
            "MEASURE 2.13",
            "The effectiveness of the TEVV metrics and processes themselves is evaluated and documented.",
            (
                Topic("controls", told=_controls),
                Topic("error rate and power", told=_errors),
            ),
            "Effectiveness on models unlike those on which error and power were measured.",
        ),
        Passage(
            "MEASURE 3.1",
            "Risks are tracked regularly over time.",
            (Topic("a state to compare with (`audit diff`, `audit check`)", told=_made),),
            "That audits are repeated, and acted upon.",
        ),
        Passage(
            "MEASURE 4.2",
            "Results on trustworthiness in deployment contexts are informed by domain experts, to check that the "
            "system performs as intended.",
            (),
            "Nothing in an audit speaks to this; its findings are what experts could be asked about. MEASURE 2.2, 2.4, "
            "2.6, 2.8, 2.11, 2.12, 3.2, 3.3, 4.1 and 4.3 are not touched either.",
        ),
    ),
)

FRAMEWORKS = {"gdpr": GDPR, "ai-act": AI_ACT, "nist": NIST}
"""By the name that `audit report --mapping` takes."""


# --- the page -------------------------------------------------------------------------------------------------


def render_mapping(record: Record, names: Sequence[str] = tuple(FRAMEWORKS)) -> str:
    """The mapping as Markdown, of the frameworks named."""
    title, plain = words.LABELS[record.verdict.label]
    lines = [
        "# What this audit speaks to",
        "",
        f"**{NOT_ADVICE}** It does not say that a rule is met, or broken: it lists which findings bear on which "
        "passage, and what was not tested. The wording of the rules is shortened here; their own text counts.",
        "",
        f"Case: {escaped(record.case.name, NAME) or 'without a name'}. Verdict: {title}. {plain} Record: SHA-256 "
        f"`{digest(record)}`.",
        "",
    ]
    for name in FRAMEWORKS:
        if name in names:
            lines += _framework(record, FRAMEWORKS[name])
    return "\n".join(lines).rstrip("\n") + "\n"


def _framework(record: Record, framework: Framework) -> list[str]:
    lines = [f"## {framework.title}", "", f"{framework.source}. {framework.note}", ""]
    for passage in framework.passages:
        lines += [f"### {passage.cited}", "", passage.asks, ""]
        if passage.topics:
            rows = [[topic.name, *_spoken(record, topic)] for topic in passage.topics]
            lines += table(["what an audit can speak to", "what this one says", "not tested"], rows)
        lines += [f"Outside of the audit: {passage.outside}", ""]
    return lines


def _spoken(record: Record, topic: Topic) -> list[str]:
    """What this audit says of a topic, and what it left out."""
    if topic.told is not None:
        return [escaped(topic.told(record)), ""]
    if not topic.questions and not topic.instruments:
        return ["nothing", "**not tested**: no instrument here"]
    findings = topic.findings(record)
    told = []
    for mark, (short, _) in words.MARKS.items():
        named = [finding.id for finding in findings if words.mark_of(finding) == mark]
        if named:
            told.append(f"**{short}** in {len(named)}: {escaped(', '.join(named), 600)}")
    missing = [
        row.instrument
        for row in record.not_run
        if row.question in topic.questions or row.instrument in topic.instruments
    ]
    silent = [
        name for name in topic.instruments if name not in {f.instrument for f in findings} and name not in missing
    ]
    gaps = [f"did not run: {escaped(', '.join(missing), 400)}"] if missing else []
    gaps += [f"not asked for: {', '.join(silent)}"] if silent else []
    gaps += [f"no finding on: {q.value}" for q in topic.questions if all(f.question is not q for f in findings)]
    if not findings:
        gaps = ["**not tested**", *gaps]
    return ["<br>".join(told) or "nothing", "; ".join(gaps)]
