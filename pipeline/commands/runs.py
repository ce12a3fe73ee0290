"""``runs`` and ``prune``: what there is below the output folder, and removing what is not needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from pipeline.doctor.runs import list_runs, removals, remove_listed
from pipeline.errors import InputError
from pipeline.runs.folder import DEFAULT_OUTPUT, RunFolder

Output = Annotated[Path, typer.Option("--output", help="Folder that holds the runs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command("runs")(runs)
    app.command("prune")(prune)


def runs(output: Output = DEFAULT_OUTPUT, as_json: AsJson = False) -> None:
    """List the runs: how far each got, how big it is, who works on it.

    States: training, trained, merged, converted, exported, verified, failed verification, damaged, empty.

    Example: granite-pipeline runs --json
    """
    found = list_runs(output)
    if as_json:
        typer.echo(json.dumps({"output": str(output), "runs": [info.to_json() for info in found]}, indent=2))
        return
    table = Table("run", "state", "MiB", "changed", "in use by", title=f"runs in {output}")
    for info in found:
        used = "; ".join(filter(None, [info.holder, *(f"server {name}" for name in info.servers)]))
        table.add_row(info.name, info.state, f"{info.sizes['all'] / 2**20:.0f}", info.changed_at, used)
    Console().print(table if found else f"no runs in {output}")


def prune(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Runs to look at; default: all.")] = None,
    output: Output = DEFAULT_OUTPUT,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="Also runs that never got all their artefacts.")] = False,
    whole: Annotated[bool, typer.Option("--whole", help="The named runs entirely, finished or not.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what can be removed, and remove it after a yes.

    By default that is only what no run needs: scratch of killed processes, damaged checkpoints, checkpoints of finished
    trainings. Runs in use are left alone, and so are runs with a damaged manifest unless --whole names them. Without a terminal and without --yes nothing is removed.

    Examples:
      granite-pipeline prune
      granite-pipeline prune --unfinished --yes
      granite-pipeline prune old-run --whole
    """
    found = removals(output, names or (), unfinished=unfinished, whole=whole)
    rows = [{"run": r.run, "path": str(r.path), "bytes": r.bytes, "reason": r.reason} for r in found]
    if not as_json:
        table = Table("run", "what", "MiB", "why", title="would be removed")
        for item in found:
            table.add_row(item.run, str(item.path.relative_to(output)), f"{item.bytes / 2**20:.1f}", item.reason)
        Console(stderr=True).print(table if found else "nothing to remove")
    agreed = bool(found) and (yes or _asked(sum(item.bytes for item in found)))
    freed = 0
    if agreed:
        for name in dict.fromkeys(item.run for item in found):
            of_run = [item for item in found if item.run == name]
            freed += remove_listed(RunFolder(name, output), of_run, unfinished=unfinished, whole=whole)
    if as_json:
        typer.echo(json.dumps({"removed": agreed, "bytes": freed, "items": rows}, indent=2))
    elif agreed:
        Console(stderr=True).print(f"{freed / 2**20:.1f} MiB freed")


def _asked(size: int) -> bool:
    if not Console().is_terminal:
        raise InputError("nothing was removed: there is no terminal to ask in", remedy="add --yes")
    return typer.confirm(f"remove these {size / 2**20:.1f} MiB?", err=True)
