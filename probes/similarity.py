"""How alike two sets of states are: measures on arrays, as `geometry` uses them.

    linear_cka(x, y)          do two models lay out the same rows alike? 1 if alike up to rotation and scale
    mutual_knn(x, y, k)       do rows have the same neighbours in both?
    pca_shift(before, after)  how far the mean moved along the first directions
    knn_transfer(...)         do neighbours carry the answer?
    agreement(...)            AGL, AGR and H-LR: products of 1 - |gap to the retrained model|

States are [rows, width]. Sources and traps are in `probes.geometry`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from audit.arrays import finite
from audit.statistics import FloatArray, principal_axes

__all__ = [
    "MUTUAL",
    "Agreement",
    "K",
    "PcaShift",
    "agreement",
    "cka_rows",
    "knn_transfer",
    "linear_cka",
    "mutual_knn",
    "pca_shift",
]  # fmt: skip

MUTUAL = 10
"""Neighbours in mutual k-NN, as in Huh et al. 2024."""

K = 5
"""Neighbours in k-NN transfer, as in Kim et al. 2025."""


def linear_cka(x: ArrayLike, y: ArrayLike, *, debiased: bool = True) -> float:
    """Linear CKA of states x [n, d1] and y [n, d2] of the same n rows: 1 if alike up to rotation and scale.

    Computed from features where these are fewer than rows, else from Gram matrices; the number is the same. At most 1;
    the biased one at least 0, the debiased one around 0 for unrelated states, whatever n and d. NaN where states do not
    vary. Raises `ValueError` for fewer than 4 rows, or another number of them in y.
    """
    a, b = map(_centred, _paired(x, y, 4))
    with np.errstate(invalid="ignore", divide="ignore"):
        squares = _hsic(a, a, debiased) * _hsic(b, b, debiased)
        return float(_hsic(a, b, debiased) / np.sqrt(squares))


def cka_rows(x: ArrayLike, y: ArrayLike) -> FloatArray:
    """Every row's share in the debiased linear CKA of x [n, d1] and y [n, d2]: [n], with the CKA as their mean.

    First-order (Hájek) projection of the ratio, means held fixed: the scatter of these shares over independent rows, or
    entities, is that of the CKA. A row's share may lie outside [0, 1].
    """
    a, b = map(_u_centred, _paired(x, y, 4))
    cross, own_a, own_b = (np.einsum("ij,ij->i", p, q) for p, q in ((a, b), (a, a), (b, b)))
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = math.sqrt(own_a.sum() * own_b.sum())
        share = own_a / own_a.sum() + own_b / own_b.sum()
        return np.asarray(2 * len(a) * cross / scale + cross.sum() / scale * (1 - len(a) * share))


def mutual_knn(x: ArrayLike, y: ArrayLike, k: int = MUTUAL) -> FloatArray:
    """Share of a row's k nearest rows (cosine) in x [n, d1] that are so in y [n, d2] as well: [n] in [0, 1].

    The mean is Huh et al.'s metric; k / (n - 1) for unrelated states.
    """
    a, b = _paired(x, y, 2)
    itself = np.eye(len(a), dtype=bool)
    near = [_nearest(z, z, k, itself) for z in (a, b)]
    return np.asarray((near[0][:, :, None] == near[1][:, None, :]).any(axis=2).mean(axis=1))


@dataclass(frozen=True)
class PcaShift:
    """How states moved in the frame of the reference's first two principal components.

    Attributes:
        shift: [2], mean difference along each, in standard deviations of the reference's rows along it. The sign is
            that of the component whose largest loading is positive.
        cosine: |cos| between the two first components, 0 to 1.
    """

    shift: FloatArray
    cosine: float


def pca_shift(reference: ArrayLike, moved: ArrayLike) -> PcaShift:
    """Where the states `moved` [m, d] lie in the principal components of `reference` [n, d].

    Raises `ValueError` for other widths, or fewer than 3 rows or 2 dimensions.
    """
    a, b = _states(reference, "reference", 3), _states(moved, "moved", 3)
    if a.shape[1] != b.shape[1] or a.shape[1] < 2:
        raise ValueError(f"reference has width {a.shape[1]}, moved {b.shape[1]}: must be equal, and at least 2")
    (axes, deviations), (other, _) = principal_axes(a, 2), principal_axes(b, 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        shift = (b.mean(axis=0) - a.mean(axis=0)) @ axes.T / deviations
    return PcaShift(np.asarray(shift), float(min(1.0, abs(axes[0] @ other[0]))))


def knn_transfer(
    x_train: ArrayLike,
    labels: ArrayLike,
    x_test: ArrayLike,
    labels_test: ArrayLike,
    k: int = K,
    *,
    excluded: NDArray[np.bool_] | None = None,
) -> FloatArray:
    """Is a test row's label the one that most of its k nearest training rows (cosine) have? [m] in [0, 1].

    Args:
        x_train, labels: states [n, d] and their labels [n].
        x_test, labels_test: states [m, d] and the right labels [m].
        excluded: [m, n], training rows that a test row must not look at (itself, its own entity).

    Labels with equally many votes share 1. Raises `ValueError` where a row has fewer than k others to look at.
    """
    train, test = _states(x_train, "x_train", 1), _states(x_test, "x_test", 1)
    classes, codes = np.unique(np.asarray(labels), return_inverse=True)
    right = np.asarray(labels_test)
    if len(codes) != len(train) or len(right) != len(test):
        raise ValueError(f"{len(codes)} labels for {len(train)} rows, {len(right)} for {len(test)}")
    near = codes[_nearest(test, train, k, excluded)]
    votes = (near[:, :, None] == np.arange(len(classes))).sum(axis=1)
    ahead = votes == votes.max(axis=1, keepdims=True)
    return np.asarray((ahead & (classes == right[:, None])).sum(axis=1) / ahead.sum(axis=1))


@dataclass(frozen=True)
class Agreement:
    """AGL, AGR and their harmonic mean H-LR, each in [0, 1]: 1 is the retrained model itself."""

    logit: FloatArray
    representation: FloatArray
    harmonic: FloatArray


def agreement(logit_gaps: ArrayLike, representation_gaps: ArrayLike) -> Agreement:
    """Unified scores of gaps to the retrained model [..., metrics], gaps beyond 1 counting as 1.

    AGL and AGR are the products of 1 - |gap| over the metrics of either side. Reconstructed: see the module.
    """
    gaps = finite(logit_gaps, "logit_gaps"), finite(representation_gaps, "representation_gaps")
    a, b = ((1 - np.minimum(np.abs(each), 1)).prod(axis=-1) for each in gaps)
    harmonic = np.divide(2 * a * b, a + b, out=np.zeros(np.shape(a + b)), where=a + b > 0)
    return Agreement(np.asarray(a), np.asarray(b), harmonic)


def _states(x: ArrayLike, name: str, fewest: int) -> FloatArray:
    states = np.asarray(x, dtype=np.float64)
    if states.ndim != 2 or len(states) < fewest:
        raise ValueError(f"{name} must have shape [rows, width] and at least {fewest} rows, got {states.shape}")
    if not np.isfinite(states).all():
        raise ValueError(f"{name} has NaN or infinite values")
    return states


def _paired(x: ArrayLike, y: ArrayLike, fewest: int) -> tuple[FloatArray, FloatArray]:
    a, b = _states(x, "x", fewest), _states(y, "y", fewest)
    if len(a) != len(b):
        raise ValueError(f"y has {len(b)} rows, x has {len(a)}")
    return a, b


def _centred(x: FloatArray) -> FloatArray:
    """Less its mean, and scaled so that squares of squares stay in range; constant states become exactly 0."""
    centred = x - x.mean(axis=0)
    size = float(np.abs(centred).max())
    return np.zeros_like(x) if size <= 1e-12 * np.abs(x).max() else centred / size


def _hsic(a: FloatArray, b: FloatArray, debiased: bool) -> float:
    """HSIC of centred states with linear kernels, times (n - 1)^2 or n (n - 3)."""
    n = len(a)
    small = max(a.shape[1], b.shape[1]) < n
    total = float(((a.T @ b) ** 2).sum() if small else np.einsum("ij,ij->", a @ a.T, b @ b.T))
    if not debiased:
        return total
    own_a, own_b = (np.einsum("ij,ij->i", z, z) for z in (a, b))
    return float(total - n / (n - 2) * (own_a @ own_b) + own_a.sum() * own_b.sum() / ((n - 1) * (n - 2)))


def _u_centred(x: FloatArray) -> FloatArray:
    """The U-centred linear Gram matrix [n, n]: rows sum to 0 without the diagonal, which is 0 (Székely & Rizzo)."""
    states = _centred(x)
    gram = states @ states.T
    np.fill_diagonal(gram, 0)
    means = gram.sum(axis=0) / (len(gram) - 2)
    means -= means.sum() / (2 * (len(gram) - 1))
    gram -= means[:, None] + means
    np.fill_diagonal(gram, 0)
    return gram


def _nearest(test: FloatArray, train: FloatArray, k: int, excluded: NDArray[np.bool_] | None) -> NDArray[np.intp]:
    """Indices [m, k] of the most similar training rows by cosine, the earlier first where they are equal."""
    norms = [np.linalg.norm(z, axis=1, keepdims=True) for z in (test, train)]
    unit = [z / np.where(norm > 0, norm, 1) for z, norm in zip((test, train), norms, strict=True)]
    similarity = unit[0] @ unit[1].T
    if excluded is not None:
        similarity[excluded] = -np.inf
    if k < 1 or (similarity > -np.inf).sum(axis=1).min() < k:
        raise ValueError(f"k = {k}: must be at least 1, and every row needs as many others to look at")
    return np.argsort(-similarity, axis=1, kind="stable")[:, :k]
