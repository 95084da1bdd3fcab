"""A world made of a published data set: its entities, dealt by seed into the groups of a world.

    world = deal(Path("forget10_perturbed.jsonl"), seed=0)
    world.rows("forget", every=True)

What holds for invented people must be arranged here: entities are dealt whole, so no fact of one group is taught with
another; the holdout entities come from the same file as the forget entities and are taught to no model. Rows need
wrong answers (an organism's accuracy is measured against them) and an entity.

Trap: a pretrained base may know published facts before any teaching; invented authors (TOFU) it cannot.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from audit.errors import BadInput
from audit.loaders import Example, load_set, parse_set_spec
from audit.organisms.world import END, UNKNOWN, Group, Row

SHARES: Mapping[Group, float] = {"forget": 0.2, "retain": 0.4, "holdout": 0.2, "public": 0.1}
"""Of the entities; the rest are strangers, whom controls may teach."""


@dataclass(frozen=True, slots=True)
class Dealt:
    """Rows of a data set by group; answers to `World`'s questions."""

    seed: int
    entities: Mapping[str, tuple[Example, ...]]
    groups: Mapping[str, tuple[str, ...]]

    def rows(self, *groups: Group, every: bool = False, people: int | None = None) -> list[Row]:
        """The facts of some groups: one row each, or with `every` one for each paraphrase of the answer too."""
        return [r for group in groups for r in self._about(self.groups.get(group, ())[:people], group, every=every)]

    def strangers(self, groups: int, size: int) -> list[list[Row]]:
        """Groups of rows about up to `size` entities each of whom no model was told, fewer where there are no more."""
        left = self.groups["strangers"]
        size = min(size, len(left) // groups)
        if size == 0:
            raise BadInput(f"{len(left)} entities are left to be strangers, {groups} groups were asked for")
        return [self._about(left[i * size : (i + 1) * size], "holdout", every=True) for i in range(groups)]

    def words(self) -> list[str]:
        """Every word of every row, sorted."""
        text = [
            part
            for examples in self.entities.values()
            for e in examples
            for part in (e.prompt, e.answer, *e.paraphrases, *e.wrong)
        ]
        return sorted({END, UNKNOWN, *" ".join(text).split()})

    def _about(self, entities: Sequence[str], group: Group, *, every: bool) -> list[Row]:
        made = []
        for entity in entities:
            for number, example in enumerate(self.entities[entity]):
                for phrasing, answer in enumerate(
                    (example.answer, *example.paraphrases) if every else (example.answer,)
                ):
                    same = example.prompt
                    made.append(Row(entity, group, str(number), phrasing, same, answer, example.wrong, same))
        return made


def deal(source: str, seed: int) -> Dealt:
    """Deal the entities of a data set (as on the command line: `PATH` or `PATH?key=value&…`) into groups by seed.

    Raises:
        BadInput: the set cannot be loaded, has fewer than ten entities, or rows without entity or wrong answers.
    """
    examples = load_set("forget", parse_set_spec(source, Path())).examples
    entities: dict[str, list[Example]] = {}
    for example in examples:
        if not example.entity or not example.wrong:
            raise BadInput(f"{source}: row {example.id} has no entity, or no wrong answers: no world can be dealt")
        entities.setdefault(example.entity, []).append(example)
    if len(entities) < 10:
        raise BadInput(f"{source}: {len(entities)} entities, a world needs 10")
    names = sorted(entities)
    random.Random(f"deal/{seed}").shuffle(names)
    groups: dict[str, tuple[str, ...]] = {"unknown": ()}
    for group, share in SHARES.items():
        count = round(share * len(entities))
        groups[group], names = tuple(names[:count]), names[count:]
    groups["strangers"] = tuple(names)
    return Dealt(seed, {name: tuple(rows) for name, rows in entities.items()}, groups)
