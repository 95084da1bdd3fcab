"""Token sequences: the currency between instruments, the planner and the capture engine."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Tokens:
    """A token sequence of which a tail is scored.

    Attributes:
        ids: token ids of the whole sequence, special tokens included.
        start: index of the first scored token, 1 <= start < len(ids) (a token is scored by its predecessor).
        rivals: ids that compete with `ids[start]` at that position (a multiple-choice fork); may be empty.
    """

    ids: tuple[int, ...]
    start: int
    rivals: tuple[int, ...] = ()
    _key: str = field(default="", init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= self.start < len(self.ids):
            raise ValueError(f"start {self.start} outside 1..{len(self.ids) - 1}: nothing to score")

    @property
    def scored(self) -> int:
        """Number of scored tokens, at least 1."""
        return len(self.ids) - self.start

    def begun(self, scored: int) -> Tokens:
        """The same sequence up to its first `scored` scored tokens; rivals are left behind."""
        return Tokens(self.ids[: self.start + scored], self.start)

    @property
    def key(self) -> str:
        """Content address of ids and rivals: 32 hex digits. `start` is part of it only where there are rivals."""
        if not self._key:  # asked for in planning, storing and every reading
            # Rivals belong to the position `start`: with them, another start is another question.
            key = content_key(self.ids, (self.start, *self.rivals) if self.rivals else ())
            object.__setattr__(self, "_key", key)
        return self._key


@dataclass(frozen=True, slots=True)
class Drawn:
    """How continuations are drawn rather than chosen: at a temperature above 0, one seed (32 bits) for each of them."""

    temperature: float
    seeds: tuple[int, ...]


def content_key(ids: tuple[int, ...], rivals: tuple[int, ...] = ()) -> str:
    """SHA-256 (first 32 hex digits) over ids and rivals."""
    data = array("q", (len(ids), *ids, *rivals)).tobytes()
    return hashlib.sha256(data).hexdigest()[:32]


def common_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Number of leading ids that `a` and `b` share."""
    limit = min(len(a), len(b))
    if a[:limit] == b[:limit]:
        return limit
    return next(i for i in range(limit) if a[i] != b[i])
