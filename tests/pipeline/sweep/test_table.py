"""How far a run is, as any machine that shares its folder sees it."""

from __future__ import annotations

import os
import socket
import time

import pytest

from pipeline.runs import lock
from pipeline.runs.folder import RunFolder
from pipeline.sweep import table
from pipeline.sweep.table import Seen

STEPS = """2026-11-26 13:00:00,000 INFO training.tuning.finetune: trainer: hf (asked for), dtype torch.float32
2026-11-26 13:00:01,000 INFO training.tuning.trainers: finetune: step 10 of 60, loss 2.5, 9 s left
2026-11-26 13:00:11,000 INFO training.tuning.trainers: finetune: step 20 of 60{loss}, 8 s left
"""
ANSWERS = "2026-11-26 13:00:00,000 INFO training.export.evaluate: merged_fp16: 64 of 204 prompts answered\n"


def _log(run: RunFolder, name: str, text: str, age: float = 0) -> None:
    run.logs.mkdir(parents=True, exist_ok=True)
    path = run.logs / name
    path.write_text(text)
    os.utime(path, (time.time() - age, time.time() - age))


@pytest.mark.parametrize(
    ("name", "text", "stage", "step", "loss"),
    [
        ("finetune-20261126-130000.log", STEPS.format(loss=", loss 1.234"), "finetune", "20 of 60", 1.234),
        ("finetune-20261126-130000.log", STEPS.format(loss=""), "finetune", "20 of 60", None),
        ("finetune-20261126-130000.log", "", "finetune", "", None),
        ("evaluate_tuned-20261126-130000.log", ANSWERS, "evaluate_tuned", "64 of 204", None),
        ("run-20261126-130000.log", "", "starting", "", None),
        ("sweep.log", STEPS, "starting", "", None),
    ],
)
def test_stage_step_and_loss_are_those_of_the_log_in_writing(
    run: RunFolder, name: str, text: str, stage: str, step: str, loss: float | None
) -> None:
    _log(run, "gguf-20261126-120000.log", "", age=3600)  # of a run before
    with lock.held(run, "run"):
        _log(run, name, text)
        assert table.look(run) == Seen(stage, step, loss, socket.gethostname())
    assert table.look(run) == Seen()


def test_a_share_that_does_not_answer_is_no_end_of_the_sweep(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(_: RunFolder) -> None:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(lock, "holder", stale)
    assert table.look(run) == Seen()


def test_a_manifest_that_cannot_be_read_is_no_result(run: RunFolder) -> None:
    run.path.mkdir(parents=True)
    run.manifest.write_text("{")
    assert table.look(run) == Seen()
