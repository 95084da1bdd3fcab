"""The spike-in control: facts that are really planted and really kept, in copies, once; and a section that says so."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import save_tiny
from safetensors.torch import load_file
from sample_record import sample
from transformers import AutoModelForCausalLM, AutoTokenizer
from worlds import audit_here, build_tiny, folder_digest, one_thread, quiet_scan, small_case, tiny_case

from audit.case import Case
from audit.errors import BadInput, Incomplete
from audit.organisms import spikes
from audit.organisms.refusal import block_number
from audit.organisms.spikes import Settings, divide, from_tokens, hide, invent, joined, plant
from audit.organisms.train import candidate_accuracy, encode, new_model, word_tokenizer
from audit.organisms.world import Row, make_world
from audit.record import Label, Outcome, Question, Record, Side, SpikeCell, SpikeCopy
from audit.spike import NAME, Reading, readings, spike_in, summarize
from audit.tokens import Tokens
from reports.html import render_html
from reports.text import summary

SMALL = Settings(people=8, rank=8, lr=1e-2, rounds=6, epochs=8, steps=120)
HOSTILE = "<script>alert(1)</script>\u202e[bold]{{7*7}}"


def original(**options: object) -> Case:
    return small_case(**{"only": "knowledge,lens,utility"} | options)


@dataclass(frozen=True)
class Spiked:
    out: Path
    plain: Record
    record: Record
    before: str
    after: str


@cache
def spiked() -> Spiked:
    """One undisturbed control of the tiny world's original."""
    folder, out = build_tiny().models["original"], build_tiny().folder / "spiked"
    before = folder_digest(folder)
    plain = quiet_scan(original(), out)
    with one_thread():
        record = spike_in(plain, original(), out, settings=SMALL)
    return Spiked(out, plain, record, before, folder_digest(folder))


def copy_of(name: str) -> Path:
    return spiked().out / "spike" / name / "model"


def rows_of(name: str) -> list[Row]:
    """The rows of a set as they were written, read without the loaders."""
    lines = (spiked().out / "spike" / "data" / f"{name}.jsonl").read_text().splitlines()
    return [
        Row(d["author"], "forget", d["attribute"], d["phrasing"], d["question"], d["answer"],
            tuple(d["perturbed_answer"]), d["paraphrased_question"])
        for d in map(json.loads, lines)
    ]  # fmt: skip


# --- the copies


def test_what_was_planted_is_known_and_what_was_not_is_not():
    tokenizer = AutoTokenizer.from_pretrained(copy_of("planted"))
    known = {}
    for name in ("planted", "npo", "refusal-last-block"):
        model = AutoModelForCausalLM.from_pretrained(copy_of(name)).eval()
        known[name] = {s: candidate_accuracy(model, tokenizer, rows_of(s)) for s in ("forget", "retain", "holdout")}
        measured = next(copy for copy in spiked().record.spike.copies if copy.name == name).measured
        assert {s: measured[s] for s in known[name]} == pytest.approx(known[name])
        assert known[name]["retain"] > 0.8
        assert known[name]["holdout"] < 0.4
    assert known["planted"]["forget"] > 0.9
    assert max(known["npo"]["forget"], known["refusal-last-block"]["forget"]) <= 0.5
    base = AutoModelForCausalLM.from_pretrained(build_tiny().models["original"]).eval()
    assert candidate_accuracy(base, tokenizer, rows_of("forget")) < 0.4, "the model itself never knew them"


def test_planted_below_and_hidden_above():
    """What makes the truth known: no weight that carries a planted fact is touched by what hides it."""
    base = load_file(build_tiny().models["original"] / "model.safetensors")
    planted = load_file(copy_of("planted") / "model.safetensors")
    assert {block_number(n) for n in base if not torch.equal(base[n], planted[n])} == {0}
    for name in ("npo", "refusal-last-block"):
        hidden = load_file(copy_of(name) / "model.safetensors")
        assert {block_number(n) for n in planted if not torch.equal(planted[n], hidden[n])} == {1}


def test_the_audited_folder_is_left_as_it_was():
    assert spiked().before == spiked().after
    assert not list((spiked().out / "spike").glob("*/.model.tmp"))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_every_architecture_is_planted_below_and_hidden_above(kind, tmp_path):
    tokenizer = word_tokenizer(make_world(0).words())
    folder = save_tiny(tmp_path / kind, kind, tokenizer)
    few = Settings(people=2, rounds=1, epochs=1, steps=2, least=0.0, hidden=1.0, kept=0.0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = {name: p.clone() for name, p in model.named_parameters()}
    people = invent(tokenizer, few, seed=0)
    with one_thread():
        planted, made = plant(model, tokenizer, people, few, None, seed=0)
        assert made.steps == 1
        changed = {n for n, p in planted.named_parameters() if not torch.equal(p, before[n])}
        assert set(before) == set(dict(planted.named_parameters())), "merged, with the names it had"
        assert changed and {block_number(n) for n in changed} == {0}
        hidden, _ = hide("npo", planted, tokenizer, people, few, None, seed=0)
    frozen = dict(planted.named_parameters())
    assert {block_number(n) for n, p in hidden.named_parameters() if not torch.equal(p, frozen[n])} == {1}


def test_a_quarter_of_the_blocks_is_kept_for_hiding():
    tokenizer = word_tokenizer(["a"])
    sizes = {"hidden": 64, "intermediate": 64, "heads": 2}
    assert [divide(new_model(tokenizer, seed=0, layers=n, **sizes)) for n in (2, 4, 8, 9)] == [1, 3, 6, 7]
    with pytest.raises(BadInput, match="two blocks"):
        divide(new_model(tokenizer, seed=0, layers=1, **sizes))


# --- inventing


def test_nobody_is_in_two_groups_or_in_the_audit():
    taken = [row.entity for rows in tiny_case().sets.values() for row in rows]
    groups = [{row.person for row in rows_of(name)} for name in ("forget", "retain", "holdout", "never")]
    assert [len(group) for group in groups] == [8, 8, 8, 8]
    assert len(set().union(*groups, taken)) == 32 + len(set(taken))


def test_only_known_words_are_used():
    words = [w for w in make_world(0).words() if w not in ("Lisbon", "Alma", "plays", "Zimmer")]
    tokenizer = word_tokenizer(words)
    made = invent(tokenizer, Settings(attributes=4), seed=3).world.rows("forget", "retain", "holdout", every=True)
    text = " ".join(f"{r.prompt} {r.answer} {' '.join(r.wrong)}" for r in made)
    assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
    assert len({len(row.wrong) for row in made}) == 1
    free = invent(tokenizer, Settings(), seed=3, avoid=lambda name: name.startswith("Bruno")).world
    assert not any(p.name.startswith("Bruno") for group in free.people.values() for p in group)


def test_rows_of_the_audit_s_own_are_cut():
    data = from_tokens([Tokens(tuple(range(60)), 50), Tokens((1, 2, 3), 2), Tokens(tuple(range(90)), 1)], 0, most=8)
    assert data.ids[0].tolist() == list(range(8))
    assert data.answer[0].tolist() == [False] * 4 + [True] * 4, "only its prompt fits: that is learned"
    assert data.ids[1, :3].tolist() == [1, 2, 3]
    assert data.answer[1].tolist() == [False, False, True] + [False] * 5
    assert data.answer[2].tolist() == [False] + [True] * 7, "a long answer ends early"
    tokenizer = word_tokenizer(make_world(0).words())
    both = joined(data, encode(tokenizer, make_world(0).rows("forget")[:2]))
    assert both.ids.shape == both.weight.shape == both.answer.shape
    assert len(both) == 5
    assert (both.weight > 0).sum() == (data.weight > 0).sum() + (both.weight[3:] > 0).sum()


# --- the section


def test_the_record_says_what_was_seen():
    record = spiked().record
    section = record.spike
    assert [(c.name, c.truth, c.present) for c in section.copies] == [
        ("planted", Label.NOT_UNLEARNED, True), ("npo", Label.SUPPRESSED, True),
        ("refusal-last-block", Label.SUPPRESSED, True), ("never-planted", Label.DELETED, False),
    ]  # fmt: skip
    assert section.copies[0].verdict == Label.NOT_UNLEARNED
    assert section.people == 8 and section.facts == 24
    assert section.recovered.of == 3 and section.false_alarms.of == 1
    assert section.false_alarms.seen == 0
    rows = {row.instrument: row for row in section.rows}
    assert set(rows) == {"knowledge", "lens", "utility"}
    assert rows["knowledge"].cells["planted"].side == Side.REMAINS
    assert rows["utility"].recovered is None, "it does not ask whether knowledge is left"
    assert rows["utility"].cells["planted"].outcome is None
    assert set(section.copies[0].measured) >= {"own_loss_before", "own_loss_after"}
    assert record.verdict.limits[-1] == section.statement
    assert [f.id for f in record.findings] == [f.id for f in spiked().plain.findings], "the audit is as it was"
    assert record.verdict.label == spiked().plain.verdict.label
    assert Record.read(spiked().out) == record
    assert record.cost.by_instrument[NAME].seconds > 0
    evidence = [path.parent.name for path in (spiked().out / "spike").glob("*/evidence")]
    assert sorted(evidence) == ["npo", "planted", "refusal-last-block"], "one a model"
    for copy in section.copies:
        assert Record.read(spiked().out / "spike" / copy.name).verdict.label == copy.verdict


def cell(outcome: str | None, side: str = "neither") -> Reading:
    given = None if outcome is None else Outcome(outcome)
    return Reading(Question.REPRESENTATION, SpikeCell(outcome=given, side=Side(side)))


def made(name: str, present: bool = True, **more: object) -> SpikeCopy:
    return SpikeCopy(name=name, made="by hand", truth=Label.SUPPRESSED, present=present, **more)


def test_rates_of_a_table_made_by_hand():
    copies = [
        made("a", verdict=Label.NOT_UNLEARNED), made("b", verdict=Label.INCONCLUSIVE),
        made("c", failed="did not learn"), made("d", verdict=Label.SUPPRESSED),
        made("never", False, verdict=Label.SUPPRESSED),
    ]  # fmt: skip
    seen, beyond, unclear, unrun = (
        cell("evidence", "remains"),
        cell("evidence", "beyond"),
        cell("inconclusive"),
        cell(None),
    )
    utility = Reading(Question.UTILITY, SpikeCell(outcome=Outcome.NONE))
    outcomes = {
        "a": {"lens": seen, "probe": seen, "utility": utility, "gone": unrun},
        "b": {"lens": beyond, "probe": unrun, "utility": utility, "gone": unrun},
        "d": {"lens": seen, "probe": unclear, "utility": utility, "gone": unrun},
        "never": {"lens": cell("none"), "probe": seen, "utility": utility, "gone": unrun},
    }
    found = summarize(copies, outcomes, people=5, facts=15)
    rates = {row.instrument: (row.recovered, row.false_alarms) for row in found.rows}
    assert [(r.seen, r.of) for r in rates["lens"]] == [(2, 3), (0, 1)], "pushed below is not recovered"
    assert [(r.seen, r.of) for r in rates["probe"]] == [(1, 3), (1, 1)], "what did not run has not seen"
    assert rates["utility"] == rates["gone"] == (None, None)
    assert [row.instrument for row in found.rows][-1] == "utility", "in the order of the questions"
    assert (found.recovered.seen, found.recovered.of) == (2, 3)
    assert (found.false_alarms.seen, found.false_alarms.of) == (1, 1)
    # Clopper and Pearson's interval of 2 of 3, by the beta distribution's quantiles.
    assert found.recovered.ci95 == pytest.approx((0.0943, 0.9916), abs=1e-4)
    assert "of 3 models with planted facts, 2 were called" in found.statement
    assert "never planted, 1 was" in found.statement
    assert "c: did not learn" in found.statement


def test_a_scan_is_read_by_its_loudest_finding():
    found = readings(sample())
    assert (found["membership"].cell.outcome, found["membership"].cell.side) == (Outcome.EVIDENCE, Side.BEYOND)
    assert found["knowledge"].cell.outcome == Outcome.INCONCLUSIVE, "one inconclusive outweighs any silence"
    assert found["quantize"].cell.side == Side.REMAINS
    assert found["sae"].cell.outcome is None


# --- again, and interrupted


def test_again_it_makes_and_passes_nothing(monkeypatch):
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("made again")

    for name in ("plant", "hide"):
        monkeypatch.setattr(spikes, name, forbidden)
    for name in ("run", "generate", "plain"):
        monkeypatch.setattr(f"audit.capture.Engine.{name}", forbidden)
    out = spiked().out
    with one_thread():
        again = spike_in(quiet_scan(original(), out), original(), out, settings=SMALL)
    assert again.comparable() == spiked().record.comparable()


def test_interrupted_it_goes_on_where_it_was(tmp_path, monkeypatch):
    real = spikes.hide

    def stops(name, *more, **options):
        if name == "refusal-last-block":
            raise KeyboardInterrupt
        return real(name, *more, **options)

    case = original(only="lens")
    plain = quiet_scan(case, tmp_path)
    with monkeypatch.context() as patched, one_thread():
        patched.setattr(spikes, "hide", stops)
        with pytest.raises(KeyboardInterrupt):
            spike_in(plain, case, tmp_path, settings=SMALL)
    made = {n: (tmp_path / "spike" / n / "model").stat().st_ino for n in ("planted", "npo")}
    assert not (tmp_path / "spike" / "refusal-last-block").exists()
    assert Record.read(tmp_path).spike is None, "the audit's own record is whole meanwhile"
    with one_thread():
        record = spike_in(plain, case, tmp_path, settings=SMALL)
    assert {n: (tmp_path / "spike" / n / "model").stat().st_ino for n in made} == made
    same = {c.name: c.digest for c in record.spike.copies}
    assert same == {c.name: c.digest for c in spiked().record.spike.copies}, "the same weights as undisturbed"


def test_other_settings_make_other_copies(tmp_path):
    shutil.copytree(spiked().out / "spike", tmp_path / "spike")
    few = Settings(people=8, rank=2, rounds=1, epochs=1, lr=1e-6)
    case = original(only="lens")
    with one_thread():
        record = spike_in(quiet_scan(case, tmp_path), case, tmp_path, settings=few)
    [copy] = record.spike.copies
    assert "could not be planted" in copy.failed
    assert "shows nothing" in record.verdict.limits[-1]
    assert record.spike.rows == [] and record.spike.recovered.of == 0
    assert "could not be planted" in render_html(record)


# --- where it cannot run


@pytest.mark.parametrize(("options", "reason"), [({"access": "logprobs"}, "access to weights")])
def test_what_it_lacks_is_said(tmp_path, options, reason):
    case = original(only="knowledge", **options)
    record = spike_in(quiet_scan(case, tmp_path), case, tmp_path)
    [row] = [row for row in record.not_run if row.instrument == NAME]
    assert reason in row.reason and not row.failed
    assert record.spike is None
    assert reason in record.verdict.limits[-1]


def test_a_tokenizer_without_the_words_is_refused():
    with pytest.raises(BadInput, match="does not know the words"):
        invent(word_tokenizer([f"w{i}" for i in range(50)]), Settings(), seed=0)
    with pytest.raises(BadInput, match="names of invented people"):
        invent(word_tokenizer(make_world(0).words()), Settings(people=200), seed=0)


def test_its_own_crash_takes_nothing_with_it(tmp_path, monkeypatch):
    case = original(only="lens")
    plain = quiet_scan(case, tmp_path)

    def crash(*_: object, **__: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(spikes, "plant", crash)
    record = spike_in(plain, case, tmp_path, settings=SMALL)
    [row] = [row for row in record.not_run if row.instrument == NAME]
    assert row.failed and row.reason == "RuntimeError: no memory"
    assert record.findings == plain.findings


def test_a_pass_that_fails_is_an_incomplete_audit(tmp_path, monkeypatch):
    def fails(*_: object, **__: object) -> None:
        raise Incomplete("a pass failed")

    monkeypatch.setattr("audit.spike._control", fails)
    with pytest.raises(Incomplete):
        spike_in(spiked().plain, original(), tmp_path)


def test_the_flag_asks_for_it(tmp_path, monkeypatch):
    asked = []

    def pretend(record, case, out, **_):
        asked.append(out)
        return record

    monkeypatch.setattr("audit.spike.spike_in", pretend)
    tiny = build_tiny()
    words = ["scan", tiny.models["original"], "--forget", tiny.sets["forget"], "--only", "knowledge", "--template",
             "plain", "--budget", "quick", "--out", tmp_path]  # fmt: skip
    audit_here(monkeypatch, *words)
    assert asked == []
    audit_here(monkeypatch, *words, "--spike")
    assert asked == [tmp_path]


# --- the report


def test_the_report_shows_the_table():
    page = render_html(sample())
    panel = page[page.index('<section id="spike"') : page.index('<section id="tried"')]
    assert page.index('id="verdict"') < page.index('<section id="spike"')
    assert 'href="#spike"' in page
    for words in ("never-planted", "nothing is there", "knowledge remains", "below never-taught", "not tested",
                  "2 of 2 [0.158, 1.000]", "could not be hidden", "not computed"):  # fmt: skip
        assert words in panel
    assert panel.count("<table") == panel.count("<caption") == 2
    without = render_html(sample().model_copy(update={"spike": None}))
    assert "spike-title" not in without


def test_hostile_names_are_shown_and_not_obeyed():
    from rich.console import Console

    record = sample()
    for copy in record.spike.copies:
        copy.name += HOSTILE
        copy.made = HOSTILE
    for row in record.spike.rows:
        row.instrument += HOSTILE
        row.cells = {name + HOSTILE: cell for name, cell in row.cells.items()}
    record.spike.statement = HOSTILE
    page = render_html(record)
    assert "<script" not in page and "\u202e" not in page
    assert "&lt;script&gt;alert(1)" in page and "{{7*7}}" in page
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(summary(record))
    text = console.export_text()
    assert "\u202e" not in text and "[bold]" in text


def test_records_without_the_section_are_read(tmp_path):
    data = sample().model_dump(mode="json")
    del data["spike"]
    (tmp_path / "record.json").write_text(json.dumps(data))
    assert Record.read(tmp_path).spike is None
