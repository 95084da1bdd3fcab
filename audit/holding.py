"""One scan at a time in an output folder.

The lock is the kernel's (`flock` on `OUT/.lock`): it ends with the process that holds it, however that ends, so that
no stale lock is ever in the way of the scan that goes on after a kill.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TextIO

from audit.errors import BadInput

LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""What file systems without locks say: there, two scans are not told apart."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make `folder` if need be, and keep other scans out of it while the block runs.

    A folder made here and left empty, as by a scan that was refused, is taken away again.

    Raises:
        BadInput: another process holds it, or it cannot be written to.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _locked(folder)
    except OSError as error:
        raise BadInput(f"{folder}: cannot be written to: {error.strerror or error}") from None
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK).unlink()
        file.close()
        if made:
            with suppress(OSError):
                folder.rmdir()


def _locked(folder: Path) -> TextIO:
    """The open lock file of a folder, locked."""
    path = folder / LOCK
    while True:
        # Not through a link: what it leads to would be overwritten.
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644), "r+")
        with ExitStack() as unless_locked:
            unless_locked.callback(file.close)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = file.read(200) or "another process"
                raise BadInput(
                    f"{folder}: in use by {holder}, another scan: wait for it, or name another --out"
                ) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            with suppress(FileNotFoundError):  # or the holder before took the name away after it was opened here
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    file.truncate(0)
                    file.write(f"process {os.getpid()} on {platform.node()}")
                    file.flush()
                    unless_locked.pop_all()
                    return file
