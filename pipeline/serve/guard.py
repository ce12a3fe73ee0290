"""Started by ``pipeline.serve.server`` as a file of its own: run a server as the leader of its own process group and end the group with its owner.

A server must not outlive what started it, even when that is killed with SIGKILL and cannot clean up. The guard watches
the owner and ends the whole group - vLLM's engine processes included - when the owner is gone or the server exits.
"""

import argparse
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time

import psutil

_POLL_SECONDS = 0.5


def main(argv: list[str]) -> int:
    """Run the command after ``--``; returns its exit code (128 + n after signal n)."""
    parser = argparse.ArgumentParser(prog="pipeline.serve.guard")
    parser.add_argument("--owner", type=int, default=0, help="end when this process is gone; 0: run until stopped")
    parser.add_argument("command", nargs="+")
    args = parser.parse_args(argv)
    try:
        owner = psutil.Process(args.owner) if args.owner else None
    except psutil.NoSuchProcess:
        return 128 + signal.SIGTERM
    child = subprocess.Popen(args.command, stdin=subprocess.DEVNULL, preexec_fn=_end_with_parent)
    # the group's SIGTERM reaches the child as well; the guard stays to see it end and to finish off stragglers
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    while child.poll() is None and not stopping and (owner is None or _living(owner)):
        time.sleep(_POLL_SECONDS)
    _end_group(child)
    code = child.returncode
    return 128 - code if code < 0 else code


def _living(owner: psutil.Process) -> bool:
    """False once the owner has ended, also while nobody has collected its exit status."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return owner.is_running() and owner.status() != psutil.STATUS_ZOMBIE
    return False


def _end_with_parent() -> None:
    """On Linux the kernel ends the server when the guard itself is killed; elsewhere :func:`pipeline.serve.server.stop` sweeps up."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _end_group(child: subprocess.Popen[bytes]) -> None:
    """SIGTERM to everyone in the group, a little time, then SIGKILL to whoever is left."""
    me, group = os.getpid(), os.getpgid(0)
    if group != me:
        raise RuntimeError("the guard must lead its own process group")
    for sent, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 2.0)):
        deadline = time.monotonic() + seconds
        for pid in _others(group, me):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sent)
        while _others(group, me) and time.monotonic() < deadline:
            child.poll()
            time.sleep(0.1)
    child.wait()


def _others(group: int, me: int) -> list[int]:
    found = []
    for process in psutil.process_iter(["pid", "status"]):
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            alive = process.info["status"] != psutil.STATUS_ZOMBIE
            if alive and process.pid != me and os.getpgid(process.pid) == group:
                found.append(process.pid)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
