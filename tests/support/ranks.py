"""What the processes of a training do in tests, by name: they are other interpreters, in which nothing is patched."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from pipeline.errors import DataError
from training.tuning import checkpoints, distributed, finetune, packing, trainers

_train, _part, _obstacle = finetune._train, finetune._part, packing.obstacle


def in_float32(job: Any) -> dict[str, Any]:
    """The training itself, in float32 whatever this CPU computes fast; padded where the run's name says so."""
    before = trainers.training_dtype
    trainers.training_dtype = lambda: torch.float32
    packing.obstacle = (lambda config: "padded, to compare") if "padded" in job.run.name else _obstacle
    try:
        return (_part if distributed.world() > 1 else _train)(job)
    finally:
        trainers.training_dtype, packing.obstacle = before, _obstacle


def each(jobs: list[Any]) -> dict[str, Any]:
    """Several trainings, one after the other, in the same processes; those in parts once more from their last checkpoint but one."""
    done = {}
    for job in jobs:
        done[job.run.name] = in_float32(job)
        if job.plan.sharded:
            if distributed.rank() == 0:
                shutil.rmtree(checkpoints.found(job.run.checkpoints)[0])
            distributed.agreed(False)
            resumed = in_float32(job)
            done[job.run.name]["resumed"] = {name: resumed[name] for name in ("steps", "eval_loss")}
    return done


def second_is_refused(job: Any) -> dict[str, Any]:
    """An error of the product in the second process, for which the first one waits."""
    if distributed.rank() == 1:
        raise DataError("rows.jsonl:7: a row that the second process cannot take", evidence="seen", remedy="mend it")
    distributed.agreed(False)
    return {}


def second_breaks(job: Any) -> dict[str, Any]:
    """Any other error in the second process."""
    if distributed.rank() == 1:
        raise ZeroDivisionError("an expert without tokens")
    distributed.agreed(False)
    return {}


def second_is_killed(job: Any) -> dict[str, Any]:
    """The system's way when memory runs out."""
    if distributed.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.agreed(False)
    return {}


def waits(folder: Path) -> dict[str, Any]:
    """Say which process this is and where it listens, and wait to be ended."""
    distributed.agreed(False)
    listening = [c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
    (folder / f"rank-{distributed.rank()}").write_text(f"{os.getpid()} {' '.join(listening)}")
    while not distributed.asked():
        time.sleep(0.05)
    return {"rank": distributed.rank(), "threads": torch.get_num_threads()}
