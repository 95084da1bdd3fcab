"""Trace in next-token distributions: was this model unlearned, or only edited, or neither?

What is measured: the target's and the original's next-token distributions where answers begin, on prompts that have
nothing to do with the forget set (retain, holdout, utility) and on all prompts; how they differ is summed up in
numbers (`detectors.fingerprint.logit_features`) and judged by a classifier trained on models of known history.

    score = w . f(target, original) + b        log-odds of unlearned against ordinarily edited

Without an original the same is asked of the target's distributions alone, which say less.

Source: Chen et al. 2025 (arXiv 2506.14003), section 4 and appendix B, whose classifiers know unlearned models and their
originals only. That any further edit is "detected" by those was found in an independent reproduction.

Traps:

- *Edited is not unlearned.* Hence ordinary edits on the other side, fine-tunes matched to the target's change as the
  null, and a threshold that 99 % of ordinary edits of known history stay below.
- *Small models teach it.* The classifier was trained on models of a million parameters. Its numbers are free of scale,
  but whether they mean the same in a large one is what the matched null has to say.
- *A part of the vocabulary.* Of a large vocabulary the 2,047 tokens commonest in the case's own texts are kept, and all
  others as one: divergences are lower bounds.
- *A light touch leaves little.* Methods that did not get far are missed first.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from audit.case import Case
from audit.evidence import Evidence
from audit.instrument import Instrument
from audit.plan import Request
from audit.quantities import Quantity, View
from audit.record import Finding, Question
from detectors.fingerprint import Features, entropy, kl_divergence, logit_features
from detectors.tracing import SOURCE, Use, asked_sets, beginnings, is_edit_of_original, rows_of, trace_findings

if TYPE_CHECKING:
    import torch

    from audit.target import Target

__all__ = ["TraceLogits", "entropy", "kl_divergence", "logit_features"]

MOST = 2048


def distribution(ids: tuple[int, ...] | None) -> Quantity:
    """`logprobs` [T, len(ids) + 1], the last of all other tokens together; of all tokens [T, V] if `ids` is None."""

    def compute(view: View) -> dict[str, torch.Tensor]:
        import torch

        if ids is None:
            return {"logprobs": view.logprobs}
        chosen = view.logprobs[:, list(ids)]
        rest = torch.log1p(-chosen.exp().sum(1).clamp(max=1 - 1e-7))
        return {"logprobs": torch.cat([chosen, rest[:, None]], 1)}

    digest = "all" if ids is None else hashlib.sha256(repr(ids).encode()).hexdigest()[:16]
    return Quantity(f"distribution-{digest}", compute)


class TraceLogits(Instrument):
    """Do next-token distributions bear the marks of unlearning?"""

    name = "trace-logits"
    title = "Was it unlearned, by its next-token distributions?"
    question = Question.TRACE
    sets = ("retain",)
    watches = ("trace",)
    reference = SOURCE

    def requests(self, case: Case, target: Target) -> list[Request]:
        """The beginnings of answers, by set."""
        if not (is_edit_of_original(target.role) or target.role == "original"):
            return []
        asked = {name: beginnings(case, target, name) for name in asked_sets(case)}
        ids: tuple[int, ...] | None = None
        if target.vocabulary > MOST:
            counts = Counter(i for rows in asked.values() for tokens in rows for i in tokens.ids)
            ids = tuple(sorted(i for i, _ in counts.most_common(MOST - 1)))
        place = {i: at for at, i in enumerate(ids or range(target.vocabulary))}
        made = []
        for name, rows in asked.items():
            right = [[place.get(i, len(place)) for i in tokens.ids[tokens.start :]] for tokens in rows]
            made.append(Request(f"trace/{name}", rows, (distribution(ids),), {"right": right}))
        return made

    def features(self, case: Case, evidence: Evidence, role: str, use: Use) -> Features:
        """The numbers of one role, from the rows to use of every set."""
        here = {name: _distributions(evidence, role, name, kept) for name, kept in use.items()}
        if "original" not in case.models:
            return logit_features(here)
        there = {name: _distributions(evidence, "original", name, kept) for name, kept in use.items()}
        right = {
            name: _joined([np.array(row) for row in evidence.extra(role, f"trace/{name}")["right"]], kept)
            for name, kept in use.items()
        }
        return logit_features(here, there, right)

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """On prompts that have nothing to do with the forget set, and on all."""
        return trace_findings(
            self, case, evidence, "fingerprint in next-token distributions",
            {name: rows_of(case, name) for name in asked_sets(case)}, self.features,
        )  # fmt: skip


def _distributions(evidence: Evidence, role: str, name: str, kept: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Log-probabilities [positions, tokens] of the rows that are kept."""
    asked = evidence.quantities(role, f"trace/{name}")
    quantity = next(q.name for q in asked if q.name.startswith("distribution-"))
    return _joined([values["logprobs"] for values in evidence.iterate(role, f"trace/{name}", quantity)], kept)


def _joined(rows: list[Any], kept: NDArray[np.bool_]) -> NDArray[Any]:
    return np.concatenate([row for row, keep in zip(rows, kept, strict=True) if keep])
