"""The status API: documented objects, health as observed, hostile names, and the page in a real browser."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from stub_server import Stub, serving
from typer.testing import CliRunner

pytest.importorskip("fastapi", reason="the gateway extra is not installed")

from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from pipeline.cli import app as cli
from pipeline.config import Settings, load
from pipeline.net.loopback import claim
from pipeline.operate import observer as observing
from pipeline.operate import services
from pipeline.operate.observer import Observation, Observer
from pipeline.operate.registry import ModelStatus
from pipeline.operate.status import create_app, exposition, inference_status, only_from_here, status_page
from pipeline.serve import records, server
from pipeline.serve.artefacts import Artefact

HOSTILE = '"><script>document.title="owned"</script>\n{{ 7*7 }}‮'
MODELS = {"/v1/models": {"data": [{"id": "m"}]}, "/health": b""}


pytestmark = pytest.mark.usefixtures("no_settings")


def _settings(tmp_path: Path, url: str, model: str = "m") -> Settings:
    env = tmp_path / ".env"
    env.write_text(
        f"VLLM_BASE_URL={url}/v1\nVLLM_MODEL={model}\nOLLAMA_BASE_URL={url}/none\nOPENAI_COMPATIBLE_API_KEY=sk-planted\n"
    )
    return load(env)


def _hostile(tmp_path: Path) -> tuple[Settings, Observer]:
    settings = _settings(tmp_path, "http://127.0.0.1:1")
    watching = Observer.of(settings)
    model = ModelStatus(HOSTILE, True, True, 4096, None, 1.5, HOSTILE, Artefact(HOSTILE, "f" * 64, HOSTILE, "a" * 64))
    watching.seen["vllm"] = Observation(watching.seen["vllm"].address, True, (model,), HOSTILE, time.time(), time.time())
    return settings, watching


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Stub]]:
    """The status API as its own process, watching a stub in vLLM's place."""
    output = tmp_path_factory.mktemp("out")
    with serving(MODELS) as stub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_BASE_URL", f"{stub.url}/v1")
        patch.setenv("VLLM_MODEL", "m")
        started = services.start(services.status_launch("127.0.0.1", 0, output), output, os.getpid(), lambda _: None)
        yield started.url, stub
        server.stop(started)


@pytest.fixture
def api(process: tuple[str, Stub]) -> Iterator[tuple[httpx.Client, Stub]]:
    url, stub = process
    stub.routes, stub.delay = dict(MODELS), 0.0
    with httpx.Client(base_url=url, timeout=5) as client:
        _until(client, True, 20)
        yield client, stub


def _until(client: httpx.Client, healthy: bool, seconds: float = 5.0) -> float:
    begun = time.monotonic()
    while time.monotonic() - begun < seconds:
        if client.get("/api/v1/inference/status").json()["healthy"] is healthy:
            return time.monotonic() - begun
        time.sleep(0.05)
    raise AssertionError(f"not {healthy=} within {seconds} s")


def test_every_documented_path_answers(tmp_path: Path) -> None:
    with serving(MODELS) as stub, TestClient(create_app(_settings(tmp_path, stub.url), tmp_path)) as client:
        _until(client, True)
        _check_paths(client, stub)


def _check_paths(client: TestClient, stub: Stub) -> None:
    assert client.get("/api/v1/inference/status").json() == {
        "backend": "vllm",
        "base_url": f"{stub.url}/v1",
        "model": "m",
        "orchestrator_model": "m",
        "healthy": True,
    }
    health = client.get("/health")
    assert (health.status_code, health.json()["status"], health.json()["backends"]["vllm"]) == (200, "ok", True)
    models = client.get("/models").json()
    assert [m["name"] for m in models["vllm"]["models"]] == ["m"]
    assert models["llamacpp"]["healthy"] is False
    metrics = client.get("/metrics")
    assert metrics.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = {family.name: family for family in text_string_to_metric_families(metrics.text)}
    assert {s.labels["backend"]: s.value for s in families["granite_backend_healthy"].samples}["vllm"] == 1
    for path in ("/health", "/models", "/metrics"):
        assert client.get(f"/api/v1/inference{path}").status_code == 200
    assert set(client.get("/api/v1/inference/models").json()) == set(models)
    assert client.get("/api/v1/inference/certificates").json() == {}
    everything = "".join(client.get(path).text for path in ("/", "/models", "/metrics", "/health"))
    assert "planted" not in everything
    assert client.get("/docs").status_code == 404


@pytest.mark.slow
def test_health_is_observed_within_five_seconds_both_ways(api: tuple[httpx.Client, Stub]) -> None:
    client, stub = api
    stub.routes["/health"] = (503, {}, {})
    assert _until(client, False) < 5
    stub.routes["/health"] = b""
    assert _until(client, True) < 5
    stub.delay = 60
    assert _until(client, False) < 5.0
    assert "did not answer within" in client.get("/models").json()["vllm"]["detail"]


def test_one_slow_answer_is_not_an_outage_but_a_refused_connection_is_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observing, "TIMEOUT", 0.3)
    with serving(MODELS) as stub:
        watching = Observer.of(_settings(tmp_path, stub.url))
        asyncio.run(watching.ask("vllm"))
        stub.delay = 1
        asyncio.run(watching.ask("vllm"))
        assert watching.seen["vllm"].healthy
        asyncio.run(watching.ask("vllm"))
        assert not watching.seen["vllm"].healthy
    gone = Observer.of(_settings(tmp_path, f"http://127.0.0.1:{claim('127.0.0.1', 0)}"))
    gone.seen["vllm"] = Observation(gone.seen["vllm"].address, True, (ModelStatus("m", True),), "", 1, 1)
    asyncio.run(gone.ask("vllm"))
    assert not gone.seen["vllm"].healthy
    assert [(m.name, m.available) for m in gone.seen["vllm"].models] == [("m", False)]


def test_an_observer_that_no_longer_asks_says_so(tmp_path: Path) -> None:
    settings, watching = _hostile(tmp_path)
    for name, seen in watching.seen.items():
        watching.seen[name] = Observation(seen.address, True, seen.models, "", 1, time.time() - 3600)
    assert watching.stale
    assert inference_status(settings, watching)["healthy"] is False


def test_hostile_names_stay_text_in_metrics_and_page(tmp_path: Path) -> None:
    settings, watching = _hostile(tmp_path)
    families = {family.name: family for family in text_string_to_metric_families(exposition(settings, watching))}
    sample = next(s for s in families["granite_model_available"].samples if s.labels["backend"] == "vllm")
    assert sample.labels["model"] == HOSTILE
    html, policy = status_page(settings, watching)
    assert "<script" not in html
    assert "{{ 7*7 }}" in html
    assert "‮" not in html
    assert "default-src 'none'" in policy
    assert "script" not in policy


def test_importing_the_app_binds_nothing(tmp_path: Path) -> None:
    paths = {getattr(route, "path", "") for route in create_app(_settings(tmp_path, "http://127.0.0.1:1")).routes}
    assert {"/", "/health", "/models", "/metrics", "/api/v1/inference/status"} <= paths
    words = services.status_launch("127.0.0.1", 0, tmp_path).argv
    assert words[words.index("--host") + 1] == "127.0.0.1"


def _in_chromium(url: str, profile: Path) -> str:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium is installed")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    flags += [
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={profile}",
        "--virtual-time-budget=2000",
        "--dump-dom",
    ]
    return subprocess.run([program, *flags, url], capture_output=True, text=True, timeout=90, check=True).stdout


@pytest.mark.slow
def test_the_page_in_a_browser(api: tuple[httpx.Client, Stub], tmp_path: Path) -> None:
    client, stub = api
    hostile: dict[str, Any] = {"data": [{"id": "m"}, {"id": HOSTILE}]}
    stub.routes["/v1/models"] = hostile
    deadline = time.monotonic() + 5
    while len(client.get("/models").json()["vllm"]["models"]) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    dom = _in_chromium(str(client.base_url), tmp_path / "profile")
    assert "<title>up: vllm m</title>" in dom
    assert "<strong>Healthy</strong>" in dom
    assert "&lt;script&gt;document.title" in dom
    assert "<script" not in dom


def test_a_page_that_made_its_name_point_here_is_refused(tmp_path: Path) -> None:
    app = create_app(_settings(tmp_path, "http://127.0.0.1:1"))
    app.middleware("http")(only_from_here)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        assert client.get("/api/v1/inference/status").status_code == 200
        assert client.get("/api/v1/inference/status", headers={"Host": "rebound.example"}).status_code == 403
        assert client.get("/metrics", headers={"Origin": "https://evil.example"}).status_code == 403


def test_the_verb_leaves_it_running_on_loopback_and_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["status-api", "--output", str(tmp_path)]
    assert services.stop("status-api", tmp_path) is False
    assert CliRunner().invoke(cli, [*words, "--port", "0", "--detach"]).exception is None
    (left,) = records.running(tmp_path / ".gateway" / "servers")
    try:
        assert httpx.get(f"{left.url}/health", timeout=5).status_code == 200
        assert httpx.get(f"{left.url}/health", headers={"Host": "rebound.example"}, timeout=5).status_code == 403
        bound = [c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN" and f":{c.laddr.port}" in left.url]
        assert bound == ["127.0.0.1"]
        assert "stopped: status-api" in CliRunner().invoke(cli, [*words, "--stop"]).output
        assert not left.alive
        assert "no status-api was left running" in CliRunner().invoke(cli, [*words, "--stop"]).output
        assert "no gateway was left running" in CliRunner().invoke(cli, ["gateway", *words[1:], "--stop"]).output
    finally:
        server.stop(left)
