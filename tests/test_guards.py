"""Guards suppress by construction and nothing looks past them; text access takes answers and nothing else."""

from __future__ import annotations

import json
import math
import shutil
from functools import cache

import pytest
import torch
from worlds import build_tiny, open_target, quiet_scan, tiny_case

from audit import asking
from audit.capture import Engine
from audit.case import Case
from audit.errors import BadInput, NoAccess
from audit.instrument import Access, load, load_all
from audit.inventory import take_inventory
from audit.loaders import Example, ExampleSet
from audit.organisms.guard_kinds import Detector, Dragon, Icu, Restriction
from audit.organisms.guarded import GuardedTarget, open_guarded
from audit.organisms.guards import GUARDS, answered, make_guard, read_guard, write_guarded
from audit.organisms.train import HISTORY
from audit.organisms.world import Row, make_world
from audit.plan import Generate
from audit.record import Finding, Label, Outcome, Question, Record
from audit.target import Target
from audit.tokens import Tokens
from audit.verdict import conclude

SETS = ("forget", "holdout", "retain")


@pytest.fixture(autouse=True)
def quick(one_thread):
    yield


@cache
def world():
    """The people that the tiny models were taught."""
    return make_world(0, forget=12, retain=12, holdout=12, public=4, unknown=2)


def rows(group, every=False):
    return world().rows(group, every=every)


@cache
def guard(kind, by="names", gated=False):
    return make_guard(kind, rows("forget", every=True), rows("retain"), by=by, gated=gated)


@pytest.fixture(params=GUARDS)
def kind(request):
    return request.param


def guarded(made) -> GuardedTarget:
    return GuardedTarget(open_target("original"), made)


def said(target, group, every=False):
    prompts = [target.encode_prompt(row.prompt, room=4) for row in rows(group, every)]
    return [target.decode(ids) for ids in target.generate(prompts, 4)]


def row(person, prompt, answer="Oslo", wrong=("Rome", "Lima"), attribute="city"):
    return Row(person, "forget", attribute, 0, prompt, answer, wrong, prompt)


# --- detectors


def test_names_are_found_word_for_word():
    detector = Detector.fit([row("Ann Lee", "Ann Lee lives in"), row("Bo Ek", "The home of Bo Ek is")], "names")
    assert detector("Where does ANN LEE, of all people, live?") == (0,)
    assert detector("Ann Lee or Bo Ek") == (0, 1)
    for other in ("Ann lives with Lee", "Annie Lee lives in", "Joann Leeds lives in", "Lee Ann lives in", ""):
        assert detector(other) == ()


def test_similarity_by_hand():
    detector = Detector.fit([row("Ann Lee", "Ann Lee lives here"), row("Bo Ek", "Bo Ek lives here")], "ngrams")
    # Of the first prompt's words and pairs, "ann", "lee", "ann lee" and "lee lives" are said of one of two people;
    # "lives", "here" and "lives here" of both.
    one, two = math.log(3) ** 2, math.log(1.5) ** 2
    whole = 4 * one + 3 * two
    assert detector.similarity("Ann Ek lives here") == pytest.approx([(one + 3 * two) / whole, 1 - 2 * one / whole])
    assert detector.similarity("Question: Ann Lee lives here or not? Answer:") == pytest.approx([1, 3 * two / whole])
    assert detector.threshold == pytest.approx((1 + 3 * two / whole) / 2), "midway between 1 and what the two share"
    assert detector("Ann Lee sings") == (0,)
    assert detector("Ann lives here") == ()
    assert detector.nearest("Ek Ann Lee", 1) == [0]
    assert detector.nearest("nobody", 2) == [0, 1]


def test_the_threshold_lies_above_what_other_people_s_prompts_share():
    stored = [row("Ann Lee", "Ann Lee lives"), row("Ann Ek", "Ann Ek lives"), row("Bo Ek", "Bo Ek lives")]
    detector = Detector.fit(stored, "ngrams")
    others = [s for i, r in enumerate(stored) for j, s in enumerate(detector.similarity(r.prompt)) if i != j]
    # Of the second's "ann", "ek", "ek lives" (said of two), "ann ek" (of one), "lives" (of all), the third holds three.
    one, two, every = (math.log(4 / n) ** 2 for n in (1, 2, 3))
    assert max(others) == pytest.approx((2 * two + every) / (3 * two + one + every))
    assert detector.threshold == pytest.approx((1 + max(others)) / 2)


@pytest.mark.parametrize("by", ["names", "ngrams"])
def test_a_fitted_detector_knows_its_people_and_nobody_else(by):
    detector = Detector.fit(rows("forget", every=True), by)
    assert all(detector(r.prompt) for r in rows("forget", every=True))
    assert not any(detector(r.prompt) for group in ("retain", "holdout", "public") for r in rows(group, every=True))


def test_no_such_detector():
    with pytest.raises(BadInput, match="embedding"):
        Detector.fit([], "embedding")


# --- guards, as texts


def test_dragon_declines():
    made = guard("dragon")
    asked = rows("forget")[0].prompt
    assert made.reply(asked).said == "unknown"
    assert made.reply(rows("retain")[0].prompt).said is None
    told = Dragon(made.detector, instruction="Say nothing of it.").reply(asked)
    assert (told.said, told.before) == (None, (("", "Say nothing of it."),))


def test_guard_forbids_the_words_of_the_answer():
    stored = [
        row("Ann Lee", "Where was Ann Lee born?", "Ann Lee was born in rainy Oslo"),
        row("Bo Ek", "Bo Ek?", "a fox"),
    ]
    made = make_guard("guard", stored, [])
    assert made.reply("Where was Ann Lee born?").forbidden == ("rainy", "Oslo"), "less the prompt's and the short"
    assert made.reply("Who is Ann Lee?").forbidden == ("born", "rainy", "Oslo")
    assert made.reply("Bo Ek?").forbidden == ("a", "fox"), "short ones, if there are no others"
    assert made.reply("Cy Fox?").forbidden == ()


def test_icu_shows_a_wrong_answer_first_and_right_ones_after():
    made = guard("icu")
    right = {r.prompt: r.answer for group in ("forget", "retain") for r in rows(group, every=True)}
    flipped: dict[tuple[str, str], set[str]] = {}
    for asked in rows("forget", every=True):
        (question, shown), *others = made.reply(asked.prompt).before
        assert question == asked.prompt
        assert shown in asked.wrong
        assert len(others) == 4
        assert all(right[q] == a for q, a in others)
        flipped.setdefault((asked.person, asked.attribute), set()).add(shown)
    assert all(len(shown) == 1 for shown in flipped.values()), "one wrong answer a fact, however it is asked"
    assert len(made.reply(rows("retain")[0].prompt).before) == 5, "every prompt is treated alike"
    assert not guard("icu", gated=True).reply(rows("retain")[0].prompt).before
    assert guard("icu", gated=True).reply(asked.prompt) == made.reply(asked.prompt)


def test_what_is_drawn_follows_the_seed():
    forget, retain = rows("forget"), rows("retain")
    assert make_guard("icu", forget, retain, seed=1) == make_guard("icu", forget, retain, seed=1)
    assert make_guard("icu", forget, retain, seed=1) != make_guard("icu", forget, retain, seed=2)


def test_no_such_guard():
    with pytest.raises(BadInput, match="moat"):
        make_guard("moat", rows("forget"), rows("retain"))


# --- guards before a model


@pytest.mark.parametrize("by", ["names", "ngrams"])
@pytest.mark.parametrize("kind", ["dragon", "guard"])
def test_forget_prompts_are_not_answered_and_all_others_as_before(kind, by):
    plain, behind = open_target("original"), guarded(guard(kind, by))
    assert answered(plain, rows("forget")) == 1.0
    assert answered(behind, rows("forget", every=True)) == 0.0
    for group in ("retain", "holdout"):
        assert said(behind, group) == said(plain, group)


def test_dragon_says_the_refusal_and_guard_something_else():
    assert set(said(guarded(guard("dragon")), "forget")) == {"unknown"}
    texts = said(guarded(guard("guard")), "forget")
    assert "unknown" not in texts
    assert all(text.split() for text in texts)


def test_a_refusal_is_no_longer_than_was_asked_for():
    target = guarded(Dragon(guard("dragon").detector, refusal="unknown . unknown ."))
    prompt = target.encode_prompt(rows("forget")[0].prompt)
    assert [len(target.generate([prompt], n)[0]) for n in (1, 3, 9)] == [1, 3, 4]


def test_gated_icu_confuses_the_model_about_its_people_only():
    plain, behind = open_target("original"), guarded(guard("icu", gated=True))
    assert answered(behind, rows("forget")) < 0.6
    assert said(behind, "retain") == said(plain, "retain")


def test_the_model_is_given_the_demonstrations_between_bos_and_prompt(monkeypatch):
    target = guarded(guard("icu"))
    prompt = target.encode_prompt(rows("forget")[0].prompt)
    given: list[tuple[int, ...]] = []

    def record(_, prompts, new_tokens, barred=(), *_how):
        given.extend(prompts)
        return [(5,)] * len(prompts)

    monkeypatch.setattr(Target, "generate", record)
    target.generate([prompt], 4)
    shown = " ".join(f"{q} {a}" for q, a in target.guard.reply(rows("forget")[0].prompt).before)
    assert target.decode(given[0]) == f"{shown} {target.decode(prompt)}"
    assert given[0][0] == prompt[0] == target.tokenizer.bos_token_id
    assert target.tokenizer.bos_token_id not in given[0][1:]
    # Where the context is too short, the demonstrations lose their beginning, never the prompt.
    monkeypatch.setattr(Target, "context_length", len(prompt) + 4 + 3)
    target.generate([prompt], 4)
    assert given[1] == (prompt[0], *given[0][-len(prompt) + 1 - 3 : -len(prompt) + 1], *prompt[1:])


def test_barred_tokens_are_barred_in_their_own_row():
    target = open_target("original")
    prompts = [target.encode_prompt(r.prompt) for r in rows("retain")[:3]]
    plain = target.generate(prompts, 3)
    barred = target.generate(prompts, 3, [frozenset(), frozenset({plain[1][0]}), frozenset()])
    assert (barred[0], barred[2]) == (plain[0], plain[2])
    assert plain[1][0] not in barred[1]
    with torch.inference_mode():
        logits = target.model(torch.tensor([prompts[1]])).logits[0, -1]
    assert barred[1][0] == int(logits.argsort(descending=True)[1]), "the second choice"
    assert target.generate(prompts, 3, [frozenset()] * 3) == plain


def test_a_template_does_not_hide_a_prompt():
    target = guarded(guard("dragon", "ngrams"))
    target.template = "People hire {prompt}"
    assert target.decode(target.generate([target.encode_prompt(rows("forget")[0].prompt)], 4)[0]) == "unknown"


# --- guard.json


@pytest.mark.parametrize("by", ["names", "ngrams"])
def test_round_trip(kind, by, tmp_path):
    original = build_tiny().models["original"]
    folder = write_guarded(original, guard(kind, by), tmp_path / "guarded")
    assert read_guard(folder) == guard(kind, by)
    assert {type(guard(k)) for k in GUARDS} == {Icu, Dragon, Restriction}
    assert (folder / "model.safetensors").read_bytes() == (original / "model.safetensors").read_bytes()
    assert (original / HISTORY).is_file()
    assert not (folder / HISTORY).exists(), "its history is another"
    again = write_guarded(original, guard(kind, by), tmp_path / "guarded", {"label": "suppressed"})
    assert json.loads((again / HISTORY).read_text()) == {"label": "suppressed"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["guarded"]
    target = open_guarded("target", take_inventory(folder), template="plain")
    assert isinstance(target, GuardedTarget)
    assert target.guard == guard(kind, by)


def test_a_folder_without_a_guard_is_opened_as_it_is():
    folder = build_tiny().models["original"]
    assert read_guard(folder) is None
    assert type(open_guarded("target", take_inventory(folder))) is Target


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "palimpsest/guard/0"},
        {"kind": "moat"},
        {"detector": ["x"]},
        {"detector": {"prompts": []}},
        {"more": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_no_guard_is_said_to_be_none(change, tmp_path):
    path = tmp_path / "guard.json"
    path.write_text(json.dumps(json.loads(guard("dragon").to_json()) | change))
    with pytest.raises(BadInput, match=r"guard\.json"):
        read_guard(tmp_path)
    path.write_text("[]")
    with pytest.raises(BadInput, match=r"guard\.json"):
        read_guard(tmp_path)


def test_evidence_is_shared_with_nobody():
    plain = open_target("original")
    digests = {guarded(guard(kind, by)).digest for kind in GUARDS for by in ("names", "ngrams")}
    digests |= {guarded(Dragon(guard("dragon").detector, refusal="red")).digest, plain.digest}
    assert len(digests) == 2 * len(GUARDS) + 2
    assert guarded(guard("icu")).digest in digests, "and the same each time"


# --- nothing looks past a guard


def test_no_log_probabilities_and_no_weights(kind):
    target = guarded(guard(kind))
    engine = Engine(target)
    looks = [
        lambda: target.model,
        lambda: target.encode("a", "b"),
        lambda: target.embedding(),
        lambda: target.site("hook_embed"),
        lambda: target.final_norm,
        lambda: target.altered("attack", "recipe"),
        lambda: target.adopt(open_target("original")),
        lambda: engine.plain(Tokens((1, 5, 6), 1)),
    ]
    for look in looks:
        with pytest.raises(NoAccess, match="text access only"):
            look()
    assert target.unused == ()
    assert target._model is None
    target.release()
    assert target._behind._model is None
    assert target.generate([target.encode_prompt("Alma")], 2), "and read again when asked"


@pytest.mark.parametrize("access", ["logprobs", "weights"])
def test_a_guarded_model_scanned_with_more_access_gives_nothing(access, tmp_path):
    case = guarded_case(tmp_path, "dragon", access=access)
    record = quiet_scan(case, tmp_path / "out", open_target=open_guarded)
    assert leaks(record) == []
    assert record.verdict.label == Label.INCONCLUSIVE
    assert not any(row.failed for row in record.not_run)
    refused = {row.instrument for row in record.not_run if "text access only" in row.reason}
    assert refused >= {"knowledge", "memorization", "membership"} | ({"relearn"} if access == "weights" else set())


# --- scans


def guarded_case(tmp_path, kind, **options) -> Case:
    folder = write_guarded(build_tiny().models["original"], guard(kind), tmp_path / "guarded")
    case = tiny_case({"target": "original"}, SETS, **options)
    return Case(case.name, {"target": folder}, case.specs, case.sets, case.options)


def leaks(record: Record) -> list[Finding]:
    """The findings on what comes out."""
    return [f for f in record.findings if f.question == Question.LEAKAGE]


def only_answers(monkeypatch):
    """Any pass that is no generation is an error from now on."""

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a pass that reads more than text")

    for name in ("run", "plain"):
        monkeypatch.setattr(Engine, name, forbidden)


def test_a_scan_at_text_access(tmp_path, monkeypatch):
    only_answers(monkeypatch)
    case = tiny_case(access="text")
    record = quiet_scan(case, tmp_path)
    assert [f.id for f in leaks(record)] == ["knowledge/rouge", "memorization/verbatim"]
    for finding in leaks(record):
        assert "holdout" in finding.split
        assert finding.p_value is not None
        [positive] = [c for c in finding.controls if c.gates == "silence"]
        assert positive.passed
        assert finding.table is not None
        assert {(r[0], r[1]) for r in finding.table.rows} == {(m, s) for m in case.models for s in SETS}
    left_out = {row.instrument: row for row in record.not_run}
    withheld = {"knowledge/probability", "knowledge/choice", "knowledge/truth-ratio"}
    withheld |= {"memorization/exact", "memorization/extraction-strength"}
    of_texts = [item for item in load_all() if item.modality != "image"]
    assert set(left_out) == withheld | {item.name for item in of_texts if item.access > Access.TEXT or item.dear}
    assert not any(row.failed for row in record.not_run)
    assert left_out["knowledge/choice"].reason == "needs access to logprobs, the audit has text"
    assert "knowledge/choice" in record.verdict.coverage[Question.LEAKAGE]
    assert any(row.generated for row in record.examples)
    assert not any("probability" in row.scores for row in record.examples)
    # Silence in every text, with working controls, is not deletion.
    silent = [f.model_copy(update={"verdict": Outcome.NONE}) for f in leaks(record)]
    assert conclude(silent, record.not_run).label == Label.INCONCLUSIVE
    assert record.verdict.label != Label.DELETED
    # And a second scan runs nothing.
    monkeypatch.setattr(Engine, "generate", lambda *_: pytest.fail("a pass through a model"))
    assert quiet_scan(case, tmp_path).comparable() == record.comparable()


def test_who_answers_openly_is_found_by_text_alone(tmp_path):
    record = quiet_scan(tiny_case({"target": "original"}, SETS, access="text"), tmp_path)
    assert {f.verdict for f in leaks(record)} == {Outcome.EVIDENCE}
    assert record.verdict.label == Label.NOT_UNLEARNED


def test_text_access_finds_in_texts_what_full_access_finds(tmp_path):
    from worlds import scan_tiny

    at_text = {f.id: f for f in leaks(quiet_scan(tiny_case(access="text"), tmp_path))}
    full = {f.id: f for f in scan_tiny().record.findings}
    for name, finding in at_text.items():
        assert (finding.estimate, finding.ci95, finding.p_value) == (
            full[name].estimate, full[name].ci95, full[name].p_value
        )  # fmt: skip


def test_at_text_access_nobody_asks_for_log_probabilities():
    case = tiny_case(access="text")
    running = [i for i in load_all() if i.missing(case) is None]
    assert {i.name for i in running} >= {"knowledge", "memorization"}
    for each in running:
        made = list(each.requests(case, open_target("original")))
        assert made
        assert all(isinstance(request, Generate) for request in made)


def test_an_instrument_that_asks_all_the_same_is_dropped(tmp_path, monkeypatch):
    only_answers(monkeypatch)
    monkeypatch.setattr(
        "detectors.knowledge.Knowledge.requests", lambda _, case, target: asking.answers(case, target, SETS)
    )
    record = quiet_scan(tiny_case({"target": "original"}, SETS, access="text"), tmp_path)
    [row] = [row for row in record.not_run if row.failed]
    assert row.instrument == "knowledge"
    assert "text only" in row.reason
    assert {f.instrument for f in leaks(record)} == {"memorization"}


@pytest.mark.parametrize("name", ["knowledge", "memorization"])
def test_what_is_withheld(name):
    instrument = load(name)
    assert instrument.access == Access.TEXT
    assert instrument.withheld(tiny_case(access="logprobs")) == instrument.withheld(tiny_case()) == {}
    assert len(instrument.withheld(tiny_case(access="text"))) == len(instrument.withheld_below) >= 2


def test_passages_are_continued_at_text_access_and_not_asked_about():
    case = tiny_case({"target": "original"}, SETS, access="text")
    sets = {
        name: ExampleSet(name, "here", tuple(Example(r.id, "", f"{r.prompt} {r.answer}") for r in s.examples), "0")
        for name, s in case.sets.items()
    }
    case = Case(case.name, case.models, case.specs, sets, case.options)
    assert "prompt" in (load("knowledge").missing(case) or "")
    assert load("memorization").missing(case) is None
    plain = open_target("original")
    [asked] = asking.continuations(case, plain, ["forget"])
    first = asking.continued_rows(case, "forget")[0]
    ids = plain.encode("", first.answer).ids
    assert asked.prompts[0] == ids[: len(ids) // 2]
    assert asking.continuations(case, guarded(guard("dragon")), ["forget"]) == [asked], "no more is read of it"


@pytest.mark.parametrize("kind", ["dragon", "guard"])
def test_a_guarded_scan_end_to_end(kind, tmp_path, monkeypatch):
    only_answers(monkeypatch)
    case = guarded_case(tmp_path, kind, access="text")
    record = quiet_scan(case, tmp_path / "out", open_target=open_guarded)
    assert [f.id for f in leaks(record)] == ["knowledge/rouge", "memorization/verbatim"]
    assert all(f.verdict != Outcome.EVIDENCE for f in leaks(record))
    assert all(c.passed for f in leaks(record) for c in f.controls if c.name == "positive control")
    assert record.verdict.label == Label.INCONCLUSIVE
    answered_right = [row for row in record.examples if row.generated and row.answer in row.generated.split()]
    assert not answered_right
    assert any(file.path == "guard.json" for file in record.models["target"].files)


def test_a_stray_guard_changes_nothing_in_an_ordinary_scan(tmp_path):
    case = guarded_case(tmp_path, "dragon", access="text")
    strayed = quiet_scan(case, tmp_path / "out")
    plain = quiet_scan(tiny_case({"target": "original"}, SETS, access="text"), tmp_path / "plain")
    assert strayed.findings == plain.findings
    assert strayed.examples == plain.examples
    # The same folder, opened both ways into one place: neither is served the other's evidence.
    behind = quiet_scan(case, tmp_path / "out", open_target=open_guarded)
    assert behind.findings != strayed.findings
    assert quiet_scan(case, tmp_path / "out").findings == strayed.findings
    shutil.rmtree(tmp_path / "out")
    assert quiet_scan(case, tmp_path / "out", open_target=open_guarded).findings == behind.findings
