"""What is known of a run while it works, read from its folder: any machine that shares the folder sees the same."""

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.runs import lock
from pipeline.runs.files import read_json
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest, StageRecord, TrainingRecord

_READ_BYTES = 1 << 12
_CLOCKS = 2.0  # seconds that the clocks of two machines, or of one and its file server, may be apart
_STARTED = re.compile(r"(\w+)-\d{8}-\d{6}\.log")
_STEP = re.compile(r"finetune: step (\d+) of (\d+)(?:, loss (\S+?))?, ")
_ANSWERS = re.compile(r": (\d+) of (\d+) prompts answered")


@dataclass(frozen=True)
class Seen:
    """A look at a run: ``stage`` is the one at work ("" when nobody holds the run), ``step`` how far it is, ``where`` on which machine."""

    stage: str = ""
    step: str = ""
    loss: float | None = None
    where: str = ""
    result: "Result | None" = None


@dataclass(frozen=True)
class Result:
    """What a run has come to, out of its manifest: scores are shares of held-out rows, ``interval`` is that of ``exact``.

    ``trained_tokens`` are those that went through the model in training, ``seconds`` those of all finished ``stages``,
    ``adapter`` and ``held_out`` hashes of what was trained and of the rows it is scored on, ``parameters`` what was trained with.
    """

    scores: Mapping[str, float] = field(default_factory=dict)
    rows: int = 0
    interval: tuple[float, float] | None = None
    eval_loss: float | None = None
    steps: int = 0
    seconds: float = 0.0
    trained_tokens: int = 0
    passed: bool | None = None
    adapter: str = ""
    held_out: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[str, ...] = ()

    def score(self, metric: str) -> float | None:
        """The score of that name; None when the run has none."""
        return self.eval_loss if metric == "eval_loss" else self.scores.get(metric)


def look(run: RunFolder) -> Seen:
    """How far a run is now; as if nothing were known when the share does not answer."""
    try:
        return _look(run)
    except OSError:
        return Seen()


def _look(run: RunFolder) -> Seen:
    there = lock.holder(run)
    if there is None or not there.alive:
        return Seen(result=read(run))
    stage, step, loss = _at_work(run, datetime.fromisoformat(there.since).timestamp())
    return Seen(stage, step, loss, there.owners[0].host, read(run))


def read(run: RunFolder) -> Result | None:
    """What a run has come to; None when it has finished no stage, or its manifest cannot be read."""
    try:
        stages = Manifest(run.manifest).stages
    except PipelineError:
        return None
    if "finetune" not in stages:
        return None
    return _result(run, stages)


def _result(run: RunFolder, stages: Mapping[str, StageRecord]) -> Result:
    training = TrainingRecord.of(stages["finetune"])
    told = stages["evaluate_tuned"].result if "evaluate_tuned" in stages else {}
    scores = {name: float(value) for name, value in told.items() if isinstance(value, float | int) and name not in ("n", "of")}
    interval = told.get("exact_interval")
    rows, tokens = stages["finetune"].result.get("rows", {}), stages["finetune"].result.get("tokens", {})
    a_step = training.parameters.get("batch_size", 0) * training.parameters.get("gradient_accumulation", 0)
    per_row = tokens.get("all", 0) / max(1, rows.get("train", 0))
    hashes = {name: seal.sha256 for name, seal in stages["finetune"].artefacts.items()}
    passed = None
    if "verify" in stages:
        with contextlib.suppress(PipelineError, KeyError, TypeError):
            passed = bool(read_json(run.report_file)["passed"])
    return Result(
        scores=scores,
        rows=int(told.get("n", 0)),
        interval=(interval[0], interval[1]) if interval else None,
        eval_loss=training.eval_loss.get("after"),
        steps=training.steps,
        # the whole run and the stages in it are not counted twice
        seconds=round(sum(record.seconds for name, record in stages.items() if name != "run"), 1),
        trained_tokens=round(training.steps * a_step * per_row),
        passed=passed,
        adapter=hashes.get("adapter", ""),
        held_out=hashes.get("heldout.jsonl", ""),
        parameters=training.parameters,
        stages=tuple(stages),
    )


def _at_work(run: RunFolder, since: float) -> tuple[str, str, float | None]:
    """Stage, step and loss, by the log that was written last since the run was begun."""
    logs = []
    for path in run.logs.glob("*.log"):
        with contextlib.suppress(OSError):
            if (match := _STARTED.fullmatch(path.name)) and match[1] != "run" and (at := path.stat().st_mtime) > since - _CLOCKS:
                logs.append((at, match[1], path))
    if not logs:
        return "starting", "", None
    _, stage, path = max(logs)
    text = _tail(path)
    if stage == "finetune" and (steps := _STEP.findall(text)):
        step, last, loss = steps[-1]
        return stage, f"{step} of {last}", float(loss) if loss else None
    answers = _ANSWERS.findall(text)
    return stage, " of ".join(answers[-1]) if answers else "", None


def _tail(path: Path) -> str:
    with contextlib.suppress(OSError), path.open("rb") as handle:
        handle.seek(max(0, path.stat().st_size - _READ_BYTES))
        return handle.read().decode("utf-8", errors="replace")
    return ""
