"""Recovery curves in two numbers: the area under them, and the steps to half recovery.

A curve is the accuracy of a group of rows before an attack and at every tested step of it, here [rows, 1 + steps].

    area   = mean of the curve over the attack's steps, straight lines between the tested ones
    steps  = first step at which the group's mean curve reaches half of what a known fact shows

A group that never gets there counts with the last step: the number is then the least it can be, and differences of it
are too small rather than too large. Both are shown beside a finding and decide nothing: the area hangs on what was
known before the attack as well, the steps on one crossing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from audit.record import Figure, MaybeNumber, Series
from audit.statistics import Estimate, mean_estimate, resampled, two_sample

__all__ = ["Group", "Rows", "area", "curve_figure", "steps_to", "summary"]

Floats = NDArray[np.float64]
Group = tuple[Floats, Sequence[str]]
"""The curves of some rows, [rows, 1 + steps], each value 0 to 1, and the rows' clusters."""
Rows = list[list[str | int | MaybeNumber]]


def area(curves: ArrayLike, steps: Sequence[int]) -> Floats:
    """Mean of each curve [..., 1 + steps] over the steps 0 to the last, by trapezoids: [...], in the curve's unit."""
    return np.asarray(np.trapezoid(_curves(curves, steps), [0, *steps], axis=-1) / steps[-1])


def _curves(curves: ArrayLike, steps: Sequence[int]) -> Floats:
    values = np.asarray(curves, dtype=float)
    if not len(steps) or values.shape[-1:] != (1 + len(steps),):
        raise ValueError(f"curves has shape {values.shape}, but {len(steps)} steps need [..., {1 + len(steps)}]")
    return values


def steps_to(curves: ArrayLike, steps: Sequence[int], level: float) -> Floats:
    """First step at which each curve [..., 1 + steps] reaches `level`, straight lines between tested steps: [...].

    0 where it lies there before the attack, the last step where it never does. NaN where a curve holds NaN.
    """
    values, at = _curves(curves, steps), np.array([0, *steps], dtype=float)
    reached = values >= level
    there = reached.argmax(axis=-1)
    before = np.maximum(there - 1, 0)
    high, low = (np.take_along_axis(values, i[..., None], -1)[..., 0] for i in (there, before))
    rise = np.where(high > low, high - low, 1.0)
    crossing = at[before] + np.clip((level - low) / rise, 0, 1) * (at[there] - at[before])
    found = np.where(reached.any(axis=-1), crossing, at[-1])
    return np.asarray(np.where(np.isnan(values).any(axis=-1), np.nan, found))


def summary(curves: Mapping[str, Group], steps: Sequence[int], *, seed: int, label: str = "target") -> Rows:
    """Rows [label, group, measure, value, from, to] of a finding's table.

    Args:
        curves: by group, `forget` and perhaps `holdout` and `retain`: [rows, 1 + steps] in [0, 1], and its clusters.
        steps: tested ones, ascending.

    Half recovery is half of what the retain rows show before the attack (half of 1 without them). Intervals are over
    entities; those of a difference of steps over the entities of both groups together.
    """
    known = curves["retain"][0][:, 0].mean() if "retain" in curves else 1.0
    half = float(known) / 2
    rows: Rows = []

    def add(group: str, measure: str, found: Estimate) -> None:
        rows.append([label, group, measure, found.value, found.lo, found.hi])

    for name, (values, clusters) in curves.items():
        add(name, "area", mean_estimate(area(values, steps), clusters, bounds=(0.0, 1.0), seed=seed))
    groups = {name: curves[name] for name in ("forget", "holdout") if name in curves}
    for name, group in groups.items():
        add(name, "steps to half", _steps([group], steps, half, seed))
    if len(groups) == 2:
        (a, c), (b, d) = groups.values()
        both = two_sample(area(a, steps), area(b, steps), c, d, bounds=(0.0, 1.0), seed=seed)
        add("forget - holdout", "area", both)
        add("forget - holdout", "steps to half", _steps(list(groups.values()), steps, half, seed))
    return rows


def _steps(groups: list[Group], steps: Sequence[int], level: float, seed: int) -> Estimate:
    """Steps to a level of one group's mean curve, or the first group's less the second's, resampled by entities."""
    parts = [_sums(values, clusters) for values, clusters in groups]
    sizes = [len(counts) for _, counts in parts]
    signs = (1.0, -1.0)

    def statistic(weights: Floats) -> Floats:
        out, first = np.zeros(len(weights)), 0
        for (sums, counts), size, sign in zip(parts, sizes, signs, strict=False):
            share = weights[:, first : first + size]
            with np.errstate(invalid="ignore"):  # a resample may hold no entity of one group
                mean = (share @ sums) / (share @ counts)[:, None]
            out += sign * steps_to(mean, steps, level)
            first += size
        return out

    least = -float(steps[-1]) if len(groups) == 2 else 0.0
    return resampled(statistic, sum(sizes), bounds=(least, float(steps[-1])), seed=seed)


def _sums(values: Floats, clusters: Sequence[str]) -> tuple[Floats, Floats]:
    """Per cluster the summed rows [clusters, columns], and how many they are [clusters]."""
    names, place = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.zeros((len(names), values.shape[1]))
    np.add.at(sums, place, values)
    return sums, np.bincount(place).astype(float)


def curve_figure(
    title: str,
    curves: Mapping[str, Group],
    steps: Sequence[int],
    style: Callable[[str], str],
    *,
    seed: int,
) -> Figure:
    """Mean curves over the steps of an attack with their 95 % bands; `style`: from a label to `Series.role`."""
    series = []
    for label, (values, clusters) in curves.items():
        found = [mean_estimate(column, clusters, bounds=(0.0, 1.0), seed=seed) for column in values.T]
        series.append(
            Series(
                label=label,
                x=[0.0, *map(float, steps)],
                y=[e.value for e in found],
                lo=[e.lo for e in found],
                hi=[e.hi for e in found],
                role=style(label),
            )
        )
    return Figure(
        kind="profile",
        title=title,
        alt=f"{title}: accuracy of each group before and during the attack; values in the table.",
        x_label="steps",
        y_label="accuracy",
        series=series,
    )
