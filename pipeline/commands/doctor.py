"""``doctor``: what is wrong here, and how to mend it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.runs.folder import DEFAULT_NAME, DEFAULT_OUTPUT, RunFolder

_STYLE = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("doctor")(doctor)


def doctor(
    run: Annotated[str, typer.Option("--run", "--name", help="Also check this run's files against its manifest.")] = DEFAULT_NAME,
    output: Annotated[Path, typer.Option("--output", help="Folder that holds the runs.")] = DEFAULT_OUTPUT,
    base: Annotated[str | None, typer.Option("--base", help="Also ask the hub whether this model may be read.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check torch, engines, driver, disk, RAM, ports, hub access, a run's files and what applications meet; say how to mend it.

    The last part: contradicting settings, the selected backend refusing connections or lacking the model, a status API that
    still uses an old LLM_BACKEND, known causes in the last server log, containers that failed.

    Nothing is changed. Exit code: 0 when nothing failed (warnings allowed), 1 when something did.

    Examples:
      granite-pipeline doctor
      granite-pipeline doctor --run mine --base ibm-granite/granite-4.0-350m --json
    """
    from pipeline.doctor.findings import Facts, examine, worst_first
    from pipeline.doctor.machine import MACHINE
    from pipeline.doctor.serving import APPLICATIONS

    facts = Facts.gather(RunFolder(run, output), base)
    found = examine(facts, MACHINE) + worst_first(examine(facts, APPLICATIONS))
    healthy = all(finding.status != "fail" for finding in found)
    if as_json:
        typer.echo(json.dumps({"healthy": healthy, "findings": [finding.to_json() for finding in found]}, indent=2))
    else:
        table = Table("", "check", "what was seen, what to do", show_lines=False)
        for finding in found:
            words = escape(finding.evidence) + (f"\n→ {escape(finding.remedy)}" if finding.remedy else "")
            table.add_row(f"[{_STYLE[finding.status]}]{finding.status}[/]", finding.check, words)
        Console().print(table)
    if not healthy:
        raise typer.Exit(1)
