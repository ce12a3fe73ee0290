"""All servers of all runs below an output folder: what each is, whether it answers, how old and how large it is."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pipeline import engines
from pipeline.errors import InputError, PipelineError
from pipeline.net.client import status_of
from pipeline.operate import services
from pipeline.runs import lock
from pipeline.runs.files import leftovers, remove, tree_bytes
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest
from pipeline.serve import records
from pipeline.serve.records import Record
from pipeline.serve.server import Server

State = Literal["loading", "ready", "silent"]


@dataclass(frozen=True)
class Listed:
    """A living server of one run, or a service (run ``-``); ``silent``: it was ready once and does not answer its health path now."""

    run: str
    server: Server
    state: State

    @property
    def port(self) -> int | None:
        """The port it listens on."""
        return urlsplit(self.server.url).port

    @property
    def age(self) -> float:
        """Seconds since its start."""
        return max(0.0, time.time() - self.server.started)

    def row(self) -> dict[str, Any]:
        """For ``ps --json``."""
        s = self.server
        return {
            "run": self.run,
            "engine": s.engine,
            "pid": s.pid,
            "port": self.port,
            "url": s.url,
            "model": s.model,
            "state": self.state,
            "started_at": s.started_at,
            "age_seconds": round(self.age, 1),
            "rss_gib": round(s.memory_gib(), 2),
            "log": str(s.log),
        }


def listing(output: Path) -> list[Listed]:
    """Every living server of a run below ``output``, the gateway and the status API; records of dead ones are removed."""
    found = []
    for folder in sorted(output.glob("*/servers")):
        run = "-" if folder == services.folder(output) else folder.parent.name
        found += [Listed(run, r.process, _server_state(r)) for r in records.living(folder) if r.process]
    return found


def logs(run: Path, engine: str | None = None) -> list[Path]:
    """The start logs of a run, oldest first; InputError when there is none."""
    found = start_logs(run, (engine,) if engine else engines.NAMES)
    if not found:
        what = f"{engine} log" if engine else "server log"
        raise InputError(f"run {run.name} has no {what}", remedy="granite-pipeline serve writes one per start")
    return found


def start_logs(run: Path, names: Sequence[str]) -> list[Path]:
    """The logs of these engines' starts, oldest first; the stages' own logs lie beside them and are left out."""
    found = [path for name in names for path in (run / "logs").glob(f"{name}-*.log")]
    return sorted(found, key=lambda path: (path.stat().st_mtime, path.name))


def _server_state(record: Record) -> State:
    if record.ready is None or record.process is None:
        return "loading"
    return "ready" if status_of(record.process.url + record.process.ready_path) == 200 else "silent"


# newest first: the last of these that is there is how far a run got
_STATES = (("evaluate_tuned", "exported"), ("gguf", "converted"), ("merge", "merged"), ("finetune", "trained"))
FINISHED = frozenset({"verified", "failed verification", "exported"})
_PARTS = ("adapter", "merged_fp16", "unsloth.Q8_0.gguf", "checkpoints", "report", "logs", "notebooks")


@dataclass(frozen=True)
class RunInfo:
    """One run: ``state`` is how far it got, ``holder`` who works on it now, ``sizes`` the bytes of its parts."""

    name: str
    path: Path
    state: str
    holder: str | None
    changed_at: str
    sizes: dict[str, int]
    servers: tuple[str, ...]

    @property
    def finished(self) -> bool:
        """Whether every artefact is there."""
        return self.state in FINISHED

    def to_json(self) -> dict[str, Any]:
        """For ``runs --json``."""
        return {**vars(self), "path": str(self.path), "servers": list(self.servers), "finished": self.finished}


@dataclass(frozen=True)
class Removal:
    """Something that may be removed, how big it is and why."""

    run: str
    path: Path
    bytes: int
    reason: str


def list_runs(output: Path) -> list[RunInfo]:
    """Every run below a folder, by name; an unreadable manifest makes its run's state "damaged"."""
    return [_info(run) for run in _runs(output)]


def removals(output: Path, names: Sequence[str] = (), *, unfinished: bool = False, whole: bool = False) -> list[Removal]:
    """What pruning would remove: by default only what no run needs - killed writers' scratch, damaged checkpoints, finished
    runs' checkpoints (an earlier training's too) and partial answers.

    ``unfinished`` adds runs that never got all artefacts (not those whose manifest cannot be read: they may have them);
    ``whole`` the named runs, finished or not. A run that another process holds, or whose servers are up, is left alone.
    InputError names a run that is not there.
    """
    if whole and not names:
        raise InputError("whole runs are only removed by name", remedy="granite-pipeline prune NAME --whole")
    runs = {run.name: run for run in _runs(output)}
    for name in names:
        if name not in runs:
            raise InputError(f"no run {name!r} in {output}", remedy=f"known: {', '.join(runs) or 'none'}")
    found: list[Removal] = []
    for name in names or runs:
        info = _info(runs[name])
        if info.holder is None and not info.servers:
            found += _of_run(runs[name], info, unfinished=unfinished, whole=whole)
    return found


def prune(run: RunFolder, wanted: Sequence[Removal], *, unfinished: bool = False, whole: bool = False) -> int:
    """Remove what was listed for a run and may be removed now that its lock is held; returns the bytes freed."""
    with lock.held(run, "prune"):
        # asking takes its time: the run may have gone on since it was listed
        info = _info(run)
        now = [] if info.servers else _of_run(run, info, unfinished=unfinished, whole=whole)
        paths = {item.path for item in now} & {item.path for item in wanted}
        entirely = run.path in paths
        if entirely:
            paths = {path for path in run.path.iterdir() if path.name not in lock.FILES}
        for path in paths:
            remove(path)
    if entirely:
        for name in lock.FILES:
            (run.path / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            run.path.rmdir()
    return sum(item.bytes for item in wanted if not item.path.exists())


def _runs(output: Path) -> list[RunFolder]:
    """Folders with a usable name in which a run left its marks; links are not followed, for they may lead anywhere."""
    found = []
    for path in sorted(output.iterdir()) if output.is_dir() else []:
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(InputError):
                run = RunFolder(path.name, output)
                if run.manifest.is_file() or (run.checkpoints / "inputs.json").is_file() or lock.holder(run):
                    found.append(run)
    return found


def _info(run: RunFolder) -> RunInfo:
    there = lock.holder(run)
    try:
        names = tuple(s.engine for s in records.running(run.servers))
    except PipelineError:
        names = ()
    sizes = {part: tree_bytes(run.path / part) for part in _PARTS if (run.path / part).exists()}
    sizes["all"] = tree_bytes(run.path)
    changed = datetime.fromtimestamp(run.path.stat().st_mtime, UTC).isoformat(timespec="seconds")
    holder = there.describe() if there and there.alive else None
    return RunInfo(run.name, run.path, _state(run), holder, changed, sizes, names)


def _state(run: RunFolder) -> str:
    try:
        manifest = Manifest(run.manifest)
    except InputError:
        return "damaged"
    stages = manifest.stages
    verdict = _passed(run)
    if "evaluate_tuned" in stages and verdict is not None:
        return "verified" if verdict else "failed verification"
    for stage, state in _STATES:
        if stage in stages:
            return state
    steps = [p.name for p in run.checkpoints.glob("checkpoint-*")] if run.checkpoints.is_dir() else []
    newest = max((int(name.rpartition("-")[2]) for name in steps if name.rpartition("-")[2].isdigit()), default=None)
    return "empty" if newest is None else f"training, checkpoint of step {newest}"


def _passed(run: RunFolder) -> bool | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return bool(json.loads((run.report_file).read_text(encoding="utf-8"))["passed"])
    return None


def _of_run(run: RunFolder, info: RunInfo, *, unfinished: bool, whole: bool) -> list[Removal]:
    if whole or (unfinished and not info.finished and info.state != "damaged"):
        why = "asked for by name" if whole else f"never finished ({info.state})"
        return [Removal(run.name, run.path, info.sizes["all"], why)]
    found = [(p, "left by a killed process") for part in ("", "report", "reference") for p in leftovers(run.path / part)]
    training = info.state.startswith(("training", "empty", "damaged"))
    aside = run.path / "checkpoints-of-other-inputs"
    if aside.is_dir() and not training:
        found.append((aside, "an earlier training's, and a later one is finished"))
    if run.checkpoints.is_dir():
        if training:
            found += [(p, "damaged checkpoint") for p in sorted(run.checkpoints.glob("damaged-*"))]
        else:
            found.append((run.checkpoints, "training is finished"))
    if info.finished:
        found += [(p, "partial answers of a finished evaluation") for p in sorted((run.path / "reference").glob("*.part"))]
    return [Removal(run.name, path, tree_bytes(path), why) for path, why in found]
