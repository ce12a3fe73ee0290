"""``granite-pipeline``: the verbs, and how errors end them (exit codes: 0 ok, 1 verification failed, 2 bad input, 3 environment)."""

from __future__ import annotations

import logging
import signal
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import typer
from dotenv import load_dotenv
from rich.console import Console
from rich.logging import RichHandler

from pipeline import __version__
from pipeline.commands import data, deploy, doctor, operate, plan, prompts, publish, run, runs, serve, servers, verify
from pipeline.commands.options import add_agent_option
from pipeline.config import ENV_FILE, check_env_file
from pipeline.errors import EnvironmentFailure, PipelineError
from pipeline.net.loopback import spare_loopback
from pipeline.runs.files import disk_errors_named, path_refused
from pipeline.runs.text import MaskingFilter, mask

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
    logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, format="%(message)s", handlers=[_handler()])
    for noisy in ("httpx", "papermill", "torchao", "transformers", "asyncio", "torch.utils._pytree"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def _handler() -> logging.Handler:
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_level=False, log_time_format="%H:%M:%S")
    handler.addFilter(MaskingFilter())
    return handler


for _group in (run, plan, doctor, prompts, serve, servers, operate, deploy, verify, publish, runs, data):
    _group.register(app)
add_agent_option(app)


def main() -> None:
    """Entry point of the console script: errors become their message and exit code, a defect its masked traceback and 3."""
    # a terminated run must stop what it started, as an interrupted one does
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.argv[1:] = _bare_force(sys.argv[1:])
    try:
        check_env_file()
        # for what is read from the environment itself: HF_TOKEN, VLLM_PYTHON and the servers' own variables
        load_dotenv(ENV_FILE, encoding="utf-8-sig")
        spare_loopback()
        with disk_errors_named(Path.cwd()):
            app()
    except PipelineError as error:
        _leave(error)
    except OSError as error:
        _leave(path_refused(error) or EnvironmentFailure(f"{error.filename or 'the system'}: {error.strerror or error}"))
    except Exception:  # a defect of ours: shown whole, but never with a secret in it, nor as a failed verification
        sys.stderr.write(mask(traceback.format_exc()))
        sys.exit(EnvironmentFailure.exit_code)
    except KeyboardInterrupt:
        said = "stopped; finished stages and sealed checkpoints are kept, the same command goes on from there"
        Console(stderr=True).print(said, style="yellow")
        sys.exit(130)


def _leave(error: PipelineError) -> NoReturn:
    Console(stderr=True).print(f"error: {mask(str(error))}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(error.exit_code)


def _bare_force(words: list[str]) -> list[str]:
    """``--force`` without a stage means all of them; click has no options with an optional value."""
    following = [*words[1:], "-"]
    return ["--force=all" if w == "--force" and n.startswith("-") else w for w, n in zip(words, following, strict=False)]
