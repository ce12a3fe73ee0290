"""``ps``, ``stop``, ``logs``: the servers that run, of every run."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline import engines
from pipeline.operate import services
from pipeline.runs.folder import DEFAULT_NAME, DEFAULT_OUTPUT, RunFolder
from pipeline.serve import start

Run = Annotated[str, typer.Option("--run", "--name", help="Name of the run.")]
Output = Annotated[Path, typer.Option("--output", help="Folder that holds the runs.")]
# everything a terminal would obey; a log may hold text that strangers sent
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command("ps")(ps)
    app.command("stop")(stop)
    app.command("logs")(logs)


def ps(output: Output = DEFAULT_OUTPUT, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the servers of every run, the gateway and the status API: process, port, engine, run, state, age and resident memory.

    States: loading (no first token yet), ready, silent (was ready, does not answer its health path now).

    Examples:
      granite-pipeline ps
      granite-pipeline ps --json | jq '.servers[].url'
    """
    rows = [entry.row() for entry in services.listing(output)]
    if as_json:
        typer.echo(json.dumps({"servers": rows}, indent=2))
        return
    if not rows:
        Console(stderr=True).print(f"no server is running for a run in {output}", markup=False)
        return
    table = Table("pid", "port", "engine", "run", "state", "age", "RSS, GiB", "model")
    for row in rows:
        words = [row["pid"], row["port"], row["engine"], row["run"], row["state"], _age(row["age_seconds"]), row["rss_gib"]]
        table.add_row(*(escape(str(word)) for word in [*words, row["model"]]))
    Console().print(table)


def stop(
    engine: Annotated[str, typer.Argument(help="Only this engine.")] = "",
    run: Run = DEFAULT_NAME,
    output: Output = DEFAULT_OUTPUT,
    every: Annotated[
        bool, typer.Option("--all", help="Of every run; without an engine, the gateway and status API too.")
    ] = False,
) -> None:
    """Stop the servers started for a run, or (--all) for every run with the gateway and the status API; returns when they are gone.

    Examples:
      granite-pipeline stop
      granite-pipeline stop vllm --run mine
      granite-pipeline stop --all
    """
    names = [engines.get(engine).name] if engine else list(engines.NAMES)
    folders = (
        sorted({output / entry.run for entry in services.listing(output) if entry.run != "-"})
        if every
        else [RunFolder(run, output).path]
    )
    stopped = [f"{name} of {folder.name}" for folder in folders for name in names if start.stop(folder, name)]
    if every and not engine:
        stopped += [name for name in services.NAMES if services.stop(name, output)]
    where = f"in {output}" if every else f"of run {run}"
    said = f"stopped: {', '.join(stopped)}" if stopped else f"no server {where} was running"
    Console(stderr=True).print(said, markup=False, soft_wrap=True)


def logs(
    engine: Annotated[str, typer.Argument(help="Only this engine; default: whichever started last.")] = "",
    run: Run = DEFAULT_NAME,
    output: Output = DEFAULT_OUTPUT,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C or until the server ends.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many of the last lines.")] = 40,
) -> None:
    """Print the log of a run's last server start (one file per start, in the run's logs/).

    Examples:
      granite-pipeline logs
      granite-pipeline logs vllm --run mine -n 200
      granite-pipeline logs --follow
    """
    folder = RunFolder(run, output).path
    path = services.logs(folder, engines.get(engine).name if engine else None)[-1]
    Console(stderr=True).print(str(path), style="dim", markup=False, soft_wrap=True)
    with path.open(encoding="utf-8", errors="replace", newline="\n") as handle:
        _say("".join(handle.readlines()[-lines:] if lines else []))
        while follow:
            # asked before reading, so that the last words of a server that ends now are still read
            alive = any(entry.server.log.name == path.name for entry in services.listing(output))
            _say(handle.read())
            if not alive:
                return
            time.sleep(0.3)


def _say(text: str) -> None:
    sys.stdout.write(_CONTROL.sub("", text))
    sys.stdout.flush()


def _age(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"
