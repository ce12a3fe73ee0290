"""``sweep.json`` and ``sweep.html``: what came of every run, what each parameter did to the score, the best run and why it is that."""

import base64
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pipeline import __version__
from pipeline.report import charts
from pipeline.report.phrases import NONE, TEMPLATES, duration, environment, percent
from pipeline.runs.files import disk_errors_named, write_atomic, write_json
from pipeline.runs.folder import RunFolder
from pipeline.runs.hashes import sha256_file
from pipeline.runs.text import clean
from pipeline.sweep.guarded import DONE, MACHINE, STOPPED, UNVERIFIED, WRONG, Outcome
from pipeline.sweep.spec import PAGE, RECORD, Run, Sweep
from pipeline.sweep.table import Result, Seen, look

SCHEMA = 1
STATES = {DONE: "done", UNVERIFIED: "not verified", WRONG: "wrong input", MACHINE: "failed", STOPPED: "stopped"}
# the record that a run has when a stage of the line is finished
_LAST = {"01_finetune": "finetune", "02_export": "evaluate_tuned", "04_verify": "verify"}
_MARKS = {"done": "passed", "waiting": "skipped", "stopped": "skipped", "working": "skipped"}
_CHARTED = 24  # values of a parameter that one chart shows
# worst last: what may be better the next time, then what will not
_ORDER = (DONE, UNVERIFIED, WRONG, MACHINE, STOPPED)


@dataclass(frozen=True)
class Entry:
    """One run of the sweep as the page has it; ``result`` is None unless it was made with the spec's parameters."""

    run: Run
    state: str
    outcome: Outcome | None = None
    result: Result | None = None
    where: str = ""
    page: str = ""  # its report, as it is seen from the output folder

    def score(self, metric: str) -> float | None:
        """The score of that name, of a run that is done."""
        return self.result.score(metric) if self.result and self.state == "done" else None


@dataclass(frozen=True)
class Best:
    """The best run (None: there is none), and why."""

    name: str | None
    why: str
    doubts: tuple[str, ...] = field(default=())


def entries(sweep: Sweep, output: Path, outcomes: Mapping[str, Outcome]) -> list[Entry]:
    """Every run of the sweep, by how it ended or, where that is not known, by what is in its folder."""
    return [_entry(sweep, RunFolder(run.name, output), run, outcomes.get(run.name)) for run in sweep.runs]


def _entry(sweep: Sweep, folder: RunFolder, run: Run, outcome: Outcome | None) -> Entry:
    seen: Seen = look(folder)
    result = seen.result if seen.result and _made_so(run, seen.result) else None
    page = next((path for path in (folder.report / "report.html", folder.manifest) if path.is_file()), None)
    shown = page.relative_to(folder.output).as_posix() if page else ""
    state = STATES[outcome.code] if outcome else "working" if seen.stage else _finished(sweep, result)
    return Entry(run, state, outcome, result, outcome.where if outcome else seen.where, shown)


def _finished(sweep: Sweep, result: Result | None) -> str:
    wanted = {_LAST[stage] for stage in sweep.stages if stage in _LAST}
    if result is None or not wanted <= set(result.stages):
        return "waiting"
    return "not verified" if "verify" in wanted and not result.passed else "done"


def _made_so(run: Run, result: Result) -> bool:
    """Whether what is in the folder was trained with this spec's parameters, as far as the record tells."""
    for name, value in run.parameters.items():
        recorded = result.parameters.get(name.lower())
        if isinstance(value, str | int | float) and isinstance(recorded, str | int | float) and value != recorded:
            return False
    return True


def best(found: Sequence[Entry], metric: str) -> Best:
    """The run with the best score, by the held-out loss and then by its cost where scores are the same."""
    low = metric == "eval_loss"
    scored = [(entry, score) for entry in found if (score := entry.score(metric)) is not None]
    if not scored:
        known = dict.fromkeys(name for e in found if e.result and e.state == "done" for name in e.result.scores)
        told = f"; measured were {', '.join(known)}" if known else ""
        return Best(None, f"No run that is done has the score {metric}{told}.")

    def rank(pair: tuple[Entry, float]) -> tuple[float, ...]:
        result = pair[0].result or Result()
        loss = math.inf if result.eval_loss is None else result.eval_loss
        return (pair[1] if low else -pair[1], loss, result.seconds)

    (first, score), *others = sorted(scored, key=rank)
    why = f"{metric} {_shown(metric, score)}{_interval(first, metric)}, the {'lowest' if low else 'highest'} of {len(scored)}"
    why += " run." if len(scored) == 1 else " runs."
    if others:
        second, next_score = others[0]
        why += f" The next is {second.run.name} with {_shown(metric, next_score)}{_interval(second, metric)}"
        why += _apart(first, second, metric) if next_score != score else ": the same; the lower held-out loss decided."
    return Best(first.run.name, why, tuple(_doubts([entry for entry, _ in scored])))


def _apart(first: Entry, second: Entry, metric: str) -> str:
    ours, theirs = first.result and first.result.interval, second.result and second.result.interval
    if metric != "exact" or not ours or not theirs:
        return "."
    if theirs[1] < ours[0]:
        return ": the intervals are apart, so that this is no chance."
    return ": the intervals overlap, so that the difference may be chance."


def _doubts(scored: Sequence[Entry]) -> list[str]:
    sets = {entry.result.held_out for entry in scored if entry.result}
    if len(sets) < 2:
        return []
    said = "The runs were scored on different held-out rows, so that their scores do not compare exactly"
    return [f"{said}: a SEED or DATA of its own holds out other rows, unless EVAL_DATA gives all runs the same."]


def _shown(metric: str, score: float) -> str:
    return f"{score:.4f}" if metric == "eval_loss" else percent(score)


def _interval(entry: Entry, metric: str) -> str:
    result = entry.result
    if metric != "exact" or result is None or result.interval is None:
        return ""
    low, high = result.interval
    return f" (95 % interval {percent(low)} to {percent(high)}, {result.rows} rows)"


def by_parameter(sweep: Sweep, found: Sequence[Entry], metric: str) -> dict[str, list[dict[str, Any]]]:
    """For each parameter that runs differ in: its values, each with its runs' scores, their mean and their range."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for name in sweep.varied:
        rows: dict[str, list[Entry]] = {}
        for entry in found:
            if entry.score(metric) is not None:
                rows.setdefault(str(entry.run.parameters.get(name, "(default)")), []).append(entry)
        if rows:
            tables[name] = [_value_row(value, of, metric) for value, of in rows.items()]
    return tables


def _value_row(value: str, of: Sequence[Entry], metric: str) -> dict[str, Any]:
    scores = [score for entry in of if (score := entry.score(metric)) is not None]
    runs = [
        {"run": entry.run.name, "score": entry.score(metric), "interval": entry.result and entry.result.interval} for entry in of
    ]
    return {"value": value, "mean": sum(scores) / len(scores), "lowest": min(scores), "highest": max(scores), "runs": runs}


def record(sweep: Sweep, output: Path, found: Sequence[Entry], metric: str) -> dict[str, Any]:
    """What ``sweep.json`` holds: no secrets, and nothing that JSON cannot carry."""
    chosen, done = best(found, metric), [entry for entry in found if entry.result]
    results = [entry.result or Result() for entry in done]
    told = {
        "schema": SCHEMA,
        "spec": {"file": str(sweep.path.absolute()), "sha256": sha256_file(sweep.path)},
        "output": str(output.absolute()),
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "stages": list(sweep.stages),
        "metric": metric,
        "lower_is_better": metric == "eval_loss",
        "best": chosen.name,
        "why": chosen.why,
        "doubts": list(chosen.doubts),
        "cost": {
            "seconds": round(sum(result.seconds for result in results), 1),
            "trained_tokens": sum(result.trained_tokens for result in results),
        },
        "exit_code": exit_code(found),
        "runs": [_run_record(entry, metric) for entry in found],
        "by_parameter": by_parameter(sweep, found, metric),
    }
    return dict(clean(told))


def _run_record(entry: Entry, metric: str) -> dict[str, Any]:
    result, outcome = entry.result, entry.outcome
    of_result = {
        "scores": dict(result.scores) if result else {},
        "interval": result.interval if result else None,
        "rows": result.rows if result else 0,
        "eval_loss": result.eval_loss if result else None,
        "seconds": result.seconds if result else None,
        "trained_tokens": result.trained_tokens if result else None,
        "adapter_sha256": result.adapter if result else "",
    }
    ended = {"exit_code": outcome.code, "tries": outcome.tries, "said": outcome.said} if outcome else {}
    told = {"name": entry.run.name, "parameters": dict(entry.run.parameters), "state": entry.state, "where": entry.where}
    return {**told, **ended, "score": entry.score(metric), **of_result, "report": entry.page}


def exit_code(found: Sequence[Entry]) -> int:
    """The sweep's exit code: the worst of its runs', where a machine's failure, which may pass, counts more than a wrong input."""
    codes = {entry.outcome.code for entry in found if entry.outcome}
    return next((code for code in reversed(_ORDER) if code in codes), DONE)


def write(told: Mapping[str, Any], output: Path) -> Path:
    """Write ``sweep.json`` and ``sweep.html``; returns the page's path."""
    output.mkdir(parents=True, exist_ok=True)
    html = render(told)
    with disk_errors_named(output):
        write_json(output / RECORD, told)
        write_atomic(output / PAGE, html)
    return output / PAGE


def render(told: Mapping[str, Any]) -> str:
    """The page, from what ``sweep.json`` holds; everything in it is escaped."""
    css = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    runs, metric = told["runs"], told["metric"]
    done = [run for run in runs if run["state"] == "done"]
    ranked = sorted(runs, key=lambda run: _rank(run, told["lower_is_better"]))
    varied = _varied(runs)
    columns = [name for name in dict.fromkeys(name for run in runs for name in run["parameters"]) if name in varied]
    shared = {name: value for name, value in (runs[0]["parameters"] if runs else {}).items() if name not in varied}
    state = "passed" if told["best"] and len(done) == len(runs) else "failed" if told["exit_code"] not in (0, STOPPED) else ""
    return (
        environment()
        .get_template("sweep.html.j2")
        .render(
            told=told,
            version=__version__,
            css=Markup(css),
            css_hash=base64.b64encode(hashlib.sha256(css.encode()).digest()).decode(),
            state=state or "unverified",
            done=len(done),
            figures=_figures(told, done),
            charts=[(name, Markup(svg)) for name, svg in _charts(told).items() if svg],
            columns=columns,
            ranked=ranked,
            marks=_MARKS,
            shared=shared,
            brief=_brief,
            show=lambda score: NONE if score is None else _shown(metric, score),
            interval=lambda run: f"{percent(run['interval'][0])} to {percent(run['interval'][1])}",
        )
    )


def _brief(value: Any) -> Any:
    """A path by its name: where the files lie is the same for all runs, or told by the spec."""
    return charts.short(Path(value).name or value) if isinstance(value, str) else value


def _rank(run: Mapping[str, Any], low: bool) -> tuple[float, float]:
    score = run["score"]
    return (math.inf, 0) if score is None else (score if low else -score, run["eval_loss"] or 0)


def _varied(runs: Sequence[Mapping[str, Any]]) -> set[str]:
    names = {name for run in runs for name in run["parameters"]}
    return {name for name in names if any(run["parameters"].get(name) != runs[0]["parameters"].get(name) for run in runs)}


def _figures(told: Mapping[str, Any], done: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    cost, scores = told["cost"], [run["score"] for run in done if run["score"] is not None]
    found = [("Runs done", f"{len(done)} of {len(told['runs'])}", "finished, and verified where the spec asks for it")]
    if scores:
        ends = sorted(scores, reverse=not told["lower_is_better"])
        spread = f"{_shown(told['metric'], ends[0])} … {_shown(told['metric'], ends[-1])}"
        found.append((f"{told['metric'].replace('_', ' ')}, best … worst", spread, "of held-out rows, in process"))
    found.append(("Work", duration(cost["seconds"]), "of all stages of all runs, one after the other"))
    found.append(("Tokens trained", f"{cost['trained_tokens']:,}", "that went through the models, all epochs"))
    return found


def _charts(told: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: _chart(f"by{number}", name, rows, told["metric"])
        for number, (name, rows) in enumerate(told["by_parameter"].items())
        if len(rows) > 1
    }


def _chart(prefix: str, name: str, rows: Sequence[Mapping[str, Any]], metric: str) -> str:
    """Each run's score with its interval by the values of one parameter, and the mean of each value."""
    share, low = metric != "eval_loss", metric == "eval_loss"
    kept = sorted(rows, key=lambda row: row["mean"] if low else -row["mean"])[:_CHARTED]
    kept = [row for row in rows if row in kept]
    canvas = charts.Canvas(prefix, f"{metric} by {name}", 1.3 + 0.5 * len(kept))
    scale, unit, ink = (100, " %", 1) if share else (1, "", 4)
    first = itertools.count()
    for place, row in enumerate(kept):
        runs = row["runs"]
        for i, run in enumerate(runs):
            at = place + (i - (len(runs) - 1) / 2) * min(0.18, 0.6 / len(runs))
            tip = f"{run['run']}: {run['score'] * scale:.{ink}f}{unit}"
            if metric == "exact" and run["interval"]:
                ends = [end * scale for end in run["interval"]]
                canvas.axes.plot(ends, [at, at], color=charts.PALETTE["before"], linewidth=3, solid_capstyle="butt", alpha=0.6)
                tip += f" ({ends[0]:.1f} to {ends[1]:.1f})"
            canvas.mark(run["score"] * scale, at, charts.PALETTE["after"], tip, None if next(first) else "a run")
        label = "mean" if place == 0 else None
        mean = [row["mean"] * scale] * 2
        canvas.axes.plot(mean, [place - 0.36, place + 0.36], color=charts.PALETTE["second"], linewidth=2, label=label)
    labels = [_brief(row["value"]) for row in kept]
    canvas.axes.set_yticks(range(len(kept)), labels, color=charts.PALETTE["ink"])
    canvas.axes.set_ylim(len(kept) - 0.4, -0.6)
    if share:
        canvas.axes.set_xlim(-3, 103)
    where = (
        "% of held-out rows" + (", band: 95 % interval" if metric == "exact" else "")
        if share
        else "held-out loss, less is better"
    )
    return canvas.svg(where, grid="x")
