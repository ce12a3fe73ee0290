"""What became of one backend in a verification: its entry in report.json, its checks and its answers."""

import contextlib
import json
import logging
from dataclasses import asdict, dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from pipeline.config import Settings
from pipeline.report.check import Check
from pipeline.runs.files import write_json
from pipeline.runs.folder import RunFolder
from pipeline.runs.hashes import sha256_json
from pipeline.runs.manifest import Manifest
from pipeline.serve.start import Endpoint
from pipeline.verify.score import Answer


@dataclass
class Outcome:
    """What one backend did: its report entry, its checks and its answers."""

    entry: dict[str, Any]
    checks: list[Check] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)


def launched(endpoint: Endpoint) -> dict[str, Any]:
    """The part of a report entry that says which server it was and how it was started."""
    plan, process = endpoint.plan or {}, endpoint.server
    return {
        "name": endpoint.engine,
        "engine_version": endpoint.version,
        "argv": list(process.argv) if process else None,
        "env": process.env if process else None,
        "sha256": endpoint.sha256,
        "ready_seconds": endpoint.ready_seconds,
        "reasons": plan.get("reasons", []),
        "memory_gib": plan.get("memory_gib"),
        "memory_measured_gib": round(process.memory_gib(), 2) if process else None,
    }


_NOTHING = {
    "engine_version": None, "argv": None, "ready_seconds": None, "exact": None, "prompt_parity": None,
    "finish_stop": None, "ttft_ms": None, "tokens_per_second": None,
}  # fmt: skip


def absent(name: str, status: str, reason: str, endpoint: Endpoint | None = None) -> Outcome:
    """A backend without figures: skipped because it is not installed, or failed."""
    check = Check(
        f"{name}.available" if status == "skipped" else f"{name}.serving", "skipped" if status == "skipped" else "failed", reason
    )
    what, _, install = reason.partition("; to have it: ")
    known = launched(endpoint) if endpoint else {}
    entry = {
        **_NOTHING,
        **known,
        "name": name,
        "status": status,
        "reason": what,
        "install": install or None,
        "prompts": {"total": 0, "passed": 0},
        "checks": [{"id": check.id, "status": check.status, "detail": check.figure}],
    }
    return Outcome(entry, [check])


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
