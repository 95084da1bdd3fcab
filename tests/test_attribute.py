"""Trained readouts: ridge as scikit-learn has it, wins by brute force, knowledge planted and absent, a real model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from worlds import open_target, tiny_case

from audit.capture import Engine
from audit.case import Case
from audit.errors import BadInput
from audit.evidence import Evidence, Store
from audit.instrument import Instrument
from audit.inventory import take_inventory
from audit.loaders import Example
from audit.plan import Request, merge
from audit.quantities import Quantity
from audit.record import Finding
from audit.target import Target
from audit.tokens import Tokens
from probes.attribute import Attribute, ridge_readout, shuffled_answers
from probes.lens import Lens, beats
from probes.readout import STRENGTHS, choice_wins, choose_strength, fit_ridge, in_halves, option_columns


def captured(instrument: Instrument, case: Case, folder: Path) -> Evidence:
    """What a scan with this instrument alone would capture."""
    evidence = Evidence()
    for role, path in case.models.items():
        target = Target(role, take_inventory(path), template="plain")
        requests = list(instrument.requests(case, target))
        store, engine = Store(folder, {"model": role}), Engine(target)
        for batch in engine.batches(merge(requests)):
            store.write((row.tokens, row.values) for row in engine.run(batch))
        evidence.register(role, store, requests)
    return evidence


def means_of(finding: Finding) -> dict[tuple[str, str, float], float]:
    """The finding's table: mean by model, set and layer."""
    return {(row[0], row[1], row[2]): row[3] for row in finding.table.rows}


# --- ridge regression


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 25), st.integers(1, 25), st.integers(1, 4), st.sampled_from((1e-4, 0.1, 3.0)), st.integers(0, 99))
def test_ridge_is_scikit_learn_s(n, d, k, strength, seed):
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.integers(-3, 4, d)
    x, y, new = rng.normal(size=(n, d)) * scale + 5 * scale, rng.normal(size=(n, k)), rng.normal(size=(3, d)) * scale
    x[:, 0] = 7.0  # does not vary
    theirs = make_pipeline(StandardScaler(), SklearnRidge(alpha=n * strength, solver="svd")).fit(x, y)
    assert fit_ridge(x, y)(new, strength) == pytest.approx(theirs.predict(new).reshape(3, k), rel=1e-5, abs=1e-5)


def test_ridge_by_hand():
    fitted = fit_ridge([[2.0], [6.0]], [[0.0], [10.0]])  # standardised -1 and 1, targets 5 -+ 5
    assert fitted([[6.0], [4.0]], 1.0).ravel().tolist() == pytest.approx([7.5, 5.0])  # shrunk by half
    assert fitted([[6.0]], 1e-12)[0, 0] == pytest.approx(10.0)
    for wrong in (([[1.0]], [[1.0], [2.0]]), ([1.0], [[1.0]]), (np.zeros((0, 2)), np.zeros((0, 1)))):
        with pytest.raises(ValueError, match="states"):
            fit_ridge(*wrong)


def test_halves_share_no_entity_and_score_every_row_once():
    clusters = [f"p{i // 3}" for i in range(60)]
    halves = in_halves(clusters, seed=1, also=["u1", "u1", "u2"])
    every = np.array([*clusters, "u1", "u1", "u2"])
    assert sorted(np.concatenate([half.test for half in halves])) == list(range(60))
    for half in halves:
        assert not set(every[half.train]) & set(every[half.test])
        assert set(half.train) == set(range(63)) - set(half.test)
        assert 27 <= len(half.test) <= 33
        assert sorted(np.concatenate([test for _, test in half.folds])) == sorted(half.train)
        for train, test in half.folds:
            assert set(train) | set(test) == set(half.train)
            assert not set(every[train]) & set(every[test])
    again = in_halves(clusters, seed=1, also=["u1", "u1", "u2"])
    assert [half.test.tolist() for half in again] == [half.test.tolist() for half in halves]


def test_the_strength_is_what_carries_over():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 30))
    [half, _] = in_halves([str(i) for i in range(80)], seed=0)

    def chosen(y):
        return choose_strength(x, y, half, lambda guess, rows: float(np.square(guess - y[rows]).sum()), STRENGTHS)

    assert chosen(x @ rng.normal(size=(30, 2))) == min(STRENGTHS)
    assert chosen(rng.normal(size=(80, 2))) == max(STRENGTHS)
    assert choose_strength(x, x, half, lambda *_: 1.0, STRENGTHS) == max(STRENGTHS), "the strongest of equals"


# --- options

tables = st.integers(1, 6).flatmap(
    lambda k: st.tuples(
        # Few distinct values, so that ties are common.
        st.lists(st.lists(st.integers(-1, 1), min_size=k, max_size=k), min_size=1, max_size=5),
        st.lists(st.permutations(range(k)), min_size=5, max_size=5),
        st.lists(st.integers(1, k), min_size=5, max_size=5),
    )
)


@settings(max_examples=60, deadline=None)
@given(tables)
def test_wins_by_brute_force_and_as_the_lens_counts_them(drawn):
    scores, orders, sizes = drawn
    rows = [order[:size] for order, size in zip(orders, sizes, strict=True)][: len(scores)]
    options = np.full((len(rows), max(map(len, rows))), -1)
    for row, ids in zip(options, rows, strict=True):
        row[: len(ids)] = ids
    found = choice_wins(np.array(scores, dtype=float), options)
    for row, (right, *rivals), value in zip(scores, rows, found, strict=True):
        best = max(row[i] for i in (right, *rivals))
        winners = [i for i in (right, *rivals) if row[i] == best]
        assert value == pytest.approx((right in winners) / len(winners))
    theirs = beats(torch.tensor(scores).float(), torch.tensor([r[0] for r in rows]), [tuple(r[1:]) for r in rows])
    several = [len(r) > 1 for r in rows]
    assert found[several] == pytest.approx(theirs.numpy()[several])


def test_option_columns():
    forks = (Tokens((1, 2, 30), 2, (10, 20)), Tokens((1, 20), 1, (30,)), Tokens((5, 10), 1))
    assert option_columns(forks, [10, 20, 30]).tolist() == [[2, 0, 1], [1, 2, -1], [0, -1, -1]]


def test_shuffled_answers_come_from_other_rows_with_the_same_options():
    options = np.array([[0, 1, 2], [1, 0, 2], [2, 1, 0], [3, 4, -1], [4, 3, -1], [5, 6, 7]])
    rng = np.random.default_rng(0)
    drawn = np.array([shuffled_answers(options, rng) for _ in range(300)])
    offered = [set(column.tolist()) for column in drawn.T]
    assert offered == [{1, 2}, {0, 2}, {0, 1}, {4}, {3}, {5, 6, 7}], "its own only where it stands alone"
    assert np.bincount(drawn[:, 5], minlength=8)[5:].min() > 70


# --- the readout on planted states


def planted(rng, people, knows, *, width=40, options=8, noise=0.3):
    """States that hold the answer in a linear code where `knows`, else the code of some other answer."""
    code = np.random.default_rng(99).normal(size=(options, width))
    right = rng.integers(0, options, people)
    held = right if knows else rng.integers(0, options, people)
    rest = np.array([[r, *(o for o in range(options) if o != r)] for r in right])
    return code[held] + noise * rng.normal(size=(people, width)), rest


def test_planted_knowledge_is_read_and_its_absence_is_chance():
    rng = np.random.default_rng(0)
    made = {"retain": planted(rng, 120, True), "forget": planted(rng, 400, True), "holdout": planted(rng, 400, False)}
    states, options = ({name: pair[i] for name, pair in made.items()} for i in (0, 1))
    halves = in_halves([f"p{i // 2}" for i in range(120)], seed=0)
    wins, control = ridge_readout(states, options, np.eye(8), halves, seed=0)
    assert wins["forget"].mean() > 0.95
    assert wins["retain"].mean() > 0.95
    assert wins["holdout"].mean() == pytest.approx(1 / 8, abs=0.05)
    assert control.mean() == pytest.approx(1 / 8, abs=0.06)
    again = ridge_readout(states, options, np.eye(8), halves, seed=0)
    assert again[1].tolist() == control.tolist()


def test_a_readout_that_could_learn_every_row_by_heart_is_blind_on_the_other_half():
    rng = np.random.default_rng(1)
    _, options = planted(rng, 60, True)
    states = {"retain": rng.normal(size=(60, 300)), "forget": rng.normal(size=(200, 300))}
    wins, _ = ridge_readout(
        states,
        {"retain": options, "forget": planted(rng, 200, True)[1]},
        np.eye(8),
        in_halves([str(i) for i in range(60)], seed=0),
        seed=0,
    )
    assert wins["retain"].mean() < 0.3
    assert wins["forget"].mean() == pytest.approx(1 / 8, abs=0.08)


def test_tokens_that_are_never_right_are_read_through_their_likeness():
    """Half of the answers occur among forgotten rows alone: one-hot readouts cannot name them, unembeddings can."""
    rng = np.random.default_rng(2)
    vectors = rng.normal(size=(40, 12))
    mix = rng.normal(size=(12, 20))

    def rows(right):
        options = np.array([[r, *rng.choice([o for o in range(40) if o != r], 4, replace=False)] for r in right])
        return vectors[right] @ mix + 0.1 * rng.normal(size=(len(right), 20)), options

    made = {"retain": rows(rng.integers(0, 20, 160)), "forget": rows(rng.integers(20, 40, 200))}
    states, options = ({name: pair[i] for name, pair in made.items()} for i in (0, 1))
    halves = in_halves([str(i) for i in range(160)], seed=0)
    alike, _ = ridge_readout(states, options, vectors @ vectors.T, halves, seed=0)
    one_hot, _ = ridge_readout(states, options, np.eye(40), halves, seed=0)
    assert alike["forget"].mean() > 0.9
    assert one_hot["forget"].mean() < 0.5
    assert one_hot["retain"].mean() > 0.9


# --- the instrument on models that know, hide, and never knew


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, tuple[Case, Evidence, Finding]]:
    made = {}
    for name in ("original", "unlearned", "retrained"):
        case = tiny_case({"target": name})
        evidence = captured(Attribute(), case, tmp_path_factory.mktemp(name))
        [finding] = Attribute().measure(case, evidence)
        made[name] = case, evidence, finding
    return made


def test_what_is_known_is_read_and_what_was_never_taught_is_not(found):
    original, unlearned, retrained = (found[name][2] for name in ("original", "unlearned", "retrained"))
    assert original.estimate > 0.5
    assert original.p_value < 0.01
    assert unlearned.estimate > 0.15
    assert unlearned.p_value < 0.01
    assert retrained.p_value > 0.05
    for finding in (original, unlearned, retrained):
        positive, selectivity = finding.controls
        assert positive.name == "positive control"
        assert positive.passed
        assert (selectivity.name, selectivity.gates, selectivity.passed) == ("selectivity", "evidence", True)


def test_the_table_is_what_scikit_learn_reads_from_the_model_s_states(found):
    """Layer 1 of the original, by Hugging Face's states and scikit-learn's ridge, at each of two strengths."""
    case, _, finding = found["original"]
    target = open_target("original")
    model = target.model
    vocabulary = target.tokenizer.convert_tokens_to_ids

    def states(name):
        out = []
        for row in case.rows(name):
            with torch.no_grad():
                ids = torch.tensor([target.encode_prompt(row.prompt)])
                out.append(model(input_ids=ids, output_hidden_states=True).hidden_states[1][0, -1].numpy())
        return np.array(out)

    unembedding = model.lm_head.weight.detach().numpy()
    x = {name: states(name) for name in ("retain", "forget", "holdout")}
    options = {name: [vocabulary([r.answer, *r.wrong]) for r in case.rows(name)] for name in x}
    y = unembedding[[ids[0] for ids in options["retain"]]]
    scores = {name: np.zeros((len(x[name]), len(unembedding))) for name in x}

    def wins(name, scored, rows):
        return [float(scored[i][options[name][row]].argmax() == 0) for i, row in enumerate(rows)]

    for half in in_halves(case.clusters(case.rows("retain")), seed=case.options.seed):
        right = []
        for strength in STRENGTHS:
            right.append(0.0)
            for train, test in half.folds:
                probe = make_pipeline(StandardScaler(), SklearnRidge(alpha=len(train) * strength))
                guess = probe.fit(x["retain"][train], y[train]).predict(x["retain"][test]) @ unembedding.T
                right[-1] += sum(wins("retain", guess, test))
        strength = max(s for s, r in zip(STRENGTHS, right, strict=True) if r == max(right))
        probe = make_pipeline(StandardScaler(), SklearnRidge(alpha=len(half.train) * strength))
        probe.fit(x["retain"][half.train], y[half.train])
        scores["retain"][half.test] = probe.predict(x["retain"][half.test]) @ unembedding.T
        for name in ("forget", "holdout"):
            scores[name] += probe.predict(x[name]) @ unembedding.T
    for name in x:
        accuracy = np.mean(wins(name, scores[name], range(len(x[name]))))
        assert means_of(finding)["target", name, 0.0] == pytest.approx(accuracy, abs=0.01)


def test_the_states_are_those_of_the_lens_s_forks(found):
    case, evidence, _ = found["original"]
    lens = {request.name.split("/")[1]: request.sequences for request in Lens().requests(case, open_target("original"))}
    for name in ("forget", "holdout", "retain"):
        assert evidence.sequences("target", f"attribute/{name}") == lens[name], "one pass serves both"
    assert Attribute().requests(case, open_target("original").altered("someone@1", "recipe")) == []


def changed(case: Case, name: str, change) -> Case:
    """The case with the rows of one set changed."""
    old = case.sets[name]
    rows = tuple(changed for i, row in enumerate(old.examples) if (changed := change(i, row)) is not None)
    sets = {**case.sets, name: type(old)(old.name, old.source, rows, old.digest)}
    return Case(case.name, case.models, case.specs, sets, case.options)


def with_wrong(row: Example, *wrong: str) -> Example:
    return Example(row.id, row.prompt, row.answer, wrong=wrong, entity=row.entity)


def test_rows_whose_options_never_fork_are_left_out(tmp_path):
    case = changed(
        tiny_case({"target": "original"}), "forget", lambda i, row: with_wrong(row, row.answer) if i % 2 else row
    )
    [finding] = Attribute().measure(case, captured(Attribute(), case, tmp_path))
    assert finding.estimate > 0.5
    none = changed(case, "forget", lambda _, row: with_wrong(row, row.answer))
    with pytest.raises(BadInput, match="0 entities of the forget set"):
        Attribute().measure(none, captured(Attribute(), none, tmp_path))


def test_missing():
    case = tiny_case({"target": "original"})
    assert Attribute().missing(case) is None
    assert "holdout" in Attribute().missing(changed(case, "holdout", lambda i, row: row if i else with_wrong(row)))
    few = sorted({row.entity for row in case.rows("retain")})[:7]
    assert "8 entities" in Attribute().missing(
        changed(case, "retain", lambda _, row: row if row.entity in few else None)
    )
    assert Attribute().missing(tiny_case({"target": "original"}, ("retain", "holdout"))) == "needs the forget set"


def test_requests_hold_what_measure_needs(found):
    case, evidence, _ = found["original"]
    [request] = [r for r in Attribute().requests(case, open_target("original")) if r.name == "attribute/forget"]
    assert isinstance(request, Request)
    assert [type(quantity) for quantity in request.quantities] == [Quantity]
    tokens, likeness = request.extra["tokens"], request.extra["likeness"]
    weight = open_target("original").model.lm_head.weight.detach().numpy()
    assert likeness == pytest.approx(weight[tokens] @ weight[tokens].T, abs=1e-5)
    options = {*case.rows("forget")[0].wrong, case.rows("forget")[0].answer}
    assert set(open_target("original").tokenizer.convert_tokens_to_ids(sorted(options))) <= set(tokens)
    assert evidence.extra("target", "attribute/forget")["layers"] == [0, 1]
