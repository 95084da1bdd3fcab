"""The report: one self-contained HTML file, rendered from a record and nothing else.

    from reports.html import render_html, write_report

    html = render_html(record)
    write_report(record, Path("OUT/report.html"))

No script, no network, no inline style: the content policy admits nothing but the one stylesheet, by its hash, and
pictures that lie in the file itself where an audit is of images.
Every value of the record passes through `escape.shown` (by the environment's `finalize`) and then through
Jinja2's autoescape, so a template cannot forget either. Equal records give equal bytes: mappings are shown in
a fixed order, and neither the clock nor the machine is asked for anything.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import jinja2
from markupsafe import Markup

from audit.record import Figure, Finding, Outcome, Question, Record, SetEntry, write_atomically
from reports import words
from reports.escape import shown
from reports.forest import forest
from reports.methods import Method, methods
from reports.plots import draw

MAX_EXAMPLES = 400
MAX_TEXT = 600
MAX_NAME = 160
MAX_ROWS = 200

_TEMPLATES = Path(__file__).parent / "templates"
_ORDER = (
    *("target", "original", "retrained"),  # roles of models
    *("forget", "retain", "holdout", "neighbor", "utility", "relearn", "suspects"),  # sets
)
_Value = TypeVar("_Value")


class _OfEntity(Protocol):
    entity: str


_Example = TypeVar("_Example", bound=_OfEntity)


class Grid(NamedTuple):
    """A table as the template draws it: at most `MAX_ROWS` rows, and how many were left out."""

    columns: list[str]
    rows: list[list[str]]
    more: int


class Card(NamedTuple):
    """One finding with what is drawn of it. `anchor` comes from its place, never from the record's text."""

    anchor: str
    finding: Finding
    mark: str
    forest: Markup
    plot: Markup | None
    plot_failed: str
    values: Grid | None
    table: Grid | None


class Chapter(NamedTuple):
    """One question's answer, its findings, and what was tried to answer it."""

    answer: words.Answer
    cards: list[Card]
    methods: list[Method]


def render_html(record: Record) -> str:
    """The whole report as one string; byte-identical for equal records."""
    chapters = _chapters(record)
    cards = [card for chapter in chapters for card in chapter.cards]
    shown_examples = record.examples[:MAX_EXAMPLES]
    return render(
        "report.html.j2",
        ("report.css",),
        images=any(example.image for example in shown_examples),
        record=record,
        label=words.LABELS[record.verdict.label],
        spike_copies=[copy for copy in record.spike.copies if not copy.failed] if record.spike else [],
        chapters=chapters,
        cards=cards,
        silent=[(card, *bound) for card in cards if (bound := _bound(card.finding))],
        tally=[(key, count) for key in words.MARKS if (count := sum(card.mark == key for card in cards))],
        shows=words.SHOWS[record.verdict.label],
        access=words.ACCESS.get(str(record.case.options.get("access"))),
        effort=words.EFFORT.get(str(record.case.options.get("budget"))),
        elsewhere=methods([], [row for row in record.not_run if row.question is None]),
        failed=sum(row.failed for row in record.not_run),
        models=in_order(record.models),
        sets=in_order(record.case.sets),
        options=sorted(record.case.options.items()),
        packages=sorted(record.environment.packages.items()),
        noise=in_order(record.environment.noise),
        costs=sorted(record.cost.by_instrument.items()),
        groups=grouped(shown_examples),
        hidden_examples=len(record.examples) - len(shown_examples),
        forget=_forget(record.case.sets),
        digest=hashlib.sha256(record.to_json().encode("utf-8", "surrogatepass")).hexdigest(),
    )


def render(template: str, styles: tuple[str, ...], *, images: bool, **values: Any) -> str:
    """A page of this package's templates, under a policy that admits these styles and, if asked, embedded images."""
    loader = _environment().loader
    assert loader is not None
    css = "".join(loader.get_source(_environment(), name)[0] for name in styles)
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    pictures = "img-src data:; " if images else ""
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; {pictures}base-uri 'none'; form-action 'none'"
    return _environment().get_template(template).render(css=Markup(css), policy=policy, **values)


def write_report(record: Record, out: Path) -> Path:
    """Render and write atomically. `out`: the file, or an audit folder, in which it becomes `report.html`."""
    out = out / "report.html" if out.is_dir() else out
    write_atomically(out, render_html(record).encode())
    return out


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    environment.filters.update(
        base64=lambda text: re.fullmatch(r"[A-Za-z0-9+/]+={0,2}", text) is not None,
        number=words.number,
        p=words.p_value,
        interval=words.interval,
        cell=words.cell,
        setting=words.setting,
        size=words.size,
        duration=words.duration,
        plural=words.plural,
        error_rate=words.error_rate,
        power=words.power,
        rate=words.rate,
        spiked=words.spike_mark,
        direction=words.direction,
        brief=lambda text: Markup("{}").format(shown(text, MAX_NAME)),
        long=lambda text: Markup("{}").format(shown(text, MAX_TEXT)),
        ordered=lambda mapping: sorted(mapping.items()),
        first=lambda rows, count=MAX_ROWS: list(rows)[:count],
    )
    environment.globals.update(
        MARKS=words.MARKS,
        SIDES=words.SIDES,
        GATES=words.GATES,
        GLOSSARY=words.GLOSSARY,
        LABELS=words.LABELS,
        REFERENCES=words.REFERENCES,
        MEASURED=words.MEASURED,
        MAX_ROWS=MAX_ROWS,
    )
    return environment


def _finalize(value: Any) -> Any:
    """What every `{{ … }}` passes through. Markup was made here, of parts already shown."""
    return shown(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def in_order(mapping: Mapping[str, _Value]) -> list[tuple[str, _Value]]:
    """Roles and sets in the order in which they are spoken of, then the rest by name."""
    rank = {name: index for index, name in enumerate(_ORDER)}
    return sorted(mapping.items(), key=lambda item: (rank.get(item[0], len(rank)), item[0]))


def _chapters(record: Record) -> list[Chapter]:
    cards: dict[Question, list[Card]] = {question: [] for question in Question}
    for index, finding in enumerate(record.findings, start=1):
        cards[finding.question].append(_card(finding, f"finding-{index}"))
    return [
        Chapter(
            answer,
            cards[answer.question],
            methods(
                [card.finding for card in cards[answer.question]],
                [row for row in record.not_run if row.question is answer.question],
            ),
        )
        for answer in words.answers(record)
    ]


def _bound(finding: Finding) -> tuple[str, str] | None:
    """What a test that found nothing does not rule out, and what it shows of what is certainly there.

    None if it found something, be it on a side that is no cause for alarm.
    """
    largest, known = finding.reach(), finding.known_effect()
    if finding.verdict is not Outcome.NONE or largest is None or largest >= finding.threshold:
        return None
    return words.number(max(0.0, largest), finding.threshold), "–" if known is None else words.number(known)


def _card(finding: Finding, anchor: str) -> Card:
    plot, trouble, values = None, "", None
    if finding.figure is not None:
        values = _values(finding.figure)
        try:
            plot = Markup(draw(finding.figure))
        except (ValueError, ArithmeticError, MemoryError) as error:  # the record's data, not a fault of the report
            trouble = f"This figure could not be drawn ({error})."
    table = None
    if finding.table is not None:
        rows = [[words.cell(value) for value in row] for row in finding.table.rows]
        table = Grid(finding.table.columns, rows[:MAX_ROWS], max(0, len(rows) - MAX_ROWS))
    return Card(anchor, finding, words.mark_of(finding), forest(finding), plot, trouble, values, table)


def _values(figure: Figure) -> Grid:
    """A figure's data as a table: quartiles of a distribution, otherwise one row per x."""
    if figure.kind == "distribution":
        rows = [[one.label, f"{len(one.x):,}", *_quartiles(one.x)] for one in figure.series]
        rows += [[name, "line", *[""] * 2, words.number(at), *[""] * 2] for name, at in figure.reference_lines.items()]
        return Grid(["series", "n", "smallest", "25 %", "median", "75 %", "largest"], rows[:MAX_ROWS], 0)
    cells: list[dict[float, str]] = []
    for one in figure.series:
        column = {}
        for index, (x, y) in enumerate(zip(one.x, one.y, strict=False)):
            ends = [side[index] if side and index < len(side) else None for side in (one.lo, one.hi)]
            column[x] = words.number(y, *ends) + (
                "" if ends == [None, None] else f" {words.interval((ends[0], ends[1]), y)}"
            )
        cells.append(column)
    xs = sorted({x for column in cells for x in column})
    rows = [[_plain(x), *(column.get(x, "") for column in cells)] for x in xs[:MAX_ROWS]]
    rows += [[name, *[words.number(value)] * len(cells)] for name, value in sorted(figure.reference_lines.items())]
    return Grid([figure.x_label, *(one.label for one in figure.series)], rows, max(0, len(xs) - MAX_ROWS))


def _plain(value: float) -> str:
    """Layers and steps without decimals."""
    return f"{int(value):,}" if abs(value) < 1e15 and value == int(value) else words.number(value)


def _quartiles(values: list[float]) -> list[str]:
    known = sorted(value for value in values if value == value)
    if not known:
        return [words.NOT_COMPUTED] * 5
    last = len(known) - 1
    places = [last * share for share in (0, 0.25, 0.5, 0.75, 1)]
    return [words.number(known[int(at)] + (at % 1) * (known[min(last, int(at) + 1)] - known[int(at)])) for at in places]


def grouped(examples: Iterable[_Example]) -> list[tuple[str, list[_Example]]]:
    """Examples by entity, in the order in which entities first come."""
    groups: dict[str, list[_Example]] = {}
    for example in examples:
        groups.setdefault(example.entity, []).append(example)
    return list(groups.items())


def _forget(sets: Mapping[str, SetEntry]) -> str:
    """How large the forget set is, for the head of the report."""
    if "forget" not in sets:
        return "no forget set recorded"
    entry = sets["forget"]
    about = f" about {entry.entities:,} {'entity' if entry.entities == 1 else 'entities'}" if entry.entities else ""
    return f"{words.plural(entry.count, 'example')}{about}"
