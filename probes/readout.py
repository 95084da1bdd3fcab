"""What trained readouts share: options at a fork, halves by entity, and ridge regression at every strength.

    fitted = fit_ridge(states, targets)                # one decomposition
    choice_wins(fitted(others, 0.1), options)          # does the right option win?

Readouts are trained on retained entities, and never score one that they were trained on: see `in_halves`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from audit.case import Case
from audit.controls import grouped_folds
from audit.errors import BadInput
from audit.evidence import Evidence
from audit.loaders import Example
from audit.quantities import Quantity, hidden
from audit.tokens import Tokens
from probes.lens import fork, forked

if TYPE_CHECKING:
    import torch

    from audit.target import Target

__all__ = [
    "FEWEST_ENTITIES", "STRENGTHS", "Floats", "Half", "Ints", "Ridge", "block_outputs", "choice_wins",
    "choose_strength", "compared", "cross_scores", "decisions", "fit_ridge", "forking_rows", "in_halves", "lacking",
    "offered", "option_columns", "rows_read", "states_of", "unembedding",
]  # fmt: skip

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]

FEWEST_ENTITIES = 8
"""Retained entities below which a half is too small to be trained on and folded to choose a strength."""

_COMPARED = ("forget", "holdout", "retain")
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Among which the strength of a readout of options is chosen."""

_MOST_ROWS = 1000  # a set: the states of a row are layers x width numbers


# --- what is asked ------------------------------------------------------------------------------------------


def lacking(case: Case) -> str | None:
    """Why no readout of options can be trained on the retain set, in one phrase; None if one can."""
    for name in _COMPARED:
        if name in case.sets and not all(row.wrong for row in rows_read(case, name)):
            return f"needs wrong answers in every row of the {name} set"
    if len(set(case.clusters(rows_read(case, "retain")))) < FEWEST_ENTITIES:
        return f"needs at least {FEWEST_ENTITIES} entities in the retain set to train on half of them and test the rest"
    return None


def rows_read(case: Case, name: str) -> tuple[Example, ...]:
    """The rows of a set whose states are read: a thousand at most."""
    return case.rows(name, _MOST_ROWS)


def decisions(case: Case, target: Target, name: str) -> tuple[Tokens, ...]:
    """Every row of a set up to its fork; up to its answer's first token, without rivals, where it has none."""

    def decision(row: Example) -> Tokens:
        return fork(target, row) or target.encode(row.prompt, row.answer).begun(1)

    return tuple(decision(row) for row in rows_read(case, name))


def compared(case: Case, target: Target) -> dict[str, tuple[Tokens, ...]]:
    """The decisions of the forget, holdout and retain set, as far as the case has them."""
    return {name: decisions(case, target, name) for name in _COMPARED if name in case.sets}


def offered(forks: Mapping[str, Sequence[Tokens]]) -> list[int]:
    """Every token that is an option somewhere, ascending."""
    return sorted({t for rows in forks.values() for each in rows for t in (each.ids[each.start], *each.rivals)})


def unembedding(target: Target, tokens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The unembedding's rows for some tokens [k, width], and their biases [k]: float32, on the CPU."""
    import torch

    head, chosen = target.weights_of(target.output_head), list(tokens)
    rows, bias = head["weight"][chosen].float().cpu(), head.get("bias")
    return rows, torch.zeros(len(chosen)) if bias is None else bias[chosen].float().cpu()


def block_outputs(layers: Iterable[int]) -> Quantity:
    """The states after these blocks."""
    return hidden(*(f"blocks.{i}.hook_resid_post" for i in layers))


# --- what is answered ---------------------------------------------------------------------------------------


def forking_rows(
    case: Case, evidence: Evidence, instrument: str
) -> tuple[dict[str, tuple[Example, ...]], dict[str, NDArray[np.bool_]]]:
    """By set, the rows whose options fork in every model, and which of its rows these are.

    Raises:
        BadInput: none of a set do, or too few to train on.
    """
    kept = {name: forked(case, evidence, f"{instrument}/{name}") for name in _COMPARED if name in case.sets}
    rows = {name: tuple(row for row, k in zip(rows_read(case, name), kept[name], strict=True) if k) for name in kept}
    for name in kept:
        entities = len(set(case.clusters(rows[name])))
        if entities < (FEWEST_ENTITIES if name == "retain" else 1):
            raise BadInput(
                f"only {entities} entities of the {name} set have wrong answers that part from the right one"
            )
    return rows, kept


def states_of(evidence: Evidence, role: str, name: str) -> NDArray[np.float32]:
    """Captured states at the last position of each sequence of a request: [rows, layers, width]."""
    return np.array([arrays["hidden"][0] for arrays in evidence.iterate(role, name)], dtype=np.float32)


def option_columns(forks: Sequence[Tokens], tokens: Sequence[int]) -> Ints:
    """Where each row's options stand in `tokens`: [rows, options], the right one first, -1 where a row has fewer."""
    place = {token: i for i, token in enumerate(tokens)}
    options = np.full((len(forks), 1 + max((len(each.rivals) for each in forks), default=0)), -1)
    for row, each in zip(options, forks, strict=True):
        row[: 1 + len(each.rivals)] = [place[token] for token in (each.ids[each.start], *each.rivals)]
    return options


def choice_wins(scores: ArrayLike, options: Ints) -> Floats:
    """Does the right option have the highest score? [n] in [0, 1] from scores [n, k]; ties share 1.

    `options` [n, m]: columns of `scores`, the right one first, -1 where a row has fewer.
    """
    given = np.where(options >= 0, np.take_along_axis(np.asarray(scores), options.clip(0), axis=1), -np.inf)
    right = given[:, :1]
    return np.asarray((right[:, 0] >= given.max(axis=1)) / (given == right).sum(axis=1))


# --- ridge regression ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ridge:
    """Affine maps from states to targets, one for every strength, from one decomposition: see `fit_ridge`."""

    centre: Floats  # [d]
    scale: Floats  # [d]
    basis: Floats  # [d, r]
    spectrum: Floats  # [r]
    loads: Floats  # [r, k]
    offset: Floats  # [k]
    rows: int

    def __call__(self, states: ArrayLike, strength: float) -> Floats:
        """Predicted targets [m, k] of states [m, d]."""
        z = (np.asarray(states, dtype=np.float64) - self.centre) / self.scale
        return np.asarray(self.offset + (z @ self.basis) / (self.spectrum + self.rows * strength) @ self.loads)


def fit_ridge(states: ArrayLike, targets: ArrayLike) -> Ridge:
    """Minimise mean |targets - b - W z|² + strength |W|² over W and b, z being the states [n, d] standardised.

    `targets` [n, k]. The strength, positive, is given when predicting: at 1 a direction of average variance is shrunk
    by half. Equal to scikit-learn's `StandardScaler` and `Ridge(alpha=n * strength)`.

    Raises:
        ValueError: no rows, or not as many targets as states.
    """
    x, y = np.asarray(states, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or not len(x):
        raise ValueError(f"states [n, d] and targets [n, k] needed, got {x.shape} and {y.shape}")
    n, d = x.shape
    centre, scale, offset = x.mean(axis=0), x.std(axis=0), y.mean(axis=0)
    scale = np.where(scale > 1e-12 * np.abs(centre), scale, 1.0)  # a column that does not vary is only centred
    z, y = (x - centre) / scale, y - offset
    if n < d:
        spectrum, vectors = np.linalg.eigh(z @ z.T)
        basis, loads = z.T @ vectors, vectors.T @ y
    else:
        spectrum, basis = np.linalg.eigh(z.T @ z)
        loads = basis.T @ (z.T @ y)
    return Ridge(centre, scale, basis, spectrum.clip(0), loads, offset, n)


@dataclass(frozen=True)
class Half:
    """Rows to train on, rows to score, and (train, test) folds within the former; all by number."""

    train: Ints
    test: Ints
    folds: list[tuple[Ints, Ints]]


def in_halves(clusters: Sequence[str], *, seed: int, also: Sequence[str] = ()) -> list[Half]:
    """Two halves of rows by cluster, each trained on once and scored once; rows `also` are always trained on."""
    every = np.array([*clusters, *also])
    more = np.arange(len(clusters), len(every))
    made = []
    for train, test in grouped_folds(list(clusters), np.zeros(len(clusters)), 2, seed=seed):
        rows = np.concatenate([train, more])
        folds = grouped_folds(every[rows], np.zeros(len(rows)), seed=seed)
        made.append(Half(rows, test, [(rows[a], rows[b]) for a, b in folds]))
    return made


def choose_strength(
    states: Floats, targets: Floats, half: Half, loss: Callable[[Floats, Ints], float], strengths: Sequence[float]
) -> float:
    """The strength with the least `loss(predicted, rows)` on rows left out of the half; the strongest of equals."""
    lost = np.zeros(len(strengths))
    for train, test in half.folds:
        fitted = fit_ridge(states[train], targets[train])
        lost += [loss(fitted(states[test], strength), test) for strength in strengths]
    return max(strength for strength, value in zip(strengths, lost, strict=True) if value <= lost.min())


def cross_scores(
    states: Mapping[str, Floats],
    known: Ints,
    likeness: Floats,
    halves: Sequence[Half],
    besides: Callable[[Ints], list[Ints]] = lambda _: [],
) -> dict[str, Floats]:
    """By set, the tokens' scores in readouts trained on one half of the retain rows, [rows, tokens].

    Retain rows are scored by the half that they are not in, others by the sum of both. `states` [rows, width] by set;
    `known` [n, options] are the options of the retain rows, columns of `likeness` as in `choice_wins`; `likeness`
    [tokens, tokens] is what every token (column) is to score where a token (row) is right. `besides`: other answers for
    given retain rows, learned as well at the same strength; their scores are further columns of the retain rows'.
    """
    x, right = states["retain"], likeness[known[:, 0]]
    scores: dict[str, Floats] = {}

    def lost(scored: Floats, rows: Ints) -> float:
        return -float(choice_wins(scored, known[rows]).sum())

    for half in halves:
        strength = choose_strength(x, right, half, lost, STRENGTHS)
        answers = [known[half.train, 0], *besides(half.train)]
        fitted = fit_ridge(x[half.train], np.hstack([likeness[each] for each in answers]))
        for name, rows in states.items():
            tested, columns = (half.test, len(answers)) if name == "retain" else (slice(None), 1)
            found = fitted(rows[tested], strength)[:, : columns * len(likeness)]
            scores.setdefault(name, np.zeros((len(rows), found.shape[1])))[tested] += found
    return scores
