"""Membership inference: does the likelihood still tell forgotten texts from texts never seen?

**Orientation: every score here is LARGER for a LIKELIER MEMBER.** open-unlearning and MUSE use the opposite,
loss-like sign. Negate one to get the other; with *forget* as the positive class and *holdout* as the
negative one, the AUC of these scores equals open-unlearning's AUC (labels forget 0, holdout 1, loss-like
score): 1 when forget texts are always likelier, 0.5 when they look unseen, near 0 when over-unlearned. MUSE's
own tables print 1 - AUC.

=================  =====================================================  ================================
loss               mean log p                                             Yeom et al. 2018, 1709.01604
zlib               mean log p / len(zlib(text))                           Carlini et al. 2021, 2012.07805
Min-K              mean of the lowest fraction k of log p                 Shi et al. 2024, 2310.16789
Min-K++            the same of (log p - mean) / sqrt(variance)            Zhang et al. 2025, 2404.02936
ReCaLL             LL(x | P) / LL(x), P a prefix of non-members           Xie et al. 2024, 2406.15968
reference          mean log p - mean log p under a reference model        Carlini et al. 2021, 2012.07805
PrivLeak           ((1-AUC) - (1-AUC_ref)) / (1-AUC_ref) * 100            MUSE, Shi et al. 2025, 2407.06460
=================  =====================================================  ================================

`mean` and `variance` are those of log p(v) over the vocabulary, under the model's own distribution.

Source: the papers in the table (arXiv numbers); the AUC on forget against holdout as in MUSE, section 3.

Traps:

- *The split.* If forget and holdout differ in source, date, topic or length, any of these "finds members" in
  a model that saw neither; MUSE-News's AUC of .031 between retain2 and forget is such a shift. Run the same
  attack on a bag of words and on a never-taught model before believing an AUC.
- *Over-unlearning* drives AUC below 0.5, which also tells members apart: test two-sided.
- *zlib divides a mean per token by the bytes of the whole text*, as the reference codes do, so longer texts
  get scores nearer 0, hence larger: it is partly a length detector.
- *Which k*: Min-K is 0.2 by default, but PrivLeak is defined with 0.4. Short answers: max(1, int(k T)) tokens
  are averaged; the codes of MUSE and ReCaLL lack the max and give NaN below 1/k tokens.
- *Min-K++ needs the variance floor* (1e-6, as in open-unlearning): where the model is certain, variance and
  log p - mean both vanish.
- *ReCaLL*: log-likelihoods are negative, so a member, whose likelihood drops more under a foreign prefix, has
  a ratio further above 1. The prefix must not be in the training data, nor overlap the tested texts. Score
  the same tokens in both passes; the official code scores the first token only in the prefixed one.
- *The reference model* must not have seen the texts, and must share the tokenizer. (ReCaLL's own baseline
  subtracts a probability from a log-likelihood.)
- *PrivLeak is unbounded above and not comparable across corpora*: see `privleak`.
"""

from __future__ import annotations

import math
import zlib
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from audit import asking
from audit.case import Case
from audit.contrast import Statistic, against_never_taught
from audit.controls import bag_of_words_control, retrained_control
from audit.evidence import Evidence
from audit.instrument import Access, Instrument
from audit.loaders import Example
from audit.plan import Generate, Request
from audit.quantities import MOMENTS, TOKEN
from audit.record import Control, Finding, Question, Side
from detectors.knowledge import token_scores

if TYPE_CHECKING:
    from audit.target import Target

__all__ = [
    "Membership", "PrivLeak", "loss_score", "min_k", "min_k_plus_plus", "privleak", "privleak_bounds", "recall",
    "reference_ratio", "zlib_score",
]  # fmt: skip

ATTACKS: dict[str, str] = {
    "loss": "how likely the model finds the text",
    "zlib": "how likely the model finds the text, for how compressible it is",
    "min_k": "how likely the model finds the text's least likely tokens",
    "min_k_plus_plus": "the same, relative to the alternatives the model had at each token",
    "recall": "how much less likely the text becomes after unrelated, unseen text",
    "reference": "how much likelier the text is than under a model that never saw it",
}
"""What each attack asks, in words for a report."""

VARIANCE_FLOOR = 1e-6  # nats squared, Min-K++; as in open-unlearning
LIKELIHOOD_FLOOR = 1e-6  # nats, ReCaLL: the smallest log-likelihood that is told from certainty
PRIVLEAK_MARGIN = 0.05  # the smallest 1 - AUC_ref that PrivLeak is divided by


def loss_score(logprob: ArrayLike) -> float:
    """Mean log-probability (the negated loss): nats per token, at most 0; larger = likelier a member.

    `logprob` has shape [T]. Raises ValueError if it is empty.
    """
    return float(token_scores(logprob).mean())


def zlib_score(logprob: ArrayLike, text: str) -> float:
    """Mean log-probability over the text's zlib-compressed bytes: at most 0, larger = likelier a member.

    `logprob` has shape [T], nats; `text` is the scored text itself, compressed as UTF-8. Raises ValueError
    if either is empty.
    """
    if not text:
        raise ValueError("text is empty")
    # A lone surrogate, as byte-level decoding can leave behind, is no valid UTF-8.
    return loss_score(logprob) / len(zlib.compress(text.encode("utf-8", "surrogatepass")))


def _lowest(scores: NDArray[np.float64], k: float) -> float:
    if not 0.0 < k <= 1.0:
        raise ValueError(f"k is {k!r}: a fraction in (0, 1] is needed")
    count = max(1, int(len(scores) * k))
    return float(np.sort(scores)[:count].mean())


def min_k(logprob: ArrayLike, k: float = 0.2) -> float:
    """Mean of the lowest max(1, int(k T)) log-probabilities: nats, at most 0; larger = likelier a member.

    `logprob` has shape [T]; `k` is a fraction in (0, 1]. Raises ValueError if it is empty, or k outside.
    """
    return _lowest(token_scores(logprob), k)


def min_k_plus_plus(logprob: ArrayLike, mean: ArrayLike, variance: ArrayLike, k: float = 0.2) -> float:
    """Mean of the lowest max(1, int(k T)) of (log p - mean) / sqrt(variance): larger = likelier a member.

    All three have shape [T]; `mean` (nats) and `variance` (nats squared, floored at 1e-6) are those of the
    log-probability over the vocabulary. In standard deviations, of either sign. Raises ValueError if one is
    empty, lengths differ, or `mean` or `variance` is not finite.
    """
    scores = token_scores(logprob)
    moments = np.asarray(mean, dtype=np.float64), np.asarray(variance, dtype=np.float64)
    for name, array in zip(("mean", "variance"), moments, strict=True):
        _same_length(scores, array, name)
        if not np.isfinite(array).all():
            raise ValueError(f"{name} is not finite")
    return _lowest((scores - moments[0]) / np.sqrt(np.maximum(moments[1], VARIANCE_FLOOR)), k)


def _same_length(scores: NDArray[np.float64], other: NDArray[np.float64], name: str) -> None:
    if other.shape != scores.shape:
        raise ValueError(f"{name} has shape {other.shape}, logprob {scores.shape}: score the same tokens")


def recall(logprob_plain: ArrayLike, logprob_prefixed: ArrayLike) -> float:
    """ReCaLL, LL(x | P) / LL(x): at least 0, 1 = the prefix changes nothing; larger = likelier a member.

    Both have shape [T], nats, over the same tokens of x, without and with the non-member prefix P. Both
    log-likelihoods are kept at least 1e-6 nats below 0, so that a certain model gives no division by zero.
    Raises ValueError if either is empty or lengths differ.
    """
    plain = token_scores(logprob_plain, "logprob_plain")
    prefixed = token_scores(logprob_prefixed, "logprob_prefixed")
    _same_length(plain, prefixed, "logprob_prefixed")
    return float(max(-prefixed.sum(), LIKELIHOOD_FLOOR) / max(-plain.sum(), LIKELIHOOD_FLOOR))


def reference_ratio(logprob: ArrayLike, logprob_reference: ArrayLike) -> float:
    """Mean log-likelihood ratio to a reference model: nats per token, any sign; larger = likelier a member.

    Both have shape [T], over the same tokens. Raises ValueError if either is empty or lengths differ.
    """
    target = token_scores(logprob)
    reference = token_scores(logprob_reference, "logprob_reference")
    _same_length(target, reference, "logprob_reference")
    return float((target - reference).mean())


class PrivLeak(NamedTuple):
    """PrivLeak and the range it could have had, in percent; `value` is NaN where `reason` is not empty."""

    value: float
    lower: float
    upper: float
    reason: str


def _area(value: float, name: str) -> float:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} is {value!r}, outside [0, 1]")
    return float(value)


def privleak_bounds(auc_reference: float = 0.5) -> tuple[float, float]:
    """Smallest and largest PrivLeak that an AUC in [0, 1] can give against this reference, in percent.

    -100 at AUC = 1 and 100 AUC_ref / (1 - AUC_ref) at AUC = 0 (infinite for a reference of 1). Raises
    ValueError outside [0, 1].
    """
    reference = _area(auc_reference, "auc_reference")
    return -100.0, 100.0 * reference / (1.0 - reference) if reference < 1.0 else math.inf


def privleak(auc: float, auc_reference: float = 0.5) -> PrivLeak:
    """MUSE's PrivLeak, ((1-AUC) - (1-AUC_ref)) / (1-AUC_ref) * 100, percent; 0 = like the retrained model.

    `auc` is that of forget (positive) against holdout under the target, with a score that is larger for
    members; `auc_reference` the same under a retrained model, 0.5 if there is none. **Negative: the forget
    set still looks like training data; positive: it looks less seen than unseen text (over-unlearned).**
    The range is lopsided and grows without bound as AUC_ref nears 1, so it comes with its bounds, and no
    value is given where 1 - AUC_ref < 0.05: there the split separates by itself, and dividing by so little
    turns noise into thousands of percent (5215 has been reported). Differs from open-unlearning, which adds
    1e-10 to the denominator, by less than 1e-5 percent. Raises ValueError outside [0, 1].
    """
    area, reference = _area(auc, "auc"), _area(auc_reference, "auc_reference")
    lower, upper = privleak_bounds(reference)
    if 1.0 - reference < PRIVLEAK_MARGIN:
        reason = (
            f"the reference model already separates forget from holdout (AUC {reference:.3f}): "
            f"PrivLeak would divide by {1.0 - reference:.3f}"
        )
        return PrivLeak(math.nan, lower, upper, reason)
    return PrivLeak(100.0 * (reference - area) / (1.0 - reference), lower, upper, "")


# --- instrument ---------------------------------------------------------------------------------------------

_PREFIX_ROWS = 3


def _statistic(name: str, reference: str) -> Statistic:
    return Statistic(name, f"{ATTACKS[name]} ({name})", "score", _ORIENTATION, None, 0.1, reference, (False, False))


_ORIENTATION = "forget texts look more like training data than holdout texts do"
STATISTICS = {
    name: _statistic(name, reference)
    for name, reference in {
        "loss": "Yeom et al. 2018, arXiv 1709.01604",
        "zlib": "Carlini et al. 2021, arXiv 2012.07805",
        "min_k": "Shi et al. 2024, arXiv 2310.16789, k = 0.2",
        "min_k_plus_plus": "Zhang et al. 2025, arXiv 2404.02936, k = 0.2",
        "recall": "Xie et al. 2024, arXiv 2406.15968",
        "reference": "Carlini et al. 2021, arXiv 2012.07805; the retrained model is the reference",
    }.items()
}


class Membership(Instrument):
    """Does the likelihood tell forgotten texts from texts never seen?"""

    name = "membership"
    title = "Does the model give away what it was trained on?"
    question = Question.LEAKAGE
    access = Access.LOGPROBS
    spares: ClassVar = {"min_k_plus_plus": MOMENTS}
    sets = ("forget", "holdout")
    reference = "MUSE (Shi et al. 2025, arXiv 2407.06460), section 3, and the attack of each finding"

    def requests(self, case: Case, target: Target) -> list[Request | Generate]:
        """Answers scored with the moments Min-K++ needs, and again after a prefix of non-members."""
        sets = asking.compared(case, target.role)
        if not sets:
            return []
        prefix, rows = _split_prefix(case)
        return [
            *asking.answers(case, target, sets, (TOKEN, MOMENTS)),
            *(
                Request(
                    f"{name}/prefixed",
                    tuple(target.encode(_join(prefix, r.prompt), r.answer) for r in rows[name]),
                )
                for name in sets
            ),
        ]

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """An AUC per attack, each beside the bag-of-words control, and PrivLeak."""
        seed = case.options.seed
        rows = {name: case.rows(name) for name in asking.compared(case, "target")}
        _, unprefixed = _split_prefix(case)
        texts = {name: [f"{r.prompt} {r.answer}" for r in rows[name]] for name in rows}
        clusters = {name: case.clusters(rows[name]) for name in rows}
        separable = bag_of_words_control(texts, clusters, seed=seed)

        whole = all(MOMENTS in evidence.quantities(role, "forget/answer") for role in case.models)

        def values(role: str, name: str) -> list[Any]:
            return evidence.scores(role, f"{name}/answer", "token", *(["moments"] if whole else []))

        def compute(attack: str, role: str, name: str) -> NDArray[np.float64]:
            of_row: Any = {
                "loss": lambda v, _: loss_score(v["logprob"]),
                "zlib": lambda v, r: zlib_score(v["logprob"], r.answer),
                "min_k": lambda v, _: min_k(v["logprob"]),
                "min_k_40": lambda v, _: min_k(v["logprob"], 0.4),
                "min_k_plus_plus": lambda v, _: min_k_plus_plus(v["logprob"], v["mean"], v["variance"]),
            }[attack]
            return np.array([of_row(v, r) for v, r in zip(values(role, name), rows[name], strict=True)])

        def recalled(role: str, name: str) -> NDArray[np.float64]:
            keep = {row.id for row in unprefixed[name]}
            plain = [v for v, r in zip(asking.logprobs(evidence, role, f"{name}/answer"), rows[name], strict=True)
                     if r.id in keep]  # fmt: skip
            return np.array(
                [recall(a, b) for a, b in zip(plain, asking.logprobs(evidence, role, f"{name}/prefixed"), strict=True)]
            )

        contrast = partial(against_never_taught, self, case, evidence, auc=True, subtract=False)
        found: list[Finding] = []
        for attack in ("loss", "zlib", "min_k", *(["min_k_plus_plus"] if whole else [])):
            extra = [separable, *retrained_control(case, partial(compute, attack))]
            found.append(contrast(STATISTICS[attack], partial(compute, attack), extra=extra))
        found.append(contrast(STATISTICS["recall"], recalled, rows=unprefixed, extra=[separable]))
        if "retrained" in case.models:

            def ratio(role: str, name: str) -> NDArray[np.float64]:
                return compute("loss", role, name) - compute("loss", "retrained", name)

            found.append(contrast(STATISTICS["reference"], ratio, extra=[separable]))
        found.append(self._privleak(contrast, partial(compute, "min_k_40"), case, separable))
        return found

    def _privleak(self, contrast: Any, score: Any, case: Case, separable: Control) -> Finding:
        """The Min-K 40 % AUC on MUSE's scale: its interval and test are the AUC's."""
        retrained = retrained_control(case, score)
        reference = float(retrained[0].estimate or 0.5) if retrained else 0.5
        base: Finding = contrast(_statistic("min_k", "MUSE, section 3"), score, extra=[separable, *retrained])
        leak = privleak(float(base.estimate or 0.0), reference)
        ends = [privleak(float(end or 0.0), reference).value for end in base.ci95]
        if leak.reason:
            base.controls.append(
                Control(
                    name="reference AUC",
                    description=leak.reason,
                    estimate=reference,
                    passed=False,
                    gates="evidence",
                )
            )
        return base.model_copy(
            update={
                "id": f"{self.name}/privleak",
                "statistic": "PrivLeak (Min-K 40 % AUC against the retrained model's, or 0.5 without one)",
                "estimate": leak.value if math.isfinite(leak.value) else None,
                "ci95": tuple(sorted(ends)) if all(map(math.isfinite, ends)) else (None, None),
                "unit": f"% ({leak.lower:.0f} to {leak.upper:.0f})",
                "orientation": "forget texts look less like training data (negative: they still look like it)",
                "null": "forget and holdout rows are equally likely to look like training data",
                "null_value": 0.0,
                "threshold": 20.0,
                "sides": (Side.BEYOND, Side.REMAINS),
            }
        )


def _split_prefix(case: Case) -> tuple[str, dict[str, tuple[Example, ...]]]:
    """ReCaLL's non-member prefix, from one holdout entity, and the rows left to test: none of that entity's."""
    rows = {name: case.rows(name) for name in asking.compared(case, "target")}
    holdout = rows["holdout"]
    chosen = case.clusters(holdout)[-1]
    donors = [r for r, c in zip(holdout, case.clusters(holdout), strict=True) if c == chosen]
    rest = tuple(r for r, c in zip(holdout, case.clusters(holdout), strict=True) if c != chosen)
    prefix = "\n".join(" ".join(f"{r.prompt} {r.answer}".split()) for r in donors[:_PREFIX_ROWS])
    return prefix, {**rows, "holdout": rest}


def _join(prefix: str, prompt: str) -> str:
    return f"{prefix}\n{prompt}" if prompt else prefix
