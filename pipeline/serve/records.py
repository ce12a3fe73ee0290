"""One record a server, ``servers/<engine>.json``: its process, and what it serves once its first token has come.

A record without ``ready`` is a server that still loads, one without ``process`` what was served last, or what was made in
an Ollama that is not ours: a gateway still knows that name when the server is gone. What was served before that, at another
place or under another name, stays in ``earlier``: the model may still be there.
"""

import contextlib
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from pipeline.engines.base import Launch
from pipeline.errors import EnvironmentFailure, InputError
from pipeline.net.loopback import same_place
from pipeline.runs import lock
from pipeline.runs.files import read_json, write_json
from pipeline.runs.folder import RunFolder
from pipeline.serve import server
from pipeline.serve.artefacts import Artefact
from pipeline.serve.server import Server

_MOST_EARLIER = 16


@dataclass(frozen=True)
class Ready:
    """What is known of a server since its first token: ``artefact`` and its file's ``sha256`` as they were loaded then.

    ``digest`` is Ollama's for the model it made, ``modelfile`` the hash of the Modelfile that this was made from.
    """

    url: str
    model: str
    version: str | None = None
    plan: dict[str, Any] | None = None
    ready_seconds: float | None = None
    sha256: str | None = None
    artefact: Artefact | None = None
    digest: str = ""
    modelfile: str = ""

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Ready":
        """Read what was written; KeyError when it is something else."""
        known = {field.name: data[field.name] for field in fields(cls) if data.get(field.name) is not None}
        loaded = Artefact.from_json(known["artefact"]) if "artefact" in known else None
        return cls(**{**known, "url": str(data["url"]), "model": str(data["model"]), "artefact": loaded})


@dataclass(frozen=True)
class Record:
    """What one file says of an engine's server of a run."""

    engine: str
    process: Server | None = None
    ready: Ready | None = None
    earlier: tuple[Ready, ...] = ()

    @property
    def running(self) -> Server | None:
        """The process while it lives."""
        return self.process if self.process is not None and self.process.alive else None

    @property
    def served(self) -> tuple[Ready, ...]:
        """All that is known to have been served, the last one first."""
        return tuple(filter(None, (self.ready, *self.earlier)))

    @property
    def artefact(self) -> Artefact | None:
        """What was loaded, where that is known to be ours."""
        return self.ready.artefact if self.ready else None

    def about(self, url: str, model: str, digest: str = "") -> bool:
        """Whether this is what a model of that name at a URL is now: its server still runs, or Ollama has the model made then.

        One that someone made again has another digest.
        """
        if self.ready is None or not (same_place(self.ready.url, url) and same_name(model, self.ready.model)):
            return False
        return self.ready.digest == digest if self.ready.digest else self.running is not None


def read(folder: Path, engine: str) -> Record | None:
    """The record of an engine, None when there is none; InputError when the file is something else."""
    path = folder / f"{engine}.json"
    try:
        said = read_json(path) if path.is_file() else {}
        if not isinstance(said, dict):
            raise TypeError("no JSON object")
        if "process" not in said:
            return _read_pair(folder, engine, said)
        process, ready = said["process"], said["ready"]
        started = None if process is None else Server.from_json(process)
        earlier = tuple(map(Ready.from_json, said.get("earlier", ())))
        return Record(engine, _ours(started, folder), None if ready is None else Ready.from_json(ready), earlier)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a server record ({error!r})", remedy="delete it") from None


def _ours(process: Server | None, folder: Path) -> Server | None:
    """The process, unless its log lies in another folder: this one is a copy, and what was copied is not to stop another's server."""
    own = folder.parent.resolve()
    return None if process and process.log.exists() and not process.log.resolve().is_relative_to(own) else process


def save(folder: Path, record: Record) -> Path:
    """Write a record, atomically."""
    path, process = folder / f"{record.engine}.json", record.process
    ready, earlier = asdict(record.ready) if record.ready else None, list(map(asdict, record.earlier))
    write_json(path, {"process": process.to_json() if process else None, "ready": ready, "earlier": earlier})
    (folder / f"{record.engine}.endpoint").unlink(missing_ok=True)
    return path


def begin(launch: Launch, log: Path, folder: Path, *, owner: int | None, remedy: str) -> Server:
    """As :func:`server.start`, recorded in ``folder``; EnvironmentFailure, and nothing started, when :func:`require_none` says so."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # from the question to the record nobody else may start one
    with lock.guarded(folder.parent):
        require_none(launch.engine, folder, remedy)
        before = read(folder, launch.engine)
        # what one that was killed left there
        if launch.store:
            shutil.rmtree(launch.store, ignore_errors=True)
        process = server.start(launch, log, owner=owner)
        try:
            save(folder, Record(launch.engine, process, None, before.served if before else ()))
        except BaseException:
            server.stop(process)
            raise
    return process


def mark_ready(folder: Path, engine: str, process: Server | None, ready: Ready) -> None:
    """Note what answered its first token; a server that took its place meanwhile keeps its record.

    What was made in a server that is not ours is noted beside one of ours that runs.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock.guarded(folder.parent):
        there = read(folder, engine) or Record(engine)
        if there.process in (None, process) or not there.running:
            save(folder, Record(engine, process, ready, _others(ready, there.served)))
        elif process is None:
            save(folder, replace(there, earlier=(ready, *_others(ready, there.earlier))))


def _others(ready: Ready, known: Iterable[Ready]) -> tuple[Ready, ...]:
    """What was served elsewhere or under other names, the last few of it."""
    others = (one for one in known if one.model != ready.model or not same_place(one.url, ready.url))
    return tuple(others)[:_MOST_EARLIER]


def require_none(engine: str, folder: Path, remedy: str) -> None:
    """One server of a name in a folder: a second one would take the first one's record, and nobody could stop the first."""
    record = read(folder, engine)
    if record is not None and (there := record.running):
        words = f"{engine} already serves {there.model} from {folder.parent.name}"
        seen = f"{there.url}, process {there.pid}, log {there.log}"
        raise EnvironmentFailure(words, evidence=seen, remedy=f"use it, or stop it first: {remedy}")


def living(folder: Path) -> list[Record]:
    """The records of a folder whose server runs here; those of dead ones are removed, but for what they served."""
    # one that is removed meanwhile is left out
    records = [record for engine in _engines(folder) if (record := read(folder, engine))]
    alive = [record for record in records if record.running]
    for record in records:
        if record.process and record not in alive and not record.process.elsewhere:
            forget(record.process, folder)
    return alive


def running(folder: Path) -> list[Server]:
    """The servers recorded in a folder that are alive."""
    return [record.process for record in living(folder) if record.process]


def stop(folder: Path, engine: str) -> bool:
    """Stop the server of one engine; False when none runs here."""
    record = read(folder, engine)
    if record is None or record.process is None or record.process.elsewhere:
        return False
    was_alive = record.process.alive
    (end if was_alive else forget)(record.process, folder)
    return was_alive


def end(process: Server, folder: Path) -> None:
    """Stop this very server and remove it from its record; another one that bears its name by now is left alone."""
    server.stop(process)
    forget(process, folder)


def forget(process: Server, folder: Path) -> None:
    """Remove a server from its record, unless that is another one's by now, and the folder it alone used.

    What it served stays, so that a gateway knows it.
    """
    with lock.guarded(folder.parent):
        record = read(folder, process.engine)
        if record is None or record.process is None or record.process.pid != process.pid:
            return
        if process.store and Path(process.store).resolve().is_relative_to(folder.resolve()):
            shutil.rmtree(process.store, ignore_errors=True)
        served = record.served
        if process.store:  # what was made in it is gone; a model in a server that is not ours may be there
            served = tuple(sorted(served, key=lambda ready: not ready.digest))
        if served:
            save(folder, Record(record.engine, None, served[0], served[1:]))
        else:
            (folder / f"{process.engine}.json").unlink(missing_ok=True)


def forget_served(folder: Path, engine: str, gone: Collection[Ready]) -> None:
    """Remove what is noted of models made in a server that is not ours, those that are gone."""
    with lock.guarded(folder.parent):
        record = read(folder, engine)
        left = tuple(ready for ready in record.served if ready not in gone) if record else ()
        if left:
            save(folder, Record(engine, None, left[0], left[1:]))
        else:
            (folder / f"{engine}.json").unlink(missing_ok=True)


def of_run(run: RunFolder, engine: str) -> Record | None:
    """What this engine serves of a run, or served last; None when that never answered, or the record is damaged."""
    with contextlib.suppress(InputError):
        record = read(run.servers, engine)
        return record if record and record.ready else None
    return None


def every(output: Path) -> Iterator[Record]:
    """What is served, or was served last, in all runs."""
    for folder in sorted(output.glob("*/servers")):
        for engine in _engines(folder):
            with contextlib.suppress(InputError):
                record = read(folder, engine)
                if record and record.ready:
                    yield record
                for ready in record.earlier if record else ():
                    yield Record(engine, None, ready)


def last_served(url: str, model: str, known: Iterable[Record]) -> Artefact | None:
    """What the records say of a model at a URL, whether or not its server still runs."""
    there = (record.ready for record in known if record.ready and same_place(record.ready.url, url))
    named = (ready.artefact for ready in there if same_name(ready.model, model) or same_name(model, ready.model))
    return next(filter(None, named), None)


def up_since(url: str, known: Iterable[Record]) -> float | None:
    """Start (wall clock) of the server that was started from here and runs at this URL; None when it is someone else's."""
    return next((up.started for record in known if (up := record.running) and same_place(up.url, url)), None)


def same_name(served: str, asked: str) -> bool:
    """True for the same name; Ollama's ``:latest`` may be left out."""
    return served in (asked, f"{asked}:latest")


def _engines(folder: Path) -> list[str]:
    return sorted({path.stem for suffix in ("json", "endpoint") for path in folder.glob(f"*.{suffix}")})


def _read_pair(folder: Path, engine: str, process: dict[str, Any]) -> Record | None:
    """A record as it was in two files, ``<engine>.json`` of the process beside ``<engine>.endpoint`` of what it served.

    To be deleted once no run of that time is kept: a server that is started or stopped leaves one file.
    """
    started = Server.from_json(process) if process else None
    # a server must be seen, and can be stopped, whatever is in the other file
    with contextlib.suppress(InputError, KeyError, TypeError, AttributeError):
        said = {name: value for name, value in read_json(folder / f"{engine}.endpoint").items() if value}
        place = {"url": started.url, "model": started.model} if started else {}
        return Record(engine, started, Ready.from_json({**place, **said}))
    return Record(engine, started) if started else None
