"""The one supervisor: start a server in its own process group, wait until it answers, say why when it does not, stop the group.

Why it did not start (``failures.json``) and how far a start has come (``milestones.json``) is read from its log.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from pipeline.config import key_variables
from pipeline.engines.base import Launch
from pipeline.errors import StartFailure
from pipeline.net.client import status_of
from pipeline.runs import lock
from pipeline.runs.files import read_json

_POLL_SECONDS = 0.5
_STOP_SECONDS = 20.0
# start times are read against the wall clock, which may be set; a pid that is used again starts much later
_SAME_START = 120.0
_TAIL_LINES = 12
# milestones are looked for in the end of a log only: it may be long
_READ_BYTES = 1 << 16
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
Progress = Callable[[str], None]
# guards started by this process, kept so that their exit status can be collected; what they ended with
_children: dict[int, subprocess.Popen[bytes]] = {}
_codes: dict[int, int] = {}
# how often the kernel had killed for memory when each server was started
_kills: dict[int, int] = {}


@dataclass(frozen=True)
class Server:
    """A server started from here. ``pid`` is its guard, which leads the process group; ``started`` tells reused pids apart."""

    engine: str
    url: str
    model: str
    argv: tuple[str, ...]
    env: dict[str, str]
    pid: int
    started: float
    log: Path
    started_at: str
    ready_path: str
    store: str = ""  # a folder of this server's own, which goes with it
    # where its pid counts: several machines may see the folder of its record; an older version wrote neither
    host: str = ""
    place: str = ""

    @property
    def elsewhere(self) -> bool:
        """Whether another machine started it, which is not to be asked, ended or forgotten from here."""
        return self.place not in ("", lock.place()) and self.host != socket.gethostname()

    @property
    def alive(self) -> bool:
        """True while the guard runs here, and with it the server."""
        if self.place not in ("", lock.place()):
            return False
        # collected when the guard is our own child, so that it does not stay a zombie
        if self.pid in _children and (code := _children[self.pid].poll()) is not None:
            _codes[self.pid] = code
            del _children[self.pid]
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.pid)
            return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - self.started) < _SAME_START
        return False

    def to_json(self) -> dict[str, Any]:
        """The record that ``ps``, ``stop`` and the report read."""
        return {**asdict(self), "log": str(self.log)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Server":
        """Read what :meth:`to_json` wrote; KeyError or TypeError when it is something else."""
        return cls(**{**data, "log": Path(data["log"]), "argv": tuple(data["argv"])})

    def memory_gib(self) -> float:
        """Resident memory of the whole process group, GiB, pages its processes share counted once; 0 when it is gone."""
        with contextlib.suppress(psutil.Error):
            guard = psutil.Process(self.pid)
            return sum(_resident(process) for process in [guard, *guard.children(recursive=True)]) / 2**30
        return 0.0


@dataclass(frozen=True)
class Failure:
    """A recognised failure: its name in the table, cause and remedy, the log line that shows it and the numbers found there."""

    name: str
    cause: str
    remedy: str
    line: str = ""
    numbers: tuple[float, ...] = ()

    @property
    def facts(self) -> dict[str, Any]:
        """What a :class:`StartFailure` carries of it."""
        return {"remedy": self.remedy, "kind": self.name, "cause": self.cause, "numbers": self.numbers}


def start(launch: Launch, log: Path, *, owner: int | None) -> Server:
    """Start the process; it ends with process ``owner`` (None: it runs until :func:`stop`)."""
    log.parent.mkdir(parents=True, exist_ok=True)
    # the guard as a file, without its folder on the path: it needs no package of ours, and the engine must not find our packages
    guard = str(Path(__file__).with_name("guard.py"))
    command = [sys.executable, "-P", guard, "--owner", str(owner or 0), "--", *launch.argv]
    # an empty key, as in a copied .env.example, means none; llama-server would ask for it
    keys = key_variables().values()
    given = {name: value for name, value in os.environ.items() if value or name not in keys}
    environment = {**given, **launch.env, "PYTHONUNBUFFERED": "1"}
    if launch.ours:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    _children[process.pid] = process
    _kills[process.pid] = oom_kills()
    started, now = psutil.Process(process.pid).create_time(), datetime.now(UTC).isoformat(timespec="seconds")
    said = (launch.engine, launch.url, launch.model, launch.argv, dict(launch.env))
    return Server(*said, process.pid, started, log, now, launch.ready_path, launch.store, socket.gethostname(), lock.place())


def wait_ready(server: Server, timeout: float, progress: Progress) -> float:
    """Wait until the health path answers 200; returns the seconds since the start.

    ``progress`` is told what the server is doing, from its log. On an exit (whatever the code) or a time-out the group is
    ended and StartFailure carries cause, remedy and log tail.
    """
    begun, shown = time.monotonic(), ""
    while time.monotonic() - begun < timeout:
        if not server.alive:
            stop(server)
            raise failure(server, "ended before it was ready")
        if status_of(server.url + server.ready_path, timeout=5) == 200:
            return time.monotonic() - begun
        doing = phase(end_of(server.log, _READ_BYTES))
        if doing != shown:
            shown = doing
            progress(f"{server.engine}: {doing} ({time.monotonic() - begun:.0f} s)")
        time.sleep(_POLL_SECONDS)
    stop(server)
    raise failure(server, f"was not ready after {timeout:.0f} s", ended=False)


def stop(server: Server) -> None:
    """End the process group: SIGTERM to the guard, which ends the rest; SIGKILL to whoever is left after that."""
    if server.alive:
        os.kill(server.pid, signal.SIGTERM)
        deadline = time.monotonic() + _STOP_SECONDS
        while server.alive and time.monotonic() < deadline:
            time.sleep(0.1)
    # a guard that was itself killed leaves its group behind
    if server.alive or _group(server):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(server.pid, signal.SIGKILL)
        deadline = time.monotonic() + _STOP_SECONDS
        while (server.alive or _group(server)) and time.monotonic() < deadline:
            time.sleep(0.05)


def failure(server: Server, what: str, *, ended: bool = True) -> StartFailure:
    """The error for a server that did not start or stay: recognised cause, argv, last log lines, remedy.

    ``ended`` False: it was still running and we ended it, so its exit status says nothing.
    """
    text = plain(server.log.read_text(encoding="utf-8", errors="replace")) if server.log.exists() else ""
    known = (_by_exit(server) if ended else None) or classify(text)
    tail = "\n".join(f"  {line[:300]}" for line in text.strip().splitlines()[-_TAIL_LINES:])
    code = _codes.get(server.pid) if ended else None
    evidence = [f"command: {' '.join(server.argv)}", f"log: {server.log}"]
    evidence += [f"exit code: {code}"] if code is not None else []
    evidence += [f"seen: {known.line}"] if known and known.line else []
    evidence += [f"last lines:\n{tail}"] if tail else ["the log is empty"]
    facts = known.facts if known else {"remedy": "read the log named above"}
    return StartFailure(f"{server.engine} {what}{f': {known.cause}' if known else ''}", evidence="\n".join(evidence), **facts)


def oom_kills() -> int:
    """How many processes the kernel has killed for lack of memory since boot; 0 where it does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _by_exit(server: Server) -> Failure | None:
    """What the exit status alone tells: killed for memory, or from outside; None when the log has to say why."""
    code = _codes.get(server.pid)
    if code not in (-signal.SIGKILL, 128 + signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM):
        return None
    if code == 128 + signal.SIGKILL and oom_kills() > _kills.get(server.pid, 0):
        return Failure("out-of-memory", "the kernel killed it for lack of memory", "a smaller model, context or KV cache", "")
    number = abs(code) % 128
    cause = f"a process outside this pipeline killed it ({signal.Signals(number).name})"
    return Failure("killed", cause, "find out who did (dmesg, the container's memory limit), then start it again", "")


def _resident(process: psutil.Process) -> int:
    """Proportional set size in bytes where the system tells it (Linux), else the resident set."""
    with contextlib.suppress(psutil.Error, AttributeError):
        return int(process.memory_full_info().pss)
    with contextlib.suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0


def _group(server: Server) -> list[int]:
    """Living processes of the server's group or session, the guard not counted; its number cannot be reused while there are any."""
    found = []
    for process in psutil.process_iter(["pid", "status", "create_time"]):
        with contextlib.suppress(ProcessLookupError, PermissionError, psutil.Error):
            living = process.pid != server.pid and process.info["status"] != psutil.STATUS_ZOMBIE
            mine = living and server.pid in (os.getpgid(process.pid), os.getsid(process.pid))
            if mine and process.info["create_time"] > server.started - _SAME_START:
                found.append(process.pid)
    return found


def plain(log: str) -> str:
    """A log without its colours."""
    return _COLOUR.sub("", log)


def classify(log: str) -> Failure | None:
    """The first row of the table that matches any line; rows are ordered from specific to general."""
    lines = plain(log).splitlines()
    for pattern, failure in _failures():
        for line in lines:
            if found := pattern.search(line):
                return replace(failure, line=line.strip()[:400], numbers=tuple(float(text) for text in found.groups() if text))
    return None


def end_of(log: Path, most: int) -> str:
    """The last bytes of a log, at most so many, as text."""
    with log.open("rb") as handle:
        handle.seek(max(0, log.stat().st_size - most))
        return handle.read().decode("utf-8", errors="replace")


def phase(log: str) -> str:
    """The last milestone in the log; "starting" before the first."""
    for line in reversed(plain(log).splitlines()):
        for pattern, words in _milestones():
            if found := pattern.search(line):
                return words.format(found[1]) if "{}" in words else words
    return "starting"


@cache
def _failures() -> list[tuple[re.Pattern[str], Failure]]:
    rows = read_json(Path(__file__).with_name("failures.json"))
    return [(re.compile(row["pattern"]), Failure(row["name"], row["cause"], row["remedy"])) for row in rows]


@cache
def _milestones() -> list[tuple[re.Pattern[str], str]]:
    # {} takes what the pattern's group found; vLLM 0.32, llama.cpp b11549, Ollama, SGLang 0.5
    rows = read_json(Path(__file__).with_name("milestones.json"))
    return [(re.compile(row["pattern"]), row["words"]) for row in rows]
