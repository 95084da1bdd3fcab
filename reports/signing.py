"""Signing an audit folder, and adding reviewers' notes to a signed one; see `reports.attestation`.

    from reports.signing import add_note, generate_key, sign

    generate_key(Path("auditor.pem"))                       # and auditor.pub.pem, for whoever verifies
    sign(Path("OUT"), Path("auditor.pem"))
    add_note(Path("OUT"), "R. Viewer", "Agreed; the holdout set is small.")

The signature covers all that lies in the folder, so it comes last: what is added later, notes apart, is named by
`verify`. Notes form a chain of digests. That shows a careless change; against someone who rewrites the whole chain only
signatures help: those of the notes themselves, or of a later `sign(…, replace=True)`, which covers the notes so far.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audit.errors import BadInput
from audit.record import Record, write_atomically
from reports.attestation import (
    ATTESTATION,
    MODEL,
    NOTE_TYPE,
    NOTES,
    PAYLOAD_TYPE,
    PREDICATE_TYPE,
    STATEMENT_TYPE,
    audit_files,
    canonical,
    encoded,
    file_digest,
    fingerprint,
    opened,
    pae,
    read_notes,
    usable,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    PrivateKey = Ed25519PrivateKey | EllipticCurvePrivateKey

PASSPHRASE = "AUDIT_KEY_PASSPHRASE"
"""The environment variable that holds the passphrase of a private key; never an argument, which others can list."""


def generate_key(path: Path) -> tuple[Path, str]:
    """Write a new Ed25519 private key (PEM, PKCS8, readable by its owner alone) and, beside it, its public key.

    The private key is encrypted if the environment holds a passphrase.

    Returns:
        Where the public key lies, and its fingerprint.
    """
    from cryptography.hazmat.primitives import serialization as pem
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public = path.with_suffix(".pub.pem")
    for each in (path, public):
        if each.exists():
            raise BadInput(f"{each}: exists already; a key is never overwritten")
    key, secret = Ed25519PrivateKey.generate(), os.environ.get(PASSPHRASE)
    lock = pem.BestAvailableEncryption(secret.encode()) if secret else pem.NoEncryption()
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, lock))
    write_atomically(public, key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo))
    return public, fingerprint(key.public_key())


def sign(out: Path, key: Path, *, replace: bool = False) -> tuple[dict[str, Any], str]:
    """Write `OUT/attestation.json` over every file of an audit folder, and of the models as the record lists them.

    Args:
        out: the audit folder.
        key: a private key: Ed25519, or ECDSA on P-256 (PEM, PKCS8).
        replace: sign again, notes written so far included.

    Returns:
        The statement that was signed, and the fingerprint of the key.

    Raises:
        BadInput: no audit folder, signed already, or a key or file that cannot be signed with.
    """
    record = Record.read(out / "record.json")
    if (out / ATTESTATION).exists() and not replace:
        raise BadInput(f"{out / ATTESTATION}: signed already; --replace signs again, with the notes so far")
    if key.resolve().is_relative_to(out.resolve()):
        raise BadInput(f"{key}: a private key in the folder that will be handed on; move it elsewhere")
    private = _private_key(key)
    _, notes = _chain(out)
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in _subjects(out, record).items()],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "tool": f"{record.tool.name} {record.tool.version}",
            "command": record.tool.command,
            "created": record.created,
            "signed": _now(),
            "schema_version": record.schema_version,
            "verdict": record.verdict.label.value,
            "profile": record.verdict.profile,
            "models": {role: model.digest for role, model in record.models.items()},
            "notes": notes,
        },
    }
    body = canonical(statement)
    signature = {
        "keyid": fingerprint(private.public_key()),
        "publicKey": _text(encoded(private.public_key())),
        "sig": _text(_signature(private, PAYLOAD_TYPE, body)),
    }
    envelope = {"payload": _text(body), "payloadType": PAYLOAD_TYPE, "signatures": [signature]}
    write_atomically(out / ATTESTATION, json.dumps(envelope, indent=2).encode() + b"\n")
    return statement, signature["keyid"]


def add_note(out: Path, author: str, reason: str, *, key: Path | None = None) -> int:
    """Append a note to `OUT/notes.jsonl`; signed, if a private key is given. Returns its number.

    Raises:
        BadInput: the audit is not signed, the notes so far are broken, or author or reason is empty.
    """
    if not author.strip() or not reason.strip():
        raise BadInput("a note needs an author and a reason")
    attestation, notes = _chain(out)
    if not attestation:
        raise BadInput(f"{out / ATTESTATION}: no such file; sign the audit first, notes are about what was signed")
    note: dict[str, Any] = {
        "number": notes["count"] + 1,
        "author": author,
        "time": _now(),
        "reason": reason,
        "attestation": attestation,
        "previous": notes["sha256"],
    }
    if key is not None:
        private = _private_key(key)
        signature = _text(_signature(private, NOTE_TYPE, canonical(note)))
        note["signature"] = {"publicKey": _text(encoded(private.public_key())), "sig": signature}
    with (out / NOTES).open("ab") as file:
        file.write(canonical(note) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return int(note["number"])


def _chain(out: Path) -> tuple[str, dict[str, Any]]:
    """Digest of the attestation (empty if there is none), and the notes so far: their count, digest of the last."""
    data = (out / ATTESTATION).read_bytes() if (out / ATTESTATION).is_file() else b""
    attestation = hashlib.sha256(data).hexdigest() if data else ""
    covered = opened(data)[0]["predicate"]["notes"] if data else {"count": 0, "sha256": ""}
    notes, broken = read_notes(out, attestation, covered)
    if broken:
        raise BadInput(f"{out / NOTES}: not continued, since it is broken: {broken[0]}")
    last = (out / NOTES).read_bytes().split(b"\n")[-2] if notes else b""
    return attestation, {"count": len(notes), "sha256": hashlib.sha256(last).hexdigest() if notes else ""}


def _subjects(out: Path, record: Record) -> dict[str, str]:
    """Digest of every file that is signed, by name."""
    subjects = {}
    for name, path in audit_files(out).items():
        if path.is_symlink() or not path.is_file():
            raise BadInput(f"{path}: a link or a device; only plain files can be signed")
        if name.startswith(MODEL) or not name.isprintable():
            raise BadInput(f"{str(path)!r}: a file of such a name cannot be signed")
        subjects[name] = file_digest(path)
    for role, model in record.models.items():
        subjects |= {f"{MODEL}{role}/{file.path}": file.sha256 for file in model.files}
    return subjects


def _private_key(path: Path) -> PrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    secret = os.environ.get(PASSPHRASE, "").encode() if b"ENCRYPTED" in data else None
    if secret == b"":
        raise BadInput(f"{path}: encrypted; put its passphrase into the environment as {PASSPHRASE}")
    try:
        key: PrivateKey = usable(load_pem_private_key(data, secret), str(path))
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BadInput(f"{path}: no private key that can be signed with ({error})") from None
    return key


def _signature(key: PrivateKey, payload_type: str, body: bytes) -> bytes:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    from cryptography.hazmat.primitives.hashes import SHA256

    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key.sign(pae(payload_type, body))
    return key.sign(pae(payload_type, body), ec.ECDSA(SHA256()))


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
