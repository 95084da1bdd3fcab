"""Longevity: records that a release wrote are read and drawn by every later one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from golden.__main__ import DIGESTS, HERE, lines
from pydantic import BaseModel

from audit import record as schema
from audit.errors import BadInput
from audit.record import SCHEMA_VERSION, Record
from reports.html import render_html

TEXT = HERE / f"record-{SCHEMA_VERSION}.json"


def test_every_schema_version_has_its_golden_record():
    """A minor version that adds a field leaves the older record here, and adds one of its own."""
    assert TEXT.exists(), f"the schema is {SCHEMA_VERSION}: add a record that this version wrote"


def test_reports_are_the_same_bytes():
    kept = DIGESTS.read_text("utf-8").splitlines()
    assert lines() == kept, "the report of a golden record changed; if on purpose: .venv/bin/python -m tests.golden"


def required(value: Any) -> Any:
    """What is left of a record without the fields that have a default: what an older minor version wrote at least."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        return {name: required(getattr(value, name)) for name, field in fields.items() if field.is_required()}
    if isinstance(value, dict):
        return {name: required(each) for name, each in value.items()}
    return [required(each) for each in value] if isinstance(value, list) else value


def test_an_older_minor_version_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(schema, "SCHEMA_VERSION", "1.7")
    old = required(Record.read(TEXT)) | {"schema_version": "1.0"}
    assert "reason" not in old["findings"][0] and "spike" not in old and "power" not in old["verdict"]
    path = tmp_path / "record.json"
    path.write_text(json.dumps(old, default=str), "utf-8")
    record = Record.read(path)
    assert record.schema_version == "1.0" and len(record.findings) == len(old["findings"])
    assert "schema 1.0" in render_html(record)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"schema_version": "1.9", "later": 1}, "schema_version '1.9' is newer than '1.0'"),
        ({"schema_version": "2.0"}, "schema_version '2.0', this tool reads '1.0'"),
        ({"schema_version": "1.x"}, "schema_version '1.x', this tool reads '1.0'"),
        ({"later": 1}, "field later: Extra inputs are not permitted"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path: Path, changed, said):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(json.loads(TEXT.read_text("utf-8")) | changed), "utf-8")
    with pytest.raises(BadInput, match=said):
        Record.read(path)
