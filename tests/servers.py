"""Real servers for tests: processes of their own group, on free ports, ended with the test."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

# llama.cpp's server with a chat template of the test's choosing
LLAMA = """
import sys, time, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.port, p.n_ctx, p.n_parallel, p.use_jinja, p.warmup = sys.argv[1], int(sys.argv[2]), 4096, 1, True, False
p.chat_template = open(sys.argv[3], encoding="utf-8").read()
server = xllamacpp.Server(p)
time.sleep(3600)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Process:
    """A server as a process group of its own; ended with the test."""

    def __init__(self, code: str, *arguments: object, log: Path) -> None:
        self.port, self.log = free_port(), log
        argv = [sys.executable, "-c", code, str(arguments[0]), str(self.port), *map(str, arguments[1:])]
        with log.open("wb") as out:
            self.process = subprocess.Popen(argv, stdout=out, stderr=out, start_new_session=True)

    def url(self, timeout: float) -> str:
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if self.process.poll() is not None:
                pytest.fail(f"server ended with {self.process.returncode}: {self.log.read_text()[-2000:]}")
            try:
                if httpx.get(f"http://127.0.0.1:{self.port}/health", timeout=2).status_code == 200:
                    return f"http://127.0.0.1:{self.port}"
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        pytest.fail(f"server not ready: {self.log.read_text()[-2000:]}")

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def llama(gguf: Path, template: str, folder: Path) -> Process:
    """llama.cpp on a GGUF, with this chat template."""
    path = folder / "template.jinja"
    path.write_text(template, encoding="utf-8")
    return Process(LLAMA, gguf, path, log=folder / "llama.log")
