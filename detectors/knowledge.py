"""Knowledge: how strongly does the model still hold the right answer?

What is measured, per example, and how:

==========================  ======================================================================
answer probability          exp(mean log p) over the answer's tokens: the per-token (geometric mean)
                            probability, not that of the whole answer
normalized probability      p / (p + sum of p_false), each p as above
truth ratio                 r = geometric mean of p(wrong variants) / that of p(right paraphrases)
choice                      is the right option the likeliest one?
ROUGE-L recall              how much of the reference, in order, is in what the model wrote
==========================  ======================================================================

and over examples: the forget and retain aggregates of r, forget quality (a two-sample Kolmogorov-Smirnov
test of r against a retrained model) and model utility (harmonic mean).

Source: TOFU (Maini et al. 2024, arXiv 2401.06121, section 2.2); the numbers follow open-unlearning
(locuslab), whose additions of 1e-10 to denominators are left out here.

Traps:

- *The paper's truth ratio averages probabilities, the code averages log-probabilities.* Here, as in the
  code, means are taken in log space; over variants of equal probability both agree.
- *r near 1 is not knowledge gone.* It says only that right and wrong are equally likely; a model that was
  pushed until both are impossible also has r near 1. Read it with the answer probability.
- *The KS p-value is no effect size*: it shrinks with n. Report D and its interval first. It is computed
  on r here and on 1/r in open-unlearning: the same number, for KS is invariant under monotone maps.
- *End of sequence.* open-unlearning counts the end token for probabilities but drops it for token-wise
  metrics. Whoever captures decides what is scored, and must decide alike for models that are compared.
- *ROUGE recall does not punish rambling*: a model that writes a lot recalls more. Fix the length of the
  generation. A refusal ("I'm not sure about that") still recalls the reference's function words, so compare
  with a never-taught model, not with 0.
- *rouge_score keeps only a-z and 0-9.* Text in another script vanishes and would score 0 whatever was
  written; `rouge_l_recall` then compares characters instead, and such values are not comparable with
  word-level ones.
- *Chance level of a choice among m options is 1/m*, and summed log-probabilities favour short options.
- *One collapsed part makes model utility 0*, and one weak part dominates it: show the parts.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from audit import asking
from audit.case import Case
from audit.contrast import Statistic, against_never_taught
from audit.evidence import Evidence
from audit.instrument import Access, Instrument
from audit.plan import Generate, Request
from audit.record import Control, Finding, Question

if TYPE_CHECKING:
    from audit.target import Target

__all__ = [
    "Knowledge", "answer_probability", "choice_correct", "forget_quality", "forget_truth_ratio", "model_utility",
    "normalized_probability", "retain_truth_ratio", "rouge_l_recall", "token_scores", "truth_ratio",
]  # fmt: skip

LOG_FLOOR = -1e4
"""Lowest log-probability that is told from another, nats. A masked token (-inf) counts as this, so that
sums and ratios stay finite while its probability stays exactly 0."""

ROUNDING = 1e-3
"""How far above 0 a log-probability may lie from rounding in the softmax, nats; it is then taken as 0."""

_EXPONENT = 700.0  # exp() of this is still a finite double


def token_scores(values: ArrayLike, name: str = "logprob") -> NDArray[np.float64]:
    """One example's token log-probabilities, checked: shape [T], nats, within [`LOG_FLOOR`, 0].

    Raises ValueError, naming the argument, if it is empty, not 1-D, holds NaN, or lies above 0.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} must be 1-D over an example's tokens, got shape {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name} is empty: an example needs at least one scored token")
    least, most = array.min(), array.max()  # NaN if one is in it
    if np.isnan(most):
        raise ValueError(f"{name} holds NaN")
    if most > ROUNDING:
        raise ValueError(f"{name} holds {most:g}: log-probabilities are at most 0")
    return array if least >= LOG_FLOOR and most <= 0.0 else array.clip(LOG_FLOOR, 0.0)


def _mean(values: ArrayLike, name: str) -> float:
    return float(token_scores(values, name).mean())


def _means(variants: Sequence[ArrayLike], name: str) -> NDArray[np.float64]:
    if len(variants) == 0:
        raise ValueError(f"{name} is empty: at least one variant is needed")
    arrays = [np.asarray(variant) for variant in variants]
    if any(array.ndim != 1 or not array.size for array in arrays):
        return np.array([_mean(array, f"{name}[{i}]") for i, array in enumerate(arrays)])  # which says what is wrong
    # All at once: a scan takes means of a hundred thousand answers of a few tokens.
    lengths = np.array([array.size for array in arrays])
    together = token_scores(np.concatenate(arrays), name)
    return np.asarray(np.add.reduceat(together, lengths.cumsum() - lengths) / lengths)


def _ratios(values: ArrayLike, name: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} must be a non-empty 1-D array, got shape {array.shape}")
    if not np.isfinite(array).all() or array.min() < 0:
        raise ValueError(f"{name} must hold finite truth ratios of at least 0")
    return array


def answer_probability(logprob: ArrayLike) -> float:
    """Length-normalised probability of the answer, exp(mean log p): in [0, 1], larger = better known.

    `logprob` has shape [T], nats. Raises ValueError if it is empty or no log-probability.
    """
    return float(np.exp(_mean(logprob, "logprob")))


def normalized_probability(true_logprob: ArrayLike, wrong_logprobs: Sequence[ArrayLike]) -> float:
    """The right answer's share among the options, p / (p + sum of p_false): in [0, 1], larger = better known.

    `true_logprob` has shape [T] and each of `wrong_logprobs` its own length, nats; each p is
    length-normalised. Computed in log space, so it is defined even where every p underflows. Chance level:
    1 / (1 + number of wrong options). Raises ValueError if any array, or the list, is empty.
    """
    scores = np.append(_means(wrong_logprobs, "wrong_logprobs"), _mean(true_logprob, "true_logprob"))
    weights = np.exp(scores - scores.max())
    return float(weights[-1] / weights.sum())


def truth_ratio(paraphrase_logprobs: Sequence[ArrayLike], wrong_logprobs: Sequence[ArrayLike]) -> float:
    """TOFU's r = p(wrong) / p(paraphrased right answer), geometric means over variants: > 0, SMALLER = known.

    Each variant is a [T] array in nats, of any length. r < 1: the right answer is still preferred; 1: no
    preference; > 1: wrong ones are preferred. Clipped to [e^-700, e^700]. Raises ValueError if any array, or
    either list, is empty.
    """
    difference = (
        _means(wrong_logprobs, "wrong_logprobs").mean() - _means(paraphrase_logprobs, "paraphrase_logprobs").mean()
    )
    return float(np.exp(np.clip(difference, -_EXPONENT, _EXPONENT)))


def forget_truth_ratio(ratios: ArrayLike) -> float:
    """Aggregate for the forget set, mean of min(r, 1/r): in [0, 1], larger = closer to no preference.

    `ratios` has shape [n], each at least 0. Raises ValueError if it is empty.
    """
    r = _ratios(ratios, "ratios")
    return float(np.minimum(r, 1.0 / np.maximum(r, np.finfo(np.float64).tiny)).mean())


def retain_truth_ratio(ratios: ArrayLike) -> float:
    """Aggregate for what must be kept, mean of max(0, 1 - r): in [0, 1], larger = better known.

    `ratios` has shape [n], each at least 0. Raises ValueError if it is empty.
    """
    return float(np.maximum(0.0, 1.0 - _ratios(ratios, "ratios")).mean())


def choice_correct(true_logprob: ArrayLike, wrong_logprobs: Sequence[ArrayLike], normalize: bool = True) -> float:
    """Does the model rank the right option first? 1 if strictly best, 0 if beaten, 1/(number tied) in a tie.

    Each option is a [T] array in nats. `normalize` compares means per token, else sums. Shared ties keep
    the chance level at 1 / (number of options) for a model that gives every option the same score. Raises
    ValueError if any array, or the list, is empty.
    """
    means = np.append(_means(wrong_logprobs, "wrong_logprobs"), _mean(true_logprob, "true_logprob"))
    lengths = [np.asarray(option).size for option in (*wrong_logprobs, true_logprob)]
    scores = means if normalize else means * np.array(lengths)
    best = scores == scores.max()
    return float(best[-1] / best.sum())


@lru_cache(maxsize=1)
def _rouge() -> tuple[Any, Any]:
    # Imported on first use: the package pulls in nltk.
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenize import tokenize

    return RougeScorer(["rougeL"], use_stemmer=True), tokenize


def rouge_l_recall(reference: str, generated: str) -> float:
    """ROUGE-L recall, length of the longest common subsequence over the reference's: in [0, 1].

    Words are stemmed as in TOFU (`rouge_score`, Porter). Where that tokenizer would drop more than half of
    the reference's letters and digits (it keeps a-z and 0-9 only), characters are compared instead: Unicode
    NFKC, case-folded, letters, marks and digits only. Such a text has many characters in common by chance,
    so compare it with its like only. Raises ValueError if `reference` is blank; a blank `generated` is 0.
    """
    if not reference.strip():
        raise ValueError("reference is empty")
    scorer, tokenize = _rouge()
    kept = sum(len(token) for token in tokenize(reference, None))
    if kept and 2 * kept >= sum(character.isalnum() for character in reference):
        return float(scorer.score(reference, generated)["rougeL"].recall)
    characters = _characters(reference)
    return _common_subsequence(characters, _characters(generated)) / len(characters)


def _characters(text: str) -> str:
    folded = "".join(unicodedata.normalize("NFKC", text).casefold().split())
    content = "".join(c for c in folded if unicodedata.category(c)[0] in "LMN")
    return content or folded  # a text of punctuation alone is compared as it is


def _common_subsequence(a: str, b: str) -> int:
    """Length of the longest common subsequence, bit-parallel (Hyyrö 2004): a zero bit in `row` is a step."""
    masks: dict[str, int] = {}
    for i, character in enumerate(a):
        masks[character] = masks.get(character, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for character in b:
        hits = row & masks.get(character, 0)
        row = ((row + hits) | (row - hits)) & full
    return len(a) - row.bit_count()


def forget_quality(target_ratios: ArrayLike, retrained_ratios: ArrayLike) -> tuple[float, float]:
    """Two-sample KS test of the truth ratios against a retrained model's: (D, p), both in [0, 1].

    `target_ratios` has shape [n] and `retrained_ratios` [m], both over the forget set. D is the largest gap
    between the two distribution functions, the effect size; p is TOFU's "forget quality" (larger = less
    distinguishable from retrained). Two-sided: over-unlearning shows as well. Raises ValueError if either
    array is empty.
    """
    result = stats.ks_2samp(_ratios(target_ratios, "target_ratios"), _ratios(retrained_ratios, "retrained_ratios"))
    return float(result.statistic), float(result.pvalue)


def model_utility(parts: Mapping[str, float]) -> float:
    """Harmonic mean of the parts: in [0, 1], larger = more useful; 0 as soon as one part is 0.

    `parts` maps a name to a value in [0, 1] (TOFU's nine: probability, ROUGE and truth ratio on retain set,
    real authors and world facts). Raises ValueError if there is none, or one lies outside [0, 1].
    """
    if not parts:
        raise ValueError("parts is empty")
    for name, value in parts.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"parts[{name!r}] is {value!r}, outside [0, 1]")
    if min(parts.values()) == 0.0:
        return 0.0
    return float(stats.hmean(list(parts.values())))


# --- instrument ---------------------------------------------------------------------------------------------

_TOFU = "TOFU (Maini et al. 2024, arXiv 2401.06121), section 2.2"

PROBABILITY = Statistic(
    "probability", "probability of the right answer, a token", "probability",
    "the right answer is likelier", (0.0, 1.0), 0.1, _TOFU, (False, False),
)  # fmt: skip
CHOICE = Statistic(
    "choice", "multiple choice: is the right answer the likeliest option", "accuracy",
    "the right answer is picked more often", (0.0, 1.0), 0.1, _TOFU, (True, True),
)  # fmt: skip
TRUTH = Statistic(
    "truth-ratio", "right against wrong answers, 1 / (1 + truth ratio)", "probability",
    "right answers are likelier than wrong ones", (0.0, 1.0), 0.1, _TOFU, (False, False),
)  # fmt: skip
ROUGE = Statistic(
    "rouge", "ROUGE-L recall of what the model answers", "recall",
    "more of the right answer is said when asked", (0.0, 1.0), 0.1, _TOFU,
)  # fmt: skip


class Knowledge(Instrument):
    """Does the right answer still come out when asked?"""

    name = "knowledge"
    title = "Does the right answer come out?"
    question = Question.LEAKAGE
    access = Access.TEXT
    withheld_below = dict.fromkeys((PROBABILITY.name, CHOICE.name, TRUTH.name), Access.LOGPROBS)
    reference = _TOFU

    def missing(self, case: Case) -> str | None:
        """Who sees only text can only ask, so every row needs a prompt."""
        reason = super().missing(case)
        if reason is None and case.options.access < Access.LOGPROBS and not _can_ask(case):
            return "needs a prompt in every row, where only what is answered can be seen"
        return reason

    def requests(self, case: Case, target: Target) -> list[Request | Generate]:
        """Answers, paraphrases and wrong answers of all sets scored, prompts continued; at text access only that."""
        sets = asking.compared(case, target.role)
        continued = asking.continuations(case, target, sets)
        if case.options.access < Access.LOGPROBS:
            return [*continued]
        return [*asking.answers(case, target, sets), *asking.options(case, target, sets), *continued]

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """Four statistics against never-taught rows; with a retrained model, forget quality beside them."""
        scored = self._scored(case, evidence) if case.options.access >= Access.LOGPROBS else []
        if not _can_ask(case):
            return scored
        continued = {name: asking.continued_rows(case, name) for name in asking.compared(case, "target")}

        def rouge(role: str, name: str) -> NDArray[np.float64]:
            said = evidence.texts(role, f"{name}/continued")
            return np.array([rouge_l_recall(r.answer, text) for r, text in zip(continued[name], said, strict=True)])

        return [*scored, against_never_taught(self, case, evidence, ROUGE, rouge, rows=continued)]

    def _scored(self, case: Case, evidence: Evidence) -> list[Finding]:
        """The statistics of log-probabilities."""
        sets = asking.compared(case, "target")
        contrast = partial(against_never_taught, self, case, evidence)

        def probability(role: str, name: str) -> NDArray[np.float64]:
            return np.array([answer_probability(x) for x in asking.logprobs(evidence, role, f"{name}/answer")])

        found = [contrast(PROBABILITY, probability)]
        if all(row.wrong for name in sets for row in case.rows(name)):

            def options(role: str, name: str) -> list[tuple[Any, list[Any], list[Any]]]:
                true = asking.logprobs(evidence, role, f"{name}/answer")
                wrong = asking.grouped(case, evidence, role, name, "wrong")
                right = asking.grouped(case, evidence, role, name, "paraphrase")
                return [(t, p or [t], w) for t, p, w in zip(true, right, wrong, strict=True)]

            def choice(role: str, name: str) -> NDArray[np.float64]:
                return np.array([choice_correct(t, w) for t, _, w in options(role, name)])

            def ratios(role: str, name: str) -> NDArray[np.float64]:
                return np.array([truth_ratio(p, w) for _, p, w in options(role, name)])

            def truth(role: str, name: str) -> NDArray[np.float64]:
                return 1.0 / (1.0 + ratios(role, name))

            found += [contrast(CHOICE, choice), contrast(TRUTH, truth)]
            if "retrained" in case.models:
                d, p = forget_quality(ratios("target", "forget"), ratios("retrained", "forget"))
                found[-1].controls.append(
                    Control(
                        name="forget quality",
                        description="Kolmogorov-Smirnov D between the truth ratios of target and retrained model on "
                        f"the forget set, rows taken as independent as TOFU does; p = {p:.3g}",
                        estimate=d,
                        n=len(case.rows("forget")),
                    )
                )
        return found

    def examples(self, case: Case, evidence: Evidence) -> dict[str, dict[str, float | str]]:
        """Per forget row: probability of the answer, whether it is chosen, truth ratio, and what the target answers."""
        drill: dict[str, dict[str, float | str]] = {}
        if case.options.access >= Access.LOGPROBS:
            right = asking.logprobs(evidence, "target", "forget/answer")
            wrong = asking.grouped(case, evidence, "target", "forget", "wrong")
            phrased = asking.grouped(case, evidence, "target", "forget", "paraphrase")
            for row, true, others, options in zip(case.rows("forget"), right, phrased, wrong, strict=True):
                drill[row.id] = {"probability": answer_probability(true)}
                if options:
                    drill[row.id]["chosen"] = choice_correct(true, options)
                    drill[row.id]["truth ratio"] = truth_ratio(others or [true], options)
        said = evidence.texts("target", "forget/continued")
        for row, text in zip(asking.continued_rows(case, "forget"), said, strict=True):
            drill.setdefault(row.id, {})["generated"] = text
            if row.prompt:
                drill[row.id]["ROUGE-L recall"] = rouge_l_recall(row.answer, text)
        return drill


def _can_ask(case: Case) -> bool:
    """Has every row that is continued a prompt? A passage has no answer whose recall could be measured."""
    names = asking.compared(case, "target")
    return all(row.prompt for name in names for row in asking.continued_rows(case, name))
