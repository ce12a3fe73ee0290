"""One run at a time per name: a lock with its owner, taken over when the owner is gone.

    with lock.held(run, "export"):
        ...

``lock.json`` in the run folder names the owners: process, start time, host, boot and PID namespace. It is only read or changed
under a brief flock of ``.lock``, so two processes cannot both find it stale and take it. A process that a holder started (a
notebook's kernel) joins the lock through the environment instead of waiting for its own parent.

An owner whose process can be asked is judged by it. Any other - on another machine, in another container, before a restart, also
under this one's host name - is judged by the lease (:mod:`pipeline.runs.lease`). Not covered: file systems without flock.
"""

import contextlib
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
from functools import cache
from pathlib import Path

import psutil

from pipeline.errors import Interrupted, LeaseLost, RunLocked
from pipeline.runs import lease
from pipeline.runs.files import disk_errors_named, sweep, write_atomic
from pipeline.runs.folder import RunFolder
from pipeline.runs.lease import FILES, guarded

__all__ = ["FILES", "VARIABLE", "Holder", "Process", "guarded", "held", "holder", "place"]

log = logging.getLogger(__name__)
VARIABLE = "GRANITE_PIPELINE_LOCK"
# start times are read against the wall clock, which may be set; a pid that is used again starts much later
_SAME_START = 5.0
# a kernel whose parent was killed notices within a second or two and ends
_ORPHAN_SECONDS = 15.0
_TOLD_SECONDS = 60.0
_SWEPT = ("", "report", "reference", "adapter")


@dataclass(frozen=True)
class Process:
    """A process so that it cannot be mistaken for a later one with its number, nor for one of another machine or container."""

    pid: int
    started: float
    host: str
    boot: str
    namespace: str = ""  # of its PID; an older version wrote none

    @classmethod
    def me(cls) -> "Process":
        """This process."""
        return cls(os.getpid(), psutil.Process().create_time(), socket.gethostname(), _boot(), _namespace())

    @property
    def here(self) -> bool:
        """Whether its number means the same here, so that it can be asked: not on another machine, in another container or boot."""
        return (self.host, self.boot) == (socket.gethostname(), _boot()) and self.namespace in ("", _namespace())

    @property
    def runs(self) -> bool:
        """Whether it can be asked and still runs."""
        if not self.here:
            return False
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.pid)
            return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - self.started) < _SAME_START
        return False

    @property
    def is_me(self) -> bool:
        """Whether it is this very process."""
        return self.here and self.pid == os.getpid()


@dataclass(frozen=True)
class Holder:
    """Who holds a run: what it does, since when, under which token; the first owner took it, the others joined.

    ``last`` is the last sign of the owners that cannot be asked, None where all can.
    """

    verb: str
    since: str
    token: str
    owners: tuple[Process, ...]
    last: lease.Sign | None = None

    @property
    def alive(self) -> bool:
        """Whether any owner still runs or, where it cannot be asked, has given a sign within the lease."""
        return any(owner.runs for owner in self.owners) or (self.last is not None and self.last.ago <= lease.LEASE)

    def describe(self) -> str:
        """For people: verb, process, machine and age; of an owner that cannot be asked, when it last gave a sign."""
        owner = next((o for o in self.owners if o.runs), self.owners[0])
        said = f"{self.verb}, process {owner.pid} on {owner.host}, since {self.since}"
        if owner.here or self.last is None:
            return f"{said} ({_age((datetime.now(UTC) - datetime.fromisoformat(self.since)).total_seconds())})"
        where = ", in another container or before a restart" if owner.host == socket.gethostname() else ""
        return f"{said}{where}, renewed {_age(max(0.0, self.last.ago))} ago"

    def to_json(self) -> str:
        """The record."""
        return json.dumps({name: value for name, value in asdict(self).items() if name != "last"}, indent=2)


def _age(seconds: float) -> str:
    units = ((86400, "days"), (3600, "h"), (60, "min"))
    return next((f"{seconds / size:.1f} {unit}" for size, unit in units if seconds >= size), f"{seconds:.0f} s")


def holder(run: RunFolder) -> Holder | None:
    """Who is recorded as holding the run, dead or alive; None when no one is or the record cannot be read."""
    try:
        data = json.loads((run.path / lease.RECORD).read_text(encoding="utf-8"))
        owners = tuple(Process(**owner) for owner in data["owners"])
        datetime.fromisoformat(str(data["since"]))
        last = None if all(owner.here for owner in owners) else lease.sign(run.path)
        return Holder(str(data["verb"]), str(data["since"]), str(data["token"]), owners, last) if owners else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def held(run: RunFolder, verb: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the run while inside; RunLocked names the owner when another process has it.

    With ``wait`` an owner that cannot be asked - on another machine, say - is waited for, until it ends or its lease does.
    Whoever takes the lock afresh removes what killed writers left half done. Entering again in this process only counts; a
    process that it started joins as another owner. LeaseLost when another process has taken the run over from this one: on
    entering again, on publishing anything, and in place of an error that may come of it.
    """
    run.require_inside()
    key = (os.getpid(), str(run.path.absolute()))
    with _threads:
        if key in _entered:
            lease.require_held(run.path)
        else:
            with disk_errors_named(run.path):
                token, me = _enter(run, verb, wait)
            _entered[key] = _Entered(token, me, _announce(token), lease.begin(run.path, token))
        _entered[key].depth += 1
    try:
        yield
    except Exception as error:
        lost = None if isinstance(error, LeaseLost | Interrupted) else lease.lost(run.path)
        if lost is None:
            raise
        raise lost from error
    finally:
        with _threads:
            entered = _entered[key]
            entered.depth -= 1
            if not entered.depth:
                del _entered[key]
                _announce(entered.before)
                lease.end(run.path, entered.ended)
                _leave(run, entered)


@dataclass
class _Entered:
    """How this process entered a run, how often, what the variable was before, and what ends the renewals."""

    token: str
    me: Process
    before: str | None
    ended: threading.Event
    depth: int = 0


# by process and folder: a forked child counts for itself
_entered: dict[tuple[int, str], _Entered] = {}
_threads = threading.Lock()


def _announce(token: str | None) -> str | None:
    """Set or unset the variable that processes started from here join by; returns what it was."""
    before = os.environ.get(VARIABLE)
    if token is None:
        os.environ.pop(VARIABLE, None)
    else:
        os.environ[VARIABLE] = token
    return before


def _enter(run: RunFolder, verb: str, wait: bool) -> tuple[str, Process]:
    run.path.mkdir(parents=True, exist_ok=True)
    me, begun, told, watch = Process.me(), time.monotonic(), float("-inf"), lease.Watch()
    while True:
        with guarded(run.path):
            there = holder(run)
            if there is not None and there.alive and there.token == os.environ.get(VARIABLE):
                _write(run, replace(there, owners=(*there.owners, me)))
                return there.token, me
            if there is None or _free(there, watch):
                return _take(run, verb, me, there), me
        now, nearby = time.monotonic(), any(owner.runs for owner in there.owners)
        if nearby:
            # whoever took the lock is gone and processes that it started are left: they notice and end
            if there.owners[0].runs or now - begun > _ORPHAN_SECONDS:
                raise _locked(run, there)
        elif there.alive and not wait:
            raise _locked(run, there)
        elif now - told > _TOLD_SECONDS:
            told = now
            doing = (
                "waiting for it; Ctrl-C ends that" if there.alive else "looking whether it gives a sign, else it is taken over"
            )
            log.warning("run %s is held by: %s; %s", run.name, there.describe(), doing)
        time.sleep(0.2 if nearby else lease.LEASE / 30)


def _free(there: Holder, watch: lease.Watch) -> bool:
    """Whether no owner is left. A living one that is this process, which holds nothing, could not be removed back then."""
    away_gone = there.last is None or watch.gone(there.last)
    return away_gone and all(owner.is_me for owner in there.owners if owner.runs)


def _locked(run: RunFolder, there: Holder) -> RunLocked:
    remedy = "wait for it, stop it, or use another --name"
    if not any(owner.runs for owner in there.owners):
        remedy += f"; it is taken over {lease.LEASE:.0f} s after the last sign of that machine"
    return RunLocked(f"run {run.name} is in use", evidence=f"held by: {there.describe()}", remedy=remedy)


def _take(run: RunFolder, verb: str, me: Process, before: Holder | None) -> str:
    if before is not None and not any(owner.is_me for owner in before.owners):
        log.warning("run %s: taken over from %s, which is gone", run.name, before.describe())
    taken = Holder(verb, datetime.now(UTC).isoformat(timespec="seconds"), uuid.uuid4().hex, (me,))
    _write(run, taken)
    freed = sum(sweep(run.path / part) for part in _SWEPT)
    if freed:
        log.info("run %s: %.1f MiB that an interrupted run left half done were removed", run.name, freed / 2**20)
    return taken.token


def _leave(run: RunFolder, entered: _Entered) -> None:
    with guarded(run.path):
        there = holder(run)
        if there is None:
            (run.path / lease.RECORD).unlink(missing_ok=True)  # a damaged one
        elif there.token == entered.token:  # else it is another's by now
            others = tuple(owner for owner in there.owners if owner != entered.me and (owner.runs or not owner.here))
            if not others:
                (run.path / lease.RECORD).unlink(missing_ok=True)
            elif len(others) < len(there.owners):
                with contextlib.suppress(OSError):  # a full disk; the entry counts for nothing once this process has ended
                    _write(run, replace(there, owners=others))


def _write(run: RunFolder, holder: Holder) -> None:
    write_atomic(run.path / lease.RECORD, holder.to_json())


@cache
def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def place() -> str:
    """Where the number of a process means the same: boot and PID namespace; empty where the system does not tell them."""
    return f"{_boot()} {_namespace()}".strip()


def _namespace() -> str:
    """Which PID namespace this process is in: containers of one machine, and of one host name, have each their own."""
    with contextlib.suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return ""
