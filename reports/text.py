"""The summary that a terminal prints after a scan: the verdict, the findings, and what did not run.

    from rich.console import Console
    from reports.text import summary

    Console().print(summary(record))

Text of the record never reaches Rich as markup, and its control characters never reach the terminal.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from audit.record import Finding, Question, Record, Spike
from reports import words
from reports.escape import one_line

_STYLES = {
    "remains": "bold red",
    "beyond": "bold magenta",
    "damage": "bold yellow",
    "unlearned": "bold blue",
    "evasion": "bold red",
    "evidence": "bold red",
    "none": "green",
    "inconclusive": "cyan",
    "untested": "dim",
}
_SIGNS = {
    "remains": "▲",
    "beyond": "▼",
    "damage": "◆",
    "unlearned": "≡",
    "evasion": "≠",
    "evidence": "■",
    "none": "✓",
    "inconclusive": "?",
    "untested": "–",
}
_ARROWS = {"above": "↑", "below": "↓", "near": "≈", "": ""}
_VERDICTS = {
    "not-unlearned": "red",
    "suppressed": "red",
    "over-unlearned": "magenta",
    "deleted": "green",
    "inconclusive": "cyan",
}
_WIDE = 120


def summary(record: Record) -> RenderableType:
    """The record for a terminal, laid out for the console's width when it is printed."""
    return _Summary(record)


@dataclass(frozen=True)
class _Summary:
    record: Record

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = options.max_width >= _WIDE
        yield _verdict(self.record)
        if self.record.spike is not None:
            yield _spike(self.record.spike)
        yield _questions(self.record)
        yield ""
        if self.record.findings:
            yield _findings(self.record, wide)
            yield Text(
                "↑ ↓ ≈: the estimate is above, below or within the threshold of its null value.\n",
                style="dim",
            )
        if self.record.not_run:
            yield _not_run(self.record)


def _verdict(record: Record) -> Panel:
    label, plain = words.LABELS[record.verdict.label]
    color = _VERDICTS[record.verdict.label.value]
    body = Text()
    body.append(f"{label}\n", style=f"bold {color}")
    body.append(f"{plain}\n\n", style="dim")
    body.append(one_line(record.verdict.statement, 1200))
    body.append(f"\n\nFalse-positive rate: {one_line(words.error_rate(record.verdict.false_positive_rate), 400)}")
    body.append(f"\nPower: {one_line(words.power(record.verdict.power), 400)}")
    return Panel(body, title="Verdict", title_align="left", border_style=color, padding=(0, 1))


def _spike(spike: Spike) -> Table:
    """Rows instruments, columns copies."""
    copies = [copy for copy in spike.copies if not copy.failed]
    table = Table(title="Spike-in control", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.caption, table.caption_justify = Text(one_line(spike.statement, 600)), "left"
    table.add_column("instrument")
    for copy in copies:
        table.add_column(Text(f"{one_line(copy.name, 24)}\n{'facts there' if copy.present else 'nothing there'}"))
    table.add_column("seen where there")
    verdicts = [words.LABELS[copy.verdict][0] if copy.verdict else "not judged" for copy in copies]
    table.add_row("the verdict", *map(Text, verdicts), Text(words.rate(spike.recovered)), end_section=True)
    for row in spike.rows:
        marks = [mark_text(words.spike_mark(row.cells.get(copy.name))) for copy in copies]
        table.add_row(Text(one_line(row.instrument, 24)), *marks, Text(words.rate(row.recovered)))
    return table


def _questions(record: Record) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 1))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for answer in words.answers(record):
        table.add_row(answer.title, mark_text(answer.mark), Text(answer.line))
    return table


def _findings(record: Record, wide: bool) -> Table:
    table = Table(
        title="Findings",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        expand=True,
    )
    if wide:
        table.add_column("question", no_wrap=True)
        table.add_column("instrument", no_wrap=True)
    table.add_column("statistic", ratio=3)
    table.add_column("estimate [95 % CI]" if wide else "estimate\n[95 % CI]", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    if wide:
        table.add_column("larger means", ratio=2)
    table.add_column("p adj.", justify="right", no_wrap=True)
    table.add_column("says")
    for question in Question:
        found = [finding for finding in record.findings if finding.question is question]
        for index, finding in enumerate(found):
            table.add_row(*_row(finding, wide, index == 0), end_section=finding is found[-1])
    return table


def _row(finding: Finding, wide: bool, first: bool) -> list[RenderableType]:
    statistic = Text(one_line(finding.statistic, 120))
    if finding.layer:
        statistic.append(f" ({one_line(finding.layer, 30)})")
    if not wide:
        statistic.append(f"\n{finding.question.value} · {one_line(finding.instrument, 30)}", style="dim")
    numbers = Text(words.number(finding.estimate, *finding.ci95), style="bold")
    if finding.ci95 != (None, None):
        numbers.append(f"{' ' if wide else chr(10)}{words.interval(finding.ci95, finding.estimate)}", style="not bold")
    arrow = Text(_ARROWS[words.direction(finding)])
    p = Text(words.p_value(finding.p_adjusted) if finding.p_adjusted is not None else "–")
    mark = mark_text(words.mark_of(finding))
    if not wide:
        return [statistic, numbers, arrow, p, mark]
    question = Text(finding.question.value if first else "", style="bold")
    instrument = Text(one_line(finding.instrument, 24))
    return [question, instrument, statistic, numbers, arrow, Text(one_line(finding.orientation, 90)), p, mark]


def _not_run(record: Record) -> Table:
    failed = sum(row.failed for row in record.not_run)
    title = f"Did not run: {len(record.not_run)}" + (f", {failed} of them crashed" if failed else "")
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("instrument", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("reason")
    for row in record.not_run:
        state = Text("crashed", style="bold red") if row.failed else Text("not run", style="dim")
        table.add_row(Text(one_line(row.instrument, 24)), state, Text(one_line(row.reason, 300)))
    return table


def mark_text(key: str) -> Text:
    """The mark of a finding or an answer, by its key in `words.MARKS`."""
    return Text(f"{_SIGNS[key]} {words.MARKS[key][0]}", style=_STYLES[key])
