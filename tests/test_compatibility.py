"""What others build on stays: the Python that the documentation imports, the command line, the record's schema.

What goes or changes fails here by name; what comes is free, but is only kept from the next renewal on. After a change
that is meant (and told in CHANGELOG.md): `.venv/bin/python -m tests.golden`.
"""

from __future__ import annotations

import json

import pytest
from golden.public import API, COMMANDS, SCHEMA, api, broken_calls, broken_schema, commands, schema

from audit.record import Record
from reports.diff import compare
from reports.html import render_html
from reports.text import summary

RENEW = "if it is meant, say so in CHANGELOG.md and renew: .venv/bin/python -m tests.golden"


def name(line: str) -> str:
    return line.partition("(")[0]


def test_the_python_interface():
    now = {name(line): line for line in api()}
    for kept in API.read_text("utf-8").splitlines():
        assert name(kept) in now, f"{name(kept)} is gone; {RENEW}"
        said = broken_calls(kept, now[name(kept)])
        assert not said, f"{name(kept)} {', '.join(said)}; {RENEW}"


def test_the_command_line():
    kept, now = set(COMMANDS.read_text("utf-8").splitlines()), set(commands())
    gone = sorted(kept - now)
    assert not gone, f"`audit {gone[0]}` is gone or another; {RENEW}"
    named = {line for line in kept if len(line.split()) <= 2}
    added = [line for line in now - kept if " required" in line and any(line.startswith(f"{old} ") for old in named)]
    assert not added, f"`audit {added[0]}` is new, and no command that worked before gives it; {RENEW}"


def test_the_schema_of_the_record():
    said = broken_schema(json.loads(SCHEMA.read_text("utf-8")), schema())
    assert not said, f"{said[0]}; a record that was written before must still be read: {RENEW}"


def test_a_record_of_the_first_version_has_every_face(tmp_path):
    record = Record.read(SCHEMA.with_name("record-1.0.json"))
    assert record.verdict.statement[:40] in render_html(record)
    assert summary(record) and compare(record, record)
    record.write(tmp_path / "record.json")
    assert Record.read(tmp_path / "record.json") == record


# --- that a change is seen


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("m.f(a, b=)", "m.f(a, b=)", ""),
        ("m.f(a, b=)", "m.f(a, b=, c=)", ""),
        ("m.f(a, b=)", "m.f(a, b=, *, c=)", ""),
        ("m.f(a, *, b=)", "m.f(a, b=)", ""),
        ("m.f(a, b=)", "m.f(a=, b=)", ""),
        ("m.f(a)", "m.f(a, *more, **others)", ""),
        ("m.f(a, b=)", "m.f(a)", "takes no b any more"),
        ("m.f(a, b)", "m.f(b, a)", "takes a at another place"),
        ("m.f(a, b=)", "m.f(a, *, b=)", "takes b at another place"),
        ("m.f(a, b=)", "m.f(a, b)", "cannot do without b any more"),
        ("m.f(a)", "m.f(a, *, b)", "cannot do without the new b"),
        ("m.f(a)", "m.f", "is another kind of thing"),
    ],
)
def test_what_breaks_a_call(old, new, said):
    assert (broken_calls(old, new) or [""])[0] == said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s["$defs"]["Finding"]["properties"].pop("unit"), "/$defs/Finding/properties/unit is gone"),
        (lambda s: s["$defs"]["Finding"]["required"].append("unit"), "/$defs/Finding: unit is required, and was not"),
        (lambda s: s["$defs"]["Label"]["enum"].remove("deleted"), '/$defs/Label/enum has no "deleted" any more'),
        (lambda s: s["$defs"]["FileEntry"]["properties"]["size"].update(type="string"),
         '/$defs/FileEntry/properties/size/type is "string", and was "integer"'),
        (lambda s: s["$defs"]["Label"]["enum"].append("later"), ""),
        (lambda s: s["$defs"]["Finding"]["properties"].update(later={"type": "string"}), ""),
        (lambda s: s["$defs"]["Finding"]["required"].remove("statistic"), ""),
    ],
)  # fmt: skip
def test_what_breaks_a_record(change, said):
    changed = schema()
    change(changed)
    assert (broken_schema(schema(), changed) or [""])[0] == said
