"""Two machines on one: namespaces of their own for host name, PIDs, mounts and network, and a folder that they share."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil
import pytest

_UNSHARE = ("unshare", "--uts", "--pid", "--mount", "--net", "--fork", "--kill-child", "--mount-proc")
_NAMED = 'echo "$0" > /proc/sys/kernel/hostname; exec "$@"'


def require_machines() -> None:
    """Skip the test where no namespaces can be made."""
    made = shutil.which("unshare") and subprocess.run([*_UNSHARE, "true"], capture_output=True).returncode == 0
    if not made:
        pytest.skip("only root can make a second machine of namespaces")


class Machine:
    """One process on a machine called ``host``; None: in a container of this machine's name. stderr goes with stdout."""

    def __init__(self, host: str | None, code: str, arguments: Sequence[object] = (), **environment: str) -> None:
        named = ("sh", "-c", _NAMED, host) if host else ()
        command = [*_UNSHARE, *named, sys.executable, "-c", code, *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **environment}
        )
        self.said = ""

    def until(self, words: str) -> None:
        """Read what it says up to a line with these words; AssertionError when it ends before."""
        assert self.process.stdout
        for line in self.process.stdout:
            self.said += line
            if words in line:
                return
        raise AssertionError(f"ended with {self.process.wait()} before {words!r}:\n{self.said}")

    def send(self, number: signal.Signals) -> None:
        """Send a signal to what runs on the machine."""
        for inner in psutil.Process(self.process.pid).children():
            inner.send_signal(number)

    def off(self) -> None:
        """Switch the machine off."""
        self.process.kill()
        self.end()

    def end(self) -> int:
        """Wait for its end; the exit code."""
        assert self.process.stdout
        self.said += self.process.stdout.read()
        self.process.stdout.close()
        return self.process.wait()


@contextmanager
def machine(host: str | None, code: str, arguments: Sequence[object] = (), **environment: str) -> Iterator[Machine]:
    """As :class:`Machine`, switched off in the end."""
    made = Machine(host, code, arguments, **environment)
    try:
        yield made
    finally:
        if made.process.poll() is None:
            made.off()
        elif made.process.stdout:
            made.process.stdout.close()
