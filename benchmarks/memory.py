"""Peak resident memory of a whole scan process over the bytes of the model's weights in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from audit.inventory import take_inventory
from benchmarks.materials import STORIES, child, demo_folder, large_random
from benchmarks.timing import Line, Settings


def memory(settings: Settings) -> Iterator[Line]:
    """A few rows at the quick budget; the libraries' own memory is given apart, since a small model drowns in it.

    One run each: a peak hardly varies. The first line of a model, two tokens passed and nothing else, is the floor
    of the second. An attack trains all weights, and AdamW holds four numbers for each (weight, gradient, two
    moments): 4 is the floor of the third. Each line is given as soon as it is measured, the small model's first: the
    large one's scans take minutes. They leave REMIND out, whose many texts add batches of a size that others fill.
    """
    demo_folder(settings.work)
    libraries = int(child("libraries")["peak"])
    if STORIES.is_dir():
        yield from _lines("stories260k", STORIES, libraries, settings)
    if not settings.small:
        yield from _lines("SmolLM2-135M's shape, random", large_random(settings.work), libraries, settings, ("remind",))


def _lines(name: str, folder: Path, libraries: int, settings: Settings, skip: tuple[str, ...] = ()) -> Iterator[Line]:
    weights = 4 * take_inventory(folder).parameters
    options = {"work": settings.work, "folder": folder, "out": settings.work / "memory-out", "rows": 30}
    for kind, without in (("two tokens", None), ("scan without attacks", (*skip, "relearn")), ("scan", skip)):
        if without is None:
            measured = child("opened", folder=folder)
        else:
            measured = child("memory", **options, skip=without)
            if "relearn" not in without and (reason := measured["not_run"].get("relearn")):
                raise AssertionError(f"the relearn attack did not run: {reason}")
        peak = int(measured["peak"])
        above = (peak - libraries) / weights
        detail = (
            f"peak {_mb(peak)}, libraries alone {_mb(libraries)}, weights {_mb(weights)}; "
            f"peak / weights {peak / weights:.2f}"
        )
        yield Line("memory", f"{name}, {kind}: peak above libraries / weights", above, above, above, detail=detail)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
