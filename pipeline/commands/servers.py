"""``ps``, ``stop``, ``logs``: the servers that run, of every run."""

import re
import sys
import time
from typing import Annotated

import typer

from pipeline import engines
from pipeline.commands import options, show
from pipeline.operate import services
from pipeline.runs.folder import DEFAULT_NAME, DEFAULT_OUTPUT, RunFolder
from pipeline.serve import start

# everything a terminal would obey; a log may hold text that strangers sent
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def ps(output: options.Output = DEFAULT_OUTPUT, as_json: options.AsJson = False) -> None:
    """List the servers of every run, the gateway and the status API: process, port, engine, run, state, age and resident memory.

    States: loading (no first token yet), ready, silent (was ready, does not answer its health path now).

    Examples:
      granite-pipeline ps
      granite-pipeline ps --json | jq '.servers[].url'
    """
    rows = [entry.row() for entry in services.listing(output)]
    if as_json:
        show.as_json({"servers": rows})
    elif rows:
        heads = {"pid": "pid", "port": "port", "engine": "engine", "run": "run", "state": "state", "age": "age"}
        heads |= {"rss_gib": "RSS, GiB", "model": "model"}
        show.table("", list(heads.values()), [[{**row, "age": _age(row["age_seconds"])}[key] for key in heads] for row in rows])
    else:
        show.line(f"no server is running for a run in {output}", err=True)


def stop(
    engine: options.OnlyEngine = "",
    run: options.Run = DEFAULT_NAME,
    output: options.Output = DEFAULT_OUTPUT,
    every: Annotated[
        bool, typer.Option("--all", help="Of every run; without an engine, the gateway and status API too.")
    ] = False,
    agent: options.Agent = None,
) -> None:
    """Stop the servers started for a run, or (--all) for every run with the gateway and the status API; returns when they are gone.

    Examples:
      granite-pipeline stop
      granite-pipeline stop vllm --run mine
      granite-pipeline stop --all
    """
    run, engine, _ = options.chosen(agent, run, engine)
    names = [engines.get(engine).name] if engine else list(engines.NAMES)
    folders = [RunFolder(run, output).path]
    if every:
        folders = sorted({output / entry.run for entry in services.listing(output) if entry.run != "-"})
    stopped = [f"{name} of {folder.name}" for folder in folders for name in names if start.stop(folder, name)]
    if every and not engine:
        stopped += [name for name in services.NAMES if services.stop(name, output)]
    where = f"in {output}" if every else f"of run {run}"
    show.line(f"stopped: {', '.join(stopped)}" if stopped else f"no server {where} was running", err=True)


def logs(
    engine: options.OnlyEngine = "",
    run: options.Run = DEFAULT_NAME,
    output: options.Output = DEFAULT_OUTPUT,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C or until the server ends.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many of the last lines.")] = 40,
    agent: options.Agent = None,
) -> None:
    """Print the log of a run's last server start (one file per start, in the run's logs/); without an engine, of whichever started last.

    Examples:
      granite-pipeline logs
      granite-pipeline logs vllm --run mine -n 200
      granite-pipeline logs --follow
    """
    run, engine, _ = options.chosen(agent, run, engine)
    path = services.logs(RunFolder(run, output).path, engines.get(engine).name if engine else None)[-1]
    show.line(str(path), err=True, style="dim")
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
