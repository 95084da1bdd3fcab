"""Dynamic queries: probes built from the forget set itself, from one rewriting to several on top of each other.

    recovered_g(w) = share of group g whose right answer is preferred when it is asked in way w,   g = forget, holdout
    finding        = recovered_forget - recovered_holdout, for the way where it is largest

======================  ===========================================================================================
paraphrase              as other rows with the same options ask it of others; else in synonyms and another frame
alias                   the entity by its initials, or by its last word alone
reverse                 the answer is told, and the entity asked for
two hops                the entity is not named, but described by another of its facts, or by two or three
======================  ===========================================================================================

Difficulty is how many rewritings are put on top of each other, counting every fact of a description as one: 1 at budget
quick, up to 2 at standard, up to 3 at thorough (`probes`).

*What the original knows* is elicited with the same questions. It has to know the forget facts better than holdout
facts, or silence shows nothing (control `elicited`), and recovery by a single hop and by several is put side by side
for those rows of which it knows both the fact and all facts of the description: the last rows of the table.

*Same answer* (FaithUn): retained facts with the same answer as a forgotten one should stay. What they lost against the
original, by plain asking, is a control that decides nothing: damage, not knowledge that is left.

*Pathways*: how alike the states of target and original are where the answer begins, block by block: the cosine of the
states less their mean over the set in either model, for two hops minus that for plain asking. Above holdout rows' where
unlearning redirected the plain question and left the longer way as it was; but a model that never knew whom the plain
question names stands apart from the original there too. Decides nothing.

Source: Unlearning Mirage (arXiv 2603.11266), of which a summary was at hand, neither paper nor code: what is done here
is a reconstruction. FaithUn (Yang et al. 2025, arXiv 2502.19207) for same-answer and multi-hop questions.

Traps:

- *Rows are not chosen by what the original answers.* Among forget rows that it answers right, those that any model
  guesses right are too many, and no holdout rows match them. The finding covers all rows, and only the table selects.
- *Not every description tells who is meant.* Facts that many share ("the person who has a pet dog") describe nobody.
  The retain rows of a way say whether its questions can be answered at all.
- *The facts of a description are forgotten too*: a second hop that fails may fail at the first.
- *Templates make stiff English*; small base models follow it badly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from attacks.prompting import OPTIONS, PLAIN, Asked, Prompting, Way, encoded, fitting, plainly
from attacks.recall import SETS, Floats, mean_row
from attacks.rewording import Facts, asked_back, form, statement, uncapitalised, with_synonyms
from audit.arrays import alike, finite
from audit.case import Case
from audit.contrast import Statistic, against_never_taught
from audit.evidence import Evidence
from audit.instrument import Access
from audit.loaders import Example
from audit.plan import Generate, Request
from audit.quantities import hidden
from audit.record import Control, Finding, Side
from audit.statistics import one_sample, two_sample

if TYPE_CHECKING:
    from audit.target import Target

__all__ = ["Dynamic", "by_initials", "by_last_word", "described", "paraphrased", "pathway", "probes"]

_SOURCE = "Unlearning Mirage (arXiv 2603.11266), reconstructed; FaithUn (Yang et al. 2025, arXiv 2502.19207)"
_KNOWN = 0.5
"""From here on a row counts as known: the right answer is preferred, or half of it is said."""
_STATES = 120  # rows a set whose states are kept
_DEPTHS = 12  # blocks whose states are kept
_FEWEST = 4  # rows a set below which states are not compared

PREFERRED = Statistic(
    "preferred", "the right answer is preferred when asked in a rewritten question", "accuracy",
    "rewritten questions reach forgotten facts: knowledge remains", (0.0, 1.0), 0.1, _SOURCE,
)  # fmt: skip
SAID = Statistic(
    "said", "ROUGE-L recall of what is answered to a rewritten question", "recall",
    "rewritten questions reach forgotten facts: knowledge remains", (0.0, 1.0), 0.1, _SOURCE,
)  # fmt: skip
PATHWAY = Statistic(
    "pathway", "states as the original's, cosine: two hops minus plain asking", "cosine",
    "plain questions were redirected, questions in two hops were not", (-2.0, 2.0), 0.1, _SOURCE, (False, False),
)  # fmt: skip

PERSON = "this person"
_SENTENCE_ENDS = re.compile(r"(?<=[.!?]) (?=[A-Z])")
_YES = re.compile(r"^(Yes|No|Indeed|Certainly|Of course), ")

Rewrite = Callable[[Example], Example]
"""From a row to the row asked otherwise; the row itself where that cannot be done."""


@dataclass(frozen=True)
class Probe:
    """A way of asking made of rewritings: `difficulty` of them, with so many `facts` in place of the name."""

    name: str
    steps: tuple[Rewrite, ...]
    difficulty: int
    facts: int = 0

    def rewrite(self, row: Example) -> Example:
        """All steps, or none if one of them does not fit."""
        out = row
        for step in self.steps:
            changed = step(out)
            if changed == out:
                return row
            out = changed
        return out

    def ask(self, row: Example) -> Asked:
        """The question as it is put."""
        return plainly(self.rewrite(row))


def paraphrased(facts: Facts, row: Example) -> Example:
    """The question as others are asked it, where the rows show how; else in another frame, with synonyms."""
    known = facts.phrasings(row)
    if known:
        return replace(row, prompt=facts.draw(row).choice(known))
    prompt = with_synonyms(row.prompt)
    frames = {
        "question": f"Somebody would like to know: {uncapitalised(prompt)}",
        "gap": f"Somebody left a word out. {prompt}",
        "prefix": f"Everybody knows that {prompt}",
    }
    return replace(row, prompt=frames[form(row.prompt)])


def by_initials(facts: Facts, row: Example) -> Example:
    """`Anna Maria Berg` as `A. M. Berg`."""
    words = facts.name(row).split()
    short = " ".join([*(f"{word[0]}." for word in words[:-1]), *words[-1:]])
    return replace(row, prompt=row.prompt.replace(facts.name(row), short)) if len(words) > 1 else row


def by_last_word(facts: Facts, row: Example) -> Example:
    """`Anna Maria Berg` as `Berg`."""
    words = facts.name(row).split()
    return replace(row, prompt=row.prompt.replace(facts.name(row), words[-1])) if len(words) > 1 else row


def described(facts: Facts, count: int, row: Example) -> Example:
    """The entity by so many other facts of its own, in answers too; the row itself where there are fewer."""
    name, told = facts.name(row), describing(facts, count, row)
    if not name or name not in row.prompt or len(told) < count:
        return row
    whose = " and ".join(
        f"who{text.removeprefix(PERSON)}" if text.startswith(f"{PERSON} ") else f"of whom it is true that {text}"
        for text in map(uncapitalised, told.values())
    )
    prompt, unnamed = row.prompt, row.prompt.replace(name, PERSON)
    if form(prompt) == "prefix" and prompt.startswith(f"{name} ") and prompt.count(name) == 1:
        asked = f"The person {whose}{prompt.removeprefix(name)}"
    else:  # a possessive, or a question's order of words, takes no clause: the description comes first
        asked = f"Think of the person {whose}. {unnamed}"
    answer, *wrong = (text.replace(name, PERSON) for text in (row.answer, *row.wrong))
    return replace(row, prompt=asked, answer=answer, wrong=tuple(wrong))


def describing(facts: Facts, count: int, row: Example) -> dict[str, str]:
    """Facts that describe a row's entity, at most so many: by row id a sentence about "this person"."""
    found: dict[str, str] = {}
    for other in facts.siblings(row) if facts.name(row) else ():
        told = facts.without_name(other, statement(other), PERSON)
        said = [text for text in _SENTENCE_ENDS.split(told) if PERSON in text]
        if said and len(found) < count:
            found[other.id] = _YES.sub("", said[0]).rstrip(".")
    return found


def probes(facts: Facts, difficulty: int) -> list[Probe]:
    """All probes up to a difficulty: how many rewritings are put on top of each other."""
    paraphrase, initials, last = (partial(rewrite, facts) for rewrite in (paraphrased, by_initials, by_last_word))
    hop = {count: partial(described, facts, count) for count in (1, 2, 3)}
    every = [
        Probe("paraphrase", (paraphrase,), 1),
        Probe("alias: initials", (initials,), 1),
        Probe("alias: last word", (last,), 1),
        Probe("reverse", (lambda row: asked_back(facts, row, OPTIONS),), 1),
        Probe("two hops", (hop[1],), 1, facts=1),
        Probe("paraphrase of an alias", (paraphrase, initials), 2),
        Probe("two hops, paraphrased", (paraphrase, hop[1]), 2, facts=1),
        Probe("two hops by two facts", (hop[2],), 2, facts=2),
        Probe("two hops by two facts, paraphrased", (paraphrase, hop[2]), 3, facts=2),
        Probe("two hops by three facts", (hop[3],), 3, facts=3),
    ]
    return [probe for probe in every if probe.difficulty <= difficulty]


def pathway(target: ArrayLike, original: ArrayLike) -> Floats:
    """Cosine of two models' states, each less its mean over the rows: [n, layers] from [n, layers, width] twice.

    0 where a state does not differ from the mean. Raises `ValueError` for other shapes, or fewer than two rows.
    """
    a, b = finite(target, "target", 3), finite(original, "original", 3)
    alike(a, b, "target", "original")
    if len(a) < 2:
        raise ValueError("target has one row: a mean over rows is taken off")
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.asarray(np.divide((a * b).sum(axis=-1), lengths, out=np.zeros(lengths.shape), where=lengths > 0))


class Dynamic(Prompting):
    """Do questions rewritten from the forget set itself reach its facts?"""

    name = "dynamic"
    title = "Do rewritten questions reach it?"
    roles = ("original",)
    reference = _SOURCE
    preferred = PREFERRED
    said = SAID
    axis = "probe"
    asked_roles = ("target", "original", "retrained")

    def ways(self, case: Case) -> Sequence[Way]:
        """All probes up to the difficulty that the budget allows."""
        ways = [Way(probe.name, probe.ask) for probe in self._probes(case, Facts(case))]
        return fitting(ways, self.rows(case, "forget"))

    def _probes(self, case: Case, facts: Facts) -> list[Probe]:
        return probes(facts, {"quick": 1, "standard": 2, "thorough": 3}[case.options.budget.value])

    def requests(self, case: Case, target: Target) -> list[Request | Generate]:
        """Every probe, and the states of target and original at the answer, asked plainly and in two hops."""
        made = super().requests(case, target)
        if target.role not in ("target", "original") or case.options.access < Access.WEIGHTS:
            return made
        blocks = np.unique(np.linspace(target.layers - 1, 0, min(target.layers, _DEPTHS)).round()).astype(int)
        states = hidden(*(f"blocks.{i}.hook_resid_post" for i in blocks))
        for name, rows in self._described(case).items():
            for kind in ("plain", "hops"):
                asked = [plainly(row if kind == "plain" else hopped) for row, hopped in rows]
                tokens = tuple(encoded(target, a, a.answer).begun(1) for a in asked)
                made.append(
                    Request(f"{self.name}/states/{kind}/{name}", tokens, (states,), {"blocks": blocks.tolist()})
                )
        return made

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """The probe that recovers most, and where inside the long way and the short one part."""
        found = super().measure(case, evidence)
        if evidence.has("target", f"{self.name}/states/plain/forget"):
            found.append(self._pathway(case, evidence))
        return found

    def _finding(
        self, case: Case, evidence: Evidence, statistic: Statistic, value: Callable[[str, str, Way], Floats]
    ) -> Finding:
        finding = super()._finding(case, evidence, statistic, value)
        rows = {name: self.rows(case, name) for name in SETS if name in case.sets}
        plain = {name: value("original", name, Way(PLAIN, plainly)) for name in rows}
        if "holdout" in rows:
            finding.controls.append(_elicited(case, rows, plain))
        if "retain" in rows:
            lost = plain["retain"] - value("target", "retain", Way(PLAIN, plainly))
            finding.controls += _same_answer(case, rows, lost)
        if finding.table is not None:
            finding.table.rows += self._hops(case, rows["forget"], plain["forget"], value)
        return finding

    def _hops(
        self,
        case: Case,
        rows: tuple[Example, ...],
        plain: Floats,
        value: Callable[[str, str, Way], Floats],
    ) -> list[list[str | int | float | None]]:
        """Rows of the table: one hop against several, where the original knows the fact and those that describe."""
        facts = Facts(case)
        known = {row.id for row, score in zip(rows, plain, strict=True) if score >= _KNOWN}
        table: list[list[str | int | float | None]] = []
        for probe in (probe for probe in self._probes(case, facts) if probe.facts):
            kept = np.array(
                [
                    row.id in known
                    and probe.rewrite(row) != row
                    and known.issuperset(describing(facts, probe.facts, row))
                    for row in rows
                ]
            )
            if not kept.any():
                continue
            clusters = np.array(case.clusters(rows))[kept]
            for role in (role for role in self.asked_roles if role in case.models):
                for label, way in ((PLAIN, Way(PLAIN, plainly)), (probe.name, Way(probe.name, probe.ask))):
                    what = [role, f"forget, known to the original ({probe.name})", label]
                    table.append(mean_row(what, value(role, "forget", way)[kept], clusters, seed=case.options.seed))
        return table

    def _described(self, case: Case) -> dict[str, list[tuple[Example, Example]]]:
        """By set, rows and the same in two hops, where that can be done; nothing if a set has too few."""
        facts = Facts(case)
        found = {}
        for name in (name for name in SETS if name in case.sets):
            rows = [(row, described(facts, 1, row)) for row in self.rows(case, name)]
            found[name] = [(row, hopped) for row, hopped in rows if hopped != row][:_STATES]
        return found if all(len(rows) >= _FEWEST for rows in found.values()) else {}

    def _pathway(self, case: Case, evidence: Evidence) -> Finding:
        """How much more of the original's states is left in two hops than by plain asking, after every block."""
        rows = {name: tuple(row for row, _ in pairs) for name, pairs in self._described(case).items()}
        blocks = evidence.extra("target", f"{self.name}/states/plain/forget")["blocks"]

        def states(role: str, kind: str, name: str) -> Floats:
            found = evidence.iterate(role, f"{self.name}/states/{kind}/{name}")
            return np.array([values["hidden"][0] for values in found], dtype=np.float64)

        def score(role: str, name: str) -> Floats:
            likeness = {k: pathway(states(role, k, name), states("original", k, name)) for k in ("plain", "hops")}
            return likeness["hops"] - likeness["plain"]

        axis = ("after block", [float(i) for i in blocks])
        return against_never_taught(
            self, case, evidence, PATHWAY, score, columns=axis, rows=rows, roles=("target",), seen_anywhere=True,
            sides=(Side.NEITHER, Side.NEITHER),
        )  # fmt: skip


def _elicited(case: Case, rows: Mapping[str, tuple[Example, ...]], plain: Mapping[str, Floats]) -> Control:
    """Does the original know what was to be forgotten?"""
    clusters = [case.clusters(rows[name]) for name in ("forget", "holdout")]
    found = two_sample(plain["forget"], plain["holdout"], *clusters, bounds=(0.0, 1.0), seed=case.options.seed)
    return Control(
        name="elicited",
        description="forget rows over holdout rows in the original, plainly asked: what it never knew cannot come back",
        estimate=found.value,
        ci95=(found.lo, found.hi),
        n=found.n,
        passed=found.lo > 0,
        gates="silence",
    )


def _same_answer(case: Case, rows: Mapping[str, tuple[Example, ...]], lost: Floats) -> list[Control]:
    """What retained facts lost that share their answer with a forgotten one, and the other retained facts."""
    forgotten = {row.answer.strip().casefold() for row in case.sets["forget"].examples}
    shares = np.array([row.answer.strip().casefold() in forgotten for row in rows["retain"]])
    clusters, made = np.array(case.clusters(rows["retain"])), []
    for name, kept in (("same answer", shares), ("other answers", ~shares)):
        if len(set(clusters[kept])) >= 2:
            found = one_sample(lost[kept], clusters[kept], bounds=(-1.0, 1.0), seed=case.options.seed)
            made.append(
                Control(
                    name=name,
                    description="what retain rows lost against the original, plainly asked, whose answer is "
                    + ("that of a forget row" if name == "same answer" else "of no forget row"),
                    estimate=found.value,
                    ci95=(found.lo, found.hi),
                    n=found.n,
                )
            )
    return made if shares.any() else []
