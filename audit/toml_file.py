"""TOML as this project reads it: whatever is wrong with a file is bad input that names it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from audit.errors import BadInput


def read_toml(path: Path) -> dict[str, Any]:
    """The table that a file holds.

    Raises:
        BadInput: unreadable, or not TOML.
    """
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read ({error})") from None
    except (ValueError, RecursionError) as error:  # not TOML, a number of 5000 digits, brackets 5000 deep
        raise BadInput(f"{path}: not TOML: {error}") from None
