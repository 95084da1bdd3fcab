"""What the trace detectors share: which prompts they ask, and how a fingerprint becomes a finding.

A finding's estimate is the classifier's log-odds that the target was unlearned rather than ordinarily edited
(`detectors.fingerprint`). Evidence needs both: more than ordinary fine-tunes of *this* original have, matched to the
target's change (`trace`), and more than all but 1 % of the ordinary edits of known history that the classifier
did not see. Without matched fine-tunes there is no test, and nothing is concluded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from audit.case import Case
from audit.evidence import Evidence
from audit.instrument import Instrument
from audit.loaders import Example
from audit.record import Control, Figure, Finding, Series, Side, Table
from audit.statistics import dealt, jackknife_error
from audit.tokens import Tokens
from detectors.fingerprint import SETS, Classifier, Features, shipped_classifier

if TYPE_CHECKING:
    from audit.target import Target

__all__ = [
    "GROUPS", "NULL", "SOURCE", "Use", "asked_sets", "beginnings", "in_words", "is_edit_of_original", "predictive_p",
    "rows_of", "trace_findings",
]  # fmt: skip

NULL = "original+null@"
"""Roles of the matched fine-tunes begin so."""

SOURCE = "Chen et al. 2025 (Unlearning Isn't Invisible), arXiv 2506.14003; matched null: this project, 2026"
GROUPS = 10
POSITIONS = 4
_MARGIN = 0.5

Use = Mapping[str, NDArray[np.bool_]]
"""Which rows to use of every set."""


def is_edit_of_original(role: str) -> bool:
    """The target, or a fine-tune matched to it."""
    return role == "target" or role.startswith(NULL)


def rows_of(case: Case, name: str) -> tuple[Example, ...]:
    """The rows of a set that are asked about; entities evenly."""
    return case.rows(name, {"quick": 60, "standard": 120, "thorough": 240}[case.options.budget.value])


def asked_sets(case: Case) -> list[str]:
    """The sets of the case that prompts are taken from."""
    return [name for name in SETS if name in case.sets]


def beginnings(case: Case, target: Target, name: str) -> tuple[Tokens, ...]:
    """Prompts with the first tokens of their answers, which is where an answer is decided."""
    return tuple(target.encode(row.prompt, row.answer).begun(POSITIONS) for row in rows_of(case, name))


def predictive_p(value: float, draws: Sequence[float]) -> float | None:
    """One-sided p-value of a value as a further draw from a normal law of which K draws are known.

    t = (value - mean) / (s sqrt(1 + 1/K)) on K - 1 degrees of freedom. None for fewer than three draws.
    """
    from scipy.stats import t as student

    if len(draws) < 3 or not math.isfinite(value):
        return None
    spread = float(np.std(draws, ddof=1)) * math.sqrt(1 + 1 / len(draws))
    return float(student.sf((value - float(np.mean(draws))) / max(spread, 1e-12), len(draws) - 1))


def trace_findings(
    instrument: Instrument,
    case: Case,
    evidence: Evidence,
    words: str,
    rows: Mapping[str, tuple[Example, ...]],
    features: Callable[[Case, Evidence, str, Use], Features],
) -> list[Finding]:
    """A finding on prompts that have nothing to do with the forget set, and one on all.

    `features` computes the fingerprint of a role from a part of `rows`, the examples of every set that is asked about.
    """
    every = {name: np.ones(len(examples), dtype=bool) for name, examples in rows.items()}
    roles = ["target", *(role for role in evidence.roles if role.startswith(NULL))]
    whole = {role: features(case, evidence, role, every) for role in roles}
    kinds = [("irrelevant", "forget-irrelevant prompts", {k: v for k, v in rows.items() if k != "forget"})]
    if "forget" in rows:
        kinds.append(("all", "forget-relevant and irrelevant prompts", dict(rows)))
    return [
        _finding(
            instrument,
            case,
            name=name,
            words=f"{words}, {split}",
            split=split,
            rows=used,
            # A number is of one set, or of two: without the forget set those that name it are not there.
            found={
                role: {k: v for k, v in of.items() if "forget" in used or "forget" not in k}
                for role, of in whole.items()
            },
            features_of=lambda use: features(case, evidence, "target", use),
        )
        for name, split, used in kinds
    ]


def _finding(
    instrument: Instrument,
    case: Case,
    *,
    name: str,
    words: str,
    split: str,
    rows: Mapping[str, tuple[Example, ...]],
    found: Mapping[str, Features],
    features_of: Callable[[Use], Features],
) -> Finding:
    """The finding on one fingerprint, from those `found` by role; `features_of` gives the target's of fewer rows."""
    clusters = {name: np.array(case.clusters(examples)) for name, examples in rows.items()}
    features = found["target"]
    classifier = shipped_classifier(tuple(features))
    score = classifier.score(features)
    lo, hi = _jackknife(score, classifier, features_of, clusters, case.options.seed)
    nulls = [classifier.score(of) for role, of in found.items() if role != "target"]
    was_unlearned = classifier.table.unlearned
    ordinary, unlearned = classifier.held_out[~was_unlearned], classifier.held_out[was_unlearned]
    middle = float(np.mean(nulls)) if nulls else float(np.median(ordinary))
    needed = classifier.highest_ordinary
    p = predictive_p(score, nulls)
    matched = Control(
        name="matched null",
        description=f"log-odds of {len(nulls)} ordinary fine-tunes of the original that change it as much, in the same "
        "places"
        if nulls
        else "without ordinary fine-tunes of this very original to compare with, the score says only what it is like",
        estimate=middle if nulls else None,
        n=len(nulls),
        passed=p is not None,
        gates="evidence",
    )
    able = float(np.mean(unlearned > needed))
    power = Control(
        name="positive control",
        description="share of the models known to be unlearned that score above the threshold, each by a classifier "
        "that saw neither its method nor its original",
        estimate=able,
        n=len(unlearned),
        passed=able >= 0.9,
        gates="silence",
    )
    alarms = Control(
        name="ordinary edits",
        description="log-odds that 99 % of the ordinary edits of known history stay below, judged in the same way",
        estimate=needed,
        n=len(ordinary),
    )
    return Finding(
        id=f"{instrument.name}/{name}",
        instrument=instrument.name,
        question=instrument.question,
        statistic=words,
        split=split,
        estimate=score,
        ci95=(lo, hi),
        n=sum(len(np.unique(c)) for c in clusters.values()),
        unit="log-odds",
        orientation="more like unlearned models than like ordinarily edited ones",
        null="an ordinary fine-tune of the original, as large and in the same places, scores as high",
        null_value=middle,
        p_value=p,
        smallest_p=None if p is None else 0.0,
        threshold=max(needed - middle, _MARGIN),
        decides=(False, False),
        sides=(Side.UNLEARNED, Side.NEITHER),
        controls=[matched, power, alarms],
        reference=SOURCE,
        figure=Figure(
            kind="distribution",
            title=f"Fingerprint of the change, {split}",
            alt=f"The target's log-odds, {score:.2f}, beside those of ordinary edits, of unlearned models and of "
            "matched fine-tunes; in the table what they are made of.",
            x_label="log-odds of unlearned against ordinarily edited",
            y_label="share of models",
            series=[
                Series(label="ordinary edits of known history", x=_listed(ordinary), y=[], role="control"),
                Series(label="unlearned models of known history", x=_listed(unlearned), y=[], role="reference"),
                *([Series(label="matched fine-tunes", x=_listed(nulls), y=[], role="target")] if nulls else []),
            ],
            reference_lines={"this target": score},
        ),
        table=_reasons(classifier, features),
    )


def _jackknife(
    score: float,
    classifier: Classifier,
    features_of: Callable[[Use], Features],
    clusters: Mapping[str, NDArray[np.str_]],
    seed: int,
) -> tuple[float, float]:
    """95 % interval of the log-odds over entities: up to `GROUPS` groups of them are left out in turn."""
    from scipy.stats import t as student

    rng = np.random.default_rng(seed)
    groups = min(GROUPS, *(len(np.unique(who)) for who in clusters.values()))
    if groups < 2:
        return math.nan, math.nan
    group = {name: dealt(who, groups, rng) for name, who in clusters.items()}
    without = [classifier.score(features_of({name: g != left for name, g in group.items()})) for left in range(groups)]
    error = jackknife_error(without)
    half = float(student.ppf(0.975, groups - 1)) * error
    return score - half, score + half


def _listed(values: Sequence[float] | NDArray[np.float64]) -> list[float]:
    return [float(f"{value:.4g}") for value in values if math.isfinite(value)]


def _reasons(classifier: Classifier, features: Features) -> Table:
    """What moved the log-odds most, in words, and what the fingerprint is most like."""
    moved = sorted(classifier.contributions(features).items(), key=lambda item: -abs(item[1]))
    return Table(
        columns=["what", "in words", "value", "adds to the log-odds"],
        rows=[[name, in_words(name), features[name], share] for name, share in moved[:20]]
        + [
            [f"most like: {history}", "by the same numbers", chance, None]
            for history, chance in classifier.alike(features)
        ],
    )


_PLACES = (
    "after the first block",
    "a quarter of the way up",
    "half-way up",
    "three quarters of the way up",
    "after the last block",
)
_WORDS = {
    "kl": "how far next-token distributions moved from the original's",
    "kl-asymmetry": "whether they lost likely words or gained unlikely ones",
    "kl-spread": "how unevenly over the prompts they moved",
    "entropy": "how much less sure of the next word",
    "entropy-spread": "how unevenly sure",
    "first": "how much likelier the original's first choice became",
    "flipped": "share of first choices that changed",
    "least": "how much less likely the least likely words became",
    "coherence": "how much all prompts moved alike",
    "rank": "how much of the movement lies along one line",
    "kurtosis": "how much of the movement falls on few words",
    "skew": "whether words are pushed up or down more",
    "words": "over how many words the common movement spreads",
    "target-entropy": "how unsure the target is",
    "target-sure": "how sure the target is of its first choice",
    "right": "how much likelier the right word became",
    "cosine": "whether both sets moved in one direction",
    "moved": "how far the states moved",
    "longer": "how much longer the states became",
    "same-answer": "how often the commonest answer is given",
    "answers": "how many different answers are given",
    "sure": "how sure of the first choice",
    "spread": "how far likely and unlikely words lie apart",
    "changed": "share of answers that are not the original's",
    "likeness": "how like the original's the answers are, letter by letter",
    "told-apart": "how well answers are told from the original's on other prompts",
    "length": "how much longer answers became",
    "refusals": "how often an answer declines",
}


def in_words(name: str) -> str:
    """A feature's name as a phrase: `retain.2.moved` is `how far the states moved half-way up, on retain prompts`."""
    alone = name.startswith("alone.")
    parts = name.removeprefix("alone.").removeprefix("text.").replace("text-", "").split(".")
    key = parts[-1].removeprefix("more-")
    words = ("how much more than in the original: " if key != parts[-1] else "") + _WORDS.get(key, key)
    if len(parts) == 3:
        words += f" {_PLACES[int(parts[1])]}"
    one, dash, other = parts[0].partition("-")
    where = f"on {one} prompts rather than on {other} prompts" if dash else f"on {one} prompts"
    return f"{words}, {where}" + (" (the target alone)" if alone else "")
