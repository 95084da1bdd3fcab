"""The commands about organisms: `audit organisms`, `audit bench`, `audit calibrate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from audit.errors import BadInput
from audit.terminal import bars, err, out, stages

if TYPE_CHECKING:
    from audit.bench.rows import Told
    from audit.progress import Tick

organisms = typer.Typer(help="Models of known history, to measure instruments on.", no_args_is_help=True)

RootOption = Annotated[Path, typer.Option(help="where organisms are kept")]


@organisms.command("list")
def list_organisms(root: RootOption = Path("organisms"), seed: Annotated[int, typer.Option(min=0)] = 0) -> None:
    """Every base and history, its label by construction, and whether it is built."""
    from rich.table import Table

    from audit.organisms.recipes import history_of, read_history, recipes

    table = Table("organism", "label", "starts from", "built")
    for recipe in recipes(seeds=(seed,)):
        history, known = history_of(recipe.history), read_history(root / recipe.name)
        current = known is not None and known["recipe_digest"] == recipe.digest
        state = ("broken: " + str(known["broken"]) if known and known["broken"] else "yes") if current else "no"
        table.add_row(recipe.name, history.label, history.parent or "random weights", state)
    out.print(table)


@organisms.command("build")
def build_organisms(
    root: RootOption = Path("organisms"),
    bases: Annotated[str | None, typer.Option(help="comma-separated; all if not given")] = None,
    histories: Annotated[str | None, typer.Option(help="comma-separated; all if not given")] = None,
    seeds: Annotated[str, typer.Option(help="comma-separated")] = "0",
) -> None:
    """Build organisms; those that exist already are kept."""
    from audit.organisms import recipes as book

    wanted = [
        book.Recipe(base, history, seed)
        for base in (bases.split(",") if bases else book.BASES)
        for seed in _whole_numbers(seeds)
        for history in (histories.split(",") if histories else book.histories())
    ]
    _check_histories({recipe.history for recipe in wanted})
    with bars() as progress:
        show = stages(progress)
        for recipe in wanted:
            folder = book.build(recipe, root, show)
            told = book.read_history(folder)
            if told is not None and told["broken"]:
                err.print(f"{recipe.name}: broken: {told['broken']}", markup=False, highlight=False)
    out.print(f"{len(wanted)} organisms in {root}", markup=False, highlight=False)


@organisms.command("show")
def show_organism(folder: Annotated[Path, typer.Argument(help="an organism's folder")]) -> None:
    """The true history of one organism."""
    from audit.organisms.recipes import read_history

    told = read_history(folder)
    if told is None:
        raise BadInput(f"{folder}: no organism (no organism.json with a recipe)")
    sys.stdout.write(json.dumps(told, indent=2) + "\n")


def _whole_numbers(text: str) -> list[int]:

    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise BadInput(f"{text!r} is no list of whole numbers") from None


def _check_histories(names: set[str]) -> None:
    from audit.organisms.histories import AFTERWARDS, histories

    known = histories()
    for name in sorted(names):
        parent, plus, change = name.rpartition("+")
        if name not in known and not (plus and parent in known and change in AFTERWARDS):
            raise BadInput(f"no history named {name!r} (see `audit organisms list`)")


# --- bench --------------------------------------------------------------------------------------------------


def bench(
    root: Annotated[Path, typer.Option(help="where organisms and rows are kept")] = Path("bench"),
    quick: Annotated[bool, typer.Option("--quick", help="one family, the histories that say most")] = False,
    bases: Annotated[str, typer.Option(help="comma-separated: architectures, or folders of models")] = "llama,gpt-neox",
    seeds: Annotated[str, typer.Option(help="comma-separated")] = "0,1,2",
    histories: Annotated[str | None, typer.Option(help="comma-separated; all if not given")] = None,
    world: Annotated[str, typer.Option(help="people, or a data set with entities and wrong answers")] = "people",
    budget: Annotated[
        str | None, typer.Option(help="of each scan: quick, standard or thorough; standard, or quick with --quick")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="processes, of one thread each")] = 2,
    only: Annotated[str | None, typer.Option(help="comma-separated instruments; all if not given")] = None,
    rows: Annotated[Path | None, typer.Option(help="tables of kept rows; builds and scans nothing")] = None,
    keep: Annotated[Path | None, typer.Option(help="write all rows to this file (.jsonl.gz)")] = None,
    profile: Annotated[
        Path | None, typer.Option(help="judge by this profile; else by thresholds from the other organisms")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="the tables as data")] = False,
) -> None:
    """Measure every instrument, and the verdict, on models of known history."""
    from audit.bench import pool
    from audit.bench.fit import held_out, label_of
    from audit.bench.hidden import hidden_lines
    from audit.bench.rows import read_rows, run, usable, write_rows
    from audit.bench.tables import tables
    from audit.bench.text import markdown
    from audit.profile import read_profile

    if rows is not None:
        found = read_rows(rows)
    else:
        wanted = pool.quick() if quick else pool.full(tuple(bases.split(",")), tuple(_whole_numbers(seeds)), world)
        if histories is not None:
            chosen = set(histories.split(","))
            _check_histories(chosen)
            wanted = [recipe for recipe in wanted if recipe.history in chosen]
        with bars() as progress, progress.step(f"bench of {len(wanted)} organisms", len(wanted)) as tick:
            scanned = budget or ("quick" if quick else "standard")
            found = run(wanted, root, budget=scanned, workers=workers, only=_instruments(only), told=_told(tick))
    if keep is not None:
        write_rows(found, keep)
    # Thresholds can be fitted on others only where there are others.
    several = len({(row.family, row.seed) for row in usable(found)}) > 1
    if profile is not None:
        fitted = read_profile(profile)
        made = tables(found, lambda row: label_of(row, fitted.thresholds))
        judged_by = f"the thresholds of the profile {fitted.name}"
    else:
        made = tables(found, held_out(found)) if several else tables(found)
        judged_by = "thresholds fitted on other organisms" if several else "nominal thresholds"
    hidden = hidden_lines(found)
    data = made.model_dump(mode="json") | {"hidden": [line.model_dump(mode="json") for line in hidden]}
    sys.stdout.write(json.dumps(data, indent=2) + "\n" if as_json else markdown(made, judged_by, hidden))


def _instruments(text: str | None) -> list[str]:
    """Those named; none if all are meant, and then what cannot be loaded is said."""
    from audit.instrument import Broken, load, load_all

    if text:
        return [load(name).name for name in text.split(",")]
    for item in load_all():
        if isinstance(item, Broken):
            err.print(f"left out: {item.name}: {item.reason}", markup=False, highlight=False)
    return []


def calibrate(
    rows: Annotated[Path, typer.Argument(help="a bench's folder, or the rows that it kept")],
    to: Annotated[Path, typer.Option(help="the profile to write")] = Path("profile.json"),
    name: Annotated[str, typer.Option(help="of the profile")] = "own",
    budget: Annotated[str, typer.Option(help="that the rows were scanned with")] = "standard",
) -> None:
    """Make a reference profile from a bench: `audit scan --profile` judges by it."""
    from importlib.metadata import version

    from audit.bench.fit import fit, scanned_alike
    from audit.bench.rows import read_rows, usable
    from audit.record import write_atomically

    made_by = f"audit calibrate {rows.name} --name {name} --budget {budget}"
    every = read_rows(rows)
    alike = scanned_alike(every)
    if left := len(usable(every)) - len(usable(alike)):
        err.print(f"{left} organisms left out: they were scanned with fewer instruments, or some declined")
    profile = fit(alike, name=name, budget=budget, made_by=made_by, release=version("palimpsest-audit"))
    write_atomically(to, profile.to_json().encode())
    false = profile.false_positives
    out.print(
        f"{to}: fitted on {sum(profile.organisms.values())} organisms; “knowledge remains” on {false.estimate:.1%} of "
        f"{false.n} that were never taught (at most {false.upper95:.1%})",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _told(tick: Tick) -> Told:
    def told(name: str, done: int, total: int) -> None:
        if not err.is_terminal:
            err.print(f"{done}/{total} {name}", markup=False, highlight=False)
        tick(done)

    return told
