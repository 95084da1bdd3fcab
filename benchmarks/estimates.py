"""What every instrument estimated in some organisms, finding by finding, as Markdown:

    python -m benchmarks.estimates docs/bench/rows.jsonl.gz bench/rows --organisms llama-original-0,llama-retrained-0 \
        --findings lens/choice,relearn/untaught-half --controls

    python -m benchmarks.estimates docs/bench/rows.jsonl.gz --histories original,refusal-head,retrained \
        --findings quantize/recovered --control "came back"

Reads the bench's rows: files (`audit bench --keep`) or its folder `rows`. Bold is evidence by nominal thresholds,
`none` an interval that excludes the threshold where known facts were seen. With `--histories`, a line a history: the
mean over its organisms of all families and seeds (least to greatest), and in how many there was evidence; of a single
organism its interval.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

from audit.bench.rows import Row, read_rows
from audit.record import Finding, Outcome
from audit.verdict import judge


def rows_of(paths: list[Path]) -> dict[str, Row]:
    """The rows of files and folders by organism; of two, the one with more findings."""
    found: dict[str, Row] = {}
    for path in paths:
        each = (
            read_rows(path)
            if path.is_file()
            else [Row.model_validate_json(p.read_bytes()) for p in sorted(path.glob("*.json"))]
        )
        for row in each:
            known = found.get(row.name)
            if known is None or len(row.findings) > len(known.findings):
                found[row.name] = row
    return found


def table(rows: list[Row], wanted: list[str], *, controls: bool, levels: bool) -> str:
    """A line a finding, a column an organism; with `controls`, what its positive control showed in brackets.

    `levels`: the statistic on forget rows by itself, under attack the largest of its ways, instead of the excess.
    """
    judged = [{f.id: f for f in judge(row.findings)} for row in rows]
    ids = wanted or list(dict.fromkeys(identity for each in judged for identity in each))
    head = ["finding", *(f"{row.history}" if len({r.family for r in rows}) == 1 else row.name for row in rows)]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for identity in ids:
        lines.append(f"| {identity} | {' | '.join(_cell(each.get(identity), controls, levels) for each in judged)} |")
    return "\n".join(lines)


def _cell(finding: Finding | None, controls: bool, levels: bool) -> str:
    if finding is None or finding.estimate is None:
        return "–"
    if levels:
        return "–" if finding.level is None else f"{finding.level:.2f}"
    lo, hi = finding.ci95
    text = f"{_number(finding.estimate)} [{_number(lo)}, {_number(hi)}]" if lo is not None and hi is not None else "–"
    if finding.verdict == Outcome.EVIDENCE:
        text = f"**{text}**"
    elif finding.verdict == Outcome.NONE:
        text += " none"
    known = next((c.estimate for c in finding.controls if c.name == "positive control"), None)
    return f"{text} ({known:.2f})" if controls and known is not None else text


def histories(rows: list[Row], named: list[str], wanted: list[str], control: str) -> str:
    """A line a history, a column a finding; then what the `control` of each showed, if one is named."""
    head = ["history", "label", "models", *wanted, *(f"{control} ({identity})" for identity in wanted if control)]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for history in named:
        group = [row for row in rows if row.history == history and row.findings]
        each = [{f.id: f for f in judge(row.findings)} for row in group]
        seen = [[found[identity] for found in each if identity in found] for identity in wanted]
        if any(seen):
            cells = [history, group[0].label, str(max(map(len, seen))), *map(_spread, seen)]
            if control:
                cells += [_span([c.estimate for f in found for c in f.controls if c.name == control]) for found in seen]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(found: list[Finding]) -> str:
    if len(found) == 1:
        return _cell(found[0], False, False)
    text = _span([finding.estimate for finding in found])
    evidence = sum(finding.verdict == Outcome.EVIDENCE for finding in found)
    return f"{text}, **{evidence} of {len(found)}**" if evidence else text


def _span(estimates: list[float | None]) -> str:
    known = [value for value in estimates if value is not None]
    if not known:
        return "–"
    middle, least, greatest = map(_number, (mean(known), min(known), max(known)))
    return f"{middle} ({least} to {greatest})" if len(known) > 1 else middle


def _number(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "−")  # adding 0.0 makes of a rounded −0.0 a zero


def main() -> None:
    """Print what is asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.estimates", description="bold: evidence")
    parser.add_argument("rows", type=Path, nargs="+")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--organisms")
    which.add_argument("--histories")
    parser.add_argument("--findings", default="")
    parser.add_argument("--controls", action="store_true")
    parser.add_argument("--levels", action="store_true")
    parser.add_argument("--control", default="", help="with --histories: of which control to print what it showed")
    parser.add_argument("--family", default="", help="with --histories: of this base alone")
    given = parser.parse_args()
    found = rows_of(given.rows)
    wanted = [name for name in given.findings.split(",") if name]
    if given.histories:
        rows = [row for row in found.values() if given.family in ("", row.family)]
        print(histories(rows, given.histories.split(","), wanted, given.control))
    else:
        rows = [found[name] for name in given.organisms.split(",") if name in found]
        print(table(rows, wanted, controls=given.controls, levels=given.levels))


if __name__ == "__main__":
    main()
