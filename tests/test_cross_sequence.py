"""The cross-sequence probe: left-out scores by brute-force refits, what is planted and what is not, random weights."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from sklearn.linear_model import Ridge
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from transformers import AutoModelForCausalLM
from worlds import _scratch, one_thread, open_target, tiny_case

from audit.case import Case
from audit.evidence import Evidence
from audit.gather import Run, capture_all
from audit.progress import SILENT
from audit.record import Side
from audit.scan import take_inventories
from probes.cross_sequence import (
    CrossSequence,
    CrossSequenceProbe,
    attackers,
    balanced_accuracy,
    before_last,
    halves,
    inner_products,
    loo_scores,
    mean_width,
    placed,
    project_out,
    randomize,
    relabelled_p,
)

# --- left-out scores


def refitted(states, labels, groups, ridge):
    """The same by fitting anew for every group, with another library."""
    y, out = np.where(labels, 1.0, -1.0), np.zeros(len(states))
    for group in set(groups):
        own = np.array([g == group for g in groups])
        out[own] = Ridge(alpha=ridge).fit(states[~own], y[~own]).predict(states[own]) - y[~own].mean()
    return out


def drawn(seed, n, d, entities):
    rng = np.random.default_rng(seed)
    groups = [*range(entities), *rng.integers(entities, size=n - entities).tolist()]
    return rng.normal(1.0, 2.0, (n, d)), rng.random(n) < 0.4, groups


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(6, 25), st.integers(1, 40), st.integers(2, 6), st.floats(-2, 3))
def test_left_out_scores_are_those_of_refits(seed, n, d, entities, exponent):
    states, labels, groups = drawn(seed, n, d, entities)
    ridge = 10.0**exponent
    assert_allclose(
        loo_scores(states, labels, groups, ridge), refitted(states, labels, groups, ridge), rtol=1e-5, atol=1e-7
    )


def test_a_kernel_s_left_out_scores_are_those_of_refits_on_its_features():
    states, labels, groups = drawn(3, 25, 4, 6)
    distances = np.square(states[:, None] - states).sum(-1)
    width = distances[np.triu_indices(25, 1)].mean()
    assert mean_width(states) == pytest.approx(width)
    kernel = np.exp(-distances / width)
    assert_allclose(inner_products(states, states, width), kernel, rtol=1e-9)
    values, vectors = np.linalg.eigh(kernel)
    features = vectors * np.sqrt(values.clip(0))
    assert_allclose(loo_scores(states, labels, groups, 0.5, width), refitted(features, labels, groups, 0.5), atol=1e-8)


def test_many_labellings_at_once():
    states, labels, groups = drawn(5, 20, 7, 5)
    probe = CrossSequenceProbe(2.0).fit(states, labels)
    every = np.stack([labels, ~labels, np.roll(labels, 3)], axis=1)
    for column, scores in zip(every.T, probe.left_out(groups, every).T, strict=True):
        assert_allclose(scores, loo_scores(states, column, groups, 2.0), atol=1e-12)
    assert_allclose(probe.left_out(groups, ~labels), -probe.left_out(groups), atol=1e-12)


def test_the_probe_is_ridge_regression():
    states, labels, _ = drawn(7, 30, 6, 5)
    y = np.where(labels, 1.0, -1.0)
    theirs = Ridge(alpha=3.0).fit(states, y)
    ours = CrossSequenceProbe(3.0).fit(states, labels)
    assert_allclose(ours.coef_, theirs.coef_, rtol=1e-8)
    unseen = drawn(8, 12, 6, 5)[0]
    assert_allclose(ours.decision_function(unseen), theirs.predict(unseen) - y.mean(), atol=1e-10)
    predicted = ours.decision_function(states) > 0
    assert ours.score(states, labels) == pytest.approx(balanced_accuracy_score(labels, predicted))


def test_a_gaussian_probe_fits_what_no_line_parts():
    states = np.random.default_rng(0).normal(size=(200, 2))
    inside = np.square(states).sum(axis=1) < 1
    assert CrossSequenceProbe(0.1).fit(states, inside).score(states, inside) < 0.7
    assert CrossSequenceProbe(0.1, width=1.0).fit(states, inside).score(states, inside) > 0.9


def test_refused():
    states, labels, groups = drawn(0, 10, 3, 4)
    with pytest.raises(ValueError, match="ridge"):
        loo_scores(states, labels, groups, 0.0)
    with pytest.raises(ValueError, match="groups"):
        loo_scores(states, labels, [1] * 10, 1.0)
    with pytest.raises(ValueError, match="groups"):
        loo_scores(states, labels, groups[:-1], 1.0)


# --- what is planted, and what is not

ENTITIES, ROWS, WIDTH = 24, 4, 30
LABELS = np.repeat(np.arange(ENTITIES) < ENTITIES // 2, ROWS)
GROUPS = [f"entity {i}" for i in np.repeat(np.arange(ENTITIES), ROWS)]


def noise(seed):
    """States that differ by entity and by row, and not by label."""
    rng = np.random.default_rng(seed)
    return np.repeat(rng.normal(size=(ENTITIES, WIDTH)), ROWS, axis=0) + rng.normal(size=(ENTITIES * ROWS, WIDTH))


def planted(seed, size=4.0):
    """Noise, and one direction along which the labels differ."""
    states = noise(seed)
    states[:, 0] += size * LABELS
    return states


def radial(seed):
    """States of one label lie farther out, on every side."""
    return np.random.default_rng(seed).normal(size=(len(LABELS), 3)) * np.where(LABELS, 4.0, 1.0)[:, None]


def area(states, ridge=10.0, groups=GROUPS, width=None):
    return roc_auc_score(LABELS, loo_scores(states, LABELS, groups, ridge, width))


def test_a_direction_that_entities_share_is_found_and_an_entity_s_own_is_not():
    assert np.mean([area(planted(seed)) for seed in range(8)]) > 0.8
    assert np.mean([area(noise(seed)) for seed in range(8)]) == pytest.approx(0.5, abs=0.1)
    # Leaving out rows instead of entities finds the entity, and takes it for the label.
    assert np.mean([area(noise(seed), groups=range(len(LABELS))) for seed in range(8)]) > 0.75


def test_noise_scores_chance_however_strong_the_ridge():
    assert np.mean([area(noise(seed), ridge=1e6) for seed in range(30)]) == pytest.approx(0.5, abs=0.08)
    # With the mean label left in, every fold's score is just that, and leaving out turned it against the row.
    y = np.where(LABELS, 1.0, -1.0)
    means = [y[np.array(GROUPS) != group].mean() for group in GROUPS]
    assert roc_auc_score(LABELS, loo_scores(noise(0), LABELS, GROUPS, 1e9) + means) < 0.05


def test_a_kernel_sees_what_no_line_parts_and_also_what_one_does():
    assert np.mean([area(radial(seed)) for seed in range(4)]) < 0.65
    assert np.mean([area(radial(s), 0.1, width=mean_width(radial(s))) for s in range(4)]) > 0.8
    both = [(area(planted(s)), area(planted(s), 0.1, width=mean_width(planted(s)))) for s in range(6)]
    assert np.diff(np.mean(both, axis=0))[0] == pytest.approx(0, abs=0.05)


def test_states_far_from_all_others_are_not_out_of_reach():
    far = np.concatenate([noise(0), noise(1)[:10] + 1000.0])
    width = mean_width(far)
    assert inner_products(far[-1:], far[:1], width)[0, 0] > 1e-4
    squares = np.square(far[:, None] - far).sum(-1)
    assert np.exp(-squares[-1, 0] / np.median(squares)) == 0.0, "the median leaves them nothing to be compared with"


def test_placements_average_to_the_auc():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 6, 15).astype(float), rng.integers(0, 6, 9).astype(float)
        assert placed(a, b).mean() == pytest.approx(roc_auc_score([1] * 15 + [0] * 9, [*a, *b]))
        assert placed(b, b).mean() == pytest.approx(0.5)


def test_a_flipped_sign_is_no_erasure():
    labels = [True, True, True, False]
    assert balanced_accuracy([1.0, 2.0, -1.0, -1.0], labels) == pytest.approx((2 / 3 + 1) / 2)
    assert balanced_accuracy([-1.0, -2.0, -1.0, 1.0], labels) == 0.0
    # What is projected out along a direction that saw the labels leaves less than chance, of noise even.
    before, after = [], []
    for seed in range(4):
        states = noise(seed)
        seen = CrossSequenceProbe(10.0).fit(states, LABELS).coef_
        before.append(area(states))
        after.append(area(project_out(states, seen)))
    assert np.mean(before) > 0.4
    assert np.mean(after) < 0.2


def test_projecting_out():
    states = noise(2)
    direction = np.random.default_rng(0).normal(size=WIDTH)
    left = project_out(states, direction)
    assert_allclose(left @ direction, 0, atol=1e-9)
    assert_allclose(project_out(left, -3 * direction), left, atol=1e-9)
    across = np.linalg.svd(direction[None])[2][1:].T  # everything at right angles stays
    assert_allclose(left @ across, states @ across, atol=1e-9)


def test_halves_never_share_an_entity():
    first = halves(GROUPS, 0)
    assert {g for g, a in zip(GROUPS, first, strict=True) if a}.isdisjoint(
        g for g, a in zip(GROUPS, first, strict=True) if not a
    )
    assert first.sum() == len(first) / 2
    assert (halves(GROUPS, 0) == first).all()
    assert (halves(GROUPS, 1) != first).any()


def found(states):
    return {name: value for name, value, _ in attackers(states, LABELS, GROUPS, mean_width(states), 0)}


def few_features(seed, size):
    """Rows alike but for one direction of six, so that it can be estimated well."""
    states = np.random.default_rng(seed).normal(size=(len(LABELS), 6))
    states[:, 0] += size * LABELS
    return states


def test_attackers():
    probes = [f"{kind}, half the entities, {k} directions removed" for k in (0, 1, 2, 4) for kind in ("linear", "Gaussian")]  # fmt: skip # noqa: E501
    line = [found(few_features(seed, 4.0)) for seed in range(6)]
    assert list(line[0]) == ["linear", *probes]
    means = {name: np.mean([one[name] for one in line]) for name in probes}
    assert min(means[name] for name in probes[:2]) > 0.95
    assert max(means[name] for name in probes[-2:]) < 0.6, "one direction carried it"
    assert means[probes[0]] > means[probes[2]] > means[probes[4]], "estimated from others, so not all in one step"
    # Nothing is lost of what lies in no direction.
    wide = [np.concatenate([radial(seed), noise(seed)], axis=1) for seed in range(4)]
    assert np.mean([found(states)[probes[-1]] for states in wide]) > 0.7
    # And nothing is found, nor turned below chance, where there is nothing.
    for figures in zip(*(found(noise(seed)).values() for seed in range(8)), strict=True):
        assert np.mean(figures) == pytest.approx(0.5, abs=0.15)


# --- the test of the gap


def test_relabelled_p():
    rng = np.random.default_rng(0)
    labels, groups = np.arange(160) < 80, np.arange(160) // 2

    def probe(shift):
        states = rng.normal(size=(160, 10))
        states[:, 0] += shift * labels
        return CrossSequenceProbe(10.0).fit(states, labels)

    p, least = relabelled_p([(probe(0), probe(0)), (probe(3), probe(0))], labels, groups, 0)
    assert p <= 0.01
    assert least == 1 / 2000
    null = [relabelled_p([(probe(0), probe(0))], labels, groups, 0)[0] for _ in range(12)]
    assert 0.25 < np.mean(null) < 0.75
    same = probe(3)
    assert relabelled_p([(same, same)], labels, groups, 0)[0] == 1.0, "random weights part them as well: no gap"


def test_labels_across_a_strong_structure_score_below_chance_and_the_test_does_not_mind():
    across = np.tile(np.repeat([True, False], ROWS), ENTITIES // 2)  # half of them in either cluster
    states = noise(0)
    states[:, 0] += 50.0 * LABELS
    assert roc_auc_score(across, loo_scores(states[:, :1], across, GROUPS, 10.0)) < 0.2
    pair = (CrossSequenceProbe(10.0).fit(states[:, :1], across), CrossSequenceProbe(10.0).fit(noise(1), across))
    assert relabelled_p([pair], across, GROUPS, 0)[0] > 0.3


def test_few_entities_bound_the_p_value():
    labels, groups = np.array([1, 1, 1, 1, 0, 0, 0, 0], dtype=bool), [0, 0, 1, 1, 2, 2, 3, 3]
    rng = np.random.default_rng(0)
    states = np.where(labels, 3.0, -3.0)[:, None] + rng.normal(size=(8, 2))
    pair = (CrossSequenceProbe().fit(states, labels), CrossSequenceProbe().fit(rng.normal(size=(8, 2)), labels))
    p, least = relabelled_p([pair], labels, groups, 0)
    assert least == 2 / 6, "three ways to part them, and their mirror images"
    assert p >= least


# --- random weights


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2"])
def test_randomize_gives_the_weights_of_a_model_not_yet_trained(kind):
    config = tiny_config(kind, 50)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        fresh = AutoModelForCausalLM.from_config(config).state_dict()
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        weight.data += 1.0
    state = torch.get_rng_state()
    randomize(model, seed=3)
    assert torch.equal(torch.get_rng_state(), state), "nobody else's randomness is touched"
    assert all(torch.equal(weight, fresh[name]) for name, weight in model.state_dict().items())
    randomize(model, seed=4)
    assert any(not torch.equal(weight, fresh[name]) for name, weight in model.state_dict().items())


# --- the instrument


@cache
def captured(made: str) -> tuple[Case, Evidence]:
    case = tiny_case({"target": made}, ("forget", "retain", "holdout"))
    run = Run(case, _scratch() / "cross-sequence", SILENT, [CrossSequence()], [])
    with one_thread():
        evidence = capture_all(run, take_inventories(case))
    assert not run.not_run
    return case, evidence


def test_the_state_is_the_one_that_predicts_the_last_token():
    case, evidence = captured("original")
    assert evidence.roles == ["target", "target+random@0"]
    target, random = open_target("original"), open_target("original")
    randomize(random.model, case.options.seed)
    for role, opened in (("target", target), ("target+random@0", random)):
        rows = evidence.scores(role, "cross-sequence/forget")
        for row, arrays in list(zip(case.rows("forget", 60), rows, strict=True))[:5]:
            whole = target.encode(row.prompt, row.answer).ids
            tokens = before_last(target, row)
            assert (tokens.ids[:-1], tokens.scored) == (whole[:-1], 1)
            with torch.no_grad():
                out = opened.model(input_ids=torch.tensor([whole[:-1]]), output_hidden_states=True)
            assert arrays["hidden"].shape == (1, 2, 64)
            assert_allclose(arrays["hidden"][0, 0], out.hidden_states[1][0, -1].numpy(), atol=1e-4)
            with torch.no_grad():
                logits = opened.model.lm_head(opened.model.model.norm(torch.tensor(arrays["hidden"][0, 1])))
            assert_allclose(logits.numpy(), out.logits[0, -1].numpy(), atol=1e-3)


def test_random_weights_are_the_target_s_alone():
    instrument, case = CrossSequence(), captured("original")[0]
    assert [stage.name for stage in instrument.stages(case, open_target("original"))] == ["random@0"]
    assert not instrument.stages(case, open_target("original", "original"))
    assert not instrument.requests(case, open_target("original").altered("relearn-a@20", "x"))


def test_the_gap_is_one_auc_less_another():
    """Recomputed from the evidence by refits in another library's kernel ridge."""
    case, evidence = captured("original")
    gap, _ = CrossSequence().measure(case, evidence)
    layer = int(gap.layer.split()[-1])
    rows = {name: case.rows(name, 60) for name in ("retain", "forget", "holdout")}
    groups = [f"{name}:{entity}" for name in ("forget", "holdout") for entity in case.clusters(rows[name])]
    labels = np.arange(len(groups)) < len(rows["forget"])
    areas = []
    for role in evidence.roles:
        states = {
            name: np.stack([a["hidden"][0, layer] for a in evidence.iterate(role, f"cross-sequence/{name}")])
            for name in rows
        }
        mean, spread = states["retain"].mean(axis=0), states["retain"].std(axis=0)
        states = {name: (x.astype(float) - mean) / spread for name, x in states.items()}
        every = np.concatenate(list(states.values()))
        width = np.square(every[:, None] - every).sum(-1)[np.triu_indices(len(every), 1)].mean()
        x = np.concatenate([states["forget"], states["holdout"]])
        values, vectors = np.linalg.eigh(np.exp(-np.square(x[:, None] - x).sum(-1) / width))
        scores = refitted(vectors * np.sqrt(values.clip(0)), labels, groups, 0.1)
        areas.append(roc_auc_score(labels, scores))
    assert gap.estimate == pytest.approx(areas[0] - areas[1], abs=2e-3)
    listed = {(row[0], row[1], row[2]): row[3:] for row in gap.table.rows}
    assert listed["Gaussian", "target", layer][0] == pytest.approx(areas[0], abs=2e-3)
    assert listed["Gaussian", "random weights", layer][0] == pytest.approx(areas[1], abs=2e-3)
    assert all(row[5] == max(row[4], 1 - row[4]) for row in gap.table.rows)
    assert {row[1] for row in gap.table.rows if row[0].endswith("4 directions removed")} == {"target", "random weights"}


def test_findings():
    known, never = (CrossSequence().measure(*captured(made)) for made in ("original", "retrained"))
    assert [f.id for f in known] == ["cross-sequence/gap", "cross-sequence/transfer"]
    for found_in, less in zip(known, never, strict=True):
        assert found_in.estimate > less.estimate, "what was memorized shows more than what was not"
        assert found_in.decides == (False, False)
        assert {c.name for c in found_in.controls} >= {"positive control", "bag of words"}
    assert "random weights" in {c.name for c in known[1].controls}
    for gap, transfer in (known, never):
        placements = {tuple(row[:3]): row[3] for row in transfer.table.rows}
        level = placements["target", "forget", float(gap.layer.split()[-1])]
        assert gap.sides == (Side.REMAINS if level > 0.5 else Side.BEYOND, Side.NEITHER)
        assert max(placements["target", "forget", layer] for layer in (0.0, 1.0)) == pytest.approx(
            transfer.estimate + 0.5
        )


def test_too_few_entities():
    case = tiny_case({"target": "original"}, ("forget", "retain", "holdout"))
    assert CrossSequence().missing(case) is None
    few = case.sets["holdout"]
    people = sorted(set(few.clusters()))[:3]
    cut = type(few)("holdout", "", tuple(row for row in few if row.entity in people), "")
    small = Case(case.name, case.models, case.specs, {**case.sets, "holdout": cut}, case.options)
    assert "4 entities in the holdout set" in (CrossSequence().missing(small) or "")
