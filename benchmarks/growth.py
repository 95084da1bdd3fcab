"""How the time and the memory of a scan grow: with the number of texts, their length, and the size of the model.

Each point is a scan in a process of its own, by instruments that score and continue every text (memorization,
membership), of random words under a random Llama. The exponent is the slope of a straight line through the logarithms,
with its 95 % interval: 1 is linear. Below 1, something that does not grow is still in the sum. Time is that of
`scan()`, imports apart; memory is the process's peak above the libraries' own. Attention is quadratic in a text's
length, and a small part of the work up to thousands of tokens.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.materials import child
from benchmarks.timing import Line, Settings

Point = tuple[int, int, int]
"""Texts a set, words a text, width of the model."""
AXES: dict[str, list[Point]] = {
    "number of texts": [(n, 64, 256) for n in (40, 80, 160, 320, 640)],
    "length of texts": [(80, n, 256) for n in (32, 64, 128, 256, 512)],
    "size of the model": [(80, 64, n) for n in (128, 256, 512, 768, 1024)],
}
_SMALL: dict[str, list[Point]] = {
    "number of texts": [(n, 16, 64) for n in (10, 20, 40)],
    "length of texts": [(10, n, 64) for n in (16, 32, 64)],
    "size of the model": [(10, 16, n) for n in (64, 128, 256)],
}
_SETS = ("forget", "retain", "holdout")


def growth(settings: Settings) -> Iterator[Line]:
    """The exponents of time and memory along every axis."""
    libraries = int(child("libraries")["peak"])
    for axis, points in (_SMALL if settings.small else AXES).items():
        sizes: list[float] = []
        seconds: list[float] = []
        peaks: list[float] = []
        for texts, words, width in points:
            folder, sets = _model(settings.work, width), _sets(settings.work, texts, words)
            options = {"folder": folder, "sets": sets, "out": settings.work / "growth-out"}
            runs = [child("grown", **options) for _ in range(settings.repeats)]
            sizes.append({"number of texts": texts, "length of texts": words}.get(axis, runs[0]["parameters"]))
            seconds.append(statistics.median(run["seconds"] for run in runs))
            peaks.append(statistics.median(run["peak"] for run in runs) - libraries)
        times = [f"{t:.1f} s" for t in seconds]
        yield _line(f"time by {axis}", sizes, seconds, times)
        yield _line(f"memory by {axis}", sizes, peaks, [f"{p / 1e6:.0f} MB" for p in peaks])


def _line(measured: str, sizes: Sequence[float], values: Sequence[float], shown: Sequence[str]) -> Line:
    slope, low, high = exponent(sizes, values)
    detail = ", ".join(f"{size:,.0f}: {value}" for size, value in zip(sizes, shown, strict=True))
    return Line("growth", f"{measured}: exponent", slope, low, high, "≤ 1", low <= 1, detail)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float, float]:
    """Slope of log value against log size by least squares, and its 95 % interval."""
    from scipy.stats import linregress, t

    fit = linregress([math.log(x) for x in sizes], [math.log(y) for y in values])
    reach = float(t.ppf(0.975, len(sizes) - 2)) * float(fit.stderr)
    return float(fit.slope), float(fit.slope) - reach, float(fit.slope) + reach


def _model(work: Path, width: int) -> Path:
    """A random Llama of six blocks."""
    folder = work / f"growth-{width}"
    if not (folder / "complete").is_file():
        from audit.organisms.train import new_model, save, word_tokenizer

        tokenizer = word_tokenizer(_words())
        model = new_model(tokenizer, seed=0, hidden=width, intermediate=4 * width, layers=6, heads=width // 32)
        model.config.max_position_embeddings = 1024
        save(model, tokenizer, folder)
        (folder / "complete").touch()
    return folder


def _sets(work: Path, texts: int, words: int) -> dict[str, Path]:
    """So many texts in every set, of so many random words."""
    made = {}
    for number, name in enumerate(_SETS):
        made[name] = work / f"growth-{texts}-{words}-{name}.jsonl"
        rng = random.Random(number)
        rows = [{"text": " ".join(rng.choices(_words(), k=words))} for _ in range(texts)]
        made[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def _words() -> list[str]:
    return [f"word{i}" for i in range(2000)]
