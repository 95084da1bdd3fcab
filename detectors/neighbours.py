"""Neighbours of a text: some of its tokens replaced by others whose input embeddings are close (cosine).

Of REMIND (arXiv 2511.04228); sources and traps are in `detectors.remind`.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Floats", "Integers", "nearest_tokens", "perturb"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def nearest_tokens(
    embedding: NDArray[Any],
    token_ids: Sequence[int] | NDArray[np.integer[Any]],
    k: int = 20,
    exclude: Collection[int] = frozenset(),
    chunk: int = 64,
) -> tuple[Integers, Floats]:
    """The k tokens with the closest input embeddings: (ids [n, k], cosine distances [n, k] in [0, 2]).

    `embedding` has shape [V, d]; `token_ids` [n], in any order, repeats allowed. Row i holds the neighbours
    of `token_ids[i]`, nearest first, equal ones by id. A token is never its own neighbour, and no id in
    `exclude` (special and unused tokens) is one. An all-zero embedding lies at distance 1 from everything.
    At most `chunk` x V similarities are held at a time. Raises ValueError for an empty or non-finite
    embedding, an id outside it, or fewer than k candidates.
    """
    if embedding.ndim != 2 or embedding.size == 0:
        raise ValueError(f"embedding must be a non-empty [vocabulary, width] array, got {embedding.shape}")
    if embedding.dtype not in (np.float32, np.float64):
        embedding = embedding.astype(np.float32)
    vocabulary = len(embedding)
    wanted = np.asarray(token_ids, dtype=np.int64)
    barred = np.array(sorted(set(exclude)), dtype=np.int64)
    for name, ids in (("token_ids", wanted), ("exclude", barred)):
        if ids.ndim != 1 or bool(((ids < 0) | (ids >= vocabulary)).any()):
            raise ValueError(f"{name} must be a list of ids below {vocabulary}")
    if not 1 <= k < vocabulary - len(barred):
        # One less than the candidates, for a token that is itself among them.
        raise ValueError(f"k is {k}: the embedding has {vocabulary} tokens, of which {len(barred)} are excluded")
    norms = np.sqrt(np.einsum("ij,ij->i", embedding, embedding, dtype=np.float64))
    if not np.isfinite(norms).all():
        raise ValueError("embedding is not finite")
    norms[norms == 0] = 1.0

    unique, inverse = np.unique(wanted, return_inverse=True)
    ids_out = np.empty((len(unique), k), dtype=np.int64)
    distances_out = np.empty((len(unique), k))
    for start in range(0, len(unique), chunk):
        rows = unique[start : start + chunk]
        similarity = embedding[rows] @ embedding.T
        similarity /= norms
        similarity /= norms[rows][:, None]
        similarity[:, barred] = -np.inf
        similarity[np.arange(len(rows)), rows] = -np.inf
        for i, token in enumerate(rows):
            kth = np.partition(similarity[i], vocabulary - k)[vocabulary - k]
            # Some slack, then exact distances: single precision does not rank near-duplicates.
            near = np.flatnonzero(similarity[i] >= kth - 1e-6)
            if len(near) > k + 1000:  # as where many rows are zero, or one and the same
                near = near[np.lexsort((near, -similarity[i, near]))[: k + 1000]]
            there = embedding[near].astype(np.float64) / norms[near][:, None]
            here = embedding[token].astype(np.float64) / norms[token]
            distance = np.clip(1.0 - there @ here, 0.0, 2.0)
            order = np.lexsort((near, distance))[:k]
            ids_out[start + i], distances_out[start + i] = near[order], distance[order]
    return ids_out[inverse], distances_out[inverse]


def perturb(
    ids: Sequence[int],
    allowed: Sequence[int],
    neighbors: NDArray[np.integer[Any]],
    distances: ArrayLike,
    *,
    n: int = 15,
    fraction: float = 0.3,
    rng: np.random.Generator,
) -> tuple[list[tuple[int, ...]], Floats]:
    """Draw n neighbours of a text: (perturbed id tuples of the same length, distances [n] > or = 0).

    `ids` is the text; `allowed` the positions that may change (not the prompt's template, not special
    tokens); row j of `neighbors` and `distances` [len(allowed), k] belongs to `allowed[j]`, as
    `nearest_tokens(embedding, [ids[p] for p in allowed])` returns them. In each neighbour
    max(1, round(fraction * len(allowed))) positions change, drawn uniformly, each to one of its k tokens,
    drawn uniformly. d_i = sqrt(sum over changed positions of the squared cosine distance), the Euclidean
    length of the step in units of cosine distance.

    None equals the original. All are distinct as long as there are n distinct ones; after that they repeat.
    Raises ValueError if no position may change, shapes do not fit, or nothing can be replaced.
    """
    candidates = np.asarray(neighbors, dtype=np.int64)
    steps = np.asarray(distances, dtype=np.float64)
    if len(allowed) == 0:
        raise ValueError("allowed is empty: no position may change")
    if len(set(allowed)) != len(allowed) or not all(0 <= p < len(ids) for p in allowed):
        raise ValueError(f"allowed must hold distinct positions below {len(ids)}")
    if candidates.ndim != 2 or len(candidates) != len(allowed) or steps.shape != candidates.shape:
        raise ValueError(f"neighbors {candidates.shape} and distances {steps.shape} must both be [{len(allowed)}, k]")
    if n < 1 or not 0.0 < fraction <= 1.0:
        raise ValueError(f"n is {n} and fraction {fraction}: need n >= 1 and a fraction in (0, 1]")
    # Per position, replacement -> distance, without the token that stands there.
    options = [
        {int(t): float(d) for t, d in zip(row[::-1], step[::-1], strict=True) if t != ids[p]}
        for p, row, step in zip(allowed, candidates, steps, strict=True)
    ]
    open_positions = [j for j, option in enumerate(options) if option]
    if not open_positions:
        raise ValueError("neighbors offers no token other than the ones in the text")
    count = min(max(1, round(fraction * len(allowed))), len(open_positions))

    changes = _draw([list(options[j]) for j in open_positions], count, n, rng)
    texts, lengths = [], []
    for change in changes:
        text, total = list(ids), 0.0
        for j, token in change:
            text[allowed[open_positions[j]]] = token
            total += options[open_positions[j]][token] ** 2
        texts.append(tuple(text))
        lengths.append(total**0.5)
    return texts, np.array(lengths)


def _draw(options: list[list[int]], count: int, n: int, rng: np.random.Generator) -> list[tuple[tuple[int, int], ...]]:
    """n sets of `count` changes (position, token), distinct where there are as many."""
    few = 4 * n
    # Number of possible sets: the elementary symmetric polynomial of the numbers of options.
    ways = [1] + [0] * count
    for option in options:
        for c in range(count, 0, -1):
            ways[c] += ways[c - 1] * len(option)
    if ways[count] <= few:
        every = [
            tuple(zip(positions, tokens, strict=True))
            for positions in itertools.combinations(range(len(options)), count)
            for tokens in itertools.product(*(options[j] for j in positions))
        ]
        order = rng.permutation(len(every))
        return [every[order[i % len(every)]] for i in range(n)]
    drawn: dict[tuple[tuple[int, int], ...], None] = {}
    repeats: list[tuple[tuple[int, int], ...]] = []
    for _ in range(1000 * n):  # a bound for very uneven numbers of options only
        positions = sorted(int(j) for j in rng.choice(len(options), size=count, replace=False))
        change = tuple((j, options[j][int(rng.integers(len(options[j])))]) for j in positions)
        if change in drawn:
            repeats.append(change)
        drawn[change] = None
        if len(drawn) == n:
            break
    return [*drawn, *repeats][:n]
