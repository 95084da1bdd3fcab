"""Fit a reference profile on a bench's rows, and judge it on rows it was not fitted on.

What is fitted is little: for every statistic, on either side, the largest effect that models that were never taught
showed, and a quarter more. Where more is known than never taught, that is no less than the nominal threshold, which
is the least effect worth the name; where less is, no less than a quarter of it, since an accuracy of one in ten has
not far to fall. The tests and the rules stay.

Every row is judged by thresholds from rows that share neither its seed, nor its base, nor what was done to it. Where
all rows have one base or one seed, that cannot be asked, and the profile's `basis` says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from audit.bench.rows import Row, usable
from audit.bench.tables import verdict_table
from audit.errors import BadInput
from audit.profile import Domain, Profile
from audit.record import ErrorRate, Finding, Label, Power
from audit.statistics import clopper_pearson
from audit.verdict import KNOWLEDGE, conclude, judge

MARGIN = 1.25
FLOOR = 0.25
"""Of the nominal threshold, below the null value."""

Thresholds = dict[str, tuple[float, float]]


def thresholds(never: Iterable[Row]) -> Thresholds:
    """By finding id, the effects above and below the null value from which on there is evidence."""
    seen: dict[str, list[tuple[float, float]]] = {}
    for row in never:
        for f in row.findings:
            if f.question in KNOWLEDGE and f.estimate is not None:
                seen.setdefault(f.id, []).append((f.estimate - f.null_value, f.threshold))
    fitted = {}
    for identity, effects in sorted(seen.items()):
        nominal = effects[0][1]
        above = max(nominal, MARGIN * max(effect for effect, _ in effects))
        below = max(FLOOR * nominal, MARGIN * max(-effect for effect, _ in effects))
        fitted[identity] = (above, below)
    return fitted


def held_out(rows: Sequence[Row]) -> Callable[[Row], Label]:
    """The verdict on a row by thresholds from rows that are unlike it in seed, base and treatment."""
    pool = usable(rows)
    never = [row for row in pool if row.label == "deleted"]
    bases, seeds = {row.family for row in pool}, {row.seed for row in pool}
    fitted: dict[tuple[str, int, str], Thresholds] = {}

    def verdict(row: Row) -> Label:
        key = (row.family, row.seed, _treatment(row))
        if key not in fitted:
            fitted[key] = thresholds(
                other
                for other in never
                if (len(bases) == 1 or other.family != row.family)
                and (len(seeds) == 1 or other.seed != row.seed)
                and _treatment(other) != _treatment(row)
            )
        return label_of(row, fitted[key])

    return verdict


def label_of(row: Row, fitted: Thresholds) -> Label:
    """The verdict on a row's findings under fitted thresholds."""
    findings = [f.model_copy(update={"fitted": fitted.get(f.id)}) for f in row.findings]
    return conclude(judge(findings), row.not_run).label


def scanned_alike(rows: Sequence[Row]) -> list[Row]:
    """The rows that hold all statistics that any row holds: what one profile can be made of.

    A row lacks one where an instrument was added since, or declined. A case that lacks one fits no such profile either.
    """
    every = set().union(*(_statistics(row.findings) for row in usable(rows)))
    return [row for row in rows if row not in usable([row]) or _statistics(row.findings) == every]


def fit(rows: Sequence[Row], *, name: str, budget: str, made_by: str = "", release: str = "") -> Profile:
    """A profile from all rows, with error rates from held-out verdicts.

    Raises:
        BadInput: fewer than 8 never-taught organisms, or rows that were not scanned alike.
    """
    pool = usable(rows)
    never = [row for row in pool if row.label == "deleted"]
    if len(never) < 8:
        raise BadInput(f"{len(never)} organisms that were never taught: a profile needs 8")
    statistics = {tuple(sorted(_statistics(row.findings))) for row in pool}
    if len(statistics) > 1:
        least, most = min(statistics, key=len), max(statistics, key=len)
        odd = sorted(set(most) ^ set(least))[0]
        raise BadInput(f"the organisms were not scanned alike: {odd} was not found in all")
    table = verdict_table(pool, held_out(rows))
    hits = _remaining(table.counts["deleted"])
    hidden = table.counts.get("suppressed", {})
    found, there = _remaining(hidden), sum(hidden.values())
    basis = _basis(pool)
    return Profile(
        name=name,
        made_by=made_by,
        release=release,
        organisms=dict(sorted(Counter(row.label for row in pool).items())),
        domain=Domain(
            access="weights",
            budget=budget,
            sets=("forget", "holdout", "retain", "utility"),
            roles=("original", "target"),
            statistics=next(iter(statistics)),
            parameters=_range(row.parameters for row in pool),
            entities=_range(row.entities for row in pool),
        ),
        thresholds=thresholds(never),
        false_positives=ErrorRate(
            estimate=hits / len(never),
            upper95=clopper_pearson(hits, len(never), 0.90)[1],
            n=len(never),
            basis=f"“knowledge remains” on models that were never taught, {basis}",
        ),
        power=Power(
            estimate=found / there if there else None,
            lower95=clopper_pearson(found, there, 0.90)[0] if there else None,
            n=there,
            basis=f"“knowledge remains” on models that hide it by construction, {basis}",
        ),
        balanced_accuracy=None
        if (accuracy := table.balanced_accuracy) is None
        else (accuracy.estimate, accuracy.lo, accuracy.hi),
    )


def _remaining(counts: Mapping[str, int]) -> int:
    return sum(counts.get(label.value, 0) for label in (Label.SUPPRESSED, Label.NOT_UNLEARNED))


def _treatment(row: Row) -> str:
    return row.method or row.history


def _statistics(findings: Sequence[Finding]) -> set[str]:
    return {f.id for f in findings if f.question in KNOWLEDGE}


def _range(values: Iterable[int]) -> tuple[int, int]:
    """From half the least to twice the most: sizes of one kind."""
    known = list(values)
    return min(known) // 2, max(known) * 2


def _basis(pool: Sequence[Row]) -> str:
    shared = []
    if len({row.family for row in pool}) == 1:
        shared.append("base")
    if len({row.seed for row in pool}) == 1:
        shared.append("seed")
    kinds = ", ".join(sorted({row.family for row in pool}))
    apart = [word for word in ("seed", "base") if word not in shared]
    said = f"each judged by thresholds from models that share neither {' nor '.join(['treatment', *apart])} with it"
    if shared:
        said += f" (all share one {' and one '.join(shared)})"
    return f"{said}; {len(pool)} models, {kinds}"
