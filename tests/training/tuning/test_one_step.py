"""The shortest training: one step changes the weights, and they are the weights that are merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from pipeline.runs.folder import RunFolder
from training.export.merge import merge
from training.export.weights import read_adapter
from training.parameters import FinetuneParameters
from training.tuning import trainers
from training.tuning.finetune import finetune


@pytest.fixture
def rows(write: Callable[..., Path]) -> Path:
    return write(*({"prompt": f"alert {i}", "completion": "ok" if i % 2 else "bad"} for i in range(40)))


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["hf", "unsloth"])
def test_one_step_leaves_an_adapter_that_is_not_zero(trainer: str, run: RunFolder, rows: Path, tmp_path: Path) -> None:
    base = tiny.make("3.x-dense", tmp_path / "base")
    params = FinetuneParameters(base=str(base), data=str(rows), max_steps=1, trainer=trainer)  # type: ignore[arg-type]
    done = finetune(run, params)
    assert done.result["steps"] == 1
    moved = [float(b.abs().max()) for _, b in read_adapter(run.adapter).pairs.values()]
    assert moved and all(moved)


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (2, 2), (5, 5), (6, 5), (100, 5)])
def test_the_warm_up_is_left_out_of_one_step_only(total: int, warmup: int, tmp_path: Path) -> None:
    arguments = trainers._arguments(tmp_path, FinetuneParameters(), torch.float32, total)
    assert arguments.warmup_steps == warmup
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=arguments.learning_rate)
    from transformers import get_scheduler

    schedule = get_scheduler(
        arguments.lr_scheduler_type, optimizer, num_warmup_steps=arguments.warmup_steps, num_training_steps=total
    )
    rates = []
    for _ in range(total):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert max(rates) > 0


@pytest.mark.slow
@pytest.mark.parametrize("trainer", [pytest.param("hf", marks=pytest.mark.wide), "unsloth"])
def test_an_old_single_file_is_neither_trained_nor_merged(trainer: str, run: RunFolder, rows: Path, tmp_path: Path) -> None:
    base = tiny.make("3.x-dense", tmp_path / "base")
    new = tiny.put_shards_beside(base)
    params = FinetuneParameters(base=str(base), data=str(rows), max_steps=1, trainer=trainer)  # type: ignore[arg-type]
    trained = finetune(run, params)
    # the loss before training is that of the shards' weights: a run on the shards alone begins with the same
    alone = tmp_path / "shards"
    alone.mkdir()
    for path in base.iterdir():
        if path.name != "model.safetensors":
            (alone / path.name).write_bytes(path.read_bytes())
    other = finetune(RunFolder("alone", run.output), FinetuneParameters(**{**params.__dict__, "base": str(alone)}))
    assert trained.result["eval_loss"] == other.result["eval_loss"]
    merge(run)
    lora, merged = read_adapter(run.adapter), load_file(str(run.merged / "model.safetensors"))
    for name, tensor in merged.items():
        expected = new[name]
        if name in lora.pairs:
            a, b = lora.pairs[name]
            expected = expected + lora.scale * b.float() @ a.float()
        torch.testing.assert_close(tensor.float(), expected, atol=1e-3, rtol=1e-3)
