"""Every living server below an output folder - of the runs, the gateway and the status API - and the logs of their starts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx

from pipeline import engines
from pipeline.errors import InputError
from pipeline.operate import services
from pipeline.serve import server
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

    def row(self) -> dict[str, Any]:
        """For ``ps --json``."""
        there = self.server
        return {
            "run": self.run,
            "engine": there.engine,
            "pid": there.pid,
            "port": self.port,
            "url": there.url,
            "model": there.model,
            "state": self.state,
            "started_at": there.started_at,
            "age_seconds": round(max(0.0, time.time() - there.started), 1),
            "rss_gib": round(there.memory_gib(), 2),
            "log": str(there.log),
        }


def listing(output: Path) -> list[Listed]:
    """Every living server of a run below ``output``, the gateway and the status API; records of dead ones are removed."""
    listed = []
    for folder in sorted(output.glob("*/servers")):
        run = "-" if folder == services.folder(output) else folder.parent.name
        listed += [Listed(run, process, _state(process, folder)) for process in server.running(folder)]
    return listed


def logs(run: Path, engine: str | None = None) -> list[Path]:
    """The start logs of a run, oldest first; InputError when there is none."""
    if written := start_logs(run, (engine,) if engine else engines.NAMES):
        return written
    what = f"{engine} log" if engine else "server log"
    raise InputError(f"run {run.name} has no {what}", remedy="granite-pipeline serve writes one per start")


def start_logs(run: Path, names: Sequence[str]) -> list[Path]:
    """The logs of these engines' starts, oldest first; the stages' own logs lie beside them and are left out."""
    written = [path for name in names for path in (run / "logs").glob(f"{name}-*.log")]
    return sorted(written, key=lambda path: (path.stat().st_mtime, path.name))


def _state(process: Server, folder: Path) -> State:
    if not server.note_path(folder, process.engine).is_file():
        return "loading"
    try:
        return "ready" if httpx.get(process.url + process.ready_path, timeout=2).status_code == httpx.codes.OK else "silent"
    except httpx.HTTPError:
        return "silent"
