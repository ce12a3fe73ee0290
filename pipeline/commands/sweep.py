"""``granite-pipeline sweep``: many runs at once, and one page about all of them."""

import logging
import os
import sys
import threading
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from pipeline.commands import options, show
from pipeline.errors import EnvironmentFailure, InputError, Interrupted, VerificationFailed
from pipeline.runs import interrupt
from pipeline.runs.folder import DEFAULT_OUTPUT, RunFolder
from pipeline.sweep import guarded, local, report, spec
from pipeline.sweep.guarded import Job, Outcome
from pipeline.sweep.report import Entry
from pipeline.sweep.spec import Run, Sweep
from pipeline.sweep.table import Seen, look

log = logging.getLogger(__name__)
_LOOK_SECONDS, _A_RUN = 2.0, 0.02
_HEADS = ("run", "state", "step", "loss", "score", "where")
_LOCAL, _RAY = "local", "ray"


def sweep(
    file: Annotated[Path, Argument(metavar="SPEC.yaml", help="The runs: names, a grid over notebook parameters, or both.")],
    on: Annotated[str, Option("--on", help="local: this machine. ray: the Ray cluster that RAY_ADDRESS names.")] = _LOCAL,
    jobs: Annotated[int | None, Option("--jobs", min=1, help="Runs at once; default: what resources and machine allow.")] = None,
    index: Annotated[int | None, Option("--index", help="Do run number N alone, from 0: for arrays of other schedulers.")] = None,
    output: options.Output = DEFAULT_OUTPUT,
    metric: Annotated[str, Option("--metric", help="Score that runs are compared by, instead of the spec's.")] = "",
    export: Annotated[str, Option("--export", metavar="best", help="best: export the best run at the end.")] = "",
    dry_run: Annotated[bool, Option("--dry-run", help="Check the spec, list its runs, start nothing.")] = False,
    only_report: Annotated[bool, Option("--report", help="Start nothing; write the page from what is there.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Do every run of a spec: fine-tunes over data, bases, parameters; then one page says what came of them, and which is best.

    Each run is a granite-pipeline run of its own that goes on where it was, so any of them - or this command, or a machine -
    may be killed: the same command goes on. The page is sweep.html, beside sweep.json, in the output folder. Ctrl-C once lets
    the runs finish their step and save; twice leaves. A run that the machine failed is tried again, three times at most.
    Exit code: 0 all done, 1 a verification failed, 2 the spec or a run's input is wrong, 3 a machine failed, 130 stopped.

    Examples:
      granite-pipeline sweep sweep.yaml --dry-run
      granite-pipeline sweep sweep.yaml --jobs 2
      granite-pipeline sweep sweep.yaml --on ray --output /shared/runs --export best
      granite-pipeline sweep sweep.yaml --index 3
    """
    options.require_known("place to run", on, (_LOCAL, _RAY))
    if export:
        options.require_known("choice of runs to export", export, ("best",))
    found, output = spec.load(file, _check), output.resolve()
    metric = metric or found.metric
    spec.require_metric(metric, found.stages)
    if index is not None:
        _become(found, index, output)
    elif dry_run:
        _list(found, output, as_json)
    else:
        _whole(found, output, metric, export, None if only_report else (on, jobs), as_json)


def _check(parameters: Mapping[str, Any]) -> None:
    """Refuse a value that a fine-tune cannot have."""
    from training.parameters import FinetuneParameters

    FinetuneParameters.from_notebook(parameters)


def _list(found: Sweep, output: Path, as_json: bool) -> None:
    runs = [{"index": i, "name": run.name, "argv": run.argv(found.stages, output)} for i, run in enumerate(found.runs)]
    if as_json:
        show.as_json({"spec": str(found.path), "metric": found.metric, "stages": found.stages, "runs": runs})
        return
    heads = ("index", "run", *found.varied)
    rows = ([i, run.name, *(run.parameters.get(name, "") for name in found.varied)] for i, run in enumerate(found.runs))
    show.table(f"{len(found.runs)} runs of {', '.join(found.stages)} in {output}", heads, rows)


def _become(found: Sweep, index: int, output: Path) -> None:
    """Turn into the run of that number: a scheduler's signals reach it, and its exit code is ours."""
    if not 0 <= index < len(found.runs):
        what = f"--index {index}: {found.path} has {len(found.runs)} runs, 0 to {len(found.runs) - 1}"
        raise InputError(what, remedy="set the array of the scheduler to these numbers")
    argv = found.runs[index].argv(found.stages, output)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    words, environment = guarded.command(argv)
    os.execve(words[0], words, environment)


def _whole(found: Sweep, output: Path, metric: str, export: str, how: tuple[str, int | None] | None, as_json: bool) -> None:
    """Do the runs (unless ``how`` is None), write the page, export the best run when asked; ends with the sweep's exit code."""
    outcomes: dict[str, Outcome] = {}
    with interrupt.graceful(log):
        try:
            if how:
                board = Board(found, output, metric, outcomes)
                jobs = _jobs(found.runs, found.stages, output)
                # closed also when the user leaves at once: no run goes on
                with board.shown(), closing(_map(found, jobs, output, *how)) as done:
                    for outcome in done:
                        board.ended(outcome)
        finally:
            told, entries = _written(found, output, metric, outcomes)
        code, stopped = told["exit_code"], interrupt.asked()
        if export and told["best"] and how and not stopped and code in (guarded.DONE, guarded.UNVERIFIED):
            _export(found, output, told["best"], how)
            told, entries = _written(found, output, metric, outcomes)
    if as_json:
        show.as_json(told)
    else:
        _tell(told)
    show.line(f"sweep: {output / spec.PAGE}", err=True)
    _leave(found, entries, 130 if stopped else code)


def _written(found: Sweep, output: Path, metric: str, outcomes: Mapping[str, Outcome]) -> tuple[dict[str, Any], list[Entry]]:
    """Write the page; what it says, and the runs it says it of."""
    entries = report.entries(found, output, outcomes)
    told = report.record(found, output, entries, metric)
    report.write(told, output)
    return told, entries


def _jobs(runs: tuple[Run, ...], stages: tuple[str, ...], output: Path) -> list[Job]:
    jobs = []
    for run in runs:
        folder = RunFolder(run.name, output)
        folder.require_inside()
        jobs.append(Job(run.name, tuple(run.argv(stages, output)), folder.logs / "sweep.log"))
    return jobs


def _map(found: Sweep, jobs: list[Job], output: Path, on: str, at_once: int | None) -> Generator[Outcome, None, None]:
    output.mkdir(parents=True, exist_ok=True)
    if on == _LOCAL:
        return local.map(jobs, found.resources, at_once)
    from pipeline.sweep import rays

    return rays.map(jobs, found.resources, at_once, aside=output / "sweep-ray.log")


def _export(found: Sweep, output: Path, best: str, how: tuple[str, int | None]) -> None:
    """Export one run, on one of the machines that did the runs."""
    run = next(run for run in found.runs if run.name == best)
    if "02_export" in found.stages:
        log.info("%s is exported, as all runs are", best)
        return
    log.info("%s: exporting the best run", best)
    for outcome in _map(found, _jobs((run,), spec.DEFAULT_STAGES, output), output, *how):
        if outcome.code:
            raise EnvironmentFailure(f"the best run, {best}, could not be exported", evidence=outcome.said)


def _tell(told: Mapping[str, Any]) -> None:
    measured = [run for run in told["runs"] if run["score"] is not None]
    scores = sorted(measured, key=lambda run: run["score"], reverse=not told["lower_is_better"])
    rows = [(run["name"], run["state"], f"{run['score']:.4f}", f"{run['seconds']:.0f}", run["where"]) for run in scores[:20]]
    if rows:
        show.table(f"best of {len(told['runs'])} runs", ("run", "state", told["metric"], "seconds", "where"), rows, err=True)
    show.line(f"{told['best'] or 'no best run'}: {told['why']}", err=True)
    for doubt in told["doubts"]:
        show.line(doubt, err=True, style="yellow")


def _leave(found: Sweep, entries: list[Entry], code: int) -> None:
    """End with the sweep's exit code, naming the runs that caused it."""
    if code == guarded.DONE:
        return
    if code == guarded.STOPPED:
        raise Interrupted("the sweep was stopped; what is done is kept", remedy="run the same command again to go on")
    bad = [entry for entry in entries if entry.outcome and entry.outcome.code == code]
    names = ", ".join(entry.run.name for entry in bad[:5]) + (", ..." if len(bad) > 5 else "")
    said = next((entry.outcome.said for entry in bad if entry.outcome and entry.outcome.said), "")
    first, evidence = f"{len(bad)} of {len(found.runs)} runs", f"the first of them: {said}" if said else ""
    if code == guarded.UNVERIFIED:
        raise VerificationFailed(f"{first} did not pass their verification: {names}", evidence=evidence)
    if code == guarded.WRONG:
        raise InputError(
            f"{first} were given what cannot be: {names}", evidence=evidence, remedy="mend it, then run the sweep again"
        )
    what = f"{first} could not be done here: {names}"
    raise EnvironmentFailure(what, evidence=evidence, remedy="mend it, then run the same command again: it goes on")


class Board:
    """What is shown while the runs work: a table in a terminal, else a line an event; all of it read from the runs' folders."""

    def __init__(self, found: Sweep, output: Path, metric: str, outcomes: dict[str, Outcome]) -> None:
        self.folders = {run.name: RunFolder(run.name, output) for run in found.runs}
        self.metric, self.outcomes = metric, outcomes
        self.seen = {name: Seen() for name in self.folders}
        self.over = threading.Event()
        self.terminal = show.console(err=True).is_terminal

    def ended(self, outcome: Outcome) -> None:
        """A run has ended."""
        self.outcomes[outcome.name] = outcome
        self.seen[outcome.name] = look(self.folders[outcome.name])
        done = f"({len(self.outcomes)} of {len(self.folders)})"
        result = self.seen[outcome.name].result
        score = result.score(self.metric) if result and not outcome.code else None
        self._say(
            f"{outcome.name}: {report.STATES[outcome.code]} on {outcome.where} in {outcome.seconds:.0f} s"
            + (f", {self.metric} {score:.4f}" if score is not None else "")
            + (f": {outcome.said.splitlines()[0]}" if outcome.said else "")
            + f" {done}"
        )

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the table, or the events, while inside."""
        from rich.live import Live

        watcher = threading.Thread(target=self._watch, daemon=True)
        watcher.start()
        try:
            if self.terminal and log.isEnabledFor(logging.INFO):
                with Live(console=show.console(err=True), get_renderable=self.table, refresh_per_second=1):
                    yield
            else:
                yield
        finally:
            self.over.set()
            watcher.join()

    def table(self) -> Any:
        """The runs as they are now, those at work first; as many as fit the terminal."""
        from rich.table import Table
        from rich.text import Text

        made = Table(title_justify="left", caption_justify="left")
        for head in _HEADS:
            made.add_column(head, overflow="fold")
        working = [name for name, seen in self.seen.items() if seen.stage and name not in self.outcomes]
        ended = list(reversed(self.outcomes))
        waiting = [name for name in self.seen if name not in self.outcomes and name not in working]
        room = max(3, show.console(err=True).height - 8)
        for name in [*working, *ended, *waiting][:room]:
            made.add_row(*map(Text, self._row(name)))
        bad = sum(outcome.code != 0 for outcome in self.outcomes.values())
        made.caption = f"{len(working)} at work, {len(waiting)} waiting, {len(ended)} ended" + (
            f", {bad} not well" if bad else ""
        )
        return made

    def _row(self, name: str) -> tuple[str, ...]:
        seen, outcome = self.seen[name], self.outcomes.get(name)
        score = seen.result.score(self.metric) if seen.result else None
        loss = seen.loss if seen.loss is not None else seen.result.eval_loss if seen.result else None
        state = report.STATES[outcome.code] if outcome else seen.stage or "waiting"
        where = outcome.where if outcome else seen.where
        told = ("" if loss is None else f"{loss:.3f}", "" if score is None else f"{score:.4f}")
        return (name, state, "" if outcome else seen.step, *told, where)

    def _watch(self) -> None:
        """Look at every run that has not ended, now and then; a share is not asked more often the more there are."""
        pause = max(_LOOK_SECONDS, _A_RUN * len(self.folders))
        while not self.over.wait(pause):
            for name, folder in self.folders.items():
                if name in self.outcomes or self.over.is_set():
                    continue
                before, now = self.seen[name], look(folder)
                self.seen[name] = now
                if now.stage and (now.stage, now.where) != (before.stage, before.where):
                    self._say(f"{name}: {now.stage} on {now.where}")

    def _say(self, words: str) -> None:
        if not self.terminal:
            log.info("%s", words)
