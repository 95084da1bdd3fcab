"""Weights without an original: numbers by hand and by SciPy, a planted edit that comes first, a clean stack without."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import save_tiny, words_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import save_file
from scipy import stats

import audit.weights as reading
from audit.case import Case, Options
from audit.errors import BadInput
from audit.evidence import Evidence
from audit.gather import Run, capture_all
from audit.instrument import Access
from audit.inventory import take_inventory
from audit.plan import Weights as WeightsRequest
from audit.progress import SILENT
from audit.record import Finding, Outcome, Side
from audit.scan import _measure_all
from audit.verdict import judge
from audit.weights import Folder, TensorRow, Zeros, compare
from detectors.weights_alone import (
    FEWEST,
    NUMBERS,
    WeightsAlone,
    detrended,
    numbers_of,
    outlying,
    ranked,
    robust_scale,
    stacks,
)

Named = dict[str, torch.Tensor]
KINDS = {"self_attn.q_proj": (16, 16), "mlp.down_proj": (16, 40)}


@pytest.fixture(scope="module", autouse=True)
def threads(one_thread: None) -> Iterator[None]:
    return one_thread


# --- the line, the scale, the numbers


curves = st.integers(FEWEST, 15).flatmap(
    lambda n: hnp.arrays(np.float64, n, elements=st.floats(-5, 5).map(lambda x: round(x, 3)))
)


@settings(max_examples=40, deadline=None)
@given(curves)
def test_the_prediction_is_the_line_of_theil_and_sen_through_the_nearest(values):
    left = detrended(values)
    for block in range(len(values)):
        near = sorted((i for i in range(len(values)) if i != block), key=lambda i: (abs(i - block), i))[:6]
        x = np.array(near, float)
        slope, at_zero, *_ = stats.theilslopes(values[near], x, method="joint")
        unit = math.sqrt(1 + 1 / len(x) + (block - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum())
        assert left[block] * unit == pytest.approx(values[block] - (at_zero + slope * block), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(7, 20), st.floats(-3, 3), st.floats(-3, 3), st.floats(0.5, 9), st.data())
def test_a_jump_in_a_drift_is_left_alone_and_whole(blocks, start, slope, jump, data):
    values, at = start + slope * np.arange(blocks), data.draw(st.integers(1, blocks - 2))
    np.testing.assert_allclose(detrended(values), 0, atol=1e-9)
    values[at] += jump
    left = detrended(values)
    assert 0.75 * jump < left[at] <= jump
    np.testing.assert_allclose(np.delete(left, at), 0, atol=1e-9)
    assert int(np.abs(outlying(values)).argmax()) == at


def test_columns_are_taken_one_by_one():
    values = np.random.default_rng(0).normal(size=(9, 3))
    for column in range(3):
        np.testing.assert_allclose(outlying(values)[:, column], outlying(values[:, column]))


def test_the_scale_by_hand():
    assert robust_scale([1.0, -2.0, 3.0, -4.0, 100.0]) == pytest.approx(1.4826 * 3)
    assert robust_scale([1.0, -2.0, 3.0, -4.0]) == pytest.approx(1.4826 * 3)
    assert robust_scale(np.zeros(5)) > 0
    assert robust_scale(np.random.default_rng(0).normal(size=20000) * 7) == pytest.approx(7, rel=0.03)


@settings(max_examples=40, deadline=None)
@given(curves, st.data())
def test_a_weight_is_so_many_copies(errors, data):
    counts = np.array(data.draw(st.lists(st.integers(0, 3), min_size=len(errors), max_size=len(errors))))
    counts[0] += 1
    assert robust_scale(errors, counts[None])[0] == pytest.approx(robust_scale(np.repeat(errors, counts)))


@settings(max_examples=30, deadline=None)
@given(curves, st.floats(-2, 2), st.floats(-2, 2), st.floats(0.5, 4))
def test_neither_a_drift_nor_the_unit_matters(values, start, slope, unit):
    moved = unit * values + start + slope * np.arange(len(values))
    if robust_scale(detrended(values)) > 1e-3:
        np.testing.assert_allclose(outlying(moved), outlying(values), rtol=1e-6, atol=1e-6)


def test_the_five_numbers_by_hand(tmp_path):
    matrix = torch.zeros(3, 5)
    matrix[0, 4], matrix[1, 1], matrix[2, 0] = 4.0, 2.0, -1.0
    write(tmp_path, {"layers.0.w.weight": matrix, "layers.0.b": torch.ones(3), "layers.1.w.weight": torch.zeros(2, 2)})
    rows = {row.name: row for row in compare(tmp_path, None)}
    row = rows["layers.0.w.weight"]
    assert (row.first, row.second, row.middle) == pytest.approx((4, 2, 2))
    share = np.array([4, 2, 1]) / 7
    by_hand = [math.log(2), math.log(2), math.log(21 / 16), -float(share @ np.log(share)), math.log(21) / 2]
    assert numbers_of(row) == pytest.approx(by_hand)
    assert (row.relative, row.equal, row.largest) == (None, 12, 4)
    assert numbers_of(rows["layers.0.b"]) is numbers_of(rows["layers.1.w.weight"]) is None


def test_singular_values_by_numpy_and_nothing_takes_no_memory(tmp_path):
    folder = write(tmp_path, stack(blocks=3, dtype=torch.bfloat16))
    for row in compare(folder, None):
        values = np.linalg.svd(Folder(folder).read(row.name).float().numpy(), compute_uv=False)
        median = np.sort(values)[(len(values) - 1) // 2]
        assert (row.first, row.second, row.middle) == pytest.approx((values[0], values[1], median), rel=1e-4)
        assert row.norm == pytest.approx(np.sqrt((values**2).sum()), rel=1e-4)
        assert row.dtype == "bfloat16"
    zeros = Zeros(Folder(folder)).read("model.layers.0.mlp.down_proj.weight")
    assert zeros.shape == (16, 40)
    assert zeros.untyped_storage().nbytes() <= 4


# --- planted edits


def stack(seed: int = 0, blocks: int = 12, dtype: torch.dtype = torch.float32) -> Named:
    """Random matrices whose size drifts over depth; the first and last blocks are unlike the rest."""
    made, generator = {}, torch.Generator().manual_seed(seed)
    for kind, shape in KINDS.items():
        for block in range(blocks):
            size = (1 + 0.1 * block) * (3 if block in (0, blocks - 1) else 1)
            matrix = size * torch.randn(shape, generator=generator)
            made[f"model.layers.{block}.{kind}.weight"] = matrix.to(dtype)
    return made


def planted(tensors: Named, name: str, share: float) -> Named:
    """A rank-one change of a share of the matrix's length."""
    rows, columns = tensors[name].shape
    generator = torch.Generator().manual_seed(1)
    change = torch.outer(torch.randn(rows, generator=generator), torch.randn(columns, generator=generator))
    return tensors | {name: tensors[name] + share * tensors[name].norm() * change / change.norm()}


def write(folder: Path, tensors: Named) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


class Held:
    """Tensors in memory."""

    def __init__(self, tensors: Named) -> None:
        self._tensors = tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        return self._tensors[name] if rows == slice(None) else self._tensors[name][rows]


def rows_of(tensors: Named) -> list[TensorRow]:
    return list(reading.compare_tensors(Held(tensors), Zeros(Held(tensors))))


def first_of(tensors: Named) -> Any:
    return next(place for place in ranked(stacks(rows_of(tensors))) if place.inner)


def test_a_planted_edit_comes_first_and_a_clean_stack_has_none():
    name, clean, found = "model.layers.5.mlp.down_proj.weight", [], []
    for seed in range(12):
        tensors = stack(seed)
        before, after = first_of(tensors), first_of(planted(tensors, name, 1.5))
        clean.append((before.block, before.stack.kind, abs(before.z)))
        found.append((after.block, after.stack.kind, abs(after.z)))
    assert {place[:2] for place in found} == {(5, "model.layers.*.mlp.down_proj.weight")}
    assert sum(place[:2] == found[0][:2] for place in clean) <= 3, "one of twenty places"
    assert min(z for *_, z in found) > 2 * np.median([z for *_, z in clean])


def test_a_short_edit_does_not_show():
    """Why silence says nothing."""
    name = "model.layers.5.mlp.down_proj.weight"
    for seed in range(4):
        tensors = stack(seed)
        before, after = first_of(tensors), first_of(planted(tensors, name, 0.05))
        assert (after.block, after.stack.kind) == (before.block, before.stack.kind)
        assert after.z == pytest.approx(before.z, rel=0.2)


def test_the_ends_stand_out_and_are_not_ranked():
    places = ranked(stacks(rows_of(stack())))
    assert places[0].block in (0, 11)
    assert not places[0].inner
    assert first_of(stack()).block not in (0, 11)


def test_kinds_that_few_blocks_have_are_left_out():
    tensors = stack(blocks=FEWEST)
    assert [s.blocks for s in stacks(rows_of(tensors))] == [tuple(range(FEWEST))] * 2
    del tensors["model.layers.3.mlp.down_proj.weight"]
    assert [s.kind for s in stacks(rows_of(tensors))] == ["model.layers.*.self_attn.q_proj.weight"]
    assert stacks(rows_of(stack(blocks=FEWEST - 1))) == []


# --- the instrument


def finding_of(tensors: Named, seed: int = 0) -> Finding:
    evidence = Evidence()
    evidence.add_weights("target", "weights/alone", rows_of(tensors))
    [found] = WeightsAlone().measure(Case("alone", {}, {}, {}, Options(seed=seed)), evidence)
    return found


def test_the_finding_points_at_the_edit_and_claims_nothing():
    name = "model.layers.5.mlp.down_proj.weight"
    tensors = planted(stack(), name, 1.5)
    [found] = judge([finding_of(tensors)])
    top = first_of(tensors)
    assert found.estimate == pytest.approx(abs(top.z))
    assert name in found.statistic
    assert NUMBERS[top.number] in found.statistic
    assert found.layer == "block 5"
    lo, hi = found.ci95
    assert 0 < lo <= found.estimate <= hi
    assert lo < hi < math.inf
    assert found.estimate > found.null_value
    assert (found.verdict, found.side, found.p_value) == (Outcome.INCONCLUSIVE, Side.NEITHER, None)
    assert found.decides == (False, False)
    assert "differ by nature" in found.reason
    rows = [row for row in found.table.rows if row[-1] == ""]
    assert rows[0][:3] == ["model.layers.*.mlp.down_proj.weight", 5, NUMBERS[top.number]]
    assert all(len(row) == len(found.table.columns) for row in found.table.rows)
    line = found.figure.series[0]
    assert line.x == list(range(12))
    assert max(line.y[1:-1]) == pytest.approx(found.estimate)
    assert finding_of(tensors).model_dump_json() == finding_of(tensors).model_dump_json()


def test_the_controls_say_what_was_not_seen():
    tensors = stack()
    controls = {c.name: c for c in finding_of(tensors).controls}
    assert controls["looked at"].passed
    assert controls["looked at"].estimate == 1
    assert (controls["untouched models"].passed, controls["untouched models"].gates) == (False, "evidence")
    values = [row.first / row.norm for row in rows_of(tensors)]
    assert controls["least visible edit"].estimate == pytest.approx(np.median(values))
    tensors["model.layers.3.experts.weight"] = torch.ones(4, 16, 16)
    looked = next(c for c in finding_of(tensors).controls if c.name == "looked at")
    whole = sum(tensor.numel() for tensor in tensors.values())
    assert looked.estimate == pytest.approx(1 - 4 * 256 / whole)
    assert not looked.passed


def test_twins_give_a_number_all_the_same():
    """Blocks that are copies of each other: nothing stands out, and nothing is divided by zero."""
    tensors = {name: stack()[f"model.layers.0.{name.split('.', 3)[3]}"] for name in stack()}
    found = finding_of(tensors)
    assert found.estimate == pytest.approx(0, abs=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("deep"), "llama", words_tokenizer(bos=True), num_hidden_layers=FEWEST)


def case_of(folder: Path, **options: Any) -> Case:
    return Case("alone", {"target": folder}, {}, {}, Options(device="cpu", template="plain", **options))


def test_a_scan_reads_the_weights_once_and_needs_nothing_else(folder, tmp_path, monkeypatch):
    case = case_of(folder)
    assert WeightsAlone().missing(case) is None
    run = Run(case, tmp_path, SILENT, [WeightsAlone()], [])
    evidence = capture_all(run, {"target": take_inventory(folder)})
    assert run.not_run == []
    assert evidence.weights("target", "weights/alone") == compare(folder, None)
    [found], _ = _measure_all(run, evidence)
    assert found.n == FEWEST
    monkeypatch.setattr(reading, "compare", None)
    resumed = Run(case, tmp_path, SILENT, [WeightsAlone()], [])
    [again], _ = _measure_all(resumed, capture_all(resumed, {"target": take_inventory(folder)}))
    assert again.model_dump_json() == found.model_dump_json()


def test_few_blocks_and_no_access_are_rows_that_say_so(tiny, folder, tmp_path):
    shallow = tiny("llama")
    run = Run(case_of(shallow), tmp_path, SILENT, [WeightsAlone()], [])
    capture_all(run, {"target": take_inventory(shallow)})
    [row] = run.not_run
    assert (row.instrument, row.failed) == ("weights-alone", False)
    assert row.reason == f"needs at least {FEWEST} blocks to compare one with the others; the target has 2"
    assert "weights" in (WeightsAlone().missing(case_of(folder, access=Access.LOGPROBS)) or "")


def test_nothing_to_compare_is_no_finding():
    evidence = Evidence()
    evidence.add_weights("target", "weights/alone", rows_of(stack(blocks=2)))
    with pytest.raises(BadInput, match="no kind of matrix"):
        WeightsAlone().measure(Case("alone", {}, {}, {}, Options()), evidence)


def test_only_the_target_is_asked(open_target, folder):
    case, target = case_of(folder), open_target(folder)
    assert list(WeightsAlone().requests(case, target)) == [WeightsRequest("weights/alone", against=None)]
    assert list(WeightsAlone().requests(case, target.altered("relearn@1", "recipe"))) == []
