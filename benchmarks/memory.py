"""Peak resident memory of a whole scan process over the bytes of the model's weights in memory."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.materials import STORIES, child, demo_folder, large_random
from benchmarks.timing import Line, Settings


def memory(settings: Settings) -> Iterator[Line]:
    """A few rows at the quick budget; the libraries' own memory is given apart, since a small model drowns in it.

    One run each: a peak hardly varies. The first line of a model, two tokens passed and nothing else, is the floor
    of the second. An attack trains all weights, and AdamW holds four numbers for each (weight, gradient, two
    moments): 4 is the floor of the third.
    """
    demo_folder(settings.work)
    libraries = int(child("libraries")["peak"])
    folders = {"SmolLM2-135M's shape, random": large_random(settings.work)}
    if STORIES.is_dir():
        folders["stories260k"] = STORIES
    out = settings.work / "memory-out"
    for name, folder in folders.items():
        scans = {
            kind: child("memory", work=settings.work, folder=folder, out=out, rows=30, skip=skip)
            for kind, skip in (("scan without attacks", ("relearn",)), ("scan", ()))
        }
        if reason := scans["scan"]["not_run"].get("relearn"):
            raise AssertionError(f"the relearn attack did not run: {reason}")
        weights = int(scans["scan"]["weights"])
        for kind, measured in {"two tokens": child("opened", folder=folder), **scans}.items():
            peak = int(measured["peak"])
            above = (peak - libraries) / weights
            detail = (
                f"peak {_mb(peak)}, libraries alone {_mb(libraries)}, weights {_mb(weights)}; "
                f"peak / weights {peak / weights:.2f}"
            )
            yield Line("memory", f"{name}, {kind}: peak above libraries / weights", above, above, above, detail=detail)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
