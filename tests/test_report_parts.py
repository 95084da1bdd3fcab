"""What reports are made of: answers, numbers, text made safe, drawings."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from sample_record import empty, sample

from audit.record import ErrorRate, Figure, Finding, Outcome, Series, Side
from reports import words
from reports.escape import one_line, shown, visible
from reports.forest import forest
from reports.plots import draw

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
    one, two = (set(re.findall(r' id="([^"]+)"', draw(figure, prefix=prefix))) for prefix in ("a", "b"))
    assert one and not one & two


def test_draw_leaves_matplotlib_as_it_was():
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    with mpl.rc_context({"font.size": 30, "svg.fonttype": "path", "lines.linewidth": 9}):
        svg = draw(sample().findings[8].figure)
    assert svg == draw(sample().findings[8].figure), "the user's settings do not reach the report"
    assert dict(mpl.rcParams) == before


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
