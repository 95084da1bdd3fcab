"""The documentation says what is so: links resolve, code runs, options exist, every instrument has its page."""

from __future__ import annotations

import contextlib
import io
import math
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from typer.main import get_command
from worlds import audit_here, build_tiny

import cli
from audit import instrument
from audit.loaders import FIELDS, parse_set_spec
from audit.presets import PRESET_NAMES

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/plugin/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
START = ROOT / "docs" / "start"
RUN = [ROOT / "README.md", START / "researcher.md", *sorted((ROOT / "docs" / "instruments").glob("*.md"))]

MADE_APART = {ROOT / "docs" / name for name in ("report.png", "studies.md", "benchmarks.md", "bench-full.md")}
"""Made by studies and a browser rather than written: links to them are right before they are there."""


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ +(.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_relative_link_resolves(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() or target in MADE_APART, f"{name(page)}: {link} leads nowhere"
        assert ROOT in target.parents, f"{name(page)}: {link} leaves the repository"
        assert not anchor or anchor in anchors(target), f"{name(page)}: {link}: no such heading"


def test_every_page_can_be_reached_from_the_readme() -> None:
    found, pending = set(), [ROOT / "README.md"]
    while pending:
        page = pending.pop()
        found.add(page)
        links = re.findall(r"\]\(([^)\s#]+\.md)", page.read_text("utf-8"))
        near = {(page.parent / link).resolve() for link in links if not link.startswith("http")}
        pending += [target for target in near - found if target.exists() and target not in pending]
    assert set(PAGES) <= found


def test_every_instrument_has_a_page_that_the_index_names() -> None:
    folder = ROOT / "docs" / "instruments"
    index = (folder / "index.md").read_text("utf-8")
    for each in instrument.names():
        assert (folder / f"{each}.md").is_file(), f"docs/instruments/{each}.md is missing"
        assert f"({each}.md)" in index, f"docs/instruments/index.md does not link to {each}"
    pages = {page.stem for page in folder.glob("*.md")} - {"index"}
    assert pages <= set(instrument.names()), "a page for an instrument that is not registered"


@pytest.mark.parametrize("page", [page for page in RUN if page.stem != "index"], ids=name)
def test_python_blocks_run_and_print_what_they_say(page: Path) -> None:
    found = blocks(page, "python")
    assert found, f"{name(page)} shows no Python"
    for code in found:
        promised = re.findall(r"^print\(.*\)  # (.+)$", code, re.MULTILINE)
        assert promised, f"{name(page)}: a block that shows no result"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, name(page), "exec"), {"__name__": "example"})
        assert printed.getvalue().splitlines() == promised


# --- the command line -----------------------------------------------------------------------------------------


@cache
def commands() -> dict[str, set[str]]:
    """The options of each command, by name."""
    group = get_command(cli.app)
    listed = getattr(group, "commands", {})
    return {
        command: {"--help", *(option for parameter in found.params for option in parameter.opts)}
        for command, found in listed.items()
    }


def invocations(page: Path) -> Iterator[tuple[str, str]]:
    """(command, the whole line) of every `audit …` in code: spans, shell blocks and indented lines."""
    text = re.sub(r"\\\n\s*", " ", page.read_text("utf-8"))
    for line in re.findall(r"(?:^\$ |^    |`)(audit [^`\n]+)", text, re.MULTILINE):
        yield line.split()[1], line


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_options_exist(page: Path) -> None:
    every = set().union(*commands().values())
    text = re.sub(r".*python -m (benchmarks|pip|pytest).*", "", page.read_text("utf-8"))  # programs of their own
    for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text):
        assert option in every, f"{name(page)}: no command has {option}"
    for command, line in invocations(page):
        if command.startswith("-"):
            continue
        assert command in commands(), f"{name(page)}: no command {command!r}"
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", line):
            assert option in commands()[command], f"{name(page)}: `audit {command}` has no {option}"


def test_the_first_scan_is_a_scan_of_the_demo() -> None:
    """The README's command names the files that `make demo` makes, and every one of them in full."""
    scans = [line for command, line in invocations(ROOT / "README.md") if command == "scan"]
    words = shlex.split(next(line for line in scans if "--holdout" in line))
    from audit.organisms.demo import ROLES, demo_sets
    from audit.organisms.world import make_world

    made = {f"audit-demo/models/{role}" for role in ROLES}
    made |= {f"audit-demo/data/{each}.jsonl" for each in demo_sets(make_world(0))}
    used = {word for word in words if word.startswith("audit-demo/")}
    assert len(used) == 6
    assert used <= made


def test_the_auditor_s_and_the_regulator_s_commands_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Typed in their order, on the desk of one who has run `audit demo` and was handed a public key."""
    (tmp_path / "audit-demo").symlink_to(build_tiny().folder)
    monkeypatch.chdir(tmp_path)
    codes = {}
    for page in ("auditor", "regulator"):
        for command, line in invocations(START / f"{page}.md"):
            if line in blocks_of_commands(START / f"{page}.md") and command != "demo":
                codes[page, command] = audit_here(monkeypatch, *shlex.split(line)[1:])
    scanned = codes.pop(("auditor", "scan"))
    assert scanned in (0, 1), "evidence or none"
    assert set(codes.values()) == {0}
    assert {command for page, command in codes if page == "auditor"} == {"inventory", "report", "keygen", "sign"}
    assert {command for page, command in codes if page == "regulator"} == {"verify", "report", "note"}
    assert {"report.html", "summary.md", "attestation.json", "notes.jsonl"} <= {
        p.name for p in Path("my-audit").iterdir()
    }


def blocks_of_commands(page: Path) -> str:
    """All console blocks, with continued lines joined."""
    return re.sub(r"\\\n\s*", " ", "".join(blocks(page, "console")))


# --- cases ----------------------------------------------------------------------------------------------------


def test_presets_fields_and_set_specifications_are_documented() -> None:
    text = (ROOT / "docs" / "cases.md").read_text("utf-8")
    for each in (*PRESET_NAMES, *FIELDS):
        assert f"| `{each}` |" in text, f"docs/cases.md does not tell of {each}"
    for spec in re.findall(r"[\w/]+\.jsonl\?[^\s\"`]+", text):
        assert parse_set_spec(spec).where


def test_the_example_case_is_read(tmp_path: Path) -> None:
    from audit.case import Options, read_case

    (example,) = blocks(ROOT / "docs" / "cases.md", "toml")
    path = tmp_path / "case.toml"
    path.write_text(example, "utf-8")
    title, models, specs, options = read_case(path)
    assert title == "my audit"
    assert set(models) == {"target", "original"}
    assert specs["holdout"].columns == {"prompt": "q", "answer": "a", "entity": "author"}
    assert Options.parse(options, "example").only == ("knowledge", "relearn")


# --- the instrument that CONTRIBUTING shows --------------------------------------------------------------------


def test_the_example_instrument_registers_and_scans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from audit.case import Case, Options
    from audit.loaders import SetSpec
    from audit.organisms.demo import write_jsonl
    from audit.organisms.train import new_model, save, word_tokenizer
    from audit.organisms.world import make_world
    from audit.scan import scan

    page = ROOT / "CONTRIBUTING.md"
    (code,), (points,) = blocks(page, "python"), blocks(page, "toml")
    package = tmp_path / "package"
    info = package / "sureness-1.dist-info"
    info.mkdir(parents=True)
    (package / "sureness.py").write_text(code, "utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sureness\nVersion: 1\n", "utf-8")
    group, entry = re.fullmatch(r'\[project\.entry-points\."(.+)"\]\n(.+)\n', points).groups()  # type: ignore[union-attr]
    (info / "entry_points.txt").write_text(f"[{group}]\n{entry.replace(chr(34), '')}\n", "utf-8")
    monkeypatch.syspath_prepend(package)
    assert "sureness" in instrument.names()

    world = make_world(0, forget=6, retain=6, holdout=6, public=1, unknown=1)
    tokenizer = word_tokenizer(world.words())
    model = save(
        new_model(tokenizer, seed=0, hidden=64, intermediate=64, layers=1, heads=2), tokenizer, tmp_path / "model"
    )
    sets = {each: write_jsonl(tmp_path / f"{each}.jsonl", world.rows(each)) for each in ("forget", "holdout", "retain")}
    specs = {each: SetSpec(path) for each, path in sets.items()}
    case = Case.build({"target": model}, specs, Options(only=("sureness",), template="plain"))
    record = scan(case, tmp_path / "out")
    (finding,) = record.findings
    assert not record.not_run
    assert finding.id == "sureness/negative-entropy"
    assert finding.n == 12
    assert finding.table is not None
    levels = [row[2] for row in finding.table.rows]
    # An untrained model's next token is all but uniform: the entropy is the logarithm of the vocabulary.
    assert levels == pytest.approx([-math.log(len(tokenizer))] * 3, abs=0.2)
