"""Where a fleet's results lie: a folder, or any address that fsspec knows (`s3://…`, `gs://…`, `memory://…`).

A folder a job, with `record.json` or `failure.json`. Only the driver writes here: workers hand their results to it, so
that nobody else needs rights, nor the same disk. The record is written last: where it is, all of the job is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from audit.errors import AuditError, BadInput
from audit.record import Record, write_atomically

RECORD = "record.json"
FAILURE = "failure.json"


@dataclass(frozen=True)
class Failure:
    """Why a job has no record, and the exit code that a scan would have left with."""

    reason: str
    exit_code: int


class Shelf:
    """The results below an address.

    Raises:
        BadInput: no such kind of address, or nothing can be written to it.
    """

    def __init__(self, address: str) -> None:
        from fsspec.core import url_to_fs

        self.address = address
        try:
            self._fs, self._root = url_to_fs(address)
        except (ValueError, ImportError, OSError) as error:  # no such protocol, or its package is not installed
            raise BadInput(f"--out {address}: {error}") from None
        self._local = "file" in self._fs.protocol  # a tuple of names, or one name

    def write(self, name: str, data: bytes) -> None:
        """Whole or not at all: a file is renamed into place, and an object is there once it is complete."""
        place = self._place(name)
        try:
            if self._local:
                write_atomically(Path(place), data)
            else:
                self._fs.pipe_file(place, data)
        except AuditError:
            raise
        except Exception as error:  # each protocol has errors of its own
            raise BadInput(f"{self.address}: {name} cannot be written: {type(error).__name__}: {error}") from None

    def read(self, name: str) -> bytes | None:
        """What lies under a name; None if nothing does."""
        try:
            return bytes(self._fs.cat_file(self._place(name)))
        except FileNotFoundError:
            return None
        except Exception as error:
            raise BadInput(f"{self.address}: {name} cannot be read: {type(error).__name__}: {error}") from None

    def put(self, folder: str, result: Mapping[str, bytes] | Failure) -> None:
        """A job's result in place of an earlier one: its files, the record last; or why there are none."""
        if isinstance(result, Failure):
            self.write(f"{folder}/{FAILURE}", json.dumps(asdict(result), indent=2).encode())
            self._remove(f"{folder}/{RECORD}")
            return
        self._remove(f"{folder}/{RECORD}")
        for name in sorted(result, key=lambda name: name == RECORD):
            self.write(f"{folder}/{name}", result[name])
        self._remove(f"{folder}/{FAILURE}")

    def get(self, folder: str) -> Record | Failure | None:
        """A job's record; or why it has none; None if nobody ran it, or by another schema."""
        data = self.read(f"{folder}/{RECORD}")
        if data is not None:
            try:
                return Record.parse(data, f"{self.address}/{folder}/{RECORD}")
            except BadInput:
                return None
        data = self.read(f"{folder}/{FAILURE}")
        return None if data is None else Failure(**json.loads(data))

    def _place(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _remove(self, name: str) -> None:
        try:
            self._fs.rm_file(self._place(name))
        except FileNotFoundError:
            pass
        except Exception as error:
            raise BadInput(f"{self.address}: {name} cannot be removed: {type(error).__name__}: {error}") from None
