"""Peak resident memory of a whole scan process over the bytes of the model's weights in memory."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.materials import STORIES, child, demo_folder, large_random
from benchmarks.timing import Line, Settings


def memory(settings: Settings) -> Iterator[Line]:
    """A few rows at the quick budget; the libraries' own memory is given apart, since a small model drowns in it.

    One run each: a peak hardly varies. An attack trains all weights, and AdamW holds four numbers for each (weight,
    gradient, two moments), so its line has 4 for its floor where the passes' has 1.
    """
    demo_folder(settings.work)
    libraries = int(child("libraries")["peak"])
    folders = {"SmolLM2-135M's shape, random": large_random(settings.work)}
    if STORIES.is_dir():
        folders["stories260k"] = STORIES
    for name, folder in folders.items():
        for kind, skip in (("passes and statistics", ("relearn",)), ("with the relearn attack", ())):
            out = settings.work / "memory-out"
            measured = child("memory", work=settings.work, folder=folder, out=out, rows=18, skip=skip)
            peak, weights = int(measured["peak"]), int(measured["weights"])
            above = (peak - libraries) / weights
            detail = (
                f"peak {_mb(peak)}, libraries alone {_mb(libraries)}, weights {_mb(weights)}; "
                f"peak / weights {peak / weights:.2f}; {measured['seconds']:.0f} s"
                + ("".join(f"; {reason}" for reason in measured["not_run"]))
            )
            yield Line("memory", f"{name}, {kind}: peak above libraries / weights", above, above, above, detail=detail)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
