"""``verify``: prompts to every backend, judged, with a report; ``report`` draws it again."""

from __future__ import annotations

import json
import webbrowser
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pipeline import config
from pipeline.errors import InputError
from pipeline.report.write import paths_in, render_again, summary_table
from pipeline.runs.files import read_json
from pipeline.runs.folder import DEFAULT_NAME, DEFAULT_OUTPUT, RunFolder
from pipeline.verify.assemble import titled
from pipeline.verify.verify import BACKENDS, require_passed
from pipeline.verify.verify import verify as verify_run


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command("verify")(verify)
    app.command("report")(report)


def verify(
    run: Annotated[str, typer.Option("--run", "--name", help="Name of the run.")] = DEFAULT_NAME,
    output: Annotated[Path, typer.Option("--output", help="Folder that holds the runs.")] = DEFAULT_OUTPUT,
    backends: Annotated[str, typer.Option("--backends", help="Comma-separated: vllm,llamacpp,ollama,openai.")] = ",".join(
        BACKENDS
    ),
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first N held-out prompts.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Put the held-out prompts to every backend and write report.html, report.json and junit.xml.

    A server of this run that is up is used and left running; a backend that is not is started and stopped again. A backend that
    is not installed is skipped, with the command that installs it. Each is also tried with control tokens in a user's text, a JSON
    schema and a demanded tool call. Exit code 1 when any check fails.

    Example: granite-pipeline verify --backends llamacpp --limit 50
    """
    folder = RunFolder(run, output)
    # who asks for it wants it asked
    report = verify_run(folder, backends.split(","), config.load(), keep=True, limit=limit, force=True)
    paths = paths_in(folder.report)
    if as_json:
        typer.echo(paths.json.read_text(encoding="utf-8"))
    console = Console(stderr=True)
    console.print(summary_table(report))
    console.print(f"report: {paths.html}", soft_wrap=True)
    require_passed(report)


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
    folder = RunFolder(run, output)
    source = paths_in(folder.report).json
    if not source.is_file():
        raise InputError(f"run {run!r} has no report yet: {source} does not exist", remedy=f"granite-pipeline verify --run {run}")
    result = read_json(source)
    if not isinstance(result, dict):
        raise InputError(f"{source}: not a JSON object", remedy=f"granite-pipeline verify --run {run}")
    result = titled(result)
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
