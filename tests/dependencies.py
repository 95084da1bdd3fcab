"""What an installation is made of, and what is known against it:

    .venv/bin/python -m tests.dependencies          # build/sbom.cdx.json, and known vulnerabilities

The bill of materials (CycloneDX 1.6) lists what `constraints.txt` pins and this environment holds: what Palimpsest
needs to run, and, as excluded, what only its development does. The package index is then asked what vulnerabilities it
knows of each version (PyPI's JSON interface; nothing else on the network). One that is known is an error. Where the
index does not answer, that is no error, for it says nothing of the packages; but it is said, here and in the bill.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = "palimpsest-audit"
INDEX = "https://pypi.org/pypi"
BILL = ROOT / "build" / "sbom.cdx.json"
_UNANSWERED = 3
"""So many packages in a row that the index knows nothing of, and it is no such index."""


def canonical(name: str) -> str:
    """A package's name as the index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(path: Path = ROOT / "constraints.txt") -> dict[str, str]:
    """Version by package, as pinned."""
    lines = (line.partition("#")[0].strip() for line in path.read_text("utf-8").splitlines())
    return {canonical(name): version for name, _, version in (line.partition("==") for line in lines if line)}


@dataclass(frozen=True)
class Installed:
    """One package of this environment."""

    name: str
    version: str
    needs: tuple[str, ...]
    license: str


def closure(*, develop: bool = False) -> dict[str, Installed]:
    """The project and all that `pyproject.toml` makes it need here, by name; to develop it too, if asked.

    What a package needs only for an optional part that nobody asked for, or on other systems, is left out.
    """
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    roots = [*project["dependencies"], *(project["optional-dependencies"]["dev"] if develop else [])]
    needs: dict[str, set[str]] = {PROJECT: {canonical(Requirement(root).name) for root in roots}}
    found = {PROJECT: Installed(PROJECT, project["version"], (), project["license"])}
    pending = [Requirement(root) for root in roots]
    asked: set[tuple[str, frozenset[str]]] = set()
    while pending:
        wanted = pending.pop()
        name, extras = canonical(wanted.name), frozenset(wanted.extras)
        if (name, extras) in asked:
            continue
        asked.add((name, extras))
        package = distribution(name)
        found[name] = Installed(name, package.version.partition("+")[0], (), _license(package))
        for each in map(Requirement, package.requires or ()):
            if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                needs.setdefault(name, set()).add(canonical(each.name))
                pending.append(each)
    return {name: replace(one, needs=tuple(sorted(needs.get(name, ())))) for name, one in found.items()}


def _license(package: Distribution) -> str:
    meta = package.metadata
    text = meta.get("License-Expression") or meta.get("License") or ""
    return text if len(text) <= 60 and "\n" not in text else ""


def bill(needed: Mapping[str, Installed], every: Mapping[str, Installed], said: str) -> dict[str, Any]:
    """The bill of materials: `needed` to run, the rest of `every` for development. The same here, the same bytes."""
    components = [
        {
            "type": "library",
            "bom-ref": f"pkg:pypi/{name}@{one.version}",
            "name": name,
            "version": one.version,
            "purl": f"pkg:pypi/{name}@{one.version}",
            "scope": "required" if name in needed else "excluded",
            **({"licenses": [{"license": {"name": one.license}}]} if one.license else {}),
        }
        for name, one in sorted(every.items())
        if name != PROJECT
    ]
    refs = {name: f"pkg:pypi/{name}@{one.version}" for name, one in every.items()}
    own = every[PROJECT]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {"type": "application", "bom-ref": refs[PROJECT], "name": PROJECT, "version": own.version},
            "properties": [{"name": "palimpsest:vulnerabilities", "value": said}],
        },
        "components": components,
        "dependencies": [
            {"ref": refs[name], "dependsOn": [refs[each] for each in one.needs if each in refs]}
            for name, one in sorted(every.items())
        ],
    }


def known_vulnerabilities(packages: Mapping[str, str], index: str = INDEX) -> tuple[dict[str, list[str]], list[str]]:
    """What the index knows against each version, by package; and the packages that it did not answer for."""
    found: dict[str, list[str]] = {}
    unanswered: list[str] = []
    row = 0
    for name, version in sorted(packages.items()):
        if row < _UNANSWERED:
            try:
                with urllib.request.urlopen(f"{index}/{name}/{version}/json", timeout=20) as answer:
                    rows = json.load(answer)["vulnerabilities"]
            except (OSError, ValueError, KeyError, TypeError):
                row += 1
                unanswered.append(name)
                continue
            row = 0
            if told := [str(each.get("id")) for each in rows if not each.get("withdrawn")]:
                found[name] = told
        else:
            unanswered.append(name)
    return found, unanswered


def statement(packages: Mapping[str, str], found: Mapping[str, list[str]], unanswered: list[str]) -> str:
    """What was asked and what was said, in one line that cannot be read as better than it is."""
    asked = f"{len(packages) - len(unanswered)} of {len(packages)} packages checked"
    if found:
        named = "; ".join(f"{name} {packages[name]}: {', '.join(ids)}" for name, ids in sorted(found.items()))
        return f"known vulnerabilities: {named} ({asked})"
    if len(unanswered) == len(packages):
        return f"NOT CHECKED for known vulnerabilities: the package index did not answer ({asked})"
    left = (
        f"; NOT CHECKED: {', '.join(unanswered[:20])}{' and more' if len(unanswered) > 20 else ''}"
        if unanswered
        else ""
    )
    return f"no known vulnerabilities ({asked}{left})"


def main() -> int:
    """Write the bill, check it, print what is known. 1 if a vulnerability is."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    needed, every = closure(), closure(develop=True)
    packages = {name: one.version for name, one in every.items() if name != PROJECT}
    found, unanswered = known_vulnerabilities(packages)
    said = statement(packages, found, unanswered)
    text = json.dumps(bill(needed, every, said), indent=1, sort_keys=True) + "\n"
    if (trouble := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)) is not None:
        raise SystemExit(f"{BILL}: no valid CycloneDX: {str(trouble)[:500]}")
    BILL.parent.mkdir(exist_ok=True)
    BILL.write_text(text, "utf-8")
    counts = f"{len(needed) - 1} packages needed to run, {len(every) - len(needed)} more to develop"
    print(f"{BILL.relative_to(ROOT)}: {counts}")
    print(said)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
