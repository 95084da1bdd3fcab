"""Geometry: every number by hand, by brute force or by a second library; planted moves are seen, others are not."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier
from worlds import build_tiny, one_thread, open_target, tiny_case

from audit.case import Case
from audit.errors import BadInput
from audit.evidence import Evidence
from audit.gather import Run, capture_all
from audit.loaders import Example, ExampleSet
from audit.plan import Request
from audit.progress import SILENT
from audit.record import Finding, Outcome, Side
from audit.scan import take_inventories
from audit.statistics import mean_estimate
from audit.verdict import judge
from probes.geometry import Geometry
from probes.similarity import (
    agreement,
    cka_rows,
    knn_transfer,
    linear_cka,
    mutual_knn,
    pca_shift,
)

seeds = st.integers(0, 2**32 - 1)


def draw(seed: int, n: int, *widths: int) -> list[np.ndarray]:
    """Related states of n rows: all see the same two hidden variables."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(n, 2))
    return [hidden @ rng.normal(size=(2, d)) + rng.normal(size=(n, d)) + 5 for d in widths]


def rotation(rng: np.random.Generator, d: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(d, d)))[0]


# --- CKA


def hsic_by_tuples(x: np.ndarray, y: np.ndarray) -> float:
    """The U-statistic of order 4 that defines the unbiased HSIC, over all tuples of distinct rows."""
    k, m = x @ x.T, y @ y.T
    terms = [k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in itertools.permutations(range(len(x)), 4)]
    return float(np.mean(terms))


@settings(max_examples=15, deadline=None)
@given(seeds, st.integers(4, 6), st.integers(1, 8), st.integers(1, 8))
def test_the_debiased_cka_is_the_ratio_of_u_statistics(seed, n, d1, d2):
    x, y = draw(seed, n, d1, d2)
    wanted = hsic_by_tuples(x, y) / math.sqrt(hsic_by_tuples(x, x) * hsic_by_tuples(y, y))
    assert linear_cka(x, y) == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    assert cka_rows(x, y).mean() == pytest.approx(wanted, rel=1e-6, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(5, 30), st.integers(2, 12), st.integers(2, 12), st.booleans())
def test_cka_from_features_is_cka_from_gram_matrices(seed, n, d1, d2, debiased):
    x, y = draw(seed, n, d1, d2)
    wide = [np.hstack([z, np.zeros((n, n))]) for z in (x, y)]  # the same states, with more dimensions than rows
    found = linear_cka(x, y, debiased=debiased)
    assert found == pytest.approx(linear_cka(*wide, debiased=debiased), abs=1e-9)
    assert found == pytest.approx(linear_cka(y, x, debiased=debiased), abs=1e-12)
    # Rotated, scaled and moved states are the same states.
    rng = np.random.default_rng(seed)
    assert found == pytest.approx(linear_cka(3 * x @ rotation(rng, d1) - 7, y, debiased=debiased), abs=1e-9)
    assert linear_cka(x, -0.1 * x @ rotation(rng, d1) + 1, debiased=debiased) == pytest.approx(1)


def test_biased_cka_by_hand():
    x = np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    y = np.array([[1.0], [-1], [0], [0]])
    # |X'Y|² = 4, |X'X|² = 8, |Y'Y|² = 4
    assert linear_cka(x, y, debiased=False) == pytest.approx(4 / math.sqrt(32))


def test_unrelated_states_have_cka_zero_only_if_debiased():
    rng = np.random.default_rng(0)
    pairs = [(rng.normal(size=(20, 60)), rng.normal(size=(20, 60))) for _ in range(200)]
    debiased = [linear_cka(*pair) for pair in pairs]
    assert abs(np.mean(debiased)) < 4 * np.std(debiased) / math.sqrt(len(pairs))
    assert np.mean([linear_cka(*pair, debiased=False) for pair in pairs]) > 0.7


def test_cka_of_states_that_do_not_vary_is_nan():
    x = np.random.default_rng(0).normal(size=(6, 3))
    for width in (1, 3, 50):
        assert math.isnan(linear_cka(x, np.full((6, width), 0.1)))
        assert np.isnan(cka_rows(np.full((6, width), 1e20), x)).all()


def test_cka_refuses_what_it_cannot_compare():
    x = np.zeros((5, 2))
    for function in (linear_cka, cka_rows, mutual_knn):
        with pytest.raises(ValueError, match="y has 4 rows, x has 5"):
            function(x, x[:4])
        with pytest.raises(ValueError, match="y has NaN"):
            function(x, np.full((5, 2), np.nan))
        with pytest.raises(ValueError, match="x must have shape"):
            function(x[0], x[0])
    with pytest.raises(ValueError, match="at least 4 rows"):
        linear_cka(x[:3], x[:3])


def gaussian_cka(noise: float) -> float:
    """CKA of x ~ N(0, diag(4, 1)) and y = x + noise · e in the population: |cov|² over the norms."""
    cross, own = np.diag([4.0, 1]), np.diag([4 + noise**2, 1 + noise**2])
    return float((cross**2).sum() / np.linalg.norm(np.diag([4.0, 1])) / np.linalg.norm(own))


def test_the_rows_scatter_is_the_cka_s():
    """Against delete-one-entity jackknife errors, and by how often the interval holds the population's CKA."""
    rng = np.random.default_rng(1)
    held, ratios, noise = 0, [], 1.5
    for trial in range(60):
        entities = np.repeat(np.arange(40), 3)
        # Half of each row's state is its entity's.
        x = (rng.normal(size=(40, 2))[entities] + rng.normal(size=(120, 2))) / math.sqrt(2) * [2, 1]
        y = x + noise * (rng.normal(size=(40, 2))[entities] + rng.normal(size=(120, 2))) / math.sqrt(2)
        shares = cka_rows(x, y)
        estimate = mean_estimate(shares, entities, seed=trial)
        held += estimate.lo <= gaussian_cka(noise) <= estimate.hi
        if trial < 10:
            left = [linear_cka(x[entities != e], y[entities != e]) for e in range(40)]
            jackknife = math.sqrt(39 / 40 * ((np.array(left) - np.mean(left)) ** 2).sum())
            sums = np.bincount(entities, shares - shares.mean())
            ratios.append(math.sqrt(40 / 39 * (sums**2).sum()) / 120 / jackknife)
    assert held >= 52  # of 60 at 95 %: fewer has p < 0.01
    assert np.mean(ratios) == pytest.approx(1, abs=0.1)


# --- neighbours


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(3, 12), st.integers(1, 5), st.integers(1, 5))
def test_mutual_knn_by_brute_force(seed, n, d1, d2):
    x, y = draw(seed, n, d1 + 1, d2 + 1)
    k = 1 + seed % (n - 1)

    def nearest(z: np.ndarray, i: int) -> set[int]:
        cosine = {j: z[i] @ z[j] / np.linalg.norm(z[i]) / np.linalg.norm(z[j]) for j in range(n) if j != i}
        return set(sorted(cosine, key=cosine.__getitem__, reverse=True)[:k])

    wanted = [len(nearest(x, i) & nearest(y, i)) / k for i in range(n)]
    assert mutual_knn(x, y, k) == pytest.approx(wanted)
    assert mutual_knn(x, 2 * x, k).tolist() == [1] * n


def test_unrelated_states_share_neighbours_by_chance():
    rng = np.random.default_rng(0)
    found = mutual_knn(rng.normal(size=(400, 5)), rng.normal(size=(400, 5)), 10)
    assert found.mean() == pytest.approx(10 / 399, abs=0.01)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(6, 20), st.integers(1, 15), st.integers(2, 4))
def test_knn_transfer_against_scikit_learn(seed, n, m, classes):
    rng = np.random.default_rng(seed)
    train, test = draw(seed, n + m, 4)[0][:n], draw(seed, n + m, 4)[0][n:]
    labels, right = rng.integers(classes, size=n), rng.integers(classes + 1, size=m)
    k = int(rng.integers(1, 6))
    found = knn_transfer(train, labels, test, right, k)
    model = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(train, labels)
    near = labels[model.kneighbors(test, return_distance=False)]
    for i in range(m):
        votes = np.bincount(near[i], minlength=classes + 1)
        winners = np.flatnonzero(votes == votes.max())
        assert found[i] == pytest.approx((right[i] in winners) / len(winners))
        if len(winners) == 1:
            assert found[i] == (model.predict(test[i : i + 1])[0] == right[i])


def test_knn_transfer_by_hand():
    angles = np.deg2rad([0, 10, 20, 80, 90])
    train = np.column_stack([np.cos(angles), np.sin(angles)]) * [[1], [9], [0.1], [3], [1]]  # length says nothing
    labels = ["oslo", "oslo", "rome", "rome", "lima"]
    test = [[1.0, 0.1], [0.05, 1.0]]
    assert knn_transfer(train, labels, test, ["oslo", "rome"], 3).tolist() == [1, 1]
    assert knn_transfer(train, labels, test, ["rome", "oslo"], 5).tolist() == [0.5, 0.5], "two each"
    assert knn_transfer(train, labels, test, ["paris", "lima"], 1).tolist() == [0, 1]
    excluded = np.array([[True, True, False, False, False], [False] * 5])
    assert knn_transfer(train, labels, test, ["rome", "lima"], 2, excluded=excluded).tolist() == [1, 0.5]
    with pytest.raises(ValueError, match="as many others"):
        knn_transfer(train, labels, test, ["rome", "lima"], 4, excluded=excluded)
    with pytest.raises(ValueError, match="as many others"):
        knn_transfer(train, labels, test, ["rome", "lima"], 6)
    with pytest.raises(ValueError, match="4 labels for 5 rows"):
        knn_transfer(train, labels[:4], test, ["rome", "lima"])


# --- principal components


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(4, 20), st.integers(2, 30))
def test_pca_shift_against_scikit_learn(seed, n, d):
    rng = np.random.default_rng(seed)
    scale = np.r_[9, 4, np.ones(d - 2)]  # principal axes apart, so that both find the same
    x, y = (rng.normal(size=(n, d)) * scale + rng.normal(size=d) for _ in range(2))
    found, one, two = pca_shift(x, y), PCA(2).fit(x), PCA(1).fit(y)
    wanted = one.transform(y).mean(axis=0) / np.sqrt(one.explained_variance_)
    signs = [np.sign(axis[np.abs(axis).argmax()]) for axis in one.components_]
    assert found.shift == pytest.approx(wanted * signs, rel=1e-6, abs=1e-8)
    assert found.cosine == pytest.approx(abs(one.components_[0] @ two.components_[0]), abs=1e-8)
    assert pca_shift(x, -y).cosine == pytest.approx(found.cosine), "the sign of a component means nothing"


def test_pca_shift_of_a_planted_move():
    x = np.random.default_rng(0).normal(size=(50, 6)) * [9, 3, 1, 1, 1, 1]
    axes = PCA(2).fit(x)
    moved = x + 2 * np.sqrt(axes.explained_variance_[0]) * axes.components_[0] * np.sign(axes.components_[0, 0])
    assert pca_shift(x, moved).shift == pytest.approx([2, 0], abs=1e-9)
    assert pca_shift(x, moved).cosine == pytest.approx(1)
    turned = x[:, [1, 0, 2, 3, 4, 5]]
    assert pca_shift(x, turned).cosine < 0.3
    with pytest.raises(ValueError, match="width 6, moved 5"):
        pca_shift(x, x[:, :5])


# --- agreement


def test_agreement_by_hand():
    found = agreement([0.5, -0.2], [0.25])
    assert (float(found.logit), float(found.representation)) == pytest.approx((0.4, 0.75))
    assert float(found.harmonic) == pytest.approx(2 * 0.4 * 0.75 / 1.15)
    assert float(agreement([0, 0], [0]).harmonic) == 1
    assert float(agreement([1.5], [0]).harmonic) == 0, "a gap beyond 1 counts as 1"
    assert float(agreement([1], [1]).harmonic) == 0
    many = agreement([[0.5, -0.2], [0, 0]], [[0.25], [0]])
    assert many.harmonic.tolist() == pytest.approx([float(found.harmonic), 1])


# --- what is read


def capture(case: Case, folder: Path) -> Evidence:
    run = Run(case, folder, SILENT, [Geometry()], [])
    with one_thread():
        return capture_all(run, take_inventories(case))


@cache
def captured() -> tuple[Case, Evidence]:
    case = tiny_case()
    return case, capture(case, build_tiny().folder / "geometry")


def states_by_hand(made: str, row: Example, layer: int) -> np.ndarray:
    """The state after a block at the last token of the prompt by itself, as Hugging Face has it."""
    model = open_model(made)
    with torch.no_grad():
        ids = open_target(made).encode_prompt(row.prompt)
        caught: list[Any] = []
        handle = model.model.layers[layer].register_forward_hook(lambda _m, _i, out: caught.append(out))
        model(input_ids=torch.tensor([ids]))
        handle.remove()
    state = caught[0][0] if isinstance(caught[0], tuple) else caught[0]
    return state.reshape(-1, state.shape[-1])[-1].numpy()


@cache
def open_model(made: str) -> Any:
    return open_target(made).model


def test_the_states_are_those_at_the_last_prompt_token():
    case, evidence = captured()
    for role, made in (("target", "unlearned"), ("retrained", "retrained")):
        got = [arrays["hidden"][0] for arrays in evidence.iterate(role, "geometry/forget")]
        for row, state in list(zip(case.rows("forget"), got, strict=True))[::9]:
            for layer in (0, 1):
                assert state[layer] == pytest.approx(states_by_hand(made, row, layer), abs=1e-4)


def test_no_state_is_read_at_token_0():
    target = open_target("original")
    case = tiny_case()
    passages = {
        name: ExampleSet(
            name, "", tuple(Example(e.id, "", f"{e.prompt} {e.answer}", entity=e.entity) for e in rows), rows.digest
        )
        for name, rows in case.sets.items()
    }
    for each in (case, replace(case, sets=passages)):
        requests = Geometry().requests(each, target)
        assert [request.name for request in requests] == ["geometry/forget", "geometry/holdout", "geometry/retain"]
        for request in requests:
            assert isinstance(request, Request)
            assert all(tokens.start - 1 > 1 and tokens.scored == 1 for tokens in request.sequences)
    assert Geometry().requests(case, target.altered("someone@1", "recipe")) == []


# --- the findings on real models


def by_id(found: list[Finding]) -> dict[str, Finding]:
    return {finding.id.partition("/")[2]: finding for finding in found}


@pytest.mark.filterwarnings("ignore:The number of unique classes")
def test_the_tables_are_what_plain_functions_say():
    case, evidence = captured()
    found = by_id(Geometry().measure(case, evidence))
    assert set(found) == {"cka", "knn", "agreement"}
    assert {name: finding.decides for name, finding in found.items()} == {
        "cka": (False, False),
        "knn": (True, False),
        "agreement": (False, False),
    }

    def states(role: str, name: str) -> np.ndarray:
        return np.stack([a["hidden"][0] for a in evidence.iterate(role, f"geometry/{name}")]).astype(float)

    table = {tuple(row[:3]): row[3:] for row in found["cka"].table.rows}
    assert len(table) == 2 * 3 * 2, "two models, three sets, two blocks"
    for (role, name, layer), (value, lo, hi, kept, cosine, *shift) in table.items():
        x, y = states("target", name)[:, layer], states(role, name)[:, layer]
        assert value == pytest.approx(linear_cka(x, y), abs=1e-6)
        assert lo <= value <= hi
        assert kept == pytest.approx(mutual_knn(x, y, 10).mean())
        assert cosine == pytest.approx(pca_shift(y, x).cosine)
        assert shift == pytest.approx(pca_shift(y, x).shift.tolist())
    cka = {name: np.mean([table["original", name, layer][0] for layer in (0, 1)]) for name in ("forget", "retain")}
    assert found["cka"].estimate == pytest.approx(cka["retain"] - cka["forget"], abs=1e-6)

    # k-NN transfer, by scikit-learn, retain rows of other entities for every entity in turn.
    means = {tuple(row[:3]): row[3] for row in found["knn"].table.rows}
    retain, labels = states("target", "retain"), [row.answer for row in case.rows("retain")]
    middle = retain.mean(axis=0)
    for name in ("forget", "holdout"):
        model = KNeighborsClassifier(5, metric="cosine").fit((retain - middle)[:, 1], labels)
        near = np.array(labels)[model.kneighbors((states("target", name) - middle)[:, 1], return_distance=False)]
        right = []
        for row, votes in zip(case.rows(name), near, strict=True):
            if row.answer in labels:
                answers, counts = np.unique(votes, return_counts=True)
                winners = answers[counts == counts.max()]
                right.append((row.answer in winners) / len(winners))
        assert means["target", name, 1.0] == pytest.approx(np.mean(right))

    # Agreement: the last rows of its table are the scores of the gaps above them.
    *gaps, agl, agr, harmonic = found["agreement"].table.rows
    for column in (1, 2):
        sides = [[row[column] for row in gaps if ("token" in row[0]) is logit] for logit in (True, False)]
        wanted = agreement(*sides)
        scores = (agl[column], agr[column], harmonic[column])
        assert scores == pytest.approx([float(wanted.logit), float(wanted.representation), float(wanted.harmonic)])
    assert found["agreement"].estimate == pytest.approx(harmonic[1])
    named = {row[0]: row[1:] for row in gaps}
    for j, role in enumerate(("target", "original")):
        alike = linear_cka(states(role, "retain")[:, 1], states("retrained", "retain")[:, 1])
        assert named["retain: 1 - CKA after the last block"][j] == pytest.approx(1 - alike, abs=1e-6)
        hits = [
            [a["match"][0] for a in evidence.iterate(each, "geometry/forget", "token")] for each in (role, "retrained")
        ]
        assert named["forget: first token right"][j] == pytest.approx(np.mean(hits[0]) - np.mean(hits[1]))


def test_judged_they_describe_and_decide_nothing():
    case, evidence = captured()
    for finding in judge(Geometry().measure(case, evidence)):
        assert finding.side in (Side.NEITHER, Side.REMAINS)
        if finding.id != "geometry/knn":
            assert finding.verdict != Outcome.EVIDENCE


def test_a_model_against_itself_has_not_moved(tmp_path):
    case = tiny_case({"target": "original", "original": "original", "retrained": "original"})
    found = by_id(Geometry().measure(case, capture(case, tmp_path)))
    assert found["cka"].estimate == 0
    assert found["cka"].p_value == 1
    lo, hi = found["cka"].ci95
    assert -0.5 < lo < 0 < hi < 0.5
    for _, _, _, value, low, high, kept, cosine, *shift in found["cka"].table.rows:
        assert (value, high, kept) == (1, 1, 1)
        assert 0.7 < low < 1
        assert cosine == pytest.approx(1)
        assert shift == pytest.approx([0, 0], abs=1e-6)
    assert found["agreement"].estimate == pytest.approx(1)
    control = {c.name: c for c in found["agreement"].controls}["original"]
    assert not control.passed, "an original that agrees with the retrained model: the score can tell nothing"


# --- planted moves


class Planted(Evidence):
    """Evidence of states that were made up: by role and set, [rows, blocks, width]."""

    def __init__(self, states: dict[tuple[str, str], np.ndarray]) -> None:
        super().__init__()
        self.states = states

    def iterate(self, role, name, *_quantities):
        for state in self.states[role, name.partition("/")[2]]:
            yield {"hidden": state[None].astype(np.float32), "match": np.array([True])}

    def extra(self, role, _name):
        return {"layers": list(range(self.states[role, "forget"].shape[1]))}


def planted(case: Case, seed: int, moved: dict[str, float], *, blocks: int = 2, width: int = 16) -> Planted:
    """Original states, and the target's: the same plus noise of a size by set, the same for all rows of an entity."""
    rng = np.random.default_rng(seed)
    states = {}
    for name in ("forget", "holdout", "retain"):
        rows = case.rows(name)
        whose = np.unique([row.entity for row in rows], return_inverse=True)[1]
        base = rng.normal(size=(len(rows), blocks, width))
        noise = rng.normal(size=(whose.max() + 1, blocks, width))[whose] + rng.normal(size=base.shape)
        states["original", name] = base
        states["target", name] = base + moved.get(name, 0.0) * noise
    return Planted(states)


def two_models(**options: Any) -> Case:
    return tiny_case({"target": "unlearned", "original": "original"}, **options)


def test_a_planted_move_of_the_forget_set_is_seen():
    case = two_models()
    found = by_id(Geometry().measure(case, planted(case, 0, {"forget": 1.0, "retain": 0.2, "holdout": 0.2})))
    assert set(found) == {"cka", "knn"}, "without a retrained model there is nothing to agree with"
    assert found["cka"].estimate > 0.2
    assert found["cka"].ci95[0] > 0.1
    assert found["cka"].p_value < 0.001
    assert found["cka"].controls[0].passed
    other_way = by_id(Geometry().measure(case, planted(case, 0, {"forget": 0.2, "retain": 1.0})))
    assert other_way["cka"].estimate < -0.2


def test_equal_moves_are_called_different_as_rarely_as_promised():
    case = two_models()
    move = {"forget": 0.7, "retain": 0.7, "holdout": 0.7}
    p = [by_id(Geometry().measure(case, planted(case, seed, move, blocks=1)))["cka"].p_value for seed in range(30)]
    assert sum(value <= 0.05 for value in p) <= 5  # of 30 at 5 %: more has p < 0.01
    assert max(p) > 0.3


def test_states_with_nothing_in_common_are_no_likeness_to_lose():
    case = two_models()
    evidence = planted(case, 0, {})
    rng = np.random.default_rng(1)
    for name in ("forget", "holdout", "retain"):
        evidence.states["target", name] = rng.normal(size=evidence.states["target", name].shape)
    found = by_id(Geometry().measure(case, evidence))
    assert not found["cka"].controls[0].passed
    [cka, _] = judge([found["cka"], found["knn"]])
    assert cka.verdict == Outcome.INCONCLUSIVE


def test_planted_answers_are_carried_to_the_neighbours():
    """States that hold their answer's direction after the second block, on retain and forget rows only."""
    case = two_models()
    evidence = planted(case, 0, {})
    rng = np.random.default_rng(2)
    directions: dict[str, np.ndarray] = {}
    for name in ("forget", "retain"):
        for state, row in zip(evidence.states["target", name], case.rows(name), strict=True):
            state[1] += 3 * directions.setdefault(row.answer, rng.normal(size=16))
    found = by_id(Geometry().measure(case, evidence))["knn"]
    assert found.layer == "after block 1"
    assert found.estimate > 0.4
    assert found.p_value < 0.001
    assert found.controls[0].passed
    none = by_id(Geometry().measure(case, planted(case, 3, {})))["knn"]
    assert none.p_value > 0.05
    assert none.estimate < 0.2


def test_a_reference_of_other_depth_and_width_is_compared_at_equal_shares():
    case = two_models()
    evidence = planted(case, 0, {"forget": 0.5}, blocks=2)
    for name in ("forget", "holdout", "retain"):
        shallow = evidence.states["original", name]
        other = np.concatenate([shallow, np.zeros((*shallow.shape[:2], 4))], axis=2)
        evidence.states["original", name] = np.stack([other[:, 0], other[:, 0] * 0 + 1, other[:, 1]], axis=1)
    found = by_id(Geometry().measure(case, evidence))["cka"]
    plain = by_id(Geometry().measure(case, planted(case, 0, {"forget": 0.5}, blocks=2)))["cka"]
    assert found.estimate == pytest.approx(plain.estimate)
    assert all(row[-3:] == [None, None, None] for row in found.table.rows)


def test_states_that_do_not_vary_are_no_finding():
    case = two_models()
    evidence = planted(case, 0, {})
    evidence.states["target", "forget"][:] = 1.0
    with pytest.raises(BadInput, match="do not vary over the forget rows"):
        Geometry().measure(case, evidence)


# --- when it does not run


def test_what_it_cannot_do_without():
    instrument = Geometry()
    assert instrument.missing(tiny_case()) is None
    assert "original or the retrained" in (instrument.missing(tiny_case({"target": "unlearned"})) or "")
    assert instrument.missing(tiny_case({"target": "unlearned", "retrained": "retrained"})) is None
    assert "retain" in (instrument.missing(tiny_case(sets=("forget", "holdout"))) or "")
    case = tiny_case()
    small = replace(case.sets["holdout"], examples=case.sets["holdout"].examples[:7])
    assert "8 rows in the holdout set" in (instrument.missing(replace(case, sets=case.sets | {"holdout": small})) or "")


def test_answers_of_its_own_are_not_transferred():
    """Where no retain row shares a forget row's answer, neighbours can carry nothing: said, and left out."""
    case = two_models()
    assert Geometry().withheld(case) == {}
    own = replace(
        case.sets["forget"],
        examples=tuple(replace(e, answer=f"{e.answer} {i}") for i, e in enumerate(case.sets["forget"].examples)),
    )
    other = replace(case, sets=dict(case.sets) | {"forget": own})
    assert "fewer than half of the forget rows" in Geometry().withheld(other)["geometry/knn"]
    assert set(by_id(Geometry().measure(other, planted(other, 0, {})))) == {"cka"}
    alone = replace(case.sets["retain"], examples=tuple(replace(e, entity="one") for e in case.sets["retain"].examples))
    assert "geometry/knn" in Geometry().withheld(replace(case, sets=dict(case.sets) | {"retain": alone}))
