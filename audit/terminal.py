"""What people see and do while they wait: the two streams, progress bars on the one for errors, the wish to stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from audit.progress import Progress, Tick

out = Console()
err = Console(stderr=True)


@contextmanager
def bars() -> Iterator[Progress]:
    """Progress bars on standard error; plain lines, one a step, where that is no terminal."""
    from rich.progress import (
        BarColumn,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )

    class Drawn:
        def __init__(self, bars: Bars) -> None:
            self._bars = bars

        @contextmanager
        def step(self, label: str, total: int) -> Iterator[Tick]:
            task = self._bars.add_task(label, total=total)
            if not err.is_terminal:
                err.print(f"{label} …", markup=False, highlight=False)
            yield lambda done: self._bars.update(task, completed=done)
            self._bars.update(task, completed=total)

    with Bars(*columns, console=err, disable=not err.is_terminal) as drawn:
        yield Drawn(drawn)


def stages(progress: Progress) -> Any:
    """Builders report (stage, done, total): show each stage as a step of its own."""
    open_step: dict[str, Any] = {}

    def show(stage: str, done: int, total: int) -> None:
        if stage not in open_step:
            open_step[stage] = (context := progress.step(stage, total)), context.__enter__()
        context, tick = open_step[stage]
        tick(done)
        if done >= total:
            context.__exit__(None, None, None)

    return show


@contextmanager
def interruptible() -> Iterator[None]:
    """While the block runs, a request to end (SIGTERM, as of a scheduler) is what Ctrl-C is."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
