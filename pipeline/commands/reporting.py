"""``granite-pipeline report``: draw a run's report again from its report.json."""

from __future__ import annotations

import json
import webbrowser
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pipeline.errors import InputError
from pipeline.files import read_json
from pipeline.runs import DEFAULT_NAME, DEFAULT_OUTPUT, RunFolder


def register(app: typer.Typer) -> None:
    """Add the ``report`` verb."""
    app.command("report")(report)


def report(
    run: Annotated[str, typer.Option("--run", "--name", help="Name of the run.")] = DEFAULT_NAME,
    output: Annotated[Path, typer.Option("--output", help="Folder that holds the runs.")] = DEFAULT_OUTPUT,
    as_json: Annotated[bool, typer.Option("--json", help="Print paths and result as one JSON object.")] = False,
    open_page: Annotated[bool, typer.Option("--open", help="Open report.html in the browser.")] = False,
) -> None:
    """Draw report.html and junit.xml again from the run's report.json, and print the summary.

    Nothing is measured: `granite-pipeline verify` does that and writes report.json. So the exit code is 0 for
    a failed run too; 2 means that there is no usable report.json.

    Example: granite-pipeline report --run generic --open
    """
    from pipeline.report import paths_in, render_again, summary_table

    folder = RunFolder(run, output)
    source = paths_in(folder.report).json
    if not source.is_file():
        raise InputError(f"run {run!r} has no report yet: {source} does not exist", remedy=f"granite-pipeline verify --run {run}")
    result = read_json(source)
    if not isinstance(result, dict):
        raise InputError(f"{source}: not a JSON object", remedy=f"granite-pipeline verify --run {run}")
    paths = render_again(result, folder.report)
    if as_json:
        found = {
            "run": result["run"],
            "passed": result["passed"],
            "report": str(paths.html),
            "json": str(paths.json),
            "junit": str(paths.junit),
        }
        typer.echo(json.dumps(found))
    else:
        Console().print(summary_table(result))
        typer.echo(f"report  {paths.html}\njunit   {paths.junit}")
    if open_page and not webbrowser.open(paths.html.resolve().as_uri()):
        typer.echo(f"no browser could be started; open {paths.html} yourself", err=True)
