"""All servers of all runs below an output folder: what each is, whether it answers, how old and how large it is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx

from pipeline import engines, server, services
from pipeline.errors import InputError
from pipeline.server import Server

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
        found += [Listed(run, process, _state(process, folder)) for process in server.running(folder)]
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


def _state(process: Server, folder: Path) -> State:
    if not server.note_path(folder, process.engine).is_file():
        return "loading"
    try:
        answer = httpx.get(process.url + process.ready_path, timeout=2)
    except httpx.HTTPError:
        return "silent"
    return "ready" if answer.status_code == httpx.codes.OK else "silent"
