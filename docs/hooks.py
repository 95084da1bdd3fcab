"""What the site has beyond the pages in this folder: those of the repository's root, and what the code says of itself.

- README, CONTRIBUTING and CHANGELOG become pages, their links set right; a link to what is no page loses its link.
- The navigation of `mkdocs.yml` is completed: instruments under their questions, pages without a place at the end.
- Every instrument's page gets the attributes, the module's docstring and the functions of its source, read from the
  code itself, so that they cannot drift.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import posixpath
import re
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from audit.instrument import Instrument, is_attack, load_all
from audit.record import Question

ROOT = Path(__file__).parents[1]
FROM_ROOT = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
"""Pages by the file of the repository's root that they are made of."""

QUESTIONS = {
    Question.TRACE: "Was it unlearned?",
    Question.LEAKAGE: "Does it come out?",
    Question.REPRESENTATION: "Is it still inside?",
    Question.RECOVERY: "Does it come back?",
    Question.UTILITY: "What else was damaged?",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root, and complete the navigation, now that it is known which pages there are."""
    for page, source in FROM_ROOT.items():
        text = (ROOT / source).read_text("utf-8")
        files.append(File.generated(config, page, content=relinked(text, "", files)))
    pages = {file.src_uri for file in files.documentation_pages()}
    nav = _completed(config.nav or [], pages)
    left = sorted(pages - set(_named(nav)))
    config.nav = [*nav, {"More": left}] if left else nav
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Set links out of this folder right, and append to an instrument's page what its source says."""
    path = page.file.src_uri
    text = markdown if path in FROM_ROOT else relinked(markdown, f"docs/{posixpath.dirname(path)}", files)
    folder, _, name = path.removesuffix(".md").rpartition("/")
    return text + reference(registered()[name]) if folder == "instruments" and name != "index" else text


def relinked(text: str, folder: str, files: Files) -> str:
    """Links of a page in a folder of the repository, as links between pages of the site."""
    placed = {source: page for page, source in FROM_ROOT.items()}
    here = posixpath.relpath(folder or ".", "docs") if folder else "."

    def link(found: re.Match[str]) -> str:
        words, path, anchor = found.groups()
        target = posixpath.normpath(posixpath.join(folder, path))
        page = placed.get(target) or target.removeprefix("docs/")
        if target not in placed and not (target.startswith("docs/") and files.get_file_from_path(page)):
            return str(words)
        return f"[{words}]({posixpath.relpath(page, here)}{anchor or ''})"

    pieces = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    relative = r"\[([^\]]*)\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)"
    return "".join(piece if piece.startswith("```") else re.sub(relative, link, piece) for piece in pieces)


@cache
def registered() -> dict[str, Instrument]:
    """The instruments by name, by question and name."""
    return {item.name: item for item in load_all() if isinstance(item, Instrument)}


# --- the navigation


def _completed(nav: list[Any], pages: set[str]) -> list[Any]:
    """The navigation without what does not exist, and with the instruments."""
    made: list[Any] = []
    for entry in nav:
        if entry == "instruments/*":
            made += _instruments(pages)
        elif isinstance(entry, str):
            made += [entry] if entry in pages else []
        else:
            [(title, value)] = entry.items()
            value = _completed(value, pages) if isinstance(value, list) else value
            made += [{title: value}] if isinstance(value, list) or value in pages else []
    return made


def _instruments(pages: set[str]) -> list[Any]:
    """By question; those of images by themselves."""
    found = [item for item in registered().values() if f"instruments/{item.name}.md" in pages]
    groups = [
        (words, [i for i in found if i.question is q and i.modality != "image"]) for q, words in QUESTIONS.items()
    ]
    groups.append(("Images", [i for i in found if i.modality == "image"]))
    return [{words: [{i.name: f"instruments/{i.name}.md"} for i in group]} for words, group in groups if group]


def _named(nav: list[Any]) -> list[str]:
    """All pages of a navigation."""
    made: list[str] = []
    for entry in nav:
        value = entry if isinstance(entry, str) else next(iter(entry.values()))
        made += _named(value) if isinstance(value, list) else [value]
    return made


# --- what the code says


def reference(instrument: Instrument) -> str:
    """Attributes, docstring and functions of an instrument's module, as the end of its page."""
    module = importlib.import_module(type(instrument).__module__)
    path = Path(inspect.getfile(module)).relative_to(ROOT).as_posix()
    rows = {
        "asks": instrument.title,
        "question": f"{instrument.question.value}: {QUESTIONS[instrument.question]}",
        "kind": "attack" if is_attack(instrument) else "instrument",
        "reads": {"text": "language models", "image": "image classifiers"}.get(instrument.modality, "any model"),
        "access": _access(instrument),
        "sets it cannot do without": ", ".join(instrument.sets) or "none",
        "models it cannot do without": ", ".join(("target", *instrument.roles)),
        "runs": _runs(instrument),
        "source": instrument.reference,
    }
    table = "".join(f"| {key} | {value} |\n" for key, value in rows.items())
    said = textwrap.indent(f"```text\n{inspect.cleandoc(module.__doc__ or '')}\n```\n", "    ")
    functions = textwrap.indent(f"```python\n{signatures(inspect.getsource(module), _offered(module))}\n```\n", "    ")
    return (
        f"\n\n## From the source\n\nRead from `{path}` when this page was made.\n\n| | |\n|---|---|\n{table}\n"
        f'??? note "What the module says of itself"\n\n{said}\n??? note "Its functions"\n\n{functions}\n'
    )


def _access(instrument: Instrument) -> str:
    names = [f"{access.name.lower()} for {finding}" for finding, access in instrument.withheld_below.items()]
    return "; ".join([instrument.access.name.lower(), *names])


def _runs(instrument: Instrument) -> str:
    if instrument.aside:
        return f"when asked for by name: {instrument.aside}"
    return f"when asked for by name, or at budget thorough: {instrument.dear}" if instrument.dear else "in every scan"


def _offered(module: Any) -> list[str] | None:
    offered = getattr(module, "__all__", None)
    return None if offered is None else list(offered)


def signatures(source: str, offered: list[str] | None = None) -> str:
    """The module's functions without their bodies: those offered, or those whose names begin with no underscore."""
    made = []
    for node in ast.parse(source).body:
        wanted = isinstance(node, ast.FunctionDef) and (
            node.name in offered if offered is not None else not node.name.startswith("_")
        )
        if isinstance(node, ast.FunctionDef) and wanted:
            said = ast.get_docstring(node)
            node.body = [ast.Expr(ast.Constant(...))]
            head = ast.unparse(node).removesuffix("...").rstrip()
            made.append(head + (f'\n    """{textwrap.indent(said, "    ").strip()}"""' if said else " ..."))
    return "\n\n".join(made) or "# none: the instrument alone"
