"""``granite-pipeline``: the verbs, and how errors end them (exit codes: 0 ok, 1 verification failed, 2 bad input, 3 environment)."""

from __future__ import annotations

import logging
import signal
import sys
from importlib.metadata import entry_points

import typer
from dotenv import load_dotenv
from rich.console import Console
from rich.logging import RichHandler

from pipeline import __version__
from pipeline.commands import (
    deploying,
    doctor,
    line,
    operating,
    planning,
    processes,
    prompts,
    publishing,
    reporting,
    serving,
    verifying,
)
from pipeline.commands.agent_option import add_agent_option
from pipeline.config import ENV_FILE
from pipeline.errors import PipelineError

_PLUGINS = "granite_pipeline.commands"

app = typer.Typer(
    name="granite-pipeline",
    help="Fine-tune IBM Granite models, export them, serve them, and prove that what is served is what was trained.\n\n"
    "Start with: granite-pipeline run",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _main(
    quiet: bool = typer.Option(False, "--quiet", "-q", help="Only warnings and errors."),
    version: bool = typer.Option(False, "--version", help="Print the version and leave."),
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
    logging.basicConfig(
        level=logging.WARNING if quiet else logging.INFO,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False, show_level=False, log_time_format="%H:%M:%S")],
    )
    for noisy in ("httpx", "papermill", "torchao", "transformers", "asyncio", "torch.utils._pytree"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


for _group in (line, planning, doctor, prompts, serving, processes, operating, deploying, verifying, reporting, publishing):
    _group.register(app)
for _entry in entry_points(group=_PLUGINS):
    _entry.load()(app)
add_agent_option(app)


def main() -> None:
    """Entry point of the console script: errors of ours become their message and exit code, nothing else is hidden."""
    # for what is read from the environment itself: HF_TOKEN, VLLM_PYTHON and the servers' own variables
    load_dotenv(ENV_FILE)
    # a terminated run must stop what it started, as an interrupted one does
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except PipelineError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped", style="yellow")
        sys.exit(130)
