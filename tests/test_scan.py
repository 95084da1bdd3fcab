"""A scan from end to end: killed and resumed, repeated, damaged; always the same record."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import torch
from safetensors.torch import load_file, save_file
from worlds import REPO, build_tiny, environment, quiet_scan, scan_tiny, small_case, tiny_case, tiny_evidence

from audit.capture import Engine
from audit.case import Case, Options, read_case
from audit.errors import Incomplete, Refused
from audit.instrument import everyday, load, names
from audit.loaders import SetSpec
from audit.record import Label, Outcome, Question, Record, Side, json_schema

Blocks = dict[str, tuple[int, int, int]]


def blocks(out: Path) -> Blocks:
    """Every evidence block, with what would change if it were written again."""
    found = {}
    for path in (out / "evidence").glob("*/*.safetensors"):
        stat = path.stat()
        found[f"{path.parent.name}/{path.name}"] = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
    return found


def contents(out: Path) -> set[tuple[str, str]]:
    """What the blocks hold: context, and digest of the tensors. Metadata come in any order, and with them the name."""
    found = set()
    for path in (out / "evidence").glob("*/*.safetensors"):
        data = path.read_bytes()
        tensors = data[8 + int.from_bytes(data[:8], "little") :]
        found.add((path.parent.name, hashlib.sha256(tensors).hexdigest()))
    return found


def no_passes(monkeypatch) -> None:
    """Any pass from now on is an error."""

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a pass through a model")

    for name in ("run", "generate", "plain"):
        monkeypatch.setattr(Engine, name, forbidden)
    monkeypatch.setattr("attacks.relearn.fine_tune", forbidden)


# --- the undisturbed scan


def test_the_record_of_the_tiny_world():
    scanned = scan_tiny()
    record = scanned.record
    texts = {name for name in names() if load(name).modality != "image"}
    left_out = {"weights-alone"} | texts - set(everyday())  # the first lacks blocks
    assert {row.instrument: row.failed for row in record.not_run} == dict.fromkeys(left_out, False)
    running = texts - left_out
    assert {f.instrument for f in record.findings} == running
    assert list(record.models) == ["target", "original", "retrained"]
    assert set(record.case.sets) == {"forget", "retain", "holdout", "utility"}
    assert all(s.count == 72 and s.entities == 12 for n, s in record.case.sets.items() if n != "utility")
    assert len({m.digest for m in record.models.values()}) == 3
    assert set(record.environment.noise) == {"target", "original", "retrained"}
    assert all(noise is not None and noise < 1e-4 for noise in record.environment.noise.values())
    assert len(record.examples) == 72
    assert all("probability" in row.scores for row in record.examples)
    assert sum(row.generated is not None for row in record.examples) == 36, "six people's answers, by this budget"
    assert record.cost.forward_tokens >= record.cost.unique_tokens > 0
    assert record.cost.reused_tokens < 0.05 * record.cost.unique_tokens, "no more than what an attack recorded itself"
    assert set(record.cost.by_instrument) >= running
    assert Record.read(scanned.out).comparable() == record.comparable()
    # The unlearned model hides what it knows: the lens, at least, must see it.
    lens = next(f for f in record.findings if f.id == "lens/choice")
    assert (lens.verdict, lens.side) == (Outcome.EVIDENCE, Side.REMAINS)
    assert record.verdict.label in (Label.SUPPRESSED, Label.NOT_UNLEARNED)


def test_the_record_of_every_instrument_is_as_its_schema_says():
    data = json.loads((scan_tiny().out / "record.json").read_text())
    jsonschema.Draft202012Validator(json_schema()).validate(data)


def test_the_resolved_case_is_the_case():
    scanned = scan_tiny()
    name, models, specs, raw = read_case(scanned.out / "case.toml")
    case = Case.build(models, specs, Options.parse(raw, "case.toml"), name)
    asked = tiny_case()
    assert case.options == asked.options
    assert case.name == asked.name
    assert {n: s.digest for n, s in case.sets.items()} == {n: s.digest for n, s in asked.sets.items()}
    assert {r: p.resolve() for r, p in case.models.items()} == {r: p.resolve() for r, p in asked.models.items()}


def test_every_block_is_named_by_its_bytes_and_no_half_file_is_left():
    evidence = scan_tiny().out / "evidence"
    files = [path for path in evidence.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    contexts = {path.name for path in evidence.iterdir()}
    altered = [role for role in tiny_evidence().roles if "+" in role]
    assert len(contexts) == 3 + len(altered), "three models, and those altered"


# --- again


def test_a_second_scan_runs_no_pass(monkeypatch):
    scanned = scan_tiny()
    before = blocks(scanned.out)
    no_passes(monkeypatch)
    again = quiet_scan(tiny_case(), scanned.out)
    assert again.comparable() == scanned.record.comparable()
    assert again.cost.forward_tokens == 0
    assert again.cost.reused_tokens == again.cost.unique_tokens == scanned.record.cost.unique_tokens
    assert blocks(scanned.out) == before


def test_killed_in_mid_scan_it_resumes(tmp_path):
    """With an instrument of each way to ask: of texts and answers, of states, of states put elsewhere, of an attack."""
    only = "knowledge,lens,patching,relearn"
    reference, out = tmp_path / "reference", tmp_path / "out"
    undisturbed = quiet_scan(tiny_case(only=only), reference)
    command = [sys.executable, "-m", "cli", "scan", "--case", str(build_tiny().case_file), "--out", str(out)]
    killed = subprocess.Popen(
        [*command, "--budget", "quick", "--only", only], cwd=REPO, env=environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 200
        while len(blocks(out)) < 2:
            assert killed.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
    assert not (out / "record.json").exists()
    survived = blocks(out)
    whole = contents(reference)
    assert 2 <= len(survived) < len(whole)
    assert contents(out) < whole, "the same batches, and in them the same numbers"
    resumed = quiet_scan(tiny_case(only=only), out)
    assert resumed.comparable() == undisturbed.comparable()
    after = blocks(out)
    assert contents(out) == whole
    assert len(after) == len(blocks(reference))
    assert {name: after[name] for name in survived} == survived, "no finished pass was repeated"
    assert resumed.cost.reused_tokens > 0
    assert resumed.cost.forward_tokens < undisturbed.cost.forward_tokens


def test_killed_inside_the_attack_it_resumes(tmp_path, monkeypatch):
    """The attack is run again from its start, but a stage that was captured is not captured twice."""
    out = tmp_path / "audit"
    case = tiny_case({"target": "unlearned"}, ("forget", "retain", "holdout"), only="relearn")
    reference = quiet_scan(case, tmp_path / "reference")
    real = Engine.run

    def until(engine, batch):
        if engine.target.role.endswith("relearn-a@20"):
            raise KeyboardInterrupt
        return real(engine, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Engine, "run", until)
        with pytest.raises(KeyboardInterrupt):
            quiet_scan(case, out)
    survived = blocks(out)
    resumed = quiet_scan(case, out)
    assert resumed.comparable() == reference.comparable()
    assert contents(out) == contents(tmp_path / "reference")
    assert {name: blocks(out)[name] for name in survived} == survived
    assert resumed.cost.reused_tokens > 0


def test_another_instrument_s_scan_reuses_what_is_there(tmp_path):
    first = quiet_scan(small_case(only="memorization"), tmp_path)
    fresh = quiet_scan(small_case(only="knowledge"), tmp_path / "fresh")
    second = quiet_scan(small_case(only="knowledge"), tmp_path)
    assert first.cost.reused_tokens == 0
    assert second.cost.forward_tokens <= fresh.cost.forward_tokens
    for one, two in zip(second.findings, fresh.findings, strict=True):
        assert one.estimate == pytest.approx(two.estimate, abs=1e-5)


# --- what must not be mixed up


def test_evidence_is_never_served_to_another_model(tmp_path):
    shared = [quiet_scan(_only(made), tmp_path / "shared") for made in ("original", "retrained")]
    alone = [quiet_scan(_only(made), tmp_path / made) for made in ("original", "retrained")]
    for one, two in zip(shared, alone, strict=True):
        assert [f.estimate for f in one.findings] == [f.estimate for f in two.findings]
        assert one.cost.reused_tokens == 0
    assert shared[0].findings[0].estimate > 0.8 > abs(shared[1].findings[0].estimate)


def _only(made: str, **options: object) -> Case:
    return tiny_case({"target": made}, ("forget", "retain", "holdout"), **{"only": "memorization"} | options)


def test_the_template_changes_what_is_asked(tmp_path):
    plain = quiet_scan(small_case(), tmp_path)
    asked = quiet_scan(small_case(template="Say: {prompt}"), tmp_path)
    assert asked.cost.reused_tokens == 0
    assert plain.findings[0].estimate != asked.findings[0].estimate


def test_a_damaged_block_is_set_aside_said_and_computed_again(tmp_path):
    first = quiet_scan(small_case(), tmp_path)
    before = contents(tmp_path)
    damaged = sorted((tmp_path / "evidence").glob("*/*.safetensors"))[0]
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(bytes(data))
    again = quiet_scan(small_case(), tmp_path)
    assert [f.model_dump() for f in again.findings] == [f.model_dump() for f in first.findings]
    assert any("damaged" in limit for limit in again.verdict.limits)
    assert damaged.with_suffix(".damaged").exists()
    assert contents(tmp_path) == before, "computed again, to the same numbers"
    assert again.cost.forward_tokens > 0
    third = quiet_scan(small_case(), tmp_path)
    assert third.comparable() == first.comparable()


def test_a_torn_block_is_not_believed(tmp_path):
    first = quiet_scan(small_case(), tmp_path)
    for path in (tmp_path / "evidence").glob("*/*.safetensors"):
        path.write_bytes(path.read_bytes()[:-100])
    again = quiet_scan(small_case(), tmp_path)
    assert [f.model_dump() for f in again.findings] == [f.model_dump() for f in first.findings]
    assert again.cost.reused_tokens == 0


# --- what a record says of how it was made


def test_rows_left_out_are_said(tmp_path):
    case = small_case()
    assert all(len(case.rows(name)) == 72 for name in case.sets)
    few = case.rows("forget", 20)
    assert len(few) == 18, "whole entities"
    assert len({row.entity for row in few}) == 3
    many = tiny_case({"target": "original"}, ("forget", "holdout"), only="memorization")
    doubled = many.sets["forget"]
    examples = doubled.examples + tuple(
        type(e)(f"{e.id}x", e.prompt, e.answer, e.paraphrases, e.wrong, f"{e.entity} too") for e in doubled.examples
    )
    sets = dict(many.sets) | {"forget": type(doubled)("forget", doubled.source, examples, doubled.digest)}
    record = quiet_scan(Case(many.name, many.models, many.specs, sets, many.options), tmp_path)
    assert any("forget: 120 of 144 rows used (budget quick)" in limit for limit in record.verdict.limits)


def write_rows(path: Path, prefix: str, count: int, words: int, entity: bool = True) -> SetSpec:
    rows = []
    for i, row in enumerate(json.loads(line) for line in (build_tiny().sets[prefix]).read_text().splitlines()):
        if i % 6 == 0 and i // 6 < count:
            padding = "Alma " * words
            kept = {"question": padding + row["question"], "answer": row["answer"]}
            rows.append(kept | ({"author": row["author"]} if entity else {}))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SetSpec(path)


def test_rows_without_entities_are_said(tmp_path):
    specs = {name: write_rows(tmp_path / f"{name}.jsonl", name, 4, 0, entity=False) for name in ("forget", "holdout")}
    options = Options.parse({"only": "memorization", "budget": "quick", "template": "plain"}, "test")
    case = Case.build({"target": build_tiny().models["original"]}, specs, options)
    record = quiet_scan(case, tmp_path / "out")
    assert sum("carry no entity" in limit for limit in record.verdict.limits) == 2


@pytest.mark.parametrize(
    "only",
    [
        "memorization",
        "memorization,knowledge",
        "relearn",
    ],
)
def test_cut_texts_are_counted_alike_by_every_scan(tmp_path, only):
    specs = {
        name: write_rows(tmp_path / f"{name}.jsonl", name, 4, 260 if name == "retain" else 0)
        for name in ("forget", "retain", "holdout")
    }
    options = Options.parse({"only": only, "budget": "quick", "template": "plain"}, "test")
    case = Case.build({"target": build_tiny().models["original"]}, specs, options)
    first, again = (quiet_scan(case, tmp_path / "out") for _ in range(2))
    assert again.comparable() == first.comparable()
    [said] = [limit for limit in first.verdict.limits if "longer than its context" in limit]
    assert said.startswith("target: 4 texts"), "texts, not how often they were encoded"


def test_tensors_that_nothing_uses_are_said_by_every_scan(tmp_path):
    """They are known only once the weights are loaded, which a scan that finds all its evidence does not do."""
    folder = tmp_path / "model"
    shutil.copytree(build_tiny().models["original"], folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.spare.weight": torch.zeros(2, 2)}, folder / "model.safetensors", {"format": "pt"})
    case = small_case()
    case = Case(case.name, {"target": folder}, case.specs, case.sets, case.options)
    first, again = (quiet_scan(case, tmp_path / "out") for _ in range(2))
    assert any("model.spare.weight" in limit for limit in first.verdict.limits)
    assert again.comparable() == first.comparable()


# --- what goes wrong


def test_a_pass_that_fails_ends_the_scan_and_keeps_what_it_had(tmp_path, monkeypatch):
    real, count = Engine.run, 0
    case = _only("original", only="remind")  # its neighbours need several batches

    def fails(engine, batch):
        nonlocal count
        count += 1
        if count == 2:
            raise RuntimeError("out of memory")
        return real(engine, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Engine, "run", fails)
        with pytest.raises(Incomplete, match="out of memory"):
            quiet_scan(case, tmp_path)
    kept = blocks(tmp_path)
    assert len(kept) == 1
    assert not (tmp_path / "record.json").exists()
    quiet_scan(case, tmp_path)
    assert kept.items() <= blocks(tmp_path).items()


def test_nothing_is_opened_before_every_folder_was_inventoried(tmp_path, monkeypatch):
    models = {"target": build_tiny().models["original"], "retrained": tmp_path / "bad"}
    shutil.copytree(build_tiny().models["retrained"], tmp_path / "bad")
    (tmp_path / "bad" / "modeling_own.py").write_text("print('run')")
    case = small_case()
    case = Case(case.name, models, case.specs, case.sets, case.options)
    monkeypatch.setattr("audit.target.Target.__init__", lambda *_, **__: pytest.fail("a folder was opened"))
    with pytest.raises(Refused, match=r"modeling_own\.py"):
        quiet_scan(case, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_model_at_a_time(tmp_path, monkeypatch):
    """Weights of one role are gone before the next role's are read."""
    import gc
    import weakref

    from audit.target import Target

    alive: list[weakref.ref[torch.nn.Module]] = []
    real = Target._load

    def load(target, factory, **options):
        made = real(target, factory, **options)
        for part in made if isinstance(made, tuple) else (made,):
            if isinstance(part, torch.nn.Module):
                gc.collect()
                assert not [ref for ref in alive if ref() is not None], "two models in memory"
                alive.append(weakref.ref(part))
        return made

    monkeypatch.setattr(Target, "_load", load)
    case = tiny_case({"target": "original", "retrained": "retrained"}, ("forget", "retain"), only="memorization")
    quiet_scan(case, tmp_path)
    assert len(alive) == 2


def test_no_instrument_left_is_an_inconclusive_record(tmp_path):
    record = quiet_scan(small_case(only="utility"), tmp_path)
    assert record.findings == []
    assert [n.instrument for n in record.not_run] == ["utility"]
    assert record.verdict.label == Label.INCONCLUSIVE
    assert all("not tested" in text for text in record.verdict.coverage.values())
    assert "utility" in record.verdict.coverage[Question.UTILITY]


def test_replayed_evidence_holds_every_role():
    stages = {"target+relearn-a@10", "target+relearn-a@20", "target+random@0", "original+patching-taught"}
    stages |= {f"original+null@{k}" for k in range(1, 5)}
    assert set(tiny_evidence().roles) >= {"target", "original", "retrained"} | stages
