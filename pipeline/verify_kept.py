"""Backends that passed before a verification was interrupted: kept with what they were asked, so they are not asked again."""

from __future__ import annotations

import contextlib
import json
import logging
from dataclasses import asdict
from importlib.metadata import distributions
from pathlib import Path

from pipeline.checks import Check
from pipeline.config import Settings
from pipeline.files import sha256_json, write_json
from pipeline.manifest import Manifest
from pipeline.outcome import Outcome
from pipeline.runs import RunFolder
from pipeline.score import Answer

log = logging.getLogger(__name__)
_SUFFIX = ".part"


def key_of(run: RunFolder, settings: Settings, limit: int | None) -> str:
    """Hash of everything a backend's outcome depends on: artefacts, rows, references, settings, installed packages."""
    manifest = Manifest(run.manifest)
    parts = [run.merged, run.gguf, run.modelfile, run.heldout, run.reference("base"), run.reference("tuned")]
    seals = {path.name: manifest.sha256(path) for path in parts if path.exists()}
    packages = sorted(f"{d.metadata['Name']} {d.version}" for d in distributions())
    return sha256_json([seals, settings.model_dump(mode="json"), limit, packages])


class Kept:
    """Outcomes of passed backends in the report folder, while the report itself is not there yet."""

    def __init__(self, run: RunFolder, key: str) -> None:
        self.folder, self.key = run.report, key

    def read(self, name: str) -> Outcome | None:
        """A backend's outcome as it was stored for exactly this verification, or None."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            data = json.loads(self._path(name).read_text(encoding="utf-8"))
            if data["key"] == self.key and data["entry"]["name"] == name:
                found = Outcome(data["entry"], [Check(**c) for c in data["checks"]], [Answer(**a) for a in data["answers"]])
                log.info("%s: passed before the interruption, not asked again", name)
                return found
        return None

    def write(self, name: str, outcome: Outcome) -> None:
        """Store the outcome of a backend that passed; another would be worth a second try."""
        if outcome.entry["status"] == "passed":
            write_json(self._path(name), {"key": self.key, **asdict(outcome)})

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{_SUFFIX}"


def clear(run: RunFolder) -> None:
    """Remove what was kept: the report that it is part of is written."""
    for path in run.report.glob(f"*{_SUFFIX}"):
        path.unlink(missing_ok=True)
