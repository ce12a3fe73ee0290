"""``check``: whether the bytes that are served are those of a fine-tune."""

import hashlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from typer import Option

from pipeline import engines
from pipeline.commands import options, show
from pipeline.errors import InputError, VerificationFailed
from pipeline.runs.files import tree_bytes
from pipeline.runs.folder import DEFAULT_NAME, DEFAULT_OUTPUT, RunFolder
from pipeline.runs.manifest import Manifest
from pipeline.serve.artefacts import changed_files, manifest_hash

_HASH = re.compile(r"[0-9a-f]{64}")
_CHUNK = 1 << 20
# between two lines of progress
_SECONDS = 10.0


def check(
    manifest: Annotated[str, Option("--manifest", metavar="HASH", help="The manifest hash of the fine-tune: 64 hex digits.")],
    run: options.Run = DEFAULT_NAME,
    output: options.Output = DEFAULT_OUTPUT,
    engine: Annotated[str, Option("--engine", help="Only what this engine serves; default: all of the run.")] = "",
    as_json: options.AsJson = False,
) -> None:
    """Read every byte of what is served of a run and compare it with the run's record, which must be that of a fine-tune.

    Nothing is written and nothing that was read earlier is believed: on Kubernetes this runs before a server starts, on a volume that is
    read only. Exit code 0, or 1 with the name of each file that is changed, missing or not recorded - or when the run is another
    fine-tune -, or 2 for a run or a hash that is none. The gateway tells the hash of what answered in x-granite-manifest.

    Example: granite-pipeline check --run mine --manifest 4f0c... --engine vllm
    """
    if not _HASH.fullmatch(manifest):
        raise InputError(f"--manifest {manifest[:80]!r} is not a manifest hash", remedy="give all 64 hex digits of it")
    folder = RunFolder(run, output)
    if not folder.manifest.is_file():
        raise InputError(f"there is no run {run} in {output}", remedy=f"granite-pipeline runs --output {output}")
    record = Manifest(folder.manifest)
    names = _served(folder, record, engine)
    size = sum(tree_bytes(folder.path / name) for name in names if (folder.path / name).exists())
    found = [] if (is_now := _fine_tune(record)) == manifest else [f"manifest.json: this run is fine-tune {is_now}"]
    with show.progress(f"reading {size / 2**30:.2f} GiB") as progress:
        read = _Reading(size, progress)
        found += [] if found else [line for name in names for line in changed_files(record, name, read.sha256)]
    if as_json:
        show.as_json({"run": run, "manifest": manifest, "checked": names, "bytes": read.done, "differences": found})
    if found:
        what = f"run {run} is not fine-tune {manifest}" if is_now != manifest else f"run {run} is not as its manifest recorded it"
        remedy = "copy the run folder again from where it was made, or name the fine-tune that is meant"
        raise VerificationFailed(what, evidence="\n".join(found), remedy=remedy)
    show.line(f"{run} is fine-tune {manifest}: {', '.join(names)} as recorded ({read.done / 2**30:.2f} GiB read)", err=True)


def _fine_tune(record: Manifest) -> str:
    """The manifest hash of a run; InputError where nothing was merged yet."""
    try:
        return manifest_hash(record)
    except KeyError:
        remedy = f"granite-pipeline export --run {record.run}"
        raise InputError(f"run {record.run} has no record of a merged model", remedy=remedy) from None


def _served(folder: RunFolder, record: Manifest, engine: str) -> list[str]:
    """What an engine loads of a run, by name; without one, everything on record that some engine does."""
    if engine:
        chosen = engines.get(engine)
        if not (artefact := chosen.artefact(folder)):
            raise InputError(f"{chosen.title} serves nothing of a run", remedy="leave --engine out")
        return [artefact.name, *([folder.modelfile.name] if chosen.creates_model else [])]
    paths = [*(each.artefact(folder) for each in engines.every()), folder.adapter, folder.modelfile]
    recorded = {name for stage in record.stages.values() for name in stage.artefacts}
    return [name for name in dict.fromkeys(path.name for path in paths if path) if name in recorded]


class _Reading:
    """Hashes files, and says now and then how much of all that is."""

    def __init__(self, size: int, progress: Callable[[str], None]) -> None:
        self.size, self.progress, self.done, self._said = size, progress, 0, time.monotonic()

    def sha256(self, path: Path) -> str:
        """Hex SHA-256 of a file's bytes."""
        digest = hashlib.sha256()
        with path.open("rb") as handle:
            while block := handle.read(_CHUNK):
                digest.update(block)
                self.done += len(block)
                if time.monotonic() - self._said > _SECONDS:
                    self._said = time.monotonic()
                    self._say(path)
        return digest.hexdigest()

    def _say(self, path: Path) -> None:
        words = f"read {self.done / 2**30:.1f} of {self.size / 2**30:.1f} GiB, {path.name}"
        self.progress(words)
        # in a pod's log there is no spinner
        if not show.console(err=True).is_terminal:
            show.line(words, err=True)
