"""What an auditor lets pass although it would be refused: file by file and reason by reason, and said in the record.

    audit scan MODEL_DIR --allow training_args.bin:pickle --allow install.sh:program

Only what does no harm to an audit can be let pass, and each reason says why it does none. Everything else (weights in
a pickle, broken headers, paths that lead out of the folder, ...) has no code, and no exception.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from audit.errors import BadInput, Refused

ASIDE = frozenset({"pickle", "archive", "program"})
"""Files let pass for these reasons are hashed and set aside: no loader gets to see them."""

REASONS = {
    "pickle": "hashed, but never opened",
    "archive": "hashed, but never opened",
    "program": "hashed, but never opened",
    "hard-link": "has another name elsewhere, through which it could be changed; that it was not is checked",
    "auto_map": "names code of the model's own, which was not run: the model was read as transformers knows its type",
    "ids": "has ids that the model has no row for; a text that would need one is not asked",
}
"""What is said of an exception in the record, by its code."""


class Allowed:
    """The exceptions of one folder.

    Args:
        names: `FILE:REASON` each, FILE as a POSIX path relative to the model folder. Those that nothing needs change
            nothing, for the models of a case share them.
        needed: tells of a name whether loading reads it; such a file cannot be set aside.

    Attributes:
        used: those that let a file pass, in the order in which they did.
        aside: the files that are not to be loaded.

    Raises:
        BadInput: a name without a reason, or with one for which nothing can be let pass.
    """

    def __init__(self, names: Collection[str] = (), needed: Collection[str] = ()) -> None:
        for name in names:
            file, _, code = name.rpartition(":")
            if not file or code not in REASONS:
                raise BadInput(f"--allow {name!r}: write FILE:REASON, where REASON is one of {', '.join(REASONS)}")
        self._names = frozenset(names)
        self._needed = needed
        self.used: list[str] = []
        self.aside: set[str] = set()

    @contextmanager
    def unless(self, name: str) -> Iterator[None]:
        """Refusals of this file, unless it is let pass; otherwise they say how it could be, if it can."""
        try:
            yield
        except Refused as error:
            exception = f"{name}:{error.code}"
            if not error.code or (error.code in ASIDE and name in self._needed):
                raise
            if exception not in self._names:
                todo = f"{error.todo}, or pass --allow {shlex.quote(exception)}"
                raise Refused(error.fault, todo, error.code) from None
            if exception not in self.used:
                self.used.append(exception)
            if error.code in ASIDE:
                self.aside.add(name)


def told(exception: str) -> str:
    """An exception that was used, as a limit of the audit."""
    return f"allowed by the auditor: {exception}, {REASONS[exception.rpartition(':')[2]]}"
