"""Is a comparison of two sets valid at all? Controls that look at the words alone, or where nothing was taught.

A membership or forgetting score that separates two sets shows nothing if a bag-of-words classifier separates
them as well: then the sets differ in topic, date or style, not only in what the model was taught (Duan et al.
2024; Meeus et al. 2024; Das et al. 2024). `bag_of_words_auc` measures how well it does; near 0.5 the split is
fair, and an instrument's own AUC must be read against it.

scikit-learn is imported only when one of the functions is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from audit.record import Control
from audit.statistics import Estimate, Seed, auc_two_sample, cluster_index

if TYPE_CHECKING:
    from audit.case import Case

FOLDS = 5
SEPARABLE = 0.1
"""How far from one half an AUC may lie that has nothing to do with what was taught, before a split counts as unfair."""

SAW_NEITHER = "the same attack on the model that saw neither set: what it finds is the split, not memory"

FEWEST_CLUSTERS = 4  # in each set; with fewer, no classifier can be trained and tested on different ones


def grouped_folds(
    clusters: ArrayLike, labels: ArrayLike, k: int = FOLDS, *, seed: Seed
) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """(train, test) row indices of at most `k` folds, stratified by label, no cluster in both.

    `clusters`, `labels`: [n]. Every row is tested once; fewer folds where a label has fewer clusters.
    Raises `ValueError` where a label has a single cluster, or no split leaves every label to train on.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    groups = cluster_index(clusters, np.size(clusters), "clusters")
    classes = cluster_index(labels, len(groups), "labels")
    if k < 2 or not len(groups):
        raise ValueError(f"k must be at least 2, got {k}" if len(groups) else "clusters is empty")
    k = min(k, *(len(np.unique(groups[classes == label])) for label in np.unique(classes)), len(groups))
    if k < 2:
        raise ValueError("clusters: a label has a single cluster, which cannot be both trained and tested on")
    state = int(np.random.default_rng(seed).integers(2**31))
    splitter = StratifiedGroupKFold(n_splits=k, shuffle=True, random_state=state)
    folds = [(train, test) for train, test in splitter.split(groups, classes, groups) if len(test)]
    if any(len(np.unique(classes[train])) < classes.max() + 1 for train, _ in folds):
        raise ValueError("clusters leave a fold without rows of some label to train on")
    return folds


def bag_of_words_auc(
    texts_a: Sequence[str],
    texts_b: Sequence[str],
    clusters_a: ArrayLike,
    clusters_b: ArrayLike,
    *,
    seed: Seed,
) -> Estimate:
    """AUC with which words and word pairs tell texts a (positive) from texts b.

    TF-IDF and logistic regression, fitted on other clusters than it scores; interval and p-value from
    `auc_two_sample` on the out-of-fold scores, as if these were fixed. They are not: each was learned from
    the rest, so that on identical sets of 20 + 20 clusters about 1 in 6 has p < 0.05, with an AUC on either
    side of 0.5. The control errs towards calling a fair split unfair. An AUC well below 0.5 is no
    separation.

    With fewer than 4 clusters in a set: all NaN, p None. Labels are local to their set, as in
    `audit.statistics`. Words are runs of letters and digits: in scripts without spaces a whole sentence is
    one word, and the control is weak.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    for name, texts in (("texts_a", texts_a), ("texts_b", texts_b)):
        if len(texts) == 0:
            raise ValueError(f"{name} is empty")
    a = cluster_index(clusters_a, len(texts_a), "clusters_a")
    b = cluster_index(clusters_b, len(texts_b), "clusters_b")
    n = int(a.max() + 1 + b.max() + 1)
    if min(a.max(), b.max()) + 1 < FEWEST_CLUSTERS:
        return Estimate(math.nan, math.nan, math.nan, None, n, 1.0)
    rows = np.array([*texts_a, *texts_b], dtype=object)
    labels = np.repeat([1, 0], [len(a), len(b)])
    rng = np.random.default_rng(seed)
    scores = np.zeros(len(rows))
    for train, test in grouped_folds(np.concatenate([a, a.max() + 1 + b]), labels, seed=rng):
        if not any(any(c.isalnum() for c in text) for text in rows[train]):
            continue  # not a word to learn from: nothing told apart
        model = make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+"),
            LogisticRegression(class_weight="balanced", max_iter=1000),
        )
        scores[test] = model.fit(rows[train], labels[train]).decision_function(rows[test])
    return auc_two_sample(scores[labels == 1], scores[labels == 0], a, b, seed=rng)


def bag_of_words_control(
    texts: Mapping[str, Sequence[str]], clusters: Mapping[str, ArrayLike], *, seed: Seed
) -> Control:
    """The control that forbids evidence where words alone tell forget from holdout texts.

    `texts` and `clusters`: by set, `forget` and `holdout` among them.
    """
    words = bag_of_words_auc(texts["forget"], texts["holdout"], clusters["forget"], clusters["holdout"], seed=seed)
    return Control(
        name="bag of words",
        description="do the words alone, without any model, tell forget from holdout? (AUC, must stay near 0.5)",
        estimate=words.value,
        ci95=(words.lo, words.hi),
        n=words.n,
        # A pooled out-of-fold AUC lies below one half by chance where nothing separates: only above counts.
        passed=not (words.lo > 0.5 and words.value > 0.5 + SEPARABLE),
        gates="evidence",
    )


def untaught_control(name: str, description: str, area: Estimate) -> Control:
    """The control that forbids evidence where a score tells forget from holdout though nothing was taught, by AUC."""
    return Control(
        name=name,
        description=description,
        estimate=area.value,
        ci95=(area.lo, area.hi),
        n=area.n,
        passed=area.lo <= 0.5 <= area.hi or abs(area.value - 0.5) < SEPARABLE,
        gates="evidence",
    )


def retrained_control(case: Case, score: Callable[[str, str], ArrayLike]) -> list[Control]:
    """The same score, by role and set, under the retrained model, if there is one."""
    if "retrained" not in case.models:
        return []
    rows = [score("retrained", name) for name in ("forget", "holdout")]
    clusters = [case.clusters(case.rows(name)) for name in ("forget", "holdout")]
    area = auc_two_sample(*rows, *clusters, seed=case.options.seed)
    return [untaught_control("retrained model", SAW_NEITHER, area)]
