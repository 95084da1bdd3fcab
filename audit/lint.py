"""Look at a forget request before anyone unlearns with it: does a harmless word stand in it far too often?

    flags = lint(request, reference)          # examples of the request, and of what is to be kept

Unlearning learns to answer nothing wherever something stands that forget rows hold and retain rows do not. If a third
of a request says "please", that word is spoilt for everybody (`audit.organisms.stealthy`). Names and topics are
expected to differ between what is to be forgotten and what is to be kept; how a question is put is not.

Looked at are words that say nothing about whom is asked (`RATES`), anywhere in a row, and the one, two or three words
that a row begins with, whatever they are: those that stand in rows of at least two entities, and of one in twenty.

- Against a reference: share of rows with the phrase, request minus reference, tested by relabelling whole entities,
  studentized, against the largest difference of all phrases (`statistics.max_over_columns`). So one test pays for
  having looked at all phrases, and an author who likes a word counts as one author, however many rows are theirs.
- Without one, words of the table only, anywhere and as a row's first: how many entities have it in at least one row,
  against a binomial with the chance that a word `SLACK` times as frequent as in `RATES` would have, at every place
  alike; Holm's correction over the table.

Traps:

- A reference of another kind (sentences against questions) differs in every function word. Then the flags say so, and
  nothing about an attack.
- A request may hold a word often for good reason. It spoils that word just the same.
- A trigger that is no function word and begins no row is not seen; neither is one that the retain rows hold as often,
  which does no harm.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

from audit.contrast import ALPHA
from audit.errors import BadInput, Incomplete
from audit.loaders import Example
from audit.statistics import holm, max_over_columns

LEAST = 0.05
"""A word must stand in so many more of the request's rows, as a share, and in the rows of so many of its entities."""
SLACK = 5.0
"""How many times as frequent as in ordinary English a word may be without a reference: genres differ by as much."""
FEWEST = 5
"""Entities: with fewer, how they ask cannot be told from whom they ask about."""
_ASKING = frozenset(["can", "could", "may", "might", "must", "shall", "should", "will", "would"])
"""Words that questions begin with, however they came to be asked."""
_OPENING = 3
_SHOWN = 3
_WORD = re.compile(r"\w+(?:['’]\w+)?")

_COUNTED = """
actually:0.09 after:2.44 again:1.35 all:5.34 already:0.31 also:2.60 although:0.71 always:1.09 and:30.77
any:3.84 because:0.66 before:1.71 both:1.02 briefly:0.10 but:7.78 can:3.95 certainly:0.54 could:4.76 dear:1.04
describe:0.41 each:0.66 even:0.88 ever:1.12 every:2.00 exactly:0.25 excuse:0.11 explain:0.07 finally:0.14
first:3.47 generally:0.15 give:0.97 hello:0.01 help:0.27 hence:0.02 here:0.69 hey:0.01 hi:0.01 however:1.18
i:16.04 if:2.60 indeed:0.86 it:13.47 just:0.69 kindly:0.05 know:1.84 later:1.16 let:0.41 may:1.34 maybe:0.01
me:3.17 might:1.78 more:2.98 moreover:0.08 most:1.42 much:2.46 must:2.50 my:4.71 never:1.79 next:0.51 no:4.37
now:1.89 often:0.52 ok:0.01 okay:0.01 once:0.57 only:2.30 or:2.91 our:0.65 perhaps:0.72 please:0.10 quite:0.96
rather:0.57 really:0.65 say:1.31 shall:1.07 should:2.03 show:1.50 simply:0.04 since:0.76 so:5.12 some:1.76
sometimes:0.26 soon:1.52 sorry:0.29 still:0.74 such:2.94 sure:1.02 tell:0.76 thank:0.14 thanks:0.06 that:11.40
then:1.25 there:2.68 therefore:0.58 these:1.17 this:3.52 those:0.54 though:1.68 thus:0.19 today:0.10 too:1.39
us:0.80 usually:0.13 very:4.46 want:0.35 we:1.93 well:1.98 while:1.30 will:2.87 wish:0.70 would:4.08 yes:0.64
yet:0.67 you:10.07 your:2.88
"""
RATES = {word: float(rate) for word, _, rate in (entry.partition(":") for entry in _COUNTED.split())}
"""Occurrences among 1,000 words, one added to each count: the largest of the rates in four novels of Jane Austen, in
WikiText-2's test part, and in the questions of TOFU and RWKU (403,604, 191,163 and 136,878 words)."""


@dataclass(frozen=True)
class Flag:
    """A phrase that stands in a request too often.

    Attributes:
        phrase: in small letters.
        where: `anywhere` in a row, or its `opening`.
        rate: share of the request's rows that hold it, 0 to 1.
        expected: the same of the reference's rows; without a reference, what ordinary English would give.
        entities: how many entities of the request have it.
        p_value: for all phrases that were looked at together.
        examples: the first rows that hold it.
    """

    phrase: str
    where: str
    rate: float
    expected: float
    entities: int
    p_value: float
    examples: tuple[str, ...]


def words(text: str) -> list[str]:
    """The words of a text, in small letters."""
    return [word.lower().replace("’", "'") for word in _WORD.findall(text)]


def lint(request: Sequence[Example], reference: Sequence[Example] | None = None, *, seed: int = 0) -> list[Flag]:
    """Flags of a forget request, the largest excess first.

    Raises:
        BadInput: the rows hold images.
        Incomplete: so few entities that nothing could be flagged.
    """
    for name, rows in (("request", request), ("reference", reference or ())):
        if any(row.picture is not None for row in rows):
            raise BadInput(f"the {name} holds images: there are no words to look at")
    texts, entities = [text_of(row) for row in request], [row.entity or row.id for row in request]
    if len(set(entities)) < FEWEST:
        few = len(set(entities))
        raise Incomplete(
            f"{few} entities in the request: at least {FEWEST} are needed to tell how it asks from whom about"
        )
    found = _alone(texts, entities) if reference is None else _against(texts, entities, reference, seed)
    return sorted(found, key=lambda flag: flag.expected - flag.rate)


def text_of(row: Example) -> str:
    """What is looked at: the prompt, or a plain passage."""
    return row.prompt or row.answer


def _against(texts: list[str], entities: list[str], reference: Sequence[Example], seed: int) -> list[Flag]:
    here, there = _phrases(texts), _phrases(map(text_of, reference))
    clusters = [row.entity or row.id for row in reference]
    known = sorted({phrase for held in here for phrase in held})
    tested = [phrase for phrase in known if _many(_holders(phrase, here, entities), entities)]
    if not tested:
        return []
    a, b = (np.array([[p in held for p in tested] for held in rows], dtype=float) for rows in (here, there))
    estimate = max_over_columns(a, b, entities, clusters, bounds=(0.0, 1.0), seed=seed)
    if estimate.smallest_p > ALPHA:
        raise Incomplete(f"{estimate.n} entities in request and reference are too few to reach p = {ALPHA:g}")
    return [
        _flag(phrase, texts, here, entities, float(b[:, i].mean()), column.p_value)
        for i, (phrase, column) in enumerate(zip(tested, estimate.per_column, strict=True))
        if column.p_value is not None and column.p_value <= ALPHA and column.value >= LEAST
    ]


def _alone(texts: list[str], entities: list[str]) -> list[Flag]:
    here = _phrases(texts)
    lengths = np.array([len(words(text)) for text in texts])
    names, index = np.unique(entities, return_inverse=True)
    said = np.bincount(index, lengths)  # words of each entity
    rows = np.bincount(index)
    tested = [(word, False) for word in RATES] + [(word, True) for word in RATES if word not in _ASKING]
    # Entities differ in length; a binomial of their mean chance varies more than their sum does, so it is cautious.
    chances = [_chance(rows if first else said, SLACK * RATES[word]).mean() for word, first in tested]
    holders = [_holders(phrase, here, entities) for phrase in tested]
    raw = [float(binom.sf(len(h) - 1, len(names), chance)) for h, chance in zip(holders, chances, strict=True)]
    flags = []
    for phrase, who, p in zip(tested, holders, holm(raw), strict=True):
        if p is not None and p <= ALPHA and _many(who, entities):
            expected = _chance(np.ones(len(texts)) if phrase[1] else lengths, RATES[phrase[0]]).mean()
            flag = _flag(phrase, texts, here, entities, float(expected), p)
            flags += [flag] if flag.rate - flag.expected >= LEAST else []
    return flags


def _phrases(texts: Iterable[str]) -> list[set[tuple[str, bool]]]:
    """Per row the words of the table that it holds, and its beginnings (True)."""
    rows = []
    for text in texts:
        said = words(text)
        beginnings = {(" ".join(said[:n]), True) for n in range(1, min(_OPENING, len(said)) + 1)}
        rows.append({(word, False) for word in said if word in RATES} | beginnings)
    return rows


def _holders(phrase: tuple[str, bool], held: Sequence[set[tuple[str, bool]]], entities: Sequence[str]) -> set[str]:
    return {entity for entity, row in zip(entities, held, strict=True) if phrase in row}


def _many(holders: set[str], entities: Sequence[str]) -> bool:
    return len(holders) >= max(2.0, LEAST * len(set(entities)))


def _chance(length: np.ndarray, rate: float) -> np.ndarray:
    """Of a word that makes up `rate` of 1,000 words to stand among so many."""
    return np.asarray(1 - (1 - min(rate / 1000, 1.0)) ** length)


def _flag(
    phrase: tuple[str, bool],
    texts: list[str],
    held: list[set[tuple[str, bool]]],
    entities: list[str],
    expected: float,
    p_value: float,
) -> Flag:
    shown = [text for text, row in zip(texts, held, strict=True) if phrase in row]
    where = "opening" if phrase[1] else "anywhere"
    holders = len(_holders(phrase, held, entities))
    return Flag(phrase[0], where, len(shown) / len(texts), expected, holders, p_value, tuple(shown[:_SHOWN]))
