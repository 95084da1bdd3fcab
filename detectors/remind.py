"""REMIND: does the loss landscape around a text still tell forgotten, retained and unseen apart?

A text that was learned sits in a dent of the loss, and unlearning leaves a different dent. For each text:

1. *neighbours*: replace a fraction of its tokens by others whose input embeddings are close (cosine);
2. *losses*: mean negative log-likelihood L_0 of the text and L_i of each neighbour i;
3. *features*: 15 numbers of (L_0, L_i, d_i), see `remind_features`;
4. *classifier*: logistic regression or random forest into retain, holdout, forget; AUC, one against the rest.

Source: "REMIND", arXiv 2511.04228 (ACL 2026), with its settings: 15 neighbours, the 20 nearest tokens, 0.3
of the positions. The official code is not public in full: the formulas of gradient, curvature and volatility,
and the distance between two texts, are Palimpsest's own and stated below; published numbers may differ.

Traps:

- *The paper's baselines could not win.* The mean of three one-against-the-rest AUCs of one raw score is 0.5
  by identity when the classes are of equal size (each pair of classes enters once as P(a > b) and once as
  P(b > a)). `classify_score` gives a one-number baseline the same classifier, on `score_features`.
- *The split.* Retain, holdout and forget sets often differ in their source (papers against quiz questions).
  A bag of words, or the original model's features, must not reach the same AUC.
- *Fitting on the test set.* The published scaling uses all rows. Here everything that is fitted, including
  the scaler and the bins of `score_features`, is fitted on the training folds alone, and the folds keep
  clusters (entities, documents) whole.
- *It needs labels.* It says that the sets can be told apart in this model, not which text was forgotten in
  one without labelled examples; and "forget differs from holdout" is an edit's trace, not knowledge left.
- *15 features hold fewer numbers*: increment_variance is loss_variance (L_0 is a constant), loss_std its
  root, and each increment a neighbour loss less L_0. They are kept to be the paper's; do not read weights.
- *Pooled out-of-fold AUC* falls a little below 0.5 when there is nothing to find: compare with permuted
  labels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from audit.case import Case
from audit.contrast import Statistic, against_never_taught
from audit.controls import bag_of_words_control, grouped_folds
from audit.errors import BadInput
from audit.evidence import Evidence
from audit.instrument import Access, Instrument
from audit.loaders import Example
from audit.plan import Request
from audit.record import Control, Finding, Question, Table
from audit.statistics import tpr_at_fpr
from audit.tokens import Tokens
from detectors.neighbours import Floats, Integers, nearest_tokens, perturb

if TYPE_CHECKING:
    from audit.target import Target

__all__ = [
    "FEATURES", "Remind", "classifier", "classify", "classify_score", "known_likeness", "multiclass_auc",
    "nearest_tokens", "perturb", "remind_features", "score_features",
]  # fmt: skip

FEATURES: tuple[str, ...] = (
    "original_loss",
    "mean_neighbor_loss",
    "max_neighbor_loss",
    "min_neighbor_loss",
    "loss_variance",
    "loss_std",
    "increment_variance",
    "mean_gradient",
    "max_gradient",
    "gradient_variance",
    "loss_volatility",
    "local_curvature",
    "mean_loss_increment",
    "max_loss_increment",
    "min_loss_increment",
)
"""Names of the columns that `remind_features` returns, in order."""

DISTANCE_FLOOR = 1e-3
"""Smallest distance that gradient and curvature divide by: tokens never trained can share one embedding."""

Model = Literal["logistic", "forest"]


# --- features -----------------------------------------------------------------------------------------------


def remind_features(loss0: float, losses: ArrayLike, distances: ArrayLike) -> Floats:
    """The 15 features of one text, in the order of `FEATURES`: shape [15], nats and nats per distance.

    `loss0` is the text's own loss L_0, `losses` [n] those of its neighbours, `distances` [n] theirs from it,
    floored at 1e-3. With inc_i = L_i - L_0, g_i = |inc_i| / d_i, and all variances and deviations those of
    the population (divided by n):

    - original_loss L_0; mean, max, min of L_i; variance and standard deviation of L_i
    - increment_variance: variance of inc_i, which is that of L_i
    - mean, max, variance of g_i
    - loss_volatility: standard deviation of the successive differences of L_i sorted by d_i (equal d_i by
      L_i); 0 for fewer than 3 neighbours
    - local_curvature: mean of 2 inc_i / d_i**2, the second derivative if L_0 were a minimum
    - mean, max, min of inc_i

    The order of the neighbours does not matter. Raises ValueError if `losses` is empty, shapes differ, a
    number is not finite, or a distance is negative.
    """
    values = np.asarray(losses, dtype=np.float64)
    d = np.asarray(distances, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"losses must be a non-empty 1-D array, got shape {values.shape}")
    if d.shape != values.shape:
        raise ValueError(f"distances has shape {d.shape}, losses {values.shape}")
    for name, array in (("loss0", np.asarray(loss0)), ("losses", values), ("distances", d)):
        if not np.isfinite(array).all():
            raise ValueError(f"{name} is not finite")
    if d.min() < 0:
        raise ValueError("distances must not be negative")
    order = np.lexsort((values, d))
    values, d = values[order], np.maximum(d[order], DISTANCE_FLOOR)
    increment = values - loss0
    gradient = np.abs(increment) / d
    jumps = np.diff(values)
    return np.array(
        [
            loss0,
            values.mean(),
            values.max(),
            values.min(),
            values.var(),
            values.std(),
            increment.var(),
            gradient.mean(),
            gradient.max(),
            gradient.var(),
            jumps.std() if jumps.size else 0.0,
            (2.0 * increment / d**2).mean(),
            increment.mean(),
            increment.max(),
            increment.min(),
        ]
    )


def score_features(score: ArrayLike, reference: ArrayLike | None = None, bins: int = 10) -> Floats:
    """A one-number score expanded so that a linear classifier can bend and jump along it: [n, 3 + bins].

    Columns: z, z**2, z**3 of the standardised score (cut at 5 deviations), then one-hot quantile bins. Mean,
    deviation and bin edges come from `reference` [m] (the training rows), or from `score` [n] itself. Raises
    ValueError if either is empty or not finite.
    """
    values = np.asarray(score, dtype=np.float64)
    base = values if reference is None else np.asarray(reference, dtype=np.float64)
    for name, array in (("score", values), ("reference", base)):
        if array.ndim != 1 or array.size == 0:
            raise ValueError(f"{name} must be a non-empty 1-D array, got shape {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} is not finite")
    z = np.clip((values - base.mean()) / (base.std() or 1.0), -5.0, 5.0)
    edges = np.quantile(base, np.arange(1, bins) / bins)
    one_hot = np.eye(bins)[np.searchsorted(edges, values, side="right")]
    return np.column_stack([z, z**2, z**3, one_hot])


# --- classification -----------------------------------------------------------------------------------------


def classify(
    features: ArrayLike,
    labels: ArrayLike,
    clusters: ArrayLike,
    *,
    seed: int = 0,
    folds: int = 5,
    model: Model = "logistic",
) -> Floats:
    """Out-of-fold class probabilities: [n, classes], columns in the order of np.unique(labels).

    `features` has shape [n, p]; `labels` and `clusters` [n]. Each row is judged by a classifier that saw no
    row of its cluster (entity, document), stratified by label; the scaler is fitted inside the fold.
    "logistic": standardised, LogisticRegression(max_iter=300); "forest": 100 trees. With fewer clusters than
    `folds` in some class, there are as many folds as that class has clusters. Raises ValueError for shapes
    that do not fit, non-finite features, fewer than two classes, a class in a single cluster (it could not
    be both learned and tested), or a split that leaves a class out of training.
    """
    matrix = np.asarray(features, dtype=np.float64)
    if matrix.ndim != 2 or matrix.size == 0:
        raise ValueError(f"features must be a non-empty [n, p] array, got shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise ValueError("features is not finite")
    return _out_of_fold(
        lambda train, rows: (matrix[train], matrix[rows]), len(matrix), labels, clusters, seed, folds, model
    )


def classify_score(
    score: ArrayLike,
    labels: ArrayLike,
    clusters: ArrayLike,
    *,
    seed: int = 0,
    folds: int = 5,
    model: Model = "logistic",
) -> Floats:
    """`classify` for a baseline of one number per text, `score` [n], expanded by `score_features`.

    The expansion's location, scale and bins are taken from the training folds.
    """
    values = np.asarray(score, dtype=np.float64)
    score_features(values)  # the same checks, before any split
    return _out_of_fold(
        lambda train, rows: (score_features(values[train]), score_features(values[rows], values[train])),
        len(values),
        labels,
        clusters,
        seed,
        folds,
        model,
    )


def _out_of_fold(
    split: Callable[[Integers, Integers], tuple[Floats, Floats]],
    n: int,
    labels: ArrayLike,
    clusters: ArrayLike,
    seed: int,
    folds: int,
    model: Model,
) -> Floats:
    """`split` makes (training, test) features from row numbers: whatever it fits, it fits on the first."""
    y, groups = np.asarray(labels), np.asarray(clusters)
    for name, array in (("labels", y), ("clusters", groups)):
        if array.shape != (n,):
            raise ValueError(f"{name} has shape {array.shape}, but there are {n} rows")
    classes, codes = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        raise ValueError("labels holds a single class")
    smallest = min(len(np.unique(groups[codes == c])) for c in range(len(classes)))
    if smallest < 2:
        raise ValueError("clusters: some class lies in one cluster, and cannot be both learned and tested")
    if folds < 2:
        raise ValueError(f"folds is {folds}: at least 2 are needed")
    splitter = StratifiedGroupKFold(min(folds, smallest), shuffle=True, random_state=seed)
    probabilities = np.zeros((n, len(classes)))
    for train, rows in splitter.split(np.zeros((n, 1)), codes, groups):
        if len(rows) == 0:  # clusters of very uneven size can leave a fold empty
            continue
        if len(np.unique(codes[train])) < len(classes):
            raise ValueError("clusters are too uneven: a split leaves a class out of training")
        inside, outside = split(train, rows)
        # Matrices this small gain nothing from BLAS threads, and on a busy machine lose a factor of ten.
        with threadpool_limits(1):
            fitted = classifier(model, seed).fit(inside, codes[train])
            probabilities[rows] = fitted.predict_proba(outside)
    return probabilities


def classifier(model: Model = "logistic", seed: int = 0) -> Any:
    """The scikit-learn estimator that `classify` fits, unfitted: features [n, p], labels [n].

    "logistic": a pipeline of StandardScaler and LogisticRegression(max_iter=300); "forest": 100 trees, drawn by `seed`.
    Raises ValueError for another name.
    """
    if model == "logistic":
        return make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    if model == "forest":
        return RandomForestClassifier(100, random_state=seed)
    raise ValueError(f"model is {model!r}: 'logistic' or 'forest'")


def multiclass_auc(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Macro mean of the one-against-the-rest ROC AUCs: in [0, 1], 0.5 = chance, larger = better told apart.

    `probabilities` has shape [n, classes] (any per-class score will do: only its order counts), columns in
    the order of np.unique(`labels`). Raises ValueError if they are empty, do not fit, or there is one class.
    """
    scores, y = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    classes = np.unique(y)
    if not np.isfinite(scores).all():
        raise ValueError("probabilities is not finite")
    if y.ndim != 1 or len(classes) < 2:
        raise ValueError("labels must be 1-D and hold at least two classes")
    if scores.shape != (len(y), len(classes)):
        raise ValueError(f"probabilities has shape {scores.shape}, expected {(len(y), len(classes))}")
    return float(np.mean([roc_auc_score(y == c, scores[:, j]) for j, c in enumerate(classes)]))


# --- instrument ---------------------------------------------------------------------------------------------

_SOURCE = "REMIND, arXiv 2511.04228 (ACL 2026), section 3"
_NEIGHBORS, _NEAREST, _FRACTION = 15, 20, 0.3
_SHORT = 5  # tokens: below it an answer alone has no neighbourhood to speak of, and the whole text is perturbed

KNOWN_LIKENESS = Statistic(
    "known-likeness", "REMIND: do forget texts have the neighbourhood of known texts?", "probability",
    "the loss around forget texts looks like that around retain texts", (0.0, 1.0), 0.1, _SOURCE, (False, False),
)  # fmt: skip


class Remind(Instrument):
    """Does the loss around forgotten texts still look like that around known ones?"""

    name = "remind"
    title = "Does the loss landscape remember?"
    question = Question.LEAKAGE
    access = Access.LOGPROBS
    sets = ("forget", "retain", "holdout")
    reference = _SOURCE

    def missing(self, case: Case) -> str | None:
        """Needs to know which tokens are near each other: of a folder the weights tell, and of nothing less."""
        lacking = super().missing(case)
        if lacking is None and case.options.access < Access.WEIGHTS and isinstance(case.models["target"], Path):
            return "needs the embeddings of tokens too, which access to logprobs of a folder leaves out"
        return lacking

    def requests(self, case: Case, target: Target) -> list[Request]:
        """Every text and its 15 neighbours; neighbours of one answer share their prompt's computation."""
        if target.role not in ("target", "original"):
            return []
        rows = self.rows(case)
        encoded = {name: [target.encode(r.prompt, r.answer) for r in examples] for name, examples in rows.items()}
        answers_alone = float(np.median([t.scored for texts in encoded.values() for t in texts])) >= _SHORT
        embedding = target.embedding().numpy()
        special = target.special_ids
        nearest = _Nearest(embedding, special, encoded)
        made = []
        for name, texts in encoded.items():
            rng = np.random.default_rng([case.options.seed, len(name)])
            sequences: list[Tokens] = []
            distances: list[Floats] = []
            for text in texts:
                start = text.start if answers_alone else 1
                allowed = [p for p in range(start, len(text.ids)) if text.ids[p] not in special]
                near, steps = nearest([text.ids[p] for p in allowed or [len(text.ids) - 1]])
                neighbors, lengths = perturb(
                    text.ids,
                    allowed or [len(text.ids) - 1],
                    near,
                    steps,
                    n=_NEIGHBORS,
                    fraction=_FRACTION,
                    rng=rng,
                )
                sequences += [Tokens(text.ids, start), *(Tokens(ids, start) for ids in neighbors)]
                distances.append(lengths)
            made.append(Request(f"remind/{name}", tuple(sequences), extra={"distances": np.array(distances)}))
        return made

    def rows(self, case: Case) -> dict[str, tuple[Example, ...]]:
        """As many rows of each set: a classifier that learns class sizes learns nothing."""
        limit = {"quick": 40, "standard": 120, "thorough": 400}[case.options.budget.value]
        size = min(limit, *(len(case.sets[name]) for name in self.sets))
        return {name: case.rows(name, size) for name in self.sets}

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """Known-likeness of the forget set (signed), with the published three-way AUC beside it."""
        rows = self.rows(case)
        clusters = {name: [f"{name}/{c}" for c in case.clusters(examples)] for name, examples in rows.items()}
        seed = case.options.seed
        try:
            features = {role: captured(evidence, role, rows) for role in ("target", "original") if role in case.models}
            likeness = known_likeness(features["target"], clusters, seed)
        except ValueError as error:
            raise BadInput(f"too few entities to train and test on different ones: {error}") from None
        labels = np.concatenate([[name] * len(x) for name, x in features["target"].items()])
        groups = np.concatenate([clusters[name] for name in features["target"]])
        table, controls = self._three_way(case, features, labels, groups, rows)
        finding = against_never_taught(
            self,
            case,
            evidence,
            KNOWN_LIKENESS,
            lambda _, name: likeness[name],
            rows=rows,
            roles=("target",),
            extra=controls,
        )
        return [finding.model_copy(update={"table": table})]

    def _three_way(
        self,
        case: Case,
        features: dict[str, dict[str, Floats]],
        labels: NDArray[Any],
        groups: NDArray[Any],
        rows: dict[str, tuple[Example, ...]],
    ) -> tuple[Table, list[Control]]:
        """The paper's classification, the same classifier on the loss alone, and on the original model's features."""
        seed = case.options.seed
        stacked = {role: np.concatenate(list(sets.values())) for role, sets in features.items()}
        probabilities = classify(stacked["target"], labels, groups, seed=seed)
        loss_alone = classify_score(stacked["target"][:, 0], labels, groups, seed=seed)
        lines: list[list[Any]] = [["REMIND, 15 features", *_three_way_row(probabilities, labels)]]
        lines.append(["loss alone, same classifier", *_three_way_row(loss_alone, labels)])
        if "original" in stacked:
            lines.append(
                [
                    "original model's features",
                    *_three_way_row(classify(stacked["original"], labels, groups, seed=seed), labels),
                ]
            )
        texts = {name: [f"{r.prompt} {r.answer}" for r in rows[name]] for name in ("forget", "holdout")}
        clusters = {name: case.clusters(rows[name]) for name in texts}
        control = bag_of_words_control(texts, clusters, seed=seed)
        lines.append(["words alone, forget vs holdout", control.estimate, None])
        columns = [
            "forget / holdout / retain told apart by",
            "AUC (macro, one against the rest)",
            "forget at 1 % FPR",
        ]
        return Table(columns=columns, rows=lines), [control]


def known_likeness(features: dict[str, Floats], clusters: dict[str, list[str]], seed: int) -> dict[str, Floats]:
    """Probability that a text is a known one, by a classifier trained on retain against holdout texts.

    `features` and `clusters` hold `forget`, `retain` and `holdout` rows. Every row, forget rows included, is judged
    by the one of five classifiers that saw neither it nor its entity, so that forget and holdout rows are treated
    alike and, in a model that saw neither, are exchangeable. Returns [rows] in [0, 1] for each set.
    """
    names = ("forget", "retain", "holdout")
    matrix = np.concatenate([features[name] for name in names])
    labels = np.concatenate([[name] * len(features[name]) for name in names])
    groups = np.concatenate([clusters[name] for name in names])
    out = np.zeros(len(matrix))
    for train, test in grouped_folds(groups, labels, seed=seed):
        known = train[labels[train] != "forget"]
        fitted = classifier("logistic", seed).fit(matrix[known], labels[known] == "retain")
        out[test] = fitted.predict_proba(matrix[test])[:, 1]
    return {name: out[labels == name] for name in names}


def captured(evidence: Evidence, role: str, rows: dict[str, tuple[Example, ...]]) -> dict[str, Floats]:
    """By set, the features [rows, 15] of the rows whose neighbourhoods were captured."""
    made = {}
    for name in rows:
        losses = np.array([-v["logprob"].mean() for v in evidence.iterate(role, f"remind/{name}", "token")])
        losses = losses.reshape(len(rows[name]), 1 + _NEIGHBORS)
        steps = evidence.extra(role, f"remind/{name}")["distances"]
        made[name] = np.array([remind_features(row[0], row[1:], d) for row, d in zip(losses, steps, strict=True)])
    return made


def _three_way_row(probabilities: Floats, labels: NDArray[Any]) -> list[float]:
    forget = probabilities[:, list(np.unique(labels)).index("forget")]
    return [
        multiclass_auc(probabilities, labels),
        tpr_at_fpr(forget[labels == "forget"], forget[labels != "forget"]),
    ]


class _Nearest:
    """Nearest tokens, looked up once for all tokens of the sets."""

    def __init__(self, embedding: NDArray[Any], special: frozenset[int], texts: dict[str, list[Tokens]]) -> None:
        self._wanted = np.array(sorted({i for many in texts.values() for text in many for i in text.ids}))
        barred = {i for i in special if i < len(embedding)}
        k = min(_NEAREST, len(embedding) - len(barred) - 1)
        self._ids, self._steps = nearest_tokens(embedding, self._wanted, k=k, exclude=barred)

    def __call__(self, ids: list[int]) -> tuple[Integers, Floats]:
        at = np.searchsorted(self._wanted, ids)
        return self._ids[at], self._steps[at]
