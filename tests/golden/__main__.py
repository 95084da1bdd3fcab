"""Renew, on purpose, the digests of the reports that are drawn from the golden records, and what others build on:

    .venv/bin/python -m tests.golden

Each `record-VERSION*.json` is a record as a release wrote it, trimmed, and is never edited: whatever else changes, it
must still be read. Its report may look better from one release to the next, but not by accident.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from audit.record import Record
from reports.html import render_html

from .public import API, COMMANDS, SCHEMA, api, commands, schema

HERE = Path(__file__).parent
DIGESTS = HERE / "reports.sha256"


def lines() -> list[str]:
    """`digest  record`, as `sha256sum` writes them, of the reports as they are drawn now."""
    records = sorted(HERE.glob("record-*.json"))
    return [f"{hashlib.sha256(render_html(Record.read(path)).encode()).hexdigest()}  {path.name}" for path in records]


if __name__ == "__main__":
    DIGESTS.write_text("\n".join(lines()) + "\n", "utf-8")
    API.write_text("\n".join(api()) + "\n", "utf-8")
    COMMANDS.write_text("\n".join(commands()) + "\n", "utf-8")
    SCHEMA.write_text(json.dumps(schema(), indent=1, sort_keys=True) + "\n", "utf-8")
