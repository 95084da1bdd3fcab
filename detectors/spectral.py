"""Spectral fingerprint: where inside, and how far, were all states pushed along one line?

What is measured: the states from which answers begin, on prompts that have nothing to do with the forget set, at up to
19 sites: what attention and MLP of up to six blocks add, the residual stream after them, and the final normalisation.
At every site the states of the original and of a changed model are stacked and centred by their common mean; with the
leading right singular vector v of that matrix

    distance = W1(original's projections on v, changed model's) / standard deviation of the original's

where W1 is the Wasserstein distance: the mean gap between the two sorted lists. It is computed for the target, and for
ordinary fine-tunes of the original as large and in the same places (`trace`). The finding is the site where the
logarithm of the target's distance is least like a further draw of theirs, the choice of the site paid for by
Bonferroni.

Source: Chen et al. 2025 (arXiv 2506.14003), section on spectral fingerprints: densities of projections, of the original
and of the unlearned model, on the first right singular vector of centred states. They show pictures; the distance, its
tests and the matched fine-tunes are this project's.

Traps:

- *The original's own main line misses it*: unlearning pushes states out of the space that they fill. On the original's
  first singular vector unlearned models lie where ordinary fine-tunes lie. So both models make the line. That also
  makes the exchange test exact: the line stays where it is if rows change sides.
- *Moved is not unlearned*: almost any edit moves states by more than chance (`exchange_p`). And an edit of another kind
  than a fine-tune, such as instruction tuning, may push them along one line too. The finding takes no side.
- *Silence is not absence*: where unlearning spares other prompts, as most of the organisms' does, nothing is pushed.
- *RMU* shows within the blocks that it edits, less at the output.
- *UMAP* draws clusters where there are none: `umap_picture` is an illustration and feeds nothing.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from audit.arrays import alike, finite
from audit.case import Case
from audit.contrast import thinned
from audit.errors import BadInput
from audit.evidence import Evidence
from audit.instrument import Access, Instrument
from audit.plan import Request
from audit.quantities import hidden
from audit.record import Control, Figure, Finding, MaybeNumber, Question, Series, Side, Table
from audit.statistics import dealt, jackknife_error, principal_axes
from detectors.tracing import GROUPS, NULL, is_edit_of_original, predictive_p, rows_of

if TYPE_CHECKING:
    from audit.target import Target

__all__ = ["Spectral", "exchange_p", "leading_directions", "projections", "shift", "umap_picture"]

Floats = NDArray[np.float64]

SETS = ("retain", "holdout", "utility")
BLOCKS = 6
EXCHANGES = 999
MOVED = 0.01
"""Standard deviations below which a model counts as unmoved: a site where nobody moved as far is not tested."""

STILL = 1e-6
"""What rounding alone may move: fine-tunes that did not do more are no comparison."""


# --- plain functions ----------------------------------------------------------------------------------------


def leading_directions(states: ArrayLike, k: int = 1) -> Floats:
    """The first k right singular vectors [k, d] of states [n, d] less their mean: see `principal_axes`."""
    return principal_axes(states, k)[0]


def projections(states: ArrayLike, directions: ArrayLike, centre: ArrayLike = 0.0) -> Floats:
    """Places [n, k] of states [n, d], less `centre` [d], along directions [k, d]."""
    x, along = finite(states, "states", 2), finite(directions, "directions", 2)
    if along.shape[1] != x.shape[1]:
        raise ValueError(f"directions has width {along.shape[1]}, states {x.shape[1]}")
    return np.asarray((x - finite(centre, "centre")) @ along.T)


def shift(original_projection: ArrayLike, target_projection: ArrayLike) -> float:
    """How far the target's projections [n] lie from the original's [n]: W1, in standard deviations of the original's.

    0 where both have the same values, in whatever order; infinite where the original's do not vary and the target's
    differ. Raises `ValueError` where they are not as many, or none.
    """
    a, b = finite(original_projection, "original_projection", 1), finite(target_projection, "target_projection", 1)
    alike(a, b, "original_projection", "target_projection")
    gap, spread = float(np.abs(np.sort(a) - np.sort(b)).mean()), float(a.std())
    return gap / spread if spread else math.inf if gap else 0.0


def exchange_p(a: ArrayLike, b: ArrayLike, clusters: Sequence[str], *, seed: int) -> float:
    """p-value of W1 between projections a [n] and b [n] of the same rows in two models.

    Null: for every entity the two models' rows could as well be exchanged. All exchanges are made where there are at
    most 1,024, else 999 random ones, the observed one counted in (Phipson & Smyth 2010).
    """
    x, y = finite(a, "a", 1), finite(b, "b", 1)
    alike(x, y, "a", "b")
    names, who = np.unique(np.asarray(clusters), return_inverse=True)
    m = len(names)
    exact = m <= 10
    if exact:
        flips = (np.arange(2**m)[:, None] >> np.arange(m)) % 2 == 1
    else:
        flips = np.random.default_rng(seed).random((EXCHANGES, m)) < 0.5
    turned = flips[:, who]
    drawn = np.abs(np.sort(np.where(turned, y, x)) - np.sort(np.where(turned, x, y))).mean(1)
    observed = float(np.abs(np.sort(x) - np.sort(y)).mean())
    reached = int((drawn >= observed * (1 - 1e-9)).sum())
    return reached / len(flips) if exact else (1 + reached) / (1 + EXCHANGES)


def umap_picture(states: ArrayLike, labels: ArrayLike, supervised: bool = False, seed: int = 0) -> Floats:
    """Coordinates [n, 2] of states [n, d] for a picture by UMAP: an illustration, never evidence.

    Args:
        states: of all models, stacked.
        labels: the model of each row, [n].
        supervised: show UMAP the labels. It then pulls them apart, whether or not the states differ.
        seed: of its random choices.

    Raises:
        ImportError: umap-learn is not installed.
        ValueError: other than one label a row, or fewer than 5 rows.
    """
    x, names = np.asarray(states, dtype=np.float64), np.asarray(labels)
    if x.ndim != 2 or names.shape != x.shape[:1] or len(x) < 5:
        raise ValueError(f"states of shape {x.shape} with labels of shape {names.shape}: needs 5 rows, a label each")
    try:
        umap: Any = importlib.import_module("umap")
    except ImportError as error:
        raise ImportError("a UMAP picture needs umap-learn: pip install umap-learn") from error
    # One job, for only then does the seed decide everything; random starts, for spectral ones fail on a few rows.
    reducer = umap.UMAP(n_neighbors=min(15, len(x) - 1), init="random", random_state=seed, n_jobs=1)
    return np.asarray(reducer.fit_transform(x, np.unique(names, return_inverse=True)[1] if supervised else None), float)


# --- the instrument -----------------------------------------------------------------------------------------


class Spectral(Instrument):
    """Where were all states pushed along one line, further than by ordinary fine-tunes?"""

    name = "spectral"
    title = "Where inside were all states pushed aside?"
    question = Question.TRACE
    access = Access.WEIGHTS
    sets = ("retain",)
    roles = ("original",)
    watches = ("trace",)
    reference = "Chen et al. 2025 (Unlearning Isn't Invisible), arXiv 2506.14003; distance and null: this project, 2026"

    def requests(self, case: Case, target: Target) -> list[Request]:
        """The states from which answers begin, at every site, by set."""
        if not (is_edit_of_original(target.role) or target.role == "original"):
            return []
        sites = sites_of(target.layers)
        return [
            Request(
                f"spectral/{name}",
                tuple(target.decision(row.prompt, row.answer) for row in rows_of(case, name)),
                (hidden(*sites),),
                {"sites": sites},
            )
            for name in SETS
            if name in case.sets
        ]

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """The site that tells most, beside the matched fine-tunes."""
        view = _View(case, evidence)
        target = view.lines("target")
        nulls = {role: view.lines(role) for role in evidence.roles if role.startswith(NULL)}
        sites = [
            _site(name, target[i], [lines[i] for lines in nulls.values()], view) for i, name in enumerate(view.names)
        ]
        tested = sum(site.p is not None for site in sites)
        sites.sort(key=lambda site: (1.0 if site.p is None else site.p, -site.distance))
        best = sites[0]
        p = None if best.p is None else min(1.0, tested * best.p)
        return [
            Finding(
                id=f"{self.name}/shift",
                instrument=self.name,
                question=self.question,
                statistic="how far states were pushed along their main line, against matched fine-tunes (log-ratio)",
                split=", ".join(view.sets),
                layer=_where(best.name),
                estimate=best.ratio,
                ci95=best.interval,
                n=len(set(view.clusters)),
                unit="log-ratio",
                orientation="the states at one site were pushed further than ordinary fine-tunes push them",
                null="an ordinary fine-tune of the original, as large and in the same places, pushes states as far",
                p_value=p,
                smallest_p=None if p is None else 0.0,
                threshold=math.log(2),
                decides=(False, False),
                sides=(Side.NEITHER, Side.NEITHER),
                controls=[_control(best, p, tested), _NO_POSITIVE],
                reference=self.reference,
                figure=_figure(view, best, list(nulls)),
                table=_table(sites, tested),
            )
        ]


def sites_of(layers: int) -> tuple[str, ...]:
    """Three sites in each of up to six evenly spaced blocks, first and last among them, and the final normalisation."""
    blocks = sorted({int(i) for i in np.linspace(0, layers - 1, BLOCKS).round()})
    parts = ("attn_out", "mlp_out", "resid_post")
    return (*(f"blocks.{block}.hook_{part}" for block in blocks for part in parts), "ln_final.hook_out")


class _View:
    """The states of the models, one model at a time in memory beside the original."""

    def __init__(self, case: Case, evidence: Evidence) -> None:
        self._evidence = evidence
        self.seed = case.options.seed
        self.sets = [name for name in SETS if name in case.sets]
        # The same label in two sets may mean two entities.
        self.clusters = [f"{name}/{who}" for name in self.sets for who in case.clusters(rows_of(case, name))]
        self.names: tuple[str, ...] = evidence.extra("original", "spectral/retain")["sites"]
        self._original = self.states("original")
        group = dealt(self.clusters, GROUPS, self.seed)
        self.kept = [group != left for left in range(GROUPS)] if len(set(self.clusters)) >= GROUPS else []

    def states(self, role: str) -> NDArray[np.float32]:
        """States [rows, sites, width] of a model on all sets."""
        if self._evidence.extra(role, "spectral/retain")["sites"] != self.names:
            raise BadInput(f"{role} and original have other numbers of blocks: no site to compare at")
        asked = [(role, f"spectral/{name}") for name in self.sets]
        states = np.stack([values["hidden"][0] for one in asked for values in self._evidence.iterate(*one)])
        if role != "original" and states.shape != self._original.shape:
            raise BadInput(f"{role} and original are of other sizes: their states cannot be compared")
        if not np.isfinite(states).all():
            raise BadInput(f"the states of the {role} are not all finite numbers")
        return states

    def lines(self, role: str) -> Floats:
        """Projections [sites, 2, rows] of the original and of a model on the main line of both."""
        here = self.states(role)
        return np.stack([_on_one_line(self._original[:, i], here[:, i]) for i in range(len(self.names))])

    def picture(self, site: str, roles: Sequence[str]) -> Floats:
        """Projections [1 + roles, rows] at a site on the main line of all, in the original's standard deviations."""
        i = self.names.index(site)
        on = _on_one_line(self._original[:, i], *(self.states(role)[:, i] for role in roles))
        return np.asarray((on - on[0].mean()) / (on[0].std() or 1.0))


def _on_one_line(*models: NDArray[np.float32]) -> Floats:
    """Projections [models, rows] of states [rows, width] of several models on the line along which all vary most."""
    both = np.concatenate(models).astype(np.float64)
    return projections(both, leading_directions(both), both.mean(0))[:, 0].reshape(len(models), -1)


@dataclass(frozen=True)
class _Site:
    """What one site says of the target.

    Attributes:
        distance: with `around`, its 95 % interval over entities, the line held.
        nulls: distances of the fine-tunes.
        ratio: log of the distance over the fine-tunes' (geometric) mean, with its 95 % `interval`; NaN without them.
        p: of this site alone; None where nobody moved, or fewer than three fine-tunes did.
        chance: p-value of "nothing moved".
    """

    name: str
    distance: float
    around: tuple[float, float]
    nulls: tuple[float, ...]
    ratio: float
    interval: tuple[float, float]
    p: float | None
    chance: float


def _site(name: str, target: Floats, nulls: Sequence[Floats], view: _View) -> _Site:
    """From projections [2, rows] of the original and the target, and of the original and each fine-tune."""
    from scipy.stats import t as student

    def shifts(lines: Floats) -> Floats:
        """The distance, and without each group of entities, [1 + groups]."""
        return np.array([shift(*lines), *(shift(*lines[:, kept]) for kept in view.kept)])

    own, others = shifts(target), np.array([shifts(lines) for lines in nulls]).reshape(-1, 1 + len(view.kept))
    half = float(student.ppf(0.975, GROUPS - 1)) * jackknife_error(own[1:])
    ratio, interval, p = math.nan, (-math.inf, math.inf), None
    moved = max(own[0], others[:, 0].max(initial=0.0)) >= MOVED
    if len(others) and moved and others.min() > STILL and np.isfinite([own[0], *others[:, 0]]).all():
        mine, theirs = np.log(np.maximum(own, STILL)), np.log(others)
        ratio = float(mine[0] - theirs[:, 0].mean())
        p = predictive_p(float(mine[0]), theirs[:, 0].tolist())
        if len(theirs) > 1:  # over entities, and over fine-tunes, of which a few give the mean
            spread = float(theirs[:, 0].std(ddof=1)) / math.sqrt(len(theirs))
            error = math.hypot(jackknife_error((mine - theirs.mean(0))[1:]), spread)
            reach = float(student.ppf(0.975, min(GROUPS, len(theirs)) - 1)) * error
            interval = (ratio - reach, ratio + reach)
    chance = exchange_p(target[0], target[1], view.clusters, seed=view.seed)
    around = (max(0.0, float(own[0]) - half), float(own[0]) + half)
    return _Site(name, float(own[0]), around, tuple(others[:, 0].tolist()), ratio, interval, p, chance)


# --- what is shown ------------------------------------------------------------------------------------------


def _where(site: str) -> str:
    """A site in words: `after block 3`."""
    parts = site.split(".")
    if parts[0] != "blocks":
        return "after the final normalisation"
    within = {"hook_attn_out": "in what attention adds in", "hook_mlp_out": "in what the MLP adds in"}
    return f"{within.get(parts[2], 'after')} block {parts[1]}"


_NO_POSITIVE = Control(
    name="positive control",
    description="none: no model is at hand of which it is known that unlearning pushed its states",
    passed=False,
    gates="silence",
)


def _control(best: _Site, p: float | None, tested: int) -> Control:
    described = (
        f"{len(best.nulls)} ordinary fine-tunes of the original that change it as much, in the same places; "
        f"the least p-value of {tested} sites is multiplied by their number"
    )
    lacking = (
        "without three ordinary fine-tunes of this very original that move its states, a shift says only that the "
        "model was edited"
    )
    return Control(
        name="matched null",
        description=lacking if p is None else described,
        estimate=None if p is None else 0.0,
        n=len(best.nulls),
        passed=p is not None,
        gates="evidence",
    )


def _sentence(site: _Site, p: float | None) -> str:
    """What a site says, for people; `p` with the number of sites paid for."""
    where = _where(site.name)
    words = (
        f"{where[0].upper()}{where[1:]} the states from which answers begin lie {site.distance:.2f} standard "
        "deviations from the original's along their main line"
    )
    if not site.nulls:
        return f"{words}; there is no ordinary fine-tune to compare with."
    words += f"; ordinary fine-tunes as large move them by {min(site.nulls):.2f} to {max(site.nulls):.2f}."
    return f"{words} That is further than ordinary fine-tunes go." if p is not None and p <= 0.05 else words


def _table(sites: Sequence[_Site], tested: int) -> Table:
    """All sites, the most telling first."""
    rows: list[list[str | int | MaybeNumber]] = []
    for site in sites:
        p = None if site.p is None else min(1.0, tested * site.p)
        span = (min(site.nulls, default=None), max(site.nulls, default=None))
        rows.append([site.name, _sentence(site, p), site.distance, *site.around, *span, p, site.chance])
    columns = ["site", "in words", "distance (SD)", "95 % from", "to", "matched fine-tunes from", "to"]
    return Table(columns=[*columns, f"p, for {tested} sites", "p that nothing moved"], rows=rows)


def _figure(view: _View, best: _Site, nulls: Sequence[str]) -> Figure:
    """Projections at the most telling site. Target and fine-tune have the same say in the line they are put on."""
    middle = sorted(zip(best.nulls, nulls, strict=True))[len(nulls) // 2 :][:1]  # one that moved as most do
    original, target, *other = view.picture(best.name, ["target", *(role for _, role in middle)])
    return Figure(
        kind="distribution",
        title=f"States from which answers begin, {_where(best.name)}",
        alt=f"Where prompts lie along the main line of the models' states {_where(best.name)}: the target's mean lies "
        f"at {target.mean():.2f}, counted from the original's in its standard deviations.",
        x_label="along the main line, in the original's standard deviations",
        y_label="share of prompts",
        series=[
            Series(label="original", x=thinned(original), y=[], role="reference"),
            Series(label="target", x=thinned(target), y=[], role="target"),
            *(Series(label="a matched fine-tune", x=thinned(one), y=[], role="control") for one in other),
        ],
    )
