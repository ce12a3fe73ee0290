"""The runs below an output folder: how far each got, how large it is, and what of it may be removed."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.errors import InputError, PipelineError
from pipeline.runs import lease, lock
from pipeline.runs.files import leftovers, read_json, remove, tree_bytes
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest
from pipeline.serve import records

# newest first: the first of these that is there is how far a run got
_STATES = (("evaluate_tuned", "exported"), ("gguf", "converted"), ("merge", "merged"), ("finetune", "trained"))
_FINISHED = frozenset({"verified", "failed verification", "exported"})
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
        return self.state in _FINISHED

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
    infos = {name: _info(runs[name]) for name in names or runs}
    idle = [(runs[name], info) for name, info in infos.items() if info.holder is None and not info.servers]
    return [item for run, info in idle for item in _of_run(run, info, unfinished=unfinished, whole=whole)]


def remove_listed(run: RunFolder, wanted: Sequence[Removal], *, unfinished: bool = False, whole: bool = False) -> int:
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
            lease.require_held(path)
            remove(path)
    if entirely:
        for name in lock.FILES:
            (run.path / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            run.path.rmdir()
    return sum(item.bytes for item in wanted if not item.path.exists())


def _runs(output: Path) -> Iterator[RunFolder]:
    """Folders with a usable name in which a run left its marks; links are not followed, for they may lead anywhere."""
    for path in sorted(output.iterdir()) if output.is_dir() else []:
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(InputError):
                run = RunFolder(path.name, output)
                if run.manifest.is_file() or (run.checkpoints / "inputs.json").is_file() or lock.holder(run):
                    yield run


def _info(run: RunFolder) -> RunInfo:
    there = lock.holder(run)
    names: tuple[str, ...] = ()
    with contextlib.suppress(PipelineError):
        names = tuple(process.engine for process in records.running(run.servers))
    sizes = {part: tree_bytes(run.path / part) for part in _PARTS if (run.path / part).exists()}
    sizes["all"] = tree_bytes(run.path)
    changed = datetime.fromtimestamp(run.path.stat().st_mtime, UTC).isoformat(timespec="seconds")
    holder = there.describe() if there and there.alive else None
    return RunInfo(run.name, run.path, _state(run), holder, changed, sizes, names)


def _state(run: RunFolder) -> str:
    try:
        stages = Manifest(run.manifest).stages
    except InputError:
        return "damaged"
    if "evaluate_tuned" in stages:
        with contextlib.suppress(PipelineError, KeyError, TypeError):
            return "verified" if read_json(run.report_file)["passed"] else "failed verification"
    if known := next((state for stage, state in _STATES if stage in stages), ""):
        return known
    steps = [path.name.rpartition("-")[2] for path in run.checkpoints.glob("checkpoint-*")]
    newest = max((int(step) for step in steps if step.isdigit()), default=None)
    return "empty" if newest is None else f"training, checkpoint of step {newest}"


def _of_run(run: RunFolder, info: RunInfo, *, unfinished: bool, whole: bool) -> list[Removal]:
    if whole or (unfinished and not info.finished and info.state != "damaged"):
        why = "asked for by name" if whole else f"never finished ({info.state})"
        return [Removal(run.name, run.path, info.sizes["all"], why)]
    found = [(p, "left by a killed process") for part in ("", "report", "reference") for p in leftovers(run.path / part)]
    if info.state.startswith(("training", "empty", "damaged")):
        found += [(path, "damaged checkpoint") for path in sorted(run.checkpoints.glob("damaged-*"))]
    else:
        aside = (run.path / "checkpoints-of-other-inputs", "an earlier training's, and a later one is finished")
        found += [(path, why) for path, why in (aside, (run.checkpoints, "training is finished")) if path.is_dir()]
    if info.finished:
        found += [(p, "partial answers of a finished evaluation") for p in sorted((run.path / "reference").glob("*.part"))]
    return [Removal(run.name, path, tree_bytes(path), why) for path, why in found]
