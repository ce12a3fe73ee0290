"""One run as a process of its own, whoever starts it: it ends with its starter, and what its exit code means for the sweep."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline.runs.text import mask, printable
from pipeline.serve import guard

DONE, UNVERIFIED, WRONG, MACHINE, STOPPED = 0, 1, 2, 3, 130
RETRIES, PAUSE_SECONDS = 3, 10.0
# the guard gives a run ten seconds to end, and then kills it
_END_SECONDS = 15.0
_READ_BYTES = 1 << 14
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Job:
    """One run to be done: its name, the words after ``granite-pipeline``, and the file that takes what it prints."""

    name: str
    argv: tuple[str, ...]
    log: Path


@dataclass(frozen=True)
class Outcome:
    """How a run ended: exit code (0 done, 1 not verified, 2 wrong input, 3 the machine, 130 stopped), where, after how many tries.

    ``said`` is its error, in its own words.
    """

    name: str
    code: int
    where: str
    tries: int = 1
    seconds: float = 0.0
    said: str = ""

    @property
    def again(self) -> bool:
        """Whether it is worth another try: the machine was not able to, and that was not seen too often."""
        return self.code == MACHINE and self.tries <= RETRIES

    @property
    def pause(self) -> float:
        """Seconds before the next try."""
        return PAUSE_SECONDS * 2.0 ** (self.tries - 1)


def command(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The command that is ``granite-pipeline`` with these words, by this very code and Python, and the environment it needs."""
    found = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    # -P: a folder named pipeline where the user happens to stand is not meant
    return [sys.executable, "-P", "-m", "pipeline", *argv], {**os.environ, "PYTHONPATH": found, "PYTHONUNBUFFERED": "1"}


def start(job: Job, environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """Start a run under the guard, which ends it when this process is gone, however that ended; what it prints is appended."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    guarded = [sys.executable, "-P", guard.__file__, "--owner", str(os.getpid()), "--"]
    words, ours = command(job.argv)
    with job.log.open("ab") as out:
        out.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} granite-pipeline {' '.join(job.argv)}\n".encode())
        out.flush()
        return subprocess.Popen(
            [*guarded, *words],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**ours, **environment},
            start_new_session=True,
        )


def ask_to_stop(process: "subprocess.Popen[bytes]") -> None:
    """Ctrl-C for the run itself, which finishes its step and saves; its guard waits for it."""
    with contextlib.suppress(psutil.Error):
        for run in psutil.Process(process.pid).children():
            run.send_signal(signal.SIGINT)


def end(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    """End runs and all that they started, now; returns when they are gone."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
    deadline = time.monotonic() + _END_SECONDS
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def meaning(code: int, *, stopping: bool = False) -> int:
    """An exit code as one of the five: what was killed, or died of a signal, is the machine's fault, unless we stopped it."""
    if code in (DONE, UNVERIFIED, WRONG):
        return code
    return STOPPED if stopping or code == STOPPED else MACHINE


def last_words(log: Path) -> str:
    """The error that a run ended with, or its last line."""
    try:
        with log.open("rb") as handle:
            handle.seek(max(0, log.stat().st_size - _READ_BYTES))
            lines = handle.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    errors = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    kept = lines[errors[-1] :][:12] if errors else [line for line in lines if line.strip()][-1:]
    return mask("\n".join(printable(line) for line in kept).removeprefix("error: "))
