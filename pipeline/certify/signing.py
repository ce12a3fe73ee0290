"""Signing a certificate with a private key, and checking it: the certificate holds the hashes of everything else.

Uses ``model-signing`` (the OpenSSF's format), which is optional: pip install "granite-pipeline[sign]".
"""

from pathlib import Path
from types import ModuleType

from pipeline.errors import InputError, MissingDependency
from pipeline.report.certificate import changed_files
from pipeline.report.check import Check, held
from pipeline.runs.files import read_json
from pipeline.runs.folder import RunFolder

SIGNATURE = "certificate.sig"


def sign(run: RunFolder, private_key: Path) -> Path:
    """Sign ``certificate.json`` with an elliptic-curve key (PEM); returns the signature's path."""
    signing = _library().signing
    certificate, signature = _paths(run)
    try:
        signing.Config().use_elliptic_key_signer(private_key=private_key).sign(certificate, signature)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{private_key} cannot sign: {error}", remedy="give an unencrypted EC key (secp256r1) as PEM") from None
    return signature


def verify(run: RunFolder, public_key: Path) -> str | None:
    """Why the certificate is not the one that this key signed; None when it is."""
    verifying = _library().verifying
    certificate, signature = _paths(run)
    if not signature.is_file():
        return f"{signature} does not exist"
    try:
        verifying.Config().use_elliptic_key_verifier(public_key=public_key).verify(certificate, signature)
    except (OSError, ValueError, TypeError) as error:
        return f"the signature does not fit the certificate ({str(error).splitlines()[0][:80] if str(error) else type(error).__name__})"
    return None


def check_signed(run: RunFolder, public_key: Path) -> Check:
    """The signed certificate is the one on disk, and it is about the files as they are now."""
    reason = verify(run, public_key)
    if reason is None:
        changed = changed_files(run, read_json(run.certificate_file), read=True)
        reason = f"changed since the certificate was signed: {', '.join(changed)}" if changed else None
    figure = reason or "signed with this key, and every file is the one that was certified"
    return held("custody.signature", reason is None, figure, "a valid signature over the same files", "model-signing, OpenSSF")


def _paths(run: RunFolder) -> tuple[Path, Path]:
    return run.certificate_file, run.certificate / SIGNATURE


def _library() -> ModuleType:
    try:
        import model_signing
    except ImportError:
        raise MissingDependency("model-signing is not installed", remedy='pip install "granite-pipeline[sign]"') from None
    return model_signing  # type: ignore[no-any-return]
