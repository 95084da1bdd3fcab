"""The command line as a user meets it: exit codes, one line where something is wrong, no torch where none is needed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import jsonschema
import pytest
from worlds import REPO, audit, audit_here, build_tiny, environment

from audit.case import SETS, Case, Options, read_case
from audit.record import SCHEMA_VERSION, Question, Record

HEAVY = ("torch", "transformers", "transformer_lens", "sklearn", "scipy", "pandas", "datasets", "statsmodels")


@cache
def cli_scan() -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One scan through the command line, of a model that was never unlearned."""
    out = build_tiny().folder / "by-command-line"
    return out, audit(*scan_words(out))


def scan_words(out: Path, *more: str | Path) -> list[str | Path]:
    tiny = build_tiny()
    sets = [word for name in ("forget", "retain", "holdout") for word in (f"--{name}", tiny.sets[name])]
    return ["scan", tiny.models["original"], *sets, "--out", out, "--only", "memorization", "--budget", "quick",
            "--template", "plain", "--device", "cpu", *more]  # fmt: skip


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that says what was wrong; above it at most the steps that were begun."""
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    said = [line for line in lines if line.startswith("audit: ")]
    assert said == lines[-1:], done.stderr
    assert all(line.endswith("…") for line in lines[:-1]), done.stderr
    return said[0]


# --- exit codes


def test_evidence_is_exit_1_and_the_record_is_written():
    out, done = cli_scan()
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    record = Record.read(out)
    assert record.verdict.label.value == "not-unlearned"
    assert str((out / "report.html").resolve()) in done.stdout
    assert "not-unlearned" in done.stdout.lower().replace(" ", "-")
    assert record.tool.command.startswith("audit scan ")
    assert {path.name for path in out.iterdir()} == {"record.json", "report.html", "case.toml", "evidence"}


def test_never_fails_on_never_and_the_resolved_case_is_the_same_case():
    out, _ = cli_scan()
    expected = Record.read(out).comparable()
    done = audit("scan", "--case", out / "case.toml", "--out", out, "--fail-on", "never")
    assert done.returncode == 0, done.stderr
    again = Record.read(out)
    assert again.comparable() == expected
    assert again.cost.forward_tokens == 0


@pytest.mark.parametrize(
    ("made", "fail_on", "code"),
    [("original", "inconclusive", 1), ("original", "evidence", 1), ("retrained", "evidence", 0)],
)
def test_fail_on(monkeypatch, made, fail_on, code):
    out, _ = cli_scan()
    words = scan_words(out if made == "original" else out.with_name("by-command-line-too"), "--fail-on", fail_on)
    words[1] = build_tiny().models[made]
    assert audit_here(monkeypatch, *words) == code


def test_json_is_the_record_and_nothing_else(monkeypatch, capsys):
    out, _ = cli_scan()
    assert audit_here(monkeypatch, *scan_words(out, "--json", "--fail-on", "never")) == 0
    said = capsys.readouterr().out
    assert said == (out / "record.json").read_text()
    assert Record.model_validate_json(said).schema_version == SCHEMA_VERSION


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["scan", "--nope"], "--nope"),
        (["nope"], "nope"),
        (["scan"], "no target model"),
        (["scan", "MODEL", "--fail-on", "sometimes"], "'sometimes' is none of"),
        (["scan", "MODEL", "--budget", "huge"], "'huge' is none of quick, standard, thorough"),
        (["scan", "MODEL", "--access", "root"], "'root'"),
        (["scan", "MODEL", "--template", "Q:"], "{prompt}"),
        (["scan", "MODEL", "--seed", "-1"], "--seed"),
        (["scan", "MODEL", "--dtype", "int4"], "'int4'"),
        (["scan", "MODEL", "--forget", "FOLDER/nothing.jsonl"], "nothing.jsonl"),
        (["scan", "MODEL", "--forget", "FORGET?colour=red"], "colour"),
        (["scan", "MODEL", "--forget", "FORGET?limit=x"], "limit"),
        (["scan", "MODEL", "--only", "memorisation"], "did you mean 'memorization'"),
        (["scan", "MODEL", "--skip", "lense"], "did you mean 'lens'"),
        (["scan", "--case", "FOLDER/nothing.toml"], "nothing.toml"),
        (["attack", "relern", "MODEL"], "did you mean 'relearn'"),
        (["report", "FOLDER"], "record.json"),
        (["inventory", "FOLDER/nothing"], "nothing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage_and_bad_input_are_exit_2_and_one_line(tmp_path, words, named):
    tiny = build_tiny()
    told = {"MODEL": str(tiny.models["original"]), "FORGET": str(tiny.sets["forget"]), "FOLDER": str(tmp_path)}
    for placeholder, value in told.items():
        words = [word.replace(placeholder, value) for word in words]
    done = audit(*words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert named in complaint(done)
    assert done.stdout == ""


BAD_CASES = [
    ("name = ", "not TOML"),
    ("colour = 1", "unknown key 'colour'"),
    ("models = 1", "[models] must be a table"),
    ("[models]\nteacher = 'x'", "teacher"),
    ("[models]\ntarget = 1", "target"),
    ("[models]\ntarget = 'x'\n[sets]\nforgotten = 'x.jsonl'", "unknown set 'forgotten'"),
    ("[models]\ntarget = 'x'\n[sets]\nforget = 1", "[sets] forget"),
    ("[models]\ntarget = 'x'\n[sets]\nforget = { path = 'x', colour = 1 }", "colour"),
    ("[models]\ntarget = 'x'\n[options]\ncolour = 1", "unknown option 'colour'"),
    ("[models]\ntarget = 'x'\n[options]\nseed = 'x'", "seed"),
    ("[models]\ntarget = 'x'\n[options]\nbudget = 3", "budget"),
    ("[models]\ntarget = 'x'\n[options]\ntemplate = 3", "template"),
    ("[models]\ntarget = 'x'\n[options]\nonly = 3", "only"),
    ("[models]\ntarget = 'x'\n[options]\nskip = [1]", "skip"),
    ("[models]\ntarget = 'x'\n[sets]\nforget = { path = 'x', limit = 'ten' }", "limit"),
    ("[models]\ntarget = 'x'\n[sets]\nforget = { path = 'x', columns = 3 }", "columns"),
    ("[models]\ntarget = 'x'\n[sets]\nforget = { path = 'data.jsonl', where = 3 }", "where"),
]


@pytest.mark.parametrize(("text", "named"), BAD_CASES)
def test_a_bad_case_file_is_named(tmp_path, text, named, monkeypatch, capsys):
    """In this process: the messages are what matters, and there are many."""
    (tmp_path / "data.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    path = tmp_path / "case.toml"
    path.write_text(text)
    assert audit_here(monkeypatch, "scan", "--case", path, "--out", tmp_path / "out") == 2
    [said] = capsys.readouterr().err.strip().splitlines()
    assert said.startswith("audit: ")
    assert named in said


def test_a_folder_with_a_pickle_is_exit_3_and_named(tmp_path):
    folder = tmp_path / "hostile"
    shutil.copytree(build_tiny().models["original"], folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch owned'\ntR.")
    done = audit("scan", folder, "--forget", build_tiny().sets["forget"], "--out", tmp_path / "out")
    assert done.returncode == 3
    assert "pytorch_model.bin" in complaint(done)
    assert not (tmp_path / "out").exists()
    done = audit("inventory", folder)
    assert done.returncode == 3
    assert "pytorch_model.bin" in complaint(done)


def test_a_plug_in_that_crashes_is_exit_4_and_its_record_is_written(tmp_path):
    """A third party's distribution, as pip would leave it: a module, and metadata with an entry point."""
    site = tmp_path / "site"
    metadata = site / "clumsy-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: clumsy\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[palimpsest.instruments]\nclumsy = clumsy:Clumsy\n")
    (site / "clumsy.py").write_text(
        "from audit.instrument import Instrument\nfrom audit.record import Question\n"
        "class Clumsy(Instrument):\n"
        "    name, title, question, reference = 'clumsy', 'Clumsy', Question.TRACE, 'nobody 2024'\n"
        "    def requests(self, case, target): return []\n"
        "    def measure(self, case, evidence): raise OSError('dropped it')\n"
    )
    out = tmp_path / "out"
    done = audit(*scan_words(out, "--only", "memorization,clumsy", "--fail-on", "never"), PYTHONPATH=str(site))
    assert done.returncode == 4, done.stderr
    assert "clumsy failed" in complaint(done)
    record = Record.read(out)
    [row] = record.not_run
    assert (row.instrument, row.failed, row.question) == ("clumsy", True, Question.TRACE)
    assert "dropped it" in row.reason
    assert len(record.findings) == 3
    assert (out / "report.html").is_file(), "what did run is still reported"


# --- without torch


def imported(*words: str | Path) -> set[str]:
    """What a command has imported by its end."""
    probe = (
        "import json, sys, contextlib, io\n"
        f"sys.argv = {['audit', *map(str, words)]!r}\n"
        "import cli\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):\n"
        "    try: cli.main()\n"
        "    except SystemExit as left: code = left.code or 0\n"
        "print(json.dumps([code, sorted({name.split('.')[0] for name in sys.modules})]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=REPO, env=environment(), capture_output=True, text=True, check=True
    )
    code, modules = json.loads(done.stdout)
    assert code == 0
    return set(modules)


@pytest.mark.parametrize("command", ["--help", "report", "inventory", "schema", "init", "scan --help", "list"])
def test_what_needs_no_torch_imports_none(command, tmp_path):
    if command == "report":
        shutil.copy(cli_scan()[0] / "record.json", tmp_path)
    words = {
        "report": ["report", tmp_path],
        "inventory": ["inventory", build_tiny().models["original"]],
        "init": ["init", tmp_path / "case.toml"],
    }.get(command, command.split())
    assert not {"torch", "transformers", "transformer_lens"} & imported(*words)


@pytest.mark.parametrize("command", ["--help", "schema"])
def test_what_needs_no_numbers_imports_none(command):
    assert not set(HEAVY) & imported(command)


# --- what they print


def test_help_names_every_command():
    done = audit("--help")
    assert done.returncode == 0
    for command in ("scan", "attack", "demo", "list", "inventory", "report", "schema", "init"):
        assert f" {command} " in done.stdout
    assert audit("scan", "--help").returncode == 0


def test_init_writes_a_case_that_can_be_read(tmp_path):
    done = audit("init", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    name, models, specs, raw = read_case(tmp_path / "case.toml")
    assert name
    assert set(models) == {"target"}
    assert set(specs) <= set(SETS)
    assert {"forget", "retain", "holdout"} <= set(specs)
    assert all(spec.path.parent == tmp_path for spec in specs.values())
    assert Options.parse(raw, "case.toml") == Options(), "the template states the defaults"
    text = (tmp_path / "case.toml").read_text()
    uncommented = "\n".join(
        line.removeprefix("# ") if line.startswith("# ") and " = " in line and "{" not in line else line
        for line in text.splitlines()
    )
    (tmp_path / "all.toml").write_text(uncommented)
    _, models, specs, raw = read_case(tmp_path / "all.toml")
    assert set(models) == {"target", "original", "retrained"}
    assert Options.parse(raw, "all.toml").only == ("knowledge", "relearn")
    again = audit("init", cwd=tmp_path)
    assert again.returncode == 2
    assert "exists already" in complaint(again)
    assert (tmp_path / "case.toml").read_text() == text


def test_an_initialised_case_can_be_filled_in_and_loaded(tmp_path):
    tiny = build_tiny()
    audit("init", tmp_path / "case.toml")
    text = (tmp_path / "case.toml").read_text().replace("path/to/unlearned-model", str(tiny.models["unlearned"]))
    for name in ("forget", "retain", "holdout"):
        shutil.copy(tiny.sets[name], tmp_path / f"{name}.jsonl")
    (tmp_path / "case.toml").write_text(text)
    name, models, specs, raw = read_case(tmp_path / "case.toml")
    case = Case.build(models, specs, Options.parse(raw, "case.toml"), name)
    assert len(case.sets["forget"]) == 72


def test_schema_validates_a_real_record_and_no_other():
    done = audit("schema")
    assert done.returncode == 0
    schema = json.loads(done.stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    data = json.loads((cli_scan()[0] / "record.json").read_text())
    assert list(validator.iter_errors(data)) == []
    data["findings"][0]["verdict"] = "guilty"
    del data["verdict"]
    data["extra"] = 1
    assert len(list(validator.iter_errors(data))) == 3


def test_report_renders_the_same_bytes_again(tmp_path):
    out, _ = cli_scan()
    before = (out / "report.html").read_bytes()
    done = audit("report", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str((out / "report.html").resolve())
    assert (out / "report.html").read_bytes() == before
    elsewhere = audit("report", out / "record.json", "--out", tmp_path)
    assert elsewhere.returncode == 0
    assert (tmp_path / "report.html").read_bytes() == before


def test_list_and_its_json_agree(monkeypatch, capsys):
    assert audit_here(monkeypatch, "list", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    questions = [row["question"] for row in rows]
    order = [question.value for question in Question]
    assert questions == sorted(questions, key=order.index)
    table = audit("list").stdout
    for row in rows:
        assert row["name"] in table
        assert {"name", "kind", "title", "question", "access", "sets", "roles", "reference"} == set(row)


def test_inventory_prints_digests():
    folder = build_tiny().models["original"]
    data = json.loads(audit("inventory", folder, "--json").stdout)
    entry = Record.read(cli_scan()[0]).models["target"]
    assert data["digest"] == entry.digest
    assert {file["path"] for file in data["files"]} == {path.name for path in folder.iterdir()}
    table = audit("inventory", folder).stdout
    assert entry.digest in table
    assert "model.safetensors" in table


# --- attacks


@pytest.mark.parametrize("name", ["knowledge", "lens"])
def test_what_is_no_attack_is_told_how_to_run(name, monkeypatch, capsys):
    tiny = build_tiny()
    assert audit_here(monkeypatch, "attack", name, tiny.models["original"], "--forget", tiny.sets["forget"]) == 2
    assert f"audit scan --only {name}" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["rwku", "relearn-lora"])
def test_an_attack_that_lacks_something_is_bad_input(name, tmp_path, monkeypatch, capsys):
    """Those by prompts are attacks as those on weights are: asked for alone, one that cannot run is no clean scan."""
    code = audit_here(monkeypatch, "attack", name, build_tiny().models["original"], "--out", tmp_path / "out")
    assert code == 2
    assert f"{name}: needs the forget" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
