"""What the faces share: safe text, a record's fingerprint, and what its fields mean."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from audit.record import Finding, Record
from reports import words
from reports.escape import shown

NAME = 160
"""Characters after which a name is cut."""
NOT_ADVICE = "This is evidence, and not legal advice."

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "palimpsest-audit/record")
_ARXIV = re.compile(r"\barXiv[:\s]\s?(\d{4}\.\d{4,5})", re.IGNORECASE)


def line(text: str, limit: int = 2_000) -> str:
    """`text` on one line, cut to `limit`, with what is invisible in it made visible."""
    return " ".join(shown(text, limit).split())


def digest(record: Record) -> str:
    """SHA-256 of `record.json`, as `Record.write` writes it."""
    return hashlib.sha256(record.to_json().encode("utf-8", "surrogatepass")).hexdigest()


def identifier(record: Record) -> str:
    """A UUID (version 5) that follows from the record."""
    return str(uuid.uuid5(_NAMESPACE, digest(record)))


def timestamp(record: Record) -> str | None:
    """When the record was made, as RFC 3339 with a zone; None where it does not say so."""
    try:
        moment = datetime.fromisoformat(record.created)
    except ValueError:
        return None
    return None if moment.tzinfo is None else moment.isoformat().replace("+00:00", "Z")


def source_url(finding: Finding) -> str | None:
    """Where the statistic's paper can be read, if its reference names an arXiv number."""
    found = _ARXIV.search(finding.reference)
    return f"https://arxiv.org/abs/{found[1]}" if found else None


def says(finding: Finding) -> str:
    """`0.890 [0.800, 0.950] accuracy: knowledge remains`."""
    number = words.number(finding.estimate, *finding.ci95)
    unit = f" {finding.unit}" if finding.unit else ""
    return f"{number} {words.interval(finding.ci95, finding.estimate)}{unit}: {words.MARKS[words.mark_of(finding)][1]}"


def controls(finding: Finding) -> str:
    """`positive: retain 0.970, passed; negative: holdout 0.110, failed, so no evidence can be claimed`."""
    told = []
    for control in finding.controls:
        state = {True: "passed", False: "failed", None: "for comparison"}[control.passed]
        follows = f", {words.GATES[control.gates]}" if control.passed is False and control.gates else ""
        told.append(f"{control.name} {words.number(control.estimate)}, {state}{follows}")
    return "; ".join(told)


def properties(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` without those that are not known, so that an absence is never written as a value."""
    return {name: value for name, value in values.items() if value is not None}


def as_json(data: Any) -> str:
    """Stable JSON. Text of the record has passed `line`, so that no lone surrogate is left in it."""
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
