"""The other faces of a record: valid by their published schemas, safe with hostile text, the same bytes each time."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import attr
import jsonschema
import pytest
import sarif_om
import yaml
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from huggingface_hub.repocard_data import model_index_to_eval_results
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from sample_record import empty, hostile, sample
from typer.testing import CliRunner

import cli
from audit.errors import BadInput
from audit.record import FileEntry, Outcome, Side
from reports import words
from reports.attestation import ATTESTATION
from reports.faces.findings_csv import guarded, render_csv
from reports.faces.markdown import escaped, render_markdown
from reports.faces.mlbom import render_mlbom
from reports.faces.model_card import render_model_card
from reports.faces.parts import NAME, line
from reports.faces.registry import FACES, write_faces
from reports.faces.sarif import render_sarif
from reports.mapping import FRAMEWORKS, render_mapping

ROOT = Path(__file__).parent.parent
RECORDS = {"sample": sample, "empty": empty, "hostile": hostile}
every_record = pytest.mark.parametrize("record", [make() for make in RECORDS.values()], ids=RECORDS)

# What Markdown, GitHub, YAML, TOML, SARIF messages and spreadsheets each read as more than text.
PIECES = st.sampled_from(
    ["|", "`", "*", "_", "[a](http://x.io)", "![a](b)", "<b>", "&amp;", "@user", "#12", "GH-7", "www.x.io", "a@b.io"]
    + [
        "\n",
        "\r\n",
        "\t",
        "=1+1",
        "-1",
        "+1",
        ";",
        '"',
        "'",
        "\\",
        "~~",
        "$x$",
        "{0}",
        "{{7*7}}",
        "](",
        "---",
        "- ",
        "1. ",
    ]
    + ["\u202e", "\u2028", "\x85", "\x00", "😀", "é", "\uff1d", "<!--", "```", ": ", " #", "%41", "http://x.io"]
)
TEXT = st.lists(PIECES | st.text(max_size=4), max_size=12).map("".join)
few = settings(max_examples=20, deadline=None)


# --- SARIF ----------------------------------------------------------------------------------------------------

PARTS = {
    "runs": sarif_om.Run,
    "tool": sarif_om.Tool,
    "driver": sarif_om.ToolComponent,
    "rules": sarif_om.ReportingDescriptor,
    "notifications": sarif_om.ReportingDescriptor,
    "automationDetails": sarif_om.RunAutomationDetails,
    "invocations": sarif_om.Invocation,
    "toolExecutionNotifications": sarif_om.Notification,
    "toolConfigurationNotifications": sarif_om.Notification,
    "descriptor": sarif_om.ReportingDescriptorReference,
    "artifacts": sarif_om.Artifact,
    "location": sarif_om.ArtifactLocation,
    "artifactLocation": sarif_om.ArtifactLocation,
    "results": sarif_om.Result,
    "locations": sarif_om.Location,
    "physicalLocation": sarif_om.PhysicalLocation,
    "logicalLocations": sarif_om.LogicalLocation,
    "message": sarif_om.Message,
    "shortDescription": sarif_om.MultiformatMessageString,
    "fullDescription": sarif_om.MultiformatMessageString,
    "help": sarif_om.MultiformatMessageString,
}


def fits(value, kind):
    """Names and required properties, by classes that Microsoft generated from the published schema."""
    for part in value if isinstance(value, list) else [value]:
        known = {field.metadata["schema_property_name"]: field for field in attr.fields(kind)}
        assert set(part) <= set(known), (kind, set(part) - set(known))
        assert {name for name, field in known.items() if field.default is attr.NOTHING} <= set(part), kind
        for name, inner in part.items():
            if name in PARTS:
                fits(inner, PARTS[name])


def sarif_schema() -> Path | None:
    """OASIS's schema: no package carries it, and it is not ours to copy; beside the checkout, or where told."""
    places = [ROOT.parent / "shared" / "sarif-schema-2.1.0.json", Path(os.environ.get("SARIF_SCHEMA", "-"))]
    return next((path for path in places if path.is_file()), None)


def valid_sarif(text: str) -> dict:
    log = json.loads(text)
    fits(log, sarif_om.SarifLog)
    if (path := sarif_schema()) is not None:
        schema = json.loads(path.read_text("utf-8"))
        jsonschema.Draft4Validator(schema, format_checker=jsonschema.FormatChecker()).validate(log)
    (run,) = log["runs"]
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert len(rules) == len(set(rules))
    for result in run["results"]:
        assert rules[result["ruleIndex"]] == result["ruleId"]
        assert (result["kind"] == "fail") == (result["level"] != "none"), "SARIF 3.27.10"
        for place in result["locations"]:
            where = place.get("physicalLocation", {}).get("artifactLocation")
            assert where is None or run["artifacts"][where.pop("index")]["location"] == where
    (called,) = run["invocations"]
    known = {one["id"] for one in run["tool"]["driver"]["notifications"]}
    for notice in called["toolExecutionNotifications"] + called["toolConfigurationNotifications"]:
        assert notice["descriptor"]["id"] in known
    return run


@every_record
def test_sarif_is_valid(record):
    valid_sarif(render_sarif(record))


@pytest.mark.skipif(sarif_schema() is None, reason="no sarif-schema-2.1.0.json in ../shared, nor SARIF_SCHEMA")
def test_the_published_sarif_schema_would_object():
    schema = json.loads(sarif_schema().read_text("utf-8"))
    log = json.loads(render_sarif(sample()))
    log["runs"][0]["results"][0]["level"] = "alarming"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft4Validator(schema).validate(log)


def test_sarif_says_what_the_record_says():
    record = sample()
    run = valid_sarif(render_sarif(record))
    levels = [(result["kind"], result["level"]) for result in run["results"]]
    assert len(levels) == len(record.findings) == 19
    assert levels.count(("fail", "error")) == 4  # lens, probe, relearning, NF4
    assert levels.count(("fail", "warning")) == 2  # below never-taught, damage to neighbours
    assert levels.count(("open", "none")) == 5 and levels.count(("pass", "none")) == 8
    (called,) = run["invocations"]
    assert called["executionSuccessful"] is False
    crashed = [notice["descriptor"]["id"] for notice in called["toolExecutionNotifications"]]
    assert crashed == ["prune", "custom-plugin"]
    assert len(called["toolConfigurationNotifications"]) == 4 and called["endTimeUtc"] == "2026-03-14T09:26:53Z"
    weights = run["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]
    assert (weights["uri"], weights["uriBaseId"]) == ("model-1-of-2.safetensors", "TARGET")
    hashes = {(a["location"]["uriBaseId"], a["location"]["uri"]): a["hashes"]["sha-256"] for a in run["artifacts"]}
    for role, model in record.models.items():
        for file in model.files:
            assert hashes[role.upper(), file.path] == file.sha256
    rule = next(rule for rule in run["tool"]["driver"]["rules"] if rule["id"].startswith("lens/"))
    assert rule["helpUri"] == "https://arxiv.org/abs/2401.06121"


def test_evidence_that_is_no_alarm_is_no_failure_in_sarif():
    record = sample()
    record.findings = record.findings[:2]
    for finding, side in zip(record.findings, (Side.UNLEARNED, Side.NEITHER), strict=True):
        finding.verdict, finding.side = Outcome.EVIDENCE, side
    results = valid_sarif(render_sarif(record))["results"]
    assert [result["kind"] for result in results] == ["informational", "informational"]


@few
@given(TEXT)
def test_sarif_of_any_text(text):
    run = valid_sarif(render_sarif(hostile(text)))
    for result in run["results"]:
        message = result["message"]["text"]
        assert "](" not in message, "an embedded link"
        assert not re.search(r"(?<!\{)(\{\{)*\{(?!\{)", message), "a placeholder"
    paths = {unquote(artifact["location"]["uri"]) for artifact in run["artifacts"]}
    assert paths == {line(text)} and not re.search("[^!-~]", run["artifacts"][0]["location"]["uri"])


# --- CycloneDX ------------------------------------------------------------------------------------------------


def valid_bom(text: str) -> dict:
    wrong = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    assert wrong is None, str(wrong)[:300]
    return json.loads(text)


def test_the_published_cyclonedx_schema_would_object():
    bom = json.loads(render_mlbom(sample()))
    bom["components"][0]["type"] = "oracle"
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bom)) is not None


@every_record
def test_mlbom_is_valid(record):
    valid_bom(render_mlbom(record))


def test_mlbom_says_what_the_record_says():
    record = sample()
    bom = valid_bom(render_mlbom(record))
    (model,) = bom["components"]
    assert model["type"] == "machine-learning-model" and model["name"] == record.models["target"].name
    files = {file["name"]: file["hashes"][0]["content"] for file in model["components"]}
    assert files == {file.path: file.sha256 for file in record.models["target"].files}
    (ancestor,) = model["pedigree"]["ancestors"]
    assert ancestor["name"] == record.models["original"].name
    card = model["modelCard"]
    metrics = card["quantitativeAnalysis"]["performanceMetrics"]
    assert len(metrics) == len(record.findings)
    lens = next(metric for metric in metrics if metric["type"].startswith("lens/"))
    assert (lens["value"], lens["confidenceInterval"]) == ("0.89", {"lowerBound": "0.8", "upperBound": "0.95"})
    unknown = next(metric for metric in metrics if "Paraphrased" in metric["type"])
    assert unknown["value"] == "not computed" and "confidenceInterval" not in unknown
    told = card["considerations"]
    assert len(told["ethicalConsiderations"]) == 4 and len(told["performanceTradeoffs"]) == 1
    assert set(record.verdict.limits) <= set(told["technicalLimitations"])
    assert any("prune" in text for text in told["technicalLimitations"])
    written = hashlib.sha256(record.to_json().encode()).hexdigest()
    assert model["externalReferences"][0]["hashes"][0]["content"] == written
    assert re.fullmatch(
        r"urn:uuid:[0-9a-f]{8}-[0-9a-f]{4}-5[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", bom["serialNumber"]
    )


def test_another_record_has_another_serial_number():
    record = sample()
    serial = json.loads(render_mlbom(record))["serialNumber"]
    record.findings[3].p_value = 0.42
    assert json.loads(render_mlbom(record))["serialNumber"] != serial


def test_a_digest_that_is_none_is_left_out():
    record = sample()
    record.models["target"].files = [FileEntry(path="a", size=1, sha256="unknown")] * 2
    (model,) = valid_bom(render_mlbom(record))["components"]
    assert model["components"] == [{"type": "file", "name": "a", "hashes": []}]


@few
@given(TEXT)
def test_mlbom_of_any_text(text):
    valid_bom(render_mlbom(hostile(text)))


# --- CSV ------------------------------------------------------------------------------------------------------


def test_csv_carries_every_finding():
    record = sample()
    rows = list(csv.DictReader(io.StringIO(render_csv(record))))
    assert len(rows) == len(record.findings)
    for row, finding in zip(rows, record.findings, strict=True):
        low, high = finding.ci95
        for name, value in {
            "estimate": finding.estimate,
            "ci95_low": low,
            "ci95_high": high,
            "p_value": finding.p_value,
            "p_adjusted": finding.p_adjusted,
            "threshold": finding.threshold,
        }.items():
            assert (float(row[name]) if row[name] else None) == value, name
        assert (row["id"], row["verdict"], row["side"]) == (finding.id, finding.verdict.value, finding.side.value)
    remind = next(row for row in rows if row["instrument"] == "remind")
    assert (remind["controls_passed"], remind["controls_failed"]) == ("0", "1")
    assert remind["controls"] == "benign edits 0.710, failed, so no evidence can be claimed"
    first = next(row for row in rows if row["estimate"] == "-0.04")
    assert first["controls_passed"] == "2", "a negative number stays a number"


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r\n=1", " =1", "a;=cmd|' /C calc'!A0", "\uff1d1"]
)
def test_no_cell_is_a_formula(text):
    for delimiter in (",", ";", "\t"):  # as spreadsheets of other locales cut it
        for row in csv.reader(io.StringIO(render_csv(hostile(text))), delimiter=delimiter):
            for cell in row:
                known = re.fullmatch(r"-?[\d.e-]*", cell)
                assert known or cell.lstrip(' "')[:1] not in tuple("=+-@\t\r\uff1d"), (delimiter, cell)


def test_harmless_text_is_left_alone():
    for text in ("greedy answer accuracy", "a - b = c", "loss, +1 a step", "é 😀"):
        assert guarded(text) == text


@few
@given(TEXT)
def test_csv_of_any_text(text):
    rows = list(csv.reader(io.StringIO(render_csv(hostile(text)))))
    assert len(rows) == 20 and {len(row) for row in rows} == {len(rows[0])}


# --- Markdown and the model card ------------------------------------------------------------------------------

MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])
OWN = re.compile(r"</?(span|details|summary)>|<br>|<details><summary>[\w ]+ \(\d+\)</summary>\n?|</details>\n?")


def checked_markdown(text: str) -> str:
    """What a reader sees; nothing but text, tables, headings and the marks that these pages make themselves."""
    cells, seen = None, []
    for token in MARKDOWN.parse(text):
        if token.type == "tr_open":
            cells = 0
        elif token.type in ("th_open", "td_open"):
            cells += 1
        elif token.type == "html_block":
            assert OWN.fullmatch(token.content), token.content
        assert token.type not in ("fence", "code_block", "blockquote_open", "ordered_list_open"), token
        for inner in token.children or []:
            assert inner.type not in ("link_open", "image", "s_open", "em_open", "hardbreak"), inner
            if inner.type == "html_inline":
                assert OWN.fullmatch(inner.content), inner.content
            elif inner.content:
                seen.append(inner.content)
    text = "".join(seen)
    assert not re.search(r"@\w|#\d|\b[Gg][Hh]-\d|\w://|\bwww\.", text), "GitHub would make a link or a mention of it"
    return text


@every_record
@pytest.mark.parametrize("render", [render_markdown, render_mapping], ids=["summary", "mapping"])
def test_markdown_is_text(record, render):
    text = checked_markdown(render(record))
    assert words.LABELS[record.verdict.label][0] in text and "This is evidence, and not legal advice." in text


def test_summary_says_what_the_record_says():
    text = checked_markdown(render_markdown(sample()))
    for sentence in (
        "Of 3 findings: knowledge remains in 2, nothing found in 1; 2 instruments did not run.",
        "at most 6.40 % with 95 % confidence, measured on 45 models",
        "0.890 [0.800, 0.950] accuracy",
        "RuntimeError: shapes cannot be multiplied (9x8 and 7x2)",
        "Silent and inconclusive (13)",
        *sample().verdict.limits,
    ):
        assert sentence in text + render_markdown(sample()), sentence
    assert render_markdown(sample()).count("| crashed |") == 2


def test_hostile_text_is_shown_as_it_is():
    text = checked_markdown(render_markdown(hostile()))
    assert "</script><img src=x onerror=alert(1)>" in text and "⟦U+202E⟧" in text


@settings(max_examples=300, deadline=None)
@given(TEXT)
def test_escaped_text_reads_as_itself(text):
    """In a cell, in a list, and at the start of a paragraph."""
    for frame, before in (("{}", ""), ("- {}", ""), ("| head |\n| --- |\n| {} |", "head")):
        seen = checked_markdown(frame.format(escaped(text)))
        assert " ".join(seen.replace("\u200b", "").split()) == before + line(text), frame


def front_matter(text: str) -> dict:
    head = text.split("---\n")[1]
    return yaml.safe_load(head)


@every_record
def test_model_card_is_read_by_hugging_face(record):
    text = render_model_card(record)
    name, results = model_index_to_eval_results(front_matter(text)["model-index"])
    estimates = [finding.estimate for finding in record.findings if finding.estimate is not None]
    assert sorted(one.metric_value for one in results) == sorted(estimates)
    named = record.models["target"].name if record.models else record.case.name
    assert name == line(named, NAME)
    checked_markdown(text.split("---\n", 2)[2])


def test_model_card_carries_intervals():
    _, results = model_index_to_eval_results(front_matter(render_model_card(sample()))["model-index"])
    lens = next(one for one in results if one.metric_type.startswith("lens/"))
    assert lens.metric_value == 0.89 and lens.metric_args["ci95"] == [0.8, 0.95]
    assert lens.metric_args["verdict"] == "evidence" and lens.dataset_name == "forget vs holdout"


@few
@given(TEXT)
def test_pages_of_any_text(text):
    record = hostile(text)
    checked_markdown(render_markdown(record))
    checked_markdown(render_mapping(record))
    card = render_model_card(record)
    assert front_matter(card)["model-index"][0]["name"] == line(text, NAME)
    checked_markdown(card.split("---\n", 2)[2])


# --- mapping --------------------------------------------------------------------------------------------------


def passage(text: str, title: str) -> list[str]:
    """The rows of one passage's table."""
    part = text.split(f"### {title}\n")[1].split("\n### ")[0]
    return [row for row in part.splitlines() if row.startswith("| ")][2:]


def test_mapping_groups_the_findings():
    text = render_mapping(sample()).replace("\\", "")
    erased = passage(text, "GDPR Article 17(1)")
    assert len(erased) == 5 and "Suppressed" in erased[0]
    inside = next(row for row in erased if "still inside" in row)
    assert "**knowledge remains** in 2: lens/logit-lens-read-out,-best-layer, probe/linear-probe" in inside
    assert "did not run: uds-retrained, sae" in inside
    attacks = passage(text, "EDPB Opinion 28/2024 of 17 December 2024, section 3.2: testing and resistance to attacks")
    inversion = next(row for row in attacks if row.startswith("| model inversion"))
    assert "**not tested**: no instrument here" in inversion
    assert sum("**not tested**" in row for row in attacks) == 4  # and exfiltration, which the sample did not try
    utility = passage(text, "Article 15(1) and (3)")
    assert "**damage** in 1: utility/neighbor-accuracy,-against-original" in utility[0]


def test_mapping_of_an_empty_record_claims_nothing():
    for title in (one.cited for framework in FRAMEWORKS.values() for one in framework.passages):
        for row in passage(render_mapping(empty()), title):
            assert "knowledge remains" not in row and "nothing found" not in row
    assert render_mapping(empty()).count("**not tested**") == sum(
        topic.told is None for framework in FRAMEWORKS.values() for one in framework.passages for topic in one.topics
    )


def test_mapping_can_be_of_some_frameworks():
    text = render_mapping(sample(), ["nist"])
    assert "MEASURE 2.10" in text and "Regulation (EU)" not in text


def test_mapping_names_instruments_that_exist():
    source = "".join(
        path.read_text("utf-8") for room in ("attacks", "detectors", "probes") for path in (ROOT / room).glob("*.py")
    )
    known = set(re.findall(r'^    name = "([\w-]+)"$', source, re.MULTILINE))
    named = {
        name
        for framework in FRAMEWORKS.values()
        for one in framework.passages
        for topic in one.topics
        for name in topic.instruments
    }
    assert named <= known, named - known


# --- all of them ----------------------------------------------------------------------------------------------


def test_same_record_same_bytes_and_no_torch(tmp_path):
    path = tmp_path / "record.json"
    sample().write(path)
    code = (
        "import sys, hashlib; from pathlib import Path; from audit.record import Record\n"
        "from reports.faces.registry import FACES\n"
        "from audit.policy import check, emit, to_toml\n"
        "record = Record.read(Path(sys.argv[1])); policy = emit(record)\n"
        "pages = [face.render(record) for face in FACES.values()]\n"
        "pages += [to_toml(policy), check(policy, record).to_json()]\n"
        "assert not {'torch', 'transformers', 'pandas', 'numpy', 'yaml'} & set(sys.modules)\n"
        "print(hashlib.sha256(''.join(pages).encode()).hexdigest())"
    )
    told = set()
    for seed in ("1", "77"):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed, "TZ": "Asia/Tokyo"}
        done = subprocess.run([sys.executable, "-c", code, str(path)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        told.add(done.stdout)
    assert len(told) == 1


@pytest.mark.parametrize("name", FACES)
def test_equal_records_in_another_order_give_equal_bytes(name):
    record, page = sample(), FACES[name].render(sample())
    for owner, field in (
        (record, "models"),
        (record.case, "sets"),
        (record.case, "options"),
        (record.environment, "packages"),
        (record.verdict, "coverage"),
    ):
        setattr(owner, field, dict(reversed(getattr(owner, field).items())))
    assert FACES[name].render(record) == page


@pytest.mark.parametrize("name", FACES)
def test_what_utf8_cannot_hold_is_shown(name):
    """A record read from JSON may hold half of a surrogate pair."""
    page = FACES[name].render(hostile("half \ud800 of a pair"))
    assert page.encode() and (name == "mapping" or "⟦U+D800⟧" in page)


def run(*words: object):
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def test_report_writes_faces(tmp_path):
    sample().write(tmp_path / "record.json")
    assert run("report", tmp_path, "--as", "markdown,sarif,csv,card,mlbom").exit_code == 0
    files = {"record.json", "summary.md", "findings.sarif", "findings.csv", "model-card.md", "mlbom.cdx.json"}
    assert {path.name for path in tmp_path.iterdir()} == files
    assert (tmp_path / "findings.csv").read_bytes() == render_csv(sample()).encode()
    assert run("report", tmp_path, "--mapping", "gdpr", "--out", tmp_path / "law").exit_code == 0
    assert (tmp_path / "law" / "mapping.md").read_text("utf-8") == render_mapping(sample(), ["gdpr"])


@pytest.mark.parametrize(("option", "value"), [("--as", "pdf"), ("--as", ","), ("--mapping", "ccpa")])
def test_what_is_no_face_is_named(tmp_path, option, value):
    sample().write(tmp_path / "record.json")
    done = run("report", tmp_path, option, value)
    assert isinstance(done.exception, BadInput) and option in str(done.exception)


def test_a_signed_folder_is_not_added_to(tmp_path):
    (tmp_path / ATTESTATION).write_text("{}")
    with pytest.raises(BadInput, match="signed"):
        write_faces(sample(), "csv", tmp_path)
    assert not (tmp_path / "findings.csv").exists()
    (tmp_path / "findings.csv").write_bytes(render_csv(sample()).encode())
    write_faces(sample(), "csv", tmp_path)  # the same bytes again alter nothing
    write_faces(sample(), "csv", tmp_path / "elsewhere")
