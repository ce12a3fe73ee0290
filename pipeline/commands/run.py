"""``granite-pipeline run``: the whole line through its notebooks."""

import json
import logging
import os
import time
from typing import Annotated, Any

from typer import Option

from pipeline import batch
from pipeline.batch import STAGES, Executed, run_notebooks
from pipeline.commands import options, show
from pipeline.errors import InputError, RunLocked, VerificationFailed
from pipeline.notebook import OWNER_VARIABLE
from pipeline.report.write import paths_in, summary_table
from pipeline.runs import lock
from pipeline.runs import log as runlog
from pipeline.runs.files import absolute, read_json
from pipeline.runs.folder import DEFAULT_NAME, DEFAULT_OUTPUT, RunFolder
from pipeline.runs.manifest import Manifest
from pipeline.runs.stages import run_stage
from pipeline.serve import records as recorded
from pipeline.serve import start
from pipeline.verify.verify import require_passed

log = logging.getLogger(__name__)


def run(
    name: options.Run = DEFAULT_NAME,
    base: Annotated[str | None, Option(help="embedded (default), a hub id, or a model folder.")] = None,
    data: Annotated[
        str | None, Option(help="soc (default), a file, a folder or glob of files, or hub:owner/name[:config][:split].")
    ] = None,
    eval_data: options.EvalData = None,
    backends: options.Backends = "",
    output: options.Output = DEFAULT_OUTPUT,
    columns: options.Columns = "",
    ignore: options.Ignore = None,
    greeting: options.Greeting = "",
    repeated: options.Repeated = "",
    skip_bad: options.SkipBad = False,
    stages: Annotated[str, Option(help="Comma-separated notebooks to run.")] = ",".join(STAGES),
    parameter: Annotated[
        list[str] | None,
        Option("--parameter", "-p", metavar="NAME=VALUE", help="Any other notebook parameter, e.g. -p EPOCHS=2. Repeatable."),
    ] = None,
    force: options.Force = "",
    remote_ok: options.RemoteOk = False,
    agent: options.Agent = None,
) -> None:
    """Fine-tune, export, serve and verify, by executing the notebooks in order with papermill.

    Executed copies are kept in the run folder, the report in its report/. A stage whose inputs have not changed is skipped,
    and a whole run that was verified with the same inputs does nothing. One that another machine works on is waited for. Ctrl-C once finishes the step and saves; twice leaves.
    Exit code: 0 verified, 1 a check failed, 2 bad input, 3 the machine or an engine failed, 130 stopped.

    Examples:
      granite-pipeline run
      granite-pipeline run --name mine --base ibm-granite/granite-4.0-350m --data alerts.jsonl -p EPOCHS=2
      granite-pipeline run --stages 04_verify --backends llamacpp
      granite-pipeline run --force gguf
    """
    name = options.chosen(agent, name).run
    options.allow_remote(remote_ok)
    folder = RunFolder(name, output.resolve())
    given: dict[str, Any] = {"NAME": name, "OUTPUT": str(folder.output)}
    chosen_data: dict[str, Any] = {"BASE": base, "DATA": data, "EVAL_DATA": eval_data, "COLUMNS": columns, "IGNORE": ignore}
    chosen_data |= {"GREETING": greeting, "REPEATED": repeated, "SKIP_BAD": skip_bad}
    given |= {key: value for key, value in chosen_data.items() if value}
    given |= {"BACKENDS": options.listed(backends)} if backends else {}
    given |= {"FORCE": True if force == "all" else force} if force else {}
    given |= dict(_assignment(text) for text in parameter or [])
    # notebooks run in their own folder
    given |= {key: absolute(given[key]) for key in ("BASE", "DATA", "EVAL_DATA") if isinstance(given.get(key), str)}
    chosen = _stages(stages)
    batch.declared_by(chosen, given)  # refused before a folder is made
    inputs = batch.inputs(folder, chosen, given) if "04_verify" in chosen else None
    if inputs is None:  # nothing that is verified, or a hub id that may have moved on
        with runlog.written(folder, "run"):
            _work(folder, chosen, given)
        return
    if given.get("FORCE") or not _done(folder, inputs):
        with lock.held(folder, "run", wait=True):
            # another machine may have done it, while it was waited for
            if given.get("FORCE") or not _done(folder, inputs):
                run_stage(folder, "run", inputs, [folder.evidence], lambda: _work(folder, chosen, given), force=True)
                return
    _conclude(folder)


def _done(folder: RunFolder, inputs: dict[str, Any]) -> bool:
    """Whether the whole run was verified with these inputs, and everything is as it was then."""
    manifest = Manifest(folder.manifest)
    before = manifest.stage("run")
    if before is None or manifest.changed() or not manifest.holds(before, inputs):
        return False
    log.info("run %s: nothing changed since it was verified at %s; --force does it again", folder.name, before.finished_at)
    return True


def _work(folder: RunFolder, chosen: list[str], given: dict[str, Any]) -> dict[str, Any]:
    """Execute the notebooks and say what they did; VerificationFailed when the last one did not pass."""
    if {"01_finetune", "02_export"} <= set(chosen) and not folder.gguf.exists():
        # what export needs is missed before hours of training, not after them
        from training.export.gguf import require_packages

        require_packages()
    begun = time.monotonic()
    executed, stopped = _execute(folder, chosen, given)
    rows = [(entry.name, f"{entry.seconds:.0f}", entry.copy) for entry in executed]
    title = f"run {folder.name}: {time.monotonic() - begun:.0f} s"
    show.table(title, ("notebook", "seconds", "executed copy"), rows, err=True)
    if stopped:
        show.line(f"servers stopped: {', '.join(stopped)}", err=True)
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
    before = {(process.engine, process.pid) for process in recorded.running(records)}
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
        ours = [p for p in recorded.running(records) if (p.engine, p.pid) not in before and not refused]
        ended = dict.fromkeys([*(process.engine for process in ours), *start.private_models(folder.path)])
        stopped = [name for name in ended if not refused and start.stop(folder.path, name)]
    return executed, stopped


def _conclude(folder: RunFolder) -> None:
    report = read_json(paths_in(folder.report).json)
    show.draw(summary_table(report), err=True)
    show.line(f"report: {paths_in(folder.report).html}", err=True)
    require_passed(report)


def _stages(text: str) -> list[str]:
    wanted = options.listed(text)
    if unknown := [word for word in wanted if word not in STAGES]:
        raise InputError(f"no notebook {unknown[0]!r}", remedy=f"known: {', '.join(STAGES)}")
    return [stage for stage in STAGES if stage in wanted]


def _assignment(text: str) -> tuple[str, Any]:
    name, value = options.pair("parameter", text)
    if name in ("NAME", "OUTPUT"):  # the report that is printed is that of --name, below --output
        raise InputError(f"-p {name}=... would train one run and report another", remedy=f"use --{name.lower()} {value}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, {"True": True, "False": False, "None": None}.get(value, value)
