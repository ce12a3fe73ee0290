"""The same client code - OpenAI, LangChain, BeeAI, as docs/operating.md prints it - over each LLM_BACKEND, against real servers: llama.cpp and vLLM."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_run import smollm_gguf

from pipeline.config import load
from pipeline.engines.vllm.engine import Vllm
from pipeline.errors import InputError
from pipeline.integrations.beeai import chat_model
from pipeline.serve import server, start
from pipeline.serve.start import Endpoint, Options, Target
from training import base

PAGE = Path(__file__).parents[3] / "docs" / "operating.md"
# all three pull in their own HTTP stacks; their deprecations are not ours
pytestmark = pytest.mark.filterwarnings("ignore")
SNIPPETS = {
    "openai": "from openai import",
    "langchain_openai": "from langchain_openai",
    "beeai_framework": "beeai_framework.backend",
}
BACKENDS = {"llamacpp": "LLAMACPP", "vllm": "VLLM", "sglang": "SGLANG", "openai": "OPENAI_COMPATIBLE", "ollama": "OLLAMA"}


@pytest.fixture(autouse=True)
def _clean(no_settings: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module", params=["llamacpp", pytest.param("vllm", marks=[pytest.mark.e2e, pytest.mark.wide])])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A real chat model on a real server of each kind."""
    folder = tmp_path_factory.mktemp("run")
    if request.param == "vllm":
        if not Vllm().available().usable:
            pytest.skip("vLLM is not installed")
        model, overrides = base.resolve("embedded", tmp_path_factory.mktemp("base")).folder, {"max-model-len": "2048"}
    else:
        model, overrides = folder / "model.gguf", {"ctx-size": "2048"}
        shutil.copy(smollm_gguf(), model)
    options = Options("verify", owner=os.getpid(), overrides=overrides)
    endpoint = start.serve(request.param, Target(model, "smollm", folder), options, lambda _: None)
    assert endpoint.server is not None
    yield endpoint
    server.stop(endpoint.server)


def _snippet(mark: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    found = [block for block in blocks if mark in block]
    assert len(found) == 1, f"{PAGE.name} has {len(found)} snippets with {mark!r}"
    return str(found[0])


def _run(code: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, str(PAGE), "exec"), {"__name__": "snippet"})
    return printed.getvalue().strip()


@pytest.mark.slow
@pytest.mark.parametrize("package", SNIPPETS)
def test_the_readmes_code_runs_unchanged_over_every_backend(
    package: str, served: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (extras dev and beeai)")
    code = _snippet(SNIPPETS[package])
    monkeypatch.setenv("OPENAI_API_KEY", "sk-must-not-be-sent")
    for backend, prefix in BACKENDS.items():
        monkeypatch.setenv("LLM_BACKEND", backend)
        # Ollama's URL is documented without /v1, the others with it
        monkeypatch.setenv(f"{prefix}_BASE_URL", served.url if backend == "ollama" else f"{served.url}/v1")
        monkeypatch.setenv(f"{prefix}_MODEL", "smollm")
        if backend == "openai":
            monkeypatch.setenv("OPENAI_COMPATIBLE_API_KEY", "sk-any")
        assert len(_run(code)) > 10, backend


@pytest.mark.slow
def test_an_agent_chooses_backend_and_model(tmp_path: Path) -> None:
    pytest.importorskip("beeai_framework", reason="the beeai extra is not installed")
    (tmp_path / "agents.yaml").write_text("agents: {triage: {run: mine, backend: llamacpp, model: soc}}")
    settings = load(tmp_path / "none")
    model = chat_model(settings, agent_name="triage")
    assert (model.model_id, chat_model(settings).model_id) == ("soc", "granite-soc-specialist")
    with pytest.raises(InputError, match="no agent 'x'"):
        chat_model(settings, "x")


def test_a_backend_without_url_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_BACKEND", "openai")
    with pytest.raises(InputError, match="openai has no base URL"):
        chat_model(load(tmp_path / "none"))


@pytest.mark.slow
def test_beeai_sends_what_agents_yaml_says_of_the_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("beeai_framework", reason="the beeai extra is not installed")
    monkeypatch.setenv("LLM_BACKEND", "llamacpp")
    file = tmp_path / "agents.yaml"
    for text, sent in (("", 0), ("sampling: {llamacpp: {temperature: 0.5}}", 0.5), ("sampling: {llamacpp: {}}", None)):
        file.write_text(text)
        assert chat_model(load(tmp_path / "none")).parameters.temperature == sent
