"""Merge: base + adapter -> ``merged_fp16/``, with every loss of range to float16 reported."""

import shlex
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError, PipelineError
from pipeline.runs.folder import DEFAULT_OUTPUT, RunFolder
from pipeline.runs.manifest import Manifest, TrainingRecord
from pipeline.runs.stages import Force, StageResult, run_stage
from training.base import BaseModel
from training.export.weights import merge_folder
from training.parameters import FinetuneParameters

_RECIPE = 1


def merge(run: RunFolder, *, force: Force = False) -> StageResult:
    """Write ``merged_fp16/`` from the run's base and adapter; skipped when both are unchanged."""
    manifest = Manifest(run.manifest)
    training = require_trained(run)
    method = training.parameters["method"]
    inputs = {"recipe": _RECIPE, "base": training.base.sha256, "adapter": manifest.sha256(run.adapter), "method": method}

    def work() -> dict[str, Any]:
        return merge_folder(trained_base(run), run.adapter, run.merged, full=training.full)

    return run_stage(run, "merge", inputs, [run.merged], work, force=force)


def trained_base(run: RunFolder) -> Path:
    """Folder of the base that the run was trained on; ModelError when it cannot be found or is another one by now."""
    training = Manifest(run.manifest).require_training()
    place = "" if run.output == DEFAULT_OUTPUT else f" --output {shlex.quote(str(run.output))}"
    remedy = f"{_same_training(run.name, training)}{place} says where it lies now, and trains nothing again"
    try:
        base = BaseModel.of_run(run)
    except ModelError as error:
        raise ModelError(error.message, evidence=error.evidence, remedy=f"if it was moved: {remedy}") from None
    if base.sha256 != training.base.sha256:
        what = f"base {base.id} has changed since run {run.name} was trained on it"
        raise ModelError(what, remedy=f"train again; or, if it was moved: {remedy}")
    return base.folder


def _same_training(name: str, training: TrainingRecord) -> str:
    """The command that trains just so on a base that lies elsewhere; an option that is left out would make it another training."""
    usual = FinetuneParameters(base=str(Path.cwd()), method=training.parameters["method"]).to_json() | {"method": "lora"}
    words = ["granite-pipeline", "train", "--name", name, "--base", "FOLDER"]
    for key, value in training.parameters.items():
        # where and at which revision the base was, and how often it was saved, make no other training
        if key in ("base", "revision", "save_steps", "processes") or value == usual.get(key):
            continue
        option = f"--{key.replace('_', '-')}"
        values = [""] if value is True else value if isinstance(value, list | tuple) else [value]
        words += [word for one in values for word in (option, str(one)) if word]
    return shlex.join(words)


def require_trained(run: RunFolder) -> TrainingRecord:
    """What fine-tuning recorded; PipelineError when the run has no adapter yet."""
    training = Manifest(run.manifest).training
    if not training or not run.adapter.is_dir():
        raise PipelineError(f"run {run.name} has no adapter yet", remedy=f"granite-pipeline train --name {run.name}")
    return training
