"""A bound on memory: how it is read, what it leaves out, and that it changes no number beyond the noise."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from worlds import build_tiny, quiet_scan, small_case, tiny_case

from audit.capture import Engine
from audit.case import Options
from audit.errors import BadInput, Incomplete, Refused
from audit.inventory import take_inventory
from audit.memory import LIBRARIES, Memory, is_shortage, parse_bytes, spelled
from audit.plan import Batch, Generate, Input, Request, Work, merge
from audit.record import Record
from audit.safetensors_header import read_safetensors_header
from audit.target import Target
from audit.tokens import Tokens
from audit.weights import TensorRow, compare
from probes.readout import unembedding

ONLY = "memorization,noise,relearn"
_PROBES = 4
"""Passes by which the engine finds out how to take a model apart."""


# --- stated -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stated", "count"),
    [
        ("3GB", 3 * 10**9), ("1.5 gb", 15 * 10**8), ("800MiB", 800 * 2**20), ("2GiB", 2**31), ("0.5TB", 5 * 10**11),
        (3 * 10**9, 3 * 10**9), ("900000000", 9 * 10**8), ("900000000B", 9 * 10**8), ("800000 KB", 8 * 10**8),
    ],
)  # fmt: skip
def test_a_bound_is_read_in_decimal_and_binary_units(stated, count):
    options = Options.parse({"memory": stated}, "test")
    assert options.memory == count
    assert Options.parse(options.dump(), "record") == options


@pytest.mark.parametrize("stated", ["", "GB", "3 G B", "-3GB", "3XB", "many", True, None, [3], "1e9", "٣GB"])
def test_what_is_no_bound_is_refused(stated):
    with pytest.raises(BadInput, match="is no number of bytes"):
        parse_bytes(stated, "test")


def test_less_than_the_libraries_take_is_refused():
    with pytest.raises(BadInput, match="libraries alone take about 700 MB"):
        Options.parse({"memory": "500MB"}, "command line")


def test_no_bound_is_no_option_in_case_or_record():
    assert "memory" not in Options().dump()
    assert "memory" not in tiny_case().to_toml()
    assert f"memory = {2 * 10**9}" in tiny_case(memory="2GB").to_toml()


@given(st.integers(LIBRARIES + 10**6, 10**12), st.integers(1, 10**11), st.integers(1, 10**9), st.integers(1, 10**8))
def test_shares_never_exceed_the_bound(limit, weights, module, token):
    memory = Memory(limit, weights, module, token)
    room = limit - LIBRARIES
    assert memory.batches <= room / 4
    assert 1 <= memory.tokens <= 4096
    assert memory.tokens == 1 or memory.tokens * token + 4 * memory.logits <= memory.batches
    for copies in (1, 2, 5):
        assert not memory.holds(copies) or copies * weights + memory.batches <= room
    if memory.streams:
        assert memory.kept + module + memory.batches == room
    else:
        with pytest.raises(BadInput, match="at least"):
            _ = memory.kept


def test_the_least_that_is_named_suffices():
    short = Memory(LIBRARIES + 10**6, 10**10, 10**9, 1000)
    least = LIBRARIES + short.module * 4 // 3 + 1
    with pytest.raises(BadInput, match=spelled(least)):
        _ = short.kept
    assert replace(short, limit=least).streams
    assert not replace(short, limit=least - 4).streams


# --- weights that do not fit --------------------------------------------------------------------------------


def opened(limit: int | None = None, dtype: torch.dtype = torch.float32, folder: Path | None = None) -> Target:
    folder = folder or build_tiny().models["original"]
    return Target("target", take_inventory(folder), template="plain", limit=limit, dtype=dtype)


def tight(folder: Path | None = None, share: float = 0.5, dtype: torch.dtype = torch.float32) -> int:
    """A bound that leaves room for the largest module and a share of the weights."""
    memory = opened(10**12, dtype, folder).memory
    assert memory is not None
    return LIBRARIES + math.ceil((memory.module + share * memory.weights) * 4 / 3)


@pytest.mark.parametrize("share", [0.0, 0.7], ids=["all on disk", "some in memory"])
def test_a_model_read_in_parts_computes_the_same(share, one_thread):
    whole, parts = opened(), opened(tight(share=share))
    assert parts.memory is not None and not parts.memory.holds()
    on_disk = [name for name, p in parts.model.named_parameters() if p.is_meta]
    assert on_disk, "some weights are not in memory"
    assert (len(on_disk) == len(list(parts.model.parameters()))) == (share == 0)
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        assert torch.equal(parts.model(input_ids=ids).logits, whole.model(input_ids=ids).logits)
    prompts = [(1, 5, 6, 7), (1, 9)]
    assert parts.generate(prompts, 6) == whole.generate(prompts, 6)
    if share:
        assert torch.equal(parts.embedding(), whole.embedding())
    else:
        with pytest.raises(BadInput, match="its embedding takes"):
            parts.embedding()
    for ours, theirs in zip(unembedding(parts, [3, 8]), unembedding(whole, [3, 8]), strict=True):
        assert torch.equal(ours, theirs)
    states = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(parts.apart(parts.final_norm)(states), whole.final_norm(states))
    assert parts.unused == whole.unused == ()


def test_weights_stored_otherwise_are_converted_when_read(tmp_path, one_thread):
    folder = tmp_path / "m"
    source = opened().model
    source.to(torch.bfloat16).save_pretrained(folder)
    opened().tokenizer.save_pretrained(folder)
    whole, parts = opened(folder=folder), opened(tight(folder, 0.9), folder=folder)
    assert {p.dtype for p in parts.model.parameters()} == {torch.float32}
    assert {p.is_meta for p in parts.model.parameters()} == {True, False}
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        assert torch.equal(parts.model(input_ids=ids).logits, whole.model(input_ids=ids).logits)


def test_a_tensor_that_is_missing_is_missed_in_parts_too(tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(build_tiny().models["original"], folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(Refused, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        _ = opened(tight(folder), folder=folder).model


def test_too_little_for_one_module_says_what_is_needed():
    target = opened(LIBRARIES + 1000)
    with pytest.raises(BadInput, match="largest module"):
        _ = target.model
    assert target.unused == (), "its files can be compared all the same"


def scanned(out: Path, **options: Any) -> Record:
    return quiet_scan(small_case(only=ONLY, **options), out)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Record:
    return scanned(tmp_path_factory.mktemp("undisturbed"), skip="noise,relearn")


def assert_same_findings(record: Record, other: Record) -> None:
    """Within ten times the numeric noise, and where a p-value turns on a tie, in verdict."""
    assert [f.id for f in record.findings] == [f.id for f in other.findings]
    for ours, theirs in zip(record.findings, other.findings, strict=True):
        assert ours.estimate == pytest.approx(theirs.estimate, abs=1e-4), ours.id
        assert ours.verdict == theirs.verdict, ours.id


def test_a_scan_in_parts_finds_the_same_and_attacks_are_said_not_to_run(undisturbed, tmp_path):
    record = scanned(tmp_path, memory=tight(share=0.5))
    assert_same_findings(record, undisturbed)
    reasons = {row.instrument: row for row in record.not_run}
    for attack in ("noise", "relearn"):
        assert "do not fit in the stated memory" in reasons[attack].reason
        assert not reasons[attack].failed
    assert record.case.options["memory"] == tight(share=0.5)
    again = scanned(tmp_path, memory=tight(share=0.5))
    assert again.cost.forward_tokens == 0, "the same bound gives the same batches, and evidence is the same"


def test_attacks_need_room_for_their_copies_of_the_weights():
    memory = opened(10**12).memory
    assert memory is not None
    thrice = replace(memory, limit=LIBRARIES + 4 * memory.weights)
    assert thrice.holds(2) and not thrice.holds(5)
    assert "5 times their" in thrice.lacking(5)


def test_weights_stored_otherwise_need_room_for_the_files_too():
    plain = Memory(LIBRARIES + 1000, weights=700, module=10, token=1)
    assert plain.holds()
    assert replace(plain, mapped=300).holds()
    assert not replace(plain, mapped=301).holds()


# --- memory that does not suffice ---------------------------------------------------------------------------


def failing(monkeypatch: pytest.MonkeyPatch, most: int, after: int = _PROBES) -> list[int]:
    """Forward passes of more than `most` tokens fail as an allocation does; the sizes of those that were tried."""
    tried: list[int] = []

    def watch(model: Any) -> Any:
        def refuse(_module: Any, _args: Any, options: dict[str, Any]) -> None:
            tried.append(options["input_ids"].numel())
            if tried[-1] > most and len(tried) > after:
                raise torch.OutOfMemoryError("tried to allocate more than there is")

        model.base_model.register_forward_pre_hook(refuse, with_kwargs=True)
        return model

    real = Target._load

    def load(self: Target, factory: Any, **options: Any) -> Any:
        found = real(self, factory, **options)
        return (watch(found[0]), found[1]) if isinstance(found, tuple) else found

    monkeypatch.setattr(Target, "_load", load)
    return tried


def test_batches_too_large_run_in_halves_and_the_record_says_so(undisturbed, tmp_path, monkeypatch):
    tried = failing(monkeypatch, 300)
    record = scanned(tmp_path, skip="noise,relearn")
    assert max(tried) > 300
    assert_same_findings(record, undisturbed)
    said = [limit for limit in record.verdict.limits if "memory did not suffice" in limit]
    assert said[0].startswith("target: memory did not suffice for ")
    tried.clear()
    again = scanned(tmp_path, skip="noise,relearn")
    assert not tried, "all is in the store"
    assert [limit for limit in again.verdict.limits if "memory did not suffice" in limit] == said


def test_memory_that_does_not_suffice_for_one_input_ends_the_scan(tmp_path, monkeypatch):
    failing(monkeypatch, 3)
    with pytest.raises(Incomplete, match="memory does not suffice for one input alone: tried to allocate"):
        scanned(tmp_path, skip="noise,relearn")


def test_prompts_run_in_halves_too(monkeypatch, one_thread):
    prompts = tuple((1, i, i + 1) for i in range(3, 14))
    request = Generate("g", prompts, 4, samples=2, temperature=0.9, seed=3)
    expected = Engine(opened()).answer(request, prompts)
    failing(monkeypatch, 13, after=0)
    engine = Engine(opened())
    found = engine.answer(request, prompts)
    longest = max(map(len, expected))  # in a batch, those that have ended are padded
    assert [row + (0,) * (longest - len(row)) for row in found] == [
        row + (0,) * (longest - len(row)) for row in expected
    ]
    assert engine.halved > 1


@pytest.mark.parametrize(
    ("error", "shortage"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True), (MemoryError(), True), (RuntimeError("shapes"), False),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (ValueError("not enough memory"), False),
    ],
)  # fmt: skip
def test_what_counts_as_a_shortage(error, shortage):
    assert is_shortage(error) == shortage


@given(st.integers(1, 5), st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_halves_hold_every_input_once_in_order(prefix, sizes):
    start = (7,) * prefix
    groups = tuple(
        tuple(Input((*start, i, j), (Work(Tokens((*start, i, j, 1), prefix + 2), ()),)) for j in range(size))
        for i, size in enumerate(sizes)
    )
    batch = Batch(prefix, groups)
    pair = batch.halves()
    if sum(sizes) == 1:
        assert pair is None
        return
    assert pair is not None
    assert [*pair[0].works, *pair[1].works] == batch.works
    assert abs(len(pair[0].inputs) - len(pair[1].inputs)) <= 1
    assert all(len({row.ids[prefix] for row in group}) == 1 for half in pair for group in half.groups)


def test_batches_follow_from_the_bound_alone():
    works = merge([Request("r", tuple(Tokens((1, *range(3, 3 + n)), 1) for n in range(2, 40)))])
    small, large = (Engine(opened(limit)) for limit in (tight(), 10**12))
    assert small.token_budget < large.token_budget == 4096
    assert small.batches(works) == Engine(opened(tight())).batches(works)
    assert len(small.batches(works)) > len(large.batches(works))


# --- weight files larger than memory ------------------------------------------------------------------------


def by_name(rows: list[TensorRow]) -> dict[str, TensorRow]:
    return {row.name: row for row in rows}


def test_large_tensors_are_compared_in_pieces_as_they_would_be_whole(tmp_path, monkeypatch):
    shapes = {"model.embed_tokens.weight": (90, 8), "model.layers.0.up.weight": (12, 50), "lm_head.weight": (7, 7),
              "model.layers.0.experts": (4, 6, 5), "model.norm.weight": (300,)}  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        save_file({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}, folder / "model.safetensors")
    whole = by_name(compare(*folders))
    alone = by_name(compare(folders[0], None))
    monkeypatch.setattr("audit.weights._PIECE", 60)
    for kept, against in ((whole, folders[1]), (alone, None)):
        for name, row in by_name(compare(folders[0], against)).items():
            for field, value in vars(row).items():
                expected = getattr(kept[name], field)
                assert value == (pytest.approx(expected, rel=1e-5) if isinstance(value, float) else expected), field


def test_a_comparison_holds_no_more_than_a_few_pieces(tmp_path, monkeypatch):
    """Read are pieces, and never the whole of a tensor larger than one."""
    folder = tmp_path / "m"
    folder.mkdir()
    save_file({"model.embed_tokens.weight": torch.randn(4000, 16)}, folder / "model.safetensors")
    [span] = read_safetensors_header(folder / "model.safetensors").tensors
    monkeypatch.setattr("audit.weights._PIECE", 1600)
    sizes: list[int] = []
    real = bytearray

    def counted(count: int) -> bytearray:
        sizes.append(count)
        return real(count)

    monkeypatch.setattr("audit.weights.bytearray", counted, raising=False)
    compare(folder, folder)
    assert max(sizes) == 4 * 1600
    assert sum(sizes) == 2 * (span.end - span.begin), "each byte of either model is read once"
