"""Reference profiles: thresholds fitted on models of known history, and the error rates measured with them.

    profile = fitting(findings, domain)            # the shipped profile that fits a case, or None
    judged = judge(profile.applied(findings))      # `audit.verdict`

A profile is a small versioned JSON file. It says for which cases it holds (`Domain`), from which effect on a
statistic is evidence (the largest effect seen in models that were never taught, and a quarter more), and how often
verdicts made by it were wrong, counted on models that it was not fitted on. `audit calibrate` makes one; those in
`audit/profiles/` come with the package. Where none fits, a scan says so and judges by the nominal thresholds.

Trap: a profile from small models trained on an invented world says little about a large pretrained model. `Domain`
therefore holds the size of the models, and a case outside is not covered.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from audit.errors import BadInput
from audit.record import ErrorRate, Finding, Power
from audit.verdict import KNOWLEDGE

SCHEMA = "palimpsest/profile/1"


class Domain(BaseModel):
    """Which cases a profile was made on: one fits if it lies within all of these.

    Attributes:
        access, budget: as in the case's options.
        sets: the example sets of the cases; a case must have them all.
        roles: the models of the cases; a case must have these and no other, for they are what is compared with.
        statistics: ids of the findings; a case must have them all, and no other on the questions about knowledge.
        parameters: fewest and most of the models.
        entities: fewest and most in the forget set.
    """

    model_config = ConfigDict(extra="forbid")

    access: str
    budget: str
    sets: tuple[str, ...]
    roles: tuple[str, ...]
    statistics: tuple[str, ...]
    parameters: tuple[int, int]
    entities: tuple[int, int]

    def lacks(self, case: Domain) -> list[str]:
        """Why a case (as a domain of its own) lies outside; empty if it does not."""
        reasons = [
            f"its {name} is {theirs}, the profile's {ours}"
            for name, ours, theirs in (("access", self.access, case.access), ("budget", self.budget, case.budget))
            if ours != theirs
        ]
        if sorted(self.roles) != sorted(case.roles):
            reasons.append(f"its models are {', '.join(sorted(case.roles))}, the profile's {', '.join(self.roles)}")
        reasons += [f"it has no {name} set" for name in self.sets if name not in case.sets]
        missing = sorted(set(self.statistics) - set(case.statistics))
        reasons += [f"it has no finding {missing[0]}"] if missing else []
        for name, (least, most), (low, high) in (
            ("parameters", self.parameters, case.parameters),
            ("forget entities", self.entities, case.entities),
        ):
            if low < least or high > most:
                reasons.append(f"{name}: {low:,}, the profile's models have {least:,} to {most:,}")
        return reasons


class Profile(BaseModel):
    """What was fitted, on what, and how often it errs."""

    model_config = ConfigDict(extra="forbid")

    format: str = SCHEMA
    name: str
    made_by: str = ""
    release: str = ""
    organisms: dict[str, int]
    domain: Domain
    thresholds: dict[str, tuple[float, float]]
    """By finding id: the effect above, and below, the null value from which on there is evidence."""
    false_positives: ErrorRate
    power: Power
    balanced_accuracy: tuple[float, float, float] | None = None
    """Of held-out verdicts on the classes labelled by construction, with its 95 % interval."""

    def applied(self, findings: Sequence[Finding]) -> list[Finding]:
        """The findings with the fitted thresholds; those that the profile's error rates know nothing of decide nothing.

        Evidence from these can still keep a verdict from being `deleted`, which raises no false alarm.
        """
        unmeasured = set(self.unmeasured(findings))
        fitted = [f.model_copy(update={"fitted": self.thresholds.get(f.id)}) for f in findings]
        return [f.model_copy(update={"decides": (False, False)}) if f.id in unmeasured else f for f in fitted]

    def unmeasured(self, findings: Sequence[Finding]) -> list[str]:
        """Findings on remaining knowledge that were not among those whose verdicts were counted, by id."""
        return [f.id for f in findings if f.question in KNOWLEDGE and f.id not in self.domain.statistics]

    def to_json(self) -> str:
        """As kept in a file."""
        return json.dumps(self.model_dump(mode="json"), indent=1) + "\n"


def read_profile(path: Path) -> Profile:
    """A profile from a file.

    Raises:
        BadInput: unreadable, no profile, or one of another format.
    """
    try:
        return _parse(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError, ValueError) as error:
        raise BadInput(f"{path}: no reference profile ({str(error).splitlines()[0]})") from None


def shipped() -> list[Profile]:
    """The profiles that come with the package, by name."""
    folder = files("audit").joinpath("profiles")
    if not folder.is_dir():
        return []
    found = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".json")), key=lambda entry: entry.name)
    return [_parse(entry.read_text("utf-8")) for entry in found]


def fitting(case: Domain, profiles: Sequence[Profile]) -> tuple[Profile | None, list[str]]:
    """The first profile that fits a case; if none does, why not, a line for each."""
    reasons = []
    for profile in profiles:
        lacks = profile.domain.lacks(case)
        if not lacks:
            return profile, []
        reasons.append(f"reference profile {profile.name} does not fit: {lacks[0]}")
    return None, reasons


def _parse(text: str) -> Profile:
    profile = Profile.model_validate_json(text)
    if profile.format != SCHEMA:
        raise ValueError(f"format {profile.format!r}, this tool reads {SCHEMA!r}")
    return profile
