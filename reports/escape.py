"""The one place that makes text from a model or a data file safe to show.

A model under audit may print anything, and a report that shows its output must not be steered by it. HTML
syntax is left to Jinja2's autoescape; here goes what autoescape does not see: characters that are invisible,
that reorder the text around them, or that a terminal obeys. Each becomes its code point in white square
brackets, `⟦U+202E⟧`. A literal `⟦` is itself written as a code point, so no text can fake such a mark; hence
`visible` is not idempotent, and is applied exactly once, where text meets a page.

Newline and tab stay, save in `one_line`. Joiners (U+200C, U+200D) are shown as well, although some scripts
need them: in evidence, a character that cannot be seen is worth a mark.
"""

from __future__ import annotations

import re

LONG = 2_000
"""Characters after which any text is cut in a report; the record keeps all of it."""

_INVISIBLE = re.compile(
    "(["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 and C1 controls, DEL; not tab, not newline
    "\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f"  # soft hyphen, joiners, fillers, Arabic mark
    "\u200b-\u200f\u2028-\u202e\u2060-\u206f"  # zero width, line separators, bidi overrides and isolates
    "\u3164\ufe00-\ufe0e\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff"  # fillers, variation selectors, BOM
    "\ud800-\udfff\ue000-\uf8ff"  # lone surrogates, private use
    "\U000e0000-\U000e0fff\U000f0000-\U0010ffff"  # tags (used to smuggle text), private use
    "⟦"
    "])\\1*"
)
_STACKED = re.compile(
    "([\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]{4})"
    "([\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]+)"
)


def visible(text: str) -> str:
    """`text` with every invisible, reordering or terminal-controlling character written as its code point.

    A run of one such character is written once with its length; marks stacked more than four high on one
    letter are counted, for they would paint over the neighbouring lines.
    """
    if text.isascii() and text.isprintable():
        return text
    text = _INVISIBLE.sub(_code_point, text)
    return _STACKED.sub(lambda match: f"{match[1]}⟦+{len(match[2])} combining marks⟧", text)


def shown(text: str, limit: int = LONG) -> str:
    """`text` cut to `limit` characters, saying how many more there are, and made visible."""
    if len(text) <= limit:
        return visible(text)
    return f"{visible(text[:limit])} ⟦… {len(text) - limit:,} more characters in the record⟧"


def one_line(text: str, limit: int = 200) -> str:
    """`text` for one terminal line or one label of a plot: blanks collapsed, cut to `limit`."""
    text = " ".join(text[: 4 * limit].split())
    return visible(text if len(text) <= limit else text[: limit - 1].rstrip() + "…")


def _code_point(match: re.Match[str]) -> str:
    run = len(match[0])
    return f"⟦U+{ord(match[1]):04X}{f' ×{run}' if run > 1 else ''}⟧"
