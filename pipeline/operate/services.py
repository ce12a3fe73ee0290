"""What runs in the background: gateway and status API, started and stopped as engines are; the list of every living server."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pipeline import engines
from pipeline.config import Settings
from pipeline.engines.base import Launch
from pipeline.errors import InputError
from pipeline.net.client import status_of
from pipeline.net.loopback import HERE, claim
from pipeline.operate.agents import Agents
from pipeline.operate.routing import deployments, gateway_folder
from pipeline.runs.folder import DEFAULT_OUTPUT
from pipeline.serve import records, server
from pipeline.serve.records import Ready, Record
from pipeline.serve.server import Progress, Server

# LiteLLM's proxy takes 20 to 30 s to import on a small machine
_READY_SECONDS = 300.0
NAMES = ("gateway", "status-api")
State = Literal["loading", "ready", "silent"]


def gateway_launch(
    settings: Settings, host: str, port: int, output: Path, options: Sequence[str] = (), *, free: bool = True
) -> Launch:
    """The gateway's process; InputError when it would be open to others without a key."""
    if host not in HERE and not settings.gateway_api_key.get_secret_value():
        said = f"the gateway on {host} could be used by everyone who reaches this machine"
        raise InputError(said, remedy="set GATEWAY_API_KEY, or leave out --host")
    # what the gateway would refuse in its own log is said here
    deployments(settings, Agents.load(settings.agents_file))
    config = gateway_folder(output.resolve()) / "litellm.yaml"
    words = ("--config", str(config), "--output", str(output.resolve()), *options)
    return _launch("gateway", "proxy", host, claim(host, port) if free else port, words)


def status_launch(host: str, port: int, output: Path, *, free: bool = True) -> Launch:
    """The status API's process."""
    return _launch("status-api", "status", host, claim(host, port) if free else port, ("--output", str(output.resolve())))


def folder(output: Path) -> Path:
    """Where the records of the services lie, as a run's servers have theirs."""
    return gateway_folder(output) / "servers"


def start(launch: Launch, output: Path, owner: int | None, progress: Progress) -> Server:
    """Start a service and wait until it answers; its record and log are kept below the output folder.

    EnvironmentFailure names the one that runs already: two would share one record and one log.
    """
    there = folder(output)
    log, remedy = there.parent / f"{launch.engine}.log", f"granite-pipeline {launch.engine} --stop"
    process = records.begin(launch, log, there, owner=owner, remedy=remedy)
    try:
        seconds = server.wait_ready(process, launch.start_timeout, progress)
        records.mark_ready(there, launch.engine, process, Ready(process.url, process.model, ready_seconds=seconds))
    except BaseException:
        records.end(process, there)
        raise
    return process


def stop(name: str, output: Path = DEFAULT_OUTPUT) -> bool:
    """Stop a service that was left running; False when there is none."""
    return records.stop(folder(output), name)


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
        known = {name: getattr(there, name) for name in ("engine", "pid", "url", "model", "started_at")}
        age, memory = round(max(0.0, time.time() - there.started), 1), round(there.memory_gib(), 2)
        now = {"port": self.port, "state": self.state, "age_seconds": age, "rss_gib": memory, "log": str(there.log)}
        return {"run": self.run, **known, **now}


def listing(output: Path) -> list[Listed]:
    """Every living server of a run below ``output``, the gateway and the status API; records of dead ones are removed."""
    listed = []
    for at in sorted(output.glob("*/servers")):
        run = "-" if at == folder(output) else at.parent.name
        listed += [Listed(run, one.process, _state(one)) for one in records.living(at) if one.process]
    return listed


def logs(run: Path, engine: str | None = None) -> list[Path]:
    """The start logs of a run, oldest first; InputError when there is none."""
    if written := start_logs(run, engine):
        return written
    raise InputError(f"run {run.name} has no {engine or 'server'} log", remedy="granite-pipeline serve writes one per start")


def start_logs(run: Path, engine: str | None = None) -> list[Path]:
    """The logs of an engine's starts (default: of every engine's), oldest first; the stages' own logs beside them are left out."""
    written = [path for name in ([engine] if engine else engines.NAMES) for path in (run / "logs").glob(f"{name}-*.log")]
    return sorted(written, key=lambda path: (path.stat().st_mtime, path.name))


def _launch(name: str, module: str, host: str, port: int, words: Sequence[str]) -> Launch:
    reached = "127.0.0.1" if host == "0.0.0.0" else host
    argv = (sys.executable, "-m", f"pipeline.operate.{module}", "--host", host, "--port", str(port), *words)
    return Launch(name, argv, {}, f"http://{reached}:{port}", "/health", name, start_timeout=_READY_SECONDS)


def _state(record: Record) -> State:
    if record.ready is None or record.process is None:
        return "loading"
    return "ready" if status_of(record.process.url + record.process.ready_path) == 200 else "silent"
