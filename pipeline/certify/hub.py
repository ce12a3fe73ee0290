"""Giving a run away: its certificate signed, and its weights, card, redacted manifest and certificate taken to a model hub.

Signatures are those of ``model-signing`` (the OpenSSF's format), which is optional: pip install "granite-pipeline[sign]". The
certificate holds the hashes of everything else.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.certify.certificate import not_proven, read
from pipeline.certify.publish import write_card
from pipeline.errors import EnvironmentFailure, InputError, MissingDependency
from pipeline.net.client import proxy_of
from pipeline.report.certificate import changed_files
from pipeline.report.check import Check, held
from pipeline.runs import lease
from pipeline.runs.files import read_json, tree_bytes, write_json
from pipeline.runs.folder import RunFolder

_SIGNATURE = "certificate.sig"
PARTS = ("merged", "gguf", "adapter")
_PRIVATE = frozenset({"argv", "env", "log", "starts", "cases"})
# an absolute path, or one below the home folder, with at least two parts; not the path of a URL
_PATH = re.compile(r"(?<![\w./:~-])(?:~|/[^\s/\"'`,;:()\[\]]+)(?:/[^\s/\"'`,;:()\[\]]+)+/?")


@dataclass(frozen=True)
class Upload:
    """One file and its place in the repository."""

    file: Path
    path: str
    bytes: int


def plan(run: RunFolder, parts: tuple[str, ...] = PARTS) -> list[Upload]:
    """The files of a run that a repository gets: weights at its root, adapter below ``adapter/``, card and certificate."""
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise InputError(f"no part {unknown[0]!r}", remedy=f"known: {', '.join(PARTS)}")
    chosen: list[tuple[Path, str]] = [(write_card(run), "README.md")]
    chosen += [(_public(run, path), path.name) for path in (run.manifest, run.certificate_file) if path.is_file()]
    if "merged" in parts:
        chosen += [(path, path.name) for path in sorted(run.merged.iterdir()) if path.is_file()]
    if "gguf" in parts:
        chosen += [(run.gguf, run.gguf.name), (run.modelfile, run.modelfile.name)]
    if "adapter" in parts:
        # peft's own card there is a template to fill in, and names folders of this machine
        chosen += [(p, f"adapter/{p.name}") for p in sorted(run.adapter.iterdir()) if p.is_file() and p.name != "README.md"]
    return [Upload(path, name, tree_bytes(path)) for path, name in chosen if path.is_file()]


def redacted(value: Any) -> Any:
    """A copy for others: without command lines, environments, logs and cases of own checks; a path of this machine is its name."""
    if isinstance(value, str):
        return _PATH.sub(lambda found: found[0].rstrip("/").rpartition("/")[2], value)
    if isinstance(value, dict):
        return {redacted(key): redacted(item) for key, item in value.items() if key not in _PRIVATE}
    if isinstance(value, list):
        return [redacted(item) for item in value]
    return value


def _public(run: RunFolder, path: Path) -> Path:
    """The redacted copy of a JSON file; a certificate's keeps the id of the whole one, and its own checks only their verdicts."""
    content = redacted(read_json(path))
    for link in content.get("links", []):
        if link["key"] == "own":  # figures quote prompts and answers
            link["findings"] = [{**finding, "figure": "", "data": {}} for finding in link["findings"]]
    target = run.certificate / "public" / path.name
    write_json(target, {**content, "redacted": True})
    return target


def require_current_certificate(run: RunFolder) -> None:
    """InputError unless every link is proven, by a certificate with servers that is about the files as they are now."""
    path = run.certificate_file
    remedy = f"granite-pipeline certify --run {run.name}, or push with --uncertified"
    if not path.is_file():
        raise InputError(f"run {run.name} has no certificate", remedy=remedy)
    known, claimed = read(path)
    if known.id != claimed:
        raise InputError(f"{path} was edited: its id is not that of its content", remedy=remedy)
    if known.broken:
        raise InputError(f"run {run.name} is not certified: {', '.join(one.id for one in known.broken)}", remedy=remedy)
    if known.offline or known.unproven:
        why = "it is from files alone" if known.offline else f"nothing is proven for {not_proven(known)}"
        raise InputError(f"the certificate of run {run.name} is incomplete: {why}", remedy=remedy)
    if changed := changed_files(run, known.to_json(), read=True):
        raise InputError(f"{changed[0]} has changed since the certificate was made", remedy=remedy)


def push(run: RunFolder, repository: str, uploads: list[Upload], *, private: bool = True) -> str:
    """Create the repository if needed and upload everything in one commit; returns its address.

    The token is HF_TOKEN's, or the one of an earlier login. Raises EnvironmentFailure with the hub's own words.
    """
    try:
        from huggingface_hub import CommitOperationAdd, HfApi, constants
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
    except ImportError:
        raise MissingDependency("huggingface_hub is not installed", remedy="pip install huggingface_hub") from None
    import httpx

    proxy_of(constants.ENDPOINT)  # one that cannot be used is said before the hub's client meets it
    api = HfApi(token=os.environ.get("HF_TOKEN") or None)
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=one.path, path_or_fileobj=str(one.file)) for one in uploads]
        api.create_commit(repository, operations, commit_message=f"granite-pipeline: run {run.name}")
    except HFValidationError as error:
        raise InputError(f"{repository!r} is no repository name: {error}", remedy="give owner/name") from None
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx.HTTPError, OSError) as error:
        raise EnvironmentFailure(
            f"the hub did not take {repository}", evidence=str(error)[:500], remedy="check the network, HF_TOKEN and its rights"
        ) from None
    return str(address)


def sign(run: RunFolder, private_key: Path) -> Path:
    """Sign ``certificate.json`` with an elliptic-curve key (PEM); returns the signature's path."""
    signing = _library().signing
    certificate, signature = run.certificate_file, run.certificate / _SIGNATURE
    lease.require_held(signature)
    try:
        signing.Config().use_elliptic_key_signer(private_key=private_key).sign(certificate, signature)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{private_key} cannot sign: {error}", remedy="give an unencrypted EC key (secp256r1) as PEM") from None
    return signature


def _unsigned(run: RunFolder, public_key: Path) -> str | None:
    """Why the certificate is not the one that this key signed; None when it is."""
    verifying = _library().verifying
    certificate, signature = run.certificate_file, run.certificate / _SIGNATURE
    if not signature.is_file():
        return f"{signature} does not exist"
    try:
        verifying.Config().use_elliptic_key_verifier(public_key=public_key).verify(certificate, signature)
    except (OSError, ValueError, TypeError) as error:
        return f"the signature does not fit the certificate ({str(error).splitlines()[0][:80] if str(error) else type(error).__name__})"
    return None


def check_signed(run: RunFolder, public_key: Path) -> Check:
    """The signed certificate is the one on disk, and it is about the files as they are now."""
    reason = _unsigned(run, public_key)
    if reason is None:
        changed = changed_files(run, read_json(run.certificate_file), read=True)
        reason = f"changed since the certificate was signed: {', '.join(changed)}" if changed else None
    figure = reason or "signed with this key, and every file is the one that was certified"
    return held("custody.signature", reason is None, figure, "a valid signature over the same files", "model-signing, OpenSSF")


def _library() -> ModuleType:
    try:
        import model_signing
    except ImportError:
        raise MissingDependency("model-signing is not installed", remedy='pip install "granite-pipeline[sign]"') from None
    return model_signing  # type: ignore[no-any-return]
