"""CycloneDX 1.6 ML-BOM: the audited model as one component, to be taken over into a bill of materials.

The component's model card carries the findings as performance metrics with their intervals, what was not shown as
technical limitations, damage as trade-offs, and what remains as ethical considerations. The model before unlearning is
its ancestor. The serial number follows from the record (UUID 5), so that the same audit gives the same document.
"""

from __future__ import annotations

import re
from typing import Any

from audit.record import Finding, ModelEntry, Outcome, Record, Side
from reports import words
from reports.faces.parts import NAME, NOT_ADVICE, as_json, digest, identifier, line, properties, says, timestamp

SCHEMA = "http://cyclonedx.org/schema/bom-1.6.schema.json"


def render_mlbom(record: Record) -> str:
    """The document as JSON."""
    tool = {"type": "application", "name": line(record.tool.name, NAME), "version": line(record.tool.version, NAME)}
    target = record.models.get("target")
    return as_json(
        {
            "$schema": SCHEMA,
            "bomFormat": "CycloneDX",
            "specVersion": "1.6",
            "serialNumber": f"urn:uuid:{identifier(record)}",
            "version": 1,
            "metadata": properties({"timestamp": timestamp(record), "tools": {"components": [tool]}}),
            "components": [_audited(record, target)] if target else [],
        }
    )


def _audited(record: Record, target: ModelEntry) -> dict[str, Any]:
    verdict = record.verdict
    title, plain = words.LABELS[verdict.label]
    component = _model("target", target)
    before = record.models.get("original")
    if before is not None:
        component["pedigree"] = {
            "ancestors": [_model("original", before)],
            "notes": "The same model before unlearning, as it was given to the audit.",
        }
    component["description"] = line(f"Audited for unlearning. {title}. {plain} {NOT_ADVICE}")
    component["externalReferences"] = [
        {
            "type": "evidence",
            "url": "record.json",
            "comment": "Everything that the audit found",
            "hashes": [{"alg": "SHA-256", "content": digest(record)}],
        }
    ]
    component["modelCard"] = {
        "modelParameters": {
            "modelArchitecture": line(target.architecture, NAME),
            "datasets": _unique(
                {
                    "type": "dataset",
                    "name": line(name, NAME),
                    "description": f"{words.plural(entry.count, 'example')} that the audit asked; "
                    f"SHA-256 {line(entry.digest, NAME)}",
                }
                for name, entry in sorted(record.case.sets.items())
            ),
        },
        "quantitativeAnalysis": {"performanceMetrics": [_metric(finding) for finding in record.findings]},
        "considerations": {
            "technicalLimitations": _limits(record),
            "performanceTradeoffs": _told(record, Side.DAMAGE),
            "ethicalConsiderations": [
                {"name": text, "mitigationStrategy": "None is claimed: the finding stands as it was measured."}
                for text in _told(record, Side.REMAINS)
            ],
        },
    }
    told = {
        "verdict": verdict.label.value,
        "statement": verdict.statement,
        "false-positive-rate": words.error_rate(verdict.false_positive_rate),
        "power": words.power(verdict.power),
        "profile": verdict.profile,
    }
    component["properties"] += [
        {"name": f"palimpsest:{name}", "value": line(text)} for name, text in told.items() if text
    ]
    return component


def _model(role: str, model: ModelEntry) -> dict[str, Any]:
    """A model and its files. Its own digest is over a listing, and of no single file: so it is no CycloneDX hash."""
    known = {
        "role": role,
        "digest": line(model.digest, NAME),
        "parameters": str(model.parameters),
        "dtype": line(model.dtype, NAME),
    }
    files = sorted(model.files, key=lambda file: (file.path, file.size, file.sha256))
    return {
        "type": "machine-learning-model",
        "bom-ref": f"palimpsest:{role}",
        "name": line(model.name, NAME),
        "properties": [{"name": f"palimpsest:{name}", "value": value} for name, value in known.items()],
        "components": _unique(
            {
                "type": "file",
                "name": line(file.path),
                "hashes": [{"alg": "SHA-256", "content": file.sha256}] if _is_hash(file.sha256) else [],
            }
            for file in files
        ),
    }


def _is_hash(text: str) -> bool:
    return re.fullmatch("[0-9a-fA-F]{64}", text) is not None


def _unique(rows: Any) -> list[dict[str, Any]]:
    """CycloneDX admits no component twice."""
    found: list[dict[str, Any]] = []
    for row in rows:
        if row not in found:
            found.append(row)
    return found


def _metric(finding: Finding) -> dict[str, Any]:
    low, high = finding.ci95
    interval = properties(
        {
            "lowerBound": None if low is None else repr(low),
            "upperBound": None if high is None else repr(high),
        }
    )
    return properties(
        {
            "type": line(f"{finding.id}: {finding.statistic}" + (f" ({finding.unit})" if finding.unit else "")),
            "value": "not computed" if finding.estimate is None else repr(finding.estimate),
            "slice": line(finding.split, NAME),
            "confidenceInterval": interval or None,
        }
    )


def _limits(record: Record) -> list[str]:
    limits = [line(text) for text in record.verdict.limits]
    untested = [answer.title for answer in words.answers(record) if answer.mark == "untested"]
    limits += [f"Not tested: {title}." for title in untested]
    return limits + [line(f"Did not run: {row.instrument}, {row.reason}") for row in record.not_run]


def _told(record: Record, side: Side) -> list[str]:
    return [
        line(f"{finding.statistic}, {says(finding)}")
        for finding in record.findings
        if finding.verdict is Outcome.EVIDENCE and finding.side is side
    ]
