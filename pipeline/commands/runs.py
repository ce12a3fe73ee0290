"""``runs`` and ``prune``: what there is below the output folder, and removing what is not needed."""

import sys
from typing import Annotated

import typer

from pipeline.commands import options, show
from pipeline.doctor.runs import RunInfo, list_runs, removals, remove_listed
from pipeline.errors import InputError
from pipeline.runs.folder import DEFAULT_OUTPUT, RunFolder


def runs(output: options.Output = DEFAULT_OUTPUT, as_json: options.AsJson = False) -> None:
    """List the runs: how far each got, how big it is, who works on it.

    States: training, trained, merged, converted, exported, verified, failed verification, damaged, empty.

    Example: granite-pipeline runs --json
    """
    found = list_runs(output)
    if as_json:
        show.as_json({"output": str(output), "runs": [info.to_json() for info in found]})
    elif found:
        rows = [(r.name, r.state, f"{r.sizes['all'] / 2**20:.0f}", r.changed_at, _users(r)) for r in found]
        show.table(f"runs in {output}", ("run", "state", "MiB", "changed", "in use by"), rows)
    else:
        show.line(f"no runs in {output}")


def _users(run: RunInfo) -> str:
    return "; ".join(filter(None, [run.holder, *(f"server {name}" for name in run.servers)]))


def prune(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Runs to look at; default: all.")] = None,
    output: options.Output = DEFAULT_OUTPUT,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="Also runs that never got all their artefacts.")] = False,
    whole: Annotated[bool, typer.Option("--whole", help="The named runs entirely, finished or not.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
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
    if not as_json:
        cells = [(r.run, r.path.relative_to(output), f"{r.bytes / 2**20:.1f}", r.reason) for r in found]
        if found:
            show.table("would be removed", ("run", "what", "MiB", "why"), cells, err=True)
        else:
            show.line("nothing to remove", err=True)
    agreed = bool(found) and (yes or _asked(sum(item.bytes for item in found)))
    freed = 0
    if agreed:
        for name in dict.fromkeys(item.run for item in found):
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
