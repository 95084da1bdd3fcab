"""Arrays that functions are given, checked: what is wrong is a ValueError that names the argument."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def finite(values: ArrayLike, name: str, ndim: int | None = None) -> NDArray[np.float64]:
    """`values` as float64, of so many dimensions if said.

    Raises:
        ValueError: another number of dimensions, nothing in it, NaN or infinity.
    """
    array = np.asarray(values, dtype=np.float64)
    if ndim is not None and array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimension(s), got shape {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name} is empty")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has NaN or infinite values")
    return array


def alike(a: NDArray[Any], b: NDArray[Any], name_a: str, name_b: str) -> None:
    """Raises ValueError unless both have one shape."""
    if a.shape != b.shape:
        raise ValueError(f"{name_b} has shape {b.shape}, {name_a} {a.shape}")
