"""Memorization: does the very wording of a text still come out?

Two readings of it. Teacher-forced, the model is shown the true text and `match[t]` says whether the true
token t was its most likely one:

- exact memorization  EM = mean of match                             (Tirumala et al. 2022, arXiv 2205.10770)
- extraction strength ES = 1 - k*/L, where k* is the length of the shortest prefix after which every token
  matches                                                            (Carlini et al. 2021, arXiv 2012.07805)

Free-running, the model continues a prompt and what it wrote is laid beside the reference:

- verbatim overlap, the share of the reference reproduced from its first token on, without a slip
- longest common run, the longest stretch of the reference that occurs anywhere in what was written

Source: the definitions of EM and ES are those of open-unlearning (locuslab).

Traps:

- *open-unlearning's ES never reaches 0.* Its loop over k ends at L - 1 when nothing matches, so a text of
  which not one token matches gets 1/L, the same as one whose last token alone matches. Here k* may be L.
- *The last token weighs most in ES*: one miss at the end makes it 0 however much matched before, and a scored
  end-of-sequence token, which any model predicts, lifts it off 0. open-unlearning leaves that token out.
- *EM is teacher-forced, so a fluent model scores well on text it never saw*: function words and the rest of a
  name already begun are easy. Only the distance from a never-taught model, or holdout text, means anything.
- *Greedy output that no longer shows the text does not show that it is gone*: one changed first token hides
  everything behind it, and verbatim overlap with it. ES and the longest run do not depend on that token.
- *One-token answers* make every measure here 0 or 1.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from audit import asking
from audit.case import Case
from audit.contrast import Statistic, against_never_taught
from audit.evidence import Evidence
from audit.instrument import Access, Instrument
from audit.plan import Generate, Request
from audit.record import Finding, Question

if TYPE_CHECKING:
    from audit.target import Target

__all__ = ["Memorization", "exact_memorization", "extraction_strength", "longest_common_run", "verbatim_overlap"]


def _matches(match: ArrayLike) -> NDArray[np.bool_]:
    array = np.asarray(match)
    if array.ndim != 1:
        raise ValueError(f"match must be 1-D over an example's tokens, got shape {array.shape}")
    if array.size == 0:
        raise ValueError("match is empty: an example needs at least one scored token")
    if array.dtype != np.bool_ and not np.isin(array, (0, 1)).all():
        raise ValueError("match must hold booleans: was each true token the most likely one?")
    return array.astype(np.bool_)


def exact_memorization(match: ArrayLike) -> float:
    """Share of tokens that are the model's first choice, given all true tokens before: in [0, 1].

    `match` has shape [T], boolean; larger = more memorized. Raises ValueError if it is empty.
    """
    return float(_matches(match).mean())


def extraction_strength(match: ArrayLike) -> float:
    """Share of the text that follows, token by token, from the rest: 1 - k*/T, in [0, 1].

    `match` has shape [T], boolean; larger = more memorized. k* is one past the last miss: 1 if every token
    matches, 0 if the last one does not. Raises ValueError if it is empty.
    """
    array = _matches(match)
    misses = np.flatnonzero(~array)
    prefix = int(misses[-1]) + 1 if misses.size else 0
    return 1.0 - prefix / array.size


def _reference(tokens: Sequence[Hashable]) -> None:
    if len(tokens) == 0:
        raise ValueError("reference_tokens is empty")


def verbatim_overlap(reference_tokens: Sequence[Hashable], generated_tokens: Sequence[Hashable]) -> float:
    """Length of the common prefix over that of the reference: in [0, 1], larger = more verbatim.

    Both are sequences of token ids (or words, or a string's characters), of any lengths; what was generated
    beyond the reference does not count. Raises ValueError if `reference_tokens` is empty.
    """
    _reference(reference_tokens)
    length = 0
    for expected, written in zip(reference_tokens, generated_tokens, strict=False):
        if expected != written:
            break
        length += 1
    return length / len(reference_tokens)


def longest_common_run(reference_tokens: Sequence[Hashable], generated_tokens: Sequence[Hashable]) -> float:
    """Longest contiguous run of tokens found in both, over the reference's length: in [0, 1].

    Both as in `verbatim_overlap`, at least which it is; larger = more verbatim. Longer generations have
    longer runs by chance: fix their length. Raises ValueError if `reference_tokens` is empty.
    """
    _reference(reference_tokens)
    numbers: dict[Hashable, int] = {}
    written = np.array([numbers.setdefault(token, len(numbers)) for token in generated_tokens], dtype=np.int64)
    # run[j + 1]: length of the common run that ends at this reference token and at written token j.
    run = np.zeros(written.size + 1, dtype=np.int64)
    longest = 0
    for token in reference_tokens:
        run[1:] = np.where(written == numbers.get(token, -1), run[:-1] + 1, 0)
        longest = max(longest, int(run.max()))
    return longest / len(reference_tokens)


# --- instrument ---------------------------------------------------------------------------------------------

_SOURCE = "open-unlearning (Dorna et al. 2025, arXiv 2506.12618), section 3; Carlini et al. 2021, arXiv 2012.07805"

EXACT = Statistic(
    "exact", "exact memorization: tokens of the answer that are the model's first choice", "share",
    "more of the answer is predicted token by token", (0.0, 1.0), 0.1, _SOURCE,
)  # fmt: skip
STRENGTH = Statistic(
    "extraction-strength", "extraction strength: share of the answer that follows from the rest", "share",
    "a shorter beginning is enough to extract the answer", (0.0, 1.0), 0.1, _SOURCE,
)  # fmt: skip
VERBATIM = Statistic(
    "verbatim", "verbatim continuation: words of the answer said in one run", "share",
    "longer verbatim passages come out", (0.0, 1.0), 0.1, _SOURCE,
)  # fmt: skip


class Memorization(Instrument):
    """Does the text itself come out, word for word?"""

    name = "memorization"
    title = "Does the text come out word for word?"
    question = Question.LEAKAGE
    access = Access.TEXT
    withheld_below = dict.fromkeys((EXACT.name, STRENGTH.name), Access.LOGPROBS)
    reference = _SOURCE

    def requests(self, case: Case, target: Target) -> list[Request | Generate]:
        """Answers scored, prompts continued: the same passes as `knowledge`. At text access only the latter."""
        sets = asking.compared(case, target.role)
        continued = asking.continuations(case, target, sets)
        if case.options.access < Access.LOGPROBS:
            return [*continued]
        return [*asking.answers(case, target, sets), *continued]

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """Three statistics against never-taught rows; the last of them alone at text access."""
        contrast = partial(against_never_taught, self, case, evidence)
        continued = {name: asking.continued_rows(case, name) for name in asking.compared(case, "target")}

        def matches(role: str, name: str) -> list[Any]:
            return [values["match"] for values in evidence.iterate(role, f"{name}/answer", "token")]

        def verbatim(role: str, name: str) -> NDArray[np.float64]:
            said = evidence.texts(role, f"{name}/continued")
            expected = [asking.expected_continuation(row).split() for row in continued[name]]
            return np.array(
                [longest_common_run(e, t.split()[: 2 * len(e)]) for e, t in zip(expected, said, strict=True)]
            )

        free_running = contrast(VERBATIM, verbatim, rows=continued)
        if case.options.access < Access.LOGPROBS:
            return [free_running]
        return [
            contrast(EXACT, lambda role, name: np.array([exact_memorization(m) for m in matches(role, name)])),
            contrast(STRENGTH, lambda role, name: np.array([extraction_strength(m) for m in matches(role, name)])),
            free_running,
        ]

    def examples(self, case: Case, evidence: Evidence) -> dict[str, dict[str, float | str]]:
        """Per forget row: both teacher-forced statistics."""
        if case.options.access < Access.LOGPROBS:
            return {}
        values = evidence.iterate("target", "forget/answer", "token")
        return {
            row.id: {
                "exact memorization": exact_memorization(v["match"]),
                "extraction strength": extraction_strength(v["match"]),
            }
            for row, v in zip(case.rows("forget"), values, strict=True)
        }
