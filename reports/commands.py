"""Commands on finished audits: they read a record, and import neither torch nor a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from audit.errors import AuditError, BadInput
from audit.terminal import bars, out

# --- signing ------------------------------------------------------------------------------------------------


class Altered(AuditError):
    """A signature that is not of whom it should be, or does not fit: exit 1."""

    exit_code = 1


AuditDir = Annotated[Path, typer.Argument(metavar="OUT", help="an audit folder")]


def keygen(path: Annotated[Path, typer.Argument(help="private key to write; its public key lies beside it")]) -> None:
    """Make an Ed25519 key to sign audits with; encrypted, if AUDIT_KEY_PASSPHRASE is set."""
    from reports.signing import generate_key

    public, fingerprint = generate_key(path)
    _tell([f"private key: {path}, for you alone", f"public key: {public}, for those who verify", fingerprint])


def sign(
    audit_dir: AuditDir,
    key: Annotated[Path, typer.Option(help="private key (PEM): Ed25519 or ECDSA P-256; see `audit keygen`")],
    replace: Annotated[bool, typer.Option("--replace", help="sign again, with the notes so far")] = False,
) -> None:
    """Sign all that lies in an audit folder, and the models it was made of: OUT/attestation.json."""
    from reports.attestation import ATTESTATION, AttestationError
    from reports.signing import sign as sign_audit

    try:
        statement, fingerprint = sign_audit(audit_dir, key, replace=replace)
    except (AttestationError, OSError) as error:
        raise BadInput(str(error)) from None
    _tell([f"{len(statement['subject'])} files signed by {fingerprint}: {audit_dir / ATTESTATION}"])


def verify(
    audit_dir: AuditDir,
    key: Annotated[Path | None, typer.Option(help="the signer's public key (PEM)")] = None,
    certificate: Annotated[Path | None, typer.Option(help="the signer's X.509 certificate (PEM)")] = None,
    ca: Annotated[Path | None, typer.Option(help="who must have issued the certificate (PEM)")] = None,
    fingerprint: Annotated[str | None, typer.Option(help="of the signer's key, SHA256:…")] = None,
    models: Annotated[
        list[str] | None, typer.Option(help="DIR of the target, or ROLE=DIR; else as case.toml says")
    ] = None,
    require_models: Annotated[bool, typer.Option("--require-models", help="exit 4 if a model is not at hand")] = False,
    at: Annotated[str | None, typer.Option(help="when the certificate must hold, as 2026-11-22; else now")] = None,
) -> None:
    """Check a signed audit folder, and name whatever was altered."""
    from reports.attestation import AttestationError, NotVerified, models_given, moment, told
    from reports.attestation import verify as verify_audit

    try:
        with bars() as progress, progress.step("compare with what was signed", 1000) as tick:
            check = verify_audit(
                audit_dir,
                key=key,
                certificate=certificate,
                ca=ca,
                fingerprint=fingerprint,
                models=models_given(models or []),
                at=moment(at),
                progress=lambda done, total: tick(1000 * done // total),
            )
    except NotVerified as error:
        raise Altered(str(error)) from None
    except AttestationError as error:
        raise BadInput(str(error)) from None
    _tell(told(check, require_models=require_models))
    raise typer.Exit(check.exit_code(require_models=require_models))


def note(
    audit_dir: AuditDir,
    author: Annotated[str, typer.Option(help="who writes")],
    reason: Annotated[str, typer.Option(help="what is to be said of this audit")],
    key: Annotated[Path | None, typer.Option(help="private key (PEM) to sign the note with")] = None,
) -> None:
    """Add a reviewer's note to a signed audit; the signature still holds."""
    from reports.attestation import NOTES, AttestationError
    from reports.signing import add_note

    try:
        number = add_note(audit_dir, author, reason, key=key)
    except (AttestationError, OSError) as error:
        raise BadInput(str(error)) from None
    _tell([f"note {number} added to {audit_dir / NOTES}"])


def _tell(lines: list[str]) -> None:
    for line in lines:
        out.print(line, markup=False, highlight=False, soft_wrap=True)


# --- comparing ----------------------------------------------------------------------------------------------


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="an audit folder, or its record.json")],
    b: Annotated[Path, typer.Argument(metavar="B", help="the other; differences are B minus A")],
    folder: Annotated[Path, typer.Option("--out", help="where diff.html goes")] = Path("audit-diff"),
    as_json: Annotated[bool, typer.Option("--json", help="print the comparison")] = False,
    force: Annotated[bool, typer.Option("--force", help="compare what is not comparable, and mark it")] = False,
) -> None:
    """Two audits side by side: before and after, method against method, target against retrained."""
    from audit.record import Record
    from reports.diff import compare
    from reports.diff_html import write_diff
    from reports.diff_text import diff_summary

    comparison = compare(Record.read(a), Record.read(b), force=force)
    page = write_diff(comparison, folder)
    if as_json:
        sys.stdout.write(comparison.to_json())
        return
    out.print(diff_summary(comparison))
    out.print(f"side by side: {page.resolve()}", markup=False, highlight=False, soft_wrap=True)


# --- policies -----------------------------------------------------------------------------------------------


def check(
    audit_dir: AuditDir,
    policy: Annotated[Path | None, typer.Option(help="policy.toml: what the audit has to show")] = None,
    emit_policy: Annotated[Path | None, typer.Option(help="write a policy: no worse than this audit")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as data")] = False,
) -> None:
    """Hold a finished audit against a policy: exit 1 if it fails."""
    from audit.policy import RESULT, emit, read_policy, write_policy
    from audit.policy import check as hold
    from audit.record import Record
    from reports.attestation import ATTESTATION
    from reports.policy_text import policy_summary

    if policy is None and emit_policy is None:
        raise BadInput("give --policy FILE to hold the audit against, or --emit-policy FILE to write one")
    rules = None if policy is None else read_policy(policy)
    record = Record.read(audit_dir)
    if emit_policy is not None:
        write_policy(emit(record), emit_policy)
    if rules is None:
        return
    result = hold(rules, record)
    folder = audit_dir if audit_dir.is_dir() else audit_dir.parent
    signed = (folder / ATTESTATION).exists()
    if not signed:
        result.write(folder)
    if as_json:
        sys.stdout.write(result.to_json())
    else:
        out.print(policy_summary(result))
        _tell([f"{folder} is signed: {RESULT} is not written into it" if signed else f"kept in {folder / RESULT}"])
    if not result.passed:
        raise typer.Exit(1)
