"""The bench's tables for a terminal or a page of documentation: Markdown, which reads well in both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from audit.bench.hidden import HiddenLine
from audit.bench.tables import InstrumentLine, Rate, Tables
from audit.record import Label


def markdown(tables: Tables, judged_by: str = "nominal thresholds", hidden: Sequence[HiddenLine] = ()) -> str:
    """The tables, and by what the verdicts were made."""
    parts = [_pool(tables), _instruments(tables.instruments), _verdicts(tables, judged_by)]
    if hidden:
        parts.append(_hidden(hidden))
    return "\n\n".join(parts) + "\n"


def _pool(tables: Tables) -> str:
    counts = ", ".join(f"{n} {label}" for label, n in tables.organisms.items())
    said = f"Organisms: {sum(tables.organisms.values())} ({counts})"
    if tables.broken:
        said += f"; {len(tables.broken)} broken, in no pool:\n\n"
        said += "\n".join(f"- {name}: {reason}" for name, reason in sorted(tables.broken.items()))
    return said


def _instruments(lines: Sequence[InstrumentLine]) -> str:
    head = (
        "question", "instrument", "AUC taught", "AUC suppressed", "false positives", "power", "Q", "R", "HM", "seconds",
    )  # fmt: skip
    rows = [
        (
            line.question.value if not line.statistic else "",
            f"**{line.instrument}**" if not line.statistic else f"· {line.statistic}",
            _rate(line.taught),
            _rate(line.suppressed),
            _percent(line.false_positives),
            _percent(line.power),
            _number(line.q),
            _number(line.r),
            _number(line.harmonic, 3),
            _number(line.seconds, 1),
        )
        for line in lines
    ]
    return "## Instruments\n\n" + _table(head, rows)


def _verdicts(tables: Tables, judged_by: str) -> str:
    table = tables.verdicts
    said = f"## Verdicts\n\nBy {judged_by}.\n\n" + _counts("made as", table.counts)
    if table.balanced_accuracy is not None:
        said += f"\n\nBalanced accuracy on the classes labelled by construction: {_rate(table.balanced_accuracy)}"
        said += f", n = {table.balanced_accuracy.n}."
    if (fp := table.false_positives) is not None:
        said += (
            f"\n\n“Knowledge remains” on models that were never taught: {_percent(fp)}, at most {fp.hi:.1%} with 95 % "
            f"confidence (n = {fp.n})."
        )
    said += "\n\n" + _counts("history", table.by_history)
    if tables.text_access:
        said += "\n\nGuarded models, seen through text alone, by nominal thresholds:\n\n" + _counts(
            "guard", tables.text_access
        )
    return said


def _hidden(lines: Sequence[HiddenLine]) -> str:
    histories = sorted({history for line in lines for history in line.by_history})
    rows = [
        (
            line.statistic or f"**{line.question}, together**",
            *(_number(rate.estimate) if (rate := line.by_history.get(history)) else "–" for history in histories),
            _percent(line.found),
            _percent(line.false_positives),
        )
        for line in lines
    ]
    said = (
        "## Hidden by construction\n\nArea under the ROC curve: models suppressed in one way against all never-taught."
    )
    return f"{said}\n\n" + _table(("statistic", *histories, "found", "false positives"), rows)


def _counts(name: str, counts: Mapping[str, Mapping[str, int]]) -> str:
    labels = [label.value for label in Label]
    rows = [(made, *(str(row[label]) if row[label] else "·" for label in labels)) for made, row in counts.items()]
    return _table((name, *labels), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [head, ["-" * w for w in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines
    )


def _rate(rate: Rate | None) -> str:
    return "–" if rate is None else f"{rate.estimate:.3f} [{rate.lo:.2f}, {rate.hi:.2f}]"


def _percent(rate: Rate | None) -> str:
    return "–" if rate is None else f"{rate.estimate:.1%} of {rate.n}"


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
