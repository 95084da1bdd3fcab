"""Times and what is said about them: lines of the table, sides that take turns, a clock of exclusive parts."""

from __future__ import annotations

import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Line:
    """One row of the table.

    Attributes:
        benchmark: as on the command line.
        measured: what is divided by what.
        ratio: of the medians.
        low, high: least and greatest ratio of one turn.
        aim: in words, empty if there is none.
        met: whether the aim is; None without one.
        detail: seconds, sizes, differences.
    """

    benchmark: str
    measured: str
    ratio: float
    low: float
    high: float
    aim: str = ""
    met: bool | None = None
    detail: str = ""


@dataclass(frozen=True)
class Settings:
    """How a benchmark is run: where models are kept, how often each side, and whether only to see that it works.

    `size`: of the model that is larger than memory.
    """

    work: Any
    repeats: int = 3
    small: bool = False
    size: str = "0.5B"


def take_turns(sides: Mapping[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of every turn, and what each side returned in the first round, which is not timed.

    Every other round runs backwards, so that no side always follows the same one.
    """
    results = {name: run() for name, run in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats):
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            began = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - began)
    return seconds, results


def ratio(above: Sequence[float], below: Sequence[float]) -> tuple[float, float, float]:
    """Ratio of the medians, and the least and greatest ratio of one turn."""
    turns = [a / b for a, b in zip(above, below, strict=True)]
    return statistics.median(above) / statistics.median(below), min(turns), max(turns)


def seconds_of(times: Mapping[str, Sequence[float]]) -> str:
    """Medians in words: `engine 1.23 s, loop 4.56 s`."""
    return ", ".join(f"{name} {statistics.median(values):.3g} s" for name, values in times.items())


@dataclass
class Clock:
    """Wall time by part, each second counted once: what runs inside a part that has begun is taken off it."""

    parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _open: list[str] = field(default_factory=lambda: ["other"])
    _since: float = field(default_factory=time.perf_counter)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Charge the block to `name`, save what parts inside it take."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        now = time.perf_counter()
        self.parts[self._open[-1]] += now - self._since
        self._since = now

    def seconds(self) -> dict[str, float]:
        """Parts so far; their sum is the time since the clock was made."""
        self._charge()
        return dict(self.parts)

    def watch(self, owner: Any, attribute: str, name: str) -> None:
        """Charge every call of a function or method to `name`."""
        called = getattr(owner, attribute)

        @functools.wraps(called)
        def timed(*args: Any, **options: Any) -> Any:
            with self.part(name):
                return called(*args, **options)

        setattr(owner, attribute, timed)

    def watch_steps(self, owner: Any, attribute: str, name: str) -> None:
        """Charge the steps of a generator, not what its consumer does between them."""
        called = getattr(owner, attribute)

        @functools.wraps(called)
        def timed(*args: Any, **options: Any) -> Iterator[Any]:
            steps = iter(called(*args, **options))
            while True:
                with self.part(name):
                    step = next(steps, None)
                if step is None:
                    return
                yield step

        setattr(owner, attribute, timed)
