"""Fine-tuning itself: what is refused, what is proven, and what happens when it is killed."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from pipeline.errors import DataError, EnvironmentFailure, InputError, LeaseLost, PipelineError
from pipeline.runs import lock
from pipeline.runs.folder import RunFolder
from pipeline.runs.hashes import sha256_tree
from pipeline.runs.manifest import Manifest
from training.parameters import FinetuneParameters
from training.tuning import checkpoints
from training.tuning import finetune as stage
from training.tuning.finetune import finetune


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"alert {i}", "completion": "ok" if i % 2 else "bad"}) + "\n" for i in range(40))
    )
    return path


class _Model(torch.nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.lora_B = torch.nn.Parameter(torch.full((2, 2), value))


def _history(**entry: float) -> list[dict[str, Any]]:
    return [{"step": 1, "loss": 1.0, "grad_norm": 0.5, **entry}]


@pytest.mark.parametrize(
    ("entry", "value", "error", "match"),
    [
        ({"grad_norm": 0.0}, 1.0, PipelineError, "every gradient was zero"),
        ({"loss": math.nan}, 1.0, PipelineError, "infinite or NaN"),
        ({}, 0.0, EnvironmentFailure, "all zeros after training"),
    ],
)
def test_a_training_that_taught_nothing_is_an_error(
    entry: dict[str, float], value: float, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        stage._check_learning(_history(**entry), _Model(value), FinetuneParameters())


def test_a_training_that_taught_something_is_not() -> None:
    stage._check_learning(_history(), _Model(0.1), FinetuneParameters())


@pytest.mark.parametrize(
    "wrong", [{"method": "dora"}, {"trainer": "axolotl"}, {"rank": 0}, {"learning_rate": -1.0}, {"eval_share": 1.0}]
)
def test_impossible_parameters_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        FinetuneParameters(**wrong)


def test_the_default_learning_rate_follows_base_and_method() -> None:
    assert FinetuneParameters().peak_learning_rate == 4e-3
    assert FinetuneParameters(base="x/y").peak_learning_rate == 2e-4
    assert FinetuneParameters(base="x/y", method="full").peak_learning_rate == 2e-5
    assert FinetuneParameters(learning_rate=1e-4).to_json()["learning_rate"] == 1e-4


def test_held_out_prompts_in_training_are_refused(rows: Path, tmp_path: Path) -> None:
    leaked = tmp_path / "eval.jsonl"
    leaked.write_text(json.dumps({"prompt": "ALERT  3", "completion": "ok"}) + "\n")
    with pytest.raises(DataError, match="1 held-out prompts are also in the training rows") as caught:
        stage.read_split(FinetuneParameters(data=str(rows), eval_data=str(leaked)))
    assert "eval.jsonl:1" in caught.value.evidence


@pytest.mark.slow
def test_qlora_without_a_gpu_says_so(rows: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    base = tiny.make("3.x-dense", tmp_path / "base")
    with pytest.raises(EnvironmentFailure, match="qlora needs a CUDA GPU"):
        finetune(RunFolder("t", tmp_path / "out"), FinetuneParameters(base=str(base), data=str(rows), method="qlora"))


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["hf", pytest.param("unsloth", marks=pytest.mark.wide)])
def test_full_fine_tuning_moves_the_weights(trainer: str, rows: Path, tmp_path: Path) -> None:
    from training.export import merge

    base = tiny.make("3.x-dense", tmp_path / "base")
    run = RunFolder("t", tmp_path / "out")
    params = FinetuneParameters(base=str(base), data=str(rows), method="full", trainer=trainer, max_steps=3, learning_rate=1e-3)  # type: ignore[arg-type]
    done = finetune(run, params)
    assert done.result["trainer"] == trainer
    assert done.result["eval_loss"]["after"] < done.result["eval_loss"]["before"]
    merge.merge(run)
    assert (run.merged / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_training_that_lost_its_lease_touches_no_checkpoint(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.make("3.x-dense", tmp_path / "base")
    run = RunFolder("t", tmp_path / "out")
    seal, found = checkpoints.seal, list[set[str]]()

    def taken_over(checkpoint: Path) -> None:
        """Another machine takes the run over after the first checkpoint, and writes one of its own."""
        seal(checkpoint)
        record = json.loads((run.path / "lock.json").read_text())
        (run.path / "lock.json").write_text(json.dumps({**record, "token": "the other's"}))
        (run.checkpoints / "checkpoint-3").mkdir()
        found.append({path.name for path in run.checkpoints.iterdir()})

    monkeypatch.setattr(checkpoints, "seal", taken_over)
    params = FinetuneParameters(base=str(base), data=str(rows), trainer="hf", max_steps=8, save_steps=2)
    with pytest.raises(LeaseLost):
        finetune(run, params)
    assert [{path.name for path in run.checkpoints.iterdir()}] == found
    assert not run.adapter.exists()
    there = lock.holder(run)
    assert there is not None
    assert there.token == "the other's"


@pytest.mark.slow
@pytest.mark.wide
def test_a_killed_training_continues_from_its_checkpoint(rows: Path, tmp_path: Path) -> None:
    base = tiny.make("3.x-dense", tmp_path / "base")
    run = RunFolder("t", tmp_path / "out")
    options = ["--base", str(base), "--data", str(rows), "--max-steps", "60", "--save-steps", "5", "--trainer", "hf"]
    command = [sys.executable, "-m", "pipeline", "train", "--name", "t", "--output", str(run.output), *options]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 180
    while not (run.checkpoints / "checkpoint-10" / "trainer_state.json").exists():
        assert first.poll() is None, "training ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not run.adapter.exists()
    second = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert second.returncode == 0, second.stderr[-3000:]
    assert "resuming from checkpoint-" in second.stderr
    manifest = Manifest(run.manifest)
    assert manifest.require_training().steps == 60
    assert manifest.artefact_sha256("finetune", "adapter") == sha256_tree(run.adapter)
    assert not run.checkpoints.exists()
    third = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert "finetune: nothing changed" in third.stderr
