"""Restoration rates by block and α, drawn and listed.

`won` holds, by model and set, by kind of steering, whether each image's class is the answer: [rows, blocks, alphas] of
0 and 1; `plain`, as the model is, [rows, 1, 1]. An arm is `own` or `original`: see `probes.restoration`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from audit.record import Figure, Series, Table
from probes.restoration_steering import AMPLIFIED, KINDS, alphas_of
from probes.sae_steering import restoration_rate

__all__ = ["Floats", "Won", "figure_of", "rates_of", "table_of"]

Floats = NDArray[np.float64]
Won = Mapping[str, Floats]
_SHORT = KINDS | {"other": "other features", "random": "random directions"}


def rates_of(won: Won, kind: str, reference: float) -> Floats:
    """Restoration rate by block and α, [blocks, alphas]."""
    reached = won[kind].mean(axis=0)
    return restoration_rate(reached, np.full_like(reached, won["plain"].mean()), np.full_like(reached, reference))


def _numbers(values: Iterable[float]) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def figure_of(
    arm: str, won: Mapping[tuple[str, str], Won], reference: float, layers: list[int], quoted: float
) -> Figure:
    """Restoration rate by block: at every α, and its controls at the one that is quoted."""
    forget, at = won["target", "forget"], AMPLIFIED.index(quoted)
    lines = [(f"forget, α = {alpha:g}", "target", forget, "all", i) for i, alpha in enumerate(AMPLIFIED)]
    lines += [(f"{_SHORT[kind]}, α = {quoted:g}", "reference", forget, kind, at) for kind in ("token", "patches")]
    lines += [(f"{_SHORT[kind]}, α = {quoted:g}", "control", forget, kind, at) for kind in ("other", "random")]
    lines += [(f"holdout, α = {quoted:g}", "control", won["target", "holdout"], "all", at)]
    if ("retrained", "forget") in won:
        lines += [(f"forget, retrained, α = {quoted:g}", "control", won["retrained", "forget"], "all", at)]
    series = [
        Series(
            label=label,
            role=role,
            x=[float(layer) for layer in layers],
            y=_numbers(rates_of(of, f"{arm} {kind}", reference)[:, i]),
        )
        for label, role, of, kind, i in lines
        if f"{arm} {kind}" in of
    ]
    said = {"own": "own features amplified", "original": "the original's activations carried over"}[arm]
    return Figure(
        kind="profile",
        title=f"Restoration rate with {said}, by block",
        alt=f"Restoration rate of forget images with {said}, by block and α, beside its controls; the accuracies it is "
        "made of are in the table.",
        x_label="block",
        y_label="R",
        series=series,
    )


def table_of(arm: str, won: Mapping[tuple[str, str], Won], reference: float, layers: list[int]) -> Table:
    """Accuracy of every set under every steering of an arm, and the forget set's restoration rate."""
    models = list(dict.fromkeys(role for role, _ in won))
    said = {"none": "none", **{f"{arm} {kind}": words for kind, words in KINDS.items()}}
    said |= {"original everything": "class token and all features"} if arm == "original" else {}
    names = ("forget", "holdout", "retain")
    rates = {
        (role, kind): rates_of(won[role, "forget"], kind, reference)
        for role in models for kind in said if kind in won[role, "forget"]
    }  # fmt: skip
    rows: list[list[str | int | float | None]] = []
    for b, layer in enumerate(layers):
        for kind, words in said.items():
            for i, alpha in enumerate(alphas_of(kind) if ("target", kind) in rates else ()):
                reached = [float(won["target", name][kind][:, b, i].mean()) for name in names]
                rows.append([layer, words, alpha, *reached, *_numbers([rates[role, kind][b, i] for role in models])])
    columns = ["block", "what is put in", "α", *names, *(f"R, forget, {role}" for role in models)]
    return Table(columns=columns, rows=rows)
