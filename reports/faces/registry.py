"""The faces by name, and how they are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from audit.errors import BadInput
from audit.record import Record, write_atomically
from reports.attestation import ATTESTATION
from reports.faces.findings_csv import render_csv
from reports.faces.markdown import render_markdown
from reports.faces.mlbom import render_mlbom
from reports.faces.model_card import render_model_card
from reports.faces.sarif import render_sarif
from reports.mapping import FRAMEWORKS, render_mapping


class Face(NamedTuple):
    """One face: the file it is kept in, and what makes it."""

    file: str
    render: Callable[[Record], str]


FACES: dict[str, Face] = {
    "markdown": Face("summary.md", render_markdown),
    "sarif": Face("findings.sarif", render_sarif),
    "csv": Face("findings.csv", render_csv),
    "card": Face("model-card.md", render_model_card),
    "mlbom": Face("mlbom.cdx.json", render_mlbom),
    "mapping": Face("mapping.md", render_mapping),
}
"""By the name that `audit report --as` takes."""


def write_faces(record: Record, names: str | None, folder: Path, *, frameworks: str | None = None) -> list[Path]:
    """Write these faces into `folder`, and say where. `names` and `frameworks` are lists with commas.

    Raises:
        BadInput: no such face or framework, or the folder is signed and would no longer be what was signed.
    """
    wanted = _listed("--as", names, FACES) if names is not None else []
    texts = {FACES[name].file: FACES[name].render(record) for name in wanted}
    if frameworks is not None:
        texts[FACES["mapping"].file] = render_mapping(record, _listed("--mapping", frameworks, FRAMEWORKS))
    return [_write(folder / file, text.encode()) for file, text in texts.items()]


def _listed(option: str, text: str, known: Mapping[str, object]) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    wrong = [name for name in names if name not in known]
    if wrong or not names:
        raise BadInput(f"{option} {wrong[0] if wrong else text!r}: none of {', '.join(known)}")
    return names


def _write(path: Path, data: bytes) -> Path:
    if path.parent.exists() and not path.parent.is_dir():
        raise BadInput(f"{path.parent}: not a folder")
    if (path.parent / ATTESTATION).exists() and not (path.is_file() and path.read_bytes() == data):
        raise BadInput(f"{path}: the folder is signed, and would no longer be what was signed; write elsewhere (--out)")
    write_atomically(path, data)
    return path
