"""Signed audits: what was altered is named, forgeries are refused, and nothing of the engine is needed to see it."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_record import sample

import cli
from audit.errors import BadInput
from audit.record import FileEntry, ModelEntry, Record
from reports import attestation, signing
from reports.attestation import AttestationError, Check, NotVerified, fingerprint, pae, told, verify
from reports.signing import add_note, generate_key, sign

ROOT = Path(__file__).parents[1]
OPENSSL = shutil.which("openssl")
MODEL_FILES = {
    "config.json": b'{"architectures": ["Toy"]}',
    "model.safetensors": bytes(range(256)) * 20,
    "tok/a.txt": b"a",
}


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def build(folder: Path) -> Path:
    """An audit folder of two models, not signed; models and a key beside it."""
    out, models = folder / "out", folder / "models"
    record = sample()
    record.models.clear()
    for role in ("target", "original"):
        for name, data in MODEL_FILES.items():
            path = models / role / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data + role.encode())
        files = [
            FileEntry(path=name, size=len(data) + len(role), sha256=sha(data + role.encode()))
            for name, data in sorted(MODEL_FILES.items())
        ]
        record.models[role] = ModelEntry(
            name=role, digest=sha(role.encode()), architecture="Toy", parameters=1, dtype="float32", files=files
        )
    record.write(out / "record.json")
    (out / "report.html").write_text("<html>the report</html>\n")
    places = "".join(f"{role} = {json.dumps(str(models / role))}\n" for role in ("target", "original"))
    (out / "case.toml").write_text(f'name = "a case"\n\n[models]\n{places}')
    for name in ("a/1.safetensors", "a/2.safetensors", "b/noise.json", "b/empty"):
        path = out / "evidence" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() * (0 if path.name == "empty" else 40))
    return out


class Place:
    """A signed audit with its keys."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, build(folder)
        self.key, self.public = folder / "auditor.pem", folder / "auditor.pub.pem"
        generate_key(self.key)
        self.other, self.other_public = folder / "other.pem", folder / "other.pub.pem"
        generate_key(self.other)
        self.statement, self.fingerprint = sign(self.out, self.key)

    def check(self, **options: Any) -> Check:
        return verify(self.out, **{"key": self.public, **options})

    def envelope(self) -> dict[str, Any]:
        return json.loads((self.out / "attestation.json").read_bytes())

    def rewrite(self, envelope: dict[str, Any]) -> None:
        (self.out / "attestation.json").write_text(json.dumps(envelope))

    def files(self) -> dict[str, Path]:
        """Every file that the signature covers, by its name there; found without the code under test."""
        found = {}
        for path in self.out.rglob("*"):
            if path.is_file() and path.name not in ("attestation.json", "notes.jsonl"):
                found[str(path.relative_to(self.out))] = path
        for role in ("target", "original"):
            for name in MODEL_FILES:
                found[f"model:{role}/{name}"] = self.folder / "models" / role / name
        return found


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """One that tests must leave as they found it."""
    return Place(tmp_path_factory.mktemp("kept"))


def differences(check: Check) -> dict[str, list[str]]:
    found = {"altered": check.altered, "missing": check.missing, "added": check.added, "broken": check.broken}
    return {kind: names for kind, names in found.items() if names}


# --- the format ---------------------------------------------------------------------------------------------


def test_pae_is_that_of_the_specification():
    assert pae("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )
    # Lengths are of bytes, not of characters, and an empty body leaves a blank at the end.
    assert pae("ä", b"") == b"DSSEv1 2 \xc3\xa4 0 "


def test_signature_holds_for_a_reader_of_its_own(kept: Place):
    """With `cryptography` directly, from the bytes that DSSE and RFC 8032 say are signed."""
    envelope = kept.envelope()
    body = base64.b64decode(envelope["payload"])
    signed = b"DSSEv1 28 application/vnd.in-toto+json %d " % len(body) + body
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    [signature] = envelope["signatures"]
    public = pem.load_pem_public_key(kept.public.read_bytes())
    assert isinstance(public, ed25519.Ed25519PublicKey)
    public.verify(base64.b64decode(signature["sig"]), signed)
    der = public.public_bytes(pem.Encoding.DER, pem.PublicFormat.SubjectPublicKeyInfo)
    assert signature["keyid"] == f"SHA256:{sha(der)}" == fingerprint(public) == kept.fingerprint


@pytest.mark.skipif(OPENSSL is None, reason="no openssl")
@pytest.mark.parametrize("kind", ["ed25519", "p256"])
def test_signature_holds_for_openssl(place: Place, kind: str):
    if kind == "p256":
        run = ["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"]
        subprocess.run([*run, "-out", place.folder / "ec.pem"], check=True, capture_output=True)
        public = place.folder / "ec.pub.pem"
        subprocess.run(["openssl", "pkey", "-in", place.folder / "ec.pem", "-pubout", "-out", public], check=True)
        sign(place.out, place.folder / "ec.pem", replace=True)
    else:
        public = place.public
    assert not differences(place.check(key=public))
    envelope = place.envelope()
    body = base64.b64decode(envelope["payload"])
    (place.folder / "pae").write_bytes(b"DSSEv1 28 application/vnd.in-toto+json %d " % len(body) + body)
    (place.folder / "sig").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    names = ["-in", place.folder / "pae", "-sigfile", place.folder / "sig"]
    digest = ["-digest", "sha256"] if kind == "p256" else []
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin", *digest, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Verified Successfully" in done.stdout, done.stderr


STATEMENT = {
    "type": "object",
    "required": ["_type", "subject", "predicateType"],
    "additionalProperties": False,
    "properties": {
        "_type": {"const": "https://in-toto.io/Statement/v1"},
        "subject": {
            "type": "array",
            "minItems": 1,
            "uniqueItems": True,
            "items": {
                "type": "object",
                "required": ["digest"],
                "additionalProperties": False,
                "properties": {
                    "name": {"type": "string"},
                    "digest": {
                        "type": "object",
                        "required": ["sha256"],
                        "additionalProperties": {"type": "string"},
                        "properties": {"sha256": {"pattern": "^[0-9a-f]{64}$"}},
                    },
                },
            },
        },
        # TypeURI: RFC 3986, scheme in lower case, a version in it.
        "predicateType": {"type": "string", "pattern": "^[a-z][a-z0-9+.-]*:[^ ]+v[0-9]+$"},
        "predicate": {"type": "object"},
    },
}
"""The Statement of in-toto's specification, v1 (spec/v1/statement.md and what it refers to). in-toto publishes no JSON
Schema; its published schema is protobuf, see the next test."""


def test_statement_is_as_the_specification_says(kept: Place):
    statement = json.loads(base64.b64decode(kept.envelope()["payload"]))
    jsonschema.Draft202012Validator(STATEMENT).validate(statement)
    names = [row["name"] for row in statement["subject"]]
    assert len(set(names)) == len(names), "name SHOULD be unique within subject"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", statement["predicate"]["signed"]), (
        "a Timestamp is RFC 3339, Z"
    )


def test_statement_is_that_of_the_published_protobuf(kept: Place):
    statements = pytest.importorskip("in_toto_attestation.v1.statement")
    from google.protobuf import json_format

    body = base64.b64decode(kept.envelope()["payload"])
    message = json_format.Parse(body, statements.spb.Statement(), ignore_unknown_fields=False)
    statements.Statement.copy_from_pb(message).validate()
    assert json_format.MessageToDict(message)["subject"] == json.loads(body)["subject"]


def test_statement_covers_every_file_and_says_what_was_found(kept: Place):
    wanted = {name: sha(path.read_bytes()) for name, path in kept.files().items()}
    assert {row["name"]: row["digest"]["sha256"] for row in kept.statement["subject"]} == wanted
    record = Record.read(kept.out)
    predicate = kept.statement["predicate"]
    assert predicate["verdict"] == record.verdict.label.value
    assert predicate["models"] == {role: model.digest for role, model in record.models.items()}
    assert (predicate["created"], predicate["schema_version"]) == (record.created, record.schema_version)


def test_an_envelope_of_another_signer_is_read(place: Place):
    """As DSSE allows: either base64 alphabet, no keyid, fields of others, several signatures."""
    envelope = place.envelope()
    body = base64.b64decode(envelope["payload"])
    key = ed25519.Ed25519PrivateKey.generate()
    signature = key.sign(b"DSSEv1 28 application/vnd.in-toto+json %d " % len(body) + body)
    mine = {"sig": base64.urlsafe_b64encode(signature).decode(), "extension": {"kind": "x"}}
    place.rewrite(
        {
            "payload": base64.urlsafe_b64encode(body).decode(),
            "payloadType": envelope["payloadType"],
            "signatures": [*envelope["signatures"], mine],
        }
    )
    public = place.folder / "theirs.pub.pem"
    public.write_bytes(key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo))
    assert place.check(key=public).signer == fingerprint(key.public_key())
    assert place.check().signer == place.fingerprint


# --- what was altered ---------------------------------------------------------------------------------------


def test_as_it_was_signed(kept: Place):
    check = kept.check()
    assert check.exit_code(require_models=True) == 0 and not differences(check)
    assert check.signer == kept.fingerprint and set(check.models) == {"target", "original"}


def test_a_flipped_byte_in_any_file_is_named(kept: Place):
    files = kept.files()
    assert len(files) == 3 + 4 + 2 * len(MODEL_FILES)
    for name, path in files.items():
        data = path.read_bytes()
        for at in {0, len(data) // 2, len(data) - 1} if data else ():
            changed = bytearray(data)
            changed[at] ^= 1
            path.write_bytes(changed)
            check = kept.check()
            assert differences(check) == {"altered": [name]} and check.exit_code() == 1
        path.write_bytes(data + b"\0")
        assert differences(kept.check()) == {"altered": [name]}
        path.write_bytes(data)
    assert not differences(kept.check())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_flip_anywhere_in_the_record_is_named(kept: Place, data: st.DataObject):
    path = kept.out / "record.json"
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        path.write_bytes(changed)
        assert differences(kept.check()) == {"altered": ["record.json"]}
    finally:
        path.write_bytes(whole)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_flip_in_the_attestation_never_changes_what_is_believed(kept: Place, data: st.DataObject):
    """Blanks and hints may change without a word (nothing depends on them); what was signed may not."""
    path = kept.out / "attestation.json"
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        path.write_bytes(changed)
        check = kept.check()
        assert (check.statement, check.signer) == (kept.statement, kept.fingerprint)
    except NotVerified as error:
        assert "attestation.json" in str(error)
    finally:
        path.write_bytes(whole)


def test_every_byte_of_payload_and_signature_counts(kept: Place):
    path = kept.out / "attestation.json"
    whole, envelope = path.read_bytes(), kept.envelope()
    try:
        for part, count in ((envelope["payload"], 60), (envelope["signatures"][0]["sig"], 88 - 3)):
            begin, step = whole.index(part.encode()), max(1, len(part) // count)
            for at in range(begin, begin + len(part) - 3, step):  # the last bits before the padding mean nothing
                changed = bytearray(whole)
                changed[at] = ord("A") if changed[at] != ord("A") else ord("B")
                path.write_bytes(changed)
                with pytest.raises(NotVerified, match=r"attestation\.json: altered"):
                    kept.check()
            path.write_bytes(whole[: begin + 4] + b"*" + whole[begin + 4 :])
            with pytest.raises(NotVerified, match=r"attestation\.json: altered"):
                kept.check()
    finally:
        path.write_bytes(whole)


def test_missing_added_and_renamed_files_are_named(place: Place):
    (place.out / "evidence/a/1.safetensors").unlink()
    (place.out / "evidence/b/noise.json").rename(place.out / "evidence/b/noisy.json")
    (place.out / "evidence/new").mkdir()
    (place.out / "evidence/new/x.safetensors").write_bytes(b"x")
    (place.out / "README").write_text("hello")
    (place.folder / "models/target/config.json").unlink()
    (place.folder / "models/target/generation_config.json").write_text("{}")
    assert differences(place.check()) == {
        "missing": ["evidence/a/1.safetensors", "evidence/b/noise.json", "model:target/config.json"],
        "added": [
            "README",
            "evidence/b/noisy.json",
            "evidence/new/x.safetensors",
            "model:target/generation_config.json",
        ],
    }
    lines = told(place.check())
    assert "missing: evidence/a/1.safetensors" in lines and "added: README" in lines


def test_swapped_files_are_both_named(place: Place):
    one, two = place.out / "evidence/a/1.safetensors", place.out / "evidence/a/2.safetensors"
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    assert differences(place.check()) == {"altered": ["evidence/a/1.safetensors", "evidence/a/2.safetensors"]}


def test_a_link_is_not_the_file(place: Place):
    """Equal today, another tomorrow."""
    report = place.out / "report.html"
    report.rename(place.folder / "elsewhere.html")
    report.symlink_to(place.folder / "elsewhere.html")
    assert differences(place.check()) == {"altered": ["report.html"]}
    (place.out / "evidence/c").symlink_to(place.out / "evidence/a")
    assert differences(place.check())["added"] == ["evidence/c"]
    with pytest.raises(BadInput, match="a link"):
        sign(place.out, place.key, replace=True)


def test_a_file_that_would_pass_for_one_of_a_model_is_named(place: Place):
    (place.out / "model:target").mkdir()
    shutil.copy(place.folder / "models/target/config.json", place.out / "model:target/config.json")
    assert differences(place.check()) == {"added": ["model:target/config.json"]}
    with pytest.raises(BadInput, match="cannot be signed"):
        sign(place.out, place.key, replace=True)


# --- models -------------------------------------------------------------------------------------------------


def test_models_elsewhere_and_models_gone(place: Place):
    (place.folder / "models/target").rename(place.folder / "moved")
    shutil.rmtree(place.folder / "models/original")
    check = place.check()
    assert not differences(check) and set(check.unchecked) == {"target", "original"}
    assert (check.exit_code(), check.exit_code(require_models=True)) == (0, 4)
    assert sum("NOT CHECKED" in line for line in told(check)) == 2
    check = place.check(models={"target": place.folder / "moved"})
    assert set(check.unchecked) == {"original"} and not differences(check)
    (place.folder / "moved/config.json").write_text("{}")
    assert differences(place.check(models={"target": place.folder / "moved"})) == {
        "altered": ["model:target/config.json"]
    }


def test_a_model_under_the_wrong_name(place: Place):
    with pytest.raises(AttestationError, match="no model 'retrained' was audited"):
        place.check(models={"retrained": place.folder / "models/target"})
    with pytest.raises(AttestationError, match="none of the files"):
        place.check(models={"target": place.out / "evidence"})
    check = place.check(models={"original": place.folder / "models/target"})
    assert check.altered == [f"model:original/{name}" for name in sorted(MODEL_FILES)]


def test_a_case_file_that_was_altered_leads_nowhere(place: Place):
    text = (place.out / "case.toml").read_text()
    (place.out / "case.toml").write_text(text.replace("models", "elsewhere"))
    check = place.check()
    assert differences(check) == {"altered": ["case.toml"]} and set(check.unchecked) == {"target", "original"}


def test_a_single_file_is_a_model_of_its_own(place: Place):
    weights = place.folder / "models/target/model.safetensors"
    record = Record.read(place.out)
    record.models["target"].files = [file for file in record.models["target"].files if file.path == weights.name]
    record.write(place.out / "record.json")
    sign(place.out, place.key, replace=True)
    assert not differences(place.check(models={"target": weights}))
    assert place.check().added, "the folder around it holds more"


# --- whom to trust ------------------------------------------------------------------------------------------


def test_a_forgery_signed_with_another_key_fails(place: Place):
    record = Record.read(place.out)
    record.verdict.statement = "All is well."
    record.write(place.out / "record.json")
    assert differences(place.check()) == {"altered": ["record.json"]}
    _, forger = sign(place.out, place.other, replace=True)
    with pytest.raises(NotVerified, match=f"signed by {forger}, not by the key you named .{place.fingerprint}"):
        place.check()
    with pytest.raises(NotVerified, match="not by the key you named"):
        place.check(key=None, fingerprint=place.fingerprint)
    # The hints say the auditor's name; they are only hints.
    envelope = place.envelope()
    auditor = pem.load_pem_public_key(place.public.read_bytes())
    envelope["signatures"][0]["keyid"] = place.fingerprint
    envelope["signatures"][0]["publicKey"] = base64.b64encode(attestation.encoded(auditor)).decode()  # type: ignore[arg-type]
    place.rewrite(envelope)
    for trust in ({}, {"key": None}, {"key": None, "fingerprint": place.fingerprint}):
        with pytest.raises(NotVerified, match="altered: the signature does not fit"):
            place.check(**trust)


def test_a_key_that_nobody_named_is_not_trusted(place: Place):
    check = place.check(key=None)
    assert not check.trust and check.exit_code() == 2 and check.signer == place.fingerprint
    assert told(check)[0].startswith("NOT VERIFIED") and "which you did not name" in told(check)[1]
    assert not check.models, "a case that nobody vouches for leads nowhere"
    (place.out / "report.html").write_text("other")
    assert place.check(key=None).exit_code() == 1
    assert place.check(key=None, fingerprint=place.fingerprint.removeprefix("SHA256:").upper()).trust


def test_signed_but_not_an_audit(place: Place):
    private = pem.load_pem_private_key(place.key.read_bytes(), None)
    assert isinstance(private, ed25519.Ed25519PrivateKey)

    def put(kind: str, body: bytes) -> None:
        signature = base64.b64encode(private.sign(pae(kind, body))).decode()
        payload = base64.b64encode(body).decode()
        place.rewrite({"payload": payload, "payloadType": kind, "signatures": [{"sig": signature}]})

    body = json.dumps(place.statement).encode()
    put("application/vnd.in-toto+json", body)
    assert not differences(place.check())
    put("application/json", body)
    with pytest.raises(NotVerified, match="another type"):
        place.check()
    provenance = {**place.statement, "predicateType": "https://slsa.dev/provenance/v1"}
    twice = {**place.statement, "subject": place.statement["subject"] + place.statement["subject"][:1]}
    for other in (provenance, twice, {}, [], {**place.statement, "predicate": {}}):
        put("application/vnd.in-toto+json", json.dumps(other).encode())
        with pytest.raises(NotVerified, match="not the statement of an audit"):
            place.check()
    put("application/vnd.in-toto+json", body[:-1] + b', "predicateType": "x"}')
    with pytest.raises(NotVerified, match="equal keys"):
        place.check()


def test_what_cannot_be_used_is_said(place: Place, tmp_path: Path):
    (tmp_path / "rsa.pem").write_bytes(
        rsa.generate_private_key(65537, 2048)
        .public_key()
        .public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)
    )
    for options, words in {
        ("key", tmp_path / "none.pem"): "cannot be read",
        ("key", place.out / "report.html"): "no public key",
        ("key", place.key): "no public key",
        ("key", tmp_path / "rsa.pem"): "neither an Ed25519",
        ("certificate", place.public): "no certificate",
        ("fingerprint", "SHA256:12"): "no fingerprint",
    }.items():
        with pytest.raises(AttestationError, match=words) as caught:
            verify(place.out, **dict([options]))
        assert not isinstance(caught.value, NotVerified)
    with pytest.raises(AttestationError, match="name one of"):
        place.check(fingerprint=place.fingerprint)
    with pytest.raises(AttestationError, match="without a certificate"):
        place.check(ca=place.public)
    (place.out / "attestation.json").unlink()
    with pytest.raises(AttestationError, match="not signed"):
        place.check()


# --- certificates -------------------------------------------------------------------------------------------

NOW = datetime.now(UTC)
Signer = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey


def certificate(
    name: str,
    key: Signer,
    issuer: tuple[str, Signer],
    *,
    days: tuple[int, int] = (-10, 10),
    ca: bool = False,
    path_length: int | None = None,
    usage: str | None = None,
    strange: bool = False,
) -> x509.Certificate:
    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    builder = x509.CertificateBuilder().subject_name(named(name)).issuer_name(named(issuer[0]))
    builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(NOW + timedelta(days[0])).not_valid_after(NOW + timedelta(days[1]))
    builder = builder.add_extension(
        x509.BasicConstraints(ca=ca, path_length=path_length if ca else None), critical=True
    )
    if usage:
        flags = dict.fromkeys(
            ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False
        ) | dict.fromkeys(("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"), False)
        builder = builder.add_extension(x509.KeyUsage(**{**flags, usage: True}), critical=True)
    if strange:
        builder = builder.add_extension(
            x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00"), critical=True
        )
    return builder.sign(issuer[1], hashes.SHA256() if isinstance(issuer[1], ec.EllipticCurvePrivateKey) else None)


class Chain:
    """A root, an intermediate, and certificates of the auditor's key."""

    def __init__(self, place: Place, root_key: Signer) -> None:
        loaded = pem.load_pem_private_key(place.key.read_bytes(), None)
        assert isinstance(loaded, ed25519.Ed25519PrivateKey)
        self.place, self.auditor, self.root_key = place, loaded, root_key
        self.middle_key = ed25519.Ed25519PrivateKey.generate()
        self.root = certificate("root", root_key, ("root", root_key), ca=True, usage="key_cert_sign")
        self.ca = self.save("ca", self.root)

    def save(self, name: str, *certificates: x509.Certificate) -> Path:
        path = self.place.folder / f"{name}.pem"
        path.write_bytes(b"".join(one.public_bytes(pem.Encoding.PEM) for one in certificates))
        return path

    def check(self, *certificates: x509.Certificate, ca: Path | None = None, at: datetime | None = None) -> Check:
        return self.place.check(key=None, certificate=self.save("leaf", *certificates), ca=ca, at=at)

    def leaf(self, **options: Any) -> x509.Certificate:
        return certificate("auditor", self.auditor, ("root", self.root_key), **options)


@pytest.fixture(params=["ed25519", "p256"])
def chain(request: pytest.FixtureRequest, place: Place) -> Chain:
    ed = request.param == "ed25519"
    return Chain(place, ed25519.Ed25519PrivateKey.generate() if ed else ec.generate_private_key(ec.SECP256R1()))


def test_a_certificate_and_who_issued_it(chain: Chain):
    leaf = chain.leaf(usage="digital_signature")
    assert "CN=auditor, which you named" in chain.check(leaf).trust
    assert "CN=auditor, issued by CN=root" in chain.check(leaf, ca=chain.ca).trust
    other = ed25519.Ed25519PrivateKey.generate()
    impostor = chain.save("impostor", certificate("root", other, ("root", other), ca=True))
    with pytest.raises(NotVerified, match="was not issued by"):
        chain.check(leaf, ca=impostor)
    foreign = certificate("auditor", other, ("root", chain.root_key))
    with pytest.raises(NotVerified, match="not by the key you named"):
        chain.check(foreign, ca=chain.ca)


def test_certificates_hold_for_a_time(chain: Chain):
    late, early = chain.leaf(days=(-20, -10)), chain.leaf(days=(5, 10))
    for ca in (None, chain.ca):
        for leaf in (late, early):
            with pytest.raises(NotVerified, match=r"CN=auditor holds from .*, not on"):
                chain.check(leaf, ca=ca)
        assert chain.check(early, ca=ca, at=NOW + timedelta(7)).trust
    old = chain.save("old", certificate("root", chain.root_key, ("root", chain.root_key), ca=True, days=(-20, -10)))
    with pytest.raises(NotVerified, match="CN=root holds from"):
        chain.check(chain.leaf(), ca=old)


def test_a_chain_is_followed_as_far_as_it_may_go(chain: Chain):
    middle = certificate("middle", chain.middle_key, ("root", chain.root_key), ca=True)
    leaf = certificate("auditor", chain.auditor, ("middle", chain.middle_key))
    assert chain.check(leaf, middle, ca=chain.ca).trust
    with pytest.raises(NotVerified, match="CN=auditor was not issued by"):
        chain.check(leaf, ca=chain.ca)
    plain = certificate("middle", chain.middle_key, ("root", chain.root_key))
    with pytest.raises(NotVerified, match="CN=middle is not that of a certificate authority"):
        chain.check(leaf, plain, ca=chain.ca)
    short = certificate("root", chain.root_key, ("root", chain.root_key), ca=True, path_length=0)
    with pytest.raises(NotVerified, match="so long a chain"):
        chain.check(leaf, middle, ca=chain.save("short", short))
    assert chain.check(chain.leaf(), ca=chain.save("short", short)).trust


def test_certificates_for_something_else(chain: Chain):
    with pytest.raises(NotVerified, match="not for signing"):
        chain.check(chain.leaf(usage="key_agreement"))
    with pytest.raises(NotVerified, match="critical extension"):
        chain.check(chain.leaf(strange=True))
    wrong = certificate("root", chain.root_key, ("root", chain.root_key), ca=True, usage="digital_signature")
    with pytest.raises(NotVerified, match="not that of a certificate authority"):
        chain.check(chain.leaf(), ca=chain.save("wrong", wrong))


# --- notes --------------------------------------------------------------------------------------------------


@pytest.fixture
def noted(place: Place) -> Place:
    """With four notes, of which the second is signed."""
    for author, key in (("Ada", None), ("Bo", place.other), ("Cy", None), ("Di", None)):
        add_note(place.out, author, f"{author} agrees", key=key)
    return place


def lines(place: Place) -> list[bytes]:
    return (place.out / "notes.jsonl").read_bytes().splitlines(keepends=True)


def put(place: Place, *rows: bytes) -> list[str]:
    (place.out / "notes.jsonl").write_bytes(b"".join(rows))
    check = place.check()
    assert check.exit_code() == (1 if check.broken else 0) and not check.altered
    return [text.removeprefix("notes.jsonl: ") for text in check.broken]


def test_notes_are_added_and_the_signature_holds(noted: Place):
    before = (noted.out / "attestation.json").read_bytes()
    assert add_note(noted.out, "Ed", "two\nlines") == 5
    check = noted.check()
    assert check.exit_code() == 0 and (noted.out / "attestation.json").read_bytes() == before
    assert [(note.number, note.author) for note in check.notes] == list(enumerate(("Ada", "Bo", "Cy", "Di", "Ed"), 1))
    other = pem.load_pem_public_key(noted.other_public.read_bytes())
    assert [note.signer for note in check.notes] == ["", fingerprint(other), "", "", ""]  # type: ignore[arg-type]
    assert re.fullmatch(r"note 5, \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ, Ed \(unsigned\): two\\nlines", told(check)[-1])


def test_notes_altered_removed_or_moved_are_named(noted: Place):
    one, two, three, four = lines(noted)
    assert put(noted, one, two.replace(b"Bo agrees", b"Bo doubts"), three, four) == [
        "note 2 was altered: its signature does not fit",
        "note 2 was altered",
    ]
    assert put(noted, one.replace(b"Ada", b"Eve"), two, three, four) == ["note 1 was altered"]
    assert put(noted, one, two, three.replace(b"agrees", b"doubts"), four) == ["note 3 was altered"]
    assert put(noted, one, two, four) == ["note 3 is missing before note 4"]
    assert put(noted, two, three, four) == ["note 1 is missing before note 2"]
    assert "note 3 is missing before note 4" in put(noted, one, two, four, three)
    assert "note 3 stands where note 4 should" in put(noted, one, two, three, three, four)
    assert put(noted, one, two, three, four[:-1]) == ["the last note is cut off"]
    assert "note 3 was altered: it cannot be read" in put(noted, one, two, b"{}\n", four)
    # Renumbered, so that no number is missing: the chain still shows it.
    assert put(noted, one, two, four.replace(b'"number":4', b'"number":3')) == ["note 2 was altered"]
    assert put(noted, one, two, three, four) == []


@pytest.fixture(scope="module")
def kept_notes(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(tmp_path_factory.mktemp("notes"))
    for author in ("Ada", "Bo", "Cy", "Di"):
        add_note(place.out, author, "agreed", key=place.other if author == "Bo" else None)
    return place


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_flip_in_a_note_that_others_follow_is_noticed(kept_notes: Place, data: st.DataObject):
    whole = lines(kept_notes)
    changed = bytearray(b"".join(whole))
    changed[data.draw(st.integers(0, len(b"".join(whole[:3])) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        assert put(kept_notes, bytes(changed))
    finally:
        assert not put(kept_notes, *whole)


def test_what_only_a_signature_shows(noted: Place):
    """The last notes can be dropped, and all of them written anew, unless a later signature covers them."""
    one, two, three, four = lines(noted)
    assert put(noted, one, two) == []
    put(noted, one, two, three, four)
    sign(noted.out, noted.key, replace=True)
    assert noted.check().exit_code() == 0, "the notes are still about the first attestation, and covered by this one"
    assert put(noted, one, two) == ["4 notes were signed, 2 are there"]
    assert put(noted, one, two, three, four.replace(b"agrees", b"doubts")) == [
        "note 4, or one before it, was altered after it was signed"
    ]
    (noted.out / "notes.jsonl").unlink()
    assert noted.check().broken == ["notes.jsonl: missing, with 4 notes that were signed"]
    put(noted, one, two, three, four)
    assert add_note(noted.out, "Ed", "seen") == 5 and noted.check().exit_code() == 0


def test_notes_of_another_audit_are_not_taken(noted: Place, tmp_path: Path):
    elsewhere = Place(tmp_path / "elsewhere")
    shutil.copy(noted.out / "notes.jsonl", elsewhere.out)
    assert elsewhere.check().broken[0] == "notes.jsonl: note 1 is about another attestation"
    with pytest.raises(BadInput, match="broken"):
        add_note(elsewhere.out, "Ada", "agreed")


def test_notes_need_something_signed_and_something_said(place: Place):
    for author, reason in (("", "x"), ("Ada", " ")):
        with pytest.raises(BadInput, match="needs an author"):
            add_note(place.out, author, reason)
    (place.out / "attestation.json").unlink()
    with pytest.raises(BadInput, match="sign the audit first"):
        add_note(place.out, "Ada", "agreed")


# --- signing ------------------------------------------------------------------------------------------------


def test_keys_are_private_and_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    public, named = generate_key(tmp_path / "key.pem")
    assert (tmp_path / "key.pem").stat().st_mode & 0o777 == 0o600
    assert public == tmp_path / "key.pub.pem" and fingerprint(pem.load_pem_public_key(public.read_bytes())) == named  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="never overwritten"):
        generate_key(tmp_path / "key.pem")
    monkeypatch.setenv(signing.PASSPHRASE, "correct horse")
    generate_key(tmp_path / "locked.pem")
    assert b"ENCRYPTED" in (tmp_path / "locked.pem").read_bytes()
    out = build(tmp_path)
    sign(out, tmp_path / "locked.pem")
    assert verify(out, key=tmp_path / "locked.pub.pem").trust
    monkeypatch.setenv(signing.PASSPHRASE, "wrong")
    with pytest.raises(BadInput, match=r"locked\.pem: no private key"):
        sign(out, tmp_path / "locked.pem", replace=True)
    monkeypatch.delenv(signing.PASSPHRASE)
    with pytest.raises(BadInput, match="AUDIT_KEY_PASSPHRASE"):
        sign(out, tmp_path / "locked.pem", replace=True)


def test_what_is_not_signed(place: Place):
    with pytest.raises(BadInput, match="signed already"):
        sign(place.out, place.key)
    shutil.copy(place.key, place.out / "evidence/key.pem")
    with pytest.raises(BadInput, match="handed on"):
        sign(place.out, place.out / "evidence/key.pem", replace=True)
    with pytest.raises(BadInput, match="no private key"):
        sign(place.out, place.public, replace=True)
    (place.out / "record.json").unlink()
    with pytest.raises(BadInput, match="no such record"):
        sign(place.out, place.key, replace=True)


# --- the commands, and none of the engine -------------------------------------------------------------------


@pytest.fixture
def audit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(*words: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["audit", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capsys.readouterr()
        return int(left.value.code or 0), captured.out + captured.err

    return run


def test_commands(audit: Callable[..., tuple[int, str]], tmp_path: Path):
    out, key, public = build(tmp_path), tmp_path / "k.pem", tmp_path / "k.pub.pem"
    code, text = audit("keygen", key)
    assert code == 0 and str(public) in text
    code, text = audit("verify", out, "--key", public)
    assert code == 2 and "this audit is not signed" in text
    code, text = audit("sign", out, "--key", key)
    assert code == 0 and "13 files signed by SHA256:" in text
    assert audit("sign", out, "--key", key)[0] == 2
    code, text = audit("note", out, "--author", "R. V\u202eiewer", "--reason", "seen\x1b[31m")
    assert code == 0 and "note 1 added" in text
    code, text = audit("verify", out, "--key", public)
    assert code == 0 and "\nVERIFIED" in f"\n{text}"
    assert r"R. V\u202eiewer (unsigned): seen\x1b[31m" in text, "nothing that steers a terminal"
    assert audit("verify", out)[0] == 2
    shutil.rmtree(tmp_path / "models/original")
    assert audit("verify", out, "--key", public)[0] == 0
    code, text = audit(
        "verify", out, "--key", public, "--require-models", "--models", f"target={tmp_path / 'models/target'}"
    )
    assert code == 4 and "INCOMPLETE" in text and "model original: NOT CHECKED" in text
    (out / "evidence/a/1.safetensors").write_bytes(b"other")
    code, text = audit("verify", out, "--key", public)
    assert code == 1 and "ALTERED" in text and "altered: evidence/a/1.safetensors" in text
    audit("keygen", tmp_path / "o.pem")
    code, text = audit("verify", out, "--key", tmp_path / "o.pub.pem")
    assert code == 1 and "not by the key you named" in text
    assert audit("verify", out, "--key", tmp_path / "none")[0] == 2
    assert audit("verify", out, "--key", public, "--at", "soon")[0] == 2


BARE = """
import json, runpy, sys, sysconfig
sys.path = [sysconfig.get_path("stdlib"), sysconfig.get_config_var("DESTSHARED"), {libraries!r}]
try:
    import audit
    sys.exit("the project is within reach")
except ImportError:
    pass
sys.argv = ["attestation.py", *{words!r}]
try:
    runpy.run_path("attestation.py", run_name="__main__")
except SystemExit as left:
    print(json.dumps([left.code, sorted({{name.split(".")[0] for name in sys.modules}})]))
"""


def test_it_runs_alone_in_a_bare_directory(place: Place, tmp_path: Path):
    """With the standard library and cryptography within reach, and nothing else."""
    bare, libraries = tmp_path / "bare", tmp_path / "libraries"
    bare.mkdir()
    libraries.mkdir()
    shutil.copy(attestation.__file__, bare)
    for name in ("cryptography", "cffi", "_cffi_backend"):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            found = Path(spec.origin).parent if spec.submodule_search_locations else Path(spec.origin)
            (libraries / found.name).symlink_to(found)

    def run(*words: str | Path) -> tuple[int, list[str], set[str]]:
        code = BARE.format(libraries=str(libraries), words=list(map(str, words)))
        command = [sys.executable, "-I", "-S", "-c", code]
        done = subprocess.run(command, cwd=bare, capture_output=True, text=True, check=True)
        *printed, last = done.stdout.splitlines()
        left, modules = json.loads(last)
        return left, printed + done.stderr.splitlines(), set(modules)

    code, printed, modules = run("verify", place.out, "--key", place.public)
    assert code == 0 and printed[0] == "VERIFIED"
    assert "cryptography" in modules
    assert not {"torch", "audit", "reports", "pydantic", "typer", "rich", "numpy"} & modules
    (place.out / "record.json").write_bytes((place.out / "record.json").read_bytes()[:-1] + b" ")
    code, printed, _ = run("verify", place.out, "--fingerprint", place.fingerprint)
    assert code == 1 and "altered: record.json" in printed
    code, printed, _ = run("verify", place.out, "--key", place.other_public)
    assert code == 1 and "not by the key you named" in printed[-1]


def test_sign_and_verify_are_quick_and_import_no_torch(place: Place):
    """Of an audit as large as a full scan's (30 MB here). A second on a quiet machine; twice that is allowed here."""
    (place.out / "evidence/large.safetensors").write_bytes(bytes(30 << 20))
    words = {
        "sign": ["sign", str(place.out), "--key", str(place.key), "--replace"],
        "verify": ["verify", str(place.out), "--key", str(place.public)],
    }
    for name, argv in words.items():
        code = (
            f"import sys, time; sys.argv = {['audit', *argv]!r}\nimport cli\n"
            "try: cli.main()\nexcept SystemExit as left: code = left.code\n"
            "print([code or 0, time.process_time(), 'torch' in sys.modules, 'transformers' in sys.modules])"
        )
        begun = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        left, seconds, *heavy = json.loads(done.stdout.splitlines()[-1].lower())
        assert (left, heavy) == (0, [False, False]), done.stdout
        assert seconds < 2, f"{name}: {seconds:.2f} s of CPU, {time.perf_counter() - begun:.2f} s in all"
