"""Geometry: how far did the target's states move from the original's, and is their shape the retrained model's?

What is measured: the states after every block at the last prompt token, which decides the answer, as one matrix X
[rows, width] a model, set and block. Two such matrices are compared by linear CKA with the debiased HSIC:

    Kt = K - row and column means (U-centred, zero diagonal),  K = X X',  L = Y Y'
    CKA(X, Y) = sum_ij Kt_ij Lt_ij / sqrt(sum_ij Kt_ij^2 · sum_ij Lt_ij^2)

    `geometry/cka`         CKA(target, original) on retain rows minus on forget rows, mean over the blocks
    `geometry/knn`         how often most of the 5 nearest retain rows (cosine) have the forget row's answer
    `geometry/agreement`   H-LR: harmonic mean of AGL and AGR, each a product of 1 - |gap to the retrained model|

CKA is a ratio of U-statistics, so that every row has a share in it (its Hájek projection, `cka_rows`) whose mean is the
CKA; intervals and tests are those of a mean over entities.

Source: Kornblith et al. 2019 (arXiv 1905.00414), with the unbiased HSIC of Song et al. 2012; mutual k-NN: Huh et al.
2024 (arXiv 2405.07987), section 3; PCA shift: "Unlearning Isn't Deletion" (arXiv 2505.16831); k-NN transfer and the
names AGL, AGR and H-LR: "Are We Truly Forgetting?" (Kim et al. 2025, arXiv 2503.06991), whose formula is not at hand:
the product is reconstructed.

Traps:

- *CKA is provenance, never evidence of knowledge.* States may move with all knowledge kept, and an edit of the output
  moves none. Over 150 models it told trained from never trained with an AUC of .65 only, and relearning overturned it
  (.013): UDS, arXiv 2605.24614.
- *Token 0 says nothing*: in a causal model it has not seen the prompt, and averages over padding are averages over
  padding. Published code reads both.
- *Biased CKA tends to 1 where rows are fewer than dimensions*, whatever the states. Not the debiased one, which may
  even be negative.
- *What the prompts share dominates*: the state says above all what kind of thing is asked. A model that was taught
  nobody still has a CKA of .24 to .69 with the original.
- *Neighbours see what was not pushed away*: k-NN transfer finds an edit of the output or of late blocks, and is silent
  where the states of the forget rows themselves were driven off (NPO, gradient difference).
- *A principal component has no sign*: only |cos| of two of them means something.
- *Agreement has no null*: two retrained models of other seeds disagree too, by an unknown amount.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from audit.case import Case
from audit.contrast import Statistic, against_never_taught
from audit.errors import BadInput
from audit.evidence import Evidence
from audit.instrument import Access, Instrument
from audit.loaders import Example
from audit.plan import Request
from audit.quantities import TOKEN, hidden
from audit.record import Control, Figure, Finding, MaybeNumber, Question, Series, Side, Table
from audit.statistics import FloatArray, cluster_index, mean_estimate, resampled, two_sample
from probes.lens import read_layers
from probes.similarity import (
    MUTUAL,
    Agreement,
    K,
    agreement,
    cka_rows,
    knn_transfer,
    linear_cka,
    mutual_knn,
    pca_shift,
)

if TYPE_CHECKING:
    from audit.target import Target

SETS = ("forget", "holdout", "retain")
_FEWEST_ROWS = 8
_CKA = "Kornblith et al. 2019, arXiv 1905.00414; Song et al. 2012"
_KIM = "Kim et al. 2025, arXiv 2503.06991"

KNN = Statistic(
    "knn", "k-NN transfer: most of the 5 nearest retain rows have the right answer", "accuracy",
    "the forgotten answers are carried by the nearest states more often", (0.0, 1.0), 0.1, _KIM, (True, False),
)  # fmt: skip


# --- the instrument -----------------------------------------------------------------------------------------


class Geometry(Instrument):
    """How far did the states move from the original's, and are they the retrained model's?"""

    name = "geometry"
    title = "How far did its states move?"
    question = Question.REPRESENTATION
    access = Access.WEIGHTS
    sets = ("forget", "retain")
    reference = f"{_CKA}; {_KIM}"

    def missing(self, case: Case) -> str | None:
        """Needs a model to compare with, and rows enough for a shape."""
        if reason := super().missing(case):
            return reason
        if not references(case):
            return "needs the original or the retrained model to compare states with"
        few = [name for name in _sets(case) if len(case.rows(name)) < _FEWEST_ROWS]
        return f"needs at least {_FEWEST_ROWS} rows in the {few[0]} set" if few else None

    def withheld(self, case: Case) -> dict[str, str]:
        """k-NN transfer needs answers that the sets share."""
        reason = _nothing_to_transfer(case)
        return super().withheld(case) | ({f"{self.name}/knn": reason} if reason else {})

    def requests(self, case: Case, target: Target) -> list[Request]:
        """The states at the last prompt token of every row, and whether the answer's first token is the likeliest."""
        if "+" in target.role:
            return []
        layers = read_layers(target.layers)
        states = hidden(*(f"blocks.{i}.hook_resid_post" for i in layers))
        wanted = (states, TOKEN) if "retrained" in case.models else (states,)
        texts = {
            name: tuple(target.decision(row.prompt, row.answer) for row in _rows(case, name)) for name in _sets(case)
        }
        return [Request(f"geometry/{name}", texts[name], wanted, {"layers": layers}) for name in texts]

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """What moved; what the neighbours still carry; what agrees with the retrained model."""
        return findings(self, _PromptView(case, evidence), KNN)


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


class _PromptView(View):
    """States at the last prompt token."""

    place = "the last prompt token"
    answered = "first token right"

    def __init__(self, case: Case, evidence: Evidence) -> None:
        super().__init__(case, evidence)
        self.layers = evidence.extra("target", "geometry/forget")["layers"]
        carried = _nothing_to_transfer(case) is None
        self.transferred = {name: _shared(case, name) for name in _sets(case)} if carried else None

    def rows(self, name: str) -> tuple[Example, ...]:
        return _rows(self.case, name)

    def _states(self, role: str, name: str) -> Sequence[NDArray[np.floating[Any]]]:
        states = np.stack([arrays["hidden"][0] for arrays in self.evidence.iterate(role, f"geometry/{name}")])
        return [states[:, i] for i in np.linspace(0, states.shape[1] - 1, len(self.layers)).round().astype(int)]

    def right(self, role: str, name: str) -> FloatArray:
        return np.array([a["match"][0] for a in self.evidence.iterate(role, f"geometry/{name}", "token")], float)

    def _transfer(self, role: str, name: str) -> FloatArray:
        """By retain rows. States are centred on them: all states of a block have a large part in common."""
        keep = _shared(self.case, name)
        labels, right = _answers(self.case, "retain"), _answers(self.case, name)[keep]
        own = np.array(self.clusters(name))[keep][:, None] == np.array(self.clusters("retain"))
        columns = []
        for train, test in zip(self.states(role, "retain"), self.states(role, name), strict=True):
            middle = train.mean(axis=0)
            columns.append(knn_transfer(train - middle, labels, test[keep] - middle, right, excluded=own))
        return np.stack(columns, axis=1)


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


def _sets(case: Case) -> list[str]:
    return [name for name in SETS if name in case.sets]


def _rows(case: Case, name: str) -> tuple[Example, ...]:
    """Fewer than are scored: states are kept whole, and Gram matrices grow with the square."""
    return case.rows(name, {"quick": None, "standard": 240, "thorough": 500}[case.options.budget.value])


def _answers(case: Case, name: str) -> NDArray[np.str_]:
    return np.array([" ".join(row.answer.casefold().split()) for row in _rows(case, name)])


def _shared(case: Case, name: str) -> list[int]:
    """Rows whose answer another entity's retain row has too: by neighbours the others could not be right."""
    owners: dict[str, set[str]] = {}
    for answer, entity in zip(_answers(case, "retain"), case.clusters(_rows(case, "retain")), strict=True):
        owners.setdefault(str(answer), set()).add(entity)
    rows = zip(_answers(case, name), case.clusters(_rows(case, name)), strict=True)
    return [i for i, (answer, entity) in enumerate(rows) if owners.get(str(answer), set()) - {entity}]


def _nothing_to_transfer(case: Case) -> str | None:
    """Why k-NN transfer is left out, if it is."""
    for name in _sets(case):
        if 2 * len(_shared(case, name)) < len(_rows(case, name)):
            return f"fewer than half of the {name} rows have an answer that rows of other retain entities have too"
    sizes = np.bincount(cluster_index(case.clusters(_rows(case, "retain")), len(_rows(case, "retain")), "retain"))
    return f"needs {K} retain rows of other entities" if sizes.sum() - sizes.max() < K else None


# --- what moved ---------------------------------------------------------------------------------------------


def _bounds(*values: FloatArray) -> tuple[float, float] | None:
    """Of identical states only, for shares may lie outside: without bounds, what never varies has no interval."""
    return (0.0, 1.0) if all((v == 1).all() for v in values) else None


def _moved(instrument: Instrument, view: View) -> Finding:
    case, first = view.case, view.roles[1]
    shares = {(role, name): view.cka(role, name) for role in view.roles[1:] for name in _sets(case)}
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
        reference=_CKA,
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
    for name in _sets(view.case):
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
        reference=_KIM,
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
