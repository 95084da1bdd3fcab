"""The tuned lens: affine maps recovered, other bases read through, nothing carried over, the last layer the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from test_attribute import captured, means_of
from worlds import open_target, tiny_case

from probes.lens import Lens
from probes.readout import Half, choice_wins, fit_ridge, in_halves
from probes.tuned_lens import STRENGTHS, Reader, TunedLens, translated_wins, translator

# --- the translator


def one_half(n: int) -> Half:
    return in_halves([str(i) for i in range(n)], seed=0)[0]


def test_an_affine_change_of_terms_is_undone():
    rng = np.random.default_rng(0)
    turned, _ = np.linalg.qr(rng.normal(size=(12, 12)))
    final = rng.normal(size=(300, 12))
    states = (final - 3.0) @ turned
    new = rng.normal(size=(50, 12))
    translate = translator(states, final, one_half(300))
    assert translate((new - 3.0) @ turned) == pytest.approx(new, abs=0.05)
    assert np.abs((new - 3.0) @ turned - new).mean() > 1, "and there was something to undo"


def test_without_anything_to_learn_it_is_the_logit_lens_less_its_mean_error():
    rng = np.random.default_rng(1)
    states, new = rng.normal(size=(60, 20)), rng.normal(size=(5, 20))
    half = one_half(60)
    final = states + 2.0 + rng.normal(size=(60, 20))
    offset = (final - states)[half.train].mean(axis=0)
    free = new + fit_ridge(states[half.train], (final - states)[half.train])(new, STRENGTHS[0])
    assert np.abs(free - new - offset).mean() > 1, "unshrunk, noise would be learned"
    assert np.abs(translator(states, final, half)(new) - new - offset).mean() < 0.1
    assert translator(states, states, half)(new) == pytest.approx(new, abs=1e-12), "the last layer is left as it is"


def test_the_translator_is_scikit_learn_s_ridge_of_what_is_added():
    rng = np.random.default_rng(2)
    states = rng.normal(size=(80, 6))
    final = states @ rng.normal(size=(6, 6)) + rng.normal(size=(80, 6))
    half, new = one_half(80), rng.normal(size=(4, 6))
    errors = []
    for strength in STRENGTHS:
        errors.append(0.0)
        for train, test in half.folds:
            probe = make_pipeline(StandardScaler(), SklearnRidge(alpha=len(train) * strength))
            guess = probe.fit(states[train], (final - states)[train]).predict(states[test])
            errors[-1] += ((guess - (final - states)[test]) ** 2).sum()
    best = STRENGTHS[int(np.argmin(errors))]
    probe = make_pipeline(StandardScaler(), SklearnRidge(alpha=len(half.train) * best))
    theirs = probe.fit(states[half.train], (final - states)[half.train]).predict(new) + new
    assert translator(states, final, half)(new) == pytest.approx(theirs, abs=1e-8)


def planted(rng, rows, known, turned, vectors):
    """Rows whose final state points at one of eight options, the right one if `known`; a layer below in other terms."""
    right = rng.integers(0, 8, rows)
    held = right if known else rng.integers(0, 8, rows)
    final = vectors[held] + 0.2 * rng.normal(size=(rows, vectors.shape[1]))
    options = np.array([[r, *(o for o in range(8) if o != r)] for r in right])
    return final @ turned.T, final, options


def test_what_a_layer_keeps_in_other_directions_is_read_and_nothing_else():
    rng = np.random.default_rng(3)
    turned, _ = np.linalg.qr(rng.normal(size=(16, 16)))
    vectors = rng.normal(size=(8, 16))
    made = {name: planted(rng, 200, name != "holdout", turned, vectors) for name in ("retain", "forget", "holdout")}
    states, final, options = ({name: row[i] for name, row in made.items()} for i in range(3))

    def reader(x):
        return x @ vectors.T

    other = {name: o[:, [1, 0, *range(2, 8)]] for name, o in options.items()}  # a reading for which another is right
    halves = in_halves([str(i // 2) for i in range(200)], seed=0)
    wins, elsewhere = translated_wins(
        states, states["retain"], final["retain"], halves, [(reader, options), (reader, other)]
    )
    assert wins["forget"].mean() > 0.95
    assert wins["retain"].mean() > 0.95
    assert wins["holdout"].mean() == pytest.approx(1 / 8, abs=0.07)
    assert elsewhere["forget"].mean() < 0.05
    # The logit lens reads nothing there.
    assert choice_wins(reader(states["forget"]), options["forget"]).mean() < 0.4


def test_a_translator_that_knows_its_rows_by_heart_brings_nothing_to_others():
    """States that say only which row it is: what the final states of the rows fitted on hold must not come along."""
    rng = np.random.default_rng(4)
    vectors = 3 * rng.normal(size=(8, 200))
    _, final, options = planted(rng, 80, True, np.eye(200), vectors)
    _, _, unknown = planted(rng, 300, True, np.eye(200), vectors)
    states = {"retain": rng.normal(size=(80, 200)), "forget": rng.normal(size=(300, 200))}
    halves = in_halves([str(i) for i in range(80)], seed=0)
    reading = (lambda x: x @ vectors.T, {"retain": options, "forget": unknown})
    [wins] = translated_wins(states, states["retain"], final, halves, [reading])
    assert wins["retain"].mean() == pytest.approx(1 / 8, abs=0.12)
    assert wins["forget"].mean() == pytest.approx(1 / 8, abs=0.07)


def test_of_two_readings_one_sees_past_an_edited_head():
    rng = np.random.default_rng(5)
    vectors = rng.normal(size=(8, 16))
    made = {name: planted(rng, 150, True, np.eye(16), vectors) for name in ("retain", "forget")}
    states, final, options = ({name: row[i] for name, row in made.items()} for i in range(3))
    halves = in_halves([str(i) for i in range(150)], seed=0)
    readings = [(lambda x: x @ vectors[::-1].T, options), (lambda x: x @ vectors.T, options)]
    own, original = translated_wins(states, states["retain"], final["retain"], halves, readings)
    assert own["forget"].mean() < 0.2
    assert original["forget"].mean() > 0.95


# --- on models


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_the_reader_is_the_model_s_own_output(kind, tiny):
    """Final states by a plain hook before the final norm; logits by the model, its cap undone."""
    from audit.inventory import take_inventory
    from audit.target import Target
    from probes.readout import unembedding

    target = Target("target", take_inventory(tiny(kind)))
    model, seen = target.model, []
    handle = target.final_norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ids = torch.tensor([[5, 9, 11, 30, 7]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0]
    handle.remove()
    tokens = [3, 17, 40, 41]
    read = Reader(target.final_norm, *unembedding(target, tokens))(seen[0][0].double().numpy())
    cap = getattr(model.config, "final_logit_softcapping", None)
    expected = logits if cap is None else torch.atanh(logits / cap) * cap
    assert read == pytest.approx(expected[:, tokens].numpy(), abs=1e-3)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    made = {}
    for name, more in (("original", {}), ("unlearned", {"original": "original"}), ("retrained", {})):
        case = tiny_case({"target": name, **more})
        evidence = captured(TunedLens(), case, tmp_path_factory.mktemp(name))
        made[name] = case, TunedLens().measure(case, evidence)
    return made


def test_what_is_known_is_read_and_what_was_never_taught_is_not(found):
    [original], [unlearned, _], [retrained] = (found[name][1] for name in ("original", "unlearned", "retrained"))
    assert original.estimate > 0.5
    assert unlearned.estimate > 0.15
    assert unlearned.p_value < 0.01
    assert retrained.p_value > 0.05
    assert all(finding.controls[0].passed for finding in (original, unlearned, retrained))


def test_the_last_layer_is_the_model_itself(found):
    case, [finding, by_original] = found["unlearned"]
    target, head = open_target("unlearned"), open_target("original").model
    final: list[torch.Tensor] = []
    target.final_norm.register_forward_pre_hook(lambda _, args: final.append(args[0][0, -1]))
    for name in ("forget", "holdout", "retain"):
        own, others = [], []
        for row in case.rows(name):
            options = target.tokenizer.convert_tokens_to_ids([row.answer, *row.wrong])
            with torch.no_grad():
                logits = target.model(input_ids=torch.tensor([target.encode_prompt(row.prompt)])).logits[0, -1]
                own.append(logits[options].argmax().item() == 0)
                others.append(head.lm_head(head.model.norm(final[-1]))[options].argmax().item() == 0)
        assert means_of(finding)["target", name, 1.0] == pytest.approx(np.mean(own))
        assert means_of(by_original)["target", name, 1.0] == pytest.approx(np.mean(others))


def test_the_original_s_head_is_shown_and_decides_nothing(found):
    assert [f.id for f in found["unlearned"][1]] == ["tuned-lens/choice", "tuned-lens/original-head"]
    assert [f.decides for f in found["unlearned"][1]] == [(True, False), (False, False)]
    assert [f.id for f in found["original"][1]] == ["tuned-lens/choice"], "only where there is an original"


def test_requests():
    case = tiny_case({"target": "original"})
    target = open_target("original")
    made = {request.name: request for request in TunedLens().requests(case, target)}
    assert set(made) == {f"tuned-lens/{name}" for name in ("forget", "holdout", "retain", "utility")}
    for request in Lens().requests(case, target):
        assert made[f"tuned-lens/{request.name.split('/')[1]}"].sequences == request.sequences
    assert all(tokens.scored == 1 for request in made.values() for tokens in request.sequences)
    assert TunedLens().requests(case, target.altered("someone@1", "recipe")) == []
    alone = tiny_case({"target": "original"}, ("forget", "retain", "holdout"))
    assert "tuned-lens/utility" not in {request.name for request in TunedLens().requests(alone, target)}
    assert TunedLens().missing(case) is None
    assert TunedLens().missing(tiny_case({"target": "original"}, ("forget",))) == "needs the retain set"
