"""A run's lock between machines is a lease: its owner renews it, and one that lost it can publish nothing more of the run.

The last sign of an owner is the modification time of ``lock.json``, renewed by a thread every sixth of :data:`LEASE`. An owner
whose process cannot be asked - on another machine, in another container - is gone when there was no sign for that long.

Ages are told by one clock: ``.lock`` is touched and the two times compared, so file servers that stamp files themselves (NFS,
and one machine's disks) need no agreement of clocks. Where each client stamps (Lustre, CephFS) clocks may differ, so an age
alone never condemns: whoever takes over has looked on for a while himself, and seen no renewal (:class:`Watch`).

What is published (:func:`publishing`) is renamed into place under the flock that a takeover needs too, after a look whether the
lock is still this process's. What is left: a file server that takes the flock away from a client it lost, between that look and
the rename.
"""

import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import LeaseLost

log = logging.getLogger(__name__)
# longer than any stall of the owner's Python threads; renewed six times in it
LEASE = 60.0
FILES = RECORD, GUARD = "lock.json", ".lock"
# what says who serves here, not what was made: whoever ends a server notes it
_ASIDE = "servers"
# the token under which this process holds a run, by process (a forked child holds nothing) and folder
_held: dict[tuple[int, Path], str] = {}
_guards = threading.local()


@contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """The milliseconds in which one process looks at a record of a run and changes it; the kernel ends it with the process.

    A thread that is inside may enter again.
    """
    inside: set[Path] = _guards.__dict__.setdefault("folders", set())
    key = folder.resolve()
    if key in inside:
        yield
        return
    with (folder / GUARD).open("a") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        inside.add(key)
        try:
            yield
        finally:
            inside.discard(key)


@dataclass(frozen=True)
class Sign:
    """The last sign of a run's owner: modification time of the record, ns, and its age in seconds on the share's own clock."""

    at: int
    ago: float


def sign(folder: Path) -> Sign:
    """The last sign in a run folder; OSError when no one holds it. Where nothing can be written this machine's clock is taken."""
    # opening asks the file server: a client may remember what it knows of a file for a minute
    with (folder / RECORD).open() as record:
        at = os.fstat(record.fileno()).st_mtime_ns
    now = time.time_ns()
    with suppress(OSError), (folder / GUARD).open() as guard:
        os.utime(guard.fileno())  # without times, so that the server's clock counts
        now = os.fstat(guard.fileno()).st_mtime_ns
    return Sign(at, (now - at) / 1e9)


class Watch:
    """One process's look at an owner that it cannot ask."""

    def __init__(self) -> None:
        self._seen, self._since = 0, 0.0

    def gone(self, last: Sign) -> bool:
        """Whether the owner is: no sign for a lease, and none during the last third of one, in which this process looked on.

        An age that a wrong clock makes too small counts for nothing once a whole lease was looked on.
        """
        if last.at != self._seen:
            self._seen, self._since = last.at, time.monotonic()
        return time.monotonic() - self._since > (LEASE / 3 if last.ago > LEASE else LEASE)


def begin(folder: Path, token: str) -> threading.Event:
    """Renew the lease of a run that this process holds under a token, until the event is set; see :func:`end`."""
    key, ended = (os.getpid(), folder.resolve()), threading.Event()
    _held[key] = token
    threading.Thread(target=_renew, args=(key[1], token, ended), name=f"lease of {folder.name}", daemon=True).start()
    return ended


def end(folder: Path, ended: threading.Event) -> None:
    """This process holds the run no more."""
    ended.set()
    _held.pop((os.getpid(), folder.resolve()), None)


def lost(path: Path) -> LeaseLost | None:
    """The error for a path in a run that this process held and another one has taken over; None where that is not so."""
    if not _held:
        return None
    path = path.parent.resolve() / path.name
    for (pid, folder), token in list(_held.items()):
        inner = path.relative_to(folder).parts if pid == os.getpid() and path.is_relative_to(folder) else None
        if inner is None or inner[:1] == (_ASIDE,) or (there := _record(folder)).get("token") == token:
            continue
        what = f"run {folder.name} was taken over by another process while this one gave no sign of life"
        evidence = f"{'/'.join(inner)} is left as it is" if inner else "nothing more of it is changed from here"
        with suppress(LookupError, TypeError):
            owner = there["owners"][0]
            evidence += f"; now held by: {there['verb']}, process {owner['pid']} on {owner['host']}"
        remedy = "run the same command again when the other one has ended: it goes on from what that one made"
        return LeaseLost(what, evidence=evidence, remedy=remedy)
    return None


def require_held(path: Path) -> None:
    """Raise LeaseLost when a path lies in a run that this process held and another one has taken over; nothing was changed."""
    if error := lost(path):
        raise error


@contextmanager
def publishing(path: Path) -> Iterator[None]:
    """A file or folder gets its final name inside; LeaseLost before that when it lies in a run that this process has lost."""
    place = path.parent.resolve()
    folder = next((run for pid, run in list(_held) if pid == os.getpid() and place.is_relative_to(run)), None)
    if folder is None or not folder.is_dir():
        require_held(path)
        yield
        return
    with guarded(folder):
        require_held(path)
        yield


def _record(folder: Path) -> dict[str, Any]:
    """What the record says; empty when there is none, or no whole one."""
    with suppress(FileNotFoundError, NotADirectoryError, ValueError):
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return record if isinstance(record, dict) and record.get("owners") else {}
    return {}


def _renew(folder: Path, token: str, ended: threading.Event) -> None:
    last, silent = time.monotonic(), False
    while not ended.wait(LEASE / 6):
        try:
            there = _record(folder).get("token")
            if there not in (token, None) and not ended.is_set():
                log.error("run %s was taken over by another process: nothing more of it is published from here", folder.name)
                return
            os.utime(folder / RECORD)
        except OSError as error:
            if not silent and not ended.is_set():
                words = "run %s: its lock cannot be renewed (%s); after %.0f s without, another machine may take the run over"
                log.warning(words, folder.name, error.strerror or error, LEASE)
            silent = True
            continue
        if silent:
            log.warning("run %s: its lock is renewed again, after %.0f s", folder.name, time.monotonic() - last)
        last, silent = time.monotonic(), False
