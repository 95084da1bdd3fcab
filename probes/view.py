"""States of two models compared: what the geometry of prompts and that of images have in common.

A `View` knows where states are read; `findings` says what moved, what the neighbours carry, and what agrees with the
retrained model. Formulae, sources and traps are in `probes.geometry`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from audit.case import Case
from audit.contrast import Statistic, against_never_taught
from audit.errors import BadInput
from audit.evidence import Evidence
from audit.instrument import Instrument
from audit.loaders import Example
from audit.record import Control, Figure, Finding, MaybeNumber, Series, Side, Table
from audit.statistics import FloatArray, cluster_index, mean_estimate, resampled, two_sample
from probes.similarity import MUTUAL, Agreement, agreement, cka_rows, linear_cka, mutual_knn, pca_shift

__all__ = ["CKA", "KIM", "SETS", "View", "compared_sets", "findings", "references"]

SETS = ("forget", "holdout", "retain")
CKA = "Kornblith et al. 2019, arXiv 1905.00414; Song et al. 2012"
KIM = "Kim et al. 2025, arXiv 2503.06991"


class View(ABC):
    """The states of every role and set, and what is read from them.

    Attributes:
        place: where in the input states are read, in words.
        answered: what `right` says, in words.
        axis: of the blocks.
        end: the last of them, in words.
        layers: numbers of the blocks.
        transferred: by set, the rows whose answer neighbours can carry, as indices; None where they carry nothing.
    """

    place: ClassVar[str]
    answered: ClassVar[str]
    axis: ClassVar[str] = "after block"
    end: ClassVar[str] = "after the last block"
    layers: list[int]
    transferred: Mapping[str, Sequence[int]] | None

    def __init__(self, case: Case, evidence: Evidence) -> None:
        self.case, self.evidence = case, evidence
        self.roles = ["target", *references(case)]
        self.states = cache(self._states)
        self.transfer = cache(self._transfer)

    @abstractmethod
    def rows(self, name: str) -> tuple[Example, ...]:
        """The rows of a set that are read."""

    @abstractmethod
    def right(self, role: str, name: str) -> FloatArray:
        """Is the answer the model's own? [rows]."""

    @abstractmethod
    def _states(self, role: str, name: str) -> Sequence[NDArray[np.floating[Any]]]:
        """By block [rows, width]; a model of another depth than the target's is read at the same shares of its own."""

    @abstractmethod
    def _transfer(self, role: str, name: str) -> FloatArray:
        """Right or wrong by the nearest rows, [transferred rows, blocks]."""

    def clusters(self, name: str) -> list[str]:
        """Units of independence of a set's rows."""
        return self.case.clusters(self.rows(name))

    def cka(self, role: str, name: str) -> FloatArray:
        """Every row's share in the CKA of the target with another model, [rows, blocks]."""
        pairs = zip(self.states("target", name), self.states(role, name), strict=True)
        shares = np.stack([cka_rows(here, there) for here, there in pairs], axis=1)
        if not np.isfinite(shares).all():
            raise BadInput(f"the states at {self.place} do not vary over the {name} rows: nothing to compare")
        return shares.round(9)  # identical states share exactly 1


def findings(instrument: Instrument, view: View, knn: Statistic) -> list[Finding]:
    """What moved; what the neighbours still carry, as `knn` says; what agrees with the retrained model."""
    found = [_moved(instrument, view)]
    if view.transferred is not None:
        rows = {name: tuple(view.rows(name)[i] for i in kept) for name, kept in view.transferred.items()}
        axis = (view.axis, [float(i) for i in view.layers])
        found.append(
            against_never_taught(instrument, view.case, view.evidence, knn, view.transfer, columns=axis, rows=rows)
        )
    if "retrained" in view.case.models:
        found.append(_agreement(instrument, view))
    return found


def references(case: Case) -> list[str]:
    """The models that the target can be compared with."""
    return [role for role in ("original", "retrained") if role in case.models]


def compared_sets(case: Case) -> list[str]:
    """The sets of a case that are looked at."""
    return [name for name in SETS if name in case.sets]


# --- what moved ---------------------------------------------------------------------------------------------


def _bounds(*values: FloatArray) -> tuple[float, float] | None:
    """Of identical states only, for shares may lie outside: without bounds, what never varies has no interval."""
    return (0.0, 1.0) if all((v == 1).all() for v in values) else None


def _moved(instrument: Instrument, view: View) -> Finding:
    case, first = view.case, view.roles[1]
    shares = {(role, name): view.cka(role, name) for role in view.roles[1:] for name in compared_sets(case)}
    retain, forget = (shares[first, name].mean(axis=1) for name in ("retain", "forget"))
    whose = (view.clusters("retain"), view.clusters("forget"))
    estimate = two_sample(retain, forget, *whose, bounds=_bounds(retain, forget), seed=case.options.seed)
    figure, table = _layers(view, shares)
    return Finding(
        id=f"{instrument.name}/cka",
        instrument=instrument.name,
        question=instrument.question,
        statistic=f"linear CKA of target and {first}, debiased, mean over the blocks: retain rows minus forget rows",
        split=f"retain vs forget, target against {first}",
        estimate=estimate.value,
        ci95=(estimate.lo, estimate.hi),
        level=float(forget.mean()),
        n=estimate.n,
        unit="CKA",
        orientation=f"the forget rows' states moved further from the {first} model's than the retain rows' did",
        null="the states of forget entities moved as those of retain entities did",
        p_value=estimate.p_value,
        smallest_p=estimate.smallest_p,
        threshold=0.1,
        decides=(False, False),
        sides=(Side.NEITHER, Side.NEITHER),
        noise=max(view.evidence.noise.values(), default=0.0),
        controls=[_unpaired(view, first, float(shares[first, "retain"].mean(axis=0)[-1]))],
        reference=CKA,
        figure=figure,
        table=table,
    )


def _unpaired(view: View, role: str, paired: float) -> Control:
    """What CKA is where rows do not correspond: is there a likeness to lose?"""
    here, there = view.states("target", "retain")[-1], view.states(role, "retain")[-1]
    order = np.random.default_rng(view.case.options.seed).permutation(len(here))
    value = linear_cka(here, there[order])
    return Control(
        name="unpaired rows",
        description=f"CKA {view.end} where the {role} model's retain rows are shuffled; paired: {paired:.2f}",
        estimate=value,
        n=len(here),
        passed=paired - value >= 0.1,
        gates="silence",
    )


def _layers(view: View, shares: dict[tuple[str, str], FloatArray]) -> tuple[Figure, Table]:
    """By block and set: CKA with either model, and for the table mutual k-NN and the shift in principal components."""
    seed = view.case.options.seed
    series: list[Series] = []
    rows: list[list[str | int | MaybeNumber]] = []
    for (role, name), values in shares.items():
        pairs = zip(view.states("target", name), view.states(role, name), strict=True)
        whose = view.clusters(name)
        estimates = [mean_estimate(column, whose, bounds=_bounds(column), seed=seed) for column in values.T]
        for layer, (here, there), e in zip(view.layers, pairs, estimates, strict=True):
            kept = mutual_knn(here, there, min(MUTUAL, len(here) - 1)).mean()
            rows.append([role, name, layer, e.value, e.lo, e.hi, float(kept), *_shift(there, here)])
        if name != "holdout":
            kind = "reference" if name == "retain" else "target" if role == view.roles[1] else "control"
            y, lo, hi = ([getattr(e, part) for e in estimates] for part in ("value", "lo", "hi"))
            x = [float(layer) for layer in view.layers]
            series.append(Series(label=f"{name}, target and {role}", x=x, y=y, lo=lo, hi=hi, role=kind))
    figure = Figure(
        kind="profile",
        title="likeness of the target's states to the other models', by block",
        alt=f"Linear CKA at {view.place} after each block, on forget and on retain rows; values in the table.",
        x_label=view.axis,
        y_label="linear CKA, debiased",
        series=series,
    )
    columns = ["model", "set", view.axis, "CKA", "95 % from", "to", "mutual k-NN"]
    return figure, Table(columns=[*columns, "|cos| of PC1", "shift on PC1 (SD)", "on PC2 (SD)"], rows=rows)


def _shift(reference: NDArray[np.floating[Any]], moved: NDArray[np.floating[Any]]) -> list[MaybeNumber]:
    if reference.shape[1] != moved.shape[1]:
        return [None, None, None]
    shift = pca_shift(reference, moved)
    return [shift.cosine, *map(float, shift.shift)]


# --- agreement with the retrained model ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Metric:
    """One metric's gaps to the retrained model, row by row.

    Attributes:
        logit: on the side of the logits, rather than of the representation.
        gaps: [rows]; their mean is the gap.
        owner: [rows], number of the row's entity among those of all sets.
    """

    name: str
    logit: bool
    gaps: FloatArray
    owner: NDArray[np.intp]


def _metrics(view: View, role: str) -> Iterable[_Metric]:
    """Answers right, states alike after the last block, answers of the neighbours: on every set."""
    start = 0
    for name in compared_sets(view.case):
        owner = start + cluster_index(view.clusters(name), len(view.clusters(name)), name)
        start = int(owner.max()) + 1
        right = view.right(role, name) - view.right("retrained", name)
        yield _Metric(f"{name}: {view.answered}", True, right, owner)
        alike = cka_rows(view.states(role, name)[-1], view.states("retrained", name)[-1])
        yield _Metric(f"{name}: 1 - CKA {view.end}", False, 1 - alike, owner)
        if view.transferred is not None:
            carried = view.transfer(role, name)[:, -1] - view.transfer("retrained", name)[:, -1]
            yield _Metric(f"{name}: k-NN transfer {view.end}", False, carried, owner[view.transferred[name]])


def _scores(metrics: list[_Metric], counts: FloatArray) -> Agreement:
    """The scores where entity c counts `counts[..., c]` times."""
    gaps = [counts[:, m.owner] @ m.gaps / counts[:, m.owner].sum(axis=1) for m in metrics]
    sides = [[gap for gap, m in zip(gaps, metrics, strict=True) if m.logit is logit] for logit in (True, False)]
    return agreement(*(np.stack(side, axis=-1) for side in sides))


def _agreement(instrument: Instrument, view: View) -> Finding:
    compared = [role for role in view.roles if role != "retrained"]
    metrics = {role: list(_metrics(view, role)) for role in compared}
    entities = 1 + max(int(m.owner.max()) for m in metrics["target"])

    def harmonic(counts: FloatArray) -> FloatArray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return _scores(metrics["target"], counts).harmonic

    estimate = resampled(harmonic, entities, bounds=(0.0, 1.0), seed=view.case.options.seed)
    scores = {role: _scores(metrics[role], np.ones((1, entities))) for role in compared}
    table: list[list[str | int | MaybeNumber]] = [
        [metric.name, *(float(metrics[role][i].gaps.mean()) for role in compared)]
        for i, metric in enumerate(metrics["target"])
    ]
    for words, part in (("AGL", "logit"), ("AGR", "representation"), ("H-LR", "harmonic")):
        table.append([words, *(float(getattr(scores[role], part)[0]) for role in compared)])
    return Finding(
        id=f"{instrument.name}/agreement",
        instrument=instrument.name,
        question=instrument.question,
        statistic="agreement with the retrained model (H-LR: harmonic mean of AGL and AGR; reconstructed)",
        split="all sets, target against retrained",
        estimate=estimate.value,
        ci95=(estimate.lo, estimate.hi),
        n=estimate.n,
        unit="H-LR",
        orientation="the target's answers and states are more like the retrained model's",
        null="the target is the retrained model",
        null_value=1.0,
        threshold=0.1,
        decides=(False, False),
        sides=(Side.NEITHER, Side.NEITHER),
        controls=_agreement_controls(scores),
        reference=KIM,
        table=Table(columns=["gap to the retrained model", *compared], rows=table),
    )


def _agreement_controls(scores: dict[str, Agreement]) -> list[Control]:
    before = float(scores["original"].harmonic[0]) if "original" in scores else None
    known = "H-LR of the original, where nothing was unlearned"
    return [
        Control(
            name="second retrained model",
            description="without one, nobody knows how far two models that never saw the data agree: this describes",
            passed=False,
            gates="evidence",
        ),
        Control(
            name="original",
            description=known if before is not None else "none at hand: how low is H-LR where nothing was unlearned?",
            estimate=before,
            passed=before is not None and before <= 0.9,
            gates="silence",
        ),
    ]
