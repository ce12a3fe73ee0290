"""One way to run a stage: skip it when nothing changed, time it, and record it in the manifest."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.runs import interrupt, lock
from pipeline.runs import log as runlog
from pipeline.runs.files import disk_errors_named
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest

log = logging.getLogger(__name__)
NAMES = ("finetune", "merge", "gguf", "modelfile", "evaluate_base", "evaluate_tuned", "verify")
_GROUPS = {"train": NAMES[:1], "export": NAMES[1:6], "evaluate": NAMES[4:6], "all": NAMES}
Force = bool | str


@dataclass(frozen=True)
class StageResult:
    """What a stage did: its recorded results, and whether it was skipped because nothing had changed."""

    stage: str
    skipped: bool
    result: dict[str, Any]
    seconds: float


def forced(force: Force, name: str) -> bool:
    """Whether ``force`` - True, False, or stage names with commas between - means this stage; InputError for others."""
    if isinstance(force, bool):
        return force
    wanted = [word.strip() for word in force.split(",") if word.strip()]
    for word in wanted:
        if word not in NAMES and word not in _GROUPS:
            raise InputError(f"no stage {word!r} to force", remedy=f"known: {', '.join((*NAMES, *_GROUPS))}")
    return any(name == word or name in _GROUPS.get(word, ()) for word in wanted)


def run_stage(
    run: RunFolder,
    name: str,
    inputs: Mapping[str, Any],
    artefacts: list[Path],
    work: Callable[[], dict[str, Any]],
    *,
    force: Force = False,
) -> StageResult:
    """Do ``work`` unless the manifest says it was done with the same inputs and its artefacts are unchanged.

    The run is locked, and its log written to ``logs/``, while the stage works. Raises RunLocked, DiskFull and Interrupted.
    """
    again = forced(force, name)
    with lock.held(run, name), disk_errors_named(run.path):
        manifest = Manifest(run.manifest)
        before = manifest.stage(name)
        if before and not again and manifest.holds(before, inputs):
            log.info("%s: nothing changed since %s, skipped", name, before.finished_at)
            return StageResult(name, True, before.result, before.seconds)
        with runlog.written(run, name), interrupt.graceful(log):
            log.info("%s: started", name)
            started = time.monotonic()
            result = work()
            seconds = time.monotonic() - started
            # read again: the work may have taken hours, and other stages append to the same file
            manifest = Manifest(run.manifest)
            manifest.record(name, inputs, artefacts, result, seconds)
            log.info("%s: done in %.0f s", name, seconds)
            interrupt.leave_if_asked(f"{name} is finished and kept")
    return StageResult(name, False, result, seconds)
