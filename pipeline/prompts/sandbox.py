"""Chat templates in a process of their own: one that loops for ever or fills the memory ends in an error, not in a hang.

Jinja's sandbox keeps a template from Python's internals; it does not limit time or memory. The process is started once and
answers thousands of renderings. Our own embedded template needs none of this and is rendered here.
"""

import atexit
import contextlib
import os
import pickle
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError
from pipeline.prompts import sandbox_worker
from pipeline.prompts.sandbox_worker import HEADER, OK, SYNTAX, TOO_MUCH

SECONDS = 3.0
LARGEST_SOURCE = 1 << 20
_START_SECONDS = 60.0
_REMEDY = "use the template published with the model; this one may be made to do harm"
_ROOM = 16 << 20  # characters a template may add to what it is given
_TRUSTED = frozenset({(Path(__file__).parent / "granite_embedded.jinja").read_text(encoding="utf-8").rstrip("\n")})


def render(source: str, context: Mapping[str, Any]) -> str:
    """The text a template makes; ModelError when it does not parse, refuses the messages, or takes too much of anything."""
    if len(source) > LARGEST_SOURCE:
        raise ModelError(f"the chat template has {len(source)} characters; more than {LARGEST_SOURCE} is no chat template")
    if source.rstrip("\n") in _TRUSTED:
        return _text(*sandbox_worker.render(source, dict(context), sys.maxsize))
    request = pickle.dumps((source, dict(context), _ROOM + 8 * _size(context)))
    with _lock:
        return _text(*_worker().ask(request))


def _text(status: bytes, text: str) -> str:
    if status == OK:
        return text
    if status == SYNTAX:
        raise ModelError(f"the chat template does not parse, {text}")
    if status == TOO_MUCH:
        raise ModelError(f"the chat template {text}", remedy=_REMEDY)
    raise ModelError(f"the chat template refuses these messages: {text}")


def _size(value: Any) -> int:
    """Characters of all texts in a value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_size(part) for pair in value.items() for part in pair)
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 8


# where Python finds its own libraries
_LIBRARIES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH")


class _Worker:
    """The rendering process and its two pipes."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
        kept = {name: os.environ[name] for name in _LIBRARIES if name in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.prompts.sandbox_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**kept, "PYTHONPATH": path, "PATH": os.defpath, "PYTHONUTF8": "1"},
            start_new_session=True,  # Ctrl-C is for us to answer
        )
        if self._read(1, _START_SECONDS) != OK:
            raise ModelError("the process that renders chat templates does not start", remedy="make doctor")

    def ask(self, request: bytes) -> tuple[bytes, str]:
        """Send one request and wait for its answer; the process is ended when that takes too long or is interrupted."""
        try:
            answer = self._answer(request)
        except BaseException:
            self.end()  # an answer left in the pipe would be taken for the next one
            raise
        if answer is not None:
            return answer
        slow = self.process.poll() is None
        self.end()
        return TOO_MUCH, f"takes longer than {SECONDS:.0f} s" if slow else "ended the process that renders it"

    def _answer(self, request: bytes) -> tuple[bytes, str] | None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(HEADER.pack(len(request)) + request)
            self.process.stdin.flush()
        head = self._read(1 + HEADER.size, SECONDS)
        raw = None if head is None else self._read(HEADER.unpack(head[1:])[0], SECONDS)
        return None if head is None or raw is None else (head[:1], raw.decode("utf-8", "surrogatepass"))

    def _read(self, count: int, seconds: float) -> bytes | None:
        """Exactly so many bytes; None when they did not come in time, or the process ended."""
        assert self.process.stdout is not None
        handle, found, deadline = self.process.stdout.fileno(), bytearray(), time.monotonic() + seconds
        while len(found) < count:
            ready, _, _ = select.select([handle], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return None
            part = os.read(handle, min(count - len(found), 1 << 20))
            if not part:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(1)
                return None
            found += part
        return bytes(found)

    def end(self) -> None:
        """End the process and close its pipes."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                if pipe:
                    pipe.close()


_lock = threading.Lock()
_running: list[_Worker] = []


def _worker() -> _Worker:
    """The running process, or a new one; a forked child does not share its parent's."""
    if _running and (_running[0].owner != os.getpid() or _running[0].process.poll() is not None):
        _end()
    if not _running:
        _running.append(_Worker())
    return _running[0]


@atexit.register
def _end() -> None:
    while _running:
        worker = _running.pop()
        if worker.owner == os.getpid():
            worker.end()
