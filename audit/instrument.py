"""The contract of an instrument, and the registry that finds instruments by name.

An instrument says what must be captured (`requests`) and turns evidence into findings (`measure`), a pure
function. An attack is an instrument that also alters the target (`stages`, `run`) and asks for the same captures
of every altered model. Instruments are found through the entry-point group `palimpsest.instruments`, this
project's own and third parties' alike, and imported only when asked for.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, ClassVar

from audit.errors import BadInput
from audit.record import Finding, Question

if TYPE_CHECKING:
    from audit.case import Case
    from audit.evidence import Arrays, Evidence
    from audit.plan import AnyRequest
    from audit.quantities import Quantity
    from audit.tokens import Tokens

GROUP = "palimpsest.instruments"
_HOST = "palimpsest-audit"


class Access(IntEnum):
    """What the auditor can see of the model; each level includes those below it."""

    TEXT = 0
    LOGPROBS = 1
    WEIGHTS = 2


class Instrument(ABC):
    """A detector, a probe or (see `Attack`) an attack.

    Class attributes:
        name: as on the command line; equal to its entry point's.
        title: a few words for people.
        question: which of the five it answers.
        access: the least access it needs.
        withheld_below: findings that need more, by name, and how much; below that they are left out, and said to be.
        spares: findings that need a quantity which not every interface gives, by name, and that quantity.
        sets: example sets it cannot do without.
        roles: models it cannot do without, besides the target.
        watches: attacks whose altered models it wants to see as well: `requests` is called for these too.
        dear: why it is no part of every scan, in a phrase; if so it runs at budget thorough, or when named.
        aside: why it says nothing of the model under audit, in a phrase, if it does not: it then runs only when named.
        modality: the models it reads: `text` (`audit.target.Target`), `image` (`audit.image_target.ImageTarget`),
            or `any` (`audit.opened.OpenModel`).
        reference: the paper, and the section, it comes from.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    question: ClassVar[Question]
    access: ClassVar[Access] = Access.LOGPROBS
    withheld_below: ClassVar[Mapping[str, Access]] = {}
    spares: ClassVar[Mapping[str, Quantity]] = {}
    sets: ClassVar[tuple[str, ...]] = ("forget",)
    roles: ClassVar[tuple[str, ...]] = ()
    watches: ClassVar[tuple[str, ...]] = ()
    dear: ClassVar[str] = ""
    aside: ClassVar[str] = ""
    modality: ClassVar[str] = "text"
    reference: ClassVar[str]

    def missing(self, case: Case) -> str | None:
        """Why this instrument cannot run on this case, in one phrase; None if it can."""
        sets = [name for name in self.sets if name not in case.sets]
        if sets:
            return f"needs the {' and '.join(sets)} set"
        roles = [role for role in self.roles if role not in case.models]
        if roles:
            return f"needs the {' and '.join(roles)} model"
        if self.access > case.options.access:
            return _lacking(self.access, case)
        if self.name in case.options.only:
            return None
        if self.aside:
            return f"{self.aside}, and runs when asked for by name (--only)"
        if self.dear and case.options.budget != "thorough":
            return f"{self.dear}: runs at budget thorough, or when asked for by name (--only)"
        return None

    def withheld(self, case: Case) -> dict[str, str]:
        """Findings left out though the instrument runs, by id, and why: they need more access than the audit has."""
        return {
            f"{self.name}/{finding}": _lacking(access, case)
            for finding, access in self.withheld_below.items()
            if access > case.options.access
        }

    @abstractmethod
    def requests(self, case: Case, target: Any) -> Iterable[AnyRequest]:
        """What must be captured of this model; called once a role (`target.role`), altered ones included."""

    @abstractmethod
    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """Findings from evidence: pure, without a model, the same for the same evidence and seed."""

    def examples(self, case: Case, evidence: Evidence) -> dict[str, dict[str, float | str]]:  # noqa: ARG002
        """Optional drill-down: by forget row id, numbers by name, and what the target wrote under `generated`."""
        return {}


def _lacking(needed: Access, case: Case) -> str:
    return f"needs access to {needed.name.lower()}, the audit has {case.options.access.name.lower()}"


@dataclass(frozen=True)
class Stage:
    """One altered model that an attack visits.

    Attributes:
        name: unique within the attack, e.g. `relearn-a@20`.
        recipe: everything that determines the altered weights, given the model's; part of its digest.
        rows: what the attack recorded itself of what its requests ask for; the engine keeps it, and does not run that.
    """

    name: str
    recipe: str
    rows: Sequence[tuple[Tokens, Mapping[str, Arrays]]] = ()


class Attack(Instrument):
    """An instrument that alters the target and asks for its captures again.

    The engine calls `stages`, looks which of the altered models still lack captures, and only then calls `run`,
    which alters `target.model` in place and yields each stage when it is reached. Afterwards the weights are read
    from disk again, so an attack need not undo anything.

    Class attributes:
        copies: how many times the model's weights it has in memory; where they do not fit so often, it is left out.
    """

    copies: ClassVar[float] = 5
    """Training: weights, gradients, the optimizer's two moments, and what is kept or made on the way."""

    def cost(self, case: Case, target: Any) -> str:  # noqa: ARG002
        """What it is about to do, in a few words after its name, for the progress bar."""
        return ""

    @abstractmethod
    def stages(self, case: Case, target: Any) -> Sequence[Stage]:
        """The altered models that `run` visits, in order; cheap. Empty if this role is not attacked."""

    @abstractmethod
    def run(self, case: Case, target: Any, tick: Any) -> Iterator[Stage]:
        """Alter the model step by step; `tick(done, total)` shows progress."""


def is_attack(instrument: Instrument) -> bool:
    """Does it try to bring knowledge back, by altering the model or by asking it otherwise?"""
    return isinstance(instrument, Attack) or instrument.question == Question.RECOVERY


@dataclass(frozen=True)
class Broken:
    """A registered instrument that cannot be imported or breaks the contract."""

    name: str
    reason: str


def names() -> list[str]:
    """Names of all registered instruments, sorted; imports none of them."""
    return sorted(_points())


def everyday() -> list[str]:
    """Names of those that are part of every scan and can be loaded, sorted; imports all."""
    return sorted(item.name for item in load_all() if isinstance(item, Instrument) and not (item.dear or item.aside))


def guests() -> frozenset[str]:
    """Names of those that come from other packages than this one; imports none of them."""
    return frozenset(name for name, point in _points().items() if _package(point) != _HOST)


def load(name: str) -> Instrument:
    """Import one instrument by name and make it.

    Raises:
        BadInput: no such instrument (with the nearest name), or it cannot be imported or breaks the contract.
    """
    points = _points()
    if name not in points:
        near = difflib.get_close_matches(name, points, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise BadInput(f"no instrument named {name!r}{hint} (see `audit list`)")
    made = _make(name, points[name])
    if isinstance(made, Broken):
        raise BadInput(f"instrument {name!r}: {made.reason}")
    return made


def load_all() -> list[Instrument | Broken]:
    """All registered instruments in the order of the five questions; those that fail come last, as `Broken`."""
    order = list(Question)
    made = [_make(name, point) for name, point in sorted(_points().items())]
    good = [item for item in made if isinstance(item, Instrument)]
    return [
        *sorted(good, key=lambda i: (order.index(i.question), i.name)),
        *(m for m in made if isinstance(m, Broken)),
    ]


def select(only: Sequence[str], skip: Sequence[str]) -> list[Instrument | Broken]:
    """The instruments of a scan: those named, or all, less those skipped; unknown names are bad input."""
    known = names()
    for name in (*only, *skip):
        if name not in known:
            load(name)
    chosen = [load(name) for name in only] if only else load_all()
    return [item for item in chosen if item.name not in skip]


def _points() -> dict[str, EntryPoint]:
    """What is registered, by name. The project's own keep their names, of others the first package by its name does.

    What would take the name of another is found as `package:name`, and is broken.
    """
    points: dict[str, EntryPoint] = {}
    for package, point in sorted(_registered(), key=lambda each: (each[0] != _HOST, each[0])):
        other = points.setdefault(point.name, point)
        if other.value != point.value:
            points[f"{package}:{point.name}"] = point
    return points


def _registered() -> list[tuple[str, EntryPoint]]:
    """Every entry point with its package's name, which is read from a file: once a package."""
    found = list(entry_points(group=GROUP))
    packages = {id(point.dist): _package(point) for point in {id(point.dist): point for point in found}.values()}
    return [(packages[id(point.dist)], point) for point in found]


def _package(point: EntryPoint) -> str:
    return "unknown package" if point.dist is None else point.dist.name


def _make(name: str, point: EntryPoint) -> Instrument | Broken:
    """The instrument, or what is wrong with it: a third party's must not take a scan with it, whatever it is."""
    if name != point.name:
        return Broken(name, f"{point.value} takes the name of another instrument, which keeps it")
    try:
        made = point.load()()
        fault = _fault(made, point)
    except (Exception, SystemExit) as error:
        return Broken(name, f"cannot be loaded: {type(error).__name__}: {error}")
    return Broken(name, fault) if fault else made


def _fault(made: object, point: EntryPoint) -> str:
    """How it breaks the contract; empty if it does not."""
    if not isinstance(made, Instrument):
        return f"{point.value} is no Instrument"
    absent = [attribute for attribute in ("name", "title", "question", "reference") if not hasattr(made, attribute)]
    if absent:
        return f"{point.value} has no {absent[0]}"
    if made.name != point.name:
        return f"calls itself {made.name!r}"
    if not isinstance(made.question, Question) or not isinstance(made.access, Access):
        return f"{point.value}: question and access must be a `Question` and an `Access`"
    return ""
