"""The run's manifest: every stage appends what it read, with which parameters, and the hashes of what it made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.runs import lock
from pipeline.runs.files import read_json, tree_bytes, write_json
from pipeline.runs.hashes import HashCache, sha256_json
from pipeline.runs.text import masked

SCHEMA = 1
_KEPT = 20


class Manifest:
    """``manifest.json`` of one run; artefact paths are stored relative to its folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = {"schema": SCHEMA, "run": path.parent.name, "stages": {}}
        if path.exists():
            self.data = _checked(read_json(path), path)

    def stage(self, name: str) -> dict[str, Any]:
        """What a stage recorded, or an empty dict."""
        found: dict[str, Any] = self.data["stages"].get(name, {})
        return found

    def is_current(self, name: str, inputs: Mapping[str, Any]) -> bool:
        """True when the stage ran with exactly these inputs and its artefacts are on disk unchanged."""
        return self.holds(self.stage(name), inputs)

    def holds(self, entry: Mapping[str, Any], inputs: Mapping[str, Any]) -> bool:
        """True when an entry was made with exactly these inputs and its artefacts are on disk unchanged."""
        if not entry or entry["key"] != sha256_json(inputs):
            return False
        return all(self._unchanged(relative, seen) for relative, seen in entry["artefacts"].items())

    def record(
        self, name: str, inputs: Mapping[str, Any], artefacts: list[Path], result: Mapping[str, Any], seconds: float
    ) -> None:
        """Store a finished stage: its inputs, the hash of each artefact and its results; written atomically."""
        record = sealed(self.entry(inputs, artefacts, result, seconds))
        with self.changing() as data:
            data["stages"][name] = record

    def entry(
        self, inputs: Mapping[str, Any], artefacts: list[Path], result: Mapping[str, Any], seconds: float
    ) -> dict[str, Any]:
        """What is stored of something that was done: its inputs and their key, the hash of each artefact, its results."""
        return {
            "key": sha256_json(inputs),
            "inputs": dict(inputs),
            "artefacts": {p.relative_to(self.path.parent).as_posix(): self._seal(p) for p in artefacts if p.exists()},
            "result": dict(result),
            "seconds": round(seconds, 1),
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def artefact_sha256(self, stage: str, relative: str) -> str:
        """Recorded hash of an artefact; KeyError when the stage has not made it."""
        return str(self.data["stages"][stage]["artefacts"][relative]["sha256"])

    def changed(self) -> list[tuple[str, str, str]]:
        """(stage, artefact, "missing" or "changed") for every artefact that is not as its stage recorded it."""
        found = []
        for name, stage in self.data["stages"].items():
            for relative, seen in stage["artefacts"].items():
                if not self._unchanged(relative, seen):
                    found.append((name, relative, "changed" if (self.path.parent / relative).exists() else "missing"))
        return found

    def append(self, key: str, entry: Mapping[str, Any]) -> None:
        """Add a dated entry to a list in the manifest, of which the last twenty are kept; written atomically."""
        at = datetime.now(UTC).isoformat(timespec="seconds")
        with self.changing() as data:
            data[key] = [*data.get(key, []), {"at": at, **entry}][-_KEPT:]

    @contextmanager
    def changing(self) -> Iterator[dict[str, Any]]:
        """The manifest as it is on disk now, to be changed inside; then written atomically, without secrets.

        No other process writes in between: a server may be started beside a training that holds the run.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with lock.guarded(self.path.parent):
            if self.path.exists():
                self.data = _checked(read_json(self.path), self.path)
            yield self.data
            write_json(self.path, masked(self.data))

    def _unchanged(self, relative: str, seen: Mapping[str, Any]) -> bool:
        path = self.path.parent / relative
        return path.exists() and tree_bytes(path) == seen["bytes"] and self.sha256(path) == seen["sha256"]

    def sha256(self, path: Path) -> str:
        """Hash of a file or folder, read again only when the file system says that it changed."""
        return HashCache(self.path.parent).tree(path)

    def _seal(self, path: Path) -> dict[str, Any]:
        return {"sha256": self.sha256(path), "bytes": tree_bytes(path)}


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as the manifest keeps it, without secrets, and its own hash in it."""
    kept = masked(record)
    return {**kept, "seal": _sealed(kept)}


def seal_holds(record: Mapping[str, Any]) -> bool | None:
    """Whether a record is as it was written; None for one that has no seal."""
    known = record.get("seal")
    return None if known is None else bool(known == _sealed({key: value for key, value in record.items() if key != "seal"}))


def _checked(data: Any, path: Path) -> dict[str, Any]:
    """The manifest when it has the form that every stage relies on; InputError otherwise."""
    stages = data.get("stages") if isinstance(data, dict) else None
    whole = isinstance(stages, dict) and all(
        isinstance(stage, dict) and {"key", "artefacts", "result", "seconds", "finished_at"} <= set(stage)
        for stage in stages.values()
    )
    if not whole or data.get("schema") != SCHEMA:
        raise InputError(f"{path} is not a run's manifest", remedy="move it away; the stages then run again")
    return dict(data)


def _sealed(record: Mapping[str, Any]) -> str:
    # as it will be read back: tuples are lists then, and keys are text
    return sha256_json(json.loads(json.dumps(record)))
