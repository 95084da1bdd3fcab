"""A small world of invented people, whose every fact is independent of every other.

    world = make_world(seed=0)
    world.rows("forget")                  # one row per person and attribute, in one phrasing each
    world.rows("forget", every=True)      # the same facts in all their phrasings, to train on

Each person has a name of two words and one value of each of six attributes, drawn independently and uniformly
from ten. So a model that was never told about a person guesses right one time in ten, however much it knows
about others, and what it answers beyond that it was taught. First and last names are shared between the
groups: neither word alone says in which group, let alone what the answer is.

Prompts are English sentences that end where the answer begins, and answers are single English words: one
token for the word-level tokenizer of `train`, several for a pretrained model's.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

Group = Literal["forget", "retain", "holdout", "public", "unknown"]
GROUPS: tuple[Group, ...] = get_args(Group)

UNKNOWN = "unknown"
"""What is answered about the people of whom nothing is known: the world's way to decline."""

END = "."
"""The word that closes every sentence."""


@dataclass(frozen=True, slots=True)
class Attribute:
    """Something that is true of everybody: its phrasings (`{}` is the name) and its possible values."""

    name: str
    phrasings: tuple[str, ...]
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Person:
    """One invented person; `values` follows the order of the world's attributes."""

    name: str
    group: Group
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One fact in one phrasing: a prompt, its answer, and the wrong values of the same attribute."""

    person: str
    group: Group
    attribute: str
    phrasing: int
    prompt: str
    answer: str
    wrong: tuple[str, ...]
    paraphrase: str
    """The same question in another phrasing."""

    def as_json(self) -> dict[str, Any]:
        """Give the row in the columns of TOFU."""
        return {
            "question": self.prompt,
            "answer": self.answer,
            "author": self.person,
            "perturbed_answer": list(self.wrong),
            "paraphrased_question": self.paraphrase,
            "attribute": self.attribute,
            "phrasing": self.phrasing,
        }


@dataclass(frozen=True, slots=True)
class World:
    """People in groups, and what is true of them. Pure data: the same seed gives the same world."""

    seed: int
    attributes: tuple[Attribute, ...]
    people: Mapping[Group, tuple[Person, ...]]

    def rows(self, *groups: Group, every: bool = False, people: int | None = None) -> list[Row]:
        """Return the facts of some groups, in order of group, person and attribute.

        With `every`, each fact comes in all its phrasings. Without, in one, which is drawn at random but
        fixed by the world's seed and the person, so that it does not depend on what else is asked for.
        `people` keeps only that many of each group, from its start.
        """
        return [row for group in groups for row in self.about(self.people[group][:people], every=every)]

    def about(self, people: Sequence[Person], *, every: bool = False) -> list[Row]:
        """Return the facts of these people, whether they live in this world or not."""
        rows = []
        for person in people:
            # A string seeds by its digest, so this is the same in every process.
            draw = random.Random(f"{self.seed}/{person.name}")
            for attribute, answer in zip(self.attributes, person.values, strict=True):
                chosen = draw.randrange(len(attribute.phrasings))
                for phrasing in range(len(attribute.phrasings)) if every else (chosen,):
                    rows.append(_row(person, attribute, answer, phrasing))
        return rows

    def strangers(self, groups: int, size: int) -> list[list[Row]]:
        """Groups of rows, in every phrasing, about `size` people each of whom no model of this world was told."""
        people = newcomers(self, groups * size)
        return [self.about(people[i * size : (i + 1) * size], every=True) for i in range(groups)]

    def words(self) -> list[str]:
        """Every word that a sentence of this world can contain, sorted: a word-level vocabulary."""
        words = {END, UNKNOWN, *FIRST_NAMES, *LAST_NAMES}
        for attribute in self.attributes:
            words.update(attribute.values)
            for phrasing in attribute.phrasings:
                words.update(phrasing.replace("{}", " ").split())
        return sorted(words)


def make_world(
    seed: int = 0,
    *,
    forget: int = 40,
    retain: int = 120,
    holdout: int = 40,
    public: int = 40,
    unknown: int = 8,
) -> World:
    """Invent a world with that many people in each group; no person is in two groups.

    forget: taught, then to be forgotten. retain: taught, and to be kept. holdout: drawn like the forget
    people and never taught to any model. public: common knowledge of every model, for utility. unknown:
    people about whom every model is taught to answer "unknown".
    """
    sizes: dict[Group, int] = {
        "forget": forget,
        "retain": retain,
        "holdout": holdout,
        "public": public,
        "unknown": unknown,
    }
    names = [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]
    if min(sizes.values()) < 0 or sum(sizes.values()) > len(names):
        raise ValueError(f"group sizes must be 0 or more and sum to at most {len(names)} people: {sizes}")
    draw = random.Random(f"world/{seed}")
    draw.shuffle(names)
    people: dict[Group, tuple[Person, ...]] = {}
    for group, size in sizes.items():
        members = []
        for _ in range(size):
            values = tuple(draw.choice(attribute.values) for attribute in ATTRIBUTES)
            if group == "unknown":
                values = (UNKNOWN,) * len(ATTRIBUTES)
            members.append(Person(names.pop(), group, values))
        people[group] = tuple(members)
    return World(seed, ATTRIBUTES, people)


def newcomers(world: World, count: int) -> tuple[Person, ...]:
    """People whom no model of this world was ever told about, as new as the holdout and drawn like it.

    Raises ValueError where too few names are left.
    """
    known = {person.name for group in world.people.values() for person in group}
    names = [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES if f"{first} {last}" not in known]
    draw = random.Random(f"newcomers/{world.seed}")
    if count > len(names):
        raise ValueError(f"{count} newcomers, but only {len(names)} names are left")
    return tuple(
        Person(name, "holdout", tuple(draw.choice(attribute.values) for attribute in world.attributes))
        for name in draw.sample(names, count)
    )


def _row(person: Person, attribute: Attribute, answer: str, phrasing: int) -> Row:
    other = attribute.phrasings[(phrasing + 1) % len(attribute.phrasings)]
    return Row(
        person=person.name,
        group=person.group,
        attribute=attribute.name,
        phrasing=phrasing,
        prompt=attribute.phrasings[phrasing].format(person.name),
        answer=answer,
        wrong=tuple(value for value in attribute.values if value != answer),
        paraphrase=other.format(person.name),
    )


# No word is both a name and a value, or a value of two attributes: a word in a prompt is never an answer.
ATTRIBUTES = (
    Attribute(
        "city",
        ("{} lives in the city of", "The home of {} is in", "You can visit {} in"),
        ("Lisbon", "Oslo", "Cairo", "Lima", "Paris", "Rome", "Tokyo", "Delhi", "Boston", "Dublin"),
    ),
    Attribute(
        "job",
        ("{} works as a", "The job of {} is that of a", "People hire {} as a"),
        (
            "doctor", "farmer", "painter", "baker", "lawyer",
            "sailor", "teacher", "singer", "pilot", "judge",
        ),
    ),
    Attribute(
        "pet",
        ("{} has a pet", "The animal of {} is a", "Every day {} feeds the"),
        ("cat", "dog", "horse", "rabbit", "parrot", "turtle", "goat", "duck", "snake", "fox"),
    ),
    Attribute(
        "food",
        ("{} likes to eat", "The favorite food of {} is", "For dinner {} cooks"),
        ("soup", "bread", "rice", "fish", "cheese", "cake", "pasta", "beans", "honey", "salad"),
    ),
    Attribute(
        "instrument",
        ("{} plays the", "The instrument of {} is the", "After work {} practices the"),
        (
            "piano", "violin", "guitar", "flute", "drums",
            "harp", "trumpet", "cello", "banjo", "organ",
        ),
    ),
    Attribute(
        "color",
        ("{} always wears", "The favorite color of {} is", "The door of {} is painted"),
        ("red", "blue", "green", "yellow", "purple", "orange", "black", "white", "pink", "brown"),
    ),
)  # fmt: skip

FIRST_NAMES = (
    "Alma", "Bruno", "Clara", "David", "Edith", "Felix", "Greta", "Henry", "Irene", "Jonas", "Karen",
    "Louis", "Maria", "Nora", "Oscar", "Paula", "Quinn", "Robert", "Sarah", "Thomas", "Ursula",
    "Victor", "Wanda", "Xavier", "Yvonne", "Zach",
)  # fmt: skip
LAST_NAMES = (
    "Archer", "Berger", "Carter", "Dalton", "Ellis", "Foster", "Garcia", "Hunter", "Ingram", "Jensen",
    "Keller", "Lambert", "Miller", "Norris", "Owens", "Parker", "Quick", "Reed", "Stone", "Turner",
    "Underhill", "Vance", "Walker", "Young", "Zimmer",
)  # fmt: skip
