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

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from audit.case import Case
from audit.contrast import Statistic
from audit.evidence import Evidence
from audit.instrument import Access, Instrument
from audit.loaders import Example
from audit.plan import Request
from audit.quantities import TOKEN, hidden
from audit.record import Finding, Question
from audit.statistics import FloatArray, cluster_index
from probes.lens import read_layers
from probes.similarity import K, agreement, cka_rows, knn_transfer, linear_cka, mutual_knn, pca_shift
from probes.view import CKA, KIM, View, compared_sets, findings, references

if TYPE_CHECKING:
    from audit.target import Target

__all__ = ["Geometry", "agreement", "cka_rows", "knn_transfer", "linear_cka", "mutual_knn", "pca_shift"]

_FEWEST_ROWS = 8

KNN = Statistic(
    "knn", "k-NN transfer: most of the 5 nearest retain rows have the right answer", "accuracy",
    "the forgotten answers are carried by the nearest states more often", (0.0, 1.0), 0.1, KIM, (True, False),
)  # fmt: skip


# --- the instrument -----------------------------------------------------------------------------------------


class Geometry(Instrument):
    """How far did the states move from the original's, and are they the retrained model's?"""

    name = "geometry"
    title = "How far did its states move?"
    question = Question.REPRESENTATION
    access = Access.WEIGHTS
    sets = ("forget", "retain")
    reference = f"{CKA}; {KIM}"

    def missing(self, case: Case) -> str | None:
        """Needs a model to compare with, and rows enough for a shape."""
        if reason := super().missing(case):
            return reason
        if not references(case):
            return "needs the original or the retrained model to compare states with"
        few = [name for name in compared_sets(case) if len(case.rows(name)) < _FEWEST_ROWS]
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
            name: tuple(target.decision(row.prompt, row.answer) for row in _rows(case, name))
            for name in compared_sets(case)
        }
        return [Request(f"geometry/{name}", texts[name], wanted, {"layers": layers}) for name in texts]

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """What moved; what the neighbours still carry; what agrees with the retrained model."""
        return findings(self, _PromptView(case, evidence), KNN)


class _PromptView(View):
    """States at the last prompt token."""

    place = "the last prompt token"
    answered = "first token right"

    def __init__(self, case: Case, evidence: Evidence) -> None:
        super().__init__(case, evidence)
        self.layers = evidence.extra("target", "geometry/forget")["layers"]
        carried = _nothing_to_transfer(case) is None
        self.transferred = {name: _shared(case, name) for name in compared_sets(case)} if carried else None

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
    for name in compared_sets(case):
        if 2 * len(_shared(case, name)) < len(_rows(case, name)):
            return f"fewer than half of the {name} rows have an answer that rows of other retain entities have too"
    sizes = np.bincount(cluster_index(case.clusters(_rows(case, "retain")), len(_rows(case, "retain")), "retain"))
    return f"needs {K} retain rows of other entities" if sizes.sum() - sizes.max() < K else None
