"""Every registered probe on every layout of blocks: it runs there, reads places the model has, and alarms at nothing.

One scan a layout, of all probes together, on a target of random weights and an original that differs from it by a
little noise: neither has ever seen a person of the sets, so whatever is called evidence of knowledge is an error. A
new probe is covered as soon as it is registered.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, save_tiny
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import Qwen2Tokenizer
from worlds import SETS, quiet_scan

from audit.case import Case, Options
from audit.contrast import ALPHA
from audit.instrument import load, names
from audit.loaders import SetSpec
from audit.organisms.train import word_tokenizer
from audit.organisms.world import GROUPS, make_world
from audit.record import Finding, Label, Outcome, Record, Side
from audit.verdict import KNOWLEDGE

PROBES = [
    name for name in names() if type(load(name)).__module__.startswith("probes.") and load(name).modality != "image"
]
BLOCKS = 3
WORLD = make_world(0, forget=8, retain=8, holdout=8, public=4, unknown=0)

DECLINES = {"patching": "the target's states mean nothing to the original"}
"""Probes, or findings of theirs, that rightly say no more of random weights than that they cannot, and how."""

each_layout = pytest.mark.parametrize("kind", TINY)
each_probe = pytest.mark.parametrize("probe", PROBES)


def tokenizer_of(kind: str) -> Any:
    """One token a word, with a BOS where the layout's models have one; for Qwen2 byte pairs, without.

    Transformers reads a Qwen2 folder as Qwen2's own class of tokenizer, whatever its files say.
    """
    if kind == "qwen2":
        sentences = [f"{row.prompt} {answer}" for row in WORLD.rows(*GROUPS) for answer in (row.answer, *row.wrong)]
        return Qwen2Tokenizer().train_new_from_iterator(sentences, 800, show_progress=False)
    tokenizer = word_tokenizer(WORLD.words())
    if kind in ("gpt2", "gpt_neox"):
        tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    return tokenizer


def save_pair(folder: Path, kind: str) -> dict[str, Path]:
    """A random model of a layout, and as its original the same with a little noise on every weight."""
    changes: dict[str, Any] = {"n_layer" if kind == "gpt2" else "num_hidden_layers": BLOCKS}
    if kind == "gemma2":
        changes["final_logit_softcapping"] = 30.0  # as in the published models; a cap of 3 leaves nothing to be sure of
    target = save_tiny(folder / "target", kind, tokenizer_of(kind), **changes)
    shutil.copytree(target, folder / "original")
    weights, noise = load_file(target / "model.safetensors"), torch.Generator().manual_seed(1)
    noisy = {name: value + 0.02 * torch.randn(value.shape, generator=noise) for name, value in weights.items()}
    save_file(noisy, folder / "original" / "model.safetensors", {"format": "pt"})
    return {"target": target, "original": folder / "original"}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory) -> Callable[[str], Case]:
    """The case of a layout, with all probes in it."""
    sets = tmp_path_factory.mktemp("sets")
    for name in SETS:
        rows = WORLD.rows("public" if name == "utility" else name)
        (sets / f"{name}.jsonl").write_text("".join(json.dumps(row.as_json()) + "\n" for row in rows))
    options = {"budget": "quick", "template": "plain", "device": "cpu", "only": tuple(PROBES)}

    @cache
    def case(kind: str) -> Case:
        specs = {name: SetSpec(sets / f"{name}.jsonl") for name in SETS}
        return Case.build(save_pair(tmp_path_factory.mktemp(kind), kind), specs, Options.parse(options, "test"), kind)

    return case


@pytest.fixture(scope="module")
def scanned(layouts, tmp_path_factory) -> Callable[[str], Record]:
    """The record of a layout."""
    return cache(lambda kind: quiet_scan(layouts(kind), tmp_path_factory.mktemp("out")))


def of(record: Record, probe: str) -> list[Finding]:
    return [finding for finding in record.findings if finding.instrument == probe]


def places(finding: Finding) -> Iterator[float]:
    """Every number in a finding that names a block: of its estimate, of its figure and of its table."""
    if finding.layer and "block" in finding.layer:
        yield float(finding.layer.rsplit(maxsplit=1)[-1])
    if finding.figure and "block" in finding.figure.x_label:
        for line in finding.figure.series:
            yield from line.x
    for i, column in enumerate(finding.table.columns if finding.table else ()):
        if "block" in column:
            yield from (float(row[i]) for row in finding.table.rows)


def test_the_probes_are_found():
    assert {"lens", "tuned-lens", "attribute", "cross-sequence", "geometry", "patching", "sae"} <= set(PROBES)


@each_layout
@each_probe
def test_it_runs_or_says_why_not(probe, kind, scanned):
    record = scanned(kind)
    left_out = {entry.instrument: entry for entry in record.not_run if entry.instrument.split("/")[0] == probe}
    for name, entry in left_out.items():
        assert not entry.failed, entry.reason
        assert name in DECLINES, entry.reason
        assert entry.reason.startswith(DECLINES[name])
    assert bool(of(record, probe)) == (probe not in left_out)
    assert probe in left_out or record.cost.by_instrument[probe].forward_tokens > 0


@each_layout
@each_probe
def test_its_numbers_are_numbers(probe, kind, scanned):
    for finding in of(scanned(kind), probe):
        (lo, hi), value = finding.ci95, finding.estimate
        assert None not in (lo, hi, value), finding.id
        assert lo - 1e-9 <= value <= hi + 1e-9
        assert all(math.isfinite(number) for number in (lo, hi, value))
        json.dumps(finding.model_dump(), allow_nan=False)
        for line in finding.figure.series if finding.figure else ():
            bands = [band for band in (line.y, line.lo, line.hi) if band]
            assert line.x
            assert all(len(band) == len(line.x) and None not in band for band in bands), line.label
        assert finding.table is None or all(len(row) == len(finding.table.columns) for row in finding.table.rows)


@each_layout
@each_probe
def test_it_reads_places_that_the_model_has(probe, kind, scanned):
    for finding in of(scanned(kind), probe):
        found = list(places(finding))
        assert all(0 <= place < BLOCKS for place in found), finding.id
        if finding.figure and "block" in finding.figure.x_label:
            assert {int(place) for place in found} == set(range(BLOCKS)), "so few blocks are all read"


@each_layout
@each_probe
def test_random_weights_are_no_evidence_of_knowledge(probe, kind, scanned):
    record = scanned(kind)
    for finding in of(record, probe):
        if finding.question in KNOWLEDGE and any(finding.decides):
            assert finding.smallest_p <= ALPHA / 10, "with so few entities nothing could be called evidence"
            assert finding.verdict != Outcome.EVIDENCE, (finding.id, finding.estimate, finding.p_adjusted)
            assert finding.side != Side.REMAINS
    assert record.verdict.label not in (Label.NOT_UNLEARNED, Label.SUPPRESSED)


@pytest.fixture(scope="module")
def again(layouts, tmp_path_factory) -> Record:
    """A second scan, from nothing, of the one layout whose configuration asks for dropout."""
    return quiet_scan(layouts("gpt2"), tmp_path_factory.mktemp("again"))


@each_probe
def test_the_same_seed_gives_the_same_numbers(probe, scanned, again):
    first = [finding.model_dump() for finding in of(scanned("gpt2"), probe)]
    assert [finding.model_dump() for finding in of(again, probe)] == first
    assert [entry for entry in again.not_run if entry.instrument == probe] == [
        entry for entry in scanned("gpt2").not_run if entry.instrument == probe
    ]
