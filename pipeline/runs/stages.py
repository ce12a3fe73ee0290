"""One way not to redo work: a stage is skipped when nothing changed, recorded when it is done, and gone on with when it was cut."""

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.runs import interrupt, lease, lock
from pipeline.runs import log as runlog
from pipeline.runs.files import disk_errors_named, write_atomic
from pipeline.runs.folder import RunFolder
from pipeline.runs.hashes import sha256_json, sha256_tree
from pipeline.runs.manifest import Counts, Manifest

log = logging.getLogger(__name__)
NAMES = ("finetune", "merge", "gguf", "modelfile", "evaluate_base", "evaluate_tuned", "verify")
# they look at the model and add nothing to it
LOOKING = ("verify", "run")
_GROUPS = {"train": NAMES[:1], "export": NAMES[1:6], "evaluate": NAMES[4:6], "all": NAMES}
_CODE = Path(__file__).parents[2]
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
    counts: Counts = dict,
) -> StageResult:
    """Do ``work`` unless the manifest says it was done with the same inputs and its artefacts are unchanged.

    ``counts`` takes from the inputs what the outcome depends on; the others are recorded, and recorded anew when they change. The run is locked, and its log written to ``logs/``, while the stage works. Raises RunLocked, DiskFull and Interrupted.
    """
    again = forced(force, name)
    with lock.held(run, name), disk_errors_named(run.path):
        manifest = Manifest(run.manifest)
        before = manifest.stage(name)
        if before and not again and manifest.holds(before, inputs, counts):
            if before.key != sha256_json(inputs):
                manifest.restate(name, inputs)
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


class Partial:
    """What is done of a stage that is not: an append-only file of JSON by name; its first line says for which inputs."""

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.done: dict[str, Any] = {}
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        if lines and _read(lines[0]) == {"key": key}:
            for line in lines[1:]:
                self.done |= _read(line)  # the last line may be cut
        # written anew, so that what is appended never joins a cut line
        write_atomic(path, "".join(json.dumps(entry) + "\n" for entry in ({"key": key}, self.done)))

    def add(self, done: Mapping[str, Any]) -> None:
        """Append results by name and flush them to disk."""
        lease.require_held(self.path)
        self.done |= done
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(done) + "\n")
            out.flush()
            os.fsync(out.fileno())

    def remove(self) -> None:
        """Remove the file: the stage is finished."""
        lease.require_held(self.path)
        self.path.unlink(missing_ok=True)


def _read(line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}


def product() -> dict[str, str]:
    """Hashes of this product's own code and of the packages beside it, so that a change of them is not slept through."""
    files = sorted(p for part in ("pipeline", "training", "notebooks") for p in (_CODE / part).rglob("*.*") if p.is_file())
    kept = [p for p in files if "__pycache__" not in p.parts and p.relative_to(_CODE).parts[:2] != ("training", "output")]
    packages = sorted(f"{d.metadata['Name']} {d.version}" for d in distributions())
    return {"code": sha256_json([f"{p.relative_to(_CODE)} {sha256_tree(p)}" for p in kept]), "packages": sha256_json(packages)}
