"""Fingerprints of a change: numbers that say how a model differs from its original, and a classifier of them.

    features = logit_features(target, original)            # dicts of log-probabilities by set
    judge = shipped_classifier(tuple(features))
    judge.score(features)                                   # log-odds of "unlearned" against "ordinarily edited"

Unlearning leaves traces, on prompts that have nothing to do with what was forgotten too (Chen et al. 2025, arXiv
2506.14003). But so does every edit: a classifier trained on unlearned models against their originals alone detects that
a model *was edited*. Here the other side is made of ordinary edits: further training, continual learning, noisy labels,
instruction tuning, quantization, pruning, distillation, and fine-tunes matched in place and size to every unlearned
model (`audit.matched`). Each number is free of the scale of width, vocabulary and depth, so that what was learned on
small models of known history can be asked about others.

The table of these models' fingerprints comes with the package; `python -m benchmarks.trace` makes it anew. Labels are
what was done to a model, and never what something says of it.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from audit.arrays import alike, finite

__all__ = [
    "CONTRASTS", "SETS", "STILL", "TABLE", "Classifier", "Features", "Floats", "Table", "coherence", "entropy",
    "held_out_scores", "inverse_stable_rank", "kl_divergence", "logit_features", "read_table", "shipped_classifier",
    "state_features", "write_table",
]  # fmt: skip

Floats = NDArray[np.float64]
Features = dict[str, float]

TABLE = Path(__file__).parent / "fingerprints.json.gz"
SETS = ("forget", "retain", "holdout", "utility")
CONTRASTS = (("forget", "retain"), ("forget", "holdout"), ("holdout", "retain"), ("utility", "retain"))

STILL = -10.0
"""The log-odds of a model that did not move."""

_FLOOR = 1e-9
_ABOVE = 1e-3  # how far above 0 a log-probability may lie from rounding
_ROUNDING = 1e-5
"""Share of their length by which states differ that nothing moved, if other texts lay beside theirs in a batch: some
1e-7 in float32. Of the models in the table none moved its states by less than 0.6 %, where it moved them at all."""
_FOLDS = 8
_DISTANCES = ("kl", "moved")
_REACH = 4.0  # standard deviations: beyond, a linear rule knows nothing, so it is not led further


# --- numbers ------------------------------------------------------------------------------------------------


def kl_divergence(p: ArrayLike, q: ArrayLike) -> Floats:
    """KL(p || q) in nats, [...], from log-probabilities [..., V]."""
    p, q = _logs(p, "p"), _logs(q, "q")
    alike(p, q, "p", "q")
    return np.asarray((np.exp(p) * (p - q)).sum(-1))


def entropy(p: ArrayLike) -> Floats:
    """Entropy in nats, [...], of log-probabilities [..., V]."""
    p = _logs(p, "p")
    return np.asarray(-(np.exp(p) * p).sum(-1))


def _logs(values: ArrayLike, name: str) -> Floats:
    logs = finite(values, name)
    if logs.max() > _ABOVE:
        raise ValueError(f"{name} holds {logs.max():g}: log-probabilities are at most 0")
    return logs


def coherence(shifts: ArrayLike) -> float:
    """Share, 0 to 1, of the squared length of shifts [n, d] that all of them have in common: n |mean|^2 / sum |.|^2."""
    x = finite(shifts, "shifts", 2)
    return float(len(x) * (x.mean(0) ** 2).sum() / max(float((x**2).sum()), _FLOOR**2))


def inverse_stable_rank(shifts: ArrayLike) -> float:
    """sigma_1^2 / sum sigma^2, 0 to 1, of shifts [n, d] less their mean: 1 if all lie along one line."""
    x = finite(shifts, "shifts", 2)
    x = x - x.mean(0)
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    return float(np.linalg.eigvalsh(gram)[-1] / max(float(np.trace(gram)), _FLOOR**2))


def logit_features(
    target: Mapping[str, ArrayLike],
    original: Mapping[str, ArrayLike] | None = None,
    right: Mapping[str, ArrayLike] | None = None,
) -> Features:
    """Numbers of next-token distributions, by set of prompts: `retain.kl`, `forget-retain.kl`, ...

    Args:
        target: log-probabilities [n, V] of each set's prompts, the same V everywhere.
        original: the same prompts' in the model before; without it, fewer numbers, of the target alone.
        right: index in V of the right token, [n], for `.right`: how much likelier it became.

    The logit shift is the difference of log-probabilities less its mean over V. With a prefix `alone.` for numbers of
    the target alone.
    """
    found: Features = {}
    middles: dict[str, Floats] = {}
    for name in SETS:
        if name not in target:
            continue
        b = np.asarray(target[name], dtype=np.float64)
        if original is None:
            found |= {f"alone.{name}.{key}": value for key, value in _of_one(b).items()}
            middles[name] = b.mean(0) - b.mean()
        else:
            a = np.asarray(original[name], dtype=np.float64)
            at = None if right is None else np.asarray(right[name])
            found |= {f"{name}.{key}": value for key, value in _of_shift(a, b, at).items()}
            shift = b - a
            middles[name] = shift.mean(0) - shift.mean()
    prefix, keys = ("alone.", ("entropy", "sure")) if original is None else ("", ("kl", "entropy", "first"))
    for one, other in CONTRASTS:
        if one in middles and other in middles:
            for key in keys:
                found[f"{prefix}{one}-{other}.{key}"] = found[f"{prefix}{one}.{key}"] - found[f"{prefix}{other}.{key}"]
            found[f"{prefix}{one}-{other}.cosine"] = _cosine(middles[one], middles[other])
    return found


def _of_shift(a: Floats, b: Floats, right: NDArray[Any] | None) -> Features:
    """Original [n, V], target [n, V]."""
    shift = b - a
    shift = shift - shift.mean(1, keepdims=True)
    every, first = np.arange(len(a)), a.argmax(1)
    divergence = kl_divergence(a, b)
    variance, middle = float((shift**2).mean()), shift.mean(0)
    found = {
        "kl": _log(divergence.mean()),
        "kl-asymmetry": _log(divergence.mean()) - _log(kl_divergence(b, a).mean()),
        "kl-spread": _log(divergence.std() / max(float(divergence.mean()), _FLOOR)),
        "entropy": float((entropy(b) - entropy(a)).mean()),
        "first": float((b[every, first] - a[every, first]).mean()),
        "flipped": float((b.argmax(1) != first).mean()),
        "least": float((b.min(1) - a.min(1)).mean()),
        "coherence": coherence(shift),
        "rank": inverse_stable_rank(shift),
        "kurtosis": _log((shift**4).mean() / max(variance**2, _FLOOR**2)),
        "skew": float((shift**3).mean() / max(variance**1.5, _FLOOR**2)),
        "words": _log((middle**2).sum() ** 2 / max(float((middle**4).sum()) * len(middle), _FLOOR**4)),
        "target-entropy": float(entropy(b).mean()),
        "target-sure": float(np.exp(b.max(1)).mean()),
    }
    if right is not None:
        found["right"] = float((b[every, right] - a[every, right]).mean())
    return found


def _of_one(b: Floats) -> Features:
    """Target [n, V], without an original."""
    centred = b - b.mean(1, keepdims=True)
    variance = max(float((centred**2).mean()), _FLOOR)
    common = np.bincount(b.argmax(1), minlength=b.shape[1]) / len(b)
    return {
        "entropy": float(entropy(b).mean()),
        "entropy-spread": float(entropy(b).std()),
        "sure": float(np.exp(b.max(1)).mean()),
        "same-answer": float(common.max()),
        "answers": float(entropy(np.log(common + _FLOOR))),
        "coherence": coherence(centred),
        "rank": inverse_stable_rank(centred),
        "spread": _log(np.sqrt(variance)),
        "skew": float((centred**3).mean() / variance**1.5),
        "kurtosis": _log((centred**4).mean() / variance**2),
    }


def state_features(target: Mapping[str, ArrayLike], original: Mapping[str, ArrayLike]) -> Features:
    """Numbers of how states moved, by set and depth: `retain.2.moved`, `forget-retain.2.moved`, ...

    A depth that moved by no more than rounding did not move: direction and size of that depend on how the texts were
    batched, and the logarithm would make of them differences as large as those of an edit.

    Args:
        target: states [n, depths, width] of each set's prompts, in the target.
        original: in the original, whose width and depth must be the same.
    """
    found: Features = {}
    for name in SETS:
        if name not in target:
            continue
        b, a = np.asarray(target[name], dtype=np.float64), np.asarray(original[name], dtype=np.float64)
        for depth in range(a.shape[1]):
            before, after = a[:, depth], b[:, depth]
            length = float(np.linalg.norm(before, axis=1).mean())
            if np.linalg.norm(after - before, axis=1).mean() < _ROUNDING * length:
                after = before
            moved = after - before
            found[f"{name}.{depth}.moved"] = _log(np.linalg.norm(moved, axis=1).mean() / length)
            found[f"{name}.{depth}.longer"] = _log(np.linalg.norm(after, axis=1).mean() / length)
            found[f"{name}.{depth}.coherence"] = coherence(moved)
            found[f"{name}.{depth}.rank"] = inverse_stable_rank(moved)
    for one, other in CONTRASTS:
        if one in target and other in target:
            for depth in range(np.asarray(target[one]).shape[1]):
                found[f"{one}-{other}.{depth}.moved"] = found[f"{one}.{depth}.moved"] - found[f"{other}.{depth}.moved"]
    return found


def _log(value: Any) -> float:
    return float(np.log(max(float(value), _FLOOR)))


def _cosine(a: Floats, b: Floats) -> float:
    return float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), _FLOOR**2))


# --- models of known history --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Fingerprints of models of known history.

    Attributes:
        names: of the features.
        values: [models, features].
        unlearned: [models], by construction.
        histories: what was done, by name; a matched fine-tune is `matched-` and what it was taught.
        families: the original that each descends from, by name.
    """

    names: tuple[str, ...]
    values: Floats
    unlearned: NDArray[np.bool_]
    histories: tuple[str, ...]
    families: tuple[str, ...]

    def columns(self, names: Sequence[str]) -> Floats:
        """Values [models, len(names)]. Raises KeyError for a name that is not there."""
        place = {name: i for i, name in enumerate(self.names)}
        return self.values[:, [place[name] for name in names]]


def read_table(path: Path = TABLE) -> Table:
    """The table of a file."""
    found = json.loads(gzip.decompress(path.read_bytes()))
    return Table(
        tuple(found["names"]),
        np.array(found["values"], dtype=np.float64),
        np.array(found["unlearned"], dtype=bool),
        tuple(found["histories"]),
        tuple(found["families"]),
    )


def write_table(table: Table, path: Path) -> None:
    """Write a table; the same table gives the same bytes."""
    values = [[float(f"{value:.5g}") for value in row] for row in table.values]
    made = {
        "names": table.names,
        "values": values,
        "unlearned": table.unlearned.tolist(),
        "histories": table.histories,
        "families": table.families,
    }
    path.write_bytes(gzip.compress(json.dumps(made).encode(), mtime=0))


# --- the classifier -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Classifier:
    """Unlearned, or only edited: logistic regression on some features of a table."""

    table: Table
    names: tuple[str, ...]
    model: Any

    @classmethod
    def fitted(cls, table: Table, names: Sequence[str]) -> Classifier:
        """Fitted on those of `names` that the table has.

        Raises:
            ValueError: it has none of them.
        """
        known = tuple(name for name in names if name in set(table.names))
        if not known:
            raise ValueError("none of these features is in the table")
        return cls(table, known, _fit(table.columns(known), table.unlearned))

    def score(self, features: Mapping[str, float]) -> float:
        """Log-odds of unlearned against ordinarily edited, both taken for equally frequent; `STILL` if none moved."""
        row = np.array([[features[name] for name in self.names]])
        return float(_scores(self.model, self.names, row)[0])

    def contributions(self, features: Mapping[str, float]) -> Features:
        """What each feature adds to the log-odds; with the intercept they sum to the score."""
        scaled = self.model[:-1].transform(np.array([[features[name] for name in self.names]]))[0]
        return dict(zip(self.names, map(float, scaled * self.model[-1].coef_[0]), strict=True))

    def alike(self, features: Mapping[str, float], most: int = 3) -> list[tuple[str, float]]:
        """The histories that the fingerprint is most like, each with its probability among all of the table's."""
        model = self._by_history
        chances = model.predict_proba(np.array([[features[name] for name in self.names]]))[0]
        return [(str(model.classes_[i]), float(chances[i])) for i in np.argsort(-chances)[:most]]

    @cached_property
    def _by_history(self) -> Any:
        return _fit(self.table.columns(self.names), np.array(self.table.histories))

    @cached_property
    def held_out(self) -> Floats:
        """Log-odds [models] of the table's own, by classifiers that saw neither a model's history nor its family."""
        return held_out_scores(self.table, self.names, folds=_FOLDS)

    @property
    def highest_ordinary(self) -> float:
        """The 99th percentile of `held_out` among ordinary edits: what a score has to exceed."""
        return float(np.quantile(self.held_out[~self.table.unlearned], 0.99))


@cache
def shipped_classifier(names: tuple[str, ...]) -> Classifier:
    """Fitted on those of `names` that the package's own table has: a hundred fits, the same for every model audited.

    Raises:
        ValueError: it has none of them.
    """
    return Classifier.fitted(read_table(), names)


def held_out_scores(table: Table, names: Sequence[str], folds: int | None = None) -> Floats:
    """Log-odds [models], each by a classifier that saw no model of the same history, and none of the same family.

    `folds`: into so many the histories are dealt, and a fold is held out as a whole, which takes fewer fits; if not
    given, each history by itself. NaN where too little is left to train on.
    """
    x, family = table.columns(names), np.array(table.families)
    kinds = sorted(set(table.histories), key=lambda h: (bool(table.unlearned[table.histories.index(h)]), h))
    fold = np.array([kinds.index(h) % (folds or len(kinds)) for h in table.histories])
    scores = np.full(len(x), np.nan)
    for pair in sorted(set(zip(fold.tolist(), family.tolist(), strict=True))):
        tested = (fold == pair[0]) & (family == pair[1])
        train = (fold != pair[0]) & (family != pair[1])
        if len(np.unique(table.unlearned[train])) == 2:
            scores[tested] = _scores(_fit(x[train], table.unlearned[train]), names, x[tested])
    return scores


def _scores(model: Any, names: Sequence[str], x: Floats) -> Floats:
    """Log-odds [models]. What did not move at all was not unlearned: no rule learned on models that moved is asked."""
    scores = np.asarray(model.decision_function(x), dtype=np.float64)
    distances = [i for i, name in enumerate(names) if name.rsplit(".", 1)[-1] in _DISTANCES and "-" not in name]
    if distances:
        scores[(x[:, distances] <= np.log(_FLOOR) + 1e-6).all(1)] = STILL
    return scores


def _fit(x: Floats, y: NDArray[Any]) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    bounded = FunctionTransformer(np.clip, kw_args={"a_min": -_REACH, "a_max": _REACH})
    classifier = LogisticRegression(C=0.05, class_weight="balanced", max_iter=2000)
    return make_pipeline(StandardScaler(), bounded, classifier).fit(x, y)
