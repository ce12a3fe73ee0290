"""One run at a time per name: a lock with its owner, taken over when the owner is gone.

    with lock.held(run, "export"):
        ...

``lock.json`` in the run folder names the owners: process, start time, host and boot. It is only read or changed under a brief
flock of ``.lock``, so two processes cannot both find it stale and take it. A process that a holder started (a notebook's kernel)
joins the lock through the environment instead of waiting for its own parent. Not covered: file systems without flock.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import psutil

from pipeline.errors import RunLocked
from pipeline.runs.files import disk_errors_named, sweep, write_atomic
from pipeline.runs.folder import RunFolder

log = logging.getLogger(__name__)
VARIABLE = "GRANITE_PIPELINE_LOCK"
FILES = _RECORD, _GUARD = "lock.json", ".lock"
# start times are read against the wall clock, which may be set; a pid that is used again starts much later
_SAME_START = 5.0
# a kernel whose parent was killed notices within a second or two and ends
_ORPHAN_SECONDS = 15.0
_SWEPT = ("", "report", "reference", "adapter")


@dataclass(frozen=True)
class Process:
    """A process so that it cannot be mistaken for a later one with its number."""

    pid: int
    started: float
    host: str
    boot: str

    @classmethod
    def me(cls) -> "Process":
        """This process."""
        return cls(os.getpid(), psutil.Process().create_time(), socket.gethostname(), _boot())

    @property
    def alive(self) -> bool:
        """Whether it still runs; one on another machine, which cannot be asked, counts as alive."""
        if self.host != socket.gethostname():
            return True
        if self.boot != _boot():
            return False
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.pid)
            return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - self.started) < _SAME_START
        return False


@dataclass(frozen=True)
class Holder:
    """Who holds a run: what it does, since when, under which token; the first owner took it, the others joined."""

    verb: str
    since: str
    token: str
    owners: tuple[Process, ...]

    @property
    def alive(self) -> bool:
        """Whether any owner still runs."""
        return any(owner.alive for owner in self.owners)

    def describe(self) -> str:
        """For people: verb, process, machine, age."""
        owner = next((o for o in self.owners if o.alive), self.owners[0])
        seconds = (datetime.now(UTC) - datetime.fromisoformat(self.since)).total_seconds()
        units = ((86400, "days"), (3600, "h"), (60, "min"))
        age = next((f"{seconds / size:.1f} {unit}" for size, unit in units if seconds >= size), f"{seconds:.0f} s")
        return f"{self.verb}, process {owner.pid} on {owner.host}, since {self.since} ({age})"


def holder(run: RunFolder) -> Holder | None:
    """Who is recorded as holding the run, dead or alive; None when no one is or the record cannot be read."""
    try:
        data = json.loads((run.path / _RECORD).read_text(encoding="utf-8"))
        owners = tuple(Process(**owner) for owner in data["owners"])
        datetime.fromisoformat(str(data["since"]))
        return Holder(str(data["verb"]), str(data["since"]), str(data["token"]), owners) if owners else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def held(run: RunFolder, verb: str) -> Iterator[None]:
    """Hold the run while inside; RunLocked names the owner when another process has it.

    Whoever takes the lock afresh removes what killed writers left half done. Entering again in this process only counts; a
    process that it started joins as another owner.
    """
    run.require_inside()
    key = (os.getpid(), str(run.path.absolute()))
    with _threads:
        if key not in _depth:
            with disk_errors_named(run.path):
                _before[key] = _announce(_enter(run, verb))
        _depth[key] = _depth.get(key, 0) + 1
    try:
        yield
    finally:
        with _threads:
            _depth[key] -= 1
            if not _depth[key]:
                del _depth[key]
                _announce(_before.pop(key))
                _leave(run)


# how often this process has entered each run, and what the variable was before; a forked child counts for itself
_depth: dict[tuple[int, str], int] = {}
_before: dict[tuple[int, str], str | None] = {}
_threads = threading.Lock()


def _announce(token: str | None) -> str | None:
    """Set or unset the variable that processes started from here join by; returns what it was."""
    before = os.environ.get(VARIABLE)
    if token is None:
        os.environ.pop(VARIABLE, None)
    else:
        os.environ[VARIABLE] = token
    return before


def _enter(run: RunFolder, verb: str) -> str:
    run.path.mkdir(parents=True, exist_ok=True)
    me, deadline = Process.me(), time.monotonic() + _ORPHAN_SECONDS
    while True:
        with guarded(run.path):
            there = holder(run)
            if there is not None and there.alive and there.token == os.environ.get(VARIABLE):
                _write(run, replace(there, owners=(*there.owners, me)))
                return there.token
            # a record that names no living process but this one, which holds nothing, could not be removed back then
            if there is None or all(_is_me(owner) for owner in there.owners if owner.alive):
                return _take(run, verb, me, None if there and there.alive else there)
        # whoever took the lock is gone and processes that it started are left: they notice and end
        if there.owners[0].alive or time.monotonic() > deadline:
            evidence, remedy = f"held by: {there.describe()}", "wait for it, stop it, or use another --name"
            if there.owners[0].host != socket.gethostname():
                remedy += f"; if that machine is gone for good, remove {run.path / _RECORD}"
            raise RunLocked(f"run {run.name} is in use", evidence=evidence, remedy=remedy)
        time.sleep(0.2)


def _take(run: RunFolder, verb: str, me: Process, dead: Holder | None) -> str:
    if dead is not None:
        log.warning("run %s: taken over from %s, which is gone", run.name, dead.describe())
    taken = Holder(verb, datetime.now(UTC).isoformat(timespec="seconds"), uuid.uuid4().hex, (me,))
    _write(run, taken)
    freed = sum(sweep(run.path / part) for part in _SWEPT)
    if freed:
        log.info("run %s: %.1f MiB that an interrupted run left half done were removed", run.name, freed / 2**20)
    return taken.token


def _is_me(owner: Process) -> bool:
    return (owner.pid, owner.host) == (os.getpid(), socket.gethostname())


def _leave(run: RunFolder) -> None:
    with guarded(run.path):
        there = holder(run)
        owners = [owner for owner in there.owners if owner.alive and not _is_me(owner)] if there else []
        if there is None or not owners:
            (run.path / _RECORD).unlink(missing_ok=True)
        elif len(owners) < len(there.owners):
            with contextlib.suppress(OSError):  # a full disk; the entry counts for nothing once this process has ended
                _write(run, replace(there, owners=tuple(owners)))


def _write(run: RunFolder, holder: Holder) -> None:
    write_atomic(run.path / _RECORD, json.dumps(asdict(holder), indent=2))


@contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """The milliseconds in which one process looks at a record of a run and changes it; the kernel ends it with the process."""
    with (folder / _GUARD).open("a") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        yield


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""
