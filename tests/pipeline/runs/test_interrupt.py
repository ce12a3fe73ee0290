from __future__ import annotations

import logging
import os
import signal
import threading

import pytest

from pipeline.errors import Interrupted
from pipeline.runs import interrupt

log = logging.getLogger(__name__)


def _press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_press_asks_and_the_second_leaves() -> None:
    with pytest.raises(KeyboardInterrupt), interrupt.graceful(log):
        assert not interrupt.asked()
        _press()
        assert interrupt.asked()
        with pytest.raises(Interrupted, match="stopped as asked; step 3 is kept") as caught:
            interrupt.leave_if_asked("step 3 is kept")
        assert caught.value.exit_code == 130
        _press()
    assert not interrupt.asked()


def test_afterwards_a_press_is_what_it_was_before() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interrupt.graceful(log), interrupt.graceful(log):
        _press()
    assert signal.getsignal(signal.SIGINT) is before
    interrupt.leave_if_asked("nothing was asked any more")


def test_in_a_thread_nothing_changes() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with interrupt.graceful(log):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
