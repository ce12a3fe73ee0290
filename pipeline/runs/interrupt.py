"""Ctrl-C in long work: the first one lets the current step finish and what was done be saved, the second leaves at once.

with interrupt.graceful(log):
    for step in steps:
        ...
        if interrupt.asked():
            save(); interrupt.leave_if_asked("12 of 40 steps are kept")
"""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pipeline.errors import Interrupted

_REMEDY = "run the same command again to go on from there"
_asked = False
_depth = 0


def asked() -> bool:
    """Whether the user has asked to stop."""
    return _asked


def ask() -> None:
    """Ask to stop, as Ctrl-C does: for a process that learns of it in another way."""
    global _asked
    _asked = True


def leave_if_asked(kept: str) -> None:
    """Raise Interrupted, saying what was kept, when the user has asked to stop."""
    if _asked:
        raise Interrupted(f"stopped as asked; {kept}", remedy=_REMEDY)


@contextmanager
def graceful(log: logging.Logger) -> Iterator[None]:
    """Inside, the first SIGINT only makes :func:`asked` true; the second raises KeyboardInterrupt where the code is.

    Nested uses are one; in a thread, where signals do not arrive, nothing changes.
    """
    global _asked, _depth
    if threading.current_thread() is not threading.main_thread() or _depth:
        yield
        return

    def first(number: int, frame: FrameType | None) -> None:
        global _asked
        if _asked:
            signal.default_int_handler(number, frame)
        _asked = True
        log.warning("stopping after this step, what is done will be saved; press Ctrl-C again to leave now")

    before = signal.signal(signal.SIGINT, first)
    _asked, _depth = False, 1
    try:
        yield
    finally:
        _asked, _depth = False, 0
        signal.signal(signal.SIGINT, before)
