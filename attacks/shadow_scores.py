"""What shadow models say of single images: LiRA and RMIA, on plain arrays.

Formulae, sources and traps are in `attacks.shadow`.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from audit.arrays import alike, finite
from audit.statistics import cluster_index

__all__ = ["Flags", "Floats", "average_probability", "lira_scores", "random_halves", "rmia_scores"]

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


def lira_scores(target: ArrayLike, shadows: ArrayLike, inside: ArrayLike, fewest: int = 32) -> Floats:
    """Offline LiRA, log Phi((f - mean) / spread), [n]: at most 0, larger = likelier a member.

    `target` [n] and `shadows` [n, k] hold log-odds of the right class, `inside` [n, k] which model saw which image.
    Mean and spread are those of the models that did not; the spread is the images' common one unless all have `fewest`
    such models. Raises ValueError for shapes that do not fit, an image that every model saw, or no spread to be had.
    """
    f = finite(target, "target", 1)
    others, seen = _shaped(shadows, inside)
    if f.shape != others.shape[:1]:
        raise ValueError(f"target has shape {f.shape}, shadows {others.shape}")
    outside = ~seen
    count = outside.sum(axis=1)
    if not count.all():
        raise ValueError(f"inside: {int((count == 0).sum())} images were seen by every model")
    mean = np.where(outside, others, 0.0).sum(axis=1) / count
    squares = (np.where(outside, others - mean[:, None], 0.0) ** 2).sum(axis=1)
    free = count - 1 if count.min() >= fewest else np.full(len(f), (count - 1).sum())
    squares = squares if count.min() >= fewest else np.full(len(f), squares.sum())
    if not free.all() or not squares.all():
        raise ValueError("shadows: no two models that did not see an image differ on it: there is no spread")
    return np.asarray(special.log_ndtr((f - mean) / np.sqrt(squares / free)))


def average_probability(shadows: ArrayLike, inside: ArrayLike) -> Floats:
    """log q, [n]: half the mean probability over models that saw an image, half that over those that did not.

    `shadows` [n, k] hold log-probabilities, `inside` [n, k] which model saw which image. Where all did, or none, the
    mean over all. Raises ValueError for shapes that do not fit.
    """
    logs, seen = _shaped(shadows, inside)
    p = np.exp(np.maximum(logs, -700.0))  # 0 has no logarithm
    counts = [side.sum(axis=1) for side in (seen, ~seen)]
    means = [(p * side).sum(axis=1) / np.maximum(n, 1) for side, n in zip((seen, ~seen), counts, strict=True)]
    return np.asarray(np.log((means[0] + means[1]) / ((counts[0] > 0) + (counts[1] > 0).astype(int))))


def rmia_scores(
    target: ArrayLike, average: ArrayLike, z_target: ArrayLike, z_average: ArrayLike, gamma: float = 1.0
) -> Floats:
    """RMIA, the share of population images z with (p(x)/q(x)) / (p(z)/q(z)) > gamma, [n]: larger = likelier a member.

    `target` and `average` [n] hold log p and log q of the images, `z_target` and `z_average` [m] of the population's.
    Raises ValueError for shapes that do not fit, or a gamma that is not positive.
    """
    p, q = finite(target, "target", 1), finite(average, "average", 1)
    p_z, q_z = finite(z_target, "z_target", 1), finite(z_average, "z_average", 1)
    alike(p, q, "target", "average")
    alike(p_z, q_z, "z_target", "z_average")
    if gamma <= 0:
        raise ValueError(f"gamma is {gamma}: above 0 is needed")
    x, z = p - q, p_z - q_z
    return np.searchsorted(np.sort(z), x - math.log(gamma), "left") / len(z)


def _shaped(shadows: ArrayLike, inside: ArrayLike) -> tuple[Floats, Flags]:
    values, seen = np.asarray(shadows, np.float64), np.asarray(inside, np.bool_)
    if values.ndim != 2 or values.shape != seen.shape or not values.size:
        raise ValueError(f"shadows has shape {values.shape}, inside {seen.shape}: both must be [images, models]")
    if np.isnan(values).any():
        raise ValueError("shadows holds NaN")
    return values, seen


def random_halves(clusters: ArrayLike, models: int, seed: int) -> Flags:
    """Which of some models is trained on which rows, [n, models]: every cluster, whole, by exactly half of them."""
    index = cluster_index(clusters, np.size(clusters), "clusters")
    order = np.random.default_rng(seed).random((index.max() + 1, models)).argsort(axis=1)
    return np.asarray(order[index] < models // 2)
