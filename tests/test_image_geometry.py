"""Geometry of image classifiers: neighbours against scikit-learn, tables against plain functions, planted moves."""

from __future__ import annotations

import numpy as np
import pytest
from decisions import Planted, by_name, found, image_case, open_case
from decisions import bundles as planted
from images import CLASSES, KINDS, save_classifier, save_images
from sklearn.neighbors import KNeighborsClassifier

from probes.head_refit import Pool
from probes.image_geometry import ImageGeometry, balanced
from probes.similarity import linear_cka

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSWISE = {"forget": {"f": 30}, "holdout": {"h": 24}, "retain": dict.fromkeys("abcd", 15)}
MODELS = ("target", "original", "retrained")


def states_of(case, *, moved=(), lost=()):
    """The target's states are the original's, save for sets in `moved`; classes in `lost` lie apart in the retrained
    model's and, always, class h."""
    base = planted(case, {"h": 3.0}, seed=1)
    other = planted(case, {"h": 3.0} | dict.fromkeys(lost, 3.0), seed=2)
    rng = np.random.default_rng(3)
    states = {}
    for name in base:
        states["original", name] = base[name]
        noise = 2.0 if name in moved else 0.0
        states["target", name] = [block + noise * rng.normal(size=block.shape) for block in base[name]]
        states["retrained", name] = other[name]
    return states


def test_balanced_takes_as_many_of_every_class():
    labels, fitted = np.array([0] * 5 + [1] * 3 + [2] * 4), np.array([True] * 11 + [False])
    chosen = balanced(labels, fitted, seed=0)
    assert np.bincount(labels[chosen]).tolist() == [3, 3, 3]
    assert fitted[chosen].all() and (np.diff(chosen) > 0).all()
    only = balanced(labels, labels != 1, seed=0)
    assert np.bincount(labels[only], minlength=3).tolist() == [4, 0, 4]


@pytest.mark.filterwarnings("ignore:The number of unique classes")
def test_neighbours_are_scikit_learn_s(tmp_path):
    case = image_case(tmp_path, CLASSWISE, MODELS)
    states = states_of(case, lost="f")
    findings = by_name(ImageGeometry().measure(case, Planted(states)))
    means = {tuple(row[:3]): row[3] for row in findings["knn"].table.rows}
    pool = Pool(case)
    near = balanced(pool.labels, pool.fitted, case.options.seed)
    assert np.bincount(pool.labels[near]).tolist() == [15] * 6
    for role in ("target", "retrained"):
        x = np.concatenate([states[role, name][1] for name in pool.rows])
        x = x.astype(np.float32).astype(float)
        x -= x[near].mean(axis=0)
        right = []
        for i in range(len(x)):
            train = near[near != i]
            model = KNeighborsClassifier(5, metric="cosine").fit(x[train], pool.labels[train])
            votes = np.bincount(pool.labels[train][model.kneighbors(x[i : i + 1])[1][0]], minlength=6)
            right.append((votes[pool.labels[i]] == votes.max()) / (votes == votes.max()).sum())
        for name in pool.rows:
            assert means[role, name, 1.0] == pytest.approx(np.mean(right[pool.part(name)]))
    assert means["target", "forget", 1.0] > 0.95 > 0.6 > means["retrained", "forget", 1.0]
    assert findings["knn"].estimate > 0.4


def test_cka_sees_what_moved_and_decides_nothing(tmp_path):
    case = image_case(tmp_path, CLASSWISE, MODELS)
    states = states_of(case, moved=["forget"])
    findings = by_name(ImageGeometry().measure(case, Planted(states)))
    assert set(findings) == {"cka", "knn", "agreement"}
    assert findings["cka"].estimate > 0.3 and findings["cka"].p_value < 0.001
    assert {f.decides for f in findings.values()} == {(False, False)}
    table = {tuple(row[:3]): row[3] for row in findings["cka"].table.rows}
    for (role, name, layer), value in table.items():
        assert value == pytest.approx(linear_cka(states["target", name][layer], states[role, name][layer]), abs=1e-5)
    still = by_name(ImageGeometry().measure(case, Planted(states_of(case))))
    assert still["cka"].estimate == 0
    assert "at the decision after each block" in still["cka"].figure.alt


def test_agreement_is_one_with_the_retrained_model_itself(tmp_path):
    case = image_case(tmp_path, CLASSWISE, ("target", "retrained"))
    states = states_of(case)
    for name in case.sets:
        states["target", name] = states["retrained", name]
    same = by_name(ImageGeometry().measure(case, Planted(states)))["agreement"]
    assert same.estimate == pytest.approx(1)
    assert same.table.rows[0][0] == "forget: the right class answered"
    assert same.table.rows[2][0] == "forget: k-NN transfer before the classifier"
    other = by_name(ImageGeometry().measure(case, Planted(states_of(case, moved=["forget"], lost="f"))))["agreement"]
    assert other.estimate < 0.5


def test_a_reference_of_other_depth_and_width_is_read_at_equal_shares(tmp_path):
    case = image_case(tmp_path, CLASSWISE, ("target", "original"))
    states = states_of(case, moved=["forget"])
    plain = by_name(ImageGeometry().measure(case, Planted(states)))["cka"].estimate
    for name in case.sets:
        first, second, third = states["original", name]
        wider = [np.hstack([block, np.zeros((len(block), 5))]) for block in (first, second, third)]
        states["original", name] = [wider[0], wider[0] + 1, wider[1], wider[2] * 0, wider[2]]
    assert by_name(ImageGeometry().measure(case, Planted(states)))["cka"].estimate == pytest.approx(plain, abs=1e-6)


def test_what_it_cannot_do_without(tmp_path):
    assert "original or the retrained" in (ImageGeometry().missing(image_case(tmp_path, CLASSWISE)) or "")
    case = image_case(tmp_path, CLASSWISE, ("target", "original"))
    assert ImageGeometry().missing(case) is None and ImageGeometry().withheld(case) == {}
    few = image_case(tmp_path, CLASSWISE | {"retain": {"a": 9, "b": 5}}, ("target", "original"))
    assert "more than 5 images" in ImageGeometry().withheld(few)["image-geometry/knn"]
    assert set(by_name(ImageGeometry().measure(few, Planted(states_of(few))))) == {"cka"}


@pytest.mark.parametrize("kind", KINDS)
def test_it_runs_on_every_layout(kind, tmp_path):
    for role, seed in (("target", 0), ("original", 0), ("retrained", 1)):
        save_classifier(tmp_path / role, kind, seed)
    for seed, (name, classes) in enumerate((("forget", [0]), ("holdout", [1]), ("retain", [2, 3]))):
        with np.load(save_images(tmp_path / "all.npz", n=48, seed=seed)) as data:
            kept = np.isin(data["y"], classes)
            np.savez(tmp_path / f"{name}.npz", X=data["X"][kept], y=np.array(CLASSES)[data["y"][kept]])
    case = open_case(tmp_path, {role: tmp_path / role for role in MODELS})
    findings = found(ImageGeometry(), case, tmp_path / "out")
    assert set(findings) == {"cka", "knn", "agreement"}
    assert findings["cka"].estimate == 0, "it is the original"
    assert all(row[3] == 1 for row in findings["cka"].table.rows if row[0] == "original")
