"""The contract, over every registered instrument; and what becomes of those that break it."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pytest
import torch
from worlds import audit_here, build_tiny, open_target, quiet_scan, small_case, tiny_case, tiny_evidence

from audit.capture import Engine
from audit.case import ROLES, SETS, Case, Options
from audit.errors import BadInput
from audit.instrument import GROUP, Access, Attack, Broken, Instrument, everyday, load, load_all, names, select
from audit.plan import AnyRequest, Generate, Patched, Request, Weights
from audit.quantities import Quantity
from audit.record import Control, Finding, Outcome, Question, Record, Side
from audit.target import Target

DEEP = {"weights-alone"}
"""Instruments that need more blocks than the tiny model has; `test_weights_alone.py` asks this of them."""

NAMED = sorted(set(names()) - set(everyday()))
"""Those that a scan leaves out, for they are dear or ask about a method; their own tests scan with them."""

EVERY = [name for name in names() if name not in DEEP and load(name).modality != "image"]
"""Those that read texts; of images, `test_image_instruments.py` asks the same."""

OWN = [name for name in EVERY if name not in NAMED]
"""Those in the scan of the tiny case."""

ALTER = {"trace", "patching", "cross-sequence", "sae"}
"""Instruments that alter a model, and are no attacks."""

ON_THE_ORIGINAL = {"trace", "patching", "hardness"}
"""Those that alter the original, or look into it, and not the target."""

ALTERING = {"quantize", "prune", "graft", "orthogonalize", "noise", "task-vector"}
"""Attacks that alter the retrained model too, as their control, and have nothing random in them."""

ON_BOTH = ALTERING | {"relearn-tiers", "soft-prompt"}
"""Attacks on target and retrained model."""

ASKING = {"rwku", "dynamic", "in-context", "sampling", "reasoning"}
"""Attacks that ask, and alter nothing."""


@pytest.fixture(params=OWN)
def instrument(request) -> Instrument:
    return load(request.param)


@pytest.fixture(params=EVERY)
def each(request) -> Instrument:
    return load(request.param)


@pytest.fixture(scope="module")
def case() -> Case:
    return tiny_case()


# --- what every instrument is


def test_the_issue_s_instruments_are_registered():
    assert set(OWN) >= {"knowledge", "memorization", "membership", "remind", "utility", "lens", "relearn"}
    assert sorted(EVERY) == EVERY
    assert [i.name for i in load_all()] == sorted(names(), key=lambda n: (list(Question).index(load(n).question), n))


def test_attributes(each):
    assert each.name in EVERY
    assert isinstance(each.question, Question)
    assert isinstance(each.access, Access)
    assert each.title
    assert len(each.title) < 60
    assert set(each.sets) <= set(SETS)
    assert isinstance(each.sets, tuple)
    assert set(each.roles) <= set(ROLES) - {"target"}
    assert isinstance(each.roles, tuple)
    assert any(character.isdigit() for character in each.reference), "a reference says which paper, or when"
    assert type(each).__doc__


def test_the_module_says_source_and_traps(each):
    words = importlib.import_module(type(each).__module__).__doc__ or ""
    assert "Source:" in words
    assert "Traps:" in words
    assert words.count("\n- ") >= 2, "traps are listed"


def test_an_attack_is_an_attack_and_nothing_else_alters():
    altering = {name for name in EVERY if isinstance(load(name), Attack)}
    attacks = {point.name for point in entry_points(group=GROUP) if point.value.startswith("attacks.")}
    assert altering - attacks <= ALTER
    assert (attacks & set(EVERY)) - altering == ASKING
    assert all(isinstance(load(name), Attack) for name in attacks - set(EVERY))


def test_missing_gives_a_reason_for_an_empty_case(each):
    empty = Case("empty", {"target": build_tiny().models["original"]}, {}, {}, Options(only=(each.name,)))
    reason = each.missing(empty)
    assert reason
    assert "\n" not in reason


def test_missing_says_nothing_against_the_full_case(each, case):
    assert each.missing(tiny_case(only=[each.name])) is None
    assert (each.missing(case) is None) == (each.name not in NAMED)


def test_what_is_dear_runs_at_budget_thorough_and_what_asks_about_a_method_does_not(each):
    reason = each.missing(tiny_case(budget="thorough"))
    assert (reason is None) == (not each.aside)
    if each.aside:
        assert reason.startswith(each.aside) and "--only" in reason


@pytest.mark.parametrize("access", list(Access))
def test_missing_respects_access(each, access):
    reason = each.missing(tiny_case(access=access.name.lower(), only=[each.name]))
    if (each.name, access) == ("remind", Access.LOGPROBS):  # of a folder; an endpoint's tokenizer may bring embeddings
        assert reason is not None and "embeddings" in reason
    else:
        assert (reason is None) == (each.access <= access)
    if reason:
        assert each.access.name.lower() in reason


def test_missing_names_a_set_it_cannot_do_without(each):
    for name in each.sets:
        without = tuple(s for s in ("forget", "retain", "holdout", "utility") if s != name)
        assert name in (each.missing(tiny_case(sets=without, only=[each.name])) or "")


# --- what every instrument asks


def request_key(request: AnyRequest) -> Any:
    if isinstance(request, Generate):
        return "generate", request.prompts, request.new_tokens, request.ways
    if isinstance(request, Weights):
        return "weights", request.against
    if isinstance(request, Patched):
        return "patched", request.sequences, request.source, request.sites
    return "score", request.sequences


@pytest.mark.parametrize("role", ROLES)
def test_requests(instrument, case, role):
    target = open_target("original", role)
    made = list(instrument.requests(case, target))
    assert all(isinstance(request, AnyRequest) for request in made)
    assert len({request.name for request in made}) == len(made), "every request has a purpose of its own"
    if role == "target":
        assert made
    for request in made:
        if isinstance(request, Request):
            assert request.quantities
            assert all(isinstance(quantity, Quantity) for quantity in request.quantities)
        elif isinstance(request, Weights):
            assert request.against in ROLES
        elif isinstance(request, Patched):
            assert request.source in ROLES
        else:
            assert request.prompts
            assert request.new_tokens > 0
    again = list(instrument.requests(case, target))
    assert [(r.name, request_key(r)) for r in again] == [(r.name, request_key(r)) for r in made]


def test_one_name_means_one_thing_whoever_asks(case):
    """Evidence is found by (role, name): two instruments that ask differently under one name would mix answers."""
    target = open_target("original", "target")
    meant: dict[str, Any] = {}
    for name in OWN:
        for request in load(name).requests(case, target):
            assert meant.setdefault(request.name, request_key(request)) == request_key(request), request.name


def test_one_quantity_name_means_one_thing(case):
    target = open_target("original", "target")
    meant: dict[str, tuple[str, ...]] = {}
    for name in OWN:
        for request in load(name).requests(case, target):
            for quantity in request.quantities if isinstance(request, Request) else ():
                assert meant.setdefault(quantity.name, quantity.sites) == quantity.sites


def test_an_attacked_model_is_asked_about_by_its_attack_alone(instrument, case):
    view = open_target("original").altered("someone@1", "recipe")
    if not isinstance(instrument, Attack):
        assert list(instrument.requests(case, view)) == []


def test_an_attack_s_stages_are_distinct_cheap_and_seeded(case):
    for name in OWN:
        attack = load(name)
        if isinstance(attack, Attack):
            target = open_target("original", "original" if name in ON_THE_ORIGINAL else "target")
            stages = attack.stages(case, target)
            assert target._model is None, "planning an attack loads no weights"
            assert len({stage.name for stage in stages}) == len({stage.recipe for stage in stages}) == len(stages) > 0
            seeded = attack.stages(tiny_case(seed=1), target)
            if name not in ALTERING:
                assert {s.recipe for s in seeded}.isdisjoint(s.recipe for s in stages)
            assert bool(attack.stages(case, open_target("original", "retrained"))) == (name in ON_BOTH)


# --- what every instrument finds


def comparable(findings: list[Finding]) -> list[str]:
    return [finding.model_dump_json() for finding in findings]


def test_measure_is_pure(instrument, case, monkeypatch):
    evidence = tiny_evidence()

    def touched(*_: object) -> None:
        raise AssertionError("measure touched a model")

    monkeypatch.setattr(Target, "model", property(touched))
    monkeypatch.setattr(Target, "__init__", touched)
    monkeypatch.setattr(Engine, "run", touched)
    torch.manual_seed(1)
    first = instrument.measure(case, evidence)
    torch.manual_seed(2)
    assert comparable(instrument.measure(case, evidence)) == comparable(first)
    assert instrument.examples(case, evidence) == instrument.examples(case, evidence)
    monkeypatch.undo()
    assert comparable(load(instrument.name).measure(case, evidence)) == comparable(first), "nor does it keep anything"


@cache
def measured(name: str) -> list[Finding]:
    """What an instrument finds in the tiny world; that it finds the same again is tested above."""
    return load(name).measure(tiny_case(), tiny_evidence())


def test_findings_carry_what_makes_them_findings(instrument):
    found = measured(instrument.name)
    assert found
    for finding in found:
        assert finding.id.startswith(f"{instrument.name}/")
        assert finding.instrument == instrument.name
        assert finding.question == instrument.question
        for text in (finding.statistic, finding.split, finding.orientation, finding.null, finding.reference):
            assert text.strip()
        lo, hi = finding.ci95
        if finding.estimate is None:
            assert lo is None or hi is None
        else:
            assert lo is not None
            assert hi is not None
            assert lo <= finding.estimate + 1e-9
            assert finding.estimate <= hi + 1e-9
        assert finding.n > 0
        assert finding.threshold > 0
        assert finding.p_value is None or 0 <= finding.p_value <= 1
        if finding.p_value is not None:
            assert finding.smallest_p is not None
            assert finding.smallest_p <= finding.p_value + 1e-12
        assert finding.controls, "a statistic without a control is no finding"
        assert any(c.gates == "silence" for c in finding.controls), "what could make its silence worthless?"
        assert all(c.description for c in finding.controls)
        assert all(c.passed is not None for c in finding.controls if c.gates), "a gate is open or shut"
        assert finding.verdict == Outcome.INCONCLUSIVE, "judging is not the instrument's business"
        assert finding.side == Side.NEITHER
        assert finding.p_adjusted is None
        assert all(math.isfinite(c.estimate) for c in finding.controls if c.estimate is not None)


def test_finding_ids_are_unique_across_instruments(case):
    ids = [finding.id for name in OWN for finding in measured(name)]
    assert len(ids) == len(set(ids))


def test_drill_down_is_about_forget_rows(instrument, case):
    drill = instrument.examples(case, tiny_evidence())
    assert set(drill) <= {row.id for row in case.rows("forget")}
    json.dumps(drill, allow_nan=False)


# --- third parties


class Toy(Instrument):
    """Counts tokens: a third party's instrument, complete."""

    name = "toy"
    title = "Are the answers long?"
    question = Question.TRACE
    reference = "nobody 2024"

    def requests(self, case, target):
        return [Request("toy/forget", tuple(target.encode(r.prompt, r.answer) for r in case.rows("forget")))]

    def measure(self, case, evidence):
        lengths = [tokens.scored for tokens in evidence.sequences("target", "toy/forget")]
        return [
            Finding(
                id="toy/length", instrument="toy", question=self.question, statistic="tokens of an answer",
                split="forget", estimate=sum(lengths) / len(lengths), ci95=(0, 10), n=len(lengths), threshold=20,
                orientation="longer", null="none", reference=self.reference,
                controls=[Control(name="c", description="none", passed=True, gates="silence")],
            )
        ]  # fmt: skip


class Crashes(Toy):
    name = "crashes"

    def measure(self, case, evidence):
        raise ZeroDivisionError("no one divides\nby zero")


class AsksWrongly(Toy):
    name = "asks-wrongly"

    def requests(self, case, target):
        raise KeyError("answer")


class Clashes(Toy):
    name = "clashes"

    def requests(self, case, target):
        return [Request("forget/answer", tuple(target.encode("", row.prompt) for row in case.rows("forget")))]

    def measure(self, case, evidence):
        return []


class Declines(Toy):
    name = "declines"

    def measure(self, case, evidence):
        raise BadInput("too few rows to say anything")


class CannotSay(Toy):
    name = "cannot-say"

    def missing(self, case):
        raise AttributeError("no such thing")


class NoFinding(Toy):
    name = "no-finding"

    def measure(self, case, evidence):
        return [None]


class InAnothersName(Toy):
    name = "in-anothers-name"  # but its findings are the toy's


class Twice(Toy):
    name = "twice"

    def measure(self, case, evidence):
        [found] = super().measure(case, evidence)
        return [found.model_copy(update={"id": "twice/length", "instrument": "twice"})] * 2


class OddExamples(Twice):
    name = "odd-examples"

    def measure(self, case, evidence):
        return []

    def examples(self, case, evidence):
        return {"forget-0": {"generated": "x", "score": [1.0]}}


class Unasked(Toy):
    name = "unasked"
    question = "leakage"


class CallsItselfOther(Toy):
    name = "other"


class Unfinished(Instrument):
    name = "unfinished"


class NoInstrument:
    name = "no-instrument"


@pytest.fixture
def registered(monkeypatch) -> Callable[..., None]:
    """Register third-party instruments by `name=attribute of this module` beside the project's own."""

    def register(*pairs: tuple[str, str], own: bool = True) -> None:
        points = list(entry_points(group=GROUP)) if own else []
        points += [EntryPoint(name, value if ":" in value else f"{__name__}:{value}", GROUP) for name, value in pairs]
        monkeypatch.setattr("audit.instrument.entry_points", lambda group: points if group == GROUP else [])

    return register


def scan_words(out: object, *more: object) -> list[object]:
    tiny = build_tiny()
    return ["scan", tiny.models["original"], "--forget", tiny.sets["forget"], "--holdout", tiny.sets["holdout"],
            "--out", out, "--budget", "quick", "--template", "plain", *more]  # fmt: skip


def test_a_third_party_s_instrument_is_listed_and_scanned_with(registered, monkeypatch, tmp_path, capsys):
    registered(("toy", "Toy"))
    assert "toy" in names()
    assert audit_here(monkeypatch, "list", "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["toy"] == {
        "name": "toy", "kind": "instrument", "title": "Are the answers long?", "question": "trace",
        "access": "logprobs", "sets": ["forget"], "roles": [], "reference": "nobody 2024",
    }  # fmt: skip
    assert rows["relearn"]["kind"] == "attack"
    assert audit_here(monkeypatch, *scan_words(tmp_path, "--only", "toy")) == 0
    record = Record.read(tmp_path)
    [found] = record.findings
    assert (found.id, found.estimate, found.verdict) == ("toy/length", 1.0, Outcome.NONE)
    assert record.not_run == []
    assert "toy" in record.cost.by_instrument


def test_what_breaks_becomes_rows_and_exit_4(registered, monkeypatch, tmp_path, capsys):
    registered(
        ("toy", "Toy"), ("crashes", "Crashes"), ("asks-wrongly", "AsksWrongly"), ("declines", "Declines"),
        ("absent", "nowhere_to_be_found:X"), ("other-name", "CallsItselfOther"), ("unfinished", "Unfinished"),
        ("no-instrument", "NoInstrument"), ("cannot-say", "CannotSay"), ("no-finding", "NoFinding"), ("twice", "Twice"),
        ("in-anothers-name", "InAnothersName"), ("odd-examples", "OddExamples"), ("unasked", "Unasked"), own=False,
    )  # fmt: skip
    assert audit_here(monkeypatch, *scan_words(tmp_path, "--fail-on", "never")) == 4
    record = Record.read(tmp_path)
    assert [finding.id for finding in record.findings] == ["toy/length"], "the others' findings are not lost"
    rows = {row.instrument: row for row in record.not_run}
    failed = {"crashes", "asks-wrongly", "absent", "other-name", "unfinished", "no-instrument", "cannot-say"}
    failed |= {"no-finding", "twice", "in-anothers-name", "odd-examples", "unasked"}
    assert {name for name, row in rows.items() if row.failed} == failed
    assert set(rows) == failed | {"declines"}
    assert "too few rows" in rows["declines"].reason
    assert "ZeroDivisionError" in rows["crashes"].reason
    assert "KeyError" in rows["asks-wrongly"].reason
    assert "ModuleNotFoundError" in rows["absent"].reason
    assert "'other'" in rows["other-name"].reason
    assert "unfinished" in rows["unfinished"].reason.lower()
    assert "no Instrument" in rows["no-instrument"].reason
    assert "NoneType" in rows["no-finding"].reason
    assert "'toy/length' of 'toy'" in rows["in-anothers-name"].reason
    assert "two findings" in rows["twice"].reason
    assert "list" in rows["odd-examples"].reason
    assert "must be a `Question`" in rows["unasked"].reason
    assert rows["crashes"].question == Question.TRACE
    assert record.verdict.label.value == "inconclusive"
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("audit: incomplete: ")
    assert all(name in said for name in failed)
    assert audit_here(monkeypatch, "list") == 0
    assert "broken" in capsys.readouterr().out


def test_a_broken_instrument_asked_for_by_name_is_bad_input(registered):
    registered(("absent", "nowhere_to_be_found:X"), ("other-name", "CallsItselfOther"))
    with pytest.raises(BadInput, match="nowhere_to_be_found"):
        load("absent")
    with pytest.raises(BadInput, match="calls itself 'other'"):
        select(["other-name"], [])
    broken = [item for item in load_all() if isinstance(item, Broken)]
    assert [item.name for item in broken] == ["absent", "other-name"]
    assert all(isinstance(item, Instrument) for item in load_all()[: -len(broken)]), "broken ones come last"


@pytest.mark.parametrize("first", ["clashes", "memorization"])
def test_a_request_under_another_s_name_never_changes_the_other_s_findings(registered, tmp_path, first):
    alone = quiet_scan(small_case(), tmp_path / "alone")
    registered(("clashes", "Clashes"))
    order = {"clashes": "clashes,memorization", "memorization": "memorization,clashes"}[first]
    beside = quiet_scan(small_case(only=order), tmp_path / "beside")
    assert {row.instrument for row in beside.not_run if row.failed} == {"clashes"}, "a third party's comes last"
    kept = {f.id: f for f in beside.findings}
    assert [kept[f.id].estimate for f in alone.findings] == [f.estimate for f in alone.findings]


def test_the_project_s_instruments_keep_their_names(registered):
    registered(("lens", "Toy"), ("toy", "Toy"), ("toy", "Crashes"))
    assert type(load("lens")).__module__ == "probes.lens"
    assert isinstance(load("toy"), Toy)
    taken = {item.name: item.reason for item in load_all() if isinstance(item, Broken)}
    assert set(taken) == {"unknown package:lens", "unknown package:toy"}
    assert all("takes the name of another instrument" in reason for reason in taken.values())
    assert "unknown package:lens" in names()
    assert "unknown package:lens" not in [item.name for item in select([], ["unknown package:lens"])]


def test_one_instrument_registered_twice_is_one(registered):
    registered(("toy", "Toy"), ("toy", "Toy"))
    assert names().count("toy") == 1


@pytest.mark.parametrize(("wrong", "right"), [("lense", "lens"), ("relern", "relearn"), ("remid", "remind")])
def test_an_unknown_name_is_bad_input_with_a_hint(wrong, right):
    for ask in (lambda: load(wrong), lambda: select([wrong], []), lambda: select([], [wrong])):
        with pytest.raises(BadInput, match=f"did you mean '{right}'"):
            ask()
    with pytest.raises(BadInput, match="no instrument named 'zzzz' "):
        load("zzzz")


def test_select(registered):
    assert [i.name for i in select([], [])] == [i.name for i in load_all()]
    assert [i.name for i in select(["lens", "knowledge"], [])] == ["lens", "knowledge"]
    assert [i.name for i in select(["lens", "knowledge"], ["lens"])] == ["knowledge"]
    registered(("absent", "nowhere_to_be_found:X"))
    assert "absent" not in [i.name for i in select([], ["absent"])], "a broken one can be skipped"


def test_an_instrument_that_lacks_an_input_is_a_row_that_did_not_fail(tmp_path):
    record = quiet_scan(small_case(only="memorization,utility"), tmp_path)
    assert [(row.instrument, row.failed) for row in record.not_run] == [("utility", False)]
    assert "original" in record.not_run[0].reason
