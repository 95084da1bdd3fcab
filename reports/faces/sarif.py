"""SARIF 2.1.0 (OASIS, 2020; errata 01, 2023), for code-scanning pages and whatever else collects such logs.

One run. A rule is one statistic, a result is one finding, an artifact is one file of a model:

| a finding that is | kind | level |
|---|---|---|
| evidence that knowledge remains | fail | error |
| evidence of damage, or of lying beyond a never-taught model | fail | warning |
| evidence of an unlearning, or of what claims nothing | informational | none |
| inconclusive | open | none |
| none | pass | none |

SARIF admits no level but `none` beside a kind other than `fail` (3.27.10). Instruments that crashed are tool execution
notifications, those that lacked an input tool configuration notifications: neither is a result, nor its absence. A
result is of the whole model; its place is the largest file of the target, which is where the weights are.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote

from audit.record import FileEntry, Finding, NotRun, Outcome, Record, Side
from reports import words
from reports.faces.parts import NAME, as_json, identifier, line, properties, says, source_url, timestamp

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"

_LEVELS = {Side.REMAINS: "error", Side.BEYOND: "warning", Side.DAMAGE: "warning", Side.EVASION: "warning"}


def render_sarif(record: Record) -> str:
    """The log as JSON."""
    rules = {_rule_id(finding): _rule(finding) for finding in reversed(record.findings)}
    order = {rule: index for index, rule in enumerate(sorted(rules))}
    artifacts = _artifacts(record)
    place = _place(record, artifacts)
    run = {
        "tool": {
            "driver": {
                "name": line(record.tool.name, NAME),
                "version": line(record.tool.version, NAME),
                "rules": [rules[rule] for rule in order],
                "notifications": [{"id": name} for name in sorted({_name(row) for row in record.not_run})],
            }
        },
        "automationDetails": {"id": f"palimpsest/{line(record.case.name, NAME)}", "guid": identifier(record)},
        "invocations": [_invocation(record)],
        "originalUriBaseIds": {
            _base(role): _message(f"the folder of the {role} model, {model.name}")
            for role, model in sorted(record.models.items())
        },
        "artifacts": artifacts,
        "results": [_result(finding, order[_rule_id(finding)], place) for finding in record.findings],
        "columnKind": "unicodeCodePoints",
        "properties": properties(
            {
                "verdict": record.verdict.label.value,
                "statement": line(record.verdict.statement),
                "falsePositiveRate": line(words.error_rate(record.verdict.false_positive_rate)),
                "power": line(words.power(record.verdict.power)),
                "limits": [line(text) for text in record.verdict.limits],
            }
        ),
    }
    return as_json({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]})


def plain(text: str) -> str:
    """`text` as a SARIF message: no embedded link (3.11.6), no placeholder (3.11.5)."""
    return re.sub(r"\](?=\()", "] ", line(text)).replace("{", "{{").replace("}", "}}")


def _message(text: str) -> dict[str, Any]:
    return {"description": {"text": plain(text)}}


def _rule_id(finding: Finding) -> str:
    return line(finding.id, NAME)


def _name(row: NotRun) -> str:
    return line(row.instrument, NAME)


def _base(role: str) -> str:
    return line(role, NAME).upper()


def _rule(finding: Finding) -> dict[str, Any]:
    title, asked = words.ASKED[finding.question]
    return properties(
        {
            "id": _rule_id(finding),
            "shortDescription": {"text": plain(finding.statistic)},
            "fullDescription": {"text": plain(f"{title}: {asked} Larger means: {finding.orientation}.")},
            "helpUri": source_url(finding),
            "help": {"text": plain(f"Null hypothesis: {finding.null}. Source: {finding.reference}")},
            "properties": {"tags": [finding.question.value]},
        }
    )


def _result(finding: Finding, rule: int, place: list[dict[str, Any]]) -> dict[str, Any]:
    kind, level = _kind(finding)
    reason = f" {finding.reason}" if finding.reason else ""
    low, high = finding.ci95
    return {
        "ruleId": _rule_id(finding),
        "ruleIndex": rule,
        "kind": kind,
        "level": level,
        "message": {"text": plain(f"{finding.statistic} ({finding.split}): {says(finding)}.{reason}")},
        "locations": place,
        "partialFingerprints": {"finding/v1": _rule_id(finding)},
        "properties": properties(
            {
                "question": finding.question.value,
                "instrument": line(finding.instrument, NAME),
                "split": line(finding.split, NAME),
                "side": finding.side.value,
                "decides": list(finding.decides),
                "estimate": finding.estimate,
                "ci95Low": low,
                "ci95High": high,
                "pAdjusted": finding.p_adjusted,
                "threshold": finding.threshold,
                "nullValue": finding.null_value,
                "n": finding.n,
                "controls": [
                    properties({"name": line(one.name, NAME), "estimate": one.estimate, "passed": one.passed})
                    for one in finding.controls
                ],
            }
        ),
    }


def _kind(finding: Finding) -> tuple[str, str]:
    if finding.verdict is Outcome.NONE:
        return "pass", "none"
    if finding.verdict is Outcome.INCONCLUSIVE:
        return "open", "none"
    return ("fail", _LEVELS[finding.side]) if finding.side in _LEVELS else ("informational", "none")


def _invocation(record: Record) -> dict[str, Any]:
    def notice(row: NotRun, level: str) -> dict[str, Any]:
        text = f"{row.instrument} {'crashed' if row.failed else 'did not run'}: {row.reason}"
        about = {"question": row.question.value} if row.question else {}
        return {
            "descriptor": {"id": _name(row)},
            "level": level,
            "message": {"text": plain(text)},
            "properties": about,
        }

    return properties(
        {
            "executionSuccessful": not any(row.failed for row in record.not_run),
            "commandLine": line(record.tool.command),
            "endTimeUtc": timestamp(record),
            "toolExecutionNotifications": [notice(row, "error") for row in record.not_run if row.failed],
            "toolConfigurationNotifications": [notice(row, "note") for row in record.not_run if not row.failed],
        }
    )


def _artifacts(record: Record) -> list[dict[str, Any]]:
    """Every file of every model, once."""
    found: list[dict[str, Any]] = []
    for role, model in sorted(record.models.items()):
        for file in sorted(model.files, key=lambda file: (file.path, file.size, file.sha256)):
            artifact = _artifact(role, file)
            if artifact not in found:
                found.append(artifact)
    return found


def _artifact(role: str, file: FileEntry) -> dict[str, Any]:
    return {
        "location": {"uri": quote(line(file.path)), "uriBaseId": _base(role)},
        "length": file.size,
        "hashes": {"sha-256": line(file.sha256, NAME)},
    } | ({"roles": ["analysisTarget"]} if role == "target" else {})


def _place(record: Record, artifacts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where every result is: in the target, and there in its largest file."""
    target = record.models.get("target")
    if target is None:
        return []
    place: dict[str, Any] = {"logicalLocations": [{"name": line(target.name, NAME), "kind": "module"}]}
    if target.files:
        artifact = _artifact("target", max(target.files, key=lambda file: (file.size, file.path)))
        place["physicalLocation"] = {"artifactLocation": artifact["location"] | {"index": artifacts.index(artifact)}}
    return [place]
