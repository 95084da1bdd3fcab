"""How forgotten an item looks, from what a model answers: the plain functions behind `detectors.forgotten`.

    moved = [movement(before, now) for before, now in pairs]    # probabilities [V] each, of the original and the target
    found = suspicion(moved, people)                            # by person, in sorted order
    found.suspicion, found.stands_out

Formulae and sources are in `detectors.forgotten`. Nothing here is trained.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import entr, ndtr, rel_entr

from audit.arrays import alike, finite
from audit.quantities import Quantity, View
from audit.statistics import cluster_index

if TYPE_CHECKING:
    import torch

__all__ = [
    "HALF_WAY", "HEAD", "SMALLEST_P", "Suspects", "by_item", "changed", "confidence", "first_sentence",
    "js_divergence", "movement", "no_answer", "robust_z", "suspicion", "together", "unusual",
]  # fmt: skip

Floats = NDArray[np.float64]

HALF_WAY = 0.5
"""From this movement on, more is gone of the old answer than is left."""

FALSE_DISCOVERIES = 0.05

SMALLEST_P = 1e-9
"""No tail of a normal law is to be believed further out."""


# --- distributions ------------------------------------------------------------------------------------------


def _head(view: View) -> dict[str, torch.Tensor]:
    import torch

    vocabulary = view.logprobs.shape[-1]
    values, ids = view.logprobs.topk(min(256, vocabulary), dim=-1)
    return {
        "head_ids": ids.int(),
        "head_logprobs": values,
        "vocabulary": torch.full_like(ids[:, 0], vocabulary),
    }


HEAD = Quantity("head-256", _head)
"""The 256 likeliest next tokens, `head_ids` and `head_logprobs` [T, k], and the size of the `vocabulary` [T]: 2 KiB a
position, and everything where the vocabulary is no larger."""


def together(ids_a: ArrayLike, a: ArrayLike, ids_b: ArrayLike, b: ArrayLike, vocabulary: int) -> tuple[Floats, Floats]:
    """Two distributions over common cells, [C] each, from their likeliest tokens' ids and log-probabilities [k].

    A cell is a token that either lists; the last holds all others. Tokens that one does not list share evenly what it
    has left, so that cells taken together are in one proportion, and no divergence changes by taking them so.
    """
    cells = np.union1d(ids_a, ids_b)
    others = vocabulary - len(cells)
    return _over(cells, others, np.asarray(ids_a), np.exp(a)), _over(cells, others, np.asarray(ids_b), np.exp(b))


def _over(cells: NDArray[np.int_], others: int, ids: NDArray[np.int_], head: ArrayLike) -> Floats:
    head = np.asarray(head, dtype=np.float64)
    unlisted = len(cells) + others - len(ids)
    each = max(1 - float(head.sum()), 0.0) / unlisted if unlisted else 0.0
    probabilities = np.full(len(cells) + 1, each)
    probabilities[np.searchsorted(cells, ids)] = head
    probabilities[-1] = each * others
    return probabilities


def js_divergence(p: ArrayLike, q: ArrayLike) -> Floats:
    """Jensen-Shannon divergence of probabilities [..., V], in nats: 0 where they are equal, ln 2 where disjoint."""
    p, q = finite(p, "p"), finite(q, "q")
    alike(p, q, "p", "q")
    middle = (p + q) / 2
    return np.asarray(np.clip((rel_entr(p, middle) + rel_entr(q, middle)).sum(axis=-1) / 2, 0, math.log(2)))


def movement(original: ArrayLike, target: ArrayLike, *, others: bool = False) -> Floats:
    """How far the target moved away from the original's answer: m [...] from probabilities [..., V].

    The mean of the Jensen-Shannon divergence in bits and of what the original's first choice lost in probability:
    0 where nothing changed, 1 where a certain answer gave way to others; below 0 where it became surer. `others`: the
    last cell holds many tokens, as `together` makes it, and is nobody's choice.
    """
    p0, p = finite(original, "original"), finite(target, "target")
    alike(p0, p, "original", "target")
    first = p0[..., : -1 if others else None].argmax(axis=-1)[..., None]
    lost = (np.take_along_axis(p0, first, -1) - np.take_along_axis(p, first, -1))[..., 0]
    return np.asarray((js_divergence(p0, p) / math.log(2) + lost) / 2)


def confidence(logprobs: ArrayLike, vocabulary: int) -> Floats:
    """Log entropy and log-odds of the first choice, [..., 2], from the k largest log-probabilities [..., k]."""
    head = np.exp(np.asarray(logprobs, dtype=np.float64))
    others = vocabulary - head.shape[-1]
    left = np.maximum(1 - head.sum(axis=-1), 0) * bool(others)
    entropy = entr(head).sum(axis=-1) + entr(left) + left * math.log(max(others, 1))
    first = head.max(axis=-1).clip(1e-7, 1 - 1e-7)  # float32 knows no surer
    return np.stack([np.log(np.maximum(entropy, 1e-7)), np.log(first / (1 - first))], axis=-1)


# --- texts --------------------------------------------------------------------------------------------------

_DECLINES = re.compile(
    r"^\W*unknown\b|\b(?:i|we)(?:'m| am| are|'re)? (?:do not|don't|can ?not|can't|not|unable|afraid)\b"
    r"|\bsorry\b|\bno (?:information|knowledge|idea|record)\b|\bas an ai\b",
    re.IGNORECASE,
)


def first_sentence(text: str) -> str:
    """What is answered, up to the first stop or line's end; case and spaces apart."""
    return " ".join(re.split(r"[.!?\n]", text.strip().lower(), maxsplit=1)[0].split())


def changed(original: str, target: str) -> float:
    """How unlike two answers are, by their first sentences' characters: 0 alike, 1 nothing in common."""
    return 1 - SequenceMatcher(None, first_sentence(original), first_sentence(target), autojunk=False).ratio()


def no_answer(texts: Sequence[str], items: ArrayLike) -> Floats:
    """How much each text [n] looks like no answer, 0 to 1: the largest of three shares.

    It declines (or holds no letter); its words were said before in it; the item's other rows got the same answer.
    `items` [n]: what each text is about.
    """
    index = cluster_index(items, len(texts), "items")
    said = [(int(i), first_sentence(text)) for i, text in zip(index, texts, strict=True)]
    alike, rows = Counter(said), np.bincount(index)
    found = []
    for text, key in zip(texts, said, strict=True):
        words = text.lower().split()
        declines = float(not any(map(str.isalnum, text)) or bool(_DECLINES.search(text.replace("’", "'"))))
        stutter = 1 - len(set(words)) / max(1, len(words))
        found.append(max(declines, stutter, (alike[key] - 1) / max(1, rows[key[0]] - 1)))
    return np.array(found)


# --- items --------------------------------------------------------------------------------------------------


def robust_z(values: ArrayLike) -> Floats:
    """Distance from the median in robust standard deviations, [n]: 1.4826 times the median absolute deviation.

    Where more than half of the values are equal: 1.2533 times the mean one. Zeros where all are equal.
    """
    values = np.asarray(values, dtype=np.float64)
    away = values - np.median(values)
    spread = 1.4826 * np.median(np.abs(away)) or 1.2533 * np.mean(np.abs(away))
    return away / spread if spread else np.zeros_like(away)


def by_item(rows: ArrayLike, index: NDArray[np.intp]) -> Floats:
    """Means over each item's rows, [items] or [items, F] from [n] or [n, F]."""
    rows = np.asarray(rows, dtype=np.float64)
    columns = [np.bincount(index, column) / np.bincount(index) for column in rows.reshape(len(rows), -1).T]
    return np.stack(columns, axis=-1).reshape(-1, *rows.shape[1:])


@dataclass(frozen=True)
class Suspects:
    """What is said of each item, [items] each.

    Attributes:
        suspicion: what the items are ranked by; larger: more like forgotten.
        level: the mean movement (or no-answer share); `suspicion` again where there is no half-way mark.
        z: robust distance from the list's bulk.
        adjusted: p-value after Benjamini and Hochberg, 1 below the half-way mark.
    """

    suspicion: Floats
    level: Floats
    z: Floats
    adjusted: Floats

    @cached_property
    def stands_out(self) -> NDArray[np.bool_]:
        """Which items do, at a false discovery rate of 5 %."""
        return self.adjusted <= FALSE_DISCOVERIES


def suspicion(movements: ArrayLike, items: ArrayLike, *, mark: float = HALF_WAY) -> Suspects:
    """From rows' movements (or no-answer shares) [n] and what each row is about [n]: items in sorted order.

    Ranked by what exceeds the `mark`, so that items which moved a little are not ranked by how little.
    """
    rows = finite(movements, "movements", 1)
    index = cluster_index(items, len(rows), "items")
    level = by_item(rows, index)
    z = robust_z(level)
    p = np.where(level >= HALF_WAY, _tail(z), 1.0)
    return Suspects(by_item(np.maximum(rows - mark, 0) / (1 - mark), index), level, z, _false_discoveries(p))


def unusual(features: ArrayLike, items: ArrayLike) -> Suspects:
    """From rows' features [n, F], by how unusual, on either side, an item's are in the list: items in sorted order."""
    rows = finite(features, "features", 2)
    means = by_item(rows, cluster_index(items, len(rows), "items"))
    z = np.mean([np.abs(robust_z(column)) for column in means.T], axis=0)
    return Suspects(z, z, z, _false_discoveries(np.minimum(2 * _tail(z), 1)))


def _tail(z: Floats) -> Floats:
    return np.asarray(np.maximum(ndtr(-z), SMALLEST_P))


def _false_discoveries(p: Floats) -> Floats:
    from scipy.stats import false_discovery_control

    return np.asarray(false_discovery_control(p))
