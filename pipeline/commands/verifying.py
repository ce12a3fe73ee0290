"""``granite-pipeline verify``: prompts to every backend, judged, with a report."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pipeline import config
from pipeline.report import summary_table
from pipeline.runs import DEFAULT_NAME, DEFAULT_OUTPUT, RunFolder
from pipeline.verify import BACKENDS, publish, require_passed
from pipeline.verify import verify as verify_run

log = logging.getLogger(__name__)


def register(app: typer.Typer) -> None:
    """Add the ``verify`` verb."""
    app.command("verify")(verify)


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
    report = verify_run(folder, backends.split(","), config.load(), log.info, keep=True, limit=limit)
    paths = publish(folder, report)
    if as_json:
        typer.echo(paths.json.read_text(encoding="utf-8"))
    console = Console(stderr=True)
    console.print(summary_table(report))
    console.print(f"report: {paths.html}", soft_wrap=True)
    require_passed(report)
