"""Progress, as the engine reports it: labelled steps. The command line draws bars; everyone else passes `SILENT`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Tick = Callable[[int], None]
"""Called with the number of steps done so far."""


def part_of(tick: Callable[[int, int], object], begun: int, total: int) -> Callable[..., None]:
    """Shows the progress of one run, called with its steps done (and of how many), as progress of all runs."""

    def show(done: int, *_: int) -> None:
        tick(begun + done, total)

    return show


class Progress(Protocol):
    """Shows how far labelled pieces of work have come."""

    def step(self, label: str, total: int) -> AbstractContextManager[Tick]:
        """Show `label` with a bar of `total` steps while the block runs."""
        ...


class _Silent:
    @contextmanager
    def step(self, label: str, total: int) -> Iterator[Tick]:  # noqa: ARG002
        yield lambda _: None


SILENT: Progress = _Silent()
