"""JSON of which every parser makes the same: valid, without equal keys, of bounded size and depth."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from audit.errors import Refused

_MAX_BYTES = 64 << 20  # the largest vocabularies in use take about half of it


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises Refused: too large, or as `parse_json`."""
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise Refused(f"{path}: JSON of more than {_MAX_BYTES} bytes")
    return parse_json(path, data)


def parse_json(path: Path, data: bytes) -> Any:
    """What these bytes of `path` say. Raises Refused: not UTF-8 or not JSON, equal keys, or nested too deeply."""
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise Refused(f"{path}: JSON nested too deeply") from None
    except ValueError as error:
        raise Refused(f"{path}: not valid JSON ({error})") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two parsers may each take another one of two equal keys, so what was checked is not what is loaded."""
    result = dict(pairs)
    if len(result) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"duplicate key {key[:80]!r}")
    return result
