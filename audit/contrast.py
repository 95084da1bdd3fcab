"""The comparison that makes a finding valid: the forget set against what a never-taught model does with it.

No statistic says by itself that something is still known: a fluent model gives unseen answers a fair probability
too. Every instrument that looks for remaining knowledge therefore hands one number a row to `against_never_taught`,
which compares with the best control the case has:

- holdout set and retrained model: (target − retrained) on forget rows against the same on holdout rows; what the
  two sets, or the two models, differ in by themselves cancels;
- holdout set alone: forget rows against holdout rows, in the very same target;
- retrained model alone: target against retrained, row by row;
- neither: the level is reported with its interval, and nothing is concluded from it.

The **positive control** is the untouched retain set in the same target (or the original on the forget set): an
instrument that cannot see what is there proves nothing by seeing nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from audit.case import Case
from audit.evidence import Evidence
from audit.instrument import Instrument
from audit.loaders import Example
from audit.record import Control, Figure, Finding, Series, Side, Table
from audit.statistics import (
    Estimate,
    auc_two_sample,
    max_over_columns,
    mean_estimate,
    one_sample,
    two_sample,
)

ALPHA = 0.01
"""Level of every test, after Holm's correction within a question."""

Floats = NDArray[np.float64]
Score = Callable[[str, str], Floats]
"""From (role, set name) to one number a row, shape [rows], or one a row and column, shape [rows, columns]."""

Column = Literal["any", "last"] | None
"""In which columns known facts must be seen; None where there are no columns."""

NO_CONTROL = "none at hand: give a holdout set, or a retrained model, to conclude anything from this level"


@dataclass(frozen=True)
class Statistic:
    """What is compared.

    Attributes:
        name: as in the finding's id.
        words: the statistic in the field's terms.
        unit: of one row's value.
        orientation: what larger means.
        bounds: least and greatest value of a row.
        threshold: the smallest difference that counts as an effect.
        reference: the paper.
        decides: can evidence above, and below, the null decide a verdict alone? Not where an edit of the output does
            the same to a model that knows nothing. How likely a text is decides nothing; right answers that are given
            decide that they are known; right answers passed over for wrong ones, more often than guessing would, that
            they are avoided.
    """

    name: str
    words: str
    unit: str
    orientation: str
    bounds: tuple[float, float] | None
    threshold: float
    reference: str
    decides: tuple[bool, bool] = (True, False)


def against_never_taught(
    instrument: Instrument,
    case: Case,
    evidence: Evidence,
    statistic: Statistic,
    score: Score,
    *,
    columns: tuple[str, Sequence[float | str]] | None = None,
    aggregate: Callable[[Floats], Floats] | None = None,
    auc: bool = False,
    rows: Mapping[str, tuple[Example, ...]] | None = None,
    subtract: bool = True,
    roles: tuple[str, ...] = ("target", "original", "retrained"),
    extra: list[Control] | None = None,
    seen_anywhere: bool = False,
    sides: tuple[Side, Side] = (Side.REMAINS, Side.BEYOND),
) -> Finding:
    """Is the forget set's statistic what a never-taught model's would be?

    Args:
        score: rows of a set under a role; called for every set and role the case has.
        columns: for scores with columns (layers, steps, kinds of attack): axis label, and positions or names. The
            column with the largest excess over the control is quoted, and having chosen it is paid for in its interval
            and p-value.
        aggregate: from scores with columns to the one number a row that is tested instead; columns are then shown.
        auc: compare ranks (area under the ROC curve, null 0.5) rather than means.
        rows: the rows that `score` covers, by set; all that the budget allows if not given.
        subtract: take the retrained model's score off, where there is one and a holdout set too.
        roles: the models that `score` covers, as far as the case has them.
        extra: controls of the instrument's own.
        seen_anywhere: does the positive control hold if known facts are seen in any column? Else only if in the last,
            where columns have an order: the model's own output, or the attack's end.
        sides: what evidence above, and below, the null value means.
    """
    roles = tuple(role for role in roles if role in case.models)
    score = cache(score)
    used = rows or {name: case.rows(name) for name in case.sets}
    clusters = {name: case.clusters(examples) for name, examples in used.items()}
    tested = score if aggregate is None else cache(lambda role, name: aggregate(score(role, name)))
    many = columns if aggregate is None else None
    design = _design(statistic, tested, clusters, roles, subtract=subtract, whole=columns is not None)
    by_rank = auc and design.b is not None
    estimate, layer, bound = _estimate(design, many, by_rank=by_rank, seed=case.options.seed)
    figure: Figure | None
    if columns is not None:
        figure, table = _profile(case, statistic, score, clusters, columns, roles)
    else:
        figure = _distribution(statistic, score, clusters)
        table = _group_table(case, statistic, score, clusters, roles)
    column: Column = None if many is None else "any" if seen_anywhere else "last"
    controls = [_positive(case, statistic, tested, clusters, roles, by_rank=by_rank, column=column)]
    if design.b is None and not design.paired:
        controls = [Control(name="never-taught control", description=NO_CONTROL, passed=False, gates="evidence")]
    return Finding(
        id=f"{instrument.name}/{statistic.name}",
        instrument=instrument.name,
        question=instrument.question,
        statistic=statistic.words,
        split=design.split,
        layer=layer,
        estimate=estimate.value,
        ci95=(estimate.lo, estimate.hi),
        level=float(np.max(np.mean(tested("target", "forget"), axis=0))),
        bound=bound,
        n=estimate.n,
        unit="AUC" if by_rank else statistic.unit,
        orientation=statistic.orientation,
        null=design.null,
        null_value=0.5 if by_rank else 0.0,
        p_value=estimate.p_value,
        smallest_p=estimate.smallest_p,
        threshold=statistic.threshold,
        decides=statistic.decides,
        sides=sides,
        noise=max(evidence.noise.values(), default=0.0),
        controls=controls + (extra or []),
        reference=statistic.reference,
        figure=figure,
        table=table,
    )


@dataclass(frozen=True)
class _Design:
    """What is compared with what: `a` with `b`, or, if `paired`, the differences `a` with zero."""

    a: Floats
    b: Floats | None
    a_clusters: list[str]
    b_clusters: list[str]
    bounds: tuple[float, float] | None
    split: str
    null: str
    paired: bool = False


def _design(
    statistic: Statistic,
    score: Score,
    clusters: dict[str, list[str]],
    roles: tuple[str, ...],
    *,
    subtract: bool,
    whole: bool,
) -> _Design:
    """The best comparison the case allows. `whole`: scores have columns, which are never paired row by row."""
    forget, bounds = score("target", "forget"), statistic.bounds
    difference = (bounds[0] - bounds[1], bounds[1] - bounds[0]) if bounds else None
    c = clusters["forget"]
    if "holdout" in clusters:
        holdout, h = score("target", "holdout"), clusters["holdout"]
        if "retrained" in roles and subtract:
            forget, holdout = forget - score("retrained", "forget"), holdout - score("retrained", "holdout")
            null = "target and retrained model differ on forget rows as they do on holdout rows"
            return _Design(forget, holdout, c, h, difference, "forget vs holdout, target minus retrained", null)
        null = "forget rows score as rows that were never taught (holdout)"
        return _Design(forget, holdout, c, h, bounds, "forget vs holdout", null)
    if "retrained" in roles:
        split, null = "forget, target vs retrained", "the target scores forget rows as the retrained model does"
        if whole:
            return _Design(forget, score("retrained", "forget"), c, c, bounds, split, null)
        return _Design(forget - score("retrained", "forget"), None, c, c, difference, split, null, paired=True)
    return _Design(forget, None, c, c, bounds, "forget", "none: there is nothing never taught to compare with")


def _estimate(
    design: _Design, columns: tuple[str, Sequence[float | str]] | None, *, by_rank: bool, seed: int
) -> tuple[Estimate, str | None, float | None]:
    """The estimate, which column it is of, and the largest value that is not ruled out in any column.

    The column is the one with the largest excess, for what remains anywhere remains. Its interval and p-value pay
    for the choice; the bound need not, since silence must hold in every column (Berger 1982, intersection-union).
    """
    a, b, c, d = design.a, design.b, design.a_clusters, design.b_clusters
    if columns is not None:
        axis, positions = columns
        if b is None:
            every = [mean_estimate(column, c, bounds=design.bounds, seed=seed) for column in a.T]
        else:
            every = max_over_columns(a, b, c, d, bounds=design.bounds, seed=seed).per_column
        best = max(range(len(positions)), key=lambda i: every[i].value)
        pointwise = every if b is None else [
            two_sample(x, y, c, d, bounds=design.bounds, seed=seed) for x, y in zip(a.T, b.T, strict=True)
        ]  # fmt: skip
        place = positions[best]
        where = place if isinstance(place, str) else f"{axis} {place:g}"
        return every[best], where, max(estimate.hi for estimate in pointwise)
    if design.paired:
        return one_sample(a, c, bounds=design.bounds, seed=seed), None, None
    if b is None:
        return mean_estimate(a, c, bounds=design.bounds, seed=seed), None, None
    if by_rank:
        return auc_two_sample(a, b, c, d, seed=seed), None, None
    return two_sample(a, b, c, d, bounds=design.bounds, seed=seed), None, None


def _positive(
    case: Case,
    statistic: Statistic,
    score: Score,
    clusters: dict[str, list[str]],
    roles: tuple[str, ...],
    *,
    by_rank: bool,
    column: Column,
) -> Control:
    """Does the statistic see what is known to be there? Compared with the same never-taught control."""
    name = "positive control"
    never = ("target", "holdout") if "holdout" in case.sets else ("retrained", "forget")
    known = next(
        (
            (role, rows)
            for role, rows in (("target", "retain"), ("original", "forget"))
            if role in roles and rows in clusters
        ),
        None,
    )
    if known is None or never[1] not in clusters or never[0] not in roles:
        return Control(
            name=name,
            description="none at hand: needs a retain set or the original model",
            passed=False,
            gates="silence",
        )
    a, b = score(*known), score(*never)
    if column == "last":
        a, b = a[:, -1], b[:, -1]
    pair = (clusters[known[1]], clusters[never[1]])
    if column == "any":
        every = max_over_columns(a, b, *pair, bounds=statistic.bounds, seed=case.options.seed).per_column
        estimate = max(every, key=lambda each: each.value)
        effect = estimate.value
    elif by_rank:
        estimate = auc_two_sample(a, b, *pair, seed=case.options.seed)
        effect = estimate.value - 0.5
    else:
        estimate = two_sample(a, b, *pair, bounds=statistic.bounds, seed=case.options.seed)
        effect = estimate.value
    passed = estimate.p_value is not None and estimate.p_value <= ALPHA and effect >= statistic.threshold
    return Control(
        name=name,
        description=f"{known[1]} rows in the {known[0]} (known) against {never[1]} rows in the {never[0]} (unseen)",
        estimate=estimate.value,
        ci95=(estimate.lo, estimate.hi),
        n=estimate.n,
        passed=passed,
        gates="silence",
    )


_COMPARED = ("forget", "holdout", "retain")
_STYLE = {"forget": "target", "holdout": "control", "retain": "reference"}


def _cells(case: Case, roles: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(role, rows) for role in roles for rows in _COMPARED if rows in case.sets]


def _group_table(
    case: Case, statistic: Statistic, score: Score, clusters: dict[str, list[str]], roles: tuple[str, ...]
) -> Table:
    """Mean of every set under every model: what the finding's difference is made of."""
    rows: list[list[str | int | float | None]] = []
    for role, name in _cells(case, roles):
        estimate = mean_estimate(score(role, name), clusters[name], bounds=statistic.bounds, seed=case.options.seed)
        rows.append([role, name, estimate.value, estimate.lo, estimate.hi, estimate.n])
    return Table(columns=["model", "set", f"mean ({statistic.unit})", "95 % from", "to", "entities"], rows=rows)


def _distribution(statistic: Statistic, score: Score, clusters: dict[str, list[str]]) -> Figure | None:
    """Histograms of the rows' scores in the target, by set; none where rows are right or wrong only."""
    rows = {name: score("target", name) for name in _COMPARED if name in clusters}
    if any(len(np.unique(values)) <= 12 for values in rows.values()):
        return None
    return Figure(
        kind="distribution",
        title=f"{statistic.words}: rows of each set in the target",
        alt=f"Histograms of {statistic.words} over the rows of each set in the target; quartiles in the table.",
        x_label=statistic.unit,
        y_label="share of rows",
        series=[Series(label=name, x=thinned(values), y=[], role=_STYLE[name]) for name, values in rows.items()],
    )


def thinned(values: Floats) -> list[float]:
    """At most 401 values with the same distribution, to six digits: a record is no place for raw data."""
    if len(values) > 401:
        values = np.quantile(values, np.linspace(0, 1, 401))
    return [float(f"{value:.6g}") for value in values]


def _profile(
    case: Case,
    statistic: Statistic,
    score: Score,
    clusters: dict[str, list[str]],
    columns: tuple[str, Sequence[float | str]],
    roles: tuple[str, ...],
) -> tuple[Figure, Table]:
    axis, places = columns
    names = [place for place in places if isinstance(place, str)]
    positions = [float(i) if isinstance(place, str) else place for i, place in enumerate(places)]
    series: list[Series] = []
    rows: list[list[str | int | float | None]] = []
    for role, name in _cells(case, roles):
        values = score(role, name)
        estimates = [
            mean_estimate(values[:, j], clusters[name], bounds=statistic.bounds, seed=case.options.seed)
            for j in range(values.shape[1])
        ]
        kind = "target" if (role, name) == ("target", "forget") else "reference" if name == "retain" else "control"
        if role == "target" or name == "forget":
            series.append(
                Series(
                    label=f"{name}, {role}",
                    x=positions,
                    y=[e.value for e in estimates],
                    lo=[e.lo for e in estimates],
                    hi=[e.hi for e in estimates],
                    role=kind,
                )
            )
        rows += [[role, name, x, e.value, e.lo, e.hi] for x, e in zip(places, estimates, strict=True)]
    figure = Figure(
        kind="bars" if names else "profile",
        title=f"{statistic.words}, by {axis}",
        alt=f"{statistic.words} of forget rows in the target beside its controls, by {axis}; values in the table.",
        x_label=axis,
        y_label=statistic.unit,
        series=series,
        ticks=names,
    )
    return figure, Table(columns=["model", "set", axis, "mean", "95 % from", "to"], rows=rows)
