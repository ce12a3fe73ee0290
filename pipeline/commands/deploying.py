"""``gateway`` and ``status-api``: one address for applications, and one for those who watch."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.console import Console

from pipeline import config, server, services
from pipeline.errors import InputError, MissingDependency
from pipeline.gateway import DEFAULT_PORT, REQUEST_TIMEOUT, Strategy
from pipeline.runs import DEFAULT_OUTPUT

Output = Annotated[Path, typer.Option("--output", help="Folder that holds the runs.")]
Host = Annotated[str, typer.Option("--host", help="Address to bind; anything but 127.0.0.1 is reachable by others.")]
Detach = Annotated[bool, typer.Option("--detach", help="Leave it running and return; --stop ends it.")]
Stop = Annotated[bool, typer.Option("--stop", help="Stop the one that was left running.")]
STATUS_PORT = 8080


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command("gateway")(gateway)
    app.command("status-api")(status_api)


def gateway(
    strategy: Annotated[str, typer.Option("--strategy", help="local-first, cloud-first or cheapest.")] = "local-first",
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port; 0 picks a free one.")] = DEFAULT_PORT,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds a backend may take for one answer.")] = REQUEST_TIMEOUT,
    output: Output = DEFAULT_OUTPUT,
    detach: Detach = False,
    stop: Stop = False,
) -> None:
    """One OpenAI-compatible address for all backends, with health checks and fallback (LiteLLM's proxy).

    A request goes to the first healthy backend of the strategy; when that one fails, to another one that serves the same
    fine-tune - or a model that agents.yaml allows by name, and to nothing else. Answers say where they come from in the
    headers x-granite-backend, x-granite-run, x-granite-manifest, x-granite-artefact and x-granite-fallback.

    Examples:
      granite-pipeline gateway --detach
      curl http://127.0.0.1:4000/v1/models
      granite-pipeline gateway --strategy cheapest --port 4100
    """
    if stop:
        _stop("gateway", output)
        return
    if strategy not in get_args(Strategy):
        raise InputError(f"no strategy {strategy!r}", remedy="use " + ", ".join(get_args(Strategy)))
    _require("litellm", "gateway")
    options = ("--strategy", strategy, "--timeout", f"{timeout:g}")
    _serve(services.gateway_launch(config.load(), host, port, output, options), output, detach=detach)


def status_api(
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port; 0 picks a free one.")] = STATUS_PORT,
    output: Output = DEFAULT_OUTPUT,
    detach: Detach = False,
    stop: Stop = False,
) -> None:
    """Serve the health of the backends: a page for people, JSON for applications, /metrics for Prometheus.

    GET /api/v1/inference/status answers {"backend", "base_url", "model", "orchestrator_model", "healthy"}.
    The backends are asked every second; requests read what was last seen.

    Example: granite-pipeline status-api --port 8080
    """
    if stop:
        _stop("status-api", output)
        return
    _require("fastapi", "gateway")
    _serve(services.status_launch(host, port, output), output, detach=detach)


def _serve(launch: services.Launch, output: Path, *, detach: bool) -> None:
    console = Console(stderr=True)
    with console.status(f"starting {launch.engine}") as spinner:
        owner = None if detach else os.getpid()
        process = services.start(launch, output, owner, lambda text: spinner.update(text[:120]))
    console.print(f"{launch.engine}: {launch.url}, log {process.log}", soft_wrap=True, markup=False, highlight=False)
    if detach:
        return
    try:
        while process.alive:
            time.sleep(0.5)
        raise server.failure(process, "died while serving")
    except KeyboardInterrupt:
        console.print("stopping")
    finally:
        services.stop(launch.engine, output)


def _stop(name: str, output: Path) -> None:
    stopped = services.stop(name, output)
    Console(stderr=True).print(f"stopped: {name}" if stopped else f"no {name} was left running")


def _require(package: str, extra: str) -> None:
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise MissingDependency(f"{package} is not installed", remedy=f"pip install 'granite-pipeline[{extra}]'")
