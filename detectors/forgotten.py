"""Forgotten items: what was unlearned here? Asked of a list of queries, without being told the forget set.

What is measured, by what the auditor can see:

    with the original   m = (JS / ln 2 + p0(a*) - p(a*)) / 2,   a* the original's own first choice;
                        the largest m of a row's positions: where its answer is decided, or along its first tokens
    log-probabilities   u = mean |z| of log entropy and of the first choice's log-odds, z among the items of the list
    text                m = 1 - similarity to the original's answer; without the original the largest of: declines,
                        share of words said before, share of the item's other questions answered the same

An m of 1/2 is half of the way from "answers as before" to "nothing of the old answer is left". The suspicion of an
item (entity, or row without one) is the mean over its rows of (2 m - 1)+ beside an original, of m or u without. An item
**stands out** if its mean m is at least 1/2 (there is no such mark for u) and so far above the list's own median, in
robust spreads, that Benjamini and Hochberg's procedure keeps it at 5 %. Nothing is trained, and which set a row came
from is not looked at until the AUROC is computed.

Source: entropy, top mass and divergence of an output as signs that it was unlearned: reported of Chen et al. 2025
(arXiv 2506.14003), read second hand; Jensen-Shannon divergence: Lin 1991; robust z: Iglewicz & Hoaglin 1993; false
discovery rate: Benjamini & Hochberg 1995. How they are put together is this project's, 2026.

Traps:

- *The null is the list's own bulk.* A list of which most was forgotten is its own bulk. With the original that shows
  (the control `the bulk stayed`); without it nothing does.
- *Moved is not forgotten.* An ordinary fine-tune on other facts moves those it does not rehearse, a little: ranked by
  the size of the movement alone they come first. Hence the half-way mark, and the matched fine-tunes.
- *Never known looks like forgotten* without the original.
- *Unlearning spills over*, most of all to what the original was unsure of: an item that stands out need not have been
  in the forget set. It is treated like those.
- *A confident wrong answer* is no refusal: at text access it shows beside the original's answer only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from audit.case import Case
from audit.contrast import ALPHA
from audit.controls import SEPARABLE, bag_of_words_auc
from audit.errors import BadInput
from audit.evidence import Arrays, Evidence
from audit.instrument import Access, Instrument
from audit.loaders import Example
from audit.plan import Generate, Request
from audit.record import Control, Figure, Finding, MaybeNumber, Question, Series, Side, Table
from audit.statistics import Estimate, auc_two_sample, wilson
from audit.tokens import Tokens
from detectors.suspicion import (
    HALF_WAY,
    HEAD,
    SMALLEST_P,
    Suspects,
    changed,
    confidence,
    js_divergence,
    movement,
    no_answer,
    suspicion,
    together,
    unusual,
)
from detectors.tracing import NULL

if TYPE_CHECKING:
    from audit.target import Target

__all__ = [
    "Forgotten", "Suspects", "changed", "confidence", "js_divergence", "movement", "no_answer", "suspicion",
    "together", "unusual",
]  # fmt: skip

POSITIONS = 8
"""Tokens of an answer, from its first on, that are looked at; of a plain passage its last."""

NEW_TOKENS = 16
"""Length of the answers that are read at text access: a refusal shows at its beginning."""

FEWEST_ITEMS = 10
"""With fewer there is no telling what is usual in a list."""

_LISTED = ("forget", "retain", "neighbor", "utility")
_MOST_ROWS = 50
_SOURCE = "this project, 2026, after Chen et al. 2025, arXiv 2506.14003; Benjamini & Hochberg 1995"


# --- the instrument -----------------------------------------------------------------------------------------


class Forgotten(Instrument):
    """Does the target treat some items of a list as forgotten, and which?"""

    name = "forgotten"
    title = "Which items does it treat as forgotten?"
    question = Question.TRACE
    access = Access.TEXT
    sets = ()
    watches = ("trace",)
    reference = _SOURCE

    def missing(self, case: Case) -> str | None:
        """Needs a list of which not all is said to be forgotten."""
        if not set(_listed(case)) - {"forget"}:
            return "needs the suspects set, or one of retain, neighbor and utility beside the forget set"
        return super().missing(case)

    def requests(self, case: Case, target: Target) -> list[Request | Generate]:
        """The distribution where each answer is decided; at text access the beginning of the answer."""
        if "+" in target.role and not target.role.startswith(NULL):
            return []
        if case.options.access < Access.LOGPROBS:
            return [
                Generate(_request(name), tuple(_asked(target, row) for row in case.rows(name)), NEW_TOKENS)
                for name in _listed(case)
            ]
        return [
            Request(_request(name), tuple(decided(target, row) for row in case.rows(name)), (HEAD,))
            for name in _listed(case)
        ]

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """How many items stand out, and, where the forget set is known, how well it is ranked."""
        listed = _List.of(case)
        found = _look(case, evidence, listed, "target")
        others = {role: _look(case, evidence, listed, role) for role in _references(case, evidence)}
        findings = [self._items(case, listed, found, others)]
        if listed.both:
            alone = _by_itself(case, evidence, listed, "original") if "original" in case.models else None
            findings.append(self._auroc(case, listed, found, others, alone))
        return findings

    def examples(self, case: Case, evidence: Evidence) -> dict[str, dict[str, float | str]]:
        """The suspicion of every forget row's item that is in the list."""
        listed = _List.of(case)
        if "forget" not in case.sets or not listed.forgotten.any():
            return {}
        values = dict(zip(listed.items, _look(case, evidence, listed, "target").suspicion, strict=True))
        rows = case.rows("forget")
        named = zip(rows, case.clusters(rows), strict=True)
        return {row.id: {"suspicion": float(values[item])} for row, item in named if item in values}

    def _items(self, case: Case, listed: _List, found: Suspects, others: dict[str, Suspects]) -> Finding:
        n, k = len(listed.items), int(found.stands_out.sum())
        nulls = [float(other.stands_out.mean()) for role, other in others.items() if role.startswith(NULL)]
        controls = [
            _original_at_hand(case),
            Control(
                name="enough items",
                description=f"what is usual is read off the list itself, which needs {FEWEST_ITEMS} items",
                estimate=float(n),
                n=n,
                passed=n >= FEWEST_ITEMS,
                gates="evidence",
            ),
            _bulk_stayed(case, found),
            _matched("share of the list that stands out", nulls, k / n),
            self._positive(case, listed, others),
        ]
        return Finding(
            id=f"{self.name}/items",
            instrument=self.name,
            question=self.question,
            statistic=f"share of the listed items that stand out as forgotten, {_seen_by(case)}",
            split="every item against the bulk of the list",
            estimate=k / n,
            ci95=wilson(k, n),
            n=n,
            unit="share of items",
            orientation="more items are treated unlike the bulk of the list",
            null="every item moved as the bulk of this list did (its median and spread), or less than half of the way",
            p_value=float(found.adjusted.min()),  # Simes' test that none does
            smallest_p=SMALLEST_P,
            threshold=0.02,
            decides=(False, False),
            sides=(Side.UNLEARNED, Side.NEITHER),
            controls=controls,
            reference=_SOURCE,
            figure=_figure(listed, found),
            table=_table(listed, found),
        )

    def _auroc(
        self, case: Case, listed: _List, found: Suspects, others: dict[str, Suspects], alone: Suspects | None
    ) -> Finding:
        area = _auc(case, listed, found)
        nulls = [_auc(case, listed, o).value for role, o in others.items() if role.startswith(NULL)]
        words = _words(case, listed)
        controls = [_original_at_hand(case), _unseparated("bag of words", "the words of the queries alone", words)]
        if alone is not None:
            told = "what the original by itself says of them, before anything was forgotten"
            controls.append(_unseparated("original by itself", told, _auc(case, listed, alone)))
        controls += [_matched("AUROC", nulls, area.value), self._positive(case, listed, others)]
        return Finding(
            id=f"{self.name}/auroc",
            instrument=self.name,
            question=self.question,
            statistic=f"how well suspicion ranks the items of the forget set, {_seen_by(case)}",
            split="forget items against the rest of the list",
            estimate=area.value,
            ci95=(area.lo, area.hi),
            n=area.n,
            unit="AUC",
            orientation="the forget set's items are treated as forgotten, more than the others",
            null="the forget set's items are treated as the others of the list are",
            null_value=0.5,
            p_value=area.p_value,
            smallest_p=area.smallest_p,
            threshold=SEPARABLE,
            decides=(False, False),
            sides=(Side.UNLEARNED, Side.NEITHER),
            controls=controls,
            reference=_SOURCE,
        )

    def _positive(self, case: Case, listed: _List, others: dict[str, Suspects]) -> Control:
        """The retrained model in the target's place: it never saw the forget set, and must be seen to lack it."""
        area = _auc(case, listed, others["retrained"]) if "retrained" in others and listed.both else None
        seen = bool(area and area.p_value is not None and area.p_value <= ALPHA and area.value >= 0.5 + SEPARABLE)
        return Control(
            name="positive control",
            description="AUROC of the forget items in the retrained model, put in the target's place"
            if area
            else "none at hand: needs the retrained model, and forget items in the list",
            estimate=area.value if area else None,
            ci95=(area.lo, area.hi) if area else None,
            n=area.n if area else None,
            passed=seen,
            gates="silence",
        )


def decided(target: Target, row: Example) -> Tokens:
    """The sequence whose scored positions are looked at.

    Without an answer: where it would begin. With one: its first tokens. Of a plain passage: its last.
    """
    if not row.answer:
        prompt = target.encode_prompt(row.prompt, room=1)
        return Tokens((*prompt, target.padding_id), len(prompt))
    tokens = target.encode(row.prompt, row.answer)
    if not row.prompt:
        return Tokens(tokens.ids, max(tokens.start, len(tokens.ids) - POSITIONS))
    return tokens.begun(POSITIONS)


def moved(original: Arrays, target: Arrays) -> float:
    """A row's movement, from what `HEAD` recorded: the largest of its positions, as lost words make a lost answer."""
    vocabulary = int(max(original["vocabulary"][0], target["vocabulary"][0]))
    before, now = (zip(a["head_ids"], a["head_logprobs"], strict=True) for a in (original, target))
    return max(float(movement(*together(*a, *b, vocabulary), others=True)) for a, b in zip(before, now, strict=True))


# --- the list -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _List:
    """Rows, what each is about, and which items the forget set names (used for the AUROC alone)."""

    rows: tuple[Example, ...]
    who: tuple[str, ...]
    items: list[str]
    forgotten: NDArray[np.bool_]

    @classmethod
    def of(cls, case: Case) -> _List:
        rows = tuple(row for name in _listed(case) for row in case.rows(name))
        who = tuple(case.clusters(rows))
        forget = case.sets["forget"].examples if "forget" in case.sets else ()
        entities, prompts = {row.entity for row in forget} - {""}, {_key(row) for row in forget}
        known = {item for row, item in zip(rows, who, strict=True) if row.entity in entities or _key(row) in prompts}
        items = sorted(set(who))
        return cls(rows, who, items, np.array([item in known for item in items], dtype=bool))

    @property
    def both(self) -> bool:
        """Are there forget items and others to rank them among?"""
        return bool(1 < self.forgotten.sum() < len(self.items) - 1)


def _key(row: Example) -> str:
    return " ".join((row.prompt or row.answer).casefold().split())


def _listed(case: Case) -> list[str]:
    """The sets that make the list: the auditor's own, or else all whose facts were once known."""
    return ["suspects"] if "suspects" in case.sets else [name for name in _LISTED if name in case.sets]


def _request(name: str) -> str:
    return f"forgotten/{name}"


def _asked(target: Target, row: Example) -> tuple[int, ...]:
    return target.encode_prompt(row.prompt, room=NEW_TOKENS) if row.prompt else target.encode_opening(row.answer)


# --- looking ------------------------------------------------------------------------------------------------


def _references(case: Case, evidence: Evidence) -> list[str]:
    """The models looked at besides the target: the retrained one, and fine-tunes matched to the target's change."""
    asked = _request(_listed(case)[0])
    others = [r for r in evidence.roles if (r == "retrained" or r.startswith(NULL)) and evidence.has(r, asked)]
    return [role for role in others if _alike(case, evidence, role)]


def _alike(case: Case, evidence: Evidence, role: str) -> bool:
    """Can it be compared with the original, position by position?"""
    if "original" not in case.models or case.options.access < Access.LOGPROBS:
        return True
    names = map(_request, _listed(case))
    return all(evidence.sequences(role, name) == evidence.sequences("original", name) for name in names)


def _look(case: Case, evidence: Evidence, listed: _List, role: str) -> Suspects:
    """What is said of each item, by all that the auditor has."""
    if "original" not in case.models:
        return _by_itself(case, evidence, listed, role)
    if case.options.access < Access.LOGPROBS:
        pair = zip(_texts(case, evidence, "original"), _texts(case, evidence, role), strict=True)
        return suspicion([changed(before, now) for before, now in pair], listed.who)
    if not _alike(case, evidence, role):
        raise BadInput(f"{role} and original read the list as different tokens: at text access they can be compared")
    both = zip(_heads(case, evidence, "original"), _heads(case, evidence, role), strict=True)
    return suspicion([moved(before, now) for before, now in both], listed.who)


def _by_itself(case: Case, evidence: Evidence, listed: _List, role: str) -> Suspects:
    """The same without the original."""
    if case.options.access < Access.LOGPROBS:
        return suspicion(no_answer(_texts(case, evidence, role), listed.who), listed.who, mark=0)
    heads = _heads(case, evidence, role)
    return unusual([confidence(h["head_logprobs"], int(h["vocabulary"][0])).mean(axis=0) for h in heads], listed.who)


def _heads(case: Case, evidence: Evidence, role: str) -> Iterator[Arrays]:
    """Row by row of the list, what `HEAD` recorded."""
    for name in _listed(case):
        yield from evidence.iterate(role, _request(name), HEAD.name)


def _texts(case: Case, evidence: Evidence, role: str) -> list[str]:
    return [text for name in _listed(case) for text in evidence.texts(role, _request(name))]


def _auc(case: Case, listed: _List, found: Suspects) -> Estimate:
    yes, items = listed.forgotten, np.array(listed.items)
    positive, negative = found.suspicion[yes], found.suspicion[~yes]
    return auc_two_sample(positive, negative, items[yes], items[~yes], seed=case.options.seed)


def _words(case: Case, listed: _List) -> Estimate:
    """Do the queries' words tell the forget set's from the others?"""
    known = dict(zip(listed.items, listed.forgotten, strict=True))

    def texts(yes: bool) -> tuple[list[str], list[str]]:
        kept = [(row, item) for row, item in zip(listed.rows, listed.who, strict=True) if known[item] == yes]
        return [row.prompt or row.answer for row, _ in kept], [item for _, item in kept]

    (forget, a), (rest, b) = texts(True), texts(False)
    return bag_of_words_auc(forget, rest, a, b, seed=case.options.seed)


# --- controls, figure and table -----------------------------------------------------------------------------


def _seen_by(case: Case) -> str:
    """By what the items were judged."""
    text, beside = case.options.access < Access.LOGPROBS, "original" in case.models
    if text:
        return "by their answers beside the original's" if beside else "by answers that decline, stutter or repeat"
    return "by next-token probabilities beside the original's" if beside else "by how unusually sure of the next token"


def _original_at_hand(case: Case) -> Control:
    beside = "original" in case.models
    more = "log-probabilities would see answers that become unlikely before they change"
    if not beside:
        more = "without it what was never known, or is seldom asked, looks as unusual as what was forgotten"
    elif case.options.access >= Access.LOGPROBS:
        more = "no more access would tell more of the output"
    return Control(
        name="original at hand",
        description=f"the model before unlearning, to compare with; {more}",
        passed=beside,
        gates="evidence",
    )


def _bulk_stayed(case: Case, found: Suspects) -> Control:
    """Is the list's bulk, which is the null, itself what was forgotten?"""
    told = "original" in case.models or case.options.access < Access.LOGPROBS
    return Control(
        name="the bulk stayed",
        description="median item's movement: from 0.5 on most of the list is treated as forgotten, and hides it"
        if told
        else "without the original nothing tells whether most of the list was forgotten, which would hide it",
        estimate=float(np.median(found.level)) if told else None,
        n=len(found.level),
        passed=told and bool(np.median(found.level) < HALF_WAY),
        gates="silence",
    )


def _matched(what: str, nulls: Sequence[float], value: float) -> Control:
    """The same of ordinary fine-tunes of this original, as large as the target's change."""
    return Control(
        name="matched null",
        description=f"largest {what} among {len(nulls)} ordinary fine-tunes of the original that change it as much"
        if nulls
        else "no ordinary fine-tunes of the original at hand: what these move is known from other models only",
        estimate=max(nulls, default=None),
        n=len(nulls),
        passed=value > max(nulls) or not value if nulls else None,
        gates="evidence" if nulls else None,
    )


def _unseparated(name: str, told: str, area: Estimate) -> Control:
    """Does something that knows nothing of unlearning tell the forget items from the others too?"""
    return Control(
        name=name,
        description=f"AUROC of the forget items by {told}: must stay near 0.5",
        estimate=area.value if math.isfinite(area.value) else None,
        ci95=(area.lo, area.hi),
        n=area.n,
        passed=not (area.lo > 0.5 and area.value > 0.5 + SEPARABLE),
        gates="evidence",
    )


def _order(found: Suspects) -> NDArray[np.intp]:
    """Most suspect first; what is equally so by its mean movement."""
    return np.lexsort((-found.level, -found.suspicion))


def _table(listed: _List, found: Suspects) -> Table:
    """The most suspect items, ranked."""
    rows = Counter(listed.who)
    cells: list[list[str | int | MaybeNumber]] = []
    for rank, i in enumerate(_order(found)[:_MOST_ROWS], start=1):
        item = listed.items[i]
        numbers = [float(f"{values[i]:.4g}") for values in (found.suspicion, found.level, found.z, found.adjusted)]
        said = "yes" if found.stands_out[i] else "no"
        cells.append([rank, item, rows[item], *numbers, said, "yes" if listed.forgotten[i] else ""])
    return Table(
        columns=["rank", "item", "rows", "suspicion", "level", "z", "p (BH)", "stands out", "in the forget set"],
        rows=cells,
    )


def _figure(listed: _List, found: Suspects) -> Figure:
    """Where the items lie."""
    groups = (("in the forget set", "target", listed.forgotten), ("other items", "control", ~listed.forgotten))
    return Figure(
        kind="distribution",
        title="How far the listed items are from before, or from the bulk",
        alt="Histogram of the listed items by how far each moved; the most suspect ones are in the table.",
        x_label="of the item, mean over its rows",
        y_label="share of items",
        series=[
            Series(label=label, x=[float(f"{v:.4g}") for v in found.level[which]], y=[], role=role)
            for label, role, which in groups
            if which.any()
        ],
    )
