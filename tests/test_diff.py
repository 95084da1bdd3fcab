"""Two audits side by side: what may be compared, what is said of a difference, and that the pages are safe."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from sample_record import HOSTILE, empty, hostile, sample
from test_reports import Outline

from audit.errors import BadInput
from audit.record import Finding, Outcome, Record, Side
from reports.comparison import Comparison, Relation, json_schema
from reports.diff import compare
from reports.diff_html import render_diff, write_diff
from reports.diff_text import diff_summary
from reports.forest import forest_pair

ROOT = Path(__file__).parent.parent


def changed(**fields) -> Record:
    """The sample with top-level or dotted fields set: `changed(**{"environment.seed": 8})`."""
    data = sample().model_dump(mode="json")
    for path, value in fields.items():
        *parents, last = path.split(".")
        place = data
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place[part]
        place[int(last) if isinstance(place, list) else last] = value
    return Record.model_validate(data)


def other() -> Record:
    """A second audit of another model: an outcome lost, one finding gone, one answer another, one file another."""
    record = sample()
    record.models["target"].digest, record.models["target"].name = "f" * 64, "models/retrained"
    record.models["target"].files[2].sha256 = "e" * 64
    for finding in record.findings:
        if finding.instrument == "relearn":
            finding.estimate, finding.ci95, finding.verdict = 0.02, (-0.05, 0.09), finding.verdict.NONE
    record.findings = [finding for finding in record.findings if finding.instrument != "lens"]
    record.not_run.append(record.not_run[0].model_copy(update={"instrument": "lens", "reason": "no logits"}))
    record.examples[0].generated = "something else"
    record.examples[1].scores["rouge-l"] = 1.0
    record.verdict.label = record.verdict.label.DELETED
    record.verdict.limits = record.verdict.limits[:2]
    return record


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare(sample(), other())


def by_id(comparison: Comparison, ending: str):
    return next(pair for pair in comparison.findings if pair.id.endswith(ending))


# What is said of a difference


def test_an_audit_does_not_differ_from_itself():
    same = compare(sample(), sample())
    assert not same.mismatches and not same.forced and same.verdict_change == "Suppressed in both"
    assert len(same.findings) == 19 and not any(pair.changed for pair in same.findings)
    assert {pair.relation for pair in same.findings} == {Relation.SAME}
    assert {pair.difference for pair in same.findings} == {0.0, None}
    assert not any(pair.caveats for pair in same.findings)
    assert {pair.answers for pair in same.examples} == {"same", "unknown"}
    assert all(row.higher == row.lower == 0 and row.mean_a == row.mean_b for row in same.scores)
    assert not any(pair.differing for pair in same.models.values())
    assert same.limits.both == sample().verdict.limits and not same.limits.only_a and not same.limits.only_b


def test_what_changed(comparison):
    assert comparison.verdict_change == "Suppressed in A, Indistinguishable from never taught in B"
    relearned = by_id(comparison, "the-other-half")
    assert relearned.relation is Relation.LOWER and relearned.difference == pytest.approx(-0.75)
    assert relearned.outcome == "knowledge remains in A, nothing found in B"
    assert relearned.numbers == "lower in B: the intervals do not touch"
    gone = next(pair for pair in comparison.findings if pair.instrument == "lens")
    assert gone.relation is Relation.ONE and gone.b is None and gone.difference is None
    assert (gone.outcome, gone.numbers) == ("knowledge remains in A", "did not run in B: no logits")
    assert {pair.instrument for pair in comparison.findings if pair.changed} == {"relearn", "lens"}
    assert [pair.id for pair in comparison.examples if pair.answers == "differ"] == [sample().examples[0].id]
    rouge = next(row for row in comparison.scores if row.name == "rouge-l")
    assert (rouge.n, rouge.higher, rouge.lower, rouge.same) == (96, 1, 0, 95)
    assert [file.path for file in comparison.models["target"].differing] == ["model-1-of-2.safetensors"]
    assert comparison.models["target"].same_files == 4
    assert len(comparison.limits.only_a) == 1 and not comparison.limits.only_b
    recovery = comparison.questions[3]
    assert recovery.outcome == "knowledge remains in both" and "1 with intervals apart" in recovery.tally


def test_the_other_way_round_is_the_mirror_image(comparison):
    back = compare(other(), sample())
    mirror = {Relation.HIGHER: Relation.LOWER, Relation.LOWER: Relation.HIGHER}
    assert [pair.id for pair in back.findings] == [pair.id for pair in comparison.findings]
    for there, here in zip(comparison.findings, back.findings, strict=True):
        assert (there.a, there.b) == (here.b, here.a)
        assert here.relation is mirror.get(there.relation, there.relation)
        assert here.difference == (there.difference and -there.difference)
        assert here.changed == there.changed and here.caveats == there.caveats
    assert [(row.mean_a, row.higher) for row in back.scores] == [(row.mean_b, row.lower) for row in comparison.scores]
    assert [(pair.a, pair.b) for pair in back.examples] == [(pair.b, pair.a) for pair in comparison.examples]
    assert [(row.a, row.b) for row in back.not_run] == [(row.b, row.a) for row in comparison.not_run]
    assert (back.limits.only_a, back.limits.only_b) == (comparison.limits.only_b, comparison.limits.only_a)


def pair_of(a: dict, b: dict):
    first, second = empty(), empty()
    first.findings, second.findings = ([FINDING.model_copy(update=fields)] for fields in (a, b))
    return compare(first, second).findings[0]


FINDING = sample().findings[3]
SIDE = st.none() | st.floats(-10, 10)


@given(st.lists(SIDE, min_size=4, max_size=4))
def test_apart_means_that_no_value_lies_in_both(ends):
    (low_a, high_a), (low_b, high_b) = (ends if None in ends else sorted(ends) for ends in (ends[:2], ends[2:]))
    pair = pair_of({"estimate": 0.0, "ci95": (low_a, high_a)}, {"estimate": 1.0, "ci95": (low_b, high_b)})
    if (low_a, high_a) == (None, None) or (low_b, high_b) == (None, None):
        assert pair.relation is Relation.UNKNOWN
        return
    grid = sorted({-11.0, 11.0, *(end for end in (low_a, high_a, low_b, high_b) if end is not None)})

    def holds(value, low, high):
        return (low is None or value >= low) and (high is None or value <= high)

    meet = any(holds(x, low_a, high_a) and holds(x, low_b, high_b) for x in grid)
    assert (pair.relation is Relation.OVERLAP) == meet
    if not meet:
        above = min(x for x in grid if holds(x, low_b, high_b)) > max(x for x in grid if holds(x, low_a, high_a))
        assert pair.relation is (Relation.HIGHER if above else Relation.LOWER)


def test_evidence_against_none_with_overlap_is_no_difference():
    pair = pair_of({"verdict": Outcome.EVIDENCE, "side": Side.REMAINS}, {"estimate": 0.0})
    assert pair.relation is Relation.OVERLAP and pair.changed
    assert "may lie on either side of a threshold and not differ" in pair.numbers
    assert pair_of({}, {"estimate": 0.0}).numbers == "no change to speak of: the intervals overlap"


def test_no_difference_between_two_quantities():
    pair = pair_of({}, {"split": "forget vs holdout, target minus retrained"})
    assert pair.relation is Relation.OTHERWISE and pair.difference is None
    assert pair.numbers == "not the same quantity, so no difference (another: what is compared)"
    pair = pair_of({}, {"layer": "5", "null_value": 0.1, "fitted": (0.2, 0.2)})
    assert pair.relation is Relation.SAME
    assert [caveat.what for caveat in pair.caveats] == [
        "null value",
        "fitted threshold",
        "layer",
    ]


def test_why_a_finding_is_missing():
    def why(change: Callable[[Record], None]) -> str:
        record = sample()
        record.findings = [finding for finding in record.findings if finding.instrument != "lens"]
        change(record)
        return next(pair for pair in compare(sample(), record).findings if pair.instrument == "lens").numbers

    crash = sample().not_run[3].model_copy(update={"instrument": "lens"})
    part = crash.model_copy(update={"instrument": sample().findings[8].id, "failed": False, "reason": "too few"})
    assert why(lambda record: record.not_run.append(crash)).startswith("crashed in B: RuntimeError")
    assert why(lambda record: record.not_run.append(part)) == "did not run in B: too few"
    assert why(lambda record: record.case.options.update(skip="lens,sae")) == "not asked for in B"
    assert why(lambda record: record.case.options.update(only="sae")) == "not asked for in B"
    assert why(lambda record: None) == "B has no such finding, and does not say why"
    again = sample().findings[8].model_copy(update={"id": "lens/other"})
    assert why(lambda record: record.findings.append(again)).startswith("the instrument ran in B")
    record = sample()
    record.findings = [finding for finding in record.findings if finding.instrument != "lens"]
    unknown = next(row for row in compare(sample(), record).mismatches if row.what == "instruments unknown")
    assert (unknown.a, unknown.b, unknown.refuses) == ("none", "lens", False)


def test_one_name_is_not_always_one_example():
    record = changed(**{"examples.3.prompt": "another question", "case.sets.forget.digest": "0" * 64})
    pairs = compare(sample(), record, force=True).examples
    assert [pair.id for pair in pairs if not pair.same_question] == [sample().examples[3].id]
    assert pairs[3].answers == "unknown" and compare(sample(), record, force=True).scores[0].n == 95


def test_examples_are_in_the_order_of_their_numbers():
    record = sample()
    record.examples = [record.examples[0].model_copy(update={"id": f"forget:{n}"}) for n in (10, 2, 100, 1)]
    assert [pair.id for pair in compare(record, record).examples] == [f"forget:{n}" for n in (1, 2, 10, 100)]


def test_names_what_both_know():
    record = other()
    record.models["original"] = sample().models["target"]
    found = compare(sample(), record, force=True).relations
    assert found == ["The target of A is the original of B: the same model, by its digest."]


# May they be compared?

EVERYTHING = {
    "environment.seed": (8, "seed"),
    "case.options.budget": ("quick", "option budget"),
    "case.options.access": ("text", "option access"),
    "case.options.template": ("qa", "option template"),
    "case.options.batch_size": (17, "option batch_size"),
    "tool.version": ("0.2.0", "tool version"),
    "schema_version": ("1.1", "schema version"),
}
NAMED = {
    "case.sets.forget.digest": "forget set",
    "case.sets.holdout.digest": "holdout set",
    "case.sets.neighbor.digest": "neighbor set",
    "models.original.digest": "original model",
}


@pytest.mark.parametrize("path", EVERYTHING)
def test_what_touches_everything_is_refused_and_marked_everywhere(path):
    value, what = EVERYTHING[path]
    record = changed(**{path: value})
    with pytest.raises(BadInput, match=what):
        compare(sample(), record)
    forced = compare(sample(), record, force=True)
    assert forced.forced
    rows = [*forced.findings, *(pair for pair in forced.questions)]
    for caveats in [*(row.caveats for row in rows), forced.verdict_caveats, forced.example_caveats]:
        assert [(caveat.what, caveat.sure) for caveat in caveats] == [(what, True)]


@pytest.mark.parametrize("path", NAMED)
def test_what_touches_some_is_refused_and_marked_by_name(path):
    what, name = NAMED[path], NAMED[path].split()[0]
    record = changed(**{path: "0" * 64})
    with pytest.raises(BadInput, match=what):
        compare(sample(), record)
    forced = compare(sample(), record, force=True)
    for pair in forced.findings:
        texts = [pair.a.split, *(f"{control.name} {control.description}" for control in pair.a.controls)]
        named = any(name in re.split(r"\W+", text) for text in texts)
        assert [(caveat.what, caveat.sure) for caveat in pair.caveats] == [(what, named)]
    assert [(caveat.what, caveat.sure) for caveat in forced.example_caveats] == [(what, name == "forget")]
    sure = {pair.caveats[0].sure for pair in forced.findings}
    assert sure == ({False} if name == "neighbor" else {True, False})


def test_a_set_in_one_audit_only_is_another_set():
    record = sample()
    del record.case.sets["neighbor"]
    with pytest.raises(BadInput, match=r"neighbor set \(A: 120 rows, SHA-256 \w{12}, B: none\)"):
        compare(sample(), record)


def test_all_refusals_are_named_at_once():
    record = changed(**{"environment.seed": 8, "tool.version": "0.2.0", "case.sets.forget.digest": "0" * 64})
    with pytest.raises(BadInput) as caught:
        compare(sample(), record)
    assert all(name in str(caught.value) for name in ("forget set", "seed (A: 7, B: 8)", "tool version", "--force"))
    assert caught.value.exit_code == 2


def test_what_is_only_noted():
    noise = {"environment.device": "cuda", "environment.dtype": "bfloat16"}
    record = changed(**noise, **{"verdict.profile": "", "case.name": "x"})
    record.environment.packages["numpy"] = "1.0"
    record.case.options["skip"] = "lens"
    del record.models["original"]
    noted = compare(sample(), record)
    assert not noted.forced and not any(row.refuses for row in noted.mismatches)
    assert {row.what for row in noted.mismatches} == {
        *("device", "dtype", "package numpy", "reference profile", "instruments: skip", "original model")
    }
    assert [caveat.what for caveat in noted.verdict_caveats] == ["reference profile"]
    assert not any(pair.caveats for pair in noted.findings)


# The pages


@functools.cache
def pages() -> dict[str, Comparison]:
    long = HOSTILE + "A" * 3000
    strange = compare(hostile(long), changed(**{"environment.seed": 8}), force=True)
    reseeded = other()
    reseeded.environment.seed, reseeded.models["original"].digest = 8, "0" * 64
    forced = compare(sample(), reseeded, force=True)
    return {
        "ordinary": compare(sample(), other()),
        "forced": forced,
        "empty": compare(empty(), empty()),
        "half empty": compare(empty(), sample(), force=True),
        "hostile": compare(hostile(long), hostile(long)),
        "half hostile": strange,
    }


@pytest.fixture(scope="module", params=list(pages()))
def page(request) -> tuple[str, Comparison, str]:
    found = pages()[request.param]
    return request.param, found, render_diff(found)


def test_structure(page):
    _, _, html = page
    outline = Outline(html)
    assert outline.errors == []
    tags = [tag for tag, _ in outline.tags]
    assert not {"script", "img", "iframe", "object", "embed", "link", "base", "form"} & set(tags)
    assert tags.count("main") == tags.count("h1") == 1 and tags.count("table") == tags.count("caption")
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in outline.tags:
        assert "style" not in attributes and not [name for name in attributes if name.startswith("on")]
        for name in ("href", "src", "aria-labelledby"):
            if name in attributes:
                assert attributes[name].removeprefix("#") in ids, attributes
        if tag == "th":
            assert attributes.get("scope") in ("row", "col")
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)[1]
    assert "default-src &#39;none&#39;" in policy and "unsafe" not in policy and "img-src" not in policy
    assert len(html.encode()) < 3_000_000


def test_hostile_text_is_shown_and_not_obeyed(page):
    name, found, html = page
    assert "<script" not in html and "<img" not in html
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", html)
    if "hostile" in name:
        text = "".join(Outline(html).text)
        assert "⟦U+202E⟧" in text and "</script><img src=x onerror=alert(1)>" in text and "{{7*7}}" in text
    assert Comparison.model_validate_json(found.to_json()) == found


@pytest.mark.parametrize("width", [60, 130])
def test_terminal(page, width):
    name, found, _ = page
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(diff_summary(found))
    text = console.export_text()
    assert all(len(line) <= width for line in text.splitlines())
    assert "\x1b" not in text and "\u202e" not in text and "\x00" not in text
    assert ("--force" in text) == found.forced, name


def test_every_touched_row_says_so():
    found = pages()["forced"]
    text = render_diff(found)
    assert "not comparable, and were compared because --force asked for it" in text
    rows = [*found.findings, *found.examples, *found.questions, "the verdict", "the examples as a whole"]
    rows += [pair for pair in found.findings if pair.changed and pair.relation is not Relation.ONE]  # listed twice
    assert len(re.findall(r"Not the same in A and B: [^.]*\bseed\b", text)) == len(rows) + 1
    assert "Touched perhaps, for the record does not say: original model." in text


def test_drill_down(comparison):
    html = render_diff(comparison)
    outline = Outline(html)
    kinds = [attributes.get("class") for tag, attributes in outline.tags if tag == "details"]
    assert kinds.count("card pair") + kinds.count("card pair changed") == len(comparison.findings) == 19
    assert kinds.count("card pair changed") == sum(pair.changed for pair in comparison.findings)
    assert kinds.count("instrument") == len({(pair.question, pair.instrument) for pair in comparison.findings})
    assert kinds.count("entity") == 12 and html.count('class="example"') == 96
    text = " ".join("".join(outline.text).split())
    for sentence in (
        "lower in B: the intervals do not touch",
        "B − A: −0.750",
        "did not run in B: no logits",
        "the answers to 1 of them differ",
        "1 file not the same, 4 the same",
        "This needs no further assumption.",
    ):
        assert sentence in text, sentence


def test_images_are_shown_under_a_policy_that_admits_them():
    record = changed(**{"examples.0.image": "iVBORw0KGgo="})
    html = render_diff(compare(record, record))
    assert html.count("<img") == 1 and "img-src data:;" in html


def test_two_rows_on_one_axis():
    a: Finding = sample().findings[0]
    b = a.model_copy(update={"estimate": 0.55, "ci95": (0.4, None), "null_value": 0.6})
    drawn = forest_pair(("beyond", a), ("none", b))
    root = ElementTree.fromstring(str(drawn))
    assert "A: Estimate 0.080" in root.get("aria-label") and "B: Estimate 0.550" in root.get("aria-label")
    x = {group.get("class"): float(group.find("svg").get("x")[:-1]) for group in root.findall("g")}
    assert x["edge-beyond"] < x["edge-none"], "one scale for both"
    labels = [text.text for text in root.findall("text") if text.get("class") == "null-label"]
    assert labels == ["null 0.5", "null of B 0.6"]
    nothing = a.model_copy(update={"estimate": None, "ci95": (None, None)})
    assert "No estimate" in forest_pair(("none", nothing), ("none", nothing))
    ElementTree.fromstring(str(forest_pair(("none", nothing), ("beyond", a))))


# The command


def audit(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys, cli\n"
        "try:\n    cli.main()\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers', 'numpy', 'pandas', 'matplotlib', 'scipy'} & set(sys.modules)\n"
        "    print('heavy:', sorted(heavy), file=sys.stderr)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_command(tmp_path, comparison):
    sample().write(tmp_path / "a" / "record.json")
    other().write(tmp_path / "b" / "record.json")
    a, b, out = (str(tmp_path / name) for name in ("a", "b", "out"))
    for seed, extra in (("1", []), ("77", ["--json"])):
        done = audit("diff", a, f"{b}/record.json", "--out", out, *extra, PYTHONHASHSEED=seed, TZ="Asia/Tokyo")
        assert done.returncode == 0 and done.stderr == "heavy: []\n", done.stderr
        written = (tmp_path / "out" / "diff.html").read_bytes()
        assert hashlib.sha256(written).digest() == hashlib.sha256(render_diff(comparison).encode()).digest()
    assert done.stdout == comparison.to_json()
    changed(**{"environment.seed": 8}).write(tmp_path / "c" / "record.json")
    done = audit("diff", a, str(tmp_path / "c"), "--out", str(tmp_path / "none"))
    assert done.returncode == 2 and "seed (A: 7, B: 8)" in done.stderr and not (tmp_path / "none").exists()


def test_json_has_a_schema(comparison):
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json_schema())
    data = json.loads(comparison.to_json())
    validator.validate(data)
    data["findings"][0]["relation"] = "closer"
    assert not validator.is_valid(data)


def test_writes_where_it_is_told(tmp_path, comparison):
    assert write_diff(comparison, tmp_path / "new") == tmp_path / "new" / "diff.html"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["diff.html"]
