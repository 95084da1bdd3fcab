"""Three guards, and the detector two of them rely on: texts in, texts out, no model.

A guard says what becomes of a prompt (`Reply`): other text is put before it, it is answered without the model, or some
words must not be written. See `guards` for the whole, and for the traps.

Source: In-Context Unlearning (Pawelczyk et al. 2023, arXiv 2310.07579), DRAGON (arXiv 2511.05784) and GUARD (arXiv
2505.13312). The first was read as code, the other two in summaries only: what is made here is like them, not them.
"""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

from audit.errors import BadInput
from audit.organisms.world import UNKNOWN, Row

SCHEMA = "palimpsest/guard/1"
_SHORT = 4  # letters: in an answer of several words, shorter ones are grammar


@dataclass(frozen=True, slots=True)
class Reply:
    """What becomes of a prompt.

    Attributes:
        before: questions and answers that the model is shown before the prompt (a text alone: an empty question).
        said: the answer, given without the model; None if the model is asked.
        forbidden: words that must not be in the answer.
    """

    before: tuple[tuple[str, str], ...] = ()
    said: str | None = None
    forbidden: tuple[str, ...] = ()


@dataclass(frozen=True)
class Detector:
    """Which of the stored forget prompts does a prompt concern?

    `names`: those whose entity's name occurs in it, word for word. `ngrams`: those that it resembles, that is

        sum of w(g)^2 over the words and word pairs g of both / the same sum over those of the stored prompt

    is at least `threshold`, with w(g) = log((1 + entities) / entities in whose stored prompts g occurs): what is said
    of everyone weighs next to nothing. `strings`: those that occur in it, word for word. What else stands in the
    prompt, such as a template, does not count.
    """

    prompts: tuple[str, ...]
    entities: tuple[str, ...]
    by: str = "names"
    threshold: float = 1.0

    @classmethod
    def fit(cls, rows: Sequence[Row], by: str) -> Detector:
        """Store forget prompts. The threshold lies midway between 1 and the most that two entities' prompts share."""
        if by not in ("names", "ngrams", "strings"):
            raise BadInput(f"no detector by {by!r} (known: names, ngrams, strings)")
        prompts, entities = tuple(row.prompt for row in rows), tuple(row.person for row in rows)
        made = cls(prompts, entities, by)
        if by != "ngrams":
            return made
        others = [
            score
            for prompt, entity in zip(prompts, entities, strict=True)
            for score, other in zip(made.similarity(prompt), entities, strict=True)
            if other != entity
        ]
        return cls(prompts, entities, by, (1.0 + max(others, default=0.0)) / 2.0)

    def __call__(self, prompt: str) -> tuple[int, ...]:
        """The stored prompts that it concerns, by number; empty if it concerns none."""
        if self.by == "names":
            found = {name for name in set(self.entities) if contains(prompt, name)}
            return tuple(i for i, name in enumerate(self.entities) if name in found)
        if self.by == "strings":
            return tuple(i for i, stored in enumerate(self.prompts) if contains(prompt, stored))
        return tuple(i for i, score in enumerate(self.similarity(prompt)) if score >= self.threshold)

    def nearest(self, prompt: str, count: int) -> list[int]:
        """The `count` stored prompts that it resembles most."""
        scores = self.similarity(prompt)
        return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]

    def similarity(self, prompt: str) -> list[float]:
        """To each stored prompt, in [0, 1]."""
        asked = _grams(prompt)
        return [sum(self._weights[g] for g in grams & asked) / total for grams, total in self._stored]

    @cached_property
    def _weights(self) -> Mapping[tuple[str, ...], float]:
        used: dict[tuple[str, ...], set[str]] = {}
        for prompt, entity in zip(self.prompts, self.entities, strict=True):
            for gram in _grams(prompt):
                used.setdefault(gram, set()).add(entity)
        count = 1 + len(set(self.entities))
        return {gram: math.log(count / len(by)) ** 2 for gram, by in used.items()}

    @cached_property
    def _stored(self) -> list[tuple[frozenset[tuple[str, ...]], float]]:
        every = [frozenset(_grams(prompt)) for prompt in self.prompts]
        return [(grams, sum(self._weights[g] for g in grams) or 1.0) for grams in every]


class Guard(ABC):
    """A frozen dataclass of texts and numbers, so that it can be written and read."""

    kind: ClassVar[str]
    reference: ClassVar[str]

    @abstractmethod
    def reply(self, prompt: str) -> Reply:
        """What becomes of a prompt: a function of its text alone."""

    def to_json(self) -> str:
        """As `guard.json` has it."""
        texts: Any = self  # every guard is a dataclass, which the type of its base does not say
        return json.dumps({"schema": SCHEMA, "kind": self.kind, **asdict(texts)}, indent=1, ensure_ascii=False)


@dataclass(frozen=True)
class Icu(Guard):
    """In-context unlearning: every prompt comes after forget rows with a wrong answer and retain rows with the right.

    Kept: the forget examples come first, with another answer than theirs; some correctly answered ones follow; then the
    prompt; greedy decoding; every prompt is treated alike, so there is nothing to detect. Simplified: the paper flips
    labels of a classifier, here an answer is replaced by another candidate. Other than in the paper: a forget set does
    not fit into a context, so the `shown` rows most like the prompt stand for it. And with `gated` only a prompt that
    concerns a forget row is preceded: for models whose other answers do not survive a context that they never had.
    """

    detector: Detector
    wrong: tuple[str, ...]
    """For each stored prompt, what is shown as its answer."""
    retain: tuple[tuple[str, str], ...]
    shown: int = 1
    gated: bool = False

    kind = "icu"
    reference = "In-Context Unlearning (Pawelczyk et al. 2023, arXiv 2310.07579)"

    def reply(self, prompt: str) -> Reply:
        """Demonstrations, then the prompt."""
        if self.gated and not self.detector(prompt):
            return Reply()
        near = [(self.detector.prompts[i], self.wrong[i]) for i in self.detector.nearest(prompt, self.shown)]
        return Reply(before=(*near, *self.retain))


@dataclass(frozen=True)
class Dragon(Guard):
    """DRAGON-like: a prompt that concerns a forget entity is declined; all others pass untouched.

    Kept: a detector over stored forget prompts in several phrasings, in front of an unchanged model, and guidance in
    context where it fires (`instruction`). Simplified: the paper's score adds an exact match, an embedding's cosine and
    a trained scorer, here it is names or word pairs; its guidance is reasoning written by a small model trained for it,
    here a fixed text. Without an instruction the refusal itself is answered, which no small model could fail to follow.
    """

    detector: Detector
    refusal: str = UNKNOWN
    instruction: str = ""

    kind = "dragon"
    reference = "DRAGON (arXiv 2511.05784)"

    def reply(self, prompt: str) -> Reply:
        """The refusal, or the instruction to refuse."""
        if not self.detector(prompt):
            return Reply()
        return Reply(before=(("", self.instruction),)) if self.instruction else Reply(said=self.refusal)


@dataclass(frozen=True)
class Restriction(Guard):
    """GUARD-like: where a prompt concerns forget rows, the words of their answers cannot be written.

    Kept: detection before decoding, forbidden text taken from the forget rows that were found, and restriction by exact
    match of tokens while decoding. Simplified: the paper's detector is a small network on hidden states, here names or
    word pairs; it retrieves the nearest row, here all that were found count; it steers a beam search and penalises
    sentences of like embedding too, here decoding is greedy and the tokens are barred. Words of less than four letters
    in an answer of several words stay free, and so do words that the prompt contains.
    """

    detector: Detector
    answers: tuple[str, ...]
    """For each stored prompt, its answer."""

    kind = "guard"
    reference = "GUARD, generation-time (arXiv 2505.13312)"

    def reply(self, prompt: str) -> Reply:
        """The words of the answers to the rows that were found."""
        found = dict.fromkeys(self.answers[i] for i in self.detector(prompt))
        return Reply(forbidden=tuple(dict.fromkeys(word for text in found for word in _content(text, prompt))))


def contains(text: str, phrase: str) -> bool:
    """Does the phrase occur in the text, word for word? Case and punctuation do not count."""
    return f" {' '.join(_words(phrase))} " in f" {' '.join(_words(text))} "


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _grams(text: str) -> set[tuple[str, ...]]:
    words = _words(text)
    return {(word,) for word in words} | set(pairwise(words))


def _content(answer: str, prompt: str) -> list[str]:
    """The words that make an answer: those that the prompt does not contain, less the short ones if any is long."""
    asked = set(_words(prompt))
    own = [word for word in re.findall(r"\w+", answer) if word.casefold() not in asked]
    return [word for word in own if len(word) >= _SHORT] or own
