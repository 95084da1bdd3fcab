"""A signed audit, checked: years later perhaps, and without the tool that made it.

    from reports.attestation import verify

    check = verify(Path("OUT"), key=Path("auditor.pub.pem"))
    check.altered, check.missing, check.added, check.notes

`OUT/attestation.json` is a DSSE envelope around an in-toto Statement (v1), whose subjects are every file of the
audit folder and every file of the audited models, each by SHA-256. Whom to trust is said by whoever verifies: a key
that lies in the envelope proves nothing by itself. `reports.signing` writes what is read here.

Only the standard library and `cryptography` are imported, so this file works alone, copied anywhere:

    python attestation.py verify OUT --key auditor.pub.pem

Sources: in-toto Attestation Framework v1 (Statement, ResourceDescriptor); DSSE v1 (envelope, PAE); RFC 8032; RFC 5280
(of which: signatures, dates, basic constraints, key usage; critical extensions beyond those are refused).
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.x509 import Certificate

    PublicKey = Ed25519PublicKey | EllipticCurvePublicKey

ATTESTATION = "attestation.json"
NOTES = "notes.jsonl"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
NOTE_TYPE = "application/vnd.palimpsest-audit.note+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:palimpsest-audit:predicate:audit:v1"
MODEL = "model:"
"""Begins the name of a subject that lies in a model folder: `model:target/config.json`."""


class AttestationError(ValueError):
    """What was given cannot be used: a missing file, an unreadable key. Exit 2."""

    exit_code = 2


class NotVerified(AttestationError):
    """The signature is not of whom it should be, or what was signed cannot be read: forged or altered. Exit 1."""

    exit_code = 1


@dataclass(frozen=True)
class Note:
    """A reviewer's note. `signer`: fingerprint of the key that signed it; empty if nobody did."""

    number: int
    author: str
    time: str
    reason: str
    signer: str = ""


@dataclass
class Check:
    """What a verification found. File names are relative to OUT; those of models begin with `model:ROLE/`."""

    statement: dict[str, Any]
    signer: str
    trust: str
    """Why the signer is trusted, in words; empty if no key was named."""
    altered: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    models: dict[str, Path] = field(default_factory=dict)
    unchecked: dict[str, str] = field(default_factory=dict)
    """Models whose files were not at hand, and where they were looked for."""
    notes: list[Note] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    """What is wrong with the notes."""

    @property
    def intact(self) -> bool:
        """Nothing that was looked at differs from what was signed."""
        return not (self.altered or self.missing or self.added or self.broken)

    def exit_code(self, *, require_models: bool = False) -> int:
        """0 verified; 1 altered; 2 signed by a key that nobody named; 4 a model was required and not at hand."""
        return 1 if not self.intact else 2 if not self.trust else 4 if require_models and self.unchecked else 0


# --- signatures ---------------------------------------------------------------------------------------------


def pae(payload_type: str, body: bytes) -> bytes:
    """DSSE's pre-authentication encoding: the bytes that are signed."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(body), body)


def encoded(key: PublicKey) -> bytes:
    """A public key as DER (SubjectPublicKeyInfo)."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def fingerprint(key: PublicKey) -> str:
    """`SHA256:` and the hex digest of the key's DER: `openssl pkey -pubin -in KEY -outform DER | sha256sum`."""
    return f"SHA256:{hashlib.sha256(encoded(key)).hexdigest()}"


def usable(key: Any, where: str) -> Any:
    """The key, if it is of a kind that is signed with here: Ed25519, or ECDSA on P-256."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    kinds = (ed25519.Ed25519PublicKey, ed25519.Ed25519PrivateKey)
    curves = (ec.EllipticCurvePublicKey, ec.EllipticCurvePrivateKey)
    if isinstance(key, kinds) or (isinstance(key, curves) and isinstance(key.curve, ec.SECP256R1)):
        return key
    raise AttestationError(f"{where}: neither an Ed25519 nor an ECDSA P-256 key")


def fits(key: PublicKey, signature: bytes, payload_type: str, body: bytes) -> bool:
    """Is this the key's signature of the body?"""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    from cryptography.hazmat.primitives.hashes import SHA256

    try:
        if isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, pae(payload_type, body))
        else:
            key.verify(signature, pae(payload_type, body), ec.ECDSA(SHA256()))
    except InvalidSignature:
        return False
    return True


def _embedded(text: Any) -> PublicKey | None:
    """The key that a signature says is its own; a hint, and trusted by nobody."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_der_public_key

    try:
        key: PublicKey = usable(load_der_public_key(_base64(text)), "the envelope")
    except (ValueError, UnsupportedAlgorithm):
        return None
    return key


def _base64(text: Any) -> bytes:
    """Strictly: Python would skip what is no base64. DSSE allows either alphabet."""
    if not isinstance(text, str):
        raise ValueError("no base64 text")
    return base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)


# --- whom to trust ------------------------------------------------------------------------------------------


def _named_key(path: Path) -> PublicKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    data = _bytes(path)
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        raise AttestationError(f"{path}: no public key in PEM") from None
    return usable(key, str(path))  # type: ignore[no-any-return]


def _named_fingerprint(text: str) -> str:
    found = re.fullmatch(r"(?:SHA256:)?([0-9a-f]{64})", text.strip(), re.IGNORECASE)
    if not found:
        raise AttestationError(f"{text!r}: no fingerprint of the form SHA256: and 64 hex digits")
    return f"SHA256:{found[1].lower()}"


def _certified_key(path: Path, ca: Path | None, at: datetime) -> tuple[PublicKey, str]:
    """The key of the first certificate in `path`, once it holds at that time and, with `ca`, was issued by it."""
    leaf, *others = _certificates(path)
    _check_certificate(leaf, path, at)
    subject = leaf.subject.rfc4514_string()
    if ca is None:
        return usable(leaf.public_key(), str(path)), f"certificate of {subject}, which you named"
    anchors = _certificates(ca)
    link = leaf
    for below in range(len(others) + 1):
        anchor = next((one for one in anchors if _issued(link, one)), None)
        issuer = anchor or next((one for one in others if _issued(link, one)), None)
        if issuer is None:
            break
        _check_certificate(issuer, ca if anchor else path, at, below)
        if anchor:
            name = anchor.subject.rfc4514_string()
            return usable(leaf.public_key(), str(path)), f"certificate of {subject}, issued by {name}, which you named"
        link = issuer
    raise NotVerified(f"{path}: the certificate of {link.subject.rfc4514_string()} was not issued by {ca}")


def _certificates(path: Path) -> list[Certificate]:
    from cryptography.x509 import load_pem_x509_certificates

    data = _bytes(path)
    try:
        return load_pem_x509_certificates(data)
    except ValueError:
        raise AttestationError(f"{path}: no certificate in PEM") from None


def _issued(link: Certificate, issuer: Certificate) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        link.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _check_certificate(one: Certificate, path: Path, at: datetime, below: int | None = None) -> None:
    """Dates and permitted use. `below`: for an issuer, how many other issuers stand between it and the signer."""
    from cryptography.x509 import BasicConstraints, ExtendedKeyUsage, KeyUsage, SubjectAlternativeName

    where = f"{path}: the certificate of {one.subject.rfc4514_string()}"
    if not one.not_valid_before_utc <= at <= one.not_valid_after_utc:
        dates = f"{one.not_valid_before_utc:%Y-%m-%d} to {one.not_valid_after_utc:%Y-%m-%d}"
        raise NotVerified(f"{where} holds from {dates}, not on {at:%Y-%m-%d}")
    try:
        extensions = list(one.extensions)
    except ValueError as error:
        raise NotVerified(f"{where} cannot be read ({error})") from None
    found: dict[type, Any] = {type(extension.value): extension.value for extension in extensions}
    known = (BasicConstraints, KeyUsage, ExtendedKeyUsage, SubjectAlternativeName)
    strange = [each.oid.dotted_string for each in extensions if each.critical and not isinstance(each.value, known)]
    if strange:
        raise NotVerified(f"{where} has a critical extension that is not understood here ({strange[0]})")
    usage, limits = found.get(KeyUsage), found.get(BasicConstraints)
    if below is None:
        if usage and not (usage.digital_signature or usage.content_commitment):
            raise NotVerified(f"{where} is not for signing")
    elif not (limits and limits.ca) or (usage and not usage.key_cert_sign):
        raise NotVerified(f"{where} is not that of a certificate authority")
    elif limits.path_length is not None and below > limits.path_length:
        raise NotVerified(f"{where} does not allow so long a chain")


# --- what was signed ----------------------------------------------------------------------------------------


def canonical(value: Any) -> bytes:
    """JSON of one spelling: sorted keys, no blanks, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def strict_json(data: bytes) -> Any:
    """JSON without equal keys, of which two readers may each take another one.

    Raises:
        ValueError: no such JSON, or not UTF-8.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("equal keys")
        return dict(pairs)

    try:
        return json.loads(data.decode(), object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def files_below(root: Path) -> dict[str, Path]:
    """Everything below a folder that is no folder itself, by its POSIX path; links are not followed."""
    found, pending = {}, [root]
    while pending:
        for path in pending.pop().iterdir():
            if path.is_dir() and not path.is_symlink():
                pending.append(path)
            else:
                found[path.relative_to(root).as_posix()] = path
    return dict(sorted(found.items()))


def audit_files(out: Path) -> dict[str, Path]:
    """The files of an audit folder that a signature covers: all but itself, and the notes that come later."""
    return {name: path for name, path in files_below(out).items() if name not in (ATTESTATION, NOTES)}


def file_digest(path: Path, advance: Callable[[int], None] = lambda _: None) -> str:
    """SHA-256 of a file, in hex; `advance` hears of the bytes read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise AttestationError(f"{path}: cannot be read ({error.strerror})") from None


# --- verification -------------------------------------------------------------------------------------------


def verify(
    out: Path,
    *,
    key: Path | None = None,
    certificate: Path | None = None,
    ca: Path | None = None,
    fingerprint: str | None = None,
    models: Mapping[str, Path] | None = None,
    at: datetime | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Check:
    """Compare an audit folder, and the models where they are at hand, with what was signed.

    Args:
        out: the audit folder.
        key: the signer's public key (PEM). At most one of `key`, `certificate` and `fingerprint`; with none, files
            are compared all the same, and `Check.trust` stays empty.
        certificate: the signer's X.509 certificate (PEM), intermediates after it.
        ca: who must have issued the certificate; without, the certificate itself is what is trusted.
        fingerprint: of the signer's key, `SHA256:…`; the key is then taken from the envelope.
        models: role -> folder. Others are looked for where the signed `case.toml` says.
        at: when certificates must hold; now if not given.
        progress: called with (bytes hashed, bytes in all).

    Raises:
        NotVerified: the signature is not that of the key, or what was signed cannot be read.
        AttestationError: a file or key that cannot be used.
    """
    if sum(given is not None for given in (key, certificate, fingerprint)) > 1:
        raise AttestationError("name one of key, certificate and fingerprint")
    if ca is not None and certificate is None:
        raise AttestationError("a certificate authority without a certificate that it issued")
    if not (out / ATTESTATION).is_file():
        raise AttestationError(f"{out / ATTESTATION}: no such file: this audit is not signed")
    data = _bytes(out / ATTESTATION)
    trusted: PublicKey | str
    if key is not None:
        trusted, trust = _named_key(key), "the key that you named"
    elif certificate is not None:
        trusted, trust = _certified_key(certificate, ca, at or datetime.now(UTC))
    elif fingerprint is not None:
        trusted, trust = _named_fingerprint(fingerprint), "the key whose fingerprint you named"
    else:
        trusted, trust = "", ""
    statement, signer = opened(data, trusted)
    check = Check(statement, signer, trust)
    try:
        _compare(check, out, models or {}, progress)
    except OSError as error:
        raise AttestationError(f"{error.filename}: cannot be read ({error.strerror})") from None
    check.notes, check.broken = read_notes(out, hashlib.sha256(data).hexdigest(), statement["predicate"]["notes"])
    return check


def opened(data: bytes, trusted: PublicKey | str = "") -> tuple[dict[str, Any], str]:
    """The statement in an envelope, and the fingerprint of its signer.

    Args:
        data: `attestation.json`.
        trusted: the signer's key, or its fingerprint; empty: whatever key the envelope says, which proves nothing.

    Raises:
        NotVerified: as `verify`.
        AttestationError: the key must be taken from the envelope, and there is none.
    """
    try:
        envelope = strict_json(data)
        body, kind = _base64(envelope["payload"]), envelope["payloadType"]
        signatures = [(_base64(row["sig"]), _embedded(row.get("publicKey"))) for row in envelope["signatures"]]
        if not signatures or not isinstance(kind, str) or not kind.isascii():
            raise ValueError("no signature, or no type")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotVerified(f"{ATTESTATION}: altered: no DSSE envelope ({error})") from None
    others = [own for signature, own in signatures if own is not None and fits(own, signature, kind, body)]
    if isinstance(trusted, str):
        signer = next((own for own in others if trusted in ("", fingerprint(own))), None)
        named = trusted
    else:
        signer = trusted if any(fits(trusted, signature, kind, body) for signature, _ in signatures) else None
        named = fingerprint(trusted)
    if signer is None and others and named:
        raise NotVerified(f"{ATTESTATION}: signed by {fingerprint(others[0])}, not by the key you named ({named})")
    if isinstance(trusted, str) and not any(own for _, own in signatures):
        raise AttestationError(f"{ATTESTATION}: holds no key of its own that can be read; name the signer's with --key")
    if signer is None:
        raise NotVerified(f"{ATTESTATION}: altered: the signature does not fit what it signs")
    if kind != PAYLOAD_TYPE:
        raise NotVerified(f"{ATTESTATION}: signed, but of another type ({kind!r})")
    return _statement(body), fingerprint(signer)


def _statement(body: bytes) -> dict[str, Any]:
    """What was signed, if it is the statement of an audit."""
    try:
        statement: dict[str, Any] = strict_json(body)
        if (statement["_type"], statement["predicateType"]) != (STATEMENT_TYPE, PREDICATE_TYPE):
            raise ValueError(f"{statement['_type']}, {statement['predicateType']}")
        names = [row["name"] for row in statement["subject"] if isinstance(row["digest"]["sha256"], str)]
        if len(set(names)) < len(statement["subject"]) or not all(isinstance(name, str) for name in names):
            raise ValueError("subjects without a name and a digest of their own")
        predicate = statement["predicate"]
        if not isinstance(predicate["models"], dict):
            raise ValueError("models")
        if (type(predicate["notes"]["count"]), type(predicate["notes"]["sha256"])) != (int, str):
            raise ValueError("notes")
    except (ValueError, KeyError, TypeError) as error:
        raise NotVerified(f"{ATTESTATION}: signed, but not the statement of an audit ({error})") from None
    return statement


def _compare(check: Check, out: Path, given: Mapping[str, Path], progress: Callable[[int, int], None] | None) -> None:
    """Fill in what differs."""
    signed = {row["name"]: row["digest"]["sha256"] for row in check.statement["subject"]}
    actual: dict[str, Path | None] = {}
    for name, path in audit_files(out).items():
        if name.startswith(MODEL):  # would pass for a file of a model
            check.added.append(name)
        else:
            actual[name] = path if path.is_file() and not path.is_symlink() else None
    roles = check.statement["predicate"]["models"]
    for role in given:
        if role not in roles:
            raise AttestationError(f"no model {role!r} was audited (but: {', '.join(roles)})")
    # A case.toml signed by nobody in particular does not send us through other folders of this machine.
    places = (_model_folders(out, signed.get("case.toml")) if check.trust else {}) | dict(given)
    for role in roles:
        place, prefix = places.get(role), f"{MODEL}{role}/"
        if place is None:
            check.unchecked[role] = "no folder named"
            continue
        # A single .gguf file is audited as a folder that holds nothing else.
        held = files_below(place) if place.is_dir() else {place.name: place} if place.is_file() else {}
        if not any(prefix + name in signed for name in held):
            if role in given:
                raise AttestationError(f"{place}: none of the files of model {role!r} lies there")
            check.unchecked[role] = f"none of its files lies at {place}"
            continue
        check.models[role] = place
        actual |= {prefix + name: path if path.is_file() else None for name, path in held.items()}
    away = tuple(f"{MODEL}{role}/" for role in check.unchecked)
    signed = {name: digest for name, digest in signed.items() if not name.startswith(away)}
    check.missing += sorted(signed.keys() - actual.keys())
    check.added += sorted(actual.keys() - signed.keys())
    both = {name: actual[name] for name in signed if name in actual}
    done, total = 0, sum(path.stat().st_size for path in both.values() if path)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    for name, found in sorted(both.items()):
        if found is None or file_digest(found, advance) != signed[name]:
            check.altered.append(name)


def _model_folders(out: Path, digest: str | None) -> dict[str, Path]:
    """Where the models lay, by the audit's `case.toml`, if it is the one that was signed."""
    path = out / "case.toml"
    if digest is None or not path.is_file() or file_digest(path) != digest:
        return {}
    try:
        models = tomllib.loads(path.read_text("utf-8")).get("models", {})
    except ValueError:
        return {}
    return {role: out / place for role, place in models.items() if isinstance(place, str)}


# --- notes --------------------------------------------------------------------------------------------------


def read_notes(out: Path, attestation: str, covered: Mapping[str, Any]) -> tuple[list[Note], list[str]]:
    """The reviewers' notes, and what is wrong with them.

    Each note is a line of JSON with its number, the digest of the attestation that it is about, and the digest of
    the line before it.

    Args:
        out: the audit folder.
        attestation: SHA-256 of `attestation.json`.
        covered: what the attestation itself says of the notes: their `count`, and the `sha256` of the last line.
    """
    path, count = out / NOTES, covered["count"]
    notes: list[Note] = []
    if not path.exists():
        return notes, [f"{NOTES}: missing, with {count} notes that were signed"] if count else []
    *lines, rest = _bytes(path).split(b"\n")
    broken = [f"{NOTES}: the last note is cut off"] if rest else []
    digests, expected = [""], 1
    for line in lines:
        digest, previous = hashlib.sha256(line).hexdigest(), digests[-1]
        digests.append(digest)
        try:
            row = strict_json(line)
            signature = row.pop("signature", None)
            note = Note(*(row[name] for name in ("number", "author", "time", "reason")))
            if not all(isinstance(text, str) for text in (note.author, note.time, note.reason)):
                raise ValueError("no text")
            if type(note.number) is not int:
                raise ValueError("no number")
            before, about = row["previous"], row["attestation"]
        except (ValueError, KeyError, TypeError, AttributeError):
            broken.append(f"{NOTES}: note {expected} was altered: it cannot be read")
            expected += 1
            continue
        if note.number > expected:
            broken.append(f"{NOTES}: note {expected} is missing before note {note.number}")
        elif note.number < expected:
            broken.append(f"{NOTES}: note {note.number} stands where note {expected} should")
        elif before != previous:
            broken.append(f"{NOTES}: note {max(1, expected - 1)} was altered")
        if note.number > count and about != attestation:
            broken.append(f"{NOTES}: note {note.number} is about another attestation")
        if signature is not None:
            signer = _note_signer(signature, row)
            if not signer:
                broken.append(f"{NOTES}: note {note.number} was altered: its signature does not fit")
            note = Note(note.number, note.author, note.time, note.reason, signer)
        notes.append(note)
        expected = note.number + 1
    if len(lines) < count:
        broken.append(f"{NOTES}: {count} notes were signed, {len(lines)} are there")
    elif digests[count] != covered["sha256"]:
        broken.append(f"{NOTES}: note {count}, or one before it, was altered after it was signed")
    return notes, broken


def _note_signer(signature: Any, row: dict[str, Any]) -> str:
    """Fingerprint of the key that signed a note; empty if it does not fit."""
    try:
        key, value = _embedded(signature["publicKey"]), _base64(signature["sig"])
    except (ValueError, KeyError, TypeError):
        return ""
    return fingerprint(key) if key is not None and fits(key, value, NOTE_TYPE, canonical(row)) else ""


# --- what is told -------------------------------------------------------------------------------------------


def told(check: Check, *, require_models: bool = False) -> list[str]:
    """A verification in lines for a terminal; the first says how it ended."""
    predicate = check.statement["predicate"]
    code = check.exit_code(require_models=require_models)
    ends = {
        0: "VERIFIED",
        1: "ALTERED since it was signed",
        2: "NOT VERIFIED: signed by a key that you did not name (--key, --certificate or --fingerprint)",
        4: "INCOMPLETE: as signed, but a model is not at hand",
    }
    lines = [
        ends[code],
        f"signed by {check.signer}, {check.trust or 'which you did not name'}",
        f"signed on {predicate.get('signed')}, by the signer's clock",
        f"verdict {predicate.get('verdict')}, audited {predicate.get('created')} with {predicate.get('tool')}",
    ]
    for what, names in (("altered", check.altered), ("missing", check.missing), ("added", check.added)):
        lines += [f"{what}: {name}" for name in names]
    lines += [f"model {role}: compared with {place}" for role, place in check.models.items()]
    for role, why in check.unchecked.items():
        lines.append(f"model {role}: NOT CHECKED, {why}; name it with --models {role}=DIR")
    lines += check.broken
    for note in check.notes:
        by = f"signed by {note.signer}" if note.signer else "unsigned"
        lines.append(f"note {note.number}, {note.time}, {note.author} ({by}): {note.reason}")
    return [_plain(line) for line in lines]


def _plain(text: str) -> str:
    """On one line, and with nothing that a terminal obeys or that reorders text (`reports.escape` is not at hand)."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def models_given(values: Iterable[str]) -> dict[str, Path]:
    """`DIR` (of the target) or `ROLE=DIR`, as roles and folders."""
    given: dict[str, Path] = {}
    for value in values:
        role, equals, place = value.partition("=")
        given |= {role: Path(place)} if equals and role.isidentifier() else {"target": Path(value)}
    return given


def moment(text: str | None) -> datetime | None:
    """A date or time as given on the command line; UTC if it does not say."""
    try:
        at = datetime.fromisoformat(text) if text else None
    except ValueError:
        raise AttestationError(f"{text!r} is no date, such as 2026-11-22") from None
    return at.replace(tzinfo=UTC) if at and at.tzinfo is None else at


def main() -> int:
    """`python attestation.py verify OUT --key KEY`: the same as `audit verify`, without the rest of it."""
    parser = argparse.ArgumentParser(description="Check a signed audit folder.")
    command = parser.add_subparsers(required=True).add_parser("verify")
    command.add_argument("out", type=Path)
    for name in ("--key", "--certificate", "--ca"):
        command.add_argument(name, type=Path)
    command.add_argument("--fingerprint")
    command.add_argument("--models", action="append", default=[])
    command.add_argument("--require-models", action="store_true")
    command.add_argument("--at")
    given = vars(parser.parse_args())
    required = given.pop("require_models")
    try:
        given |= {"models": models_given(given["models"]), "at": moment(given["at"])}
        check = verify(given.pop("out"), **given)
    except AttestationError as error:
        sys.stderr.write(_plain(str(error)) + "\n")
        return error.exit_code
    sys.stdout.write("\n".join(told(check, require_models=required)) + "\n")
    return check.exit_code(require_models=required)


if __name__ == "__main__":
    sys.exit(main())
