"""``granite-pipeline run``: the whole line through its notebooks."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pipeline import batch
from pipeline.batch import STAGES, Executed, run_notebooks
from pipeline.errors import InputError, RunLocked, VerificationFailed
from pipeline.notebook import OWNER_VARIABLE
from pipeline.report.write import paths_in, summary_table
from pipeline.runs.files import absolute, read_json
from pipeline.runs.folder import DEFAULT_NAME, DEFAULT_OUTPUT, RunFolder
from pipeline.runs.manifest import Manifest
from pipeline.runs.stages import run_stage
from pipeline.serve import server, start
from pipeline.verify.verify import require_passed

log = logging.getLogger(__name__)


def register(app: typer.Typer) -> None:
    """Add the ``run`` verb."""
    app.command("run")(run)


def run(
    name: Annotated[str, typer.Option("--name", "--run", help="Name of the run, one folder below --output.")] = DEFAULT_NAME,
    base: Annotated[str | None, typer.Option("--base", help="embedded (default), a hub id, or a model folder.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="soc (default), a file, or hub:owner/name.")] = None,
    eval_data: Annotated[
        str | None, typer.Option("--eval-data", help="Held-out rows; else a share of --data is held out.")
    ] = None,
    backends: Annotated[str | None, typer.Option("--backends", help="Comma-separated: vllm,llamacpp,ollama,openai.")] = None,
    output: Annotated[Path, typer.Option("--output", help="Folder that holds the runs.")] = DEFAULT_OUTPUT,
    stages: Annotated[str, typer.Option("--stages", help="Comma-separated notebooks to run.")] = ",".join(STAGES),
    parameter: Annotated[
        list[str] | None,
        typer.Option(
            "--parameter", "-p", metavar="NAME=VALUE", help="Any other notebook parameter, e.g. -p EPOCHS=2. Repeatable."
        ),
    ] = None,
    force: Annotated[
        str,
        typer.Option(
            "--force",
            metavar="[STAGE]",
            help="Do it again even when nothing changed: all, or finetune, merge, gguf, modelfile, evaluate, verify.",
        ),
    ] = "",
) -> None:
    """Fine-tune, export, serve and verify, by executing the notebooks in order with papermill.

    Executed copies are kept in the run folder, the report in its report/. A stage whose inputs have not changed is skipped,
    and a whole run that was verified with the same inputs does nothing. Ctrl-C once finishes the step and saves; twice leaves.
    Exit code: 0 verified, 1 a check failed, 2 bad input, 3 the machine or an engine failed, 130 stopped.

    Examples:
      granite-pipeline run
      granite-pipeline run --name mine --base ibm-granite/granite-4.0-350m --data alerts.jsonl -p EPOCHS=2
      granite-pipeline run --stages 04_verify --backends llamacpp
      granite-pipeline run --force gguf
    """
    folder = RunFolder(name, output.resolve())
    given: dict[str, Any] = {"NAME": name, "OUTPUT": str(folder.output)}
    given |= {key: value for key, value in (("BASE", base), ("DATA", data), ("EVAL_DATA", eval_data)) if value}
    given |= {"BACKENDS": backends.split(",")} if backends else {}
    given |= {"FORCE": True if force == "all" else force} if force else {}
    given |= dict(_assignment(text) for text in parameter or [])
    # notebooks run in their own folder
    given |= {key: absolute(given[key]) for key in ("BASE", "DATA", "EVAL_DATA") if isinstance(given.get(key), str)}
    chosen = _stages(stages)
    inputs = batch.inputs(folder, chosen, given) if "04_verify" in chosen else None
    if inputs is None:  # nothing that is verified, or a hub id that may have moved on
        _work(folder, chosen, given)
        return
    again = bool(given.get("FORCE")) or bool(Manifest(folder.manifest).changed())
    if run_stage(folder, "run", inputs, [folder.evidence], lambda: _work(folder, chosen, given), force=again).skipped:
        log.info("run %s: nothing changed since it was verified; --force does it again", name)
        _conclude(folder)


def _work(folder: RunFolder, chosen: list[str], given: dict[str, Any]) -> dict[str, Any]:
    """Execute the notebooks and say what they did; VerificationFailed when the last one did not pass."""
    begun, console = time.monotonic(), Console(stderr=True)
    executed, stopped = _execute(folder, chosen, given)
    table = Table("notebook", "seconds", "executed copy", title=f"run {folder.name}: {time.monotonic() - begun:.0f} s")
    for entry in executed:
        table.add_row(entry.name, f"{entry.seconds:.0f}", str(entry.copy))
    console.print(table)
    if stopped:
        console.print(f"servers stopped: {', '.join(stopped)}")
    if "04_verify" in chosen:
        _conclude(folder)
    return {"passed": True}


def _execute(folder: RunFolder, chosen: list[str], given: dict[str, Any]) -> tuple[list[Executed], list[str]]:
    """Run the notebooks and stop what they started, whatever happens; a failed verification is left to the report.

    Servers that ran before are somebody else's and stay; a run that is refused has started none.
    """
    # servers started by a notebook end with this process, however it ends
    os.environ[OWNER_VARIABLE] = str(os.getpid())
    records, executed, refused = folder.servers, list[Executed](), False
    before = {(process.engine, process.pid) for process in server.running(records)}
    if before and "04_verify" in chosen:  # it stops what it used, unless told not to
        given = {"KEEP_SERVERS": True, **given}
    try:
        executed = run_notebooks(folder, chosen, given)
    except VerificationFailed:
        log.warning("verification failed")  # the report tells all of it, below
    except RunLocked:
        refused = True
        raise
    finally:
        ours = [p for p in server.running(records) if (p.engine, p.pid) not in before and not refused]
        stopped = [process.engine for process in ours if start.stop(folder.path, process.engine)]
    return executed, stopped


def _conclude(folder: RunFolder) -> None:
    console = Console(stderr=True)
    report = read_json(paths_in(folder.report).json)
    console.print(summary_table(report))
    console.print(f"report: {paths_in(folder.report).html}", soft_wrap=True)
    require_passed(report)


def _stages(text: str) -> list[str]:
    wanted = [word.strip() for word in text.split(",") if word.strip()]
    for word in wanted:
        if word not in STAGES:
            raise InputError(f"no notebook {word!r}", remedy=f"known: {', '.join(STAGES)}")
    return [stage for stage in STAGES if stage in wanted]


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InputError(f"parameter {text!r} is not NAME=VALUE")
    if name in ("NAME", "OUTPUT"):  # the report that is printed is that of --name, below --output
        raise InputError(f"-p {name}=... would train one run and report another", remedy=f"use --{name.lower()} {value}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, {"True": True, "False": False, "None": None}.get(value, value)


if sys.platform == "win32":  # pragma: no cover - process groups and signals differ
    raise InputError("servers are supervised through POSIX process groups; use WSL on Windows")
