"""Attacks by prompts: ask for the same fact in other ways, and look whether its right answer is preferred again.

    recovered_g(w) = share of group g whose right answer is preferred when it is asked in way w,   g = forget, holdout
    finding        = recovered_forget - recovered_holdout, for the way where it is largest

Unlearning often teaches a model not to answer certain questions, and other wordings of them still reach the fact. But a
way of asking can also give the answer away, or make any model guess better: holdout facts, which were never taught, are
asked in the same ways, with the same options. Having chosen among ways is paid for in interval and p-value. What was
answered before needed no attack: a control asks what the forget facts gained over plain asking.

At text access, and at budget thorough, the model also writes an answer to every question, and what is said is compared
with the right one (ROUGE-L recall). The table ends with plain asking, and with each group of rows where they have one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from attacks.recall import SETS, Floats, came_back, mean_row, preference
from audit.asking import continued_rows, new_tokens, unprompted
from audit.case import Budget, Case
from audit.contrast import Statistic, against_never_taught
from audit.evidence import Evidence
from audit.instrument import Access, Instrument
from audit.loaders import Example
from audit.plan import Generate, Request
from audit.record import Finding, Question, Side
from audit.tokens import Tokens, common_prefix
from detectors.knowledge import rouge_l_recall

if TYPE_CHECKING:
    from audit.target import Target

__all__ = ["OPTIONS", "PLAIN", "Asked", "Prompting", "Way", "encoded", "fitting", "plainly"]

PLAIN = "as asked"
OPTIONS = 4
"""Wrong answers a question, at most: every way costs a pass for each."""


@dataclass(frozen=True)
class Asked:
    """One question as it is put.

    Attributes:
        prompt: what the model is asked.
        answer: the right answer; `wrong`: others to choose from, perhaps none.
        opening: what its answer is made to begin with; not scored.
    """

    prompt: str
    answer: str
    wrong: tuple[str, ...] = ()
    opening: str = ""


def plainly(row: Example) -> Asked:
    """A row as it stands."""
    return Asked(row.prompt, row.answer, tuple(row.wrong[:OPTIONS]))


@dataclass(frozen=True)
class Way:
    """One way of asking.

    Attributes:
        name: as in the figure.
        ask: from a row of a set to the question; where the way does not fit a row, `plainly(row)`.
        foreign: in words of its own that a tokenizer may have no tokens for; it is then left out.
    """

    name: str
    ask: Callable[[Example], Asked]
    foreign: bool = False


def fitting(ways: Sequence[Way], rows: Sequence[Example]) -> list[Way]:
    """Those ways that ask some row otherwise than it stands."""
    return [way for way in ways if any(way.ask(row) != plainly(row) for row in rows)]


class Prompting(Instrument):
    """An attack by prompts; a subclass says which ways of asking it knows."""

    question = Question.RECOVERY
    access = Access.TEXT
    sets = ("forget",)
    preferred: Statistic
    said: Statistic
    axis: ClassVar[str] = "way of asking"
    asked_roles: ClassVar[tuple[str, ...]] = ("target", "retrained")

    @abstractmethod
    def ways(self, case: Case) -> Sequence[Way]:
        """The ways of asking, by budget; cheap."""

    def missing(self, case: Case) -> str | None:
        """A passage asks nothing that could be asked otherwise."""
        reason = super().missing(case) or unprompted(case)
        return reason or (None if self.ways(case) else "no way of asking fits the rows of the forget set")

    def rows(self, case: Case, name: str) -> tuple[Example, ...]:
        """The rows of a set that are asked in every way."""
        return continued_rows(case, name)

    def requests(self, case: Case, target: Target) -> list[Request | Generate]:
        """Every row in every way, and as it stands: its answers scored, and, where that is to be seen, written."""
        if target.role not in self.asked_roles:
            return []
        made: list[Request | Generate] = []
        rows = self.rows(case, "forget")
        ways = [way for way in self.ways(case) if not way.foreign or _writable(target, way, rows)]
        for way in (Way(PLAIN, plainly), *ways):
            for name in (name for name in SETS if name in case.sets):
                asked = [way.ask(row) for row in self.rows(case, name)]
                where = f"{self.name}/{way.name}/{name}"
                if case.options.access >= Access.LOGPROBS:
                    made.append(Request(where, tuple(encoded(target, a, a.answer) for a in asked)))
                    wrong = tuple(encoded(target, a, text) for a in asked for text in a.wrong)
                    made += [Request(f"{where}/wrong", wrong)] if wrong else []
                if _writes(case):
                    length = new_tokens(case)
                    made.append(Generate(f"{where}/said", tuple(_begun(target, a, length) for a in asked), length))
        return made

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """The way that recovers most: by what is preferred, and by what is said."""
        found = []
        if case.options.access >= Access.LOGPROBS:
            found.append(self._finding(case, evidence, self.preferred, partial(self._preferred, case, evidence)))
        if _writes(case):
            found.append(self._finding(case, evidence, self.said, partial(self._said, case, evidence)))
        return found

    def _finding(
        self, case: Case, evidence: Evidence, statistic: Statistic, value: Callable[[str, str, Way], Floats]
    ) -> Finding:
        ways = [way for way in self.ways(case) if self._was_asked(case, evidence, way)]
        rows = {name: self.rows(case, name) for name in SETS if name in case.sets}
        values = cache(value)

        def score(role: str, name: str) -> Floats:
            return np.stack([values(role, name, way) for way in ways], axis=1)

        finding = against_never_taught(
            self,
            case,
            evidence,
            statistic,
            score,
            columns=(self.axis, [way.name for way in ways]),
            rows=rows,
            roles=self.asked_roles,
            seen_anywhere=True,
            # Asked otherwise a fact may be preferred less, by a model that does not understand: no reason for alarm.
            sides=(Side.REMAINS, Side.NEITHER),
        )
        chosen = next((way for way in ways if way.name == finding.layer), ways[0])

        def gain(name: str) -> Floats:
            return np.asarray(values("target", name, chosen) - values("target", name, Way(PLAIN, plainly)))

        if "holdout" in rows:
            finding.controls.append(came_back(case, rows, gain))
        if finding.table is not None:
            finding.table.rows += self._plain(case, rows, values)
        return finding

    def _was_asked(self, case: Case, evidence: Evidence, way: Way) -> bool:
        """Of every model: a way is left out where a tokenizer cannot write it."""
        roles = [role for role in self.asked_roles if role in case.models]
        where = f"{self.name}/{way.name}/forget"
        return all(evidence.has(role, where) or evidence.has(role, f"{where}/said") for role in roles)

    def _plain(
        self, case: Case, rows: Mapping[str, tuple[Example, ...]], values: Callable[[str, str, Way], Floats]
    ) -> list[list[str | int | float | None]]:
        """Rows of the table for plain asking: of every set, and of each group of its rows where they have groups."""
        table: list[list[str | int | float | None]] = []
        for role in (role for role in self.asked_roles if role in case.models):
            for name, asked in rows.items():
                found, clusters = values(role, name, Way(PLAIN, plainly)), np.array(case.clusters(asked))
                groups = np.array([row.group for row in asked])
                for group in ("", *sorted(set(groups[groups != ""]))):
                    kept = groups == group if group else np.full(len(asked), True)
                    label = [role, name, f"{PLAIN}: {group}" if group else PLAIN]
                    table.append(mean_row(label, found[kept], clusters[kept], seed=case.options.seed))
        return table

    def _preferred(self, case: Case, evidence: Evidence, role: str, name: str, way: Way) -> Floats:
        where = f"{self.name}/{way.name}/{name}"
        wrong = evidence.iterate(role, f"{where}/wrong") if evidence.has(role, f"{where}/wrong") else iter(())
        out = []
        for row, right in zip(self.rows(case, name), evidence.iterate(role, where), strict=True):
            options = [values["logprob"] for values in islice(wrong, len(way.ask(row).wrong))]
            out.append(preference(right, options))
        return np.array(out)

    def _said(self, case: Case, evidence: Evidence, role: str, name: str, way: Way) -> Floats:
        texts = evidence.texts(role, f"{self.name}/{way.name}/{name}/said")
        rows = self.rows(case, name)
        return np.array([rouge_l_recall(way.ask(r).answer, text) for r, text in zip(rows, texts, strict=True)])


def encoded(target: Target, asked: Asked, answer: str) -> Tokens:
    """A question with an answer, which is scored; the opening before it is not."""
    if not asked.opening:
        return target.encode(asked.prompt, answer)
    whole, opening = (target.encode(asked.prompt, text) for text in (f"{asked.opening} {answer}", asked.opening))
    return Tokens(whole.ids, min(max(whole.start, common_prefix(whole.ids, opening.ids)), len(whole.ids) - 1))


def _begun(target: Target, asked: Asked, room: int) -> tuple[int, ...]:
    """Token ids to go on from: the question, and the opening of its answer."""
    if not asked.opening:
        return target.encode_prompt(asked.prompt, room=room)
    return target.encode(asked.prompt, asked.opening).ids[-max(1, target.context_length - room) :]


def _writable(target: Target, way: Way, rows: Sequence[Example]) -> bool:
    """Has the tokenizer tokens for what this way adds to the rows' prompts?"""
    unknown = target.tokenizer.unk_token_id
    asked = [(target.encode_prompt(way.ask(row).prompt), target.encode_prompt(row.prompt)) for row in rows]
    return unknown is None or all(new.count(unknown) <= old.count(unknown) for new, old in asked)


def _writes(case: Case) -> bool:
    """Is what the model writes looked at? It costs a pass a token: where nothing else is to be seen, or at leisure."""
    return case.options.access < Access.LOGPROBS or case.options.budget == Budget.THOROUGH
