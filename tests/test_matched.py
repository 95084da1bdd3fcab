"""Ordinary fine-tunes as large as another model's change, and in the same places."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from worlds import build_tiny, one_thread, open_target, tiny_case

from audit.finetune import descend, endless
from audit.matched import change_by_site, fine_tune_matched
from audit.tokens import Tokens
from audit.weights import Folder, InMemory, TensorRow, compare_tensors
from detectors.trace import Trace, budget_for


def site_lengths(model, before) -> dict[int, float]:
    squares: dict[int, float] = {}
    for name, p in model.named_parameters():
        site = TensorRow(name, ()).site
        squares[site] = squares.get(site, 0.0) + float((p.double() - before[name].double()).square().sum())
    return {site: square**0.5 for site, square in squares.items()}


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def rows_for(target) -> list[Tokens]:
    case = tiny_case()
    return [target.encode(row.prompt, row.answer) for row in case.rows("retain")]


def test_change_by_site_is_the_length_of_the_difference():
    tiny = build_tiny()
    radii = change_by_site(Folder(tiny.models["unlearned"]), Folder(tiny.models["original"]))
    models = [open_target(name).model for name in ("unlearned", "original")]
    assert radii == pytest.approx(site_lengths(models[0], weights_of(models[1])))
    same = Folder(tiny.models["original"])
    assert not any(change_by_site(same, same).values())


def test_every_site_changes_by_its_length_and_in_proportion_to_the_steps():
    with one_thread():
        target = open_target("original")
        before = weights_of(target.model)
        radii = {-1: 0.5, 0: 1.0}  # everything else stays
        for step in fine_tune_matched(target.model, rows_for(target), radii, steps=5, learning_rate=1e-3, seed=0):
            lengths = site_lengths(target.model, before)
            for site, length in lengths.items():
                assert length == pytest.approx(radii.get(site, 0.0) * step / 5, rel=1e-3, abs=1e-6)
        assert any(radii.get(site, 0.0) == 0.0 for site in lengths)


def test_it_descends_what_it_is_taught():
    with one_thread():
        target = open_target("original")
        case = tiny_case()
        # What it does not know: the forget people's answers shifted by one.
        prompts = case.rows("holdout")
        rows = [target.encode(row.prompt, row.answer) for row in prompts]
        ids = [torch.tensor([r.ids]) for r in rows]

        def loss() -> float:
            with torch.no_grad():
                values = [
                    -target.model(input_ids=i).logits[0, r.start - 1].log_softmax(-1)[r.ids[r.start]]
                    for i, r in zip(ids, rows, strict=True)
                ]
            return float(torch.stack(values).mean())

        radii = dict.fromkeys(range(-1, 8), 1.0)
        began = loss()
        taught = list(fine_tune_matched(target.model, rows, radii, steps=12, learning_rate=1e-3, seed=0))
        assert taught == list(range(1, 13))
        assert loss() < began - 0.3


def test_the_same_seed_gives_the_same_model():
    def tuned(seed: int) -> dict[str, torch.Tensor]:
        target = open_target("original")
        for _ in fine_tune_matched(target.model, rows_for(target), {0: 1.0}, steps=3, learning_rate=1e-3, seed=seed):
            pass
        return weights_of(target.model)

    with one_thread():
        one, two, other = tuned(0), tuned(0), tuned(1)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_between_steps_weights_ask_for_no_gradient_and_keep_none():
    with one_thread():
        target = open_target("original")
        source = endless(rows_for(target), np.random.default_rng(0))
        for _ in descend(target.model, [(source, 4)], 2, 1e-3):
            assert not any(p.requires_grad for p in target.model.parameters())
        assert all(p.grad is None for p in target.model.parameters())


def test_a_model_in_memory_compares_as_its_files_do():
    tiny = build_tiny()
    original = Folder(tiny.models["original"])
    files = list(compare_tensors(Folder(tiny.models["unlearned"]), original))
    memory = list(compare_tensors(InMemory(open_target("unlearned").model), original))
    assert {row.name: row.norm for row in memory} == {row.name: row.norm for row in files}


def test_no_null_is_made_of_an_unchanged_model():
    tiny = build_tiny()
    case = tiny_case()
    same = {"target": tiny.models["original"], "original": tiny.models["original"]}
    unchanged = replace(case, models=same)
    target = open_target("original", role="original")
    assert Trace().stages(unchanged, target) == []
    changed = replace(case, models=same | {"target": tiny.models["unlearned"]})
    stages = Trace().stages(changed, target)
    assert len(stages) == budget_for(changed, target).fine_tunes
    assert len({stage.recipe for stage in stages}) == len(stages)
