"""Weights: what distinguishes the target's weights from the original's?

What is measured: tensor by tensor, from the files, D = W - W0. Four numbers say what shape the change has. None of them
is its size, since any edit has one:

    concentration          1 - H(s) / log S       s: share of |D|^2 in each of S sites (embedding, blocks, output)
    inverse-stable-rank    sigma_1^2 / |D|_F^2    mean over the matrices that changed
    untouched              share of weights that are exactly the original's
    int4-kept              share of weights of matrices whose int4 code is the original's

with H(s) = -sum s log s. Tables add, for every tensor, |D|, |D| / |W0|, stable and effective rank, and the largest
change in widths of an int4 bin.

Source: effective rank: Roy & Vetterli 2007; stable rank: Rudelson & Vershynin 2007; share of weights left untouched as
a trait of how a model was trained: Mukherjee et al. 2025 (arXiv 2505.11711); int4 codes: Zhang et al. 2024 (arXiv
2410.16454). That narrow data give an update of low rank, and that localised methods change few blocks, was seen in our
own models of known history (docs/instruments/weights.md).

Traps:

- *A distance is provenance, never evidence of deletion.* Every edit has a norm, a rank and a place. These numbers
  conclude nothing until they are compared with ordinary fine-tunes of the same original, as large as this change (the
  matched null). Until then they describe.
- *Narrow is not unlearned.* Fine-tuning on one format or one topic gives an update of low rank too; so does LoRA.
- *Rounding.* A model stored in fewer bits than the original differs everywhere. Pruning and quantization leave whole
  tensors untouched, and what was rounded to int4 before keeps every int4 code.
- *A model trained anew* shares no weights with the original: then this describes two random initialisations.
- *The interval* says how much a number hangs on single tensors, not how it would vary over training runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
from audit.record import Control, Figure, Finding, MaybeNumber, Question, Series, Side, Table
from audit.statistics import Estimate, FloatArray, resampled
from audit.weights import AFTER_BLOCKS, TensorRow, effective_rank, int4_codes, int4_codes_kept, stable_rank
from detectors.tracing import NULL, is_edit_of_original

if TYPE_CHECKING:
    from audit.target import Target

__all__ = [
    "Localisation", "Weights", "effective_rank", "int4_codes", "int4_codes_kept", "localisation", "rank_among",
    "stable_rank", "summary",
]  # fmt: skip

_NAME = "weights/original"
_MOST_ROWS = 400
_RANKS = "Rudelson & Vershynin 2007; Roy & Vetterli 2007"


# --- plain functions ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Localisation:
    """Where a change lies. Shapes: shares [..., S]; entropy (nats) and concentration [...]; NaN where nothing changed.

    `concentration`: 0 if every site has an equal share, 1 if one has all.
    """

    shares: FloatArray
    entropy: FloatArray
    concentration: FloatArray


def localisation(squares: ArrayLike) -> Localisation:
    """Share of the squared change in each of S sites, and how concentrated it is: 1 - H / log S.

    Args:
        squares: squared Frobenius norms of the change [..., S], S at least 2.
    """
    squares = finite(squares, "squares")
    if squares.min() < 0:
        raise ValueError("squares holds a negative number")
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = squares / squares.sum(axis=-1, keepdims=True)
        entropy = -np.where(shares > 0, shares * np.log(shares), shares).sum(axis=-1)
        concentration = 1 - entropy / math.log(shares.shape[-1]) if shares.shape[-1] > 1 else np.nan * entropy
    return Localisation(shares, entropy, np.clip(concentration, 0.0, 1.0))


def rank_among(value: float, null: ArrayLike) -> tuple[float, float]:
    """Two-sided p-value of a value among K draws of the null [K], and the smallest that K draws can give.

    Twice the smaller tail, (1 + #{null at least as extreme}) / (K + 1), at most 1 (Phipson & Smyth 2010).
    """
    draws = finite(null, "null", 1)
    tail = 1 + min(int((draws >= value).sum()), int((draws <= value).sum()))
    return min(1.0, 2 * tail / (len(draws) + 1)), min(1.0, 2 / (len(draws) + 1))


# --- the four numbers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Headline:
    """One of the four: how it is named, and how it is put together from tensors.

    Attributes:
        null_value: what an ordinary fine-tune is taken for while none is at hand: it changes every weight a little,
            everywhere, in many directions. Of int4-kept: the int4 model is the original's.
        part: a tensor's numerator and denominator of the share; None if it has no part in it.
        columns, cells: of the table, after the tensor's name.
    """

    name: str
    words: str
    orientation: str
    null_value: float
    threshold: float
    reference: str
    part: Callable[[TensorRow], tuple[float, float] | None]
    columns: tuple[str, ...]
    cells: Callable[[TensorRow], list[str | int | MaybeNumber]]


def _square(row: TensorRow) -> float:
    return 0.0 if row.norm is None else row.norm**2


_HEADLINES = (
    _Headline(
        "concentration", "concentration of the squared change over embedding, blocks and output",
        "the change lies in fewer places", 0.0, 0.1, "1 - entropy of the shares; this project, 2026",
        lambda row: (_square(row), 1.0),
        ("dtype", "|D|", "|D| / |original|", "note"),
        lambda row: [row.dtype, row.norm, row.relative, row.note],
    ),
    _Headline(
        "inverse-stable-rank", "share of a matrix's squared change along one direction (1 / stable rank)",
        "the change is of lower rank", 0.0, 0.1, _RANKS,
        lambda row: (1 / row.stable_rank, 1.0) if row.stable_rank else None,
        ("shape", "stable rank", "effective rank", "|D|"),
        lambda row: ["x".join(map(str, row.shape)), row.stable_rank, row.effective_rank, row.norm],
    ),
    _Headline(
        "untouched", "share of weights that are exactly the original's",
        "more of the model was left alone", 0.0, 0.25, "Mukherjee et al. 2025, arXiv 2505.11711",
        lambda row: None if row.equal is None else (row.equal, row.size),
        ("weights", "equal", "max |D|"),
        lambda row: [row.size, row.equal, row.largest],
    ),
    _Headline(
        "int4-kept", "share of weights whose int4 code is the original's",
        "more of the change is lost by rounding to int4", 1.0, 0.1, "Zhang et al. 2024, arXiv 2410.16454",
        lambda row: None if row.int4_kept is None else (row.int4_kept * row.size, row.size),
        ("codes kept", "max |D| / bin width", "max |D|"),
        lambda row: [row.int4_kept, row.int4_step, row.largest],
    ),
)  # fmt: skip
_CONCENTRATION = _HEADLINES[0]


def _sites(rows: Sequence[TensorRow]) -> dict[float, list[TensorRow]]:
    """Compared tensors by site: the number of the block, -1 for the embedding, one after the last for the output."""
    last = max((row.block for row in rows if row.block is not None), default=-1)
    found: dict[float, list[TensorRow]] = {}
    for row in rows:
        if row.compared:
            found.setdefault(float(last + 1 if row.site == AFTER_BLOCKS else row.site), []).append(row)
    return dict(sorted(found.items()))


def _statistic(headline: _Headline, rows: Sequence[TensorRow]) -> tuple[Callable[[FloatArray], FloatArray], int]:
    """The number as a function of how often each unit counts [b, units], and how many units there are.

    Units are tensors. Of the concentration they are kinds of tensors (`q_proj` of all blocks), so that no resample
    moves the change from one block to another.
    """
    if headline is _CONCENTRATION:
        sites = _sites(rows)
        kinds = {kind: i for i, kind in enumerate(dict.fromkeys(row.kind for row in rows if row.compared))}
        squares = np.zeros((len(kinds), len(sites)))
        for column, members in enumerate(sites.values()):
            for row in members:
                squares[kinds[row.kind], column] += _square(row)
        return lambda counts: localisation(counts @ squares).concentration, len(kinds)
    parts = [part for row in rows if row.compared and (part := headline.part(row)) is not None]
    table = np.array(parts, dtype=np.float64).reshape(-1, 2)
    return lambda counts: np.asarray((counts @ table[:, 0]) / (counts @ table[:, 1])), len(table)


def summary(rows: Sequence[TensorRow]) -> dict[str, float]:
    """The four numbers of a comparison, NaN where there is none: what a matched null is made of."""
    made = {headline.name: _statistic(headline, rows) for headline in _HEADLINES}
    return {name: float(of(np.ones((1, units)))[0]) if units else math.nan for name, (of, units) in made.items()}


# --- the instrument -----------------------------------------------------------------------------------------


class Weights(Instrument):
    """What distinguishes the target's weights from the original's?"""

    name = "weights"
    title = "What was changed in the weights?"
    question = Question.TRACE
    access = Access.WEIGHTS
    sets = ()
    roles = ("original",)
    watches = ("trace",)
    reference = f"{_RANKS}; Zhang et al. 2024, arXiv 2410.16454"

    def missing(self, case: Case) -> str | None:
        """Needs something to compare with."""
        if "original" not in case.models:
            return "needs the original model; what stands out in one model's weights alone, weights-alone looks at"
        return super().missing(case)

    def requests(self, case: Case, target: Target) -> list[WeightsRequest]:  # noqa: ARG002
        """The target's weights, and those of the fine-tunes matched to it, against the original's."""
        return [WeightsRequest(_NAME, against="original")] if is_edit_of_original(target.role) else []

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """The four numbers, and, where fine-tunes matched to the change were compared too, their ranks among them."""
        rows = evidence.weights("target", _NAME)
        if not any(row.compared for row in rows):
            raise BadInput("target and original have no tensor in common, by name and shape, that could be compared")
        matched = [role for role in evidence.roles if role.startswith(NULL) and evidence.has(role, _NAME)]
        nulls = [summary(evidence.weights(role, _NAME)) for role in matched]
        found = []
        for headline in _HEADLINES:
            statistic, units = _statistic(headline, rows)
            estimate = Estimate(math.nan, math.nan, math.nan, None, len(rows), 1.0)
            if units:
                estimate = resampled(statistic, units, bounds=(0.0, 1.0), seed=case.options.seed)
            draws = [null[headline.name] for null in nulls if math.isfinite(null[headline.name])]
            found.append(self._finding(headline, estimate, rows, draws))
        return found

    def _finding(
        self, headline: _Headline, estimate: Estimate, rows: Sequence[TensorRow], null: Sequence[float]
    ) -> Finding:
        ranked = bool(null) and math.isfinite(estimate.value)
        p, smallest = rank_among(estimate.value, null) if ranked else (None, None)
        middle = float(np.median(null)) if ranked else None
        matched = Control(
            name="matched null",
            description="ordinary fine-tunes of the original that change it as much"
            if ranked
            else "without ordinary fine-tunes of the original to compare with, this describes the change, no more",
            estimate=middle,
            n=len(null),
            passed=ranked,
            gates="evidence",
        )
        return Finding(
            id=f"{self.name}/{headline.name}",
            instrument=self.name,
            question=self.question,
            statistic=headline.words,
            split="target against original",
            estimate=estimate.value,
            ci95=(estimate.lo, estimate.hi),
            n=estimate.n,
            unit="share",
            orientation=headline.orientation,
            null="an ordinary fine-tune of the original that changes it as much gives the same",
            null_value=headline.null_value if middle is None else middle,
            p_value=p,
            smallest_p=smallest,
            threshold=headline.threshold,
            decides=(False, False),
            sides=(Side.NEITHER, Side.NEITHER),
            controls=[matched, *_controls(rows)],
            reference=headline.reference,
            figure=_figure(headline, rows),
            table=_table(headline, rows),
        )


def _controls(rows: Sequence[TensorRow]) -> list[Control]:
    """What else could have made the difference, what was not looked at, and what proves nothing."""
    compared = [row for row in rows if row.compared]
    seen = sum(row.size for row in compared) / sum(row.size for row in rows)
    rounded = sum(row.dtype != row.original_dtype for row in compared) / len(compared)
    before = math.sqrt(sum(row.original_norm**2 for row in compared if row.original_norm))
    return [
        Control(
            name="same precision",
            description="share of tensors that are stored in another dtype than the original's, and differ by rounding",
            estimate=rounded,
            n=len(compared),
            passed=rounded == 0,
            gates="evidence",
        ),
        Control(
            name="comparable",
            description="share of all weights that both models have, in one shape and as plain numbers",
            estimate=seen,
            n=len(rows),
            passed=seen >= 0.99,
            gates="silence",
        ),
        Control(
            name="size of the change",
            description="|D| / |original| over all compared tensors: provenance, never evidence of deletion",
            estimate=math.sqrt(sum(map(_square, compared))) / before if before else None,
            n=len(compared),
        ),
        Control(
            name="untouched tensors",
            description="share of tensors that are exactly the original's",
            estimate=sum(row.norm == 0 for row in compared) / len(compared),
            n=len(compared),
        ),
    ]


def _figure(headline: _Headline, rows: Sequence[TensorRow]) -> Figure:
    """The number of every site by itself; of the concentration, its share of the squared change."""
    sites = _sites(rows)
    parts = [[part for row in members if (part := headline.part(row))] for members in sites.values()]
    values: list[MaybeNumber]
    if headline is _CONCENTRATION:
        words, lines = "share of the squared change", {"equal shares": 1 / len(sites)}
        values = localisation([sum(square for square, _ in site) for site in parts]).shares.tolist()
    else:
        words, lines = headline.words, {}
        values = [sum(a for a, _ in site) / sum(b for _, b in site) if site else None for site in parts]
    return Figure(
        kind="profile",
        title=f"{words}, by block",
        alt=f"{words} at the embedding, in each block and at the output; the table has every tensor.",
        x_label="block (-1: embedding, after the last: output)",
        y_label="share",
        series=[Series(label="target against original", x=list(sites), y=values)],
        reference_lines=lines,
    )


def _table(headline: _Headline, rows: Sequence[TensorRow]) -> Table:
    """A row a tensor, in the order of the blocks; where there are too many, those that changed most."""
    most = {row.name for row in sorted(rows, key=_square, reverse=True)[:_MOST_ROWS]}
    cells: list[list[str | int | MaybeNumber]]
    cells = [[row.name, *headline.cells(row)] for row in rows if row.name in most]
    if len(cells) < len(rows):
        cells.append([f"{len(rows) - len(cells)} more, which changed less", *(None for _ in headline.columns)])
    return Table(columns=["tensor", *headline.columns], rows=cells)
