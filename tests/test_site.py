"""The documentation as a site: it builds without a warning, is whole in itself, and says what the code says."""

from __future__ import annotations

import importlib.util
import re
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from audit.instrument import Instrument, load_all
from audit.record import Question

pytest.importorskip("mkdocs", reason="needs mkdocs-material (the extra `docs`), which is not installed")
pytest.importorskip("material", reason="needs mkdocs-material (the extra `docs`), which is not installed")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make site` builds it: in strict mode a warning is an error."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    out = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(out))
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return out


class Asked(HTMLParser):
    """What a page makes a browser fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("script", "img", "iframe", "source") and values.get("src"):
            self.found.append(str(values["src"]))
        if tag == "link" and values.get("href"):
            self.found.append(str(values["href"]))


def test_it_builds_in_strict_mode_with_every_page(site):
    pages = {page.relative_to(site).with_suffix("").as_posix() for page in site.rglob("*.html")} - {"404"}
    written = {page.relative_to(ROOT / "docs").with_suffix("").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert pages == written | {"index", "contributing", "changelog"}
    assert not (site / "hooks.py").exists()


def test_it_asks_for_nothing_from_elsewhere(site):
    for page in set(site.rglob("*.html")) - {site / "404.html"}:  # that one is served under any address
        asked = Asked()
        asked.feed(page.read_text("utf-8"))
        assert asked.found
        for link in asked.found:
            assert not re.match(r"([a-z]+:)?//", link), f"{page.name}: {link}"
            assert (page.parent / link.split("?")[0]).exists() or link == ".", f"{page.name}: {link}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?([a-z]+:)?//", sheet.read_text("utf-8")), sheet.name


def test_every_instrument_s_page_says_what_the_code_says(site):
    found = [item for item in load_all() if isinstance(item, Instrument)]
    assert len(found) > 40
    for item in found:
        text = (site / "instruments" / f"{item.name}.html").read_text("utf-8")
        said = re.sub(r"<[^>]+>", "", text).replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
        assert "From the source" in said
        assert item.title in said.replace("&#39;", "'")
        assert item.reference.split(";")[0] in said
    page = (site / "instruments" / "membership.html").read_text("utf-8")
    assert "min_k_plus_plus" in page.split("Its functions")[1]
    assert "The reference model" in page.split("What the module says of itself")[1]


def test_every_page_is_in_the_navigation_and_instruments_under_their_questions(site):
    index = (site / "instruments" / "index.html").read_text("utf-8")
    order = [index.index(words) for words in ("Was it unlearned?", "Is it still inside?", "What else was damaged?")]
    assert order == sorted(order)
    assert "More" not in re.findall(r'md-tabs__link">\s*(.*?)\s*<', index)


# --- the hooks


def test_links_are_set_right(hooks):
    class Pages:
        def get_file_from_path(self, path: str) -> Any:
            return path if path in ("cases.md", "instruments/lens.md", "report.png") else None

    def set_right(text: str, folder: str) -> str:
        return hooks.relinked(text, folder, Pages())

    assert set_right("[a](docs/cases.md#sets) ![p](docs/report.png)", "") == "[a](cases.md#sets) ![p](report.png)"
    assert set_right("[c](CONTRIBUTING.md), [l](LICENSE)", "") == "[c](contributing.md), l"
    assert set_right("[r](../README.md), [t](../tests/x.py)", "docs/") == "[r](index.md), t"
    assert set_right("[c](../../CONTRIBUTING.md)", "docs/start") == "[c](../contributing.md)"
    assert set_right("[l](../instruments/lens.md)", "docs/start") == "[l](../instruments/lens.md)"
    kept = "[w](https://example.org/a) [h](#here)\n```\n[x](LICENSE)\n```\n"
    assert set_right(kept, "") == kept


def test_the_navigation_leaves_out_what_is_not_written(hooks):
    nav = ["index.md", {"A": "a.md"}, {"B": ["b.md", {"C": "c.md"}]}]
    assert hooks._completed(nav, {"index.md", "c.md"}) == ["index.md", {"B": [{"C": "c.md"}]}]
    assert hooks._named(nav) == ["index.md", "a.md", "b.md", "c.md"]


def test_functions_are_shown_without_their_bodies(hooks):
    source = 'def f(x: int, *, k: float = 0.2) -> int:\n    """Twice."""\n    return 2 * x\n'
    source += "def _g(): pass\ndef h(): pass\n"
    assert hooks.signatures(source) == 'def f(x: int, *, k: float=0.2) -> int:\n    """Twice."""\n\ndef h(): ...'
    assert hooks.signatures(source, ["h"]) == "def h(): ..."
    assert "alone" in hooks.signatures("x = 1")


def test_an_instrument_s_reference_names_what_it_needs(hooks):
    class Mine(Instrument):
        name, title, question, reference = "mine", "Mine?", Question.REPRESENTATION, "nobody 2026"
        sets, roles, dear = ("forget", "retain"), ("original",), "it takes an hour"

        def requests(self, case, target):
            return []

        def measure(self, case, evidence):
            return []

    text = hooks.reference(Mine())
    assert "| sets it cannot do without | forget, retain |" in text
    assert "| models it cannot do without | target, original |" in text
    assert "budget thorough: it takes an hour" in text
    assert "tests/test_site.py" in text
