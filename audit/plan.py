"""Instruments' requests merged into the fewest passes through the model.

Three savings, in this order: a sequence that several instruments ask for is run once, with every quantity that
any of them wants; sequences that begin alike (the options of one question, the neighbours of one text) compute
their common beginning once; what remains is sorted by length and packed to a token budget.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from typing import Any

from audit.quantities import TOKEN, Quantity
from audit.tokens import Tokens, common_prefix


@dataclass(frozen=True)
class Request:
    """Ask for quantities at the scored tokens of sequences.

    Attributes:
        name: how the instrument finds the answer again, e.g. `knowledge/forget/answer`.
        sequences: what passes through the model; answers come back in this order.
        quantities: what is recorded (see `audit.quantities`).
        extra: what `measure` needs to know of how the sequences were made, and cannot derive without the model.
    """

    name: str
    sequences: tuple[Tokens, ...]
    quantities: tuple[Quantity, ...] = (TOKEN,)
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Generate:
    """Ask for continuations of prompts, at most `new_tokens` long: greedy ones, if nothing else is said.

    Attributes:
        name: how the instrument finds the answer again.
        prompts: token ids to go on from.
        new_tokens: length of a continuation, at most.
        samples: continuations of each prompt, drawn at `temperature` > 0 from all that the model may write.
        temperature: 0: what is likeliest, token by token.
        beams: width of a beam search; all that it ends with is kept, likeliest first.
        seed: of what is drawn.
    """

    name: str
    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int
    samples: int = 1
    temperature: float = 0.0
    beams: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.samples, self.beams) < 1 or self.temperature < 0:
            raise ValueError(f"{self.name}: samples and beams must be at least 1, the temperature at least 0")
        if (self.samples > 1 and not self.temperature) or (self.beams > 1 and self.temperature):
            raise ValueError(f"{self.name}: several samples need a temperature above 0, and a beam search none")

    @property
    def ways(self) -> tuple[str, ...]:
        """A name for each continuation of a prompt: with the prompt and `new_tokens`, all that determines it."""
        if self.beams > 1:
            return tuple(f"beam{self.beams}.{i}" for i in range(self.beams))
        if self.temperature:
            return tuple(f"drawn{i}@{self.temperature:g}.{self.seed}" for i in range(self.samples))
        return ("greedy",)


@dataclass(frozen=True)
class Weights:
    """Ask how the weight files differ from those of the role `against`, tensor by tensor: see `audit.weights`.

    None: from nothing, which describes the weights themselves.
    """

    name: str
    against: str | None = "original"


@dataclass(frozen=True)
class Patched:
    """Ask for quantities at the scored tokens while the model goes on from another model's states: `audit.patching`.

    Every array has an axis more, [T, 1 + sites, ...]: as the model is, then with the states at one site each put in.

    Attributes:
        name: how the instrument finds the answer again.
        sequences: what passes through the model; answers come back in this order.
        source: the role whose states are put in. It must have been asked for `hidden(*sites)` of these sequences.
        sites: outputs that are overwritten at the positions that predict the scored tokens.
        quantities: what is recorded.
    """

    name: str
    sequences: tuple[Tokens, ...]
    source: str
    sites: tuple[str, ...]
    quantities: tuple[Quantity, ...] = (TOKEN,)

    def kept(self, quantity: Quantity, tokens: Tokens, source: str) -> Quantity:
        """The quantity under the name it is stored by, which says what was put in where; `source`: a store's digest.

        The first position is a part of it: what is put in from there on changes all that follows.
        """
        return replace(quantity, name=f"{quantity.name}@{tokens.start}<{source}:{','.join(self.sites)}")


AnyRequest = Request | Generate | Weights | Patched


@dataclass(frozen=True)
class Work:
    """One sequence and everything wanted of it."""

    tokens: Tokens
    quantities: tuple[Quantity, ...]


@dataclass(frozen=True)
class Input:
    """One row of the model's input, and the works it answers.

    The last token of a sequence is scored but never enters the model, so that all one-token answers to a question
    have one input.
    """

    ids: tuple[int, ...]
    works: tuple[Work, ...]


@dataclass(frozen=True)
class Batch:
    """Inputs that run together.

    Attributes:
        prefix: number of leading tokens that all inputs of a group share; 0 for a plain batch.
        groups: inputs by shared prefix; singletons in a plain batch.
    """

    prefix: int
    groups: tuple[tuple[Input, ...], ...]

    @property
    def inputs(self) -> list[Input]:
        """All inputs, group after group."""
        return [row for group in self.groups for row in group]

    @property
    def works(self) -> list[Work]:
        """All works, input after input."""
        return [work for row in self.inputs for work in row.works]

    @property
    def forward_tokens(self) -> int:
        """Tokens that pass through the model, padding apart."""
        suffixes = sum(len(row.ids) - self.prefix for row in self.inputs)
        return suffixes + self.prefix * len(self.groups)

    def halves(self) -> tuple[Batch, Batch] | None:
        """Two batches of half the inputs each, in the same order; None of one input."""
        members = [(i, row) for i, group in enumerate(self.groups) for row in group]
        middle = len(members) // 2
        if not middle:
            return None
        first, rest = (
            Batch(self.prefix, tuple(tuple(row for _, row in group) for _, group in groupby(half, key=itemgetter(0))))
            for half in (members[:middle], members[middle:])
        )
        return first, rest


def merge(requests: Iterable[Request]) -> list[Work]:
    """The union of all requests: for each distinct sequence every wanted quantity, from the earliest position on."""
    wanted: dict[str, Work] = {}
    for request in requests:
        asked = _united(request.quantities)
        for tokens in request.sequences:
            known = wanted.get(tokens.key)
            if known is None:
                wanted[tokens.key] = Work(tokens, asked)
            elif tokens.start < known.tokens.start or known.quantities != asked:
                first = tokens if tokens.start < known.tokens.start else known.tokens
                wanted[tokens.key] = Work(first, _united(known.quantities + asked))
    return list(wanted.values())


@lru_cache(maxsize=256)
def _united(quantities: tuple[Quantity, ...]) -> tuple[Quantity, ...]:
    """One quantity a name, sorted by name."""
    named = {quantity.name: quantity for quantity in quantities}
    return tuple(named[name] for name in sorted(named))


def pack(works: Sequence[Work], *, token_budget: int, share: bool = True, overhead: int = 0) -> list[Batch]:
    """Group by shared prefix, sort by length, pack to `token_budget` tokens (padding included) a batch.

    Families run together where their prefixes have one length, which is why lengths are rounded down to
    multiples of four. `overhead` is what one more batch costs, in tokens: families of one length that save less, or
    that padding costs more, run plainly.
    Without `share` every sequence is an input of its own.
    """
    plain: list[tuple[Input, ...]] = []
    shared: dict[int, list[tuple[Input, ...]]] = {}
    for prefix, group in _families(_inputs(works)) if share else [(0, [Input(w.tokens.ids[:-1], (w,))]) for w in works]:
        common = prefix - prefix % 4 or prefix
        for piece in _pieces(common, group, token_budget) if common else [(row,) for row in group]:
            if len(piece) > 1:
                shared.setdefault(common, []).append(piece)
            else:
                plain.append(piece)
    together: list[Batch] = []
    for prefix in sorted(shared):
        batches = _fill(prefix, shared[prefix], token_budget)
        rows: list[tuple[Input, ...]] = [(row,) for group in shared[prefix] for row in group]
        saved = _slots(_fill(0, rows, token_budget)) - _slots(batches)
        if saved > overhead * (1 + len(batches)):  # a pass more for each batch, and one that runs anyway split in two
            together += batches
        else:
            plain += rows
    return _fill(0, plain, token_budget) + together


def _slots(batches: Iterable[Batch]) -> int:
    """Tokens that batches take, padding included."""
    slots = 0
    for batch in batches:
        longest = max(len(row.ids) for row in batch.inputs) - batch.prefix
        slots += longest * len(batch.inputs) + batch.prefix * len(batch.groups)
    return slots


def _inputs(works: Sequence[Work]) -> list[Input]:
    """Works by what enters the model, sorted, so that relatives are neighbours."""
    found: dict[tuple[int, ...], list[Work]] = {}
    for work in works:
        found.setdefault(work.tokens.ids[:-1], []).append(work)
    return [Input(ids, tuple(found[ids])) for ids in sorted(found)]


def _families(rows: Sequence[Input]) -> list[tuple[int, list[Input]]]:
    """Split sorted inputs into families with a common beginning, where that saves tokens.

    A family grows while the tokens saved, prefix x (members - 1), grow. Every scored token must be predicted
    outside the prefix, so that no prefix exceeds the smallest start - 1.
    """
    families: list[tuple[int, list[Input]]] = []
    members: list[Input] = []
    prefix = 0
    for row in rows:
        limit = min(work.tokens.start for work in row.works) - 1
        if members:
            extended = min(prefix, limit, common_prefix(members[-1].ids, row.ids))
            # A family of one has saved nothing yet: two tokens in common pay for the second pass's overhead.
            if extended >= 2 and extended * len(members) > prefix * (len(members) - 1):
                members.append(row)
                prefix = extended
                continue
            families.append((prefix if len(members) > 1 else 0, members))
        members, prefix = [row], limit
    if members:
        families.append((prefix if len(members) > 1 else 0, members))
    return families


def _pieces(prefix: int, family: list[Input], budget: int) -> list[tuple[Input, ...]]:
    """A family in parts that fit a batch: every row keeps a copy of its prefix's keys and values in memory.

    A batch holds at most `budget` tokens of suffix, padding included, and as many of copied prefixes; what is split
    computes its prefix once a part.
    """
    family = sorted(family, key=lambda row: -len(row.ids))  # alike in length: padding must not eat what is saved
    pieces = []
    while family:
        size = max(1, budget // max(prefix, len(family[0].ids) - prefix))
        pieces.append(tuple(family[:size]))
        family = family[size:]
    return pieces


def _fill(prefix: int, groups: list[tuple[Input, ...]], budget: int) -> list[Batch]:
    """Longest first, so that the largest batch is the first and memory is known early."""
    most = budget // max(1, prefix)
    batches: list[Batch] = []
    current: list[tuple[Input, ...]] = []
    rows = longest = 0
    for group in sorted(groups, key=lambda group: max(len(row.ids) for row in group), reverse=True):
        length = max(len(row.ids) for row in group) - prefix
        together = rows + len(group)
        fits = together * max(longest, length) + prefix * (len(current) + 1) <= budget and together <= most
        if current and not fits:
            batches.append(Batch(prefix, tuple(current)))
            current, rows, longest = [], 0, 0
        current.append(group)
        rows, longest = rows + len(group), max(longest, length)
    if current:
        batches.append(Batch(prefix, tuple(current)))
    return batches
