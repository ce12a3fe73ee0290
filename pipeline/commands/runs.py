"""``ps``, ``stop``, ``logs``, ``runs``, ``prune``: what there is below the output folder, and ending or removing it."""

import re
import sys
import time
from typing import Annotated

import typer
from typer import Argument, Option

from pipeline import engines
from pipeline.commands import options, show
from pipeline.doctor.runs import list_runs, removals, remove_listed
from pipeline.errors import InputError
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
        heads = ("pid", "port", "engine", "run", "state", "age", "RSS, GiB", "model")
        told = ({**row, "age": _age(row["age_seconds"]), "RSS, GiB": row["rss_gib"]} for row in rows)
        show.table("", heads, ([row[head] for head in heads] for row in told))
    else:
        show.line(f"no server is running for a run in {output}", err=True)


def stop(
    engine: options.OnlyEngine = "",
    run: options.Run = DEFAULT_NAME,
    output: options.Output = DEFAULT_OUTPUT,
    every: Annotated[bool, Option("--all", help="Of every run; without an engine, the gateway and status API too.")] = False,
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
        made = {path.parents[2] for path in output.glob("*/servers/private/*.json")}  # in an Ollama that is not ours
        folders = sorted({output / entry.run for entry in services.listing(output) if entry.run != "-"} | made)
    stopped = [f"{name} of {folder.name}" for folder in folders for name in names if start.stop(folder, name)]
    if every and not engine:
        stopped += [name for name in services.NAMES if services.stop(name, output)]
    where = f"in {output}" if every else f"of run {run}"
    show.line(f"stopped: {', '.join(stopped)}" if stopped else f"no server {where} was running", err=True)


def logs(
    engine: options.OnlyEngine = "",
    run: options.Run = DEFAULT_NAME,
    output: options.Output = DEFAULT_OUTPUT,
    follow: Annotated[bool, Option("--follow", "-f", help="Go on until Ctrl-C or until the server ends.")] = False,
    lines: Annotated[int, Option("--lines", "-n", min=0, help="How many of the last lines.")] = 40,
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


def runs(output: options.Output = DEFAULT_OUTPUT, as_json: options.AsJson = False) -> None:
    """List the runs: how far each got, how big it is, who works on it.

    States: training, trained, merged, converted, exported, verified, failed verification, damaged, empty.

    Example: granite-pipeline runs --json
    """
    found = list_runs(output)
    if as_json:
        show.as_json({"output": str(output), "runs": [info.to_json() for info in found]})
    elif found:
        users = ("; ".join(filter(None, [r.holder, *(f"server {name}" for name in r.servers)])) for r in found)
        rows = [(r.name, r.state, f"{r.sizes['all'] / 2**20:.0f}", r.changed_at, by) for r, by in zip(found, users, strict=True)]
        show.table(f"runs in {output}", ("run", "state", "MiB", "changed", "in use by"), rows)
    else:
        show.line(f"no runs in {output}")


def prune(
    names: Annotated[list[str] | None, Argument(metavar="[NAME]...", help="Runs to look at; default: all.")] = None,
    output: options.Output = DEFAULT_OUTPUT,
    unfinished: Annotated[bool, Option("--unfinished", help="Also runs that never got all their artefacts.")] = False,
    whole: Annotated[bool, Option("--whole", help="The named runs entirely, finished or not.")] = False,
    yes: Annotated[bool, Option("--yes", help="Remove without asking.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Show what can be removed, and remove it after a yes.

    By default that is only what no run needs: scratch of killed processes, damaged checkpoints, checkpoints of finished
    trainings. Runs in use are left alone, and so are runs with a damaged manifest unless --whole names them. Without a
    terminal and without --yes nothing is removed.

    Examples:
      granite-pipeline prune
      granite-pipeline prune --unfinished --yes
      granite-pipeline prune old-run --whole
    """
    found = removals(output, names or (), unfinished=unfinished, whole=whole)
    rows = [{"run": r.run, "path": str(r.path), "bytes": r.bytes, "reason": r.reason} for r in found]
    if found and not as_json:
        cells = [(r.run, r.path.relative_to(output), f"{r.bytes / 2**20:.1f}", r.reason) for r in found]
        show.table("would be removed", ("run", "what", "MiB", "why"), cells, err=True)
    elif not as_json:
        show.line("nothing to remove", err=True)
    agreed = bool(found) and (yes or _asked(sum(item.bytes for item in found)))
    freed = 0
    for name in dict.fromkeys(item.run for item in found if agreed):
        of_run = [item for item in found if item.run == name]
        freed += remove_listed(RunFolder(name, output), of_run, unfinished=unfinished, whole=whole)
    if as_json:
        show.as_json({"removed": agreed, "bytes": freed, "items": rows})
    elif agreed:
        show.line(f"{freed / 2**20:.1f} MiB freed", err=True)


def _asked(size: int) -> bool:
    if not sys.stdout.isatty():
        raise InputError("nothing was removed: there is no terminal to ask in", remedy="add --yes")
    return typer.confirm(f"remove these {size / 2**20:.1f} MiB?", err=True)
