"""Runs on this machine, each a real process under the real guard; what the process does is a stand-in for the line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from pipeline.errors import InputError
from pipeline.machine.gpus import Gpu
from pipeline.machine.hardware import Hardware
from pipeline.sweep import guarded, local
from pipeline.sweep.guarded import Job, Outcome
from pipeline.sweep.spec import Resources

# a package named pipeline whose words are exit codes, the first of the try that it is: "3,3,0"; "sleep" saves when interrupted
STAND_IN = """
import os, pathlib, signal, sys, time
from sys import argv
mark = pathlib.Path(argv[2])
tries = len(mark.read_text().splitlines()) if mark.exists() else 0
with mark.open("a") as out:
    out.write(f"{os.environ.get('OMP_NUM_THREADS')} {os.environ.get('CUDA_VISIBLE_DEVICES')} {os.getpid()}\\n")
if argv[1] == "sleep":
    def stop(*_):
        mark.with_suffix(".saved").touch()
        sys.exit(130)
    signal.signal(signal.SIGINT, stop)
    mark.with_suffix(".ready").touch()
    time.sleep(600)
code = argv[1].split(",")[min(tries, argv[1].count(","))]
print(f"error: ended with {code}\\nWhat to do: nothing", flush=True)
os.kill(os.getpid(), 9) if code == "kill" else sys.exit(int(code))
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Job]:
    """A run that does what its one word says, and counts its tries in a file."""
    stand_in = tmp_path / "stand-in" / "pipeline"
    stand_in.mkdir(parents=True)
    (stand_in / "__init__.py").touch()
    (stand_in / "__main__.py").write_text(STAND_IN)
    monkeypatch.setattr(guarded, "_ROOT", stand_in.parent)
    monkeypatch.setattr(guarded, "PAUSE_SECONDS", 0.1)
    numbers = iter(range(1000))

    def made(word: str) -> Job:
        name = f"run{next(numbers)}"
        return Job(name, (word, str(tmp_path / name)), tmp_path / f"{name}.log")

    return made


def _tries(job: Job) -> list[list[str]]:
    path = Path(job.argv[1])
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize(
    ("word", "code", "tries"),
    [("0", 0, 1), ("1", 1, 1), ("2", 2, 1), ("3,0", 0, 2), ("3,1", 1, 2), ("3", 3, 4), ("kill,0", 0, 2), ("7,0", 0, 2), ("130", 130, 1)],
)  # fmt: skip
def test_what_an_exit_code_means(job: Callable[[str], Job], word: str, code: int, tries: int) -> None:
    """0 is done, 1 and 2 are final, 3 and a run that was killed are tried again three times at most, 130 was asked for."""
    one = job(word)
    (outcome,) = local.map([one], Resources())
    assert (outcome.code, outcome.tries, len(_tries(one))) == (code, tries, tries)
    assert outcome.said == (f"ended with {word.split(',')[-1]}\nWhat to do: nothing" if code else "")


def test_so_many_at_once_and_each_with_its_threads(job: Callable[[str], Job], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    jobs = [job("0") for _ in range(5)]
    outcomes = list(local.map(jobs, Resources(cpus=3), 2))
    assert sorted(outcome.name for outcome in outcomes) == [one.name for one in jobs]
    assert {tuple(words[:1]) for one in jobs for words in _tries(one)} == {("3",)}


def test_one_that_fails_does_not_keep_the_others_waiting(job: Callable[[str], Job]) -> None:
    jobs = [job("3"), job("0"), job("0")]
    assert [outcome.name for outcome in local.map(jobs, Resources(), 1)] == ["run1", "run2", "run0"]


def _machine(gpus: int, *, mig: bool = False) -> Hardware:
    made = tuple(Gpu(f"g{i}", 24, 24, mig=mig) for i in range(gpus))
    return replace(Hardware.detect(), gpus=made, ram_free_gib=40.0)


@pytest.mark.parametrize(
    ("resources", "at_once", "gpus"),
    [
        (Resources(), None, ["0", "1", "2", "3"]),
        (Resources(gpus=2), None, ["0,1", "2,3"]),
        (Resources(gpus=2), 1, ["0,1"]),
        (Resources(gpus=3), None, ["0,1,2"]),
        (Resources(gpus=0.5), None, ["0", "1", "2", "3"] * 2),
    ],
)
def test_no_gpu_is_given_to_more_runs_than_it_is_meant_for(
    resources: Resources, at_once: int | None, gpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    machine = _machine(4)
    monkeypatch.setattr(Hardware, "detect", staticmethod(lambda *_: machine))
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in local._slots(resources, at_once)] == gpus


def test_more_runs_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    two, slices = _machine(2), _machine(2, mig=True)
    monkeypatch.setattr(Hardware, "detect", staticmethod(lambda *_: two))
    with pytest.raises(InputError, match="3 runs at once with 1 GPUs each do not fit the 2 GPUs"):
        local._slots(Resources(), 3)
    with pytest.raises(InputError, match="lower gpus"):
        local._slots(Resources(gpus=4), None)
    monkeypatch.setattr(Hardware, "detect", staticmethod(lambda *_: slices))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(InputError, match="CUDA_VISIBLE_DEVICES"):
        local._slots(Resources(), None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a,MIG-b")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in local._slots(Resources(), None)] == ["MIG-a", "MIG-b"]


def test_memory_and_cores_say_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = _machine(0)
    monkeypatch.setattr(Hardware, "detect", staticmethod(lambda *_: machine))
    assert len(local._slots(Resources(memory_gib=10), None)) == 4
    assert len(local._slots(Resources(memory_gib=100), None)) == 1
    assert len(local._slots(Resources(), None)) == 1


# a driver that can be killed: two runs that sleep, and one that waits for them
DRIVER = """
import json, logging, sys
from pathlib import Path
from pipeline.runs import interrupt
from pipeline.sweep import guarded, local
from pipeline.sweep.guarded import Job
from pipeline.sweep.spec import Resources
folder, root = Path(sys.argv[1]), Path(sys.argv[2])
guarded._ROOT = root
jobs = [Job(f"r{i}", ("sleep", str(folder / f"r{i}")), folder / f"r{i}.log") for i in range(3)]
with interrupt.graceful(logging.getLogger()):
    for outcome in local.map(jobs, Resources(), 2):
        print(outcome.name, outcome.code, flush=True)
"""


def _driver(tmp_path: Path) -> subprocess.Popen[str]:
    root = str(Path(__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": root}
    words = [sys.executable, "-c", DRIVER, str(tmp_path), str(guarded._ROOT)]
    driver = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"r{i}.ready").exists() for i in range(2)):
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return driver


def _runs(tmp_path: Path) -> list[int]:
    return [int((tmp_path / f"r{i}").read_text().split()[-1]) for i in range(2)]


@pytest.mark.usefixtures("job")
def test_ctrl_c_lets_the_runs_save_and_starts_no_more(tmp_path: Path) -> None:
    driver = _driver(tmp_path)
    driver.send_signal(signal.SIGINT)
    said, _ = driver.communicate(timeout=60)
    assert sorted(said.split()) == ["130", "130", "r0", "r1"]
    assert all((tmp_path / f"r{i}.saved").exists() for i in range(2))
    assert not (tmp_path / "r2").exists()


@pytest.mark.usefixtures("job")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_run_outlives_the_driver(tmp_path: Path, how: signal.Signals) -> None:
    driver = _driver(tmp_path)
    runs = _runs(tmp_path)
    driver.send_signal(how)
    driver.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while any(map(psutil.pid_exists, runs)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(psutil.pid_exists, runs))


def test_last_words_are_the_error_and_no_terminal_codes(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("error: old\nmore\nerror: \x1b[31mnew hf_Abcdefghijklmnopqrstuv1\nWhat to do: x\n")
    assert guarded.last_words(log) == "\N{REPLACEMENT CHARACTER}[31mnew ********\nWhat to do: x"
    assert guarded.last_words(tmp_path / "nowhere") == ""
    assert json.dumps(vars(Outcome("a", 3, "b")))
