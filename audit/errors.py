"""What can go wrong, and the exit code each kind leads to.

Every error that a user can cause or meet is one of these. Its message is one line that names the file,
row, column or tensor at fault, so that the command line can print it as it is.
"""

from __future__ import annotations

from typing import ClassVar


class AuditError(Exception):
    """Base of every error that Palimpsest raises on purpose."""

    exit_code: ClassVar[int] = 2


class BadInput(AuditError):
    """A case, data file or option that cannot be used: exit 2."""

    exit_code = 2


class Refused(AuditError):
    """A model folder that is not safe, or not whole enough, to open: exit 3.

    Args:
        fault: the file, and the reason.
        todo: what to do about it.
        code: the reason in a word, by which an auditor may let the file pass (`audit.allowed`); empty if none may.
    """

    exit_code = 3

    def __init__(self, fault: str, todo: str = "", code: str = "") -> None:
        super().__init__(f"{fault}; {todo}" if todo else fault)
        self.fault, self.todo, self.code = fault, todo, code


class NoAccess(AuditError):
    """More was asked of a model than its access allows, such as log-probabilities of one that only answers: exit 2."""

    exit_code = 2


class Incomplete(AuditError):
    """A scan that ended without all that it set out to measure: exit 4."""

    exit_code = 4


class Unwritable(Incomplete):
    """A file that cannot be written, for want of space or of rights: exit 4."""


class Damaged(Incomplete):
    """Evidence that is no longer what was written: it is set aside, and a scan captures it again."""
