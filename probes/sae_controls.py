"""Controls of steering by sparse features: did it do more than noise, how much came back, is the dictionary any good?

Rows are right (1) or wrong (0), or shares between, as the model is and steered; `probes.sae` says what they gate.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from audit.contrast import ALPHA
from audit.record import Control
from audit.statistics import cluster_index, one_sample, resampled
from probes.sae_steering import restoration_rate

__all__ = ["GOOD", "dictionary", "gain", "rate", "unchanged"]

Floats = NDArray[np.float64]

GOOD = 0.7
"""Least explained variance, and loss recovered, of a dictionary that is believed."""


def gain(
    restored: Floats, before: Floats, noise: Floats, clusters: list[str], *, threshold: float, seed: int
) -> Control:
    """Do the experts restore anything at all, and more than a push of the same length in random directions?"""
    rival = max(before, noise, key=np.mean)
    estimate = one_sample(restored - rival, clusters, bounds=(-1.0, 1.0), seed=seed)
    return Control(
        name="gain over none and random directions",
        description="how much more often forget answers win than in the model as it is, or after a push of the same "
        f"length in random directions, whichever is more: at least {threshold:g}",
        estimate=estimate.value,
        ci95=(estimate.lo, estimate.hi),
        n=estimate.n,
        passed=estimate.p_value is not None and estimate.p_value <= ALPHA and estimate.value >= threshold,
        gates="evidence",
    )


def rate(restored: Floats, before: Floats, reference: float, clusters: list[str], seed: int) -> Control:
    """The restoration rate, with its interval."""
    index = cluster_index(clusters, len(clusters), "clusters")
    came, had, size = (np.bincount(index, values) for values in (restored, before, np.ones(len(index))))

    def share(weights: Floats) -> Floats:
        rows = weights @ size
        return restoration_rate(weights @ came / rows, weights @ had / rows, reference)

    estimate = resampled(share, len(size), bounds=(0.0, 1.0), seed=seed)
    return Control(
        name="restoration rate",
        description=f"of what forget rows lack of an accuracy of {reference:.2f}, the share that comes back",
        estimate=estimate.value,
        ci95=(estimate.lo, estimate.hi),
        n=estimate.n,
    )


def unchanged(differs: NDArray[np.bool_]) -> Control:
    """Is α = 0 what it should be, the model as it is? `differs`: rows that are answered otherwise."""
    changed = float(np.mean(differs))
    return Control(
        name="α = 0",
        description="share of rows that are answered otherwise with their own state put in: at most 0.01",
        estimate=changed,
        passed=changed <= 0.01,
        gates="evidence",
    )


def dictionary(explained: float, recovered: float, said: str, n: int) -> list[Control]:
    """Does the autoencoder describe the states, and can the model go on from what it describes?"""
    good = explained >= GOOD and recovered >= GOOD
    return [
        Control(name="autoencoder", description=said, estimate=explained, n=n, passed=good, gates="evidence"),
        Control(name="autoencoder", description=said, estimate=explained, n=n, passed=good, gates="silence"),
    ]
