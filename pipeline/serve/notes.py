"""What was served from here, under which address and name: one note beside each server record, kept when the server is gone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.net.loopback import same_place
from pipeline.runs.files import read_json, tree_bytes, write_json
from pipeline.runs.folder import DEFAULT_OUTPUT, RunFolder
from pipeline.runs.hashes import sha256_json
from pipeline.runs.manifest import Manifest
from pipeline.serve.server import Server, note_path


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
    def from_json(cls, data: dict[str, Any]) -> Artefact:
        """Read what :meth:`to_json` wrote; KeyError when it is something else."""
        return cls(**{name: str(data[name]) for name in ("run", "fine_tune", "file", "sha256")})


def of_file(path: Path) -> Artefact | None:
    """The artefact at a path inside a run folder, or None when no manifest vouches for it in its present size."""
    manifest = path.parent / "manifest.json"
    try:
        if not manifest.is_file() or not path.exists():
            return None
        return _sealed(Manifest(manifest), path)
    # a path may be what a stranger's server said, and files vanish while they are looked at
    except (InputError, OSError, ValueError, KeyError, TypeError, AttributeError):
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
    stages = {
        "adapter": manifest.artefact_sha256("finetune", "adapter"),
        "merged_fp16": manifest.artefact_sha256("merge", "merged_fp16"),
    }
    return sha256_json(stages)


def _sealed(manifest: Manifest, path: Path) -> Artefact | None:
    for stage in manifest.stages.values():
        seal = stage.artefacts.get(path.name)
        if seal is None:
            continue
        if tree_bytes(path) != seal.bytes:
            return None
        made_from = stage.inputs.get("merged")
        if path.suffix == ".gguf" and made_from != manifest.artefact_sha256("merge", "merged_fp16"):
            return None
        return Artefact(manifest.run, manifest_hash(manifest), path.name, seal.sha256)
    return None


@dataclass(frozen=True)
class Note:
    """One past first token. ``process`` is its server while that runs; ``digest`` is Ollama's for the model it made."""

    url: str
    model: str
    artefact: Artefact | None = None
    process: Server | None = None
    digest: str = ""

    def about(self, url: str, model: str, digest: str = "") -> bool:
        """Whether this is what a model of that name at a URL is now: its server still runs, or Ollama has the model made then.

        One that someone made again has another digest.
        """
        still = self.digest == digest if self.digest else self.process is not None
        return still and same_place(self.url, url) and same_name(model, self.model)


def write(servers: Path, engine: str, said: Mapping[str, Any], loaded: Artefact | None) -> None:
    """Remember what answered its first token, and which artefact was loaded then: the file may be exported again meanwhile."""
    write_json(note_path(servers, engine), {**said, "artefact": loaded.to_json() if loaded else None})


def of_run(run: RunFolder, engine: str) -> Note | None:
    """What this engine serves of a run, or served last; None when that was never started from here."""
    return _read(note_path(run.servers, engine))


def every(output: Path) -> Iterator[Note]:
    """The notes of all runs."""
    for path in sorted(output.glob("*/servers/*.endpoint")):
        if note := _read(path):
            yield note


def last_served(url: str, model: str, known: Iterable[Note]) -> Artefact | None:
    """What a note says of a model at a URL, whether or not its server still runs."""
    found = (n for n in known if same_place(n.url, url) and (same_name(n.model, model) or same_name(model, n.model)))
    return next((note.artefact for note in found if note.artefact), None)


def up_since(url: str, known: Iterable[Note]) -> float | None:
    """Start (wall clock) of the server that was started from here and runs at this URL; None when it is someone else's."""
    return next((n.process.started for n in known if n.process and same_place(n.process.url, url)), None)


def same_name(served: str, asked: str) -> bool:
    """True for the same name; Ollama's ``:latest`` may be left out."""
    return served in (asked, f"{asked}:latest")


def _read(path: Path) -> Note | None:
    record = path.with_suffix(".json")
    try:
        said = read_json(path)
        process = Server.from_json(record) if record.is_file() else None
        url, model = said.get("url") or (process and process.url), said.get("model") or (process and process.model)
        loaded = Artefact.from_json(said["artefact"]) if said.get("artefact") else None
        alive = process if process is not None and process.alive else None
        return Note(str(url), str(model), loaded, alive, str(said.get("digest") or "")) if url and model else None
    except (InputError, KeyError, TypeError, AttributeError):
        return None
