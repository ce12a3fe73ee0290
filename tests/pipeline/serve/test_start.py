"""Serving against small local HTTP servers: the first token, and what reaches Ollama."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.commands.serve import _target
from pipeline.config import Settings, key_variables, load
from pipeline.engines.base import Launch
from pipeline.engines.ollama import Ollama
from pipeline.engines.vllm.engine import Vllm
from pipeline.errors import EngineError, EnvironmentFailure, StartFailure
from pipeline.machine.named import hardware_from
from pipeline.model.model import Model
from pipeline.planning.plan import Plan, Request
from pipeline.runs.folder import RunFolder
from pipeline.serve import records, server, start
from pipeline.serve.records import Ready, Record
from pipeline.serve.server import Server
from pipeline.serve.start import Endpoint, Target


@dataclass
class Fake:
    """A server that answers every POST with one status and body, and keeps what it was sent."""

    url: str
    status: int = 200
    body: dict[str, Any] = field(default_factory=lambda: {"status": "success"})
    seen: dict[str, Any] = field(default_factory=dict)
    keys: list[str | None] = field(default_factory=list)


@pytest.fixture
def fake() -> Iterator[Fake]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def do_POST(self) -> None:
            found.keys.append(self.headers.get("Authorization"))
            found.seen[self.path] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            data = json.dumps(found.body).encode()
            self.send_response(found.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            return

    web = HTTPServer(("127.0.0.1", 0), Handler)
    found = Fake(f"http://127.0.0.1:{web.server_port}")
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield found
    web.shutdown()
    web.server_close()
    thread.join()


def test_the_plans_parameters_reach_ollama_and_replace_the_modelfiles(fake: Fake, tmp_path: Path) -> None:
    gguf, modelfile = tmp_path / "m.gguf", tmp_path / "Modelfile"
    gguf.write_bytes(b"GGUF")
    modelfile.write_text('FROM ./m.gguf\nPARAMETER num_ctx 131072\nPARAMETER temperature 0\nTEMPLATE """{{ .Prompt }}"""\n')
    request = Request(Model.from_shape("granite-4.0-1b"), hardware_from("cpu-16c-64g"), "serve", "m", {"num_ctx": "3000"})
    said: list[str] = []
    endpoint = Endpoint("ollama", fake.url, "soc")
    start.create_model(endpoint, Target(gguf, "soc", tmp_path, modelfile), said.append, Ollama().plan(request))
    planned = {"num_ctx": 3000, "num_gpu": 0, "num_thread": 16}
    assert fake.seen["/api/create"]["parameters"] == {**planned, "temperature": 0.0}
    assert said == ["creating soc in Ollama with num_ctx 3000, num_gpu 0, num_thread 16"]
    # the Modelfile travels to other machines
    assert "num_gpu" not in modelfile.read_text()
    assert "num_thread" not in modelfile.read_text()


def test_a_refused_first_token_is_classified_by_its_words(fake: Fake) -> None:
    fake.status, fake.body = 500, {"error": "model requires more system memory (9.1 GiB) than is available (4.0 GiB)"}
    with pytest.raises(StartFailure, match=r"refuses a chat \(500\): out of memory") as caught:
        start.first_token(Endpoint("ollama", fake.url, "soc"))
    assert caught.value.kind == "out-of-memory"
    assert fake.seen["/v1/chat/completions"]["max_tokens"] == 1


def test_a_plan_that_does_not_fit_starts_nothing(tmp_path: Path) -> None:
    request = Request(Model.from_shape("granite-4.1-30b"), hardware_from("cpu-2c-24g"), "serve", "m")
    with pytest.raises(EngineError, match="cannot serve this model on this machine"):
        start.start_planned(Vllm(), request, Target(tmp_path, "m", tmp_path), start.Options(), lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_came_up_during_the_planning_is_not_overwritten(tmp_path: Path) -> None:
    class Sleeping(Ollama):
        def launch(self, plan: Plan, request: Request, *, host: str, port: int) -> Launch:
            return Launch(
                "ollama", (sys.executable, "-c", "import time; time.sleep(600)"), {}, f"http://{host}:{port}", "/", "m", 1
            )

    request = Request(Model.from_shape("granite-4.0-1b"), hardware_from("cpu-16c-64g"), "serve", "m")
    target = Target(tmp_path / "m.gguf", "m", tmp_path)
    plan = Ollama().plan(request)
    first = server.start(Sleeping().launch(plan, request, host="127.0.0.1", port=9), tmp_path / "log", owner=os.getpid())
    records.save(target.servers, Record(first.engine, first))
    try:
        with pytest.raises(EnvironmentFailure, match="ollama already serves m from"):
            start.start_planned(Sleeping(), request, target, start.Options(owner=os.getpid()), lambda _: None, plan)
        assert records.running(target.servers) == [first]
    finally:
        server.stop(first)


@pytest.mark.parametrize(
    ("model", "folder"),
    [("runs/mine/m.gguf", "runs/mine"), ("elsewhere/m.gguf", "runs/m"), ("elsewhere/granite 4.0!", "runs/granite-4.0-")],
)
def test_where_a_models_logs_and_records_go(model: str, folder: str, tmp_path: Path) -> None:
    path = tmp_path / model
    path.parent.mkdir(parents=True)
    path.mkdir() if "!" in model else path.touch()
    found = _target(RunFolder("generic", tmp_path / "runs"), Vllm(), path, None, Settings(_env_file=None))
    assert found.folder == tmp_path / folder


@pytest.mark.parametrize(("engine", "variable"), [("vllm", "VLLM_API_KEY"), ("llamacpp", "LLAMA_API_KEY")])
def test_the_servers_key_is_sent_to_it_and_masked(
    fake: Fake, engine: str, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in key_variables().values():
        monkeypatch.delenv(name, raising=False)
    (tmp_path / ".env").write_text(f"{variable}=sk-planted\n")
    target = Target(tmp_path / "m", "m", tmp_path, key=load().key(engine))
    me = psutil.Process()
    process = Server(engine, fake.url, "m", (), {}, me.pid, me.create_time(), tmp_path / "log", "", "/health")
    record = records.save(target.servers, Record(engine, process, Ready(fake.url, "m")))
    endpoint = start.attach(engine, target)
    assert endpoint is not None
    start.first_token(endpoint)
    assert fake.keys == ["Bearer sk-planted"]
    assert "planted" not in repr(endpoint) + repr(target) + repr(load()) + record.read_text()
    monkeypatch.setenv(variable, "sk-other")
    assert tuple(load().key(name) for name in (engine, "sglang", "ollama")) == ("sk-other", "", "")
