"""``granite-pipeline``: the verbs, and how errors end them (exit codes: 0 ok, 1 verification failed, 2 bad input, 3 environment)."""

import ast
import importlib
import io
import logging
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from pipeline import __version__, commands
from pipeline.commands import show
from pipeline.errors import EnvironmentFailure, InputError, PipelineError
from pipeline.runs.files import disk_errors_named, path_refused
from pipeline.runs.folder import writable_home
from pipeline.runs.text import mask

_HELP = {"help_option_names": ["-h", "--help"]}


class _Verbs(Mapping[str, Any]):
    """The verbs by name; the file of one is imported when it is asked for."""

    def __getitem__(self, verb: str) -> Any:
        module = importlib.import_module(f"pipeline.commands.{commands.FILES[verb]}")
        alone = typer.Typer(add_completion=False, context_settings=_HELP)
        alone.command(verb)(getattr(module, verb.replace("-", "_")))
        return typer.main.get_command(alone)

    def __iter__(self) -> Iterator[str]:
        return iter(commands.FILES)

    def __len__(self) -> int:
        return len(commands.FILES)


class _Group(TyperGroup):
    """``granite-pipeline`` itself: the overview of the verbs reads their files and imports none."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = _Verbs()  # type: ignore[assignment]

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        placed = [(verb, panel) for panel, verbs in commands.PANELS.items() for verb in verbs]
        told = [TyperCommand(name=verb, help=first_words(verb), rich_help_panel=panel) for verb, panel in placed]
        overview = TyperGroup(name=self.name, commands=told, params=self.params, help=self.help)
        overview.rich_markup_mode = self.rich_markup_mode
        overview.format_help(ctx, formatter)


def first_words(verb: str) -> str:
    """The first paragraph of a verb's docstring, read from its file."""
    tree = ast.parse(Path(commands.__path__[0], f"{commands.FILES[verb]}.py").read_text(encoding="utf-8"))
    wanted = verb.replace("-", "_")
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == wanted)
    return (ast.get_docstring(function) or "").partition("\n\n")[0]


app = typer.Typer(
    name="granite-pipeline",
    cls=_Group,
    help="Fine-tune IBM Granite models, export them, serve them, and prove that what is served is what was trained.\n\n"
    "Start with: granite-pipeline run",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=_HELP,
)


@app.callback()
def _main(
    quiet: bool = typer.Option(False, "--quiet", "-q", help="Only warnings and errors."),
    version: bool = typer.Option(False, "--version", help="Print the version and leave."),
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
    show.log_to_stderr(logging.WARNING if quiet else logging.INFO)


def main() -> None:
    """Entry point of the console script: errors become their message and exit code, a defect its masked traceback and 3."""
    # a terminated run must stop what it started, as an interrupted one does
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal or pipe of another alphabet shows a replacement, and stops nothing
            stream.reconfigure(errors="replace")
    sys.argv[1:] = _bare_force(sys.argv[1:])
    try:
        if sys.argv[1:] not in ([], ["-h"], ["--help"], ["--version"]):
            _environment()
        with disk_errors_named(Path.cwd()):
            app()
    except PipelineError as error:
        _leave(error)
    except OSError as error:
        _leave(path_refused(error) or EnvironmentFailure(f"{error.filename or 'the system'}: {error.strerror or error}"))
    except Exception:  # a defect of ours: shown whole, but never with a secret in it, nor as a failed verification
        import traceback

        sys.stderr.write(mask(traceback.format_exc()))
        sys.exit(EnvironmentFailure.exit_code)
    except KeyboardInterrupt:
        said = "stopped; finished stages and sealed checkpoints are kept, the same command goes on from there"
        show.line(said, err=True, style="yellow")
        sys.exit(130)


def _environment() -> None:
    """Put ``.env`` into the environment: HF_TOKEN, VLLM_PYTHON and the servers' own variables are read from there."""
    if sys.platform == "win32":  # pragma: no cover - process groups and signals differ
        raise InputError("servers are supervised through POSIX process groups; use WSL on Windows")
    from dotenv import load_dotenv

    from pipeline.config import ENV_FILE, check_env_file
    from pipeline.net.loopback import spare_loopback

    check_env_file()
    load_dotenv(ENV_FILE, encoding="utf-8-sig")
    spare_loopback()
    writable_home()


def _leave(error: PipelineError) -> NoReturn:
    show.line(f"error: {mask(str(error))}", err=True, style="red")
    sys.exit(error.exit_code)


def _bare_force(words: list[str]) -> list[str]:
    """``--force`` without a stage means all of them; click has no options with an optional value."""
    following = [*words[1:], "-"]
    return ["--force=all" if w == "--force" and n.startswith("-") else w for w, n in zip(words, following, strict=False)]
