"""Tuned lens: is the right answer readable inside, once every layer's state is translated into the last layer's terms?

What is measured: the logit lens takes the state h after a block for the final one, though a layer may keep the same
thing in other directions. The tuned lens translates first, by an affine map that was fitted where the model is itself:
on retained (and utility) rows, with no word of the answers, only with the model's own final states.

    T_l  = argmin  mean |h_L - T h_l|^2 + strength |A|^2,      T h = h + b + A z,    z: h standardised
    z_l  = W_U . norm(T_l h_l),        choice_l = 1[ z_l(right) > max z_l(wrong) ]   at the fork (`probes.lens.fork`)

The penalty is on what is added to h: with few rows, or a high strength, the translator is the logit lens with its mean
error taken off. Both are affine, as in the paper, which fits by the divergence of the outputs; the closed form has no
seed, no learning rate and no end of training. The strength is chosen by rows left out. Retained entities are halved:
each half is read by the translator of the other, all other rows by both, the mean taken. Fitted at forks alone, it
read as much as, or more than, fitted at all positions of the same texts.

With the original model, the translated states are read through the *original's* norm and unembedding as well: past an
edit of the output. That is shown, and decides nothing: a target whose output speaks other terms is not read so at all.

Source: Belrose et al. 2023 (arXiv 2303.08112), sections 3 and 4; Patil et al. 2024 (arXiv 2309.17410), section 4.

Traps:

- *The last layer is the model itself* in `choice`, and silent wherever the output is; what counts is a layer below.
- *The original must not be the goal.* A map from the target's states to the original's final states, fitted on retained
  rows alone, still carries forgotten answers over, probably by shared names: the original's state on a retained Robert
  may hold a little of what it knows of a forgotten one. Translated so, the states of models that never knew read 0.03
  more forgotten answers after the first block than with another model that never knew as goal (14 of 15 pairs).
- *Silence is not deletion*: what an edit of all layers moves in other ways for forgotten than for retained rows, a map
  fitted on the latter does not bring back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np

from audit.case import Case
from audit.contrast import Statistic, against_never_taught
from audit.evidence import Evidence
from audit.instrument import Access, Instrument
from audit.plan import Request
from audit.record import Finding, Question
from probes.lens import read_layers
from probes.readout import (
    Floats,
    Half,
    Ints,
    block_outputs,
    choice_wins,
    choose_strength,
    compared,
    decisions,
    fit_ridge,
    forking_rows,
    in_halves,
    lacking,
    offered,
    option_columns,
    rows_read,
    states_of,
    unembedding,
)

if TYPE_CHECKING:
    import torch

    from audit.target import Target

__all__ = ["Reader", "TunedLens", "translated_wins", "translator"]

_SOURCE = "Belrose et al. 2023, arXiv 2303.08112, sections 3 and 4"

CHOICE = Statistic(
    "choice", "tuned lens: the right answer beats the wrong ones where they fork", "accuracy",
    "the right answer is readable inside more often", (0.0, 1.0), 0.1, _SOURCE,
)  # fmt: skip
ORIGINAL_HEAD = Statistic(
    "original-head", "tuned lens read through the original's unembedding: the right answer beats the wrong ones",
    "accuracy", "the right answer is readable inside more often", (0.0, 1.0), 0.1, _SOURCE, (False, False),
)  # fmt: skip

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0)


@dataclass(frozen=True)
class Reader:
    """A model's final norm and its unembedding of k tokens: all that reads a final state.

    A cap on the logits, or a factor, is left out: it changes no comparison of two tokens.
    """

    norm: torch.nn.Module
    rows: torch.Tensor  # [k, width]
    bias: torch.Tensor  # [k]

    def __call__(self, states: Floats) -> Floats:
        """Logits [n, k] of final states [n, width]."""
        import torch

        with torch.inference_mode():
            logits = self.norm(torch.from_numpy(states).float()) @ self.rows.T + self.bias
        return np.asarray(logits.double().numpy())


Reading = tuple[Callable[[Floats], Floats], Mapping[str, Ints]]
"""From final states [n, width] to logits [n, k], and by set the options [rows, m] among these: see `choice_wins`."""


def translator(states: Floats, final: Floats, half: Half) -> Callable[[Floats], Floats]:
    """The affine map from states [n, width] to final states [n, width], fitted on the half's training rows.

    The strength with the least squared error on rows left out is taken.
    """
    added = final - states

    def error(predicted: Floats, rows: Ints) -> float:
        return float(np.square(predicted - added[rows]).sum())

    strength = choose_strength(states, added, half, error, STRENGTHS)
    fitted = fit_ridge(states[half.train], added[half.train])
    return lambda new: np.asarray(new + fitted(new, strength))


def translated_wins(
    states: Mapping[str, Floats], pool: Floats, final: Floats, halves: Sequence[Half], readings: Sequence[Reading]
) -> list[dict[str, Floats]]:
    """Wins [rows] by set of one layer's states [rows, width], translated into final states, for every reading.

    Args:
        states: by set, those of `retain` among them.
        pool: states [n, width] that translators are fitted on, those of `retain` first.
        final: the final states [n, width] of the same rows.
        halves: of the pool; `retain` rows are read by the translator of the other half, all others by both.
        readings: what reads final states, and every set's options among its logits.
    """
    wins = [{name: np.zeros(len(rows)) for name, rows in states.items()} for _ in readings]
    for half in halves:
        translate = translator(pool, final, half)
        for name, rows in states.items():
            read = half.test if name == "retain" else np.arange(len(rows))
            translated = translate(rows[read])
            for (reader, options), won in zip(readings, wins, strict=True):
                won[name][read] += choice_wins(reader(translated), options[name][read])
    return [{n: w if n == "retain" else w / len(halves) for n, w in won.items()} for won in wins]


class TunedLens(Instrument):
    """Is the right answer readable inside, once translated into the last layer's terms?"""

    name = "tuned-lens"
    title = "Is the answer readable after translation?"
    question = Question.REPRESENTATION
    access = Access.WEIGHTS
    sets = ("forget", "retain")
    reference = _SOURCE

    def missing(self, case: Case) -> str | None:
        """Options to choose from, and retained entities to fit on."""
        return super().missing(case) or lacking(case)

    def requests(self, case: Case, target: Target) -> list[Request]:
        """The states at every row's fork, and what reads the final ones."""
        if "+" in target.role:
            return []
        forks, layers = compared(case, target), read_layers(target.layers)
        tokens = offered(forks)
        reader = Reader(target.apart(target.final_norm), *unembedding(target, tokens))
        extra = {"layers": layers, "tokens": tokens, "reader": reader}
        if "utility" in case.sets:
            forks["utility"] = decisions(case, target, "utility")
        return [Request(f"tuned-lens/{name}", rows, (block_outputs(layers),), extra) for name, rows in forks.items()]

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """The layer at which forgotten answers are read most above those never taught."""
        rows, kept = forking_rows(case, evidence, self.name)
        more = {"utility": rows_read(case, "utility")} if "utility" in case.sets else {}
        clusters = {name: case.clusters(examples) for name, examples in (rows | more).items()}
        halves = in_halves(clusters["retain"], seed=case.options.seed, also=clusters.get("utility", ()))

        def reading(role: str) -> Reading:
            extra = evidence.extra(role, "tuned-lens/forget")
            forks = {name: evidence.sequences(role, f"tuned-lens/{name}") for name in kept}
            return extra["reader"], {n: option_columns(forks[n], extra["tokens"])[k] for n, k in kept.items()}

        @cache
        def read(role: str) -> list[dict[str, Floats]]:
            """Wins [rows, layers] by set, read by the model itself and, if it is as wide, by the original."""
            states = {name: states_of(evidence, role, f"tuned-lens/{name}")[k] for name, k in kept.items()}
            fitted = [states["retain"], *(states_of(evidence, role, f"tuned-lens/{name}") for name in more)]
            pool = np.concatenate(fitted)
            readings = [reading(role), *([reading("original")] if by_original else [])]
            layers = [
                translated_wins(
                    {name: found[:, i].astype(np.float64) for name, found in states.items()},
                    pool[:, i].astype(np.float64),
                    pool[:, -1].astype(np.float64),
                    halves,
                    readings,
                )
                for i in range(pool.shape[1])
            ]
            return [
                {name: np.stack([wins[j][name] for wins in layers], axis=1) for name in kept}
                for j in range(len(readings))
            ]

        widths = {role: evidence.extra(role, "tuned-lens/forget")["reader"].rows.shape[1] for role in case.models}
        by_original = "original" in case.models and len(set(widths.values())) == 1
        axis = ("after block", [float(i) for i in evidence.extra("target", "tuned-lens/forget")["layers"]])
        contrast = partial(against_never_taught, self, case, evidence, columns=axis, rows=rows)
        found = [contrast(CHOICE, lambda role, name: read(role)[0][name])]
        if by_original:
            found.append(contrast(ORIGINAL_HEAD, lambda role, name: read(role)[1][name]))
        return found
