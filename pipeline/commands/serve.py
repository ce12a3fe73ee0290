"""``serve`` and ``status``: servers for a run."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from pipeline import config, engines
from pipeline.engines.base import Engine
from pipeline.engines.vllm.lora import base_folder, parse
from pipeline.errors import InputError
from pipeline.planning.plan import Adapter, Purpose
from pipeline.runs.folder import DEFAULT_NAME, DEFAULT_OUTPUT, RunFolder
from pipeline.serve import ollama_service, server, start
from pipeline.serve.start import Endpoint, Options, Target

log = logging.getLogger(__name__)
Run = Annotated[str, typer.Option("--run", "--name", help="Name of the run.")]
Output = Annotated[Path, typer.Option("--output", help="Folder that holds the runs.")]


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command("serve")(serve)
    app.command("status")(status)


def serve(
    engine: Annotated[str, typer.Argument(help="vllm, llamacpp, ollama or sglang; default: LLM_BACKEND.")] = "",
    run: Run = DEFAULT_NAME,
    output: Output = DEFAULT_OUTPUT,
    model: Annotated[Path | None, typer.Option("--model", "--gguf", help="Serve this folder or GGUF instead of a run's.")] = None,
    name: Annotated[str | None, typer.Option("--served-model-name", help="Name that clients use.")] = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to bind; anything but 127.0.0.1 is reachable by others.")
    ] = start.LOOPBACK,
    port: Annotated[
        int | None, typer.Option("--port", help="Port; 0 picks a free one. Default: the engine's documented one.")
    ] = None,
    purpose: Annotated[str, typer.Option("--purpose", help="verify (fast start), serve, throughput or latency.")] = "serve",
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a planned flag. Repeatable.")
    ] = None,
    adapters: Annotated[
        str | None,
        typer.Option("--adapters", metavar="NAME=RUN,...", help="vLLM only: serve these LoRA adapters on their base model."),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Leave the server running and return.")] = False,
) -> None:
    """Serve a run (or any model) with flags planned for this machine, each with its reason.

    Runs in the foreground until Ctrl-C; with --detach it returns once the first token has come, and
    granite-pipeline stop ends it. A start that fails for a reason one changed setting may mend (a KV cache that does not
    fit, a failed compilation, memory) is tried again, at most three times, with the reason; your --set is never changed.
    An Ollama that already answers at OLLAMA_BASE_URL is used as it is: the model is made in it, unless --port is given.

    Examples:
      granite-pipeline serve vllm
      granite-pipeline serve llamacpp --run mine --port 0 --detach
      granite-pipeline serve vllm --model path/to/merged_fp16 --set max-model-len=4096
      granite-pipeline serve vllm --adapters triage=generic,summary=other
    """
    settings = config.load()
    chosen = engines.get(engine or settings.llm_backend)
    folder = RunFolder(run, output)
    loras = _adapters(chosen, adapters, output)
    target = _on_base(folder, loras, model, name) if loras else _target(folder, chosen, model, name, settings)
    overrides = {**settings.overrides(chosen.name), **dict(_pair(text) for text in setting or [])}
    if purpose not in ("verify", "serve", "throughput", "latency"):
        raise InputError(f"no purpose {purpose!r}", remedy="use verify, serve, throughput or latency")
    wanted: Purpose = purpose  # type: ignore[assignment]
    options = Options(
        wanted, host, chosen.default_port if port is None else port, None if detach else os.getpid(), None, overrides, loras
    )
    # on Linux Ollama is a system service that holds its port; one that runs is used, unless another port is asked for
    mine = not chosen.creates_model or port is not None or host != start.LOOPBACK
    there = None if mine else ollama_service.find(settings.address(chosen.name).base_url)
    if there is None:
        run_server(chosen.name, target, options, detach=detach)
    else:
        in_running_ollama(there, target, options)


def in_running_ollama(there: Endpoint, target: Target, options: Options) -> None:
    """Make the model in an Ollama that already runs, and say that it goes on running."""
    console = Console(stderr=True)
    with console.status("creating the model") as spinner:
        endpoint = ollama_service.serve_there(there, target, options, lambda text: spinner.update(text[:120]))
    show(endpoint, console)
    words = f"made in the Ollama that already runs at {endpoint.url}; it goes on running (--port 0 starts another one)"
    console.print(words, soft_wrap=True, markup=False, highlight=False)


def run_server(engine: str, target: Target, options: Options, *, detach: bool) -> None:
    """Serve in the foreground until interrupted, or (``detach``) leave the server running."""
    console = Console(stderr=True)
    with console.status(f"starting {engine}") as spinner:
        endpoint = start.serve(engine, target, options, lambda text: spinner.update(text[:120]))
    show(endpoint, console)
    if not detach and endpoint.server is not None:
        attend(endpoint.server, target.servers)


def attend(process: server.Server, records: Path) -> None:
    """Stay beside a server until Ctrl-C, and stop it then; EngineError when it dies first."""
    try:
        while process.alive:
            time.sleep(0.5)
        raise server.failure(process, "died while serving")
    except KeyboardInterrupt:
        Console(stderr=True).print("stopping")
    finally:
        server.end(process, records)


def show(endpoint: Endpoint, console: Console) -> None:
    """Print the flags with their reasons, and how to talk to the endpoint."""
    table = Table("setting", "value", "source", "reason", title=f"{endpoint.engine} {endpoint.version or ''}")
    for reason in (endpoint.plan or {}).get("reasons", []):
        table.add_row(reason["flag"], str(reason["value"] or ""), reason["source"], reason["reason"])
    console.print(table)
    console.print(f"ready after {endpoint.ready_seconds:.0f} s: {endpoint.url}/v1, model {endpoint.model}", soft_wrap=True)


def status(
    run: Run = DEFAULT_NAME,
    output: Output = DEFAULT_OUTPUT,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show which servers of a run are up and whether each answers."""
    folder = RunFolder(run, output).path
    running = server.running(folder / "servers")
    rows = [
        {
            "backend": s.engine,
            "url": s.url,
            "model": s.model,
            "pid": s.pid,
            "healthy": start.reachable(s.url + s.ready_path),
            "log": str(s.log),
        }
        for s in running
    ]
    if as_json:
        typer.echo(json.dumps({"run": run, "servers": rows}, indent=2))
        return
    table = Table("backend", "url", "model", "healthy", "memory, GiB", title=f"servers of run {run}")
    for s, row in zip(running, rows, strict=True):
        table.add_row(s.engine, s.url, s.model, "yes" if row["healthy"] else "no", f"{s.memory_gib():.2f}")
    Console().print(table if rows else f"no server of run {run} is running")


def _target(run: RunFolder, engine: Engine, model: Path | None, name: str | None, settings: config.Settings) -> Target:
    served = name or settings.served_name(engine.name) or run.name
    if model is None:
        return Target.of_run(run, engine.name, served)
    if not model.exists():
        raise InputError(f"{model}: no such file or folder", remedy="give a model folder or a .gguf file")
    modelfile = model.parent / "Modelfile"
    # a model inside a run belongs to it; for any other, a folder of its name beside the runs, where ps and stop look
    inside = model.resolve().parent.parent == run.output.resolve()
    folder = model.parent if inside else run.output / _folder_name(model)
    return Target(model, served, folder, modelfile if engine.creates_model else None)


def _folder_name(model: Path) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]", "-", model.resolve().stem if model.is_file() else model.resolve().name)
    return name.lstrip("._-")[:64] or "model"


def _adapters(engine: Engine, text: str | None, output: Path) -> tuple[Adapter, ...]:
    if text is None:
        return ()
    if not engine.serves_adapters:
        raise InputError(f"{engine.name} does not serve adapters here", remedy="use vllm, or serve the merged model")
    return tuple(parse(text, output))


def _on_base(run: RunFolder, loras: Sequence[Adapter], model: Path | None, name: str | None) -> Target:
    """The base model under its own name; logs and records stay in the run's folder."""
    base = base_folder(loras, model)
    return Target(base, name or base.name, run.path)


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key:
        raise InputError(f"--set {text!r} is not KEY=VALUE")
    return key, value if equals else "true"
