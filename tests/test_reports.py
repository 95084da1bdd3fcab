"""The report: safe with hostile records, the same bytes each time, readable where things are missing."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console
from sample_record import CHOICES, HOSTILE, empty, hostile, sample

from audit.record import Record
from reports import words
from reports.html import MAX_EXAMPLES, render_html, write_report
from reports.text import summary

ROOT = Path(__file__).parent.parent
VOID = {"meta", "br", "img", "input", "link", "hr", "path", "rect", "line", "circle", "use"}


@pytest.fixture(scope="module")
def page() -> str:
    return render_html(sample())


@pytest.fixture(scope="module")
def hostile_page() -> str:
    return render_html(hostile())


class Outline(HTMLParser):
    """What a browser would build: balanced tags, identifiers, references, text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.errors: list[str] = []
        self.feed(html)
        self.close()
        self.errors += [f"never closed: {tag}" for tag in self.open]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.errors.append(f"unexpected </{tag}> at {self.getpos()}")

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


def pages() -> list[Record]:
    return [sample(), empty(), hostile()]


@pytest.mark.parametrize("record", pages(), ids=["sample", "empty", "hostile"])
def test_structure(record):
    html = render_html(record)
    outline = Outline(html)
    assert outline.errors == []
    tags = [tag for tag, _ in outline.tags]
    assert not {"script", "img", "iframe", "object", "embed", "link", "base", "form"} & set(tags)
    assert tags.count("main") == tags.count("h1") == 1
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in outline.tags:
        assert "style" not in attributes, "inline style would need a weaker policy"
        assert not [name for name in attributes if name.startswith("on")], attributes
        for name in ("href", "src", "xlink:href", "action"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
        for name in ("href", "aria-labelledby"):
            if name in attributes:
                assert attributes[name].removeprefix("#") in ids, attributes
        if tag == "th":
            assert attributes.get("scope") in ("row", "col", "rowgroup")
    assert tags.count("table") == tags.count("caption")
    assert "url(" not in html.replace("url(#", "") and "@import" not in html
    assert len(html.encode()) < 3_000_000


def test_policy_admits_one_stylesheet_only(page):
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]
    assert "default-src &#39;none&#39;" in policy and "unsafe" not in policy
    css = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    assert base64.b64encode(hashlib.sha256(css.encode()).digest()).decode() in policy.replace("&#43;", "+")


def test_hostile_text_is_shown_and_not_obeyed(hostile_page):
    assert "<img" not in hostile_page and "<script" not in hostile_page
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", hostile_page)
    text = "".join(Outline(hostile_page).text)
    assert "⟦U+202E⟧" in text and "⟦U+0000⟧" in text and "</script><img src=x onerror=alert(1)>" in text
    assert "{{7*7}}" in text and "[bold]" in text, "neither a template nor Rich markup"
    assert "more characters in the record⟧" in text


def test_every_string_field_was_poisoned():
    """So that the test above covers fields added to the schema later, too."""

    def strings(value):
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                yield from strings(item)

    clean = {value for value in strings(hostile().model_dump(mode="json")) if not value.startswith(HOSTILE)}
    assert clean <= CHOICES


def test_same_record_same_bytes(page, tmp_path):
    record = sample()
    assert render_html(record) == page == render_html(Record.model_validate_json(record.to_json()))
    path = tmp_path / "record.json"
    record.write(path)
    code = (
        "import sys, hashlib; from pathlib import Path; from audit.record import Record\n"
        "from reports.html import render_html\n"
        "html = render_html(Record.read(Path(sys.argv[1])))\n"
        "assert not {'torch', 'transformers', 'pandas'} & set(sys.modules)\n"
        "print(hashlib.sha256(html.encode()).hexdigest())"
    )
    for seed in ("1", "77"):
        done = run_python(code, str(path), PYTHONHASHSEED=seed, MPLBACKEND="svg", TZ="Asia/Tokyo")
        assert done == hashlib.sha256(page.encode()).hexdigest()


def run_python(code: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light():
    code = "import sys, reports.html, reports.text\nprint({'matplotlib', 'torch', 'numpy'} & set(sys.modules))"
    assert run_python(code) == "set()"


def test_equal_records_in_another_order_give_equal_bytes(page):
    record = sample()
    for owner, name in (
        (record, "models"),
        (record.case, "sets"),
        (record.case, "options"),
        (record.environment, "packages"),
        (record.environment, "noise"),
        (record.cost, "by_instrument"),
        (record.verdict, "coverage"),
        (record.examples[0], "scores"),
    ):
        setattr(owner, name, dict(reversed(getattr(owner, name).items())))
    assert record == sample()
    text = re.sub(r"SHA-256</dt><dd><code>\w+", "", page)
    assert re.sub(r"SHA-256</dt><dd><code>\w+", "", render_html(record)) == text


def test_says_what_the_record_says(page):
    text = " ".join("".join(Outline(page).text).split())
    for sentence in (
        "The model no longer shows the knowledge, but the knowledge is still in it.",
        "below a never-taught model (over-unlearning or output edit)",
        "nothing found (interval inside the threshold)",
        "at most 6.40 % with 95 % confidence, measured on 45 models",
        "Instruments that did not run: 6, of which 2 crashed",
        "What this model is said to have forgotten was found in it",
        "That every single fact is still there.",
        "Somebody who has the model’s files, may read, alter and retrain it",
        "Thorough, the most of three.",
        "Tests that found nothing, and what they leave room for",
        "Someone who only pretends to have forgotten remembers quickly.",
        "95 % interval not computed",
        "It is ⟦U+202E⟧desrever⟦U+202C⟧ here,⟦U+0007⟧ with⟦U+200B⟧hidden signs.",
        "1,235,814,400",
        hashlib.sha256(sample().to_json().encode()).hexdigest(),
    ):
        assert sentence in text, sentence
    for question in words.ASKED.values():
        assert question[1] in text


def test_empty_record_claims_nothing():
    text = " ".join("".join(Outline(render_html(empty())).text).split())
    assert text.count("Not tested: no instrument gave a finding") == 5
    assert "Not measured for this case." in text and "No instrument gave a finding." in text


def test_examples_are_capped():
    record = sample()
    record.examples = record.examples * 6
    html = render_html(record)
    assert html.count('class="example"') == MAX_EXAMPLES
    assert f"{len(record.examples) - MAX_EXAMPLES} more examples" in html


def test_write_report(tmp_path, page):
    assert write_report(sample(), tmp_path) == tmp_path / "report.html"
    assert (tmp_path / "report.html").read_text("utf-8") == page
    assert write_report(sample(), tmp_path / "new" / "other.html").exists()
    assert [path.name for path in tmp_path.rglob("*.tmp")] == []


@pytest.mark.parametrize("width", [60, 80, 160])
@pytest.mark.parametrize("record", pages(), ids=["sample", "empty", "hostile"])
def test_terminal_summary(record, width):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(summary(record))
    text = console.export_text()
    assert all(len(line) <= width for line in text.splitlines())
    assert "\x1b" not in text and "\u202e" not in text
    assert "crashed" in text and words.LABELS[record.verdict.label][0] in text
    if record == sample():
        assert "< 0.001" in text and "knowledge remains" in text and "0.080" in text and "not run" in text


def luminance(color: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_drawings_stand_out_from_the_page(scheme):
    """axe-core cannot tell what lies behind words and lines in a drawing: 4.5 to 1 for words, 3 to 1 for lines."""
    css = (ROOT / "reports" / "templates" / "report.css").read_text("utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", css, re.DOTALL)[:2]
    colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", light + (dark if scheme == "dark" else "")))

    def contrast(one: str, other: str) -> float:
        low, high = sorted((luminance(colors[one]), luminance(colors[other])))
        return (high + 0.05) / (low + 0.05)

    for text, behind in (("plot-ink", "sheet"), ("plot-ink", "plot-plate"), ("soft", "sheet"), ("ink", "sheet")):
        assert contrast(text, behind) >= 4.5, (text, behind)
    lines = ("plot-target", "plot-control", "plot-reference", *(key for key in words.MARKS))
    for line in lines:
        assert min(contrast(line, "sheet"), contrast(line, "zone" if line in words.MARKS else "plot-plate")) >= 3, line
