"""Hardness: gradients row by row, nearest states by brute force, an entity that is a retained one in disguise."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from digit_models import captured
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from worlds import open_target, tiny_case

from attacks.hardness import GRADIENT, Hardness, cosine, gradient, nearest
from attacks.recall import recalled
from attacks.recall import tested as rows_of
from audit.case import Case
from audit.evidence import Evidence
from audit.loaders import Example
from audit.record import Outcome, Side
from audit.statistics import halves
from audit.verdict import judge

pytestmark = pytest.mark.usefixtures("one_thread")
SETS = ("forget", "holdout", "retain")


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_nearest_by_brute_force(n, m, width, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(n, width)), rng.normal(size=(m, width))
    cosines, which = nearest(a, b)
    for i in range(n):
        every = [a[i] @ b[j] / (np.linalg.norm(a[i]) * np.linalg.norm(b[j])) for j in range(m)]
        assert cosines[i] == pytest.approx(max(every))
        assert every[which[i]] == pytest.approx(max(every))


def test_cosine_by_hand():
    a, b = [torch.tensor([1.0, 0.0]), torch.tensor([2.0])], [torch.tensor([0.0, 3.0]), torch.tensor([4.0])]
    assert cosine(a, b) == pytest.approx(8 / (np.sqrt(5) * 5))
    assert cosine(a, a) == pytest.approx(1)
    assert cosine(a, [torch.zeros(2), torch.zeros(1)]) == 0.0


def flat(target, rows: list[Example]) -> np.ndarray:
    """Gradient of the mean negative log-likelihood over all scored tokens, one row at a time, of the same matrices."""
    weights = [weight.requires_grad_(True) for weight, _ in target.matrices()]
    total = np.zeros(sum(weight.numel() for weight in weights))
    scored = 0
    for row in rows:
        tokens = target.question(row)
        logprobs = target.model(input_ids=torch.tensor([tokens.ids])).logits[0].log_softmax(-1)
        for i in range(tokens.start, len(tokens.ids)):
            found = torch.autograd.grad(-logprobs[i - 1, tokens.ids[i]], weights, retain_graph=True)
            total += torch.cat([part.flatten() for part in found]).double().numpy()
            scored += 1
    return total / scored


def test_a_gradient_is_that_of_rows_one_by_one():
    target, rows = open_target("original"), list(tiny_case().rows("forget")[:20])
    weights = [weight.requires_grad_(True) for weight, _ in target.matrices()]
    found = gradient(target.loss, weights, [target.question(row) for row in rows])
    together = torch.cat([part.flatten() for part in found]).numpy()
    np.testing.assert_allclose(together, flat(target, rows), atol=2e-6)


@cache
def disguised() -> tuple[Case, Evidence]:
    """The tiny case; one forget entity says what a retain entity of the compared half says, under another name."""
    plain = tiny_case({"target": "unlearned", "original": "original"}, SETS)
    kept = rows_of(plain, "retain")
    in_a = halves(plain.clusters(kept), plain.options.seed)
    who = next(row.entity for row, a in zip(kept, in_a, strict=True) if a)
    twin = tuple(Example(f"forget:{900 + i}", r.prompt, r.answer, wrong=r.wrong, entity="Twin")
                 for i, r in enumerate(kept) if r.entity == who)  # fmt: skip
    sets = dict(plain.sets)
    sets["forget"] = type(sets["forget"])("forget", "here", sets["forget"].examples[:24] + twin, "1" * 64)
    case = Case(plain.name, plain.models, plain.specs, sets, plain.options)
    return case, captured(case, Hardness())


def test_the_cosines_are_those_of_gradients_by_hand():
    case, evidence = disguised()
    target = open_target("original", "original")
    kept = rows_of(case, "retain")
    in_a = halves(case.clusters(kept), case.options.seed)
    common = flat(target, [row for row, a in zip(kept, in_a, strict=True) if a])
    found = evidence.scores("original+hardness-gradients", "hardness/gradient/forget", GRADIENT.name)
    entities = list(dict.fromkeys(case.clusters(rows_of(case, "forget"))))
    assert len(found) == len(entities)
    for i in (0, len(entities) - 1):
        own = flat(target, [row for row in rows_of(case, "forget") if row.entity == entities[i]])
        expected = own @ common / np.linalg.norm(own) / np.linalg.norm(common)
        assert float(found[i]["cosine"][0]) == pytest.approx(expected, abs=1e-4)


def test_a_retained_entity_in_disguise_is_the_hardest_and_nothing_is_decided():
    case, evidence = disguised()
    entangled, near = judge(Hardness().measure(case, evidence))
    assert near.table.rows[0][0] == "Twin"
    assert near.table.rows[0][2] == pytest.approx(1, abs=1e-5)
    hidden = Hardness().examples(case, evidence)
    twins = {row.id for row in case.rows("forget") if row.entity == "Twin"}
    assert twins
    assert all(hidden[row]["near"] == pytest.approx(1, abs=1e-5) for row in twins)
    assert max(v["near"] for row, v in hidden.items() if row not in twins) < 0.999
    for finding in (entangled, near):
        assert finding.verdict in (Outcome.NONE, Outcome.INCONCLUSIVE)
        assert (finding.side, finding.decides) == (Side.NEITHER, (False, False))
        assert finding.ci95[0] <= finding.estimate <= finding.ci95[1]
    answered = recalled(case, evidence, "target", "hardness", "forget")
    whose = np.array(case.clusters(rows_of(case, "forget")))
    names = list(dict.fromkeys(whose))
    left = [answered[whose == who].mean() for who in names]
    hard = [next(v["entangled"] for r, v in hidden.items() if r in ids) for ids in
            ({row.id for row in case.rows("forget") if row.entity == who} for who in names)]  # fmt: skip
    control = next(c for c in entangled.controls if c.name == "left in the target")
    assert control.estimate == pytest.approx(spearmanr(hard, left).statistic)


def test_the_original_alone_is_visited_and_stays_as_it_is():
    case = disguised()[0]
    for role in ("target", "retrained"):
        assert Hardness().stages(case, open_target("original", role)) == []
    target = open_target("original", "original")
    before = [p.clone() for p in target.model.parameters()]
    [stage] = Hardness().run(case, target, lambda done, total: None)
    assert all(torch.equal(p, q) for p, q in zip(before, target.model.parameters(), strict=True))
    assert not any(p.requires_grad for p in target.model.parameters())
    assert stage.name == Hardness().stages(case, target)[0].name
