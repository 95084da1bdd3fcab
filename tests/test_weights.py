"""Weights: the plain functions by brute force, planted edits found where they were, files read one tensor at a time."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import save_tiny, words_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from audit import weights as comparison
from audit.case import Case, Options
from audit.errors import BadInput
from audit.evidence import Evidence, Store
from audit.gather import Run, capture_all, capture_one
from audit.instrument import Access
from audit.inventory import take_inventory
from audit.organisms.controls import round_to_nearest
from audit.plan import Weights as WeightsRequest
from audit.progress import SILENT
from audit.record import Outcome, Side
from audit.scan import _measure_all
from audit.target import Target
from audit.verdict import judge
from audit.weights import Folder, TensorRow, compare, compare_tensors, effective_rank, int4_codes, int4_codes_kept
from audit.weights import stable_rank as stable
from detectors.weights import Weights, localisation, rank_among, summary

# --- the plain functions

shapes = st.tuples(st.integers(1, 7), st.integers(1, 7))


@st.composite
def matrices(draw, count: int = 1) -> Any:
    """Random matrices of one shape, with zeros and ties."""
    m, n = draw(shapes)
    values = st.lists(st.integers(-4, 4), min_size=m * n, max_size=m * n)
    made = [torch.tensor(draw(values), dtype=torch.float32).reshape(m, n) / 2 for _ in range(count)]
    return made[0] if count == 1 else made


@settings(max_examples=60, deadline=None)
@given(matrices())
def test_ranks_by_numpy(matrix):
    sigma = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    if sigma.max() == 0:
        assert math.isnan(stable(matrix))
        assert math.isnan(effective_rank(matrix))
        return
    share = sigma[sigma > 1e-12] / sigma.sum()
    assert effective_rank(matrix) == pytest.approx(np.prod(share**-share), rel=1e-3)
    assert stable(matrix) == pytest.approx((matrix.double().numpy() ** 2).sum() / sigma.max() ** 2, rel=1e-5)
    rank = np.linalg.matrix_rank(matrix.double().numpy())
    assert 1 - 1e-6 <= stable(matrix) <= rank + 1e-4
    assert 1 - 1e-6 <= effective_rank(matrix) <= rank + 1e-3
    for f in (stable, effective_rank):
        assert f(3 * matrix) == pytest.approx(f(matrix), rel=1e-3)
        assert f(matrix.T.contiguous()) == pytest.approx(f(matrix), rel=1e-3)
        assert f(torch.linalg.svdvals(matrix)) == pytest.approx(f(matrix)), "singular values do for the matrix"


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_planted_rank(rank):
    generator = torch.Generator().manual_seed(rank)
    left, _ = torch.linalg.qr(torch.randn(40, rank, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(24, rank, generator=generator))
    planted = left @ right.T  # `rank` singular values of one
    assert stable(planted) == pytest.approx(rank, rel=1e-4)
    assert effective_rank(planted) == pytest.approx(rank, rel=1e-3)


def test_ranks_by_hand():
    assert stable(torch.diag(torch.tensor([3.0, 4.0]))) == pytest.approx(25 / 16)
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(4 / 3**0.75)


@settings(max_examples=60, deadline=None)
@given(matrices(count=2))
def test_int4_codes_by_brute_force(pair):
    codes = []
    for matrix in pair:
        found, width = int4_codes(matrix)
        assert width.shape == (len(matrix), 1)
        for row, got, w in zip(matrix.tolist(), found.tolist(), width[:, 0].tolist(), strict=True):
            bin_width = max(map(abs, row)) / 7
            assert w == pytest.approx(bin_width)
            for value, code in zip(row, got, strict=True):
                assert code in range(-7, 8)
                assert abs(code * bin_width - value) <= bin_width / 2 + 1e-6, "the nearest code"
        assert torch.equal(found, round_to_nearest(matrix, 4)[0]), "as the int4 organisms are made"
        codes.append(found)
    same = [a == b for a, b in zip(codes[0].flatten().tolist(), codes[1].flatten().tolist(), strict=True)]
    assert int4_codes_kept(*pair) == pytest.approx(np.mean(same))
    assert int4_codes_kept(pair[0], pair[0]) == 1
    assert int4_codes_kept(pair[0], 4 * pair[0]) == 1, "each has its own bins"


def test_an_int4_round_trip_keeps_every_code():
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    codes, width = int4_codes(weight)
    assert int4_codes_kept(codes * width, weight) == 1
    assert int4_codes_kept(weight + 0.8 * width, weight) < 0.6


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=8))
def test_localisation_by_hand(squares):
    found = localisation(squares)
    if not sum(squares):
        assert np.isnan(found.concentration)
        return
    shares = [value / sum(squares) for value in squares]
    entropy = -sum(s * math.log(s) for s in shares if s)
    assert found.shares.tolist() == pytest.approx(shares)
    assert found.entropy == pytest.approx(entropy)
    assert found.concentration == pytest.approx(1 - entropy / math.log(len(squares)), abs=1e-12)
    assert 0 <= found.concentration <= 1
    both = localisation([squares, squares[::-1]])
    assert both.concentration.tolist() == pytest.approx([float(found.concentration)] * 2), "rows by themselves"


def test_localisation_at_its_ends():
    assert localisation([2, 2, 2]).concentration == pytest.approx(0)
    assert localisation([0, 0, 5]).concentration == 1
    assert np.isnan(localisation([3.0]).concentration), "with one place there is nothing to choose"


@settings(max_examples=60, deadline=None)
@given(st.integers(-3, 3), st.lists(st.integers(-3, 3), min_size=1, max_size=30))
def test_rank_among_counts_both_tails(value, null):
    p, smallest = rank_among(value, null)
    above, below = sum(x >= value for x in null) + 1, sum(x <= value for x in null) + 1
    assert p == pytest.approx(min(1, 2 * min(above, below) / (len(null) + 1)))
    assert smallest <= p <= 1


def test_rank_among_holds_its_level():
    rng = np.random.default_rng(0)
    p = [rank_among(x[0], x[1:])[0] for x in rng.normal(size=(4000, 40))]
    assert np.mean(np.array(p) <= 0.1) == pytest.approx(0.1, abs=0.015)


# --- comparing files

Named = dict[str, torch.Tensor]


def model_of(seed: int = 0, blocks: int = 3, width: int = 8) -> Named:
    generator = torch.Generator().manual_seed(seed)
    made = {"model.embed_tokens.weight": torch.randn(11, width, generator=generator)}
    for i in range(blocks):
        made[f"model.layers.{i}.self_attn.q_proj.weight"] = torch.randn(width, width, generator=generator)
        made[f"model.layers.{i}.mlp.up_proj.weight"] = torch.randn(2 * width, width, generator=generator)
        made[f"model.layers.{i}.input_layernorm.weight"] = torch.rand(width, generator=generator)
    made["model.norm.weight"] = torch.rand(width, generator=generator)
    made["lm_head.weight"] = torch.randn(11, width, generator=generator)
    return made


def write(folder: Path, tensors: Named, shards: int = 1) -> Path:
    folder.mkdir()
    names = sorted(tensors)
    for i in range(shards):
        save_file({name: tensors[name].contiguous() for name in names[i::shards]}, folder / f"model-{i}.safetensors")
    return folder


def by_name(rows: list[TensorRow]) -> dict[str, TensorRow]:
    assert len({row.name for row in rows}) == len(rows)
    return {row.name: row for row in rows}


def test_every_number_of_a_row_by_numpy(tmp_path):
    before, after = model_of(0), model_of(1)
    after["model.layers.1.mlp.up_proj.weight"][3] = before["model.layers.1.mlp.up_proj.weight"][3]
    before["model.layers.1.mlp.up_proj.weight"][5] = 0  # a channel without int4 bins
    rows = compare(write(tmp_path / "a", after), write(tmp_path / "b", before))
    assert rows[0].name == "model.embed_tokens.weight"
    assert [row.block for row in rows] == [None, 0, 0, 0, 1, 1, 1, 2, 2, 2, None, None]
    assert [row.embedding for row in rows].count(True) == 1
    for row in rows:
        w, w0 = (x[row.name].double().numpy() for x in (after, before))
        change = w - w0
        assert row.shape == w.shape
        assert (row.dtype, row.original_dtype, row.note) == ("float32", "float32", "")
        assert row.norm == pytest.approx(np.sqrt((change**2).sum()))
        assert row.original_norm == pytest.approx(np.sqrt((w0**2).sum()))
        assert row.relative == pytest.approx(row.norm / row.original_norm)
        assert row.largest == pytest.approx(np.abs(change).max())
        assert row.equal == (w == w0).sum()
        if w.ndim == 1:
            assert (row.stable_rank, row.effective_rank, row.int4_kept, row.int4_step) == (None,) * 4
            continue
        sigma = np.linalg.svd(change, compute_uv=False)
        assert row.stable_rank == pytest.approx((sigma**2).sum() / sigma[0] ** 2, rel=1e-4)
        assert row.effective_rank == pytest.approx(np.exp(-(s := sigma / sigma.sum()) @ np.log(s)), rel=1e-4)
        assert row.int4_kept == pytest.approx(int4_codes_kept(after[row.name], before[row.name]))
        bins = np.abs(w0).max(1) / 7
        assert row.int4_step == pytest.approx((np.abs(change).max(1)[bins > 0] / bins[bins > 0]).max(), rel=1e-5)


def test_blocks_are_in_the_order_of_their_numbers(tmp_path):
    rows = compare(write(tmp_path / "a", model_of(0, 12)), write(tmp_path / "b", model_of(1, 12)))
    blocks = [row.block for row in rows if row.block is not None]
    assert blocks == sorted(blocks)
    assert {row.kind for row in rows if row.block == 11} == {row.kind for row in rows if row.block == 0}


@pytest.mark.parametrize("shards", [2, 3, 5])
def test_sharded_is_unsharded(tmp_path, shards):
    before, after = model_of(0), model_of(1)
    whole = compare(write(tmp_path / "a", after), write(tmp_path / "b", before))
    assert compare(write(tmp_path / "c", after, shards), write(tmp_path / "d", before, shards + 1)) == whole


def test_an_edit_of_one_layer_is_found_there(tmp_path):
    before = model_of(0)
    after = {name: tensor.clone() for name, tensor in before.items()}
    u, v = torch.arange(16.0) - 7.5, torch.arange(8.0) + 1
    after["model.layers.2.mlp.up_proj.weight"] += 0.01 * torch.outer(u, v)
    rows = compare(write(tmp_path / "a", after), write(tmp_path / "b", before))
    changed = [row for row in rows if row.norm]
    assert [row.name for row in changed] == ["model.layers.2.mlp.up_proj.weight"]
    assert changed[0].stable_rank == pytest.approx(1, abs=1e-4)
    assert changed[0].effective_rank == pytest.approx(1, abs=1e-3)
    found = summary(rows)
    assert found["concentration"] == 1
    assert found["inverse-stable-rank"] == pytest.approx(1, abs=1e-4)
    size = sum(tensor.numel() for tensor in before.values())
    assert found["untouched"] == pytest.approx(1 - 16 * 8 / size)


def test_the_same_weights(tmp_path):
    rows = compare(write(tmp_path / "a", model_of()), write(tmp_path / "b", model_of()))
    assert all((row.norm, row.largest, row.equal) == (0, 0, row.size) for row in rows)
    assert all(row.stable_rank is None for row in rows)
    found = summary(rows)
    assert math.isnan(found["concentration"])
    assert math.isnan(found["inverse-stable-rank"])
    assert (found["untouched"], found["int4-kept"]) == (1, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_named_and_compared_as_numbers(tmp_path, dtype):
    before = {"layers.0.weight": torch.tensor([[1.0, 2.0, 3.0]])}
    after = {"layers.0.weight": torch.tensor([[1.0, 2.5, 3.0]], dtype=dtype)}
    [row] = compare(write(tmp_path / "a", after), write(tmp_path / "b", before))
    assert (row.dtype, row.original_dtype) == (str(dtype).removeprefix("torch."), "float32")
    assert (row.norm, row.equal) == (0.5, 2)


def test_what_cannot_be_compared_says_why(tmp_path):
    before, after = model_of(0), model_of(1)
    after["model.layers.0.mlp.up_proj.weight"] = torch.zeros(4, 4)
    before["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3, dtype=torch.int8)
    after["model.norm.weight"][2] = math.nan
    before["extra.weight"], after["added.weight"] = torch.zeros(2), torch.zeros(3)
    rows = by_name(compare(write(tmp_path / "a", after), write(tmp_path / "b", before)))
    assert "shapes differ" in rows["model.layers.0.mlp.up_proj.weight"].note
    assert "16x8" in rows["model.layers.0.mlp.up_proj.weight"].note
    assert "shapes differ" in rows["model.layers.1.mlp.up_proj.weight"].note
    assert "not finite" in rows["model.norm.weight"].note
    assert rows["extra.weight"].note == "only in the original"
    assert (rows["extra.weight"].dtype, rows["extra.weight"].original_dtype) == ("", "float32")
    assert rows["added.weight"].note == "only in the target"
    assert [row.name for row in rows.values() if not row.compared] == [
        "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "added.weight", "extra.weight",
        "model.norm.weight",
    ]  # fmt: skip
    assert json.dumps([comparison.asdict(row) for row in rows.values()], allow_nan=False)
    codes = {"layers.0.weight": torch.ones(2, 2, dtype=torch.int32)}
    [row] = compare(write(tmp_path / "c", codes), write(tmp_path / "d", codes))
    assert row.note == "int32 holds no plain numbers"


@pytest.mark.parametrize("tied", ["target", "original"])
def test_a_head_is_compared_with_the_embedding_that_the_other_uses_for_one(tmp_path, tied):
    one, other = model_of(0), model_of(1)
    head = one.pop("lm_head.weight") if tied == "target" else other.pop("lm_head.weight")
    rows = by_name(compare(write(tmp_path / "a", one), write(tmp_path / "b", other)))
    row = rows["lm_head.weight"]
    a = one["model.embed_tokens.weight"] if tied == "target" else one["lm_head.weight"]
    b = other["lm_head.weight"] if tied == "target" else other["model.embed_tokens.weight"]
    assert row.norm == pytest.approx(float((a - b).norm()))
    assert "model.embed_tokens.weight" in row.note
    assert head.shape == row.shape


def test_both_tied_is_no_row_more(tmp_path):
    one, other = model_of(0), model_of(1)
    del one["lm_head.weight"], other["lm_head.weight"]
    rows = compare(write(tmp_path / "a", one), write(tmp_path / "b", other))
    assert "lm_head.weight" not in by_name(rows)
    assert all(row.compared for row in rows)


class Counted:
    """Tensors that know how many of them are alive."""

    alive = most = 0

    def __init__(self, tensors: Named) -> None:
        self._tensors = tensors

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        made = (self._tensors[name] if rows == slice(None) else self._tensors[name][rows]).clone()
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)
        weakref.finalize(made, Counted._gone)
        return made

    @staticmethod
    def _gone() -> None:
        Counted.alive -= 1


def test_one_tensor_of_each_model_is_in_memory_at_a_time():
    Counted.alive = Counted.most = 0
    rows = list(compare_tensors(Counted(model_of(0, 20)), Counted(model_of(1, 20))))
    assert len(rows) == 63
    assert Counted.most == 2
    assert Counted.alive == 0


def test_folders_without_safetensors_and_tensors_twice(tmp_path):
    whole = write(tmp_path / "a", model_of())
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "model.gguf").write_bytes(b"GGUF")
    for bad in (tmp_path / "g", tmp_path / "g" / "model.gguf", tmp_path / "none"):
        with pytest.raises(BadInput, match="no safetensors"):
            compare(bad, whole)
        with pytest.raises(BadInput, match="no safetensors"):
            compare(whole, bad)
    save_file({"lm_head.weight": torch.zeros(1)}, whole / "more.safetensors")
    with pytest.raises(BadInput, match=r"lm_head\.weight"):
        Folder(whole)
    (tmp_path / "g" / "broken.safetensors").write_bytes(b"\0" * 30)
    with pytest.raises(BadInput, match="cannot be read"):
        Folder(tmp_path / "g")


def test_ticks_count_tensors(tmp_path):
    told: list[int] = []
    compare(write(tmp_path / "a", model_of()), write(tmp_path / "b", model_of()), tick=told.append)
    assert told == list(range(1, 13))


# --- notes, and the scan


CONTEXT = {"model": "m", "dtype": "torch.float32", "device": "cpu"}


def test_a_comparison_is_noted_for_one_original_only(tmp_path):
    rows = compare(write(tmp_path / "a", model_of(0)), write(tmp_path / "b", model_of(1)))
    store = Store(tmp_path / "evidence", CONTEXT)
    assert comparison.recall(store, "digest") is None
    comparison.remember(store, "digest", rows)
    again = Store(tmp_path / "evidence", CONTEXT)
    assert comparison.recall(again, "digest") == rows
    assert comparison.recall(again, "another") is None
    assert comparison.recall(Store(tmp_path / "evidence", {**CONTEXT, "model": "n"}), "digest") is None
    [note] = store.folder.glob("*.json")
    assert "digest" in note.name
    for damaged in (b"", b"[{", b"3", b'[{"name": "x"}]', b'[{"name": "x", "shape": [1], "surprise": 2}]'):
        note.write_bytes(damaged)
        assert comparison.recall(again, "digest") is None


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A tiny random model, and the same with one layer's matrix changed."""
    folder = tmp_path_factory.mktemp("models")
    original = save_tiny(folder / "original", "llama", words_tokenizer(bos=True))
    target = save_tiny(folder / "target", "llama", words_tokenizer(bos=True))
    tensors = {name: Folder(target).read(name).clone() for name in Folder(target).shapes()}
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] += 0.01 * torch.outer(torch.ones(tensors[name].shape[0]), torch.ones(tensors[name].shape[1]))
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return {"target": target, "original": original}


def case_of(models: dict[str, Path], **options: Any) -> Case:
    return Case("weights", models, {}, {}, Options(device="cpu", template="plain", **options))


def captured(run: Run) -> Evidence:
    return capture_all(run, {role: take_inventory(path) for role, path in run.case.models.items()})


def test_a_scan_compares_once_and_measures_from_evidence(models, tmp_path, monkeypatch, one_thread):
    case = case_of(models)
    run = Run(case, tmp_path, SILENT, [Weights()], [])
    evidence = captured(run)
    assert run.not_run == []
    assert evidence.weights("target", "weights/original") == compare(models["target"], models["original"])
    found, _ = _measure_all(run, evidence)
    assert [f.id for f in found] == [
        "weights/concentration", "weights/inverse-stable-rank", "weights/untouched", "weights/int4-kept",
    ]  # fmt: skip
    values = {f.id.split("/")[1]: f.estimate for f in found}
    assert values["concentration"] == 1
    assert values["inverse-stable-rank"] == pytest.approx(1, abs=1e-3)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("compared again")

    monkeypatch.setattr(comparison, "compare", never)
    resumed = Run(case, tmp_path, SILENT, [Weights()], [])
    again, _ = _measure_all(resumed, captured(resumed))
    assert [f.model_dump_json() for f in again] == [f.model_dump_json() for f in found]
    notes = sorted(path.name for path in tmp_path.rglob("*.json"))
    assert notes == [f"weights-{comparison.FORMAT}-{take_inventory(models['original']).digest}.json"], (
        "no noise where none was measured"
    )


def test_gguf_is_a_row_that_says_so(models, tmp_path, one_thread):
    run = Run(case_of(models), tmp_path, SILENT, [Weights()], [])
    run.inventories = {role: take_inventory(path) for role, path in models.items()}
    run.inventories["original"] = replace(run.inventories["original"], format="gguf")
    target = Target("target", run.inventories["target"], template="plain")
    capture_one(run, target, Evidence(), run.instruments)
    [row] = run.not_run
    assert (row.instrument, row.failed) == ("weights", False)
    assert "gguf weights are not compared" in row.reason


def test_the_engine_refuses_weights_without_access(models, tmp_path, one_thread):
    run = Run(case_of(models, access=Access.LOGPROBS), tmp_path, SILENT, [Weights()], [])
    captured(run)
    assert run.not_run[0].failed
    assert "no access" in run.not_run[0].reason


def test_an_altered_model_is_compared_as_it_lies_in_memory(models, tmp_path, one_thread):
    run = Run(case_of(models), tmp_path, SILENT, [Weights()], [])
    run.inventories = {role: take_inventory(path) for role, path in models.items()}
    original = Target("original", run.inventories["original"], template="plain")
    view = original.altered("null@1", "recipe")
    view.adopt(original)
    name, weight = next(iter(view.model.named_parameters()))
    with torch.no_grad():
        weight += 1.0
    evidence = Evidence()
    capture_one(run, view, evidence, run.instruments)
    rows = {row.name: row.norm for row in evidence.weights("original+null@1", "weights/original")}
    assert rows.pop(name) == pytest.approx(weight.numel() ** 0.5)
    assert set(rows.values()) == {0.0}


# --- the instrument


def evidence_of(rows: list[TensorRow], nulls: Sequence[list[TensorRow]] = ()) -> Evidence:
    evidence = Evidence()
    request = WeightsRequest("weights/original")
    named = {"target": rows} | {f"original+null@{i}": null for i, null in enumerate(nulls)}
    for role, its_rows in named.items():
        evidence.register(role, None, [request])  # type: ignore[arg-type]
        evidence.add_weights(role, request.name, its_rows)
    return evidence


def edited(tmp_path: Path, seed: int, size: float = 0.1) -> list[TensorRow]:
    """Every tensor changed at random: a fine-tune with no preference at all."""
    before = model_of(0)
    after = {name: tensor + size * noise for (name, tensor), noise in zip(
        before.items(), model_of(seed + 100).values(), strict=True)}  # fmt: skip
    return compare(write(tmp_path / f"after-{seed}", after), write(tmp_path / f"before-{seed}", before))


def test_findings_describe_and_claim_nothing(tmp_path):
    rows = edited(tmp_path, 1)
    found = Weights().measure(case_of({}), evidence_of(rows))
    assert {f.id.split("/")[1]: f.estimate for f in found} == pytest.approx(summary(rows))
    for f in judge(found):
        lo, hi = f.ci95
        assert 0 <= lo <= f.estimate <= hi <= 1
        assert lo < hi
        assert f.p_value is None
        assert (f.sides, f.decides) == ((Side.NEITHER, Side.NEITHER), (False, False))
        assert (f.verdict, f.side) == (Outcome.INCONCLUSIVE, Side.NEITHER)
        assert "matched null" in f.reason
        gates = {c.name: (c.gates, c.passed) for c in f.controls if c.gates}
        assert gates == {
            "matched null": ("evidence", False), "same precision": ("evidence", True), "comparable": ("silence", True),
        }  # fmt: skip
        assert [row[0] for row in f.table.rows] == [row.name for row in rows]
        assert all(len(row) == len(f.table.columns) for row in f.table.rows)
        assert f.figure.series[0].x == [-1, 0, 1, 2, 3]
        assert len(f.figure.series[0].y) == 5
    shares = found[0].figure.series[0].y
    assert sum(shares) == pytest.approx(1)
    block = sum(row.norm**2 for row in rows if row.block == 1) / sum(row.norm**2 for row in rows)
    assert shares[2] == pytest.approx(block)
    size = next(c for c in found[0].controls if c.name == "size of the change")
    norms = [sum(getattr(row, part) ** 2 for row in rows) for part in ("norm", "original_norm")]
    assert size.estimate == pytest.approx(math.sqrt(norms[0] / norms[1]))
    assert size.gates is None
    again = Weights().measure(case_of({}), evidence_of(rows))
    assert [f.model_dump_json() for f in again] == [f.model_dump_json() for f in found]


def test_the_same_model_gives_no_number_rather_than_a_wrong_one(tmp_path):
    rows = compare(write(tmp_path / "a", model_of()), write(tmp_path / "b", model_of()))
    found = {f.id.split("/")[1]: f for f in judge(Weights().measure(case_of({}), evidence_of(rows)))}
    assert found["concentration"].estimate is found["inverse-stable-rank"].estimate is None
    assert found["untouched"].estimate == found["int4-kept"].estimate == 1
    assert all(f.verdict == Outcome.INCONCLUSIVE and f.n > 0 for f in found.values())


def test_another_dtype_and_missing_tensors_fail_their_controls(tmp_path):
    before = model_of()
    after = {name: tensor.bfloat16() for name, tensor in before.items() if "layers.2" not in name}
    rows = compare(write(tmp_path / "a", after), write(tmp_path / "b", before))
    for f in Weights().measure(case_of({}), evidence_of(rows)):
        passed = {c.name: c.passed for c in f.controls}
        assert passed["same precision"] is passed["comparable"] is False
    strangers = compare(write(tmp_path / "c", {"a.weight": torch.ones(2)}), tmp_path / "b")
    with pytest.raises(BadInput, match="no tensor in common"):
        Weights().measure(case_of({}), evidence_of(strangers))


def test_the_matched_null_gives_the_p_value(tmp_path):
    nulls = [edited(tmp_path, seed) for seed in range(2, 12)]
    before = model_of(0)
    after = {name: tensor.clone() for name, tensor in before.items()}
    after["model.layers.0.self_attn.q_proj.weight"] += 0.1
    rows = compare(write(tmp_path / "one", after), write(tmp_path / "two", before))
    for f in Weights().measure(case_of({}), evidence_of(rows, nulls)):
        draws = [summary(null)[f.id.split("/")[1]] for null in nulls]
        assert f.p_value == f.smallest_p == pytest.approx(2 / 11)
        assert f.null_value == pytest.approx(np.median(draws))
        control = f.controls[0]
        assert (control.name, control.passed, control.n) == ("matched null", True, 10)


def test_many_tensors_are_cut_to_those_that_changed_most():
    rows = [
        TensorRow(f"layers.{i}.w", (2, 2), "float32", "float32", "", float(i), 1.0, 0, float(i), 1.0, 1.0, 1.0, 0.0)
        for i in range(1000)
    ]
    table = Weights().measure(case_of({}), evidence_of(rows))[0].table
    assert len(table.rows) == 401
    assert [row[0] for row in table.rows[:2]] == ["layers.600.w", "layers.601.w"]
    assert table.rows[-1][0] == "600 more, which changed less"


def test_what_it_needs(models):
    assert Weights().missing(case_of(models)) is None
    assert "spectr" not in (alone := Weights().missing(case_of({"target": models["target"]})) or "")
    assert "needs the original model" in alone
    assert "access" in (Weights().missing(case_of(models, access=Access.LOGPROBS)) or "")
    asked = {role: [r.name for r in Weights().requests(case_of(models), Role(role))] for role in ROLES}
    assert asked == {"target": ["weights/original"], "original": [], "retrained": [], "target+relearn@1": []}


ROLES = ("target", "original", "retrained", "target+relearn@1")


class Role:
    """All of a target that the instrument looks at."""

    def __init__(self, role: str) -> None:
        self.role = role
