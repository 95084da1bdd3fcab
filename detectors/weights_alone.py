"""Weights alone: does one block's matrix stand out against the same matrix of the other blocks?

What is measured, without an original: five numbers of the singular values s_1 >= s_2 >= ... of every matrix W in a
block,

    leading           log s_1 / median s
    gap               log s_1 / s_2
    stable-rank       log |W|_F^2 / s_1^2
    effective-rank    H(s / sum s),  H the entropy
    norm              log |W|_F

Each is compared among the blocks that have the matrix. Over depth they drift: of each block is taken what a line
through its nearest six neighbours, itself left out, does not predict (median of pairwise slopes), over 1.48 times the
median of what is left of all blocks: a robust z. The finding is the largest |z| of a block that has neighbours on both
sides. An edit of one block's matrix, if it is large and of low rank, comes first.

Source: spectra of weights as a trait of a model: Martin & Mahoney 2021 (JMLR 22); the line: Theil 1950, Sen 1968 (JASA
63); z by the median absolute deviation: Hampel 1974 (JASA 69). Put together so by this project, 2026.

Traps:

- *Blocks differ by nature.* In a model that nobody edited some block is the most unusual one, with a z above ten. There
  is no null within one model: permuting blocks tells that they differ, which is no news. Hence no p-value; this says
  where to look, and concludes nothing.
- *Most edits do not show.* A direction added to a matrix that is shorter than s_1 does not become the leading one.
  Unlearning and short fine-tunes move singular values far less than blocks differ; the model before tells (`weights`).
- *Intruder dimensions* (Shuttleworth et al. 2024, arXiv 2410.21228), leading singular vectors that are none of the
  pretrained model's, need the pretrained model: one model alone does not say which are its own.
- *First and last blocks* are like no other, and are predicted from one side only: they are listed, and not ranked.
- *An edit of all blocks alike* leaves none that stands out.
- *Scaled codes* (float8 with a tensor of scales) are taken as they are stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from audit.arrays import finite
from audit.case import Case
from audit.errors import BadInput
from audit.evidence import Evidence
from audit.instrument import Access, Instrument
from audit.plan import Weights as WeightsRequest
from audit.record import Control, Figure, Finding, Question, Series, Side, Table
from audit.statistics import Estimate, FloatArray, resampled
from audit.weights import TensorRow

if TYPE_CHECKING:
    from audit.target import Target

__all__ = ["NUMBERS", "WeightsAlone", "detrended", "outlying", "ranked", "robust_scale", "stacks"]

FEWEST = 6
"""Blocks below which nothing is compared: a line through five others, and a median of what is left."""

NEIGHBOURS = 6
UNUSUAL = 3.5
"""The |z| from which on a value is usually called an outlier (Iglewicz & Hoaglin 1993)."""

NUMBERS = ("leading", "gap", "stable-rank", "effective-rank", "norm")
SOURCE = "Martin & Mahoney 2021 (JMLR 22); Sen 1968 (JASA 63); Hampel 1974 (JASA 69); together: this project, 2026"

_NAME = "weights/alone"
_MOST_ROWS = 30
_ROUNDING = 1e-5  # singular values are computed in float32; below that, blocks do not differ


# --- plain functions ----------------------------------------------------------------------------------------


def detrended(values: ArrayLike, neighbours: int = NEIGHBOURS) -> FloatArray:
    """What of each block's numbers its neighbours do not predict.

    Each block is predicted by the line of Theil and Sen (median of the pairwise slopes, then of the intercepts) through
    its nearest `neighbours`, itself left out. The error is divided by sqrt(1 + 1/k + m^2 / sum (x - m)^2), with k
    neighbours at distances x of mean m, so that the ends, predicted from one side, do not stand out for that alone.

    Args:
        values: [L] or [L, F], L blocks in order, at least 3.

    Returns:
        Of the same shape.
    """
    values = finite(values, "values")
    if values.ndim > 2 or len(values) < 3:
        raise ValueError(f"values must have shape [L] or [L, F], L at least 3, got {values.shape}")
    left = np.empty_like(values)
    for block in range(len(values)):
        distance = np.arange(len(values)) - block
        near = np.argsort(np.abs(distance), kind="stable")[1 : neighbours + 1]
        x, y = distance[near].astype(np.float64), values[near].reshape(len(near), -1)
        one, other = np.triu_indices(len(x), 1)
        slope = np.median((y[one] - y[other]) / (x[one] - x[other])[:, None], axis=0)
        predicted = np.median(y - x[:, None] * slope, axis=0)
        spread = math.sqrt(1 + 1 / len(x) + x.mean() ** 2 / float(((x - x.mean()) ** 2).sum()))
        left[block] = (values[block] - predicted.reshape(values[block].shape)) / spread
    return left


def robust_scale(errors: ArrayLike, weights: ArrayLike | None = None) -> FloatArray:
    """1.4826 times the (upper) median of |errors| [L, ...], each counted as often as `weights` [b, L] says.

    Of normal errors it is their standard deviation. Not below what rounding does.

    Returns:
        [b, ...], or [...] without weights.
    """
    size = np.abs(finite(errors, "errors"))
    counts = np.ones((1, len(size))) if weights is None else np.asarray(weights, dtype=np.float64)
    flat = size.reshape(len(size), -1)
    order = np.argsort(flat, axis=0)
    found = np.empty((len(counts), flat.shape[1]))
    for column, at in enumerate(order.T):
        reached = counts[:, at].cumsum(axis=1) > counts.sum(axis=1, keepdims=True) / 2
        found[:, column] = flat[at, column][reached.argmax(axis=1)]
    scale = np.maximum(1.4826 * found, _ROUNDING).reshape(len(counts), *size.shape[1:])
    return np.asarray(scale[0] if weights is None else scale)


def outlying(values: ArrayLike) -> FloatArray:
    """Robust z of every block's numbers, [L] or [L, F]: `detrended` over `robust_scale`."""
    left = detrended(values)
    return np.asarray(left / robust_scale(left))


def numbers_of(row: TensorRow) -> list[float] | None:
    """The five numbers of a matrix that was compared with nothing, in the order of `NUMBERS`; None if it is none."""
    if not (row.stable_rank and row.effective_rank and row.norm and row.first and row.second and row.middle):
        return None
    values = row.first / row.middle, row.first / row.second, row.stable_rank, row.effective_rank, row.norm
    return [math.log(value) for value in values]


# --- a model ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stack:
    """One kind of matrix over depth.

    Attributes:
        kind: its name with `*` for the number of the block.
        blocks: their numbers, in order [L].
        values: the five numbers of each [L, 5].
        errors: what the neighbours do not predict [L, 5].
        z: in robust standard deviations [L, 5].
    """

    kind: str
    blocks: tuple[int, ...]
    values: FloatArray
    errors: FloatArray
    z: FloatArray


def stacks(rows: Sequence[TensorRow]) -> list[Stack]:
    """Every kind of matrix that at least `FEWEST` blocks have."""
    found: dict[str, list[tuple[int, list[float]]]] = {}
    for row in rows:
        if row.block is not None and (values := numbers_of(row)) is not None:
            found.setdefault(row.kind, []).append((row.block, values))
    made = []
    for kind, members in found.items():
        if len(members) >= FEWEST:
            blocks, numbers = zip(*sorted(members), strict=True)
            errors = detrended(numbers)
            made.append(Stack(kind, blocks, np.array(numbers), errors, errors / robust_scale(errors)))
    return made


@dataclass(frozen=True)
class Place:
    """One number of one block's matrix, and its z; `inner`: has it neighbours on both sides?"""

    stack: Stack
    at: int
    number: int

    @property
    def z(self) -> float:
        """How far it stands out."""
        return float(self.stack.z[self.at, self.number])

    @property
    def block(self) -> int:
        """The number of the block."""
        return self.stack.blocks[self.at]

    @property
    def inner(self) -> bool:
        """Has it neighbours on both sides?"""
        return 0 < self.at < len(self.stack.blocks) - 1


def ranked(found: Sequence[Stack]) -> list[Place]:
    """All numbers of all matrices, those that stand out most first."""
    places = [Place(s, at, number) for s in found for at in range(len(s.blocks)) for number in range(len(NUMBERS))]
    return sorted(places, key=lambda place: -abs(place.z))


# --- the instrument -----------------------------------------------------------------------------------------


class WeightsAlone(Instrument):
    """Does one block's matrix stand out against the same matrix of the other blocks?"""

    name = "weights-alone"
    title = "Does one layer's weights stand out?"
    question = Question.TRACE
    access = Access.WEIGHTS
    sets = ()
    reference = SOURCE

    def requests(self, case: Case, target: Target) -> list[WeightsRequest]:  # noqa: ARG002
        """The target's weights, compared with nothing.

        Raises:
            BadInput: it has too few blocks to compare one with the others.
        """
        if target.role != "target":
            return []
        if target.layers < FEWEST:
            raise BadInput(
                f"needs at least {FEWEST} blocks to compare one with the others; the target has {target.layers}"
            )
        return [WeightsRequest(_NAME, against=None)]

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """The matrix that stands out most."""
        rows = evidence.weights("target", _NAME)
        found = stacks(rows)
        if not found:
            raise BadInput(f"the target has no kind of matrix that {FEWEST} blocks have as plain numbers")
        places = ranked(found)
        inner = [place for place in places if place.inner]
        top = inner[0]
        error = top.stack.errors[:, top.number]
        estimate = resampled(
            lambda weights: abs(error[top.at]) / robust_scale(error, weights),
            len(error),
            bounds=(0.0, math.inf),
            seed=case.options.seed,
        )
        return [self._finding(estimate, rows, found, places, inner)]

    def _finding(
        self,
        estimate: Estimate,
        rows: Sequence[TensorRow],
        found: Sequence[Stack],
        places: Sequence[Place],
        inner: Sequence[Place],
    ) -> Finding:
        top, normal = inner[0], _largest_of_normal(len(inner))
        return Finding(
            id=f"{self.name}/outlier",
            instrument=self.name,
            question=self.question,
            statistic=f"largest robust z of a block's matrix among the same of other blocks: {NUMBERS[top.number]} of "
            f"{top.stack.kind.replace('*', str(top.block), 1)}",
            split="each block against its neighbours, target alone",
            layer=f"block {top.block}",
            estimate=estimate.value,
            ci95=(estimate.lo, estimate.hi),
            n=estimate.n,
            unit="robust z",
            orientation="one block's matrix is less like those of the blocks around it",
            null="no block differs from the line through its neighbours more than normal errors do",
            null_value=normal,
            threshold=1.0,
            decides=(False, False),
            sides=(Side.NEITHER, Side.NEITHER),
            controls=_controls(rows, found, inner),
            reference=self.reference,
            figure=_figure(found, normal),
            table=_table(places),
        )


def _largest_of_normal(n: int) -> float:
    """The median of the largest |z| of n normal draws."""
    from scipy.stats import norm

    return float(norm.isf((1 - 0.5 ** (1 / n)) / 2))


def _controls(rows: Sequence[TensorRow], found: Sequence[Stack], inner: Sequence[Place]) -> list[Control]:
    """What is missing for a test, what was not looked at, and how large an edit must be to show."""
    kinds = {stack.kind for stack in found}
    sizes = [(row.size, row.kind in kinds and numbers_of(row) is not None) for row in rows if row.block is not None]
    seen = sum(size for size, looked in sizes if looked) / sum(size for size, _ in sizes)
    ranks = np.exp(np.concatenate([stack.values[:, NUMBERS.index("stable-rank")] for stack in found]))
    return [
        Control(
            name="untouched models",
            description="blocks of one model differ by nature, and how much cannot be told from this model: the number "
            "says where to look, no more",
            passed=False,
            gates="evidence",
        ),
        Control(
            name="looked at",
            description=f"share of the blocks' weights in matrices of plain numbers that {FEWEST} blocks have",
            estimate=seen,
            n=len(sizes),
            passed=seen >= 0.99,
            gates="silence",
        ),
        Control(
            name="unusual numbers",
            description=f"share of all numbers with |z| above {UNUSUAL}; of normal errors, 0.0005",
            estimate=float(np.mean([abs(place.z) > UNUSUAL for place in inner])),
            n=len(inner),
        ),
        Control(
            name="least visible edit",
            description="length, as a share of the matrix's, below which an added direction does not become the "
            "leading one (median over matrices)",
            estimate=float(np.median(1 / np.sqrt(ranks))),
            n=len(ranks),
        ),
    ]


def _figure(found: Sequence[Stack], normal: float) -> Figure:
    """The largest |z| of every block."""
    largest: dict[int, float] = {}
    for stack in found:
        for block, z in zip(stack.blocks, np.abs(stack.z).max(axis=1).tolist(), strict=True):
            largest[block] = max(largest.get(block, 0.0), z)
    blocks = sorted(largest)
    return Figure(
        kind="profile",
        title="How far each block's matrices stand out",
        alt="The largest robust z of each block's matrices; the table has those that stand out most.",
        x_label="block",
        y_label="largest robust z",
        series=[Series(label="target", x=[float(b) for b in blocks], y=[largest[b] for b in blocks])],
        reference_lines={"largest of as many normal draws": normal},
    )


def _table(places: Sequence[Place]) -> Table:
    """What stands out most, the ends too."""
    return Table(
        columns=["matrix", "block", "number", "value", "z", "note"],
        rows=[
            [
                place.stack.kind,
                place.block,
                NUMBERS[place.number],
                float(place.stack.values[place.at, place.number]),
                place.z,
                "" if place.inner else "an end: not ranked",
            ]
            for place in places[:_MOST_ROWS]
        ],
    )
