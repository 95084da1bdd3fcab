"""The pages in a real browser: Chromium opens and prints them, axe-core finds nothing, hostile text stays text.

The pages are opened from `file://`, as their readers do. axe-core is a script, which the pages' content policy forbids;
so it alone runs in a context that is told to ignore the policy. Everything else is looked at under the policy.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from golden.__main__ import HERE
from sample_record import HOSTILE, empty, hostile, sample

from audit.record import Record
from reports.diff import compare
from reports.diff_html import render_diff
from reports.fleet import Fleet, Row, render_fleet
from reports.html import render_html

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

WCAG = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]


def text_scan() -> Record:
    return Record.read(HERE / "record-1.0.json")


def image_scan() -> Record:
    return Record.read(HERE / "record-1.0-images.json")


def failures() -> Record:
    """A scan in which everything crashed."""
    record = sample()
    for finding in record.findings:
        record.not_run.append(record.not_run[3].model_copy(update={"instrument": finding.instrument}))
    record.findings, record.examples, record.spike = [], [], None
    return record


def fewer(record: Record) -> Record:
    """Every kind of part once or twice: what axe-core costs grows with all that is on the page."""
    record.findings = [f for index, f in enumerate(record.findings) if f.figure or index % 6 == 0]
    record.examples = record.examples[4:8]
    return record


def megabyte() -> Record:
    """A megabyte of text in one answer, in one prompt and in one name."""
    record = fewer(sample())
    text = ("\u202efdp.txt " + "x" * 91) * 10_000
    record.examples[0].generated = record.examples[1].prompt = record.case.name = text
    record.findings[0].id = record.findings[0].figure.alt = record.verdict.limits[0] = text
    return record


def changed() -> Record:
    record = fewer(sample())
    record.environment.seed += 1
    record.findings[0].estimate, record.findings[0].ci95 = 0.5, (0.45, 0.55)
    return record


def fleet() -> str:
    """Two models on two cases, of hostile names: an audit, a failure, and one far from five others."""
    text = HOSTILE + "A" * 300
    rows = [Row.audited(text, text, "x/x", hostile(text), exit_code=1)]
    for place in range(6):
        record = sample()
        record.findings[0].estimate = 0.99 if place == 3 else 0.5
        rows.append(Row.audited("case", f"{place}{text}", f"case/{place}", record, exit_code=1))
    rows.append(Row(case="case", model=text, folder="case/x", state="failed", reason=text, exit_code=4))
    rows.append(Row(case="case", model="late", folder="case/late", state="missing", reason="not run yet", exit_code=4))
    return render_fleet(Fleet.of(text, rows))


PAGES: dict[str, Callable[[], str]] = {
    "fleet": fleet,
    "text": lambda: render_html(text_scan()),
    "images": lambda: render_html(image_scan()),
    "sample": lambda: render_html(fewer(sample())),
    "failures": lambda: render_html(failures()),
    "empty": lambda: render_html(empty()),
    "hostile": lambda: render_html(fewer(hostile(HOSTILE))),
    "megabyte": lambda: render_html(megabyte()),
    "diff": lambda: render_diff(compare(fewer(sample()), changed(), force=True)),
    "diff-hostile": lambda: render_diff(compare(fewer(hostile(HOSTILE)), fewer(hostile(HOSTILE + "B")), force=True)),
}


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    for name, page in PAGES.items():
        (folder / f"{name}.html").write_text(page(), "utf-8")
    return {name: folder / f"{name}.html" for name in PAGES}


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser) -> Iterator[Callable[..., Any]]:
    """Open a page; its requests, errors and dialogs are kept beside it. Closed after the test."""
    contexts = []

    def open_page(path: Path, **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.seen = seen = {"requests": [], "errors": [], "dialogs": []}
        page.on("request", lambda request: seen["requests"].append(request.url))
        page.on("console", lambda message: seen["errors"].append(message.text))
        page.on("pageerror", lambda error: seen["errors"].append(str(error)))
        page.on("dialog", lambda dialog: (seen["dialogs"].append(dialog.message), dialog.dismiss()))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()


def unfold(page: Any) -> None:
    page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true })")


def axe(page: Any, **rules: Any) -> list[str]:
    page.evaluate((files("axe_playwright_python") / "axe.min.js").read_text("utf-8"))
    options = {"runOnly": WCAG, "resultTypes": ["violations"], "preload": False} | rules
    # Of words in drawings axe cannot tell what lies behind them; they have the page's own colours.
    found = page.evaluate("options => axe.run({exclude: ['svg text']}, options)", options)
    return [f"{rule['id']}: {node['html'][:200]}" for rule in found["violations"] for node in rule["nodes"]]


@pytest.mark.parametrize("name", ["text", "images", "sample", "failures", "empty", "hostile", "diff", "fleet"])
def test_axe(name, pages, opened):
    page = opened(pages[name], bypass_csp=True, color_scheme="light")
    if name != "text":  # which is the longest, and is looked at as it opens
        unfold(page)
    assert axe(page) == []


@pytest.mark.parametrize("name", ["sample", "diff", "fleet"])
def test_axe_in_the_dark(name, pages, opened):
    """Of the rules, contrast alone depends on the colours."""
    page = opened(pages[name], bypass_csp=True, color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    unfold(page)
    assert axe(page, runOnly=["color-contrast"]) == []


def test_axe_would_have_seen_it(pages, opened):
    """The positive control: faults of three kinds, planted in the page."""
    page = opened(pages["empty"], bypass_csp=True)
    page.evaluate(
        "document.querySelector('main').insertAdjacentHTML('beforeend', "
        '\'<img src="data:,"><p style="color:#bbb;background:#fff">pale</p><a href="#x"></a>\')'
    )
    assert {line.split(":")[0] for line in axe(page)} == {"image-alt", "color-contrast", "link-name"}


@pytest.mark.parametrize("name", PAGES)
def test_opens_without_a_word(name, pages, opened):
    page = opened(pages[name], viewport={"width": 360, "height": 800})
    assert page.seen["requests"][0] == pages[name].as_uri()
    assert [url for url in page.seen["requests"][1:] if not url.startswith("data:image/png;base64,")] == []
    unfold(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360, "it runs out of a telephone's screen"
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.evaluate("document.images.length > 0") == (name == "images")
    assert page.seen["errors"] == [] and page.seen["dialogs"] == []


@pytest.mark.parametrize("name", PAGES)
def test_prints(name, pages, opened):
    """As text, and not as pictures; with all that is folded away on the screen."""
    page = opened(pages[name])
    pdf = page.pdf(prefer_css_page_size=True)
    assert pdf.startswith(b"%PDF-") and b"/Font" in pdf
    if name == "sample":
        unfold(page)
        assert _sheets(page.pdf(prefer_css_page_size=True)) == _sheets(pdf) >= 8


def _sheets(pdf: bytes) -> int:
    return len(re.findall(rb"/Type\s*/Page\b", pdf))


@pytest.mark.parametrize("name", ["hostile", "diff-hostile", "megabyte", "fleet"])
def test_hostile_text_is_inert(name, pages, opened):
    """What the text would have made, had it been obeyed, is not there; what it says can be read."""
    page = opened(pages[name])
    unfold(page)
    made = "script, iframe, object, embed, form, link, base, [onerror], [onclick], [style], a[href^='javascript']"
    assert page.evaluate("made => document.querySelectorAll(made).length", made) == 0
    assert page.evaluate("document.images.length") == 0
    text = page.evaluate("document.body.textContent")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", text)
    assert "⟦U+202E⟧" in text and ("more characters in the record⟧" in text or name == "hostile")
    assert ("</script><img src=x onerror=alert(1)>" in text) == (name != "megabyte")
    assert page.seen["requests"] == [pages[name].as_uri()] and page.seen["dialogs"] == []
    assert pages[name].stat().st_size < 3_000_000
