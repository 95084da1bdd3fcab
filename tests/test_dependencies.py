"""The locked environment: all that is needed is pinned, the bill lists it, and a silent index is said to be."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from dependencies import PROJECT, bill, canonical, closure, known_vulnerabilities, pins, statement

PACKAGES = {"a": "1.0", "b": "2.0", "c": "3.0", "d": "4.0", "e": "5.0"}


@pytest.fixture
def index() -> Iterator[tuple[str, dict[str, Any]]]:
    """An index of packages: its address, and what it answers by path."""
    answers: dict[str, Any] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = answers.get(self.path)
            self.send_response(200 if found is not None else 404)
            self.end_headers()
            self.wfile.write(json.dumps(found).encode() if found is not None else b"not found")

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", answers
    server.shutdown()
    server.server_close()
    thread.join()


def test_all_that_is_needed_to_run_is_pinned_to_what_is_installed():
    pinned, needed = pins(), closure()
    assert {"torch", "transformers", "safetensors", "tokenizers", "jinja2"} <= needed.keys()
    for name, one in needed.items():
        if name != PROJECT:
            assert name in pinned, f"{name} is needed, and constraints.txt pins no version of it"
            assert pinned[name] == one.version, f"{name}: pinned {pinned[name]}, installed {one.version}"


def test_what_develops_it_is_pinned_too():
    assert closure(develop=True).keys() - pins().keys() <= {PROJECT}
    assert "pytest" in closure(develop=True) and "pytest" not in closure()


def test_the_bill_is_valid_and_whole():
    needed, every = closure(), closure(develop=True)
    made = bill(needed, every, "not asked")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(made)) is None
    scopes = {row["name"]: row["scope"] for row in made["components"]}
    assert scopes["torch"] == "required" and scopes["pytest"] == "excluded" and len(scopes) == len(every) - 1
    refs = {row["bom-ref"] for row in made["components"]} | {made["metadata"]["component"]["bom-ref"]}
    edges = {row["ref"]: row["dependsOn"] for row in made["dependencies"]}
    assert edges.keys() == refs and {each for row in edges.values() for each in row} <= refs
    jinja, markup = (f"pkg:pypi/{name}@{pins()[name]}" for name in ("jinja2", "markupsafe"))
    assert markup in edges[jinja]


@pytest.mark.parametrize(("name", "same"), [("Jinja2", "jinja2"), ("ruff", "ruff"), ("a__b.-C", "a-b-c")])
def test_names_are_compared_as_the_index_does(name, same):
    assert canonical(name) == same


def test_a_known_vulnerability_is_found(index):
    address, answers = index
    answers |= {f"/{name}/{version}/json": {"vulnerabilities": []} for name, version in PACKAGES.items()}
    assert statement(PACKAGES, *known_vulnerabilities(PACKAGES, address)) == (
        "no known vulnerabilities (5 of 5 packages checked)"
    )
    answers["/b/2.0/json"] = {"vulnerabilities": [{"id": "PYSEC-1"}, {"id": "PYSEC-2", "withdrawn": "2026-01-01"}]}
    found, unanswered = known_vulnerabilities(PACKAGES, address)
    assert found == {"b": ["PYSEC-1"]} and not unanswered
    assert statement(PACKAGES, found, unanswered) == "known vulnerabilities: b 2.0: PYSEC-1 (5 of 5 packages checked)"


def test_an_index_that_is_silent_is_no_clean_bill(index):
    address, answers = index
    for where in (address, "http://127.0.0.1:9"):
        said = statement(PACKAGES, *known_vulnerabilities(PACKAGES, where))
        assert said.startswith("NOT CHECKED") and "0 of 5 packages checked" in said
    answers |= {f"/{name}/{version}/json": {"vulnerabilities": []} for name, version in PACKAGES.items() if name != "c"}
    said = statement(PACKAGES, *known_vulnerabilities(PACKAGES, address))
    assert said == "no known vulnerabilities (4 of 5 packages checked; NOT CHECKED: c)"
