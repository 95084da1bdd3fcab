"""The case: `case.toml` read and written back, everything wrong in it named, rows drawn by whole entities."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audit.case import ROLES, SETS, Budget, Case, Options, read_case
from audit.errors import BadInput, Refused
from audit.instrument import Access
from audit.inventory import take_inventory
from audit.loaders import Example, ExampleSet, SetSpec


def write_set(path: Path, rows: int = 6, **more) -> Path:
    lines = [
        {"question": f"What is {path.stem} {i}?", "answer": f"It is {i}.", "author": f"A{i // 2}", "split": "ab"[i % 2]}
        for i in range(rows)
    ]
    path.write_text("".join(json.dumps(line | more) + "\n" for line in lines), encoding="utf-8")
    return path


def write_case(folder: Path, text: str) -> Path:
    path = folder / "case.toml"
    path.write_text(text, encoding="utf-8")
    return path


def built(path: Path) -> Case:
    name, models, specs, raw = read_case(path)
    return Case.build(models, specs, Options.parse(raw, str(path)), name)


# --- reading


def test_a_case_as_documented(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("forget", "retain"):
        write_set(tmp_path / "data" / f"{name}.jsonl")
    path = write_case(
        tmp_path,
        """
        name = "my audit"
        [models]
        target = "models/unlearned"
        original = "/somewhere/original"
        [sets]
        forget = "data/forget.jsonl?split=a&limit=2"
        retain = { path = "data/retain.jsonl", columns = { prompt = "question", answer = "answer" }, limit = 4 }
        [options]
        seed = 7
        budget = "quick"
        access = "logprobs"
        only = ["knowledge", "lens"]
        skip = "relearn,utility"
        """,
    )
    case = built(path)
    assert case.name == "my audit"
    assert dict(case.models) == {"target": tmp_path / "models/unlearned", "original": Path("/somewhere/original")}
    assert case.specs["forget"] == SetSpec(tmp_path / "data/forget.jsonl", where={"split": "a"}, limit=2)
    assert [row.answer for row in case.sets["forget"]] == ["It is 0.", "It is 2."]
    assert len(case.sets["retain"]) == 4
    assert case.options == Options(
        seed=7,
        budget=Budget.QUICK,
        access=Access.LOGPROBS,
        only=("knowledge", "lens"),
        skip=("relearn", "utility"),
    )


def test_an_empty_case_is_no_case_yet(tmp_path):
    assert read_case(write_case(tmp_path, "")) == ("", {}, {}, {})
    assert Options.parse({}, "x") == Options()


def test_models_and_sets_come_in_the_documented_order_and_overlaps_are_noted(tmp_path):
    rows = write_set(tmp_path / "same.jsonl")
    specs = {name: SetSpec(rows) for name in reversed(SETS)}
    models = {role: tmp_path / role for role in reversed(ROLES)}
    case = Case.build(models, specs, Options())
    assert tuple(case.models) == ROLES
    assert tuple(case.sets) == SETS
    assert case.name == "target"
    assert "6 rows of forget also in retain" in case.notes


# --- writing back


AWKWARD = 'quote " back \\ line \n tab \t nul \x00 del \x7f sep \u2028 \U0001f600 é \ufeff # [x] = {prompt}'


def round_trip(case: Case, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    again = built(write_case(folder, case.to_toml()))  # another folder: what is written is absolute
    assert again.name == case.name
    assert again.options == case.options
    assert {k: p.resolve() for k, p in case.models.items()} == dict(again.models)
    assert {k: s.digest for k, s in again.sets.items()} == {k: s.digest for k, s in case.sets.items()}
    assert again.to_toml() == case.to_toml()


def test_a_resolved_case_reads_as_the_same_case(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_set(tmp_path / "a b.jsonl", rows=8)
    write_set(tmp_path / "c.jsonl", rows=8, **{"q.1": "x"})
    (tmp_path / "words.txt").write_text("one two three four five six seven eight", encoding="utf-8")
    specs = {
        "forget": SetSpec(Path("a b.jsonl"), where={"split": ["a", "b"], "author": "A1"}, limit=2),
        "retain": SetSpec(Path("c.jsonl"), columns={"prompt": "q.1", "answer": "answer"}, offset=3),
        "utility": SetSpec(Path("words.txt"), passage_words=3),
    }
    options = Options(
        seed=3,
        budget=Budget.THOROUGH,
        access=Access.TEXT,
        template=AWKWARD,
        device="cpu",
        dtype="bfloat16",
        only=("lens",),
        skip=("a", "b"),
    )
    case = Case.build({"target": Path("m"), "retrained": Path("../r")}, specs, options, AWKWARD)
    assert [len(case.sets[name]) for name in ("forget", "retain", "utility")] == [2, 5, 3]
    round_trip(case, tmp_path / "elsewhere")
    round_trip(Case.build({"target": Path("m")}, {}, Options()), tmp_path / "elsewhere")


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_round_trip(tmp_path_factory, name, prompt):
    folder = tmp_path_factory.mktemp("case")
    options = Options(template=prompt + "{prompt}")
    round_trip(Case.build({"target": folder / "model"}, {}, options, name), folder / "out")


@pytest.mark.parametrize("column", ["a.b", 'say "x"', "é", "", " "])
def test_any_column_survives_the_round_trip(column, tmp_path):
    where_survives(column, tmp_path)


@pytest.mark.parametrize("column", ["\U0001f600", "del \x7f"])
def test_column_names_that_json_and_toml_write_differently(column, tmp_path):
    where_survives(column, tmp_path)


def where_survives(column: str, folder: Path) -> None:
    path = write_set(folder / "set.jsonl", **{column: "v"})
    case = Case.build({"target": folder / "m"}, {"forget": SetSpec(path, where={column: "v"})}, Options())
    round_trip(case, folder / "out")


@pytest.mark.parametrize("budget", list(Budget))
@pytest.mark.parametrize("access", list(Access))
def test_options_as_the_record_keeps_them_are_options_again(budget, access):
    options = Options(seed=5, budget=budget, access=access, only=("a", "b"), skip=("c",))
    assert Options.parse(options.dump(), "record") == options


def test_options_that_name_no_instrument_as_the_record_keeps_them():
    assert Options.parse(Options().dump(), "record") == Options()


# --- what is wrong is said, and where


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name = ", "not TOML"),
        ("\x00", "not TOML"),
        ("a = 1\na = 2", "not TOML"),
        ('modles = "x"', "unknown key 'modles'"),
        ('[models]\nteacher = "x"', "teacher"),
        ("[models]\ntarget = 3", "target = 3"),
        ("models = 3", r"\[models\] must be a table"),
        ("sets = []", r"\[sets\] must be a table"),
        ('options = "x"', r"\[options\] must be a table"),
        ("[sets]\nforget = 3", r"\[sets\] forget must be a string or a table"),
        ("[sets]\nforget = { limit = 3 }", r"\[sets\] forget must be a string or a table"),
        ('[sets]\nforget = { path = "x", rows = 3 }', "unknown key 'rows'"),
        ("[options]\nsede = 1", "unknown option 'sede'"),
        ("[options]\nseed = -1", "seed -1"),
        ("[options]\nseed = true", "seed True"),
        ("[options]\nseed = 1.0", "seed 1.0"),
        ('[options]\nbudget = "lavish"', "budget 'lavish' is none of quick, standard, thorough"),
        ("[options]\nbudget = ['quick']", "budget"),
        ('[options]\naccess = "root"', "access 'root' is none of text, logprobs, weights"),
        ('[options]\ndevice = "tpu"', "device 'tpu'"),
        ('[options]\ndtype = "int8"', "dtype 'int8'"),
        ('[options]\ntemplate = "Q: A:"', "template 'Q: A:' holds no {prompt}"),
    ],
)
def test_bad_input_names_the_file_and_the_fault(text, says, tmp_path):
    path = write_case(tmp_path, text)
    with pytest.raises(BadInput, match=says) as caught:
        built(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[models]\ntarget = "m"\n[sets]\nforgot = "set.jsonl"', "unknown set 'forgot'"),
        ('[sets]\nforget = "set.jsonl?limit=x"', "limit=x"),
        ('[sets]\nforget = { path = "set.jsonl", limit = 0 }', "limit=0"),
    ],
)
def test_bad_input_that_does_not_name_the_case(text, says, tmp_path):
    test_bad_input_names_the_file_and_the_fault(text, says, tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no target model"),
        ('[models]\noriginal = "x"', "no target model"),
        ('[models]\ntarget = "m"\n[sets]\nforgot = "set.jsonl"', "unknown set 'forgot' .known: forget, retain"),
        ('[models]\ntarget = "m"\n[sets]\nforget = "none.jsonl"', "none.jsonl: cannot be read"),
        ('[models]\ntarget = "m"\n[sets]\nforget = "set.jsonl?limit=x"', "limit=x"),
    ],
)
def test_bad_input_of_any_kind_is_bad_input(text, says, tmp_path):
    write_set(tmp_path / "set.jsonl")
    with pytest.raises(BadInput, match=says):
        built(write_case(tmp_path, text))


@pytest.mark.parametrize(
    "text",
    [
        "[options]\ntemplate = 5",
        "[options]\nonly = 5",
        '[sets]\nforget = { path = "set.jsonl", limit = "5" }',
        '[sets]\nforget = { path = "set.jsonl", limit = 2.5 }',
        '[sets]\nforget = { path = "set.jsonl", columns = 5 }',
        '[sets]\nforget = { path = "set.jsonl", where = 5 }',
    ],
)
def test_values_of_the_wrong_type(text, tmp_path):
    write_set(tmp_path / "set.jsonl")
    with pytest.raises(BadInput):
        built(write_case(tmp_path, text + '\n[models]\ntarget = "m"'))


def test_a_case_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(BadInput, match="cannot be read") as caught:
            read_case(path)
        assert str(path) in str(caught.value)
    path = tmp_path / "latin.toml"
    path.write_bytes("name = 'é'".encode("latin-1"))
    with pytest.raises(BadInput, match=r"latin\.toml: cannot be read"):
        read_case(path)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_no_text_is_a_traceback(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("case") / "case.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        read_case(path)
    except BadInput as error:
        assert str(path) in str(error)


# --- rows


def case_of(entities: list[str], *, seed: int = 0, budget: Budget = Budget.STANDARD) -> Case:
    rows = tuple(Example(f"forget:{i}", f"p{i}", f"a{i}", entity=e) for i, e in enumerate(entities))
    examples = ExampleSet("forget", "made here", rows, "0" * 64)
    return Case("c", {"target": Path("m")}, {}, {"forget": examples}, Options(seed=seed, budget=budget))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(["", "a", "b", "c", "d e", "ß", "1", "01"]), min_size=1, max_size=40),
    st.integers(1, 45),
    st.integers(0, 5),
)
def test_whole_entities_in_file_order_within_the_limit(entities, limit, seed):
    case = case_of(entities, seed=seed)
    rows = case.rows("forget", limit)
    everything = case.sets["forget"].examples
    assert rows
    assert list(rows) == [row for row in everything if row in rows]  # file order, none twice
    sizes = Counter(row.entity or row.id for row in everything)
    kept = Counter(row.entity or row.id for row in rows)
    assert all(kept[entity] == sizes[entity] for entity in kept)
    assert len(rows) <= limit or len(kept) == 1  # one entity alone may be larger
    if len(everything) <= limit:
        assert rows == everything
    else:  # nothing that would still fit was left out
        assert all(len(rows) + size > limit for entity, size in sizes.items() if entity not in kept)
    assert rows == case_of(entities, seed=seed).rows("forget", limit)
    assert Case.clusters(rows) == [row.entity or row.id for row in rows]


def test_an_entity_larger_than_the_limit_is_not_drawn_where_others_fit():
    entities = ["big"] * 30 + ["a", "b", "c", "d"] * 2
    for seed in range(20):
        assert len(case_of(entities, seed=seed).rows("forget", 6)) <= 6


def test_the_seed_decides_and_every_entity_has_a_chance():
    entities = [f"e{i // 3}" for i in range(60)]
    draws = {tuple(row.id for row in case_of(entities, seed=seed).rows("forget", 15)) for seed in range(40)}
    assert len(draws) > 30
    assert {row for draw in draws for row in draw} == {f"forget:{i}" for i in range(60)}
    assert all(len(draw) == 15 for draw in draws)


@pytest.mark.parametrize(("budget", "most"), [(Budget.QUICK, 120), (Budget.STANDARD, 400), (Budget.THOROUGH, 10**9)])
def test_the_budget_is_the_limit_of_limits(budget, most):
    case = case_of([""] * 500, budget=budget)
    assert len(case.rows("forget")) == min(500, most)
    assert len(case.rows("forget", 450)) == min(450, most)
    assert len(case.rows("forget", 10)) == 10
    assert case.rows("forget", 10) == case.rows("forget", 10)


# --- what lies in the folders


def test_a_folder_is_hashed_once_a_scan_and_not_trusted_after_a_change(tiny, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    case = replace(case_of(["a"]), models={"original": folder})
    hashed = []
    monkeypatch.setattr("audit.case.take_inventory", lambda *a: (hashed.append(a), take_inventory(*a))[1])
    first = case.inventoried("original")
    assert case.inventoried("original") is first
    assert len(hashed) == 1
    assert case.inventory("original") == first
    assert len(hashed) == 2, "asked for what lies there now, it looks"
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    with pytest.raises(Refused, match=r"config\.json: changed"):
        case.inventoried("original")
    assert case.inventory("original").digest != first.digest
