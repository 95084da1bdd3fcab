"""Small models that are taught, from nothing, what a test of a prompt attack needs them to say."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from audit.case import Case, Options
from audit.gather import Run, capture_all
from audit.instrument import Instrument
from audit.inventory import take_inventory
from audit.loaders import SetSpec
from audit.organisms.train import encode, new_model, save, train, word_tokenizer
from audit.organisms.world import UNKNOWN, Row, World, make_world
from audit.progress import SILENT
from audit.record import Finding
from audit.verdict import judge

SETS = ("forget", "retain", "holdout")


def small_world() -> World:
    """Twelve people a set."""
    return make_world(0, forget=12, retain=12, holdout=12, public=2, unknown=2)


def said(rows: Sequence[Row], answer: str = UNKNOWN, prompt: Callable[[Row], str] | None = None) -> list[Row]:
    """Rows whose answer is this instead (`{}` is the right one), perhaps after another prompt."""
    return [replace(r, answer=answer.replace("{}", r.answer), prompt=prompt(r) if prompt else r.prompt) for r in rows]


def teach(folder: Path, rows: Sequence[Row], *, more: Sequence[str] = (), epochs: int = 20) -> Path:
    """A model that was taught these rows, written to a folder; `more`: tokens that its tokenizer knows besides."""
    tokenizer = word_tokenizer(small_world().words())
    tokenizer.add_tokens(list(more))
    model = new_model(tokenizer, seed=0, hidden=64, intermediate=128, layers=2, heads=2)
    train(model, encode(tokenizer, rows), epochs=epochs, lr=5e-3, batch=32, seed=0)
    save(model, tokenizer, folder)
    return folder


def planted_case(folder: Path, model: Path, **options: object) -> Case:
    """A case of this model as the target, and the small world's sets, which are written to a folder."""
    folder.mkdir(exist_ok=True)
    for name in SETS:
        lines = [json.dumps(row.as_json()) for row in small_world().rows(name)]  # type: ignore[arg-type]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    specs = {name: SetSpec(folder / f"{name}.jsonl") for name in SETS}
    given = {"budget": "quick", "template": "plain", "device": "cpu"} | options
    return Case.build({"target": model}, specs, Options.parse(given, "test"), "planted")


def measured(instrument: Instrument, case: Case, out: Path) -> list[Finding]:
    """What an instrument finds, registered or not."""
    run = Run(case, out, SILENT, [instrument], [])
    evidence = capture_all(run, {role: take_inventory(path) for role, path in case.models.items()})
    assert not run.not_run
    return judge(instrument.measure(case, evidence))
