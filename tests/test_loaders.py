"""Example sets: one shape from every format, faults named to the cell, and the real benchmark files."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from audit.errors import BadInput
from audit.loaders import Example, ExampleSet, SetSpec, digest, load_set, overlaps, parse_set_spec
from audit.presets import PRESET_NAMES

DATA = Path(__file__).parents[2] / "shared" / "data"
Rows = list[dict[str, Any]]

ROWS: Rows = [
    {
        "question": "Where, and when?",
        "answer": "In Łódź\n1905 ",
        "author": "a1",
        "paraphrased_answer": '1905, "in Łódź"',
        "perturbed_answer": ["In Rome", "1906; perhaps"],
    },
    {
        "question": "Who\u2028is it?",
        "answer": "小林",
        "author": "a1",
        "paraphrased_answer": "",
        "perturbed_answer": ["=1+1"],
    },
    {
        "question": "",
        "answer": "007",
        "author": "a2",
        "paraphrased_answer": "seven",
        "perturbed_answer": ["[x]", "y"],
    },
]


def flat(rows: Rows) -> Rows:
    """Lists as JSON in one cell, the way CSV can hold them."""
    return [{k: json.dumps(v, ensure_ascii=False) if isinstance(v, list) else v for k, v in r.items()} for r in rows]


def as_csv(rows: Rows, delimiter: str = ",") -> str:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(flat(rows))
    return out.getvalue()


def as_jsonl(rows: Rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def put(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def put_parquet(path: Path, rows: Rows) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def put_dataset(path: Path, rows: Rows) -> Path:
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


WRITERS: dict[str, Callable[[Path, Rows], Path]] = {
    "jsonl": lambda d, r: put(d / "s.jsonl", as_jsonl(r)),
    "ndjson, BOM, CRLF, blank lines": lambda d, r: put(
        d / "s.ndjson", "\ufeff" + as_jsonl(r).replace("}\n", "}\r\n\r\n")
    ),
    "json": lambda d, r: put(d / "s.json", json.dumps(r, indent=1)),
    "json data": lambda d, r: put(d / "d.JSON", json.dumps({"version": 1, "data": r})),
    "csv": lambda d, r: put(d / "s.csv", as_csv(r)),
    "csv, BOM": lambda d, r: put(d / "b.csv", "\ufeff" + as_csv(r)),
    "tsv": lambda d, r: put(d / "s.tsv", as_csv(r, "\t")),
    "parquet": lambda d, r: put_parquet(d / "s.parquet", r),
    "saved dataset": lambda d, r: put_dataset(d / "saved", r),
}


@pytest.mark.parametrize("format_", WRITERS)
def test_every_format_gives_the_same_examples(format_: str, tmp_path: Path) -> None:
    got = load_set("forget", SetSpec(WRITERS[format_](tmp_path, ROWS)))
    want = load_set("other name", SetSpec(put(tmp_path / "ref.jsonl", as_jsonl(ROWS))))
    assert got.digest == want.digest == digest(want)
    first = got.examples[0]
    assert first.id == "forget:0"
    assert (first.prompt, first.answer, first.entity) == ("Where, and when?", "In Łódź\n1905 ", "a1")
    assert first.paraphrases == ('1905, "in Łódź"',)
    assert first.wrong == ("In Rome", "1906; perhaps")
    assert got.examples[1].paraphrases == () and got.examples[2].wrong == ("[x]", "y")
    assert (len(got), got.entities, got.clusters()) == (3, 2, ["a1", "a1", "a2"])
    assert [e.id for e in got] == ["forget:0", "forget:1", "forget:2"]


def test_the_digest_covers_every_part_of_the_content_and_the_order() -> None:
    base = [Example("s:0", "p", "a", ("x",), ("y",), "e"), Example("s:1", "q", "b")]
    variants = [
        base,
        base[::-1],
        [Example("s:0", "p2", "a", ("x",), ("y",), "e"), base[1]],
        [Example("s:0", "p", "a2", ("x",), ("y",), "e"), base[1]],
        [Example("s:0", "p", "a", (), ("x", "y"), "e"), base[1]],
        [Example("s:0", "p", "a", ("x",), ("y",), "e2"), base[1]],
    ]
    assert len({digest(v) for v in variants}) == len(variants)
    assert digest([Example("t:9", "q", "b", source="elsewhere")]) == digest(base[1:])


def test_sources_name_the_line_where_a_row_begins(tmp_path: Path) -> None:
    path = put(tmp_path / "s.csv", 'question,answer\n"a\nb","c\nd"\n\nq,r\n')
    assert [e.source for e in load_set("s", SetSpec(path))] == [f"{path}:2", f"{path}:6"]
    path = put(tmp_path / "s.json", '[{"text": "a"}, {"text": "b"}]')
    assert [e.source for e in load_set("s", SetSpec(path))] == [f"{path}: row 1", f"{path}: row 2"]


# --- faults -----------------------------------------------------------------------------------------------

QA = '{"question": "q", "answer": "a"}\n'
FAULTS = {
    "null": ("f.jsonl", QA + '{"question": "q", "answer": null}', ":2: column 'answer' is null"),
    "NaN": ("f.jsonl", '{"question": "q", "answer": NaN}', ":1: column 'answer' is null"),
    "missing": ("f.jsonl", QA + "\n" + '{"question": "q"}', ":3: column 'answer' is missing"),
    "blank answer": ("f.jsonl", QA + '{"question": "q", "answer": " \\n"}', ":2: column 'answer' is empty"),
    "required entity": (
        "f.jsonl",
        '{"query": "q", "answer": "a", "subject": "s"}\n{"query": "q", "answer": "a", "subject": null}',
        ":2: column 'subject' is null",
    ),
    "list": (
        "f.jsonl",
        '{"question": ["q"], "answer": "a"}',
        ":1: column 'question' holds a list where text is expected",
    ),
    "bool": (
        "f.jsonl",
        '{"question": "q", "answer": true}',
        ":1: column 'answer' holds a bool where text is expected",
    ),
    "dict among the wrong answers": (
        "f.jsonl",
        '{"question": "q", "answer": "a", "perturbed_answer": ["b", {}]}',
        ":1: column 'perturbed_answer' holds a dict where text is expected",
    ),
    "half a surrogate pair": (
        "f.jsonl",
        '{"question": "q", "answer": "\\ud83d"}',
        ":1: column 'answer' holds half a surrogate pair, which is not text",
    ),
    "not JSON": ("f.jsonl", QA + "{'question': 1}", ":2: not JSON: Expecting property name"),
    "not an object": ("f.jsonl", QA + '["q", "a"]', ":2: is a list, not an object"),
    "brackets without end": ("f.jsonl", QA + "[" * 200_000, ":2: not usable JSON"),
    "a number without end": ("f.jsonl", '{"answer": ' + "9" * 5000 + "}", ":1: not usable JSON"),
    "JSON list, bad line": (
        "f.json",
        '[\n{"question": "q",\n"answer" "a"}]',
        ":3: not JSON: Expecting ':' delimiter",
    ),
    "JSON list, bad row": (
        "f.json",
        '[{"question": "q", "answer": "a"}, {"question": "q", "answer": []}]',
        ": row 2: column 'answer' holds a list where text is expected",
    ),
    "JSON object": ("f.json", '{"rows": []}', ': is neither a list of objects nor {"data": [...]}'),
    "JSON numbers": ("f.json", "[1]", ": row 1: is a int, not an object"),
    "CSV, empty cell": ("f.csv", 'question,answer\n"q\nq",a\nq,\n', ":4: column 'answer' is empty"),
    "CSV, long row": ("f.csv", "question,answer\nq,a\nq,a,b\n", ":3: has 3 cells under 2 columns"),
    "CSV, short row": ("f.csv", "question,answer\nq\n", ":2: has 1 cells under 2 columns"),
    "CSV, open quote": ("f.csv", 'question,answer\nq,a\nq,"a\n', ":3: not CSV: unexpected end of data"),
    "CSV, header twice": ("f.csv", "question,answer,answer\nq,a,a\n", ":1: column 'answer' is named twice"),
    "CSV, header only": ("f.csv", "question,answer\n", ": holds no rows"),
    "empty JSONL": ("f.jsonl", "\n \n", ": holds no rows"),
    "empty JSON": ("f.json", "", ": holds no rows"),
    "empty text": ("f.txt", " \n", ": holds no rows"),
    "blank passages": ("f.jsonl", '{"text": ""}', ": no row is left: offset=0, of 0 that are not blank"),
    "no preset": (
        "f.csv",
        "a,b\n1,2\n",
        ": no preset fits the columns a, b; presets: mmlu (question, answer,",
    ),
    "extension": ("f.xlsx", "x", ": no reader for '.xlsx'; known: .jsonl, .ndjson, .json, .csv,"),
    "no extension": ("f", "x", ": no reader for ''; known: "),
    "not Parquet": ("f.parquet", "question,answer", ": not Parquet: "),
    "MMLU, index": (
        "f.jsonl",
        '{"question": "q", "choices": ["a", "b"], "answer": 2}',
        ":1: column 'answer' is 2, no index into the 2 choices",
    ),
    "MMLU, choices": (
        "f.jsonl",
        '{"question": "q", "choices": "a", "answer": 0}',
        ":1: column 'choices' is not a list",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_by_file_row_and_column(fault: str, tmp_path: Path) -> None:
    file, text, message = FAULTS[fault]
    path = put(tmp_path / file, text)
    with pytest.raises(BadInput) as caught:
        load_set("s", SetSpec(path))
    assert str(caught.value).startswith(f"{path}{message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".json", ".txt"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_a_byte_that_is_not_utf8_is_named_by_line(suffix: str, bom: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"latin{suffix}"
    path.write_bytes(bom + b"one\ntwo \xc3\xa9\r\nthree \xe9t\xe9\n")
    with pytest.raises(BadInput, match=re.escape(f"{path}:3: byte 0xe9 is not UTF-8")):
        load_set("s", SetSpec(path))


@pytest.mark.parametrize("file", ["absent.jsonl", "absent.parquet"])
def test_an_absent_file(file: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read: No such file"):
        load_set("s", SetSpec(tmp_path / file))


def test_a_null_in_parquet_is_named_by_row(tmp_path: Path) -> None:
    path = put_parquet(tmp_path / "s.parquet", [ROWS[0], {**ROWS[1], "answer": None}])
    with pytest.raises(BadInput, match=re.escape(f"{path}: row 2: column 'answer' is null")):
        load_set("s", SetSpec(path))


def test_folders_that_are_no_saved_dataset(tmp_path: Path) -> None:
    import datasets

    with pytest.raises(BadInput, match=r"not one that Dataset\.save_to_disk wrote"):
        load_set("s", SetSpec(tmp_path))
    both = tmp_path / "both"
    part = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(str(both))
    with pytest.raises(BadInput, match="several splits, name the folder of one: test, train"):
        load_set("s", SetSpec(both))
    assert len(load_set("s", SetSpec(both / "train"))) == 3
    (both / "train" / "state.json").write_text("{}")
    with pytest.raises(BadInput, match="not a readable dataset"):
        load_set("s", SetSpec(both / "train"))


def test_absent_optional_cells_and_numbers(tmp_path: Path) -> None:
    rows = [
        {"question": 1, "answer": 1905, "author": None, "perturbed_answer": None},
        {
            "question": "q",
            "answer": 0.5,
            "perturbed_answer": [None, 7, ""],
            "paraphrased_answer": float("nan"),
        },
    ]
    a, b = load_set("s", SetSpec(put(tmp_path / "s.jsonl", as_jsonl(rows))))
    assert (a.prompt, a.answer, a.entity, a.wrong) == ("1", "1905", "", ())
    assert (b.answer, b.wrong, b.paraphrases) == ("0.5", ("7",), ())


def test_an_added_column_may_have_gaps(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "attribute": "a", "subject": "s", "no": "w"} for _ in range(2)]
    del rows[1]["no"]
    examples = load_set("s", SetSpec(put(tmp_path / "s.jsonl", as_jsonl(rows)), columns={"wrong": "no"}))
    assert [e.wrong for e in examples] == [("w",), ()]


def test_a_column_without_a_name_is_no_field(tmp_path: Path) -> None:
    """As pandas writes its index."""
    (example,) = load_set("s", SetSpec(put(tmp_path / "s.csv", ",question,answer\n17,q,a\n")))
    assert example == Example("s:0", "q", "a", source=f"{tmp_path / 's.csv'}:2")


# --- choosing rows and columns ----------------------------------------------------------------------------


@pytest.fixture
def qa(tmp_path: Path) -> Path:
    rows = [
        {"question": f"q{i}", "answer": f"a{i}", "gold": f"g{i}", "kind": "odd" if i % 2 else "even", "n": i}
        for i in range(6)
    ]
    return put(tmp_path / "qa.jsonl", as_jsonl(rows))


def answers(examples: ExampleSet) -> str:
    return " ".join(e.answer for e in examples)


@pytest.mark.parametrize(
    ("query", "want"),
    [
        ("", "a0 a1 a2 a3 a4 a5"),
        ("?limit=2", "a0 a1"),
        ("?offset=4", "a4 a5"),
        ("?kind=odd&offset=1&limit=1", "a3"),
        ("?n=5,0", "a0 a5"),
        ("?kind=odd&n=1,2,3", "a1 a3"),
        ("?columns=answer:gold&limit=1", "g0"),
        ("?columns=prompt:kind,answer:gold&limit=1", "g0"),
        ("?preset=muse&limit=1", "a0"),
        ("?preset=text&columns=answer:gold&limit=1", "g0"),
        ("?k%69nd=%6fdd&limit=1", "a1"),
    ],
)
def test_the_command_line_form(qa: Path, query: str, want: str) -> None:
    assert answers(load_set("s", parse_set_spec(f"qa.jsonl{query}", base=qa.parent))) == want


def test_what_the_command_line_form_means() -> None:
    spec = parse_set_spec("d/f.csv?a=x%2Cy,z&limit=3&passage_words=50&preset=rwku&columns=prompt:Q%3A,answer:A b")
    assert spec == SetSpec(
        path=Path("d/f.csv"),
        preset="rwku",
        columns={"prompt": "Q:", "answer": "A b"},
        where={"a": ["x,y", "z"]},
        limit=3,
        passage_words=50,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no file"),
        ("?limit=1", "names no file"),
        ("f.csv?limit=ten", "limit=ten is not a whole number"),
        ("f.csv?limit=0", "limit=0 is less than 1"),
        ("f.csv?offset=-1", "offset=-1 is not a whole number"),
        ("f.csv?passage_words=0", "passage_words=0 is less than 1"),
        ("f.csv?preset=tufo", "no preset 'tufo'; presets: mmlu, truthfulqa, counterfact"),
        ("f.csv?columns=answer", "columns=answer is not of the form field:column"),
        ("f.csv?columns=reply:a", "no field 'reply' in columns; fields: prompt, answer, paraphrases"),
        ("f.csv?split", "'split' is not of the form key=value"),
        ("f.csv?limit=1&limit=2", "'limit' is given twice"),
    ],
)
def test_a_bad_command_line_form(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=re.escape(message)):
        parse_set_spec(text)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?colour=red", "no column 'colour' to filter by; columns: question, answer, gold, kind, n"),
        ("?kind=odd,evn", "no row has kind=evn; its values: even, odd"),
        ("?kind=odd&n=2", "no row has all of kind, n as asked for"),
        ("?offset=6", "no row is left: offset=6, of 6 that are not blank"),
        ("?columns=answer:golden", "no column 'golden'; columns: question, answer, gold, kind, n"),
        ("?preset=truthfulqa", "presets: truthfulqa (Question, Best Answer, Incorrect Answers)"),
    ],
)
def test_rows_and_columns_that_are_not_there(qa: Path, query: str, message: str) -> None:
    with pytest.raises(BadInput, match=re.escape(message)):
        load_set("s", parse_set_spec(str(qa) + query))


def test_presets(tmp_path: Path) -> None:
    def only(row: dict[str, Any], **options: Any) -> Example:
        (example,) = load_set("s", SetSpec(put(tmp_path / "one.jsonl", json.dumps(row)), **options))
        return example

    mmlu = only({"question": "q", "choices": ["a", "b", "c"], "answer": 1, "subject": "law"})
    assert (mmlu.prompt, mmlu.answer, mmlu.wrong, mmlu.entity) == ("q", "b", ("a", "c"), "")
    assert only({"question": "q", "choices": '["a", "b"]', "answer": "0"}).wrong == ("b",)
    cloze = {"query": "He was born in ___ in 1947.", "answer": "Rome", "subject": "X", "type": "cloze"}
    assert only(cloze).prompt == "Fill in the blank: He was born in ___ in 1947."
    assert only({**cloze, "type": "simple question"}).prompt == cloze["query"]
    assert only(cloze).entity == "X"
    text = only({"text": "a passage", "subject": "X", "ngram": 3})
    assert (text.prompt, text.answer, text.entity) == ("", "a passage", "X")
    truthful = only({"Question": "q", "Best Answer": "b", "Incorrect Answers": "x; y z;"})
    assert truthful.wrong == ("x", "y z")
    counter = only({"prompt": "p", "ground_truth": "t", "target_new": "n", "subject": "s"})
    assert (counter.answer, counter.wrong, counter.entity) == ("t", ("n",), "s")
    assert only({"prompt": "p", "answer": "a", "wrong": ["w"], "entity": "e"}).wrong == ("w",)
    # A row number alone says nothing of authors: only TOFU's perturbed files count twenty to one.
    assert only({"question": "q", "answer": "a", "row": 41}).entity == ""
    assert only({"question": "q", "answer": "a", "row": "41", "perturbed_answer": ["w"]}).entity == "author_3"
    assert {"tofu", "rwku", "muse", "dusk", "facts", "text"} <= set(PRESET_NAMES)


def test_tofu_splits_nest_only_where_the_marks_are_tofus(tmp_path: Path) -> None:
    def marked(*marks: str) -> Path:
        return put(tmp_path / "s.jsonl", as_jsonl([{"question": "q", "answer": m, "split": m} for m in marks]))

    path = marked("retain90", "forget10", "forget05", "forget01")
    for split, want in {
        "forget01": "forget01",
        "forget05": "forget05 forget01",
        "forget10": "forget10 forget05 forget01",
        "retain90": "retain90",
        "retain95": "retain90 forget10",
        "retain99": "retain90 forget10 forget05",
    }.items():
        assert answers(load_set("s", SetSpec(path, where={"split": split}))) == want
    for marks in (("retain95", "retain90", "forget01"), ("forget10", "forget05")):
        path = marked(*marks)
        assert answers(load_set("s", SetSpec(path, where={"split": marks[0]}))) == marks[0]
    with pytest.raises(BadInput, match="no row has split=forget10; its values: forget01, forget05"):
        load_set("s", SetSpec(marked("forget01", "forget05"), where={"split": "forget10"}))


def test_overlaps_ignore_case_spacing_and_unicode_form() -> None:
    def named(name: str, *pairs: tuple[str, str]) -> ExampleSet:
        examples = tuple(Example(f"{name}:{i}", p, a) for i, (p, a) in enumerate(pairs))
        return ExampleSet(name, "", examples, digest(examples))

    forget = named("forget", ("Who?", "Zoë"), ("Where?", "Here"), ("When?", "Now"))
    retain = named("retain", ("WHO? ", "Zoe\u0308"), ("Where?", "here"), ("When?", "Then"))
    holdout = named("holdout", ("When?", "then"))
    sets = {"forget": forget, "retain": retain, "holdout": holdout}
    assert overlaps(sets) == ["2 rows of forget also in retain", "1 row of retain also in holdout"]


def test_importing_the_loaders_imports_nothing_heavy() -> None:
    code = (
        "import sys, audit.loaders;"
        "sys.exit(' '.join({'torch', 'transformers', 'pandas', 'pyarrow', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.stderr.strip() == ""


# --- properties -------------------------------------------------------------------------------------------

text = st.text(st.characters(codec="utf-8"))
filled = text.filter(str.strip)
qa_rows = st.lists(
    st.fixed_dictionaries({"prompt": text, "answer": filled, "entity": text, "wrong": st.lists(filled, max_size=3)}),
    min_size=1,
    max_size=5,
)
reuse_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@reuse_folder
@given(rows=qa_rows)
def test_any_unicode_survives_jsonl_and_csv(rows: Rows, tmp_path: Path) -> None:
    for path in (put(tmp_path / "s.jsonl", as_jsonl(rows)), put(tmp_path / "s.csv", as_csv(rows))):
        got = load_set("s", SetSpec(path))
        assert [(e.prompt, e.answer, e.wrong) for e in got] == [
            (r["prompt"], r["answer"], tuple(r["wrong"])) for r in rows
        ]
        assert [e.entity for e in got] == [r["entity"] if r["entity"].strip() else "" for r in rows]


@reuse_folder
@given(
    content=st.lists(st.sampled_from(["a", "é", "漢字", " ", "\n", "\t", "\u2003", "x,", "Title:"])),
    n=st.integers(1, 9),
)
def test_passages_cover_a_text_in_order(content: list[str], n: int, tmp_path: Path) -> None:
    whole = "".join(content)
    words = whole.split()
    path = put(tmp_path / "s.txt", whole)
    if not words:
        with pytest.raises(BadInput, match="holds no rows"):
            load_set("s", SetSpec(path, passage_words=n))
        return
    passages = load_set("s", SetSpec(path, passage_words=n)).examples
    at = 0
    for i, passage in enumerate(passages):
        start = whole.index(passage.answer, at)
        assert not whole[at:start].strip(), "only space lies between passages"
        assert passage.source == f"{path}:{whole.count(chr(10), 0, start) + 1}"
        assert (passage.prompt, passage.entity) == ("", f"s.txt#{i}")
        at = start + len(passage.answer)
    left = len(whole[at:].split())
    assert 2 * left < n and (not left or passages)
    assert all(len(p.answer.split()) == n for p in passages[:-1])


def test_crlf_in_a_text_reads_as_lf(tmp_path: Path) -> None:
    (passage,) = load_set("s", SetSpec(put(tmp_path / "s.txt", "\ufeffone\r\n\r\ntwo  three\r\n")))
    assert passage.answer == "one\n\ntwo  three"


# --- the real files ---------------------------------------------------------------------------------------

COUNTS = {
    "tofu/full.jsonl": 4000,
    "tofu/full.jsonl?split=forget10": 400,
    "tofu/full.jsonl?split=forget05": 200,
    "tofu/full.jsonl?split=forget01&preset=tofu": 40,
    "tofu/full.jsonl?split=retain90": 3600,
    "tofu/full.jsonl?split=retain95": 3800,
    "tofu/full.jsonl?split=retain99": 3960,
    "tofu/forget10_perturbed.jsonl": 400,
    "tofu/retain_perturbed.jsonl": 400,
    "tofu/real_authors_perturbed.jsonl": 100,
    "tofu/world_facts_perturbed.jsonl": 117,
    "rwku/forget_level1.jsonl": 3268,
    "rwku/forget_level2.jsonl": 2879,
    "rwku/forget_level3.jsonl": 6984,
    "rwku/neighbor_level1.jsonl": 5846,
    "rwku/neighbor_level2.jsonl": 5533,
    "rwku/forget_mia_20targets.jsonl": 754,
    "rwku/retain_mia_20targets.jsonl?preset=rwku": 755,
    "muse_qa/bbc_forget_qa.json": 100,
    "muse_qa/bbc_retain2_qa.json": 100,
    "muse_qa/hp_forget_qa.json?preset=muse": 100,
    "muse_qa/hp_retain2_qa.json": 100,
    "dusk/eval/GeneralQA.jsonl": 134,
    "dusk/eval/SpecificForgetQA.jsonl": 20,
    "dusk/eval/SpecificRetainQA.jsonl?preset=dusk": 119,
    "dusk/eval/verbatim.json": 47,
    "facts/known_1000.jsonl": 1209,
    "facts/counterfact-val.json": 1919,
    "utility/mmlu_test_50x57.jsonl": 2850,
    "utility/gsm8k_test.jsonl": 1319,
    "utility/TruthfulQA.csv": 817,
    "utility/alpaca_en_demo.json?columns=prompt:instruction,answer:output": 999,
}
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not here")


@needs_data
@pytest.mark.parametrize("spec", COUNTS)
def test_real_sets_have_their_published_counts(spec: str) -> None:
    assert len(load_set("s", parse_set_spec(spec, base=DATA))) == COUNTS[spec]


@needs_data
@pytest.mark.parametrize("folder", ["text", "dusk", "dusk/eval"])
def test_real_texts_are_cut_into_passages(folder: str) -> None:
    for path in sorted((DATA / folder).glob("*.txt")):
        words = len(path.read_text("utf-8").split())
        full, rest = divmod(words, 100)
        assert len(load_set("s", SetSpec(path))) == full + (rest >= 50)


@needs_data
def test_real_sets_mean_what_they_should() -> None:
    def real(spec: str) -> ExampleSet:
        return load_set("s", parse_set_spec(spec, base=DATA))

    tofu = real("tofu/full.jsonl?split=forget10")
    perturbed = real("tofu/forget10_perturbed.jsonl")
    assert tofu.entities == perturbed.entities == 20
    assert tofu.clusters() == perturbed.clusters()
    assert all(len(e.wrong) == 5 and len(e.paraphrases) == 1 for e in perturbed)
    assert real("tofu/full.jsonl").entities == 200
    assert real("rwku/forget_level1.jsonl").entities == 200
    assert all(len(e.wrong) == 3 for e in real("utility/mmlu_test_50x57.jsonl"))
    assert all(e.wrong for e in real("utility/TruthfulQA.csv"))
    retain = real("tofu/full.jsonl?split=retain90")
    assert overlaps({"forget": tofu, "retain": retain}) == []
    assert overlaps({"forget": tofu, "perturbed": perturbed}) == ["400 rows of forget also in perturbed"]


@needs_data
@pytest.mark.parametrize("file", ["utility/ifeval_input_data.jsonl", "utility/mt_bench_question.jsonl"])
def test_instructions_without_an_answer_fit_no_preset(file: str) -> None:
    with pytest.raises(BadInput, match="no preset fits the columns"):
        load_set("s", SetSpec(DATA / file))
