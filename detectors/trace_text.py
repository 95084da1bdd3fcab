"""Trace in answers alone: was this model unlearned, or only edited, or neither?

What is measured: greedy answers to prompts that have nothing to do with the forget set, and to all, of the target and,
where there is one, of the original: how many changed, how alike letter by letter they still are, how often one and the
same answer is given, how often one declines, how long they are, and how well a classifier on letters (TF-IDF of 1- to
4-grams), or on an encoder's vectors, tells the target's answers from the original's on prompts that it did not see (the
published setting). These numbers are judged by a classifier trained on models of known history.

Source: Chen et al. 2025 (arXiv 2506.14003), section 3, with an encoder of 8 B parameters. None is assumed here; give
`text_features` any `encode: texts -> vectors`.

Traps:

- *Edited is not unlearned*, and the others of `trace-logits`.
- *Answers say least*: a model that was edited lightly gives the same ones.
- *No null without weights*: then nothing is concluded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from audit.case import Case
from audit.controls import grouped_folds
from audit.evidence import Evidence
from audit.instrument import Access, Instrument
from audit.loaders import Example
from audit.plan import Generate
from audit.record import Finding, Question
from detectors.fingerprint import CONTRASTS, SETS, Features
from detectors.tracing import SOURCE, Use, asked_sets, is_edit_of_original, trace_findings

if TYPE_CHECKING:
    from audit.target import Target

__all__ = ["TraceText", "text_features", "told_apart"]

NEW_TOKENS = 12
REFUSALS = ("unknown", "i don't know", "i do not know", "not sure", "cannot", "can't", "no information", "sorry")

Encode = Callable[[Sequence[str]], ArrayLike]


def told_apart(ours: Sequence[str], theirs: Sequence[str], clusters: ArrayLike, encode: Encode | None = None) -> float:
    """Accuracy, 0 to 1, with which answers to prompts held out are told to be one model's or the other's.

    Args:
        ours, theirs: answers [n] of two models to the same prompts.
        clusters: entities [n]; none is in training and test.
        encode: texts to vectors [., d]; TF-IDF of characters if not given.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    if not len(ours) == len(theirs) == np.size(clusters) > 0:
        raise ValueError(f"ours holds {len(ours)} answers, theirs {len(theirs)}, clusters {np.size(clusters)} names")
    texts = np.array([*ours, *theirs], dtype=object)
    vectors = None if encode is None else np.asarray(encode(list(texts)))
    y = np.repeat([0, 1], len(ours))
    right = 0.0
    for train, test in grouped_folds(np.tile(np.asarray(clusters), 2), y, seed=0):
        if vectors is None:
            tfidf = TfidfVectorizer(analyzer="char", ngram_range=(1, 4), token_pattern=None)
            try:
                x_train = tfidf.fit_transform(texts[train])
            except ValueError:  # not a letter in any answer: nothing tells them apart
                right += len(test) / 2
                continue
            x_test = tfidf.transform(texts[test])
        else:
            x_train, x_test = vectors[train], vectors[test]
        right += int((LogisticRegression(max_iter=500).fit(x_train, y[train]).predict(x_test) == y[test]).sum())
    return right / len(texts)


def text_features(
    target: Mapping[str, Sequence[str]],
    original: Mapping[str, Sequence[str]] | None = None,
    clusters: Mapping[str, ArrayLike] | None = None,
    encode: Encode | None = None,
) -> Features:
    """Numbers of answers, by set of prompts: `text.retain.changed`, `text.forget-retain.changed`, ...

    Args:
        target: answers by set.
        original: the answers to the same prompts of the model before; without it, numbers of the target alone.
        clusters: the entity of every prompt [n], by set; for how well they are told apart.
    """
    found: Features = {}
    for name in (name for name in SETS if name in target):
        ours = [text.strip() for text in target[name]]
        prefix = f"text.{name}" if original is not None else f"alone.text-{name}"
        found |= {f"{prefix}.{key}": value for key, value in _of_one(ours).items()}
        if original is not None:
            theirs = [text.strip() for text in original[name]]
            before = _of_one(theirs)
            found |= {f"{prefix}.more-{key}": found[f"{prefix}.{key}"] - value for key, value in before.items()}
            found[f"{prefix}.changed"] = float(np.mean([a != b for a, b in zip(ours, theirs, strict=True)]))
            pairs = [SequenceMatcher(None, a, b, autojunk=False) for a, b in zip(ours, theirs, strict=True)]
            found[f"{prefix}.likeness"] = float(np.mean([pair.ratio() for pair in pairs]))
            if clusters is not None:
                found[f"{prefix}.told-apart"] = told_apart(ours, theirs, clusters[name], encode)
    for one, other in CONTRASTS:
        if original is not None and one in target and other in target:
            for key in ("changed", "likeness", "same-answer"):
                found[f"text.{one}-{other}.{key}"] = found[f"text.{one}.{key}"] - found[f"text.{other}.{key}"]
    return found


def _of_one(answers: Sequence[str]) -> Features:
    lower = [text.lower() for text in answers]
    return {
        "same-answer": Counter(lower).most_common(1)[0][1] / len(lower),
        "answers": len(set(lower)) / len(lower),
        "refusals": float(np.mean([any(word in text for word in REFUSALS) for text in lower])),
        "length": float(np.log1p(np.mean([len(text) for text in answers]))),
    }


class TraceText(Instrument):
    """Do answers bear the marks of unlearning?"""

    name = "trace-text"
    title = "Was it unlearned, by its answers?"
    question = Question.TRACE
    access = Access.TEXT
    sets = ("retain",)
    watches = ("trace",)
    reference = SOURCE

    def requests(self, case: Case, target: Target) -> list[Generate]:
        """Answers to the prompts of every set."""
        if not (is_edit_of_original(target.role) or target.role == "original"):
            return []
        return [
            Generate(
                f"trace-text/{name}",
                tuple(target.encode_prompt(row.prompt, room=NEW_TOKENS) for row in _rows(case, name)),
                NEW_TOKENS,
            )
            for name in asked_sets(case)
        ]

    def features(self, case: Case, evidence: Evidence, role: str, use: Use) -> Features:
        """The numbers of one role, from the rows to use of every set."""

        def answers(one: str) -> dict[str, list[str]]:
            return {name: _kept(evidence.texts(one, f"trace-text/{name}"), kept) for name, kept in use.items()}

        if "original" not in case.models:
            return text_features(answers(role))
        clusters = {name: _kept(case.clusters(_rows(case, name)), kept) for name, kept in use.items()}
        return text_features(answers(role), answers("original"), clusters)

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """On prompts that have nothing to do with the forget set, and on all."""
        rows = {name: _rows(case, name) for name in asked_sets(case)}
        return trace_findings(self, case, evidence, "fingerprint in answers", rows, self.features)


def _rows(case: Case, name: str) -> tuple[Example, ...]:
    """Fewer than are scored: an answer costs a pass a token."""
    return case.rows(name, {"quick": 40, "standard": 60, "thorough": 120}[case.options.budget.value])


def _kept(values: Sequence[str], kept: NDArray[np.bool_]) -> list[str]:
    return [value for value, keep in zip(values, kept, strict=True) if keep]
