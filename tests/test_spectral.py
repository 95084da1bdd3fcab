"""The spectral fingerprint: lines by SVD, distances by SciPy, exchanges by brute force; pushes planted and left out."""

from __future__ import annotations

import importlib.util
import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student
from scipy.stats import wasserstein_distance
from worlds import REPO, environment

from audit.case import Budget, Case, Options
from audit.errors import BadInput
from audit.evidence import Evidence
from audit.gather import Run, capture_all
from audit.inventory import take_inventory
from audit.loaders import Example, ExampleSet
from audit.progress import SILENT
from audit.record import Finding, Outcome
from audit.scan import take_inventories
from audit.target import Target
from audit.verdict import judge
from detectors.spectral import (
    Spectral,
    exchange_p,
    leading_directions,
    projections,
    shift,
    sites_of,
    umap_picture,
)
from detectors.trace import Trace
from reports.plots import draw

# --- plain functions


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 12), st.integers(1, 12), st.integers(0, 10**6), st.data())
def test_directions_are_the_right_singular_vectors(n, d, seed, data):
    k = data.draw(st.integers(1, min(n - 1, d)))
    states = np.random.default_rng(seed).normal(size=(n, d)) * np.arange(1, d + 1) + 5
    found = leading_directions(states, k)
    wanted = np.linalg.svd(states - states.mean(0), full_matrices=False)[2][:k]
    assert np.abs((found * wanted).sum(1)) == pytest.approx(np.ones(k), abs=1e-6)
    assert np.linalg.norm(found, axis=1) == pytest.approx(np.ones(k))
    for row in found:
        assert row[np.abs(row).argmax()] > 0


def test_directions_need_rows_and_width():
    for states, k in ((np.ones((3, 4)), 3), (np.ones((5, 2)), 3), (np.ones((5, 2)), 0), (np.ones(5), 1)):
        with pytest.raises(ValueError, match="directions of states"):
            leading_directions(states, k)


def test_projections_by_hand():
    found = projections([[3.0, 4.0], [1.0, 1.0]], [[0.0, 1.0], [0.6, 0.8]], [1.0, 1.0])
    assert found == pytest.approx(np.array([[3.0, 3.6], [0.0, 0.0]]))


numbers = st.lists(st.tuples(st.floats(-50, 50), st.floats(-50, 50)), min_size=2, max_size=20)


@settings(max_examples=60, deadline=None)
@given(numbers)
def test_shift_is_the_wasserstein_distance_in_the_original_s_deviations(pairs):
    a, b = (np.round(side, 3) for side in zip(*pairs, strict=True))
    if a.std() > 1e-6:
        assert shift(a, b) == pytest.approx(wasserstein_distance(a, b) / a.std(), abs=1e-9)
        assert shift(a, b) == pytest.approx(shift(a[::-1], np.roll(b, 1)))


def test_shift_by_hand():
    assert shift([0, 2, 0, 2], [3, 1, 3, 1]) == 1.0  # each moved by 1; the deviation is 1
    assert shift([0, 2], [2, 0]) == 0.0
    assert shift([1, 1], [1, 1]) == 0.0
    assert shift([1, 1], [1, 2]) == math.inf
    for a, b in (([1.0], [1.0, 2.0]), ([], []), ([[1.0]], [[1.0]])):
        with pytest.raises(ValueError, match=r"_projection (has shape|is empty|must have 1)"):
            shift(a, b)


def by_brute_force(a: np.ndarray, b: np.ndarray, who: list[str]) -> float:
    """Share of all ways to exchange entities between the models whose distance is as large."""
    names = sorted(set(who))
    reached = []
    for chosen in itertools.product([False, True], repeat=len(names)):
        turned = dict(zip(names, chosen, strict=True))
        x = [q if turned[w] else p for p, q, w in zip(a, b, who, strict=True)]
        y = [p if turned[w] else q for p, q, w in zip(a, b, who, strict=True)]
        reached.append(wasserstein_distance(x, y) >= wasserstein_distance(a, b) - 1e-9)
    return float(np.mean(reached))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 10**6), st.floats(0, 2))
def test_exchanges_of_few_entities_are_counted_exactly(entities, rows, seed, moved):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=entities * rows)
    b = a + moved * rng.normal(size=a.shape) + moved / 2
    who = [f"p{i // rows}" for i in range(len(a))]
    assert exchange_p(a, b, who, seed=0) == pytest.approx(by_brute_force(a, b, who))


def test_random_exchanges_come_near_all_of_them():
    rng = np.random.default_rng(3)
    a = rng.normal(size=22)
    b = a + 0.3 + rng.normal(size=22)
    who = [f"p{i // 2}" for i in range(22)]  # 11 entities: 2,048 ways, so 999 are drawn
    exact = by_brute_force(a, b, who)
    assert 0.02 < exact < 0.5
    assert exchange_p(a, b, who, seed=0) == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 999))
    assert exchange_p(a, a + 3, who, seed=0) == pytest.approx(2 / 2048, abs=0.004)


def test_exchange_of_models_that_differ_by_chance_alone_is_seldom_significant():
    """Wide states, where a line taken from one model alone would fit that model's noise."""
    rng, low, own = np.random.default_rng(0), 0, 0
    who = [str(i) for i in range(14)]
    for _ in range(150):
        a, b = rng.normal(size=(2, 14, 60))
        both = np.concatenate([a, b])
        on = projections(both, leading_directions(both))[:, 0]
        low += exchange_p(on[:14], on[14:], who, seed=0) <= 0.05
        line = leading_directions(a)
        own += exchange_p(projections(a, line)[:, 0], projections(b, line)[:, 0], who, seed=0) <= 0.05
    assert low <= 16  # 7.5 expected
    assert own > 40, "else there was no danger"


# --- planted pushes

SITES = sites_of(2)
ENTITIES, WIDTH = 12, 24


class Planted(Evidence):
    """Evidence of states that were made up: by role, [rows of all sets, sites, width]."""

    def __init__(self, states: dict[str, np.ndarray], rows: int) -> None:
        super().__init__()
        self.made, self.count = states, rows
        self.sites = dict.fromkeys(states, SITES)

    @property
    def roles(self) -> list[str]:
        return list(self.made)

    def iterate(self, role, name, *_quantities):
        first = ("retain", "holdout").index(name.partition("/")[2]) * self.count
        for state in self.made[role][first : first + self.count]:
            yield {"hidden": state[None].astype(np.float32)}

    def extra(self, role, _name):
        return {"sites": self.sites[role]}


def planted_case(entities: int = ENTITIES) -> Case:
    """Two sets of entities with three rows each."""
    sets = {}
    for name in ("forget", "retain", "holdout"):
        rows = [(e, i) for e in range(entities) for i in range(3)]
        examples = tuple(Example(f"{name}:{e}{i}", f"{name} {e} {i} ?", "a", entity=f"{e}") for e, i in rows)
        sets[name] = ExampleSet(name, "", examples, name)
    return Case("planted", {"target": Path("t"), "original": Path("o")}, {}, sets, Options(budget=Budget.QUICK))


def planted(seed: int, pushes: dict[str, float], *, nulls: int = 8, along: str = "across", entities: int = ENTITIES):
    """Every edited model moves by noise of a size of its own; the target is also pushed at some sites.

    Half of what varies in the original lies along the first axis. A push goes `along` that axis, or across it.
    """
    rng = np.random.default_rng(seed)
    count = 3 * entities
    base = rng.normal(size=(2 * count, len(SITES), WIDTH))
    base[:, :, 0] *= math.sqrt(WIDTH)
    states = {"original": base}
    for role in ("target", *(f"original+null@{k + 1}" for k in range(nulls))):
        common = rng.normal(size=(len(SITES), WIDTH)) * 0.05
        states[role] = base + (common + rng.normal(size=base.shape) * 0.1) * np.exp(rng.normal() * 0.3)
    for site, push in pushes.items():
        states["target"][:, SITES.index(site), 0 if along == "along" else 1] += push
    return Planted(states, count)


def measured(evidence: Evidence, entities: int = ENTITIES) -> Finding:
    [found] = judge(Spectral().measure(planted_case(entities), evidence))
    return found


@pytest.mark.parametrize("along", ["along", "across"])
def test_a_push_is_found_at_its_site(along):
    """As RMU does: all states at one site are pushed aside, in a direction in which they need not vary."""
    site = "blocks.1.hook_mlp_out"
    evidence = planted(0, {site: 12.0}, along=along)
    found = measured(evidence)
    assert found.layer == "in what the MLP adds in block 1"
    assert found.p_value < 0.01
    assert found.estimate > math.log(4)
    assert found.ci95[0] > 0
    first = found.table.rows[0]
    assert first[0] == site
    axis = 0 if along == "along" else 1
    original = evidence.made["original"][:, SITES.index(site), axis]
    assert first[2] == pytest.approx(12 / original.std(), rel=0.1)
    assert first[3] < first[2] < first[4]
    assert first[6] < first[2], "no fine-tune moved as far"
    assert first[8] <= 0.002
    assert "further than ordinary fine-tunes go" in first[1]
    assert f"lie {first[2]:.2f} standard deviations" in first[1]
    assert not any("further than ordinary fine-tunes go" in row[1] for row in found.table.rows[1:])


def test_no_push_is_seldom_called_one():
    p = [measured(planted(seed, {})).p_value for seed in range(1, 25)]
    assert sum(value <= 0.05 for value in p) <= 4
    found = measured(planted(1, {}))
    assert found.verdict != Outcome.EVIDENCE
    assert not any("further than ordinary fine-tunes go" in row[1] for row in found.table.rows)


def test_even_a_clear_push_is_no_evidence_of_unlearning():
    found = measured(planted(0, {SITES[1]: 12.0}))
    assert found.p_adjusted < 0.01
    assert found.verdict == Outcome.NONE
    assert found.decides == (False, False)


def test_the_p_value_pays_for_the_sites():
    evidence = planted(0, {SITES[1]: 0.15}, along="along")
    found = measured(evidence)
    table = found.table
    assert 0.001 < found.p_value < 0.1
    assert table.columns[7] == f"p, for {len(SITES)} sites"
    assert found.p_value == table.rows[0][7] == min(row[7] for row in table.rows)
    # By hand, for that site.
    site = SITES.index(table.rows[0][0])
    logs = []
    for role in evidence.roles[1:]:
        a, b = (evidence.made[r][:, site].astype(np.float32).astype(float) for r in ("original", role))
        both = np.concatenate([a, b])
        line = np.linalg.svd(both - both.mean(0))[2][0]
        logs.append(math.log(wasserstein_distance(a @ line, b @ line) / (a @ line).std()))
    target, others = logs[0], logs[1:]
    t = (target - np.mean(others)) / (np.std(others, ddof=1) * math.sqrt(1 + 1 / 8))
    assert found.p_value == pytest.approx(min(1.0, len(SITES) * student.sf(t, 7)), rel=1e-3)
    assert found.estimate == pytest.approx(target - np.mean(others), rel=1e-4)


@pytest.mark.parametrize("nulls", [0, 2])
def test_without_fine_tunes_nothing_is_concluded(nulls):
    found = measured(planted(0, {SITES[1]: 12.0}, nulls=nulls))
    assert found.p_value is None
    assert found.verdict == Outcome.INCONCLUSIVE
    assert not any(c.passed for c in found.controls)
    assert found.table.rows[0][0] == SITES[1], "the distance is told all the same"
    assert len(found.figure.series) == (2 if nulls == 0 else 3)


def test_a_model_that_did_not_move_is_not_tested():
    evidence = planted(0, {})
    evidence.made = dict.fromkeys(evidence.made, evidence.made["original"])
    found = measured(evidence)
    assert found.p_value is None
    assert found.verdict == Outcome.INCONCLUSIVE
    assert all(row[2] == 0 for row in found.table.rows)


def test_a_site_that_no_fine_tune_moves_has_no_null():
    """The target differs where the fine-tunes could not: nothing says what an ordinary change would do there."""
    evidence = planted(0, {SITES[1]: 12.0})
    for role in evidence.roles[2:]:
        evidence.made[role][:, 1] = evidence.made["original"][:, 1]
    found = measured(evidence)
    row = next(row for row in found.table.rows if row[0] == SITES[1])
    assert row[7] is None
    assert found.table.columns[7] == f"p, for {len(SITES) - 1} sites"


def test_few_entities_give_no_interval():
    found = measured(planted(0, {SITES[1]: 12.0}, entities=4), entities=4)
    assert found.ci95 == (-math.inf, math.inf) or found.ci95 == (None, None)
    assert found.verdict == Outcome.INCONCLUSIVE
    assert found.n == 8


def test_models_that_cannot_be_compared_are_refused():
    case = planted_case()
    wide, deep, broken = planted(0, {}), planted(0, {}), planted(0, {})
    wide.made["target"] = wide.made["target"][:, :, :8]
    deep.sites["target"] = sites_of(3)
    broken.made["target"] = broken.made["target"] * np.nan
    for evidence, reason in ((wide, "other sizes"), (deep, "numbers of blocks"), (broken, "finite")):
        with pytest.raises(BadInput, match=reason):
            Spectral().measure(case, evidence)


def test_the_figure_shows_the_push_beside_a_fine_tune():
    found = measured(planted(0, {SITES[1]: 12.0}))
    original, target, other = (np.array(series.x) for series in found.figure.series)
    assert original.mean() == pytest.approx(0, abs=1e-3)
    assert original.std() == pytest.approx(1, abs=1e-3)
    assert abs(target.mean()) > 5
    assert abs(other.mean()) < 1
    assert draw(found.figure) == draw(found.figure)


# --- what is read


def test_sites_are_spread_over_the_blocks():
    assert sites_of(1) == tuple(f"blocks.0.hook_{part}" for part in ("attn_out", "mlp_out", "resid_post")) + (
        "ln_final.hook_out",
    )
    blocks = [int(site.split(".")[1]) for site in sites_of(32)[:-1:3]]
    assert blocks == [0, 6, 12, 19, 25, 31]


def two_tiny_models(folder: Path, original: Path) -> Case:
    """A random model, and a copy whose last block is changed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(original)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for weight in model.model.layers[1].parameters():
            weight += 0.05 * torch.randn_like(weight)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(original).save_pretrained(folder)
    sets = {}
    for name, first in (("retain", 0), ("holdout", 20)):
        rows = [(e, i) for e in range(10) for i in range(2)]
        sets[name] = ExampleSet(
            name,
            "",
            tuple(
                Example(f"{name}:{e}{i}", f"w{first + e} w{60 + i} w{70 + e}", f"w{50 + e} w3", entity=f"{e}")
                for e, i in rows
            ),
            name,
        )
    options = Options(budget=Budget.QUICK, template="plain", device="cpu")
    return Case("two", {"target": folder, "original": original}, {}, sets, options)


def test_from_model_to_finding(tiny, tmp_path, one_thread):
    case = two_tiny_models(tmp_path / "changed", tiny("llama"))
    run = Run(case, tmp_path / "evidence", SILENT, [Spectral(), Trace()], [])
    evidence = capture_all(run, take_inventories(case))
    assert not run.not_run
    nulls = [f"original+null@{k}" for k in range(1, 5)]
    assert set(evidence.roles) == {"target", "original", *nulls}

    # The states are those of the model itself at the last token of the prompt.
    target = Target("target", take_inventory(tmp_path / "changed"), template="plain")
    caught: dict[str, torch.Tensor] = {}
    block = target.model.model.layers[1]
    places = {"attn_out": block.self_attn, "mlp_out": block.mlp, "resid_post": block, "final": target.model.model.norm}
    for key, module in places.items():
        module.register_forward_hook(
            lambda _m, _i, out, key=key: caught.update({key: (out[0] if isinstance(out, tuple) else out)[0, -1]})
        )
    sites = evidence.extra("target", "spectral/retain")["sites"]
    for row, values in list(zip(case.rows("retain"), evidence.iterate("target", "spectral/retain"), strict=True))[::7]:
        with torch.no_grad():
            target.model(input_ids=torch.tensor([target.encode_prompt(row.prompt)]))
        assert values["hidden"].shape == (1, len(sites), 32)
        for key, state in caught.items():
            site = "ln_final.hook_out" if key == "final" else f"blocks.1.hook_{key}"
            assert values["hidden"][0, sites.index(site)] == pytest.approx(state.numpy(), abs=1e-4)

    [found] = judge(Spectral().measure(case, evidence))
    assert found.split == "retain, holdout"
    assert found.n == 20
    assert 0 < found.p_value <= 1
    by_site = {row[0]: row for row in found.table.rows}
    for site in sites[:3]:  # the first block was not changed, and not in the fine-tunes either
        assert by_site[site][2] < 1e-5
        assert by_site[site][6] < 1e-5
        assert by_site[site][7] is None
    assert by_site["blocks.1.hook_resid_post"][2] > 0.01
    assert Spectral().measure(case, evidence) == Spectral().measure(case, evidence)


def test_passages_are_read_at_their_end_and_other_roles_not_at_all(tiny):
    target = Target("original", take_inventory(tiny("llama")), template="plain")
    passage = ExampleSet("retain", "", (Example("retain:0", "", "w1 w2 w3 w4"),), "x")
    case = Case("one", {}, {}, {"retain": passage}, Options(budget=Budget.QUICK))
    [request] = Spectral().requests(case, target)
    [tokens] = request.sequences
    assert tokens.ids == target.encode("", "w1 w2 w3 w4").ids
    assert tokens.start == len(tokens.ids) - 1
    for role in ("retrained", "target+relearn@20"):
        target.role = role
        assert Spectral().requests(case, target) == []


def test_it_needs_the_original_and_the_weights():
    case = planted_case()
    assert Spectral().missing(case) is None
    alone = Case("alone", {"target": Path("t")}, {}, case.sets, case.options)
    assert "original" in Spectral().missing(alone)


# --- the illustration


def test_umap_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ImportError, match="umap-learn"):
        umap_picture(np.eye(6), ["a"] * 6)
    with pytest.raises(ValueError, match="needs 5 rows"):
        umap_picture(np.eye(6), ["a"] * 5)


DRAW = """
import numpy as np
from detectors.spectral import umap_picture
rng = np.random.default_rng(0)
states, labels = np.concatenate([rng.normal(size=(5, 3)), rng.normal(size=(5, 3)) + 20]), ["a"] * 5 + ["b"] * 5
for supervised in (False, False, True):
    print(*umap_picture(states, labels, supervised, seed=1).ravel())
"""


def test_umap_draws_the_same_picture_again():
    if importlib.util.find_spec("umap") is None:
        pytest.skip("needs umap-learn")
    # In a process of its own, without compilation: for ten points that takes ten times as long as the picture.
    more = {"NUMBA_DISABLE_JIT": "1", "PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", DRAW], env=environment(**more), capture_output=True)
    assert done.returncode == 0, done.stderr
    first, again, supervised = (
        np.array(line.split(), float).reshape(10, 2) for line in done.stdout.decode().splitlines()
    )
    assert (first == again).all()
    for picture in (first, supervised):
        apart = np.linalg.norm(picture[:5].mean(0) - picture[5:].mean(0))
        assert apart > 2 * max(np.ptp(picture[:5], axis=0).max(), np.ptp(picture[5:], axis=0).max())
    assert (first != supervised).any()
