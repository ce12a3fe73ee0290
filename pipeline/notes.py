"""What was served from here, under which address and name: one note beside each server record, kept when the server is gone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artefact import Artefact
from pipeline.errors import InputError
from pipeline.files import read_json, write_json
from pipeline.reach import same_place
from pipeline.runs import RunFolder
from pipeline.server import Server, note_path


@dataclass(frozen=True)
class Note:
    """One past first token. ``process`` is its server while that runs; ``digest`` is Ollama's for the model it made."""

    url: str
    model: str
    artefact: Artefact | None = None
    process: Server | None = None
    digest: str = ""


def write(servers: Path, engine: str, said: Mapping[str, Any], loaded: Artefact | None) -> None:
    """Remember what answered its first token, and which artefact was loaded then: the file may be exported again meanwhile."""
    write_json(note_path(servers, engine), {**said, "artefact": loaded.to_json() if loaded else None})


def of_run(run: RunFolder, engine: str) -> Note | None:
    """What this engine serves of a run, or served last; None when that was never started from here."""
    return _read(note_path(run.path / "servers", engine))


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
