"""Two audits side by side for a terminal: verdicts, what is not comparable, the five questions, and the findings.

    Console().print(diff_summary(compare(a, b)))

Text of the records never reaches Rich as markup, and its control characters never reach the terminal.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from audit.record import Finding
from reports import words
from reports.comparison import Audit, Caveat, Comparison, FindingPair
from reports.escape import one_line
from reports.text import mark_text


def diff_summary(comparison: Comparison) -> RenderableType:
    """The comparison for a terminal."""
    return _Summary(comparison)


@dataclass(frozen=True)
class _Summary:
    comparison: Comparison

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        c = self.comparison
        yield _verdicts(c)
        if c.mismatches:
            yield _mismatches(c)
        yield _questions(c)
        yield ""
        if c.findings:
            yield _findings(c)
            yield Text(
                "A difference has no interval: two records do not hold what one needs. Where two intervals do not "
                "touch and both hold (at least 90 of 100 pairs), the true values differ. Overlap shows nothing.\n",
                style="dim",
            )
        yield from _rest(c)


def _verdicts(c: Comparison) -> Panel:
    body = Text()
    if c.forced:
        refusing = ", ".join(one_line(row.what, 60) for row in c.mismatches if row.refuses)
        body.append(f"Not comparable, and compared because --force asked for it: {refusing}\n\n", style="bold yellow")
    body.append(f"{c.verdict_change}\n", style="bold")
    body.append_text(_caveats(c.verdict_caveats, "", "\n"))
    for name, audit in (("A", c.a), ("B", c.b)):
        body.append(f"\n{name}  {_title(audit)}\n", style="bold")
        body.append(f"   {one_line(audit.verdict.statement, 400)}")
    for line in c.relations:
        body.append(f"\n{one_line(line, 200)}", style="dim")
    return Panel(body, title="Two audits", title_align="left", padding=(0, 1))


def _title(audit: Audit) -> str:
    label = words.LABELS[audit.verdict.label][0]
    return f"{label}: {one_line(audit.target, 60) or 'no model named'} ({one_line(audit.name, 80)})"


def _mismatches(c: Comparison) -> Table:
    table = _table("Not the same in both audits", "what", "A", "B", "weight")
    for row in c.mismatches:
        weight = Text("incomparable", style="bold yellow") if row.refuses else Text("noted", style="dim")
        table.add_row(*(Text(one_line(text, 120)) for text in (row.what, row.a, row.b)), weight)
    return table


def _questions(c: Comparison) -> Table:
    table = _table("", "question", "A", "B", "findings")
    for pair in c.questions:
        tally = Text(pair.tally)
        tally.append_text(_caveats(pair.caveats, "\n", ""))
        table.add_row(Text(pair.a.title, style="bold"), mark_text(pair.a.mark), mark_text(pair.b.mark), tally)
    return table


def _findings(c: Comparison) -> Table:
    table = _table("Findings", "finding", "A", "B", "B − A")
    for column, ratio in zip(table.columns, (5, 3, 3, 1), strict=True):
        column.ratio = ratio
    table.expand = True
    for index, pair in enumerate(c.findings):
        last = index + 1 == len(c.findings) or c.findings[index + 1].question is not pair.question
        difference = Text("–" if pair.difference is None else words.number(pair.difference), justify="right")
        table.add_row(_named(pair), _cell(pair.a), _cell(pair.b), difference, end_section=last)
    return table


def _named(pair: FindingPair) -> Text:
    text = Text(one_line(pair.id, 60), style="bold" if pair.changed else "")
    text.append(f"\n{one_line(pair.numbers, 200)}", style="not bold dim")
    return text.append_text(_caveats(pair.caveats, "\n", ""))


def _cell(finding: Finding | None) -> RenderableType:
    if finding is None:
        return Text("–", style="dim")
    numbers = Text(words.number(finding.estimate, *finding.ci95))
    if finding.ci95 != (None, None):
        numbers.append(f" {words.interval(finding.ci95, finding.estimate)}", style="dim")
    return Group(mark_text(words.mark_of(finding)), numbers)


def _rest(c: Comparison) -> RenderResult:
    if c.not_run:
        table = _table("Did not run", "instrument", "A", "B")
        for missing in c.not_run:
            cells = []
            for row, count in ((missing.a, missing.findings_a), (missing.b, missing.findings_b)):
                ran = f"ran: {words.plural(count, 'finding')}" if count else "no trace of it"
                state = "" if row is None else "crashed: " if row.failed else "not run: "
                cells.append(Text(ran if row is None else state + one_line(row.reason, 200)))
            table.add_row(Text(one_line(missing.instrument, 24)), *cells)
        yield table
    if c.examples:
        differ, same = (sum(pair.answers == key for pair in c.examples) for key in ("differ", "same"))
        text = Text(f"Examples: {len(c.examples)}; answers to {differ} of them differ, to {same} they are the same.")
        yield text.append_text(_caveats(c.example_caveats, "\n", ""))
    if c.scores:
        table = _table(
            "Scores (a description: no control, no interval)", "score", "n", "mean A", "mean B", "up", "down"
        )
        for score in c.scores:
            numbers = (words.number(score.mean_a), words.number(score.mean_b), str(score.higher), str(score.lower))
            table.add_row(Text(one_line(score.name, 40)), str(score.n), *numbers)
        yield table
    for role, pair in sorted(c.models.items()):
        if pair.a and pair.b and pair.differing:
            files = f"{words.plural(len(pair.differing), 'file')} not the same, {pair.same_files} the same"
            yield Text(f"{one_line(role, 24)}: {files}")


def _caveats(caveats: list[Caveat], before: str, after: str) -> Text:
    sure = ", ".join(one_line(row.what, 60) for row in caveats if row.sure)
    perhaps = ", ".join(one_line(row.what, 60) for row in caveats if not row.sure)
    said = [f"! not the same: {sure}"] if sure else []
    said += [f"! touched perhaps: {perhaps}"] if perhaps else []
    return Text(before + "\n".join(said) + after if said else "", style="not bold yellow")


def _table(title: str, *columns: str) -> Table:
    table = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1))
    if title:
        table.title, table.title_justify, table.title_style = title, "left", "bold"
    return table
