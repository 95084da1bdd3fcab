"""One fact asked in other words: what attacks by prompts make of a row, from the rows of the case alone.

A prompt has one of three forms. A *question* ends with "?". A *gap* holds "___". A *prefix* is a sentence that ends
where the answer begins, so whatever is said to the model goes before it. The name of whom a row is about is its entity,
where that stands in the prompt, else the capitalised words that most prompts of the entity share: TOFU numbers its
authors, and names them in the questions only.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Literal

from audit.case import Case
from audit.loaders import Example

__all__ = ["Facts", "asked_back", "form", "named", "sentences", "statement", "told", "uncapitalised", "with_synonyms"]

GAP = "___"
_FILL = "Fill in the blank: "

SYNONYMS: Mapping[str, str] = {
    "author": "writer", "writer": "author", "book": "published work", "books": "published works",
    "born": "brought into the world",
    "profession": "occupation", "occupation": "profession", "job": "occupation", "works as": "is employed as",
    "father": "dad", "mother": "mum", "parents": "mother and father", "wife": "spouse", "husband": "spouse",
    "full name": "complete name", "wrote": "penned", "written": "penned", "city": "town", "country": "nation",
    "famous": "renowned", "known for": "renowned for", "award": "prize", "awards": "prizes", "won": "received",
    "movie": "film", "film": "movie", "song": "track", "debut": "first", "founded": "established",
    "lives in": "resides in", "home": "residence", "pet": "animal companion", "favorite": "preferred",
    "likes to": "enjoys to", "hire": "employ", "cooks": "prepares", "always": "at all times", "begin": "start",
    "style": "manner", "themes": "motifs", "genre": "kind of literature", "title": "name",
}  # fmt: skip
"""Words and what is said instead; the form of the sentence stays."""

_OPENERS = frozenset((
    "what", "which", "who", "whose", "where", "when", "how", "why", "is", "are", "was", "were", "did", "does", "do",
    "has", "have", "can", "could", "name", "in", "at", "on", "for", "after", "as", "by", "with", "from", "every", "one",
    "some", "the", "a", "an", "this", "these", "people", "you", "his", "her",
))  # fmt: skip
"""Words that lose their capital within a sentence."""


def form(prompt: str) -> Literal["question", "gap", "prefix"]:
    """How an answer follows this prompt."""
    return "question" if prompt.rstrip().endswith("?") else "gap" if GAP in prompt else "prefix"


def told(instruction: str, prompt: str, completing: str = "Complete the sentence:") -> str:
    """A prompt with something said before it, so that the answer still follows."""
    return f"{instruction} {completing} {prompt}" if form(prompt) == "prefix" else f"{instruction} {prompt}"


def statement(row: Example) -> str:
    """A row as a sentence that says its answer, without a full stop."""
    prompt, answer = row.prompt.strip(), row.answer.strip().rstrip(".")
    kind = form(prompt)
    if kind == "gap":
        return prompt.removeprefix(_FILL).replace(GAP, answer).rstrip(".")
    if kind == "prefix":
        return f"{prompt} {answer}"
    # TOFU answers in sentences, others in a word or two that say nothing by themselves.
    return answer if len(answer.split()) >= 5 else f'the answer to "{prompt}" is {answer}'


def with_synonyms(prompt: str) -> str:
    """Every word that has one, replaced by its synonym; capitalised words may be names, and stay."""
    return _synonym().sub(lambda found: SYNONYMS[found[0]], prompt)


def named(prompts: Sequence[str]) -> str:
    """The longest run of two or more capitalised words in the most of these prompts, at least half of them and two.

    Empty if there is none. A possessive's ending does not count.
    """
    counts: Counter[str] = Counter()
    for prompt in prompts:
        runs: list[list[str]] = [[]]
        for word in re.findall(r"[^\s,;:?!\"()“”]+", re.sub(r"['’]s?(?=\W|$)", "", prompt)):
            if word[0].isupper():
                runs[-1].append(word)
            else:
                runs.append([])
        parts = {
            " ".join(run[i:j]) for run in runs for i in range(len(run)) for j in range(i + 2, min(i + 5, len(run)) + 1)
        }
        counts.update(parts)
    best = max(counts.items(), key=lambda item: (item[1], len(item[0]), item[0]), default=("", 0))
    return best[0].rstrip(".") if best[1] >= max(2, len(prompts) / 2) else ""


class Facts:
    """Who the rows of a case are about, and what else they say of them.

    What is drawn is drawn by the case's seed and the row's id alone.
    """

    def __init__(self, case: Case) -> None:
        self._seed = case.options.seed
        self._names: dict[str, str] = {}
        self._set: dict[str, str] = {}
        self._about: dict[tuple[str, str], list[Example]] = defaultdict(list)
        self._named: dict[str, dict[str, str]] = defaultdict(dict)  # by set, name by entity
        self._relations: dict[frozenset[str], set[str]] = defaultdict(set)
        self._retain = case.sets["retain"].examples if "retain" in case.sets else ()
        for name in case.sets:
            for row in case.sets[name].examples:
                self._set[row.id] = name
                if row.entity:
                    self._about[name, row.entity].append(row)
        for (name, entity), rows in self._about.items():
            common = None
            for row in rows:
                if entity not in row.prompt and common is None:
                    common = named([r.prompt for r in rows])
                found = entity if entity in row.prompt else common or ""
                if found and found in row.prompt:
                    self._names[row.id] = self._named[name][entity] = found
                    self._relations[_relation(row)].add(row.prompt.replace(found, "{}"))

    def draw(self, row: Example) -> random.Random:
        """A source of chance for this row."""
        return random.Random(f"{self._seed}/{row.id}")

    def name(self, row: Example) -> str:
        """Of whom a row is about, as in its prompt; empty where the prompt names nobody."""
        return self._names.get(row.id, "")

    def siblings(self, row: Example) -> list[Example]:
        """Other rows about the same entity, in file order from the row on, that do not say the answer.

        Nor the entity's name, where that is what the row asks for.
        """
        rows = self._about.get((self._set[row.id], row.entity), [])
        at = next((i for i, other in enumerate(rows) if other.id == row.id), 0)
        told_answer = row.answer.strip().rstrip(".").casefold()
        found = []
        for other in rows[at + 1 :] + rows[:at]:
            asked_for = not self.name(row) and self.name(other) in row.answer
            if self.name(other) and not asked_for and told_answer not in statement(other).casefold():
                found.append(other)
        return found

    def strangers(self, row: Example, count: int) -> list[str]:
        """Names of others of the same set of whom no row gives the same answer; drawn, fewer where there are fewer."""
        of_set = self._set[row.id]
        answer, own = row.answer.casefold(), self.name(row)
        others = sorted(
            {
                name
                for entity, name in self._named[of_set].items()
                if name != own and all(other.answer.casefold() != answer for other in self._about[of_set, entity])
            }
        )
        return self.draw(row).sample(others, min(count, len(others)))

    def shots(self, row: Example, count: int) -> list[Example]:
        """Retain rows of the same form about others, drawn; none where there are too few."""
        others = [
            other
            for other in self._retain
            if form(other.prompt) == form(row.prompt)
            and (other.entity or other.id) != (row.entity or row.id)
            and other.answer.casefold() != row.answer.casefold()
        ]
        return self.draw(row).sample(others, count) if len(others) >= count else []

    def phrasings(self, row: Example) -> list[str]:
        """The row's question as rows with the same options ask it of others, about the row's own entity; sorted."""
        name = self.name(row)
        if not name or not row.wrong:
            return []
        own = row.prompt.replace(name, "{}")
        return [t.replace("{}", name) for t in sorted(self._relations[_relation(row)]) if t != own]

    def without_name(self, row: Example, text: str, instead: str) -> str:
        """The text with something else for the row's name; empty where a part of the name would remain."""
        name = self.name(row)
        out = text.replace(name, instead) if name and name in text else ""
        kept = out.replace(instead, "")
        return "" if any(re.search(rf"\b{re.escape(part)}\b", kept) for part in name.split()) else out


def asked_back(facts: Facts, row: Example, options: int) -> Example:
    """The row turned round: of whom is it true? The row itself where its prompt names nobody, or nobody else is."""
    gapped = facts.without_name(row, statement(row), GAP)
    others = facts.strangers(row, options)
    if not gapped or not others or not row.answer.replace(facts.name(row), "").strip(" .\"'"):
        return row
    asking = "The name in the gap is" if form(row.prompt) == "prefix" else "Which name belongs in the gap?"
    prompt = f"{sentences([gapped])} {asking}"
    return replace(row, prompt=prompt, answer=facts.name(row), wrong=tuple(others))


def uncapitalised(text: str) -> str:
    """A question or statement as it stands within a sentence: names keep their capital."""
    return text[:1].lower() + text[1:] if text.split(" ", 1)[0].lower() in _OPENERS else text


def sentences(parts: Iterable[str]) -> str:
    """Statements as sentences, one after the other."""
    return " ".join(f"{part[:1].upper()}{part[1:]}." for part in parts)


def _relation(row: Example) -> frozenset[str]:
    """What rows about one kind of fact share where options are listed: the options."""
    return frozenset(text.casefold() for text in (row.answer, *row.wrong))


@lru_cache(maxsize=1)
def _synonym() -> re.Pattern[str]:
    words = sorted(SYNONYMS, key=len, reverse=True)
    return re.compile(rf"\b({'|'.join(map(re.escape, words))})\b")
