"""The gateway and the status API as supervised processes, started and stopped as engines are."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.config import Settings
from pipeline.engines.base import Launch as Launch
from pipeline.errors import InputError
from pipeline.net.loopback import HERE, claim
from pipeline.operate.agents import Agents
from pipeline.operate.routing import deployments, gateway_folder
from pipeline.runs.folder import DEFAULT_OUTPUT
from pipeline.serve import records, server
from pipeline.serve.records import Ready
from pipeline.serve.server import Progress, Server

# LiteLLM's proxy takes 20 to 30 s to import on a small machine
_READY_SECONDS = 300.0
NAMES = ("gateway", "status-api")


def gateway_launch(
    settings: Settings, host: str, port: int, output: Path, options: Sequence[str] = (), *, free: bool = True
) -> Launch:
    """The gateway's process; InputError when it would be open to others without a key."""
    if host not in HERE and not settings.gateway_api_key.get_secret_value():
        raise InputError(
            f"the gateway on {host} could be used by everyone who reaches this machine",
            remedy="set GATEWAY_API_KEY, or leave out --host",
        )
    # what the gateway would refuse in its own log is said here
    deployments(settings, Agents.load(settings.agents_file))
    config = gateway_folder(output.resolve()) / "litellm.yaml"
    words = ("--config", str(config), "--output", str(output.resolve()), *options)
    return _launch("gateway", "pipeline.operate.proxy", (host, claim(host, port) if free else port), words)


def status_launch(host: str, port: int, output: Path, *, free: bool = True) -> Launch:
    """The status API's process."""
    return _launch(
        "status-api", "pipeline.operate.status", (host, claim(host, port) if free else port), ("--output", str(output.resolve()))
    )


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


def _launch(name: str, module: str, address: tuple[str, int], words: Sequence[str]) -> Launch:
    host, port = address
    reached = "127.0.0.1" if host == "0.0.0.0" else host
    argv = (sys.executable, "-m", module, "--host", host, "--port", str(port), *words)
    return Launch(name, argv, {}, f"http://{reached}:{port}", "/health", name, start_timeout=_READY_SECONDS)
