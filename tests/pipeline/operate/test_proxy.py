"""The real gateway (LiteLLM's proxy) before small backends that die, hang and refuse; one start for all tests."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from small_run import make_run

from pipeline.config import Settings, load
from pipeline.net.loopback import claim
from pipeline.operate import services
from pipeline.runs.folder import RunFolder
from pipeline.serve import server

pytestmark = [
    pytest.mark.slow,
    # looked for, not imported: that takes ten seconds and happens in the gateway's own process
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("litellm", "apscheduler"))), reason="the gateway extra is not installed"
    ),
]
UPSTREAM = Path(__file__).parents[2] / "support" / "upstream.py"
PLANTED = ("sk-planted-client", "sk-planted-upstream")


@dataclass
class Scene:
    """A gateway in front of a primary (vLLM's place) and a second backend (llama.cpp's); both say they loaded the run's files."""

    output: Path
    url: str = ""
    ports: dict[str, int] = field(default_factory=dict)
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    modes: dict[str, str] = field(default_factory=dict)

    def start(self, place: str, mode: str = "") -> None:
        self.stop(place)
        name, file = {"vllm": ("primary", "merged_fp16"), "llamacpp": ("second", "unsloth.Q8_0.gguf")}[place]
        environment = {**os.environ, "MODEL_PATH": str(self.output / "test" / file)}
        words = [sys.executable, str(UPSTREAM), str(self.ports[place]), name, mode]
        self.running[place], self.modes[place] = subprocess.Popen(words, env=environment), mode
        begun = time.monotonic()
        while time.monotonic() - begun < 30:
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"http://127.0.0.1:{self.ports[place]}/health", timeout=2)
                break
            time.sleep(0.1)
        # whatever the gateway saw of the one before is older than two rounds of its questions
        time.sleep(2.5 if self.url else 0)
        self.until(place, True)

    def stop(self, place: str) -> None:
        process = self.running.pop(place, None)
        if process:
            process.send_signal(signal.SIGKILL)
            process.wait()

    def until(self, place: str, healthy: bool) -> float:
        """Wait until the gateway has seen it; seconds that took."""
        begun = time.monotonic()
        while self.url and time.monotonic() - begun < 20:
            with contextlib.suppress(httpx.TimeoutException):
                if httpx.get(f"{self.url}/health", timeout=5).json()["backends"][place] is healthy:
                    return time.monotonic() - begun
            time.sleep(0.1)
        return time.monotonic() - begun

    def seen(self, place: str) -> dict[str, Any]:
        """The last request that a backend was sent."""
        body: dict[str, Any] = httpx.get(f"http://127.0.0.1:{self.ports[place]}/seen", timeout=5).json()
        return body

    def chat(self, model: str = "primary", **more: Any) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], **more}
        headers = {"Authorization": f"Bearer {PLANTED[0]}"}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, headers=headers, timeout=30)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    output = tmp_path_factory.mktemp("out")
    make_run(RunFolder("test", output))
    made = Scene(output, ports={name: claim("127.0.0.1", 0) for name in ("vllm", "llamacpp")})
    agents = output / "agents.yaml"
    agents.write_text("agents: {triage: {run: test}}")
    patch = pytest.MonkeyPatch()
    for name in Settings.model_fields:
        patch.delenv(name.upper(), raising=False)
    values = {
        "VLLM_BASE_URL": f"http://127.0.0.1:{made.ports['vllm']}", "VLLM_MODEL": "primary", "LLAMACPP_MODEL": "second",
        "LLAMACPP_BASE_URL": f"http://127.0.0.1:{made.ports['llamacpp']}/v1", "AGENTS_FILE": str(agents),
        "OPENAI_COMPATIBLE_BASE_URL": f"http://127.0.0.1:{claim('127.0.0.1', 0)}", "OPENAI_COMPATIBLE_MODEL": "cloud",
        "GATEWAY_API_KEY": PLANTED[0], "OPENAI_COMPATIBLE_API_KEY": PLANTED[1],
    }  # fmt: skip
    for name, value in values.items():
        patch.setenv(name, value)
    launch = services.gateway_launch(load(output / "none"), "127.0.0.1", 0, output, ("--timeout", "3"))
    process = services.start(launch, output, os.getpid(), lambda _: None)
    made.url = process.url
    yield made
    for place in list(made.running):
        made.stop(place)
    server.stop(process)
    patch.undo()


@pytest.fixture(autouse=True)
def _both_up(scene: Scene) -> None:
    for place in ("llamacpp", "vllm"):
        if place not in scene.running or scene.modes.get(place):
            scene.start(place)


def test_an_answer_names_backend_run_and_artefact(scene: Scene) -> None:
    answer = scene.chat("second@llamacpp")
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == "second"
    assert answer.headers["x-granite-backend"] == "llamacpp"
    assert answer.headers["x-granite-run"] == "test"
    assert answer.headers["x-granite-artefact"].startswith("unsloth.Q8_0.gguf sha256:")
    assert answer.headers["x-granite-fallback"] == "no"


def test_the_primary_dies_and_the_same_fine_tune_answers_and_the_primary_returns(scene: Scene) -> None:
    before = scene.chat("triage")
    assert before.headers["x-granite-backend"] == "vllm"
    scene.stop("vllm")
    at_once = scene.chat("triage")
    assert (at_once.status_code, at_once.json()["choices"][0]["message"]["content"]) == (200, "second")
    assert at_once.headers["x-granite-fallback"] == "yes"
    assert at_once.headers["x-granite-manifest"] == before.headers["x-granite-manifest"]
    assert scene.until("vllm", False) < 5
    scene.start("vllm")
    assert scene.chat("triage").headers["x-granite-backend"] == "vllm"


@pytest.mark.parametrize(
    ("sent", "received"),
    [
        ({}, (0, 1)),
        ({"temperature": None, "top_p": None}, (0, 1)),
        ({"temperature": 0.7}, (0.7, 1)),
        ({"top_p": 0.5}, (0, 0.5)),
        ({"temperature": 1, "top_p": 0.9}, (1, 0.9)),
        ({"stream": True}, (0, 1)),
    ],
)
def test_sampling_settings_are_filled_in_where_they_are_left_out_and_never_changed(
    scene: Scene, sent: dict[str, Any], received: tuple[float, float]
) -> None:
    assert scene.chat("triage", **sent).status_code == 200
    seen = scene.seen("vllm")
    assert (seen["temperature"], seen["top_p"]) == received
    body = {"model": "second@llamacpp", "prompt": "Hello", **{key: value for key, value in sent.items() if key != "stream"}}
    headers = {"Authorization": f"Bearer {PLANTED[0]}"}
    assert httpx.post(f"{scene.url}/v1/completions", json=body, headers=headers, timeout=30).status_code == 200
    seen = scene.seen("llamacpp")
    assert (seen["prompt"], seen["temperature"], seen["top_p"]) == ("Hello", *received)


def test_a_fallback_is_filled_in_too(scene: Scene) -> None:
    scene.stop("vllm")
    assert scene.chat("triage").headers["x-granite-backend"] == "llamacpp"
    seen = scene.seen("llamacpp")
    assert (seen["temperature"], seen["top_p"]) == (0, 1)


def test_a_stream_that_is_cut_ends_with_an_error_event(scene: Scene) -> None:
    scene.start("vllm", "die-in-stream")
    events = [
        line.removeprefix("data: ") for line in scene.chat("triage", stream=True).text.splitlines() if line.startswith("data: ")
    ]
    said = [json.loads(event) for event in events if event != "[DONE]"]
    text = "".join(c["delta"].get("content") or "" for event in said for c in event.get("choices", []))
    assert text == "one two "
    assert "error" in said[-1]
    assert said[-1]["error"]["message"]


def test_a_stream_names_its_artefact_too(scene: Scene) -> None:
    answer = scene.chat("second@llamacpp", stream=True)
    assert answer.headers["x-granite-artefact"].startswith("unsloth.Q8_0.gguf sha256:")
    assert answer.text.rstrip().endswith("data: [DONE]")


def test_a_stream_whose_primary_is_gone_comes_from_the_fallback_and_says_so(scene: Scene) -> None:
    scene.stop("vllm")
    answer = scene.chat("triage", stream=True)
    assert answer.headers["x-granite-backend"] == "llamacpp"
    assert answer.text.rstrip().endswith("data: [DONE]")


def test_a_hanging_primary_is_left_after_the_time_out(scene: Scene) -> None:
    scene.start("vllm", "hang")
    begun = time.monotonic()
    answer = scene.chat("triage")
    assert (answer.status_code, answer.headers["x-granite-backend"]) == (200, "llamacpp")
    assert time.monotonic() - begun < 15


def test_a_client_cannot_undo_the_routing_or_skip_the_key(scene: Scene) -> None:
    scene.stop("vllm")
    assert scene.chat("primary@vllm", fallbacks=["second@llamacpp"], mock_response="x").status_code >= 400
    assert scene.chat("second@llamacpp", mock_response="mocked").json()["choices"][0]["message"]["content"] == "second"
    assert scene.chat("unknown").status_code == 404
    assert httpx.get(f"{scene.url}/v1/models", timeout=5).status_code == 401
    assert httpx.post(f"{scene.url}/key/generate", json={}, timeout=5).status_code == 404


def test_keys_are_in_no_file_and_no_process_list(scene: Scene) -> None:
    scene.chat("cloud")
    for path in scene.output.rglob("*"):
        if path.is_file():
            text = path.read_bytes()
            assert not any(key.encode() in text for key in PLANTED), path
    lines = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
    assert not any(key in line for key in PLANTED for line in lines)
    listed = [
        c.laddr.ip
        for c in psutil.net_connections("tcp")
        if c.status == psutil.CONN_LISTEN and c.laddr.port == int(scene.url.rsplit(":", 1)[1])
    ]
    assert listed == ["127.0.0.1"]
