"""Which file or folder of ours is served: an artefact is known by the manifest that vouches for it."""

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.runs.files import tree_bytes
from pipeline.runs.folder import DEFAULT_OUTPUT
from pipeline.runs.hashes import sha256_file, sha256_files, sha256_json, tree_digest
from pipeline.runs.manifest import Manifest


@dataclass(frozen=True)
class Artefact:
    """A served file or folder of ours. ``fine_tune`` is equal for everything made from the same trained weights."""

    run: str
    fine_tune: str
    file: str
    sha256: str

    def to_json(self) -> dict[str, str]:
        """For the registry, the status API and server records."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Artefact":
        """Read what :meth:`to_json` wrote; KeyError when it is something else."""
        return cls(**{name: str(data[name]) for name in ("run", "fine_tune", "file", "sha256")})


def of_file(path: Path) -> Artefact | None:
    """The artefact at a path inside a run folder, or None when no manifest vouches for its bytes.

    They are read again only where the file system says that they changed; large files may take a while then.
    """
    manifest = path.parent / "manifest.json"
    # a path may be what a stranger's server said, and files vanish while they are looked at
    with contextlib.suppress(InputError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return _sealed(Manifest(manifest), path) if manifest.is_file() and path.exists() else None
    return None


def of_served_path(said: str, output: Path = DEFAULT_OUTPUT, since: float | None = None) -> Artefact | None:
    """The artefact a server says it loaded; a container's path is matched by its last two parts, ``<run>/<file>``.

    ``since``: when that server started, where it is known; a file written later is not what it loaded, so None.
    """
    path = Path(said)
    if len(path.parts) < 2:
        return None
    for place in (path, output / path.parts[-2] / path.parts[-1]):
        if found := of_file(place):
            return None if since is not None and written_after(place, since) else found
    return None


def written_after(path: Path, moment: float) -> bool:
    """True when a file, or any file of a folder, was written at a moment (wall clock) or later; False when it is not there."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return any(file.stat().st_mtime >= moment for file in files)


def manifest_hash(manifest: Manifest) -> str:
    """Hash of what the manifest says was trained: the adapter and the merged weights.

    Not of the file's bytes: later stages and every server that is started add to the manifest without changing the fine-tune.
    """
    parts = {"adapter": "finetune", "merged_fp16": "merge"}
    return sha256_json({part: manifest.artefact_sha256(stage, part) for part, stage in parts.items()})


def changed_files(manifest: Manifest, name: str, file_hash: Callable[[Path], str] = sha256_file) -> list[str]:
    """What is wrong with an artefact's bytes, a line a file ("changed", "missing", "not recorded"); every byte is read, nothing is written.

    Unlike :func:`of_file`, nothing that was read earlier is believed. InputError when no stage recorded the artefact.
    """
    stage = next((stage for stage in manifest.stages.values() if name in stage.artefacts), None)
    if stage is None:
        raise InputError(f"run {manifest.run} has no record of {name}", remedy=f"granite-pipeline export --run {manifest.run}")
    path, seal = manifest.path.parent / name, stage.artefacts[name]
    found = ["manifest.json: the record of it was edited"] if stage.intact is False else []
    if path.suffix == ".gguf" and stage.inputs.get("merged") != manifest.artefact_sha256("merge", "merged_fp16"):
        found.append(f"{name}: made from other weights than the merged ones")
    if not path.exists():
        return [*found, f"{name}: missing"]
    if path.is_file():
        return found if file_hash(path) == seal.sha256 else [*found, f"{name}: changed"]
    files = sha256_files(path, file_hash)
    if tree_digest(files) == seal.sha256:
        return found
    named = [f"{name}/{file}: missing" for file in seal.files if file not in files]
    named += [f"{name}/{file}: changed" for file, digest in files.items() if seal.files.get(file, digest) != digest]
    named += [f"{name}/{file}: not recorded" for file in files if seal.files and file not in seal.files]
    # an older version recorded the folder as one; a list of files that was forged agrees with nothing
    return found + (named or [f"{name}: changed (which of its files cannot be told)"])


def _sealed(manifest: Manifest, path: Path) -> Artefact | None:
    stage = next((stage for stage in manifest.stages.values() if path.name in stage.artefacts), None)
    if stage is None or tree_bytes(path) != stage.artefacts[path.name].bytes:
        return None
    if manifest.sha256(path) != stage.artefacts[path.name].sha256:
        return None
    # a GGUF that was made from other weights than the merged ones is another fine-tune
    if path.suffix == ".gguf" and stage.inputs.get("merged") != manifest.artefact_sha256("merge", "merged_fp16"):
        return None
    return Artefact(manifest.run, manifest_hash(manifest), path.name, stage.artefacts[path.name].sha256)
