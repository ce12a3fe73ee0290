"""The supervisor with real processes: a small HTTP server stands in for an engine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest

from pipeline.engines.base import Launch
from pipeline.errors import EngineError, EnvironmentFailure, StartFailure
from pipeline.net.loopback import claim, holder
from pipeline.serve import records, server
from pipeline.serve.records import Record

# answers /health, and keeps a child of its own, as vLLM does
SERVER = """
import subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class H(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *a): pass
print("listening", flush=True)
HTTPServer(("127.0.0.1", int(sys.argv[1])), H).serve_forever()
"""


def _launch(tmp_path: Path, code: str, port: int = 0) -> Launch:
    port = claim("127.0.0.1", port)
    script = tmp_path / "engine.py"
    script.write_text(textwrap.dedent(code))
    return Launch("fake", (sys.executable, str(script), str(port)), {"MARK": "1"}, f"http://127.0.0.1:{port}", "/health", "m")


def _quiet(_: str) -> None:
    return


def _gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        alive = [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]
        if not alive:
            return True
        time.sleep(0.1)
    return False


def _family(pid: int) -> list[int]:
    guard = psutil.Process(pid)
    return [pid, *(p.pid for p in guard.children(recursive=True))]


def _wait(what: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert what()


def test_start_wait_and_stop_leaves_no_process_and_no_port(tmp_path: Path) -> None:
    launch = _launch(tmp_path, SERVER)
    process = server.start(launch, tmp_path / "log", owner=None)
    assert server.wait_ready(process, 20, _quiet) > 0
    family = _family(process.pid)
    assert len(family) == 3
    assert process.memory_gib() > 0
    server.stop(process)
    assert _gone(family)
    with pytest.raises(httpx.ConnectError):
        httpx.get(launch.url)
    assert not process.alive


def test_the_group_ends_with_its_owner_even_when_that_is_killed(tmp_path: Path) -> None:
    launch = _launch(tmp_path, SERVER)
    owner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    process = server.start(launch, tmp_path / "log", owner=owner.pid)
    server.wait_ready(process, 20, _quiet)
    family = _family(process.pid)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    _wait(lambda: not process.alive or psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE)
    assert _gone(family)


def test_a_killed_guard_leaves_nobody_behind(tmp_path: Path) -> None:
    process = server.start(_launch(tmp_path, SERVER), tmp_path / "log", owner=os.getpid())
    server.wait_ready(process, 20, _quiet)
    family = _family(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    _wait(lambda: not process.alive)
    server.stop(process)
    assert _gone(family)
    found = server.failure(process, "died while serving")
    assert (found.kind, "exit code: -9" in found.evidence) == ("killed", True)


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGKILL, "killed"), (signal.SIGTERM, "killed"), (signal.SIGSEGV, "")])
def test_a_signal_from_outside_is_told_from_a_crash(number: int, kind: str, tmp_path: Path) -> None:
    process = server.start(_launch(tmp_path, f"import os; os.kill(os.getpid(), {int(number)})"), tmp_path / "log", owner=None)
    with pytest.raises(StartFailure) as caught:
        server.wait_ready(process, 20, _quiet)
    assert caught.value.kind == kind
    assert f"exit code: {128 + number}" in caught.value.evidence


@pytest.mark.parametrize("code", [0, 3])
def test_an_exit_before_ready_is_a_failure_whatever_the_code(tmp_path: Path, code: int) -> None:
    launch = _launch(tmp_path, f"import sys; print('unknown model architecture: x'); sys.exit({code})")
    process = server.start(launch, tmp_path / "log", owner=None)
    with pytest.raises(EngineError, match=r"ended before it was ready: this llama\.cpp is older than the model"):
        server.wait_ready(process, 20, _quiet)


def test_a_time_out_ends_the_group(tmp_path: Path) -> None:
    process = server.start(_launch(tmp_path, "import time; time.sleep(600)"), tmp_path / "log", owner=None)
    with pytest.raises(EngineError, match="was not ready after 1 s"):
        server.wait_ready(process, 1, _quiet)
    assert not process.alive


def test_running_forgets_dead_servers(tmp_path: Path) -> None:
    process = server.start(_launch(tmp_path, SERVER), tmp_path / "log", owner=os.getpid())
    record = records.save(tmp_path / "servers", Record(process.engine, process))
    assert records.running(tmp_path / "servers") == [process]
    server.stop(process)
    assert records.running(tmp_path / "servers") == []
    assert not record.exists()


def test_ending_a_server_leaves_the_record_of_another_one(tmp_path: Path) -> None:
    first, second = (
        server.start(_launch(tmp_path, "import time; time.sleep(600)"), tmp_path / "log", owner=os.getpid()) for _ in "ab"
    )
    records.save(tmp_path / "servers", Record(second.engine, second))
    records.end(first, tmp_path / "servers")
    assert not first.alive
    assert records.running(tmp_path / "servers") == [second]
    records.end(second, tmp_path / "servers")
    assert list((tmp_path / "servers").iterdir()) == []


def test_a_taken_port_names_its_holder(tmp_path: Path) -> None:
    launch = _launch(tmp_path, SERVER)
    process = server.start(launch, tmp_path / "log", owner=os.getpid())
    server.wait_ready(process, 20, _quiet)
    port = int(launch.url.rsplit(":", 1)[1])
    with pytest.raises(EnvironmentFailure, match=f"port {port} on 127.0.0.1 is not free") as caught:
        claim("127.0.0.1", port)
    assert "engine.py" in caught.value.evidence
    assert holder(port)
    server.stop(process)
    assert claim("127.0.0.1", port) == port


def test_an_engine_does_not_get_our_package_on_its_path_and_a_module_of_ours_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/its/own")
    launch = _launch(tmp_path, "import os; print('path:', os.environ['PYTHONPATH'])")
    process = server.start(launch, tmp_path / "log", owner=None)
    _wait(lambda: not process.alive, 60)
    assert (tmp_path / "log").read_text() == "path: /its/own\n"
    words = (sys.executable, "-m", "pipeline.engines.llamacpp_server", "--help")
    ours = server.start(replace(launch, argv=words), tmp_path / "ours", owner=None)
    _wait(lambda: not ours.alive, 60)
    assert "usage: xllamacpp_server" in (tmp_path / "ours").read_text()
