"""Relearning through adapters: what is trained and what is not, on every layout; what is taught; what is found."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch
from digit_models import captured
from worlds import open_target, tiny_case

from attacks.recall import recalled
from attacks.recall import tested as rows_of
from attacks.relearn import Recipe, fine_tune, lessons
from attacks.relearn_lora import RelearnLora, adapters, rates_for
from audit.capture import Engine
from audit.case import Case, Options
from audit.errors import BadInput
from audit.plan import Request, merge
from audit.quantities import TOKEN
from audit.record import Finding
from audit.statistics import halves
from audit.tokens import Tokens

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [Tokens(tuple(range(5, 5 + n)), 2) for n in (6, 9, 9)]


def plain(model) -> list[float]:
    with torch.no_grad():
        return [float(model(input_ids=torch.tensor([t.ids])).logits.log_softmax(-1).max()) for t in TEXTS]


@pytest.mark.parametrize(("kind", "linear"), [("llama", 2 * 7), ("gpt2", 2 * 4), ("gpt_neox", 2 * 4)])
def test_only_the_adapters_are_trained_and_the_engine_sees_them(kind, linear, tiny, open_target):
    target = open_target(tiny(kind))
    before = copy.deepcopy(target.model)
    trained = adapters(target.model, target.blocks, rank=4, alpha=8, seed=0)
    shapes = [tuple(p.shape) for p in trained.parameters()]
    assert len(shapes) == 2 * linear
    assert all(4 in shape for shape in shapes)
    assert plain(target.model) == plain(before), "at first they change nothing"
    for _ in fine_tune(trained, TEXTS, [], Recipe((6,), 3, 1e-2), seed=0, loss=target.loss):
        pass
    assert plain(target.model) != plain(before)
    own = {name.replace(".base_layer", ""): p for name, p in target.model.named_parameters() if "lora_" not in name}
    for name, weight in before.named_parameters():
        assert torch.equal(own[name], weight), name
    assert not any(p.requires_grad for p in target.model.parameters())
    engine = Engine(target)
    rows = [row for b in engine.batches(merge([Request("x", tuple(TEXTS), (TOKEN,))])) for row in engine.run(b)]
    assert engine.noise((row.tokens, row.values["token"]) for row in rows) < 1e-4
    assert not engine.passes._whole, "body and head are still told apart"


def test_an_adapter_is_a_low_rank_change_of_its_layer(tiny, open_target):
    target = open_target(tiny("llama"))
    adapters(target.model, target.blocks, rank=4, alpha=8, seed=0)
    layer = target.model.get_submodule(f"{target.blocks[0]}.mlp.up_proj")
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(b, generator=torch.Generator().manual_seed(1))
    x = torch.randn(3, a.shape[1], generator=torch.Generator().manual_seed(2))
    expected = x @ (layer.base_layer.weight + 8 / 4 * b @ a).T
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_the_seed_draws_the_adapters_and_touches_nothing_else(tiny, open_target):
    def drawn(seed: int) -> torch.Tensor:
        target = open_target(tiny("llama"))
        return torch.cat(
            [
                p.detach().flatten()
                for p in adapters(target.model, target.blocks, rank=2, alpha=4, seed=seed).parameters()
            ]
        )

    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first = drawn(0)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first, drawn(0))
    assert not torch.equal(first, drawn(1))


def test_blocks_without_linear_maps_are_refused():
    with pytest.raises(BadInput, match="no linear"):
        adapters(torch.nn.Sequential(torch.nn.Linear(2, 2)), ["1"], rank=2, alpha=4, seed=0)


def test_rates_fall_with_size_and_are_a_grid_when_thorough():
    class Sized:
        def __init__(self, parameters: int) -> None:
            self.inventory = type("I", (), {"parameters": parameters})()

    def rates(size: int, budget: str) -> list[float]:
        case = Case("", {}, {}, {}, Options.parse({"budget": budget}, "test"))
        return [recipe.learning_rate for recipe in rates_for(case, Sized(size)).values()]

    assert rates(10**5, "standard") == pytest.approx([3e-3])
    assert rates(7 * 10**9, "quick") == pytest.approx([2e-4])
    assert rates(10**6, "thorough") == pytest.approx([1e-3, 3e-3, 9e-3])
    assert len(rates_for(Case("", {}, {}, {}, Options.parse({"budget": "thorough"}, "test")), Sized(10**8))) == 3


def test_stages_are_those_that_run_reaches_in_order(monkeypatch):
    small = {f"{rate:.2g}": Recipe((1, 2), 4, rate) for rate in (1e-3, 3e-3)}
    monkeypatch.setattr("attacks.relearn_lora.rates_for", lambda case, target: small)
    taught = []
    monkeypatch.setattr("attacks.relearn_lora.lessons", lambda *a: taught.append(lessons(*a)) or taught[-1])
    case, target = tiny_case(budget="standard"), open_target()
    stages = RelearnLora().stages(case, target)
    assert [s.name for s in stages][:3] == [
        "relearn-lora-0.001-a@1",
        "relearn-lora-0.001-a@2",
        "relearn-lora-0.001-b@1",
    ]
    assert len({s.recipe for s in stages}) == len(stages) == 8
    reached = [s.name for s in RelearnLora().run(case, target, lambda done, total: None)]
    assert reached == [s.name for s in stages]
    ids = [{t.ids for t in rows} for rows, _ in taught]
    assert not ids[0] & ids[1]
    assert ids[0] == ids[2]
    assert RelearnLora().stages(case, open_target(role="retrained")) == []


@cache
def found(made: str) -> tuple[Finding, object, Case]:
    case = tiny_case({"target": made}, ("forget", "retain", "holdout"), only=["relearn-lora"])
    evidence = captured(case, RelearnLora())
    return RelearnLora().measure(case, evidence)[0], evidence, case


def test_the_finding_counted_by_hand():
    finding, evidence, case = found("original")
    [rate] = {role.split("lora-")[1].rsplit("-a@")[0] for role in evidence.roles if "lora" in role}
    means = {}
    for name in ("forget", "holdout", "retain"):
        untaught = ~halves(case.clusters(rows_of(case, name)), case.options.seed)
        roles = [f"target+relearn-lora-{rate}-a@{step}" for step in (10, 20)]
        means[name] = np.mean([recalled(case, evidence, r, "relearn-lora", name)[untaught].mean() for r in roles])
    assert finding.estimate == pytest.approx(means["forget"] - means["holdout"])
    assert finding.layer == rate
    assert finding.estimate > 0.5, "the original knows"
    assert {c.name: c.passed for c in finding.controls}["positive control"]
    rows = {(row[0], row[1], row[2]) for row in finding.table.rows}
    assert (f"target, {rate}", "forget - holdout", "area") in rows


def test_a_model_that_never_knew_shows_nothing():
    finding, *_ = found("retrained")
    assert finding.ci95[0] <= 0
    assert abs(finding.estimate) < 0.25
