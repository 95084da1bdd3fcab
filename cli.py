"""The command line: parse, call, print. Nothing is measured, judged or drawn here.

Only what a command needs is imported, so that `--help`, `list`, `inventory`, `schema` and `report` start without
torch.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audit.bench.commands import bench, calibrate, organisms
from audit.errors import AuditError, Incomplete
from audit.terminal import bars, interruptible, stages
from audit.terminal import err as _err
from audit.terminal import out as _out
from reports.commands import check, diff, keygen, note, sign, verify

if TYPE_CHECKING:
    from collections.abc import Mapping

    from audit.case import Case
    from audit.endpoint.address import Endpoint
    from audit.fleet.file import Job
    from audit.fleet.shelf import Failure
    from audit.progress import Tick
    from audit.record import Outcome, Record
    from reports.fleet import Row

app = typer.Typer(
    name="audit",
    help="Palimpsest: is it forgotten, how do we know, how sure are we, and what could not be tested?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(organisms, name="organisms")
app.command()(bench)
app.command()(calibrate)
app.command()(diff)
app.command()(check)
app.command()(sign)
app.command()(verify)
app.command()(note)
app.command()(keygen)

_INTERRUPTED = 130

OptionalPath = Path | None
Allow = Annotated[
    list[str] | None,
    typer.Option(help="FILE:REASON, a file that would be refused and is let pass; the refusal says it; repeatable"),
]
SetOption = Annotated[
    str | None,
    typer.Option(help="PATH or PATH?key=value&…: limit, offset, preset, columns, passage_words; others filter rows"),
]


def main() -> None:
    """Entry point: errors made on purpose are one line and an exit code, never a traceback."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client, which reads it once
    # Threads that spin while they wait for each other slow small models manifold on a machine with other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        # Outside its standalone mode Typer returns the code of a `typer.Exit` instead of leaving with it.
        code = app(standalone_mode=False) or 0
        sys.stdout.flush()  # here, where a full disk is an error like any other
        if code == _INTERRUPTED:  # Typer makes this of Ctrl-C
            raise KeyboardInterrupt
        sys.exit(code)
    except AuditError as error:
        _fail(str(error), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted; what was captured is kept, the same command goes on from there", _INTERRUPTED)
    except MemoryError:
        _fail("out of memory; what was captured is kept, the same command goes on from there", 4)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 4)
    except Exception as error:  # Typer and Click signal bad usage by exceptions of their own
        exit_code = getattr(error, "exit_code", None)
        if exit_code is None:
            raise
        show = getattr(error, "format_message", None)
        if show is not None and str(show()):
            _fail(str(show()), int(exit_code))
        sys.exit(int(exit_code))


def _fail(message: str, code: int) -> None:
    from reports.escape import one_line

    _err.print(f"audit: {one_line(message, 2000)}", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)


# --- scan ---------------------------------------------------------------------------------------------------


@app.command()
def scan(
    model: Annotated[OptionalPath, typer.Argument(metavar="MODEL_DIR", help="the model under audit")] = None,
    case: Annotated[OptionalPath, typer.Option(help="case.toml; flags override it")] = None,
    forget: SetOption = None,
    retain: SetOption = None,
    holdout: SetOption = None,
    neighbor: SetOption = None,
    utility: SetOption = None,
    suspects: SetOption = None,
    columns: Annotated[str | None, typer.Option(help="for all sets: prompt:question,answer:answer,…")] = None,
    original: Annotated[OptionalPath, typer.Option(help="the model before unlearning")] = None,
    retrained: Annotated[OptionalPath, typer.Option(help="trained the same way without the forget set")] = None,
    out: Annotated[Path, typer.Option(help="where record, report and evidence go")] = Path("audit-out"),
    only: Annotated[str | None, typer.Option(help="instruments to run, by name, comma-separated")] = None,
    skip: Annotated[str | None, typer.Option(help="instruments not to run")] = None,
    access: Annotated[str | None, typer.Option(help="text, logprobs or weights")] = None,
    template: Annotated[str | None, typer.Option(help="auto, chat, qa, plain or text with {prompt}")] = None,
    budget: Annotated[str | None, typer.Option(help="quick, standard or thorough")] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16")] = None,
    memory: Annotated[str | None, typer.Option(help="bound, such as 8GB: weights beyond it are read in parts")] = None,
    fail_on: Annotated[str, typer.Option(help="exit 1 at: evidence, inconclusive (or evidence), never")] = "evidence",
    as_json: Annotated[bool, typer.Option("--json", help="print the record")] = False,
    spike: Annotated[bool, typer.Option("--spike", help="also look for facts planted in copies of this model")] = False,
    profile: Annotated[OptionalPath, typer.Option(help="reference profile to judge by, see `audit calibrate`")] = None,
    policy: Annotated[
        OptionalPath, typer.Option(help="policy.toml: exit 1 if it fails, whatever --fail-on says")
    ] = None,
    emit_policy: Annotated[OptionalPath, typer.Option(help="write a policy: no worse than this audit")] = None,
    endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="audit a model behind an OpenAI-compatible API instead")
    ] = None,
    served: Annotated[str | None, typer.Option("--model", metavar="NAME", help="its name there")] = None,
    api: Annotated[str | None, typer.Option(help="completions, chat or auto")] = None,
    tokenizer: Annotated[OptionalPath, typer.Option(help="its tokenizer, for log-probabilities")] = None,
    token_budget: Annotated[
        int | None, typer.Option(min=1, help="tokens that it may be sent and write, in all")
    ] = None,
    allow: Allow = None,
) -> None:
    """Audit a model folder, or a model behind an API: verdict, record.json and report.html."""
    sets = {"forget": forget, "retain": retain, "holdout": holdout}
    sets |= {"neighbor": neighbor, "utility": utility, "suspects": suspects}
    behind = {"endpoint": endpoint, "model": served, "api": api, "tokenizer": tokenizer, "token_budget": token_budget}
    models = {"target": _target(model, behind), "original": original, "retrained": retrained}
    options = {
        "only": only,
        "skip": skip,
        "access": access,
        "template": template,
        "budget": budget,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "memory": memory,
        "allow": allow or None,
    }
    built = _build_case(case, models, sets, columns, options)
    if spike:
        built.folder("target")  # copies of it are taught
    policies = {"policy": policy, "emit_policy": emit_policy}
    _audit(built, out, fail_on=fail_on, as_json=as_json, spike=spike, profile=profile, **policies)


@app.command()
def attack(
    name: Annotated[str, typer.Argument(help="an attack, see `audit list`")],
    model: Annotated[OptionalPath, typer.Argument(metavar="MODEL_DIR")] = None,
    case: Annotated[OptionalPath, typer.Option(help="case.toml")] = None,
    forget: SetOption = None,
    retain: SetOption = None,
    holdout: SetOption = None,
    original: Annotated[OptionalPath, typer.Option()] = None,
    retrained: Annotated[OptionalPath, typer.Option()] = None,
    out: Annotated[Path, typer.Option()] = Path("audit-out"),
    budget: Annotated[str | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    fail_on: Annotated[str, typer.Option()] = "evidence",
    as_json: Annotated[bool, typer.Option("--json")] = False,
    allow: Allow = None,
) -> None:
    """Run one attack alone, as a scan would."""
    from audit.errors import BadInput
    from audit.instrument import is_attack, load

    asked = load(name)
    if not is_attack(asked):
        raise BadInput(f"{name!r} is no attack (see `audit list`); run it with `audit scan --only {name}`")
    sets = {"forget": forget, "retain": retain, "holdout": holdout}
    models = {"target": model, "original": original, "retrained": retrained}
    options = {"only": name, "budget": budget, "seed": seed, "allow": allow or None}
    built = _build_case(case, models, sets, None, options)
    if reason := asked.missing(built):
        raise BadInput(f"{name}: {reason}")
    _audit(built, out, fail_on=fail_on, as_json=as_json)


def _target(folder: Path | None, behind: dict[str, Any]) -> Path | Endpoint | None:
    """The model under audit as the flags name it: a folder, or an endpoint; None if the case is to say."""
    from audit.endpoint.address import Endpoint
    from audit.errors import BadInput

    given = {
        key: str(value) if isinstance(value, Path) else value for key, value in behind.items() if value is not None
    }
    if not given:
        return folder
    if folder is not None:
        raise BadInput("a model folder and an endpoint: which of them is the target?")
    return Endpoint.parse(given, "command line", Path())


def _build_case(
    path: Path | None,
    models: Mapping[str, Path | Endpoint | None],
    sets: dict[str, str | None],
    columns: str | None,
    options: dict[str, Any],
) -> Case:
    """The case file, overridden by the flags."""
    from audit.case import Case, Options, read_case
    from audit.loaders import parse_set_spec

    name, known, specs, raw = read_case(path) if path is not None else ("", {}, {}, {})
    known |= {role: folder for role, folder in models.items() if folder is not None}
    for set_name, text in sets.items():
        if text is not None:
            glue = "&" if "?" in text else "?"
            specs[set_name] = parse_set_spec(text + (f"{glue}columns={columns}" if columns else ""))
    raw |= {key: value for key, value in options.items() if value is not None}
    return Case.build(known, specs, Options.parse(raw, str(path) if path else "command line"), name)


def _audit(
    case: Case,
    out: Path,
    *,
    fail_on: str,
    as_json: bool,
    spike: bool = False,
    profile: Path | None = None,
    policy: Path | None = None,
    emit_policy: Path | None = None,
) -> None:
    """Scan, report, print, and leave with the exit code the result asks for."""
    from audit.policy import alarms, check, emit, read_policy, write_policy

    alarming = alarms(fail_on)
    rules = None if policy is None else read_policy(policy)
    record = _scan_and_report(case, out, show=not as_json, spike=spike, profile=profile)
    if as_json:
        sys.stdout.write(record.to_json())
    if emit_policy is not None:
        write_policy(emit(record), emit_policy)
    if rules is not None:
        from reports.policy_text import policy_summary

        result = check(rules, record)
        result.write(out)
        if not as_json:
            _out.print(policy_summary(result))
        if not result.passed:
            raise typer.Exit(1)
    failed = [n for n in record.not_run if n.failed]
    if failed:
        raise Incomplete(
            f"incomplete: {', '.join(n.instrument for n in failed)} failed (reasons in {out / 'record.json'})"
        )
    if rules is None and any(f.verdict in alarming for f in record.findings):
        raise typer.Exit(1)


def _scan_and_report(case: Case, out: Path, *, show: bool, spike: bool, profile: Path | None) -> Record:
    from audit.profile import read_profile
    from audit.scan import scan as run_scan
    from reports.html import write_report
    from reports.text import summary

    profiles = None if profile is None else [read_profile(profile)]
    command = shlex.join(["audit", *sys.argv[1:]])
    with interruptible(), bars() as progress:
        record = run_scan(case, out, progress=progress, command=command, profiles=profiles)
        if spike:
            from audit.spike import spike_in

            record = spike_in(record, case, out, progress=progress, profiles=profiles)
        with progress.step("report", 1) as tick:
            page = write_report(record, out)
            tick(1)
    if show:
        _out.print(summary(record))
        _out.print(f"report: {page.resolve()}", markup=False, highlight=False, soft_wrap=True)
    return record


# --- fleet --------------------------------------------------------------------------------------------------


@app.command()
def fleet(
    file: Annotated[Path, typer.Argument(metavar="FLEET.toml", help="which models on which cases")],
    out: Annotated[str, typer.Option(help="where results go: a folder, or an address fsspec knows")] = "audit-fleet",
    address: Annotated[
        str | None, typer.Option(envvar="RAY_ADDRESS", help="of a Ray cluster; else one of this machine alone")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="jobs at a time; else one a processor")] = None,
    work: Annotated[str | None, typer.Option(help="folder on every node for evidence, to be kept")] = None,
    only_report: Annotated[bool, typer.Option("--only-report", help="draw the page of what is there")] = False,
    fail_on: Annotated[str, typer.Option(help="exit 1 at: evidence, inconclusive (or evidence), never")] = "evidence",
) -> None:
    """Audit many models on many cases, on Ray: a record each, and one page about all."""
    from audit.fleet.file import read_fleet
    from audit.fleet.shelf import Shelf
    from audit.policy import alarms
    from reports.fleet import FACES, Fleet

    alarming, asked, shelf = alarms(fail_on), read_fleet(file), Shelf(out)
    if not only_report:
        from audit.fleet.run import run
        from reports.html import render_html

        faces, command = {"report.html": render_html}, shlex.join(["audit", *sys.argv[1:]])
        with bars() as progress, progress.step(f"fleet of {len(asked.jobs)} jobs", len(asked.jobs)) as tick:
            told = _job_told(len(asked.jobs), tick)
            run(asked, shelf, told=told, faces=faces, address=address, workers=workers, work=work, command=command)
    page = Fleet.of(asked.name, [_fleet_row(job, shelf.get(job.folder), alarming) for job in asked.jobs])
    for name, face in FACES.items():
        shelf.write(name, face(page).encode())
    for line in (page.summary(), f"all of them: {out.rstrip('/')}/fleet.html"):
        _out.print(line, markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(page.exit_code)


def _job_told(total: int, tick: Tick) -> Callable[[Job, str], None]:
    """One line a job that is done."""
    from reports.escape import one_line

    done = 0

    def told(job: Job, said: str) -> None:
        nonlocal done
        done += 1
        _err.print(f"{done}/{total} {one_line(f'{job.name}: {said}', 300)}", markup=False, highlight=False)
        tick(done)

    return told


def _fleet_row(job: Job, found: Record | Failure | None, alarming: frozenset[Outcome]) -> Row:
    """A job as the page about all shows it, with the exit code that a scan by itself would have left with."""
    from audit.record import Record
    from reports.fleet import Row

    place = {"case": job.plan.name, "model": job.model, "folder": job.folder}
    if not isinstance(found, Record):
        state, reason = ("failed", found.reason) if found else ("missing", "not run yet")
        code = found.exit_code if found else Incomplete.exit_code
        return Row(**place, state=state, reason=reason, exit_code=code)
    crashed = any(row.failed for row in found.not_run)
    code = Incomplete.exit_code if crashed else int(any(f.verdict in alarming for f in found.findings))
    return Row.audited(**place, record=found, exit_code=code)


# --- demo ---------------------------------------------------------------------------------------------------


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="where models, data and audit go")] = Path("audit-demo"),
    images: Annotated[bool, typer.Option("--images", help="image classifiers, of digits")] = False,
    base: Annotated[OptionalPath, typer.Option(help="start from this model folder instead of from scratch")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    budget: Annotated[
        str | None, typer.Option(help="quick, standard or thorough; quick, or standard with --images")
    ] = None,
    fail_on: Annotated[str, typer.Option(help="evidence, inconclusive or never")] = "never",
) -> None:
    """Build three small models of known history, and audit the unlearned one."""
    from audit.case import Case, Options
    from audit.errors import BadInput
    from audit.loaders import SetSpec
    from audit.organisms.demo import build_demo
    from audit.organisms.imaging.demo import build_image_demo

    if images and base is not None:
        raise BadInput("--images trains its own models, --base is for language models")
    with bars() as progress:
        if images:
            built = build_image_demo(out, seed=seed, progress=stages(progress))
        else:
            built = build_demo(out, seed=seed, base=base, progress=stages(progress))
    specs = {name: SetSpec(path) for name, path in built.sets.items()}
    models = {"target": built.models["unlearned"]} | {r: built.models[r] for r in ("original", "retrained")}
    budget = budget or ("standard" if images else "quick")
    options = Options.parse({"seed": seed, "budget": budget, "template": "plain"}, "demo")
    _audit(
        Case.build(models, specs, options, f"demo: {'one digit' if images else 'a small world'}, unlearned"),
        out / "audit",
        fail_on=fail_on,
        as_json=False,
    )


# --- without a model ----------------------------------------------------------------------------------------


@app.command("list")
def list_instruments(as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """The instruments, by question."""
    from rich.table import Table

    from audit.instrument import Broken, is_attack, load_all

    rows = [
        {"name": i.name, "broken": i.reason}
        if isinstance(i, Broken)
        else {
            "name": i.name,
            "kind": "attack" if is_attack(i) else "instrument",
            "title": i.title,
            "question": i.question.value,
            "access": i.access.name.lower(),
            "sets": list(i.sets),
            "roles": list(i.roles),
            "reference": i.reference,
        }
        for i in load_all()
    ]
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return
    table = Table("question", "name", "asks", "access", "needs", "source")
    for row in rows:
        if "broken" in row:
            table.add_row("", str(row["name"]), f"broken: {row['broken']}")
        else:
            needs = ", ".join([*row["sets"], *row["roles"]])
            table.add_row(*(str(row[k]) for k in ("question", "name", "title", "access")), needs, str(row["reference"]))
    _out.print(table)


@app.command()
def inventory(
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR")],
    as_json: Annotated[bool, typer.Option("--json")] = False,
    allow: Allow = None,
) -> None:
    """What lies in a model folder: digests, formats, refusals. Opens nothing."""
    from rich.table import Column, Table

    from audit.inventory import take_inventory

    found = take_inventory(model, allow=allow or ())
    entry = found.to_entry(model.name)
    if as_json:
        sys.stdout.write(entry.model_dump_json(indent=2) + "\n")
        return
    table = Table(
        "file",
        "bytes",
        Column("SHA-256", overflow="fold"),
        title=f"{entry.architecture}, {entry.parameters:,} parameters, {entry.dtype}",
    )
    for file in entry.files:
        table.add_row(file.path, f"{file.size:,}", file.sha256)
    _out.print(table)
    for limit in found.limits:
        _out.print(limit, markup=False, highlight=False, soft_wrap=True)
    _out.print(f"digest {entry.digest}", highlight=False)


@app.command()
def report(
    audit_dir: Annotated[Path, typer.Argument(metavar="OUT", help="an audit folder, or its record.json")],
    out: Annotated[OptionalPath, typer.Option(help="where report.html goes; beside the record if not given")] = None,
    faces: Annotated[
        str | None, typer.Option("--as", help="instead: markdown, sarif, csv, card, mlbom, mapping, comma-separated")
    ] = None,
    mapping: Annotated[str | None, typer.Option(help="mapping.md for: gdpr, ai-act, nist, comma-separated")] = None,
) -> None:
    """Render report.html from a record again, or its other faces; needs no model."""
    from audit.record import Record

    folder = audit_dir if audit_dir.is_dir() else audit_dir.parent
    record = Record.read(audit_dir)
    if faces is None and mapping is None:
        from reports.html import write_report

        pages = [write_report(record, out or folder)]
    else:
        from reports.faces.registry import write_faces

        pages = write_faces(record, faces, out or folder, frameworks=mapping)
    for page in pages:
        _out.print(str(page.resolve()), markup=False, highlight=False, soft_wrap=True)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="an audit folder, its record.json, or another's log")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="file to write; a folder for parquet")],
    to: Annotated[str, typer.Option(help="open-unlearning, tofu, muse, lm-eval; parquet: an audit's captures")],
    reference: Annotated[
        OptionalPath, typer.Option(help="a retrained model's log, or audit: adds forget quality against it")
    ] = None,
) -> None:
    """Write an audit, or another tool's results, as another tool would."""
    from audit.errors import BadInput
    from audit.interchange.logs import Metric, read_log, truth_ratios, write_log

    if to == "parquet":
        from audit.case import Case, Options, read_case
        from audit.interchange.captures import captured, write_captures

        name, models, specs, raw = read_case(source / "case.toml")
        case = Case.build(models, specs, Options.parse(raw, str(source / "case.toml")), name)
        files = write_captures(captured(case, source), out)
        _out.print(f"{len(files)} files in {out}", markup=False, highlight=False, soft_wrap=True)
        return
    log = read_log(source)
    if reference is not None:
        from detectors.knowledge import forget_quality

        try:
            distance, p = forget_quality(truth_ratios(log), truth_ratios(read_log(reference)))
        except ValueError as error:
            raise BadInput(f"{source}, {reference}: {error}") from None
        log["forget_quality"] = Metric(p)
        _out.print(f"forget quality: p = {p:.3g}, D = {distance:.3f}", highlight=False)
    write_log(log, out, to)
    _out.print(f"wrote {out}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def schema() -> None:
    """JSON Schema of record.json."""
    from audit.record import json_schema

    sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")


@app.command("lint-request")
def lint_request(
    forget: Annotated[str, typer.Argument(metavar="FORGET_SET", help="PATH or PATH?key=value&…, as for a scan")],
    against: Annotated[
        str | None, typer.Option(help="what is to be kept, PATH or PATH?…; else ordinary English")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the flags as data")] = False,
) -> None:
    """Look for harmless words that a forget request holds too often, before anyone unlearns with it."""
    from dataclasses import asdict

    from rich.table import Table
    from rich.text import Text

    from audit.lint import lint
    from audit.loaders import load_set, parse_set_spec
    from reports.escape import one_line

    request = load_set("forget", parse_set_spec(forget))
    reference = None if against is None else load_set("retain", parse_set_spec(against))
    flags = lint(request.examples, None if reference is None else reference.examples)
    if as_json:
        sys.stdout.write(json.dumps([asdict(flag) for flag in flags], indent=2) + "\n")
    elif flags:
        table = Table("phrase", "where", "of rows", "expected", "entities", "p", "for example")
        for flag in flags:
            numbers = f"{flag.rate:.1%}", f"{flag.expected:.1%}", str(flag.entities), f"{flag.p_value:.2g}"
            texts = Text(one_line(flag.phrase, 60)), flag.where, *numbers, Text(one_line(flag.examples[0], 80))
            table.add_row(*texts)
        _out.print(table)
    else:
        _out.print(f"nothing flagged in {len(request)} rows of {request.entities} entities", highlight=False)
    if flags:
        raise typer.Exit(1)


@app.command()
def init(path: Annotated[Path, typer.Argument(help="file to write")] = Path("case.toml")) -> None:
    """Write a commented case.toml to fill in."""
    from audit.errors import BadInput
    from audit.record import write_atomically

    if path.exists():
        raise BadInput(f"{path}: exists already")
    write_atomically(path, CASE_TEMPLATE.encode())
    _out.print(f"wrote {path}: fill it in, then `audit scan --case {path}`", markup=False, highlight=False)


CASE_TEMPLATE = """\
# A Palimpsest case: what is audited. Paths are relative to this file.
name = "my audit"

[models]
target = "path/to/unlearned-model"          # a Hugging Face folder: safetensors, config, tokenizer
# original = "path/to/model-before"         # the same model before unlearning
# retrained = "path/to/model-without"       # trained the same way without the forget set

[sets]
# JSONL, JSON, CSV, Parquet, plain text, or a folder saved with datasets' save_to_disk. The columns of TOFU,
# RWKU, MUSE and DUSK are recognised; others are named with columns.
forget = "forget.jsonl"
retain = "retain.jsonl"                     # should have stayed: the positive control
holdout = "holdout.jsonl"                   # like the forget set, but never trained on: the control that matters most
# utility = "world_facts.jsonl"             # what else should have stayed
# suspects = "queries.jsonl"                # which of these were forgotten? prompts; answers and entities if known
# forget = { path = "full.jsonl", where = { split = "forget01" }, limit = 400 }
# forget = { path = "mine.csv", columns = { prompt = "q", answer = "a", entity = "author" } }

[options]
seed = 0
budget = "standard"                         # quick | standard | thorough
access = "weights"                          # text | logprobs | weights: what you can see of the model
template = "auto"                           # auto | chat | qa | plain, or text with {prompt}
# memory = "8GB"                            # a bound; weights that do not fit in it are read in parts
# only = ["knowledge", "relearn"]
# skip = ["remind"]
# allow = ["training_args.bin:pickle"]      # files that would be refused and are let pass; the refusal says how
"""


if __name__ == "__main__":
    main()
