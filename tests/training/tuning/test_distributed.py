"""One training by several processes: the same losses and weights as by one, and what happens when one of them fails."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
import ranks
import tiny
import torch
from safetensors.torch import load_file

from pipeline.errors import DataError, EnvironmentFailure, InputError, Interrupted
from pipeline.machine.gpus import Gpu
from pipeline.machine.hardware import Cpu, Hardware
from pipeline.runs import interrupt
from pipeline.runs.folder import RunFolder
from training.base import BaseModel
from training.memory import finetune_need
from training.parameters import FinetuneParameters, content
from training.tuning import checkpoints, distributed, packing
from training.tuning import finetune as stage
from training.tuning.distributed import Share, batch, planned
from training.tuning.prepare import Preparer

# float32 on both sides: sums of the same numbers in another order
_LOSS, _WEIGHTS = 1e-5, 1e-3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make("3.x-dense", tmp_path_factory.mktemp("base") / "base", hidden_size=32, num_hidden_layers=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of very different lengths, of which 41 are trained: a last step of a single row, so that one process has none."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        [
            {"role": "system", "content": "You sort alerts. " * (3 + i % 2)},
            {"role": "user", "content": f"alert {i} " + "x y " * (i % 9)},
            {"role": "assistant", "content": "ok fine " * (1 + 2 * (i % 6))},
        ]
        for i in range(45)
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


def _params(base: Path, data: Path, **more: Any) -> FinetuneParameters:
    given = {"base": str(base), "data": str(data), "trainer": "hf", "rank": 4, "learning_rate": 1e-3, "epochs": 2.0}
    given |= {"batch_size": 4, "gradient_accumulation": 2, "save_steps": 5, "warmup_steps": 1}
    return FinetuneParameters(**given | more)


def _job(name: str, output: Path, params: FinetuneParameters, processes: int, *, sharded: bool = False) -> stage.Job:
    run = RunFolder(name, output)
    run.path.mkdir(parents=True)
    split, preparer = stage.read_split(params), Preparer(Path(params.base), datetime(2026, 1, 1))
    rows, held_out = (preparer.prepare(part, params.max_length) for part in (split.train, split.held_out))
    assert len(rows.examples) % params.rows_a_step == 1
    plan = replace(planned(replace(params, processes=processes), Path(params.base), 64), sharded=sharded)
    trained = BaseModel(params.base, Path(params.base), None, "0" * 64)
    return stage.Job(run, params, trained, rows, held_out, {"job": name}, ("hf", "asked for"), plan)


def _weights(adapter: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in adapter.glob("*.safetensors") for name, value in load_file(path).items()}


def _assert_alike(one: Path, other: Path, start: dict[str, torch.Tensor] | None = None) -> None:
    """Weights are as near as rounding: relative to how far training moved them, where that is known."""
    wanted, found = _weights(one), _weights(other)
    assert wanted.keys() == found.keys() and wanted
    apart = torch.cat([(found[name] - wanted[name]).flatten() for name in wanted]).norm()
    moved = torch.cat([(wanted[name] - (start or {}).get(name, 0)).flatten() for name in wanted]).norm()
    assert float(apart) <= _WEIGHTS * float(moved)


def _assert_same_history(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    assert [entry["step"] for entry in one] == [entry["step"] for entry in other] and len(one) > 10
    for wanted, found in zip(one, other, strict=True):
        assert wanted.keys() == found.keys()
        for name in ("loss", "eval_loss", "learning_rate", "grad_norm"):
            if name in wanted:
                assert found[name] == pytest.approx(wanted[name], rel=_LOSS if "loss" in name else 1e-3), (wanted["step"], name)


CASES = {
    "packed-lora": {},
    "padded-lora": {},
    "packed-full": {"method": "full", "learning_rate": 1e-4},
    "padded-full": {"method": "full", "learning_rate": 1e-4},
    "packed-fsdp-lora": {},
    "padded-fsdp-full": {"method": "full", "learning_rate": 1e-4},
}


@pytest.mark.slow
@pytest.mark.wide
def test_losses_and_weights_are_those_of_one_process(
    base: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = [_job(name, tmp_path / "two", _params(base, data, **more), 2, sharded="fsdp" in name) for name, more in CASES.items()]
    with caplog.at_level("INFO"):
        two = distributed.run(ranks.each, jobs, 2, tmp_path)
    assert caplog.text.count("resuming from checkpoint-10") == 2
    start = _weights(base)
    for name, more in CASES.items():
        one = ranks.in_float32(_job(name, tmp_path / "one", _params(base, data, **more), 1))
        kind = "fsdp" if "fsdp" in name else "ddp"
        assert (two[name]["processes"], two[name]["parallel"], one["parallel"]) == (2, kind, "one"), name
        assert two[name]["batches"] == one["batches"] == name.partition("-")[0]
        if kind == "fsdp":  # and once more from a checkpoint, whose adapter is the one compared below
            assert two[name]["resumed"]["steps"] == 12
            assert two[name]["resumed"]["eval_loss"]["after"] == pytest.approx(one["eval_loss"]["after"], rel=_LOSS)
        assert two[name]["trainable_parameters"] == one["trainable_parameters"]
        _assert_same_history(one["history"], two[name]["history"])
        _assert_alike(tmp_path / "one" / name / "adapter", tmp_path / "two" / name / "adapter", start if "full" in name else None)


class _When(threading.Thread):
    """Does something once a checkpoint is sealed, and keeps what it saw."""

    def __init__(self, run: RunFolder, what: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.run_folder, self.what, self.done = run, what, False
        self.start()

    def run(self) -> None:
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline:
            if list(self.run_folder.checkpoints.glob(f"checkpoint-*/{checkpoints.SEAL}")):
                self.what()
                self.done = True
                return
            time.sleep(0.01)


def _processes(number: int | None = None) -> list[psutil.Process]:
    """The processes of trainings that this one has started; ``number``: of this rank."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "training.tuning.distributed" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                rank = process.environ().get("RANK")
                found += [process] if number is None or (rank == str(number) and "work" in process.cmdline()) else []
        except psutil.Error:
            continue
    return found


def _killed_second() -> None:
    for process in _processes(1):
        process.kill()


@pytest.fixture
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "_part", ranks.in_float32)
    monkeypatch.setattr(stage, "_train", ranks.in_float32)


@pytest.fixture(scope="module")
def uninterrupted(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """One process that was not disturbed: its adapter and history."""
    output = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(stage, "_train", ranks.in_float32)
        done = stage.finetune(RunFolder("whole", output), _params(base, data, save_steps=2, processes=1))
    return output / "whole" / "adapter", done.result["history"]


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.usefixtures("float32")
def test_a_killed_process_is_named_and_another_number_of_processes_goes_on(
    base: Path, data: Path, tmp_path: Path, uninterrupted: tuple[Path, list[dict[str, Any]]], caplog: pytest.LogCaptureFixture
) -> None:
    run, params = RunFolder("killed", tmp_path), _params(base, data, save_steps=2, processes=2)
    killer = _When(run, _killed_second)
    with pytest.raises(EnvironmentFailure, match="training process 1 was ended by SIGKILL") as caught:
        stage.finetune(run, params)
    assert killer.done and "--processes 1" in caught.value.remedy
    assert _processes() == [] and not list(run.path.glob(".training.*"))
    assert not run.adapter.exists()
    with caplog.at_level("INFO"):
        done = stage.finetune(run, replace(params, processes=1))
    assert "resuming from checkpoint-" in caplog.text
    adapter, history = uninterrupted
    _assert_alike(adapter, run.adapter)
    assert done.result["history"][-1]["eval_loss"] == pytest.approx(history[-1]["eval_loss"], rel=_LOSS)


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.usefixtures("float32")
def test_an_interrupt_saves_a_checkpoint_that_is_gone_on_with(
    base: Path, data: Path, tmp_path: Path, uninterrupted: tuple[Path, list[dict[str, Any]]], caplog: pytest.LogCaptureFixture
) -> None:
    run, params = RunFolder("interrupted", tmp_path), _params(base, data, save_steps=2, processes=2)
    asker = _When(run, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted, match=r"the checkpoint of step \d+ of 12 is kept"):
        stage.finetune(run, params)
    assert asker.done and _processes() == []
    kept = checkpoints.found(run.checkpoints)[0]
    assert checkpoints.problem(kept) is None
    assert {path.name for path in kept.glob("rng_state_*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    with caplog.at_level("INFO"):
        done = stage.finetune(run, params)
    assert f"resuming from {kept.name}" in caplog.text
    assert (done.result["processes"], done.result["steps"]) == (2, 12)
    _assert_alike(uninterrupted[0], run.adapter)
    assert stage.finetune(run, replace(params, processes=1)).skipped


@pytest.mark.slow
def test_the_error_of_the_process_that_failed_first_is_what_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:7: a row that the second process cannot take") as refused:
        distributed.run(ranks.second_is_refused, None, 2, tmp_path)
    assert (refused.value.evidence, refused.value.remedy, refused.value.exit_code) == ("seen", "mend it", 2)
    with pytest.raises(EnvironmentFailure, match="training process 1 failed: ZeroDivisionError: an expert without") as broken:
        distributed.run(ranks.second_breaks, None, 2, tmp_path)
    assert "second_breaks" in broken.value.evidence
    with pytest.raises(EnvironmentFailure, match="training process 1 was ended by SIGKILL, the system's way when memory"):
        distributed.run(ranks.second_is_killed, None, 2, tmp_path)
    assert _processes() == [] and list(tmp_path.iterdir()) == []


_PARENT = """
import sys
from pathlib import Path
import ranks
from training.tuning import distributed
distributed.run(ranks.waits, Path(sys.argv[1]), 2, Path(sys.argv[1]))
"""


def _ready(folder: Path, parent: subprocess.Popen[bytes]) -> list[tuple[int, set[str]]]:
    """Process numbers of both processes, and where each listens."""
    deadline = time.monotonic() + 300
    while not all((folder / f"rank-{n}").is_file() and (folder / f"rank-{n}").read_text() for n in (0, 1)):
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    said = [(folder / f"rank-{n}").read_text().split() for n in (0, 1)]
    return [(int(words[0]), set(words[1:])) for words in said]


@pytest.mark.slow
def test_the_processes_end_with_their_parent_and_listen_on_loopback_alone(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, str(tmp_path)], env=env)
    both = _ready(tmp_path, parent)
    family = psutil.Process(parent.pid).children(recursive=True)
    assert {pid for pid, _ in both} <= {process.pid for process in family} and len(family) >= 3
    assert {address for _, where in both for address in where} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    agent = next(process for process in family if "agent" in process.cmdline())
    assert not [c for c in agent.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    parent.kill()
    parent.wait()
    _, left = psutil.wait_procs(family, timeout=20)
    assert left == []


def test_each_process_gets_an_equal_part_of_the_rows_of_every_step() -> None:
    for rows, size, accumulation, processes in (
        (41, 4, 2, 2),
        (41, 4, 2, 8),
        (40, 4, 2, 4),
        (7, 4, 3, 6),
        (30, 2, 9, 6),
        (5, 1, 1, 1),
    ):
        params = FinetuneParameters(batch_size=size, gradient_accumulation=accumulation, processes=processes)
        mine, batches = batch(params, processes)
        assert mine * batches * processes == params.rows_a_step and mine <= size
        one = packing.Batches([i % 3 for i in range(rows)], size, 7)
        shares = [Share(packing.Batches(one.heads, size, 7), params.rows_a_step, mine, r, processes) for r in range(processes)]
        for epoch in (0, 1):
            one.set_epoch(epoch)
            for share in shares:
                share.batch_sampler.set_epoch(epoch)
            made, order = [list(share) for share in shares], list(one)
            assert {len(share) for share in shares} == {len(part) for part in made}
            assert len({len(part) for part in made}) == 1
            for step in range(-(-rows // params.rows_a_step)):
                taken = [row for part in made for rows_ in part[step * batches : (step + 1) * batches] for row in rows_]
                wanted = order[step * params.rows_a_step : (step + 1) * params.rows_a_step]
                assert sorted(row for row in taken if row != rows) == sorted(wanted)


def _machine(*free: float) -> Hardware:
    return Hardware(Cpu(8), 64.0, 64.0, gpus=tuple(Gpu("GPU", 24.0, gib) for gib in free))


def test_auto_takes_the_most_gpus_over_which_a_step_divides(base: Path) -> None:
    def found(machine: Hardware, **more: Any) -> tuple[int, str]:
        plan = planned(FinetuneParameters(base=str(base), **more), base, 64, machine)
        return plan.processes, plan.kind

    assert found(_machine(23.0)) == found(_machine()) == (1, "one")
    assert found(_machine(23.0, 23.0)) == (2, "ddp")
    assert found(_machine(*[23.0] * 8)) == (4, "ddp")
    assert found(_machine(*[23.0] * 8), gradient_accumulation=2) == (8, "ddp")
    assert found(_machine(*[23.0] * 3), batch_size=1) == (1, "one")
    assert found(_machine(23.0, 23.0), trainer="unsloth") == (1, "one")
    assert found(_machine(23.0, 23.0), processes=1) == (1, "one")
    slices = Hardware(Cpu(8), 64.0, 64.0, gpus=(Gpu("GPU", 24.0, 23.0, mig=True),) * 2)
    assert found(slices) == (1, "one")
    with pytest.raises(InputError, match="4 processes were asked for, one a GPU, and there are 2 GPUs"):
        found(_machine(23.0, 23.0), processes=4)


def test_a_model_that_one_gpu_does_not_hold_is_divided(tmp_path: Path) -> None:
    weights = {"w": {"dtype": "BF16", "shape": [8_000_000_000], "data_offsets": [0, 16_000_000_000]}}
    header = json.dumps(weights).encode()
    with (tmp_path / "model.safetensors").open("wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        out.truncate(8 + len(header) + 16_000_000_000)
    sizes = {"num_hidden_layers": 32, "hidden_size": 4096, "vocab_size": 100_000}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    for method, lowest, highest in (("lora", 9.0, 11.0), ("full", 60.0, 63.0)):
        params = FinetuneParameters(base=str(tmp_path), method=method)  # type: ignore[arg-type]
        alone, two = (finetune_need(tmp_path, replace(params, batch_size=2), 100, parts=n).gib for n in (1, 2))
        assert lowest < two < highest < alone
        plan = planned(params, tmp_path, 100, _machine(100.0, (alone + two) / 2))
        assert (plan.kind, plan.need.gib, plan.where) == ("fsdp", two, "GPU memory")
        assert "do not fit" in plan.reason and "FSDP" in plan.told(params)
        plan = planned(params, tmp_path, 100, _machine(alone + 1, alone + 1))
        assert (plan.kind, plan.need.gib, plan.reason) == ("ddp", alone, "")
    # four-bit weights cannot be
    assert planned(FinetuneParameters(base=str(tmp_path), method="qlora"), tmp_path, 1, _machine(0.1, 0.1)).kind == "ddp"


@pytest.mark.parametrize("wrong", [0, -1, "many", 1.5, True, "0"])
def test_what_is_no_number_of_processes_is_refused(wrong: Any) -> None:
    with pytest.raises(InputError, match="must be auto or a whole number"):
        FinetuneParameters(processes=wrong)


def test_rows_that_cannot_be_divided_and_unsloth_are_refused() -> None:
    with pytest.raises(InputError, match=r"a step's 4 rows .* cannot be divided over 3 processes") as caught:
        FinetuneParameters(processes=3)
    assert "--gradient-accumulation" in caught.value.remedy
    with pytest.raises(InputError, match="unsloth trains in one process, not in 2"):
        FinetuneParameters(processes=2, trainer="unsloth")


def test_who_computes_it_is_no_part_of_what_is_trained() -> None:
    one, two = FinetuneParameters(), FinetuneParameters(processes="2")
    assert two.processes == 2 and "processes" not in one.to_json()
    assert content({"parameters": one.to_json()}) == content({"parameters": two.to_json()})


def test_an_interrupt_can_be_passed_on() -> None:
    import logging

    with interrupt.graceful(logging.getLogger(__name__)):
        assert not interrupt.asked()
        interrupt.ask()
        assert interrupt.asked()
    assert not interrupt.asked()
