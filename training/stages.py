"""One way to run a stage: skip it when nothing changed, time it, and record it in the manifest."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import DiskFull
from pipeline.manifest import Manifest
from pipeline.runs import RunFolder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageResult:
    """What a stage did: its recorded results, and whether it was skipped because nothing had changed."""

    stage: str
    skipped: bool
    result: dict[str, Any]
    seconds: float


def run_stage(
    run: RunFolder,
    name: str,
    inputs: Mapping[str, Any],
    artefacts: list[Path],
    work: Callable[[], dict[str, Any]],
    *,
    force: bool = False,
) -> StageResult:
    """Do ``work`` unless the manifest says it was done with the same inputs and its artefacts are unchanged."""
    manifest = Manifest(run.manifest)
    if not force and manifest.is_current(name, inputs):
        stage = manifest.stage(name)
        log.info("%s: nothing changed since %s, skipped", name, stage["finished_at"])
        return StageResult(name, True, stage["result"], stage["seconds"])
    started = time.monotonic()
    result = _with_disk_errors_named(work, run.path)
    seconds = time.monotonic() - started
    # read again: the work may have taken hours, and other stages append to the same file
    manifest = Manifest(run.manifest)
    manifest.record(name, inputs, artefacts, result, seconds)
    log.info("%s: done in %.0f s", name, seconds)
    return StageResult(name, False, result, seconds)


def _with_disk_errors_named(work: Callable[[], dict[str, Any]], folder: Path) -> dict[str, Any]:
    """A disk that fills up in spite of the check before is a DiskFull, whichever library met it."""
    try:
        return work()
    except Exception as error:
        if getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT) and "No space left on device" not in str(error):
            raise
        raise DiskFull(
            f"the disk under {folder} is full", evidence=str(error)[-500:], remedy="free some space and run again"
        ) from error
