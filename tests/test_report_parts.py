"""What reports are made of: answers, numbers, text made safe, drawings."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest
from sample_record import empty, sample

from audit.record import ErrorRate, Figure, Finding, Outcome, Series, Side
from reports import words
from reports.escape import one_line, shown, visible
from reports.forest import forest
from reports.methods import described, methods
from reports.plots import draw

ROOT = Path(__file__).parent.parent

# The answer to a question


def finding(**changes) -> Finding:
    return sample().findings[3].model_copy(update=changes)


@pytest.mark.parametrize(
    ("outcomes", "mark"),
    [
        ([], "untested"),
        ([Outcome.NONE], "none"),
        ([Outcome.NONE, Outcome.INCONCLUSIVE], "inconclusive"),
        ([Outcome.NONE, Outcome.INCONCLUSIVE, Outcome.EVIDENCE], "evidence"),
    ],
)
def test_answers_fail_closed(outcomes, mark):
    record = empty()
    record.findings = [finding(verdict=outcome) for outcome in outcomes]
    answer = words.answers(record)[1]
    assert answer.mark == mark and "1 instrument did not run" in answer.line


def test_marks_of_findings():
    for side in (Side.REMAINS, Side.BEYOND, Side.DAMAGE):
        assert words.mark_of(finding(verdict=Outcome.EVIDENCE, side=side)) == side.value
    assert words.mark_of(finding(verdict=Outcome.NONE, side=Side.REMAINS)) == "none"


def test_knowledge_seen_only_by_what_an_edit_moves_too_is_no_yes():
    record = empty()
    record.findings = [finding(verdict=Outcome.EVIDENCE, side=Side.REMAINS, sides=(Side.REMAINS, Side.BEYOND))]
    assert words.answers(record)[1].said.startswith("Yes")
    record.findings[0].decides = (False, True)
    assert words.answers(record)[1].said == words.FAMILIAR


def test_confidence_is_that_of_the_findings_behind_the_answer():
    said = {answer.question.value: answer.confidence for answer in words.answers(sample())}
    assert said["leakage"].startswith("none: no interval lies clear")
    assert said["recovery"] == (
        "2 findings by 2 instruments, at the clearest p < 0.001 after correction for all 4 tests; 1 of 4 undecided."
    )
    assert {answer.confidence for answer in words.answers(empty())} == {"none: there is nothing to be sure of."}


@pytest.mark.parametrize(
    ("sides", "reach"),
    [
        ((Side.REMAINS, Side.NEITHER), 0.7),  # up from 0.5 to 1.2
        ((Side.NEITHER, Side.DAMAGE), 0.3),  # down from 0.5 to 0.2
        ((Side.REMAINS, Side.UNLEARNED), 0.7),
        ((Side.BEYOND, Side.NEITHER), 0.7),  # no side alarms: the wider one
    ],
)
def test_what_an_interval_does_not_rule_out_is_its_end_towards_an_alarm(sides, reach):
    each = finding(ci95=(0.2, 1.2)).model_copy(update={"null_value": 0.5, "sides": sides, "bound": None})
    assert each.reach() == pytest.approx(reach)
    assert each.model_copy(update={"ci95": (None, 1.2)}).reach() is None


def test_a_bound_stands_for_the_upper_end():
    each = finding(ci95=(0.2, 1.2)).model_copy(
        update={"null_value": 0.5, "sides": (Side.REMAINS, Side.NEITHER), "bound": 0.9}
    )
    assert each.reach() == pytest.approx(0.4)


# Method cards


def test_every_instrument_of_the_project_has_a_card():
    """And the card says what the instrument's page says, word for word."""
    named = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["entry-points"]
    cards = described()
    assert set(cards) == set(named["palimpsest.instruments"]), "reports/templates/methods.toml"
    for name, card in cards.items():
        page = (ROOT / f"docs/instruments/{name}.md").read_text("utf-8")
        plain = re.search(r"\*\*In plain words\.\*\* (.*?)\n\n", page, re.DOTALL)[1]
        plain = re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", " ".join(plain.split())).replace("*", "")
        assert card["plain"] == plain, f"docs/instruments/{name}.md and reports/templates/methods.toml differ"
        assert set(card) == {"title", "plain", "blind"} and all(card.values())


def test_a_card_says_what_came_of_it():
    record = sample()
    cards = methods(record.findings, record.not_run)
    assert [card.name for card in cards] == list(dict.fromkeys(
        [f.instrument for f in record.findings] + [row.instrument for row in record.not_run]
    ))  # fmt: skip
    quantize = next(card for card in cards if card.name == "quantize")
    assert dict(quantize.marks) == {"remains": 1, "none": 1} and quantize.title == "Rounding the weights"
    stranger = next(card for card in cards if card.name == "triggers")
    assert "no description of it. It measured: Benign tokens of the forget set" in stranger.plain
    assert next(card for card in cards if card.name == "prune").not_run[0].failed


# Numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not computed"), (float("nan"), "not computed"), (0.0, "0"), (-0.0, "0"), (0.62, "0.620"),
        (-0.04, "−0.0400"), (12.345, "12.3"), (12345.0, "12,300"), (0.9996, "1.00"), (99.99, "100"),
        (1.2e-6, "1.20e-06"), (-1.2e-6, "−1.20e-06"),
    ],
)  # fmt: skip
def test_number(value, text):
    assert words.number(value) == text


def test_numbers_that_are_read_together_line_up():
    assert words.number(0.08, 0.03, 0.16) == "0.080"
    assert words.interval((0.03, 0.16), 0.08) == "[0.030, 0.160]"
    assert words.interval((0.9, 1.0), 0.97) == "[0.900, 1.000]"
    assert words.interval((None, 0.5)) == "[?, 0.500]" and words.interval((None, None)) == "not computed"


def test_other_numbers():
    assert [words.p_value(p) for p in (None, 0.0, 0.00099, 0.033, 1.0)] == [
        *("not computed", "< 0.001", "< 0.001", "0.033", "1.000")
    ]
    assert [words.size(n) for n in (0, 1023, 1024, 6_812_434_432)] == [
        "0 bytes",
        "1,023 bytes",
        "1.00 KiB",
        "6.34 GiB",
    ]
    assert [words.duration(s) for s in (0.0, 41.9, 184.2, 4127.4)] == [
        "0 s",
        "41.9 s",
        "3 min 04 s",
        "1 h 08 min",
    ]
    assert words.error_rate(ErrorRate()) == "Not measured for this case."
    assert words.cell(True) == "yes" and words.cell(None) == "not computed" and words.cell(1200) == "1,200"


# Text made safe


def test_visible():
    assert visible("plain, ünï, 日本語 👍\n\t") == "plain, ünï, 日本語 👍\n\t"
    assert visible("a\u202eb\u2066c") == "a⟦U+202E⟧b⟦U+2066⟧c"
    assert visible("\x00\x00\x00\x1b") == "⟦U+0000 ×3⟧⟦U+001B⟧"
    assert visible("\ud800\U000e0041") == "⟦U+D800⟧⟦U+E0041⟧"
    assert visible("⟦U+202E⟧") == "⟦U+27E6⟧U+202E⟧", "a mark cannot be faked"
    assert visible("z" + "\u0301" * 50) == "z" + "\u0301" * 4 + "⟦+46 combining marks⟧"
    assert shown("ab" * 10, 5) == "ababa ⟦… 15 more characters in the record⟧"
    assert one_line("a\r\n\tb  c\u202e") == "a b c⟦U+202E⟧"


# Drawings


def test_forest_stretches_and_says_what_it_draws():
    row = forest(sample().findings[0])
    ElementTree.fromstring(str(row))
    assert "viewBox" not in row and "Estimate 0.080, 95 % interval [0.030, 0.160]; null value 0.5" in row
    assert "No estimate" in forest(finding(estimate=None, ci95=(None, None)))
    for odd in (
        {"ci95": (None, 0.4)},
        {"estimate": 0.0, "ci95": (0.0, 0.0), "threshold": 0.0},
        {"estimate": 1e99, "ci95": (-1e99, 1e99)},
        {"estimate": float("inf"), "ci95": (0.0, 1.0)},
    ):
        ElementTree.fromstring(str(forest(finding(**odd))))


@pytest.mark.parametrize("kind", ["profile", "distribution", "bars", "unheard of"])
def test_draw(kind):
    figure = sample().findings[8].figure.model_copy(update={"kind": kind})
    svg = draw(figure)
    assert svg == draw(figure)
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img" and root.get("aria-label") == figure.alt
    assert "style=" not in svg and "http" not in svg and "#0a0b" not in svg
    assert "holdout entities (never taught)" in svg and "chance" in svg
    assert " id=" not in svg and "url(" not in svg, "many plots lie in one page"


def numbers(path: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?[\d.]+", path)]


def figure(kind: str, *series: Series, **more) -> Figure:
    return Figure(kind=kind, title="", alt="", x_label="x", y_label="y", series=list(series), **more)


def paths(svg: str) -> list[str]:
    """The `d` of every path in a group of its own colour, which are the series', legend's swatches left out."""
    root = ElementTree.fromstring(svg)
    groups = [group for group in root if group.tag == "g" and group.get("stroke")]
    return [path.get("d") for group in groups[: len(groups) // 2] for path in group]


def test_a_line_lies_where_its_values_are():
    """Straight in the data is straight on the page, larger is higher; and what is missing is a gap."""
    line = Series(label="a", x=[0, 1, 2, 3, 4], y=[0, 1, None, 3, 4])
    (first, second), dots = (
        paths(draw(figure("profile", line)))[0].split("M")[1:],
        paths(draw(figure("profile", line)))[1],
    )
    x0, y0, x1, y1 = numbers(first)
    x3, y3, x4, y4 = numbers(second)
    assert x1 - x0 == pytest.approx(x4 - x3, abs=0.3) and x3 - x1 == pytest.approx(2 * (x1 - x0), abs=0.3)
    assert y0 - y1 == pytest.approx(y3 - y4, abs=0.3) and y1 - y3 == pytest.approx(2 * (y0 - y1), abs=0.3)
    assert y0 > y1 > y3 > y4 and dots.count("M") == 4


def test_a_histogram_shows_shares_on_common_bins():
    one = Series(label="a", x=[0.0] * 6 + [6.0] * 2, y=[])
    other = Series(label="b", x=[3.0], y=[], role="control")
    svg = draw(figure("distribution", one, other))
    area, line, lone = paths(svg)
    assert area == line + "Z" and "a (n = 8)" in svg and "b (n = 1)" in svg
    heights = sorted(set(numbers(line)[1::2]), reverse=True)
    base, quarter, three = heights
    assert base - three == pytest.approx(3 * (base - quarter), abs=0.3), "3/4 of the values against 1/4"
    top = min(numbers(lone)[1::2])
    assert base - top == pytest.approx(4 * (base - quarter), abs=0.3), "all of its one value"


def test_bars_reach_from_low_to_high():
    one = Series(label="a", x=[1, 2], y=[0.5, 0.4], lo=[0.3, None], hi=[0.9, None])
    bars, dots = paths(draw(figure("bars", one)))
    first, _, _, second, *_ = bars.split("M")[1:]
    _, low, high = numbers(first)
    _, y, *_ = numbers(dots)
    assert (low - y) == pytest.approx((low - high) / 3, abs=0.2), "0.5 lies a third of the way from 0.3 to 0.9"
    _, from_, to = numbers(second)
    assert from_ == to, "no interval, no bar"


def test_names_that_would_run_into_each_other_are_tilted():
    points = Series(label="a", x=list(range(6)), y=[1] * 6)
    assert "rotate(-35)" not in draw(figure("bars", points, ticks=list("abcdef")))
    assert draw(figure("bars", points, ticks=["magnitude 50 %"] * 6)).count("rotate(-35)") == 6


@pytest.mark.parametrize("kind", ["profile", "distribution", "bars"])
@pytest.mark.parametrize(
    "series",
    [
        [],
        [Series(label="", x=[], y=[])],
        [Series(label="_hidden", x=[1, 2], y=[None, None])],
        [Series(label="$\\frac{", x=[float("nan"), 1e300, 2], y=[1, 2], lo=[None], hi=[3])],
        [Series(label=f"series {index}", x=[1.0], y=[1.0], role="odd") for index in range(40)],
    ],
)
def test_draw_odd_figures(kind, series):
    figure = Figure(kind=kind, title="", alt="", x_label="", y_label="", series=series)
    figure.reference_lines = {"far": 1e200, "near": 0.5}
    ElementTree.fromstring(draw(figure))
