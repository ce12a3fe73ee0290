"""Each check against a small real server: every fault becomes a status that says what to do, within the time-out."""

from __future__ import annotations

import asyncio
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from small_run import make_run
from stub_server import serving

from pipeline.config import Address, Settings, load
from pipeline.errors import InputError
from pipeline.net.loopback import claim
from pipeline.operate import registry
from pipeline.operate.observer import Observer
from pipeline.operate.registry import (
    ModelStatus,
    address_for,
    check_ollama_models,
    check_openai_compatible_models,
    check_vllm_models,
    warmup_model,
)
from pipeline.runs.folder import RunFolder
from pipeline.serve import artefacts, records
from pipeline.serve.records import Ready, Record
from pipeline.serve.server import Server

NONE = Path("/nonexistent")
VLLM: dict[str, Any] = {
    "/v1/models": {"data": [{"id": "m", "max_model_len": 4096, "root": "/models/m", "parent": None}]},
    "/health": b"",
}


async def _check_llamacpp(base: str, model: str = "", **given: Any) -> list[ModelStatus]:
    return await registry.check(Address("llamacpp", base, model, model), **given)


async def _check_sglang(base: str, model: str = "", **given: Any) -> list[ModelStatus]:
    return await registry.check(Address("sglang", base, model, model), **given)


CHECKS = [check_ollama_models, check_vllm_models, check_openai_compatible_models, _check_llamacpp, _check_sglang]


def _one(statuses: list[ModelStatus]) -> ModelStatus:
    assert len(statuses) == 1
    return statuses[0]


def _vllm(url: str, model: str = "", timeout: float = 5.0) -> list[ModelStatus]:
    return asyncio.run(check_vllm_models(url, model, timeout=timeout, output=NONE))


def _openai(url: str, key: str = "", timeout: float = 5.0) -> ModelStatus:
    return _one(asyncio.run(check_openai_compatible_models(url, key, timeout=timeout, output=NONE)))


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_a_url_is_good_with_and_without_v1(suffix: str) -> None:
    with serving(VLLM) as stub:
        status = _one(_vllm(stub.url + suffix, "m"))
    assert (status.name, status.available, status.loaded, status.context, status.detail) == ("m", True, True, 4096, "")
    assert status.latency_ms is not None
    assert status.latency_ms > 0


@pytest.mark.parametrize("check", CHECKS)
def test_a_wrong_port_says_that_nothing_listens_there(check: Any) -> None:
    url = f"http://127.0.0.1:{claim('127.0.0.1', 0)}"
    status = _one(asyncio.run(check(url)))
    assert (status.available, status.kind) == (False, "refused")
    assert status.detail == f"nothing listens at {url} (connection refused): start the server there, or correct the port"


@pytest.mark.parametrize("key", ["", "wrong"])
def test_a_wrong_key_is_named_as_such_and_not_repeated(key: str) -> None:
    with serving(VLLM, key="right") as stub:
        status = _openai(stub.url, key)
    assert status.detail == f"{stub.url} refuses the API key (401): correct it, or set one"


def test_the_right_key_is_sent() -> None:
    with serving(VLLM, key="right") as stub:
        assert _openai(stub.url, "right").available


@pytest.mark.parametrize("key", ["sk-planted\nX: y", "sk-plantedé☃"])
def test_a_key_that_cannot_be_sent_is_said_without_showing_it(key: str) -> None:
    with serving(VLLM) as stub:
        status = _openai(stub.url, key)
    assert status.kind == "key"
    assert "planted" not in repr(status)


def test_a_wrong_model_name_lists_what_is_there() -> None:
    with serving(VLLM) as stub:
        missing, there = _vllm(stub.url, "granite-soc")
    assert (missing.name, missing.available, missing.kind) == ("granite-soc", False, "model")
    assert missing.detail == "not served here, which has m: serve the run under that name, or ask for one of these"
    assert there.available


@pytest.mark.parametrize("listed", [{"data": []}, {"data": None}])
def test_a_server_without_the_model(listed: dict[str, Any]) -> None:
    with serving({"/v1/models": listed, "/health": b""}) as stub:
        status = _one(_vllm(stub.url, "m"))
    assert status.detail.startswith("not served here, which has no model at all")


def test_a_redirect_is_not_followed_and_the_key_stays_here() -> None:
    with serving(VLLM) as other:
        moved = (307, {"Location": f"{other.url}/v1/models"}, {})
        with serving({"/v1/models": moved}) as stub:
            status = _openai(stub.url, "sk-planted")
        assert other.seen == []
    assert status.kind == "redirect"
    assert status.detail.startswith(f"{stub.url} redirects to another host ({other.url}/v1/models); not followed")


def test_a_redirect_within_the_host_says_which_url_to_set() -> None:
    with serving({"/v1/models": (301, {"Location": "/api/v1/models"}, {})}) as stub:
        assert _openai(stub.url).detail == f"{stub.url} redirects to /api/v1/models; not followed: set the URL it redirects to"


def test_a_hanging_server_is_given_up_on_in_time() -> None:
    with serving(VLLM, delay=3) as stub:
        begun = time.monotonic()
        status = _one(_vllm(stub.url, "m", timeout=0.5))
        assert time.monotonic() - begun < 1.5
    assert status.detail == f"{stub.url} did not answer within 0.5 s: it hangs, is overloaded or still starting"


def test_a_port_that_accepts_and_says_nothing_is_given_up_on_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert _openai(url, timeout=0.5).kind == "timeout"


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"<html>hello</html>", "not_json"),
        pytest.param(b"[" * 200_000, "not_json", id="nested too deeply"),
        ({"data": []}, "model"),
        ({"models": []}, "not_json"),
        ([1, 2], "not_json"),
        ((500, {}, {}), "status"),
        ((503, {}, {}), "loading"),
        ((404, {}, {}), "not_found"),
    ],
)
def test_other_answers_are_told_apart(answer: Any, kind: str) -> None:
    with serving({"/v1/models": answer}) as stub:
        status = _openai(stub.url)
    assert (status.available, status.kind) == (False, kind)
    assert status.detail


@pytest.mark.parametrize("url", ["127.0.0.1:8003", "http://", "ftp://host/v1", "http://user:planted@[bad"])
def test_something_that_is_not_a_url(url: str) -> None:
    status = _openai(url)
    assert not status.available
    assert status.detail
    assert "planted" not in status.detail


def test_a_vllm_whose_engine_died_is_not_available_though_it_lists_models() -> None:
    with serving({**VLLM, "/health": (503, {}, {})}) as stub:
        status = _one(_vllm(stub.url, "m"))
    assert (status.available, status.kind) == (False, "loading")


def test_ollama_tells_size_loaded_and_context() -> None:
    tags = {"models": [{"name": "granite-soc:latest", "size": 145}, {"name": "other:1b", "size": 7}]}
    ps = {"models": [{"name": "granite-soc:latest", "context_length": 8192}]}
    with serving({"/api/tags": tags, "/api/ps": ps}) as stub:
        found = asyncio.run(check_ollama_models(stub.url, "granite-soc", output=NONE))
        missing = asyncio.run(check_ollama_models(stub.url, "granite", output=NONE))[0]
    assert [(s.name, s.available, s.loaded, s.context, s.size) for s in found] == [
        ("granite-soc:latest", True, True, 8192, 145),
        ("other:1b", True, False, None, 7),
    ]
    assert (missing.name, missing.kind) == ("granite:latest", "model")
    assert "ollama pull granite" in missing.detail


def test_llamacpp_tells_the_context_of_a_slot_not_the_models_limit() -> None:
    listed = {"data": [{"id": "m", "meta": {"n_ctx_train": 131072, "size": 9}}]}
    props = {"default_generation_settings": {"n_ctx": 4096}, "model_path": "/models/x.gguf"}
    with serving({"/v1/models": listed, "/props": props}) as stub:
        status = _one(asyncio.run(_check_llamacpp(stub.url, "m", output=NONE)))
    assert (status.context, status.size, status.artefact) == (4096, 9, None)


def test_a_backend_without_url_is_not_asked() -> None:
    status = _one(asyncio.run(registry.check(Address("openai", "", "m", "m"))))
    assert (status.available, status.kind) == (False, "url")


def _settings(tmp_path: Path, stub_url: str, agents: str = "") -> Settings:
    (tmp_path / "agents.yaml").write_text(agents)
    env = tmp_path / ".env"
    env.write_text(
        f"LLM_BACKEND=vllm\nVLLM_BASE_URL={stub_url}\nVLLM_MODEL=m\nVLLM_ORCHESTRATOR_MODEL=big\nAGENTS_FILE={tmp_path}/agents.yaml\n"
    )
    return load(env)


def test_warmup_measures_the_first_answer_and_says_when_a_chat_is_refused(tmp_path: Path) -> None:
    chat = {"choices": [{"message": {"content": "hi"}}]}
    with serving({**VLLM, "/v1/chat/completions": chat}) as stub:
        good = asyncio.run(warmup_model(_settings(tmp_path, stub.url)))
        assert (good.name, good.available, good.loaded) == ("m", True, True)
        refused = {**VLLM, "/v1/chat/completions": (400, {}, {"error": "no chat template"})}
        stub.routes.update(refused)
        bad = asyncio.run(warmup_model(_settings(tmp_path, stub.url)))
    assert not bad.available
    assert "a chat is refused (400)" in bad.detail
    assert "no chat template" in bad.detail


def test_warmup_takes_the_agents_model_and_the_orchestrators(tmp_path: Path) -> None:
    agents = "agents: {triage: {run: mine, model: other}}"
    with serving(VLLM) as stub:
        settings = _settings(tmp_path, stub.url, agents)
        assert asyncio.run(warmup_model(settings, "triage")).name == "other"
        assert asyncio.run(warmup_model(settings, agent_name="orchestrator")).name == "big"
        with pytest.raises(InputError, match="no agent 'nobody'") as caught:
            asyncio.run(warmup_model(settings, "nobody"))
    assert caught.value.remedy == "known agents: triage"


def _served(output: Path, run: str, url: str, name: str) -> RunFolder:
    """A run with a note of a server that is this very process."""
    folder = RunFolder(run, output)
    if not folder.path.exists():
        make_run(folder)
    process = psutil.Process()
    log = output / "log"
    record = Server("vllm", url, name, (), {}, process.pid, process.create_time(), log, "", "/health")
    ready = Ready(url, name, artefact=artefacts.of_file(folder.merged))
    records.save(folder.servers, Record("vllm", record, ready))
    return folder


def _gone(folder: RunFolder) -> None:
    """As after a stop."""
    record = records.read(folder.servers, "vllm")
    assert record is not None and record.process is not None
    records.forget(record.process, folder.servers)


def test_an_agent_is_its_run_not_the_configured_model(tmp_path: Path) -> None:
    agents = "agents: {summary: {run: other}, generic: {run: generic}}"
    with serving(VLLM) as stub:
        settings = _settings(tmp_path, stub.url, agents)
        with pytest.raises(InputError, match="agent summary is run other, and nothing says under which name vllm") as caught:
            address_for(settings, "summary", tmp_path)
        assert "serve vllm --agent summary" in caught.value.remedy
        assert address_for(settings, "generic", tmp_path) == settings.address()
        folder = _served(tmp_path, "other", "http://127.0.0.1:1", "others-name")
        found = address_for(settings, "summary", tmp_path)
        assert (found.model, found.base_url) == ("others-name", "http://127.0.0.1:1")
        # stopped: the name is still known, the address is the configured one again
        _gone(folder)
        stopped = address_for(settings, "summary", tmp_path)
        assert (stopped.model, stopped.base_url) == ("others-name", stub.url)


def test_warmup_refuses_another_runs_artefact(tmp_path: Path) -> None:
    with serving({**VLLM, "/v1/chat/completions": {}}) as stub:
        settings = _settings(tmp_path, stub.url, "agents: {summary: {run: other, model: m}, right: {run: mine, model: m}}")
        _served(tmp_path, "mine", stub.url, "m")
        wrong = asyncio.run(warmup_model(settings, "summary", output=tmp_path))
        assert not wrong.available
        assert wrong.detail.startswith("this is run mine, and agent summary is run other: granite-pipeline serve --agent summary")
        assert "/v1/chat/completions" not in [path for path, _ in stub.seen]
        assert asyncio.run(warmup_model(settings, "right", output=tmp_path)).available


def test_names_of_this_machine_and_ollamas_latest_are_the_same_server(tmp_path: Path) -> None:
    with serving(VLLM) as stub:
        _served(tmp_path, "mine", stub.url.replace("127.0.0.1", "localhost"), "m")
        status = _one(asyncio.run(check_vllm_models(stub.url, "m", output=tmp_path)))
    assert status.artefact is not None
    assert status.artefact.run == "mine"
    with serving({"/api/tags": {"models": [{"name": "m:latest"}]}, "/api/ps": {}}) as stub:
        _served(tmp_path, "mine", stub.url, "m")
        ollama = _one(asyncio.run(check_ollama_models(stub.url, "m", output=tmp_path)))
    assert ollama.artefact == status.artefact


def test_a_file_written_after_the_server_started_is_not_what_it_serves(tmp_path: Path) -> None:
    made = make_run(RunFolder("mine", tmp_path))
    said = {"/v1/models": {"data": [{"id": "m", "root": "/models/mine/merged_fp16"}]}, "/health": b""}
    with serving(said) as stub:
        folder = _served(tmp_path, "noted", stub.url, "another-name")
        assert _one(asyncio.run(check_vllm_models(stub.url, "m", output=tmp_path))).artefact is None
        _gone(folder)
        unknown_start = _one(asyncio.run(check_vllm_models(stub.url, "m", output=tmp_path)))
    assert unknown_start.artefact == artefacts.of_file(made.merged)


def test_what_is_exported_while_a_server_is_watched_is_not_what_it_serves(tmp_path: Path) -> None:
    made = make_run(RunFolder("mine", tmp_path))
    said = {"/v1/models": {"data": [{"id": "m", "root": "/models/mine/merged_fp16"}]}, "/health": b""}
    with serving(said) as stub:
        watching = Observer.of(_settings(tmp_path, stub.url), tmp_path)
        for again in (False, True):
            if again:
                shutil.rmtree(made.path)
                make_run(made, b"weights of another training")
            for _ in range(2):
                asyncio.run(watching.ask("vllm"))
                assert (watching.seen["vllm"].artefact("m") is None) is again


def test_lm_studios_list_says_what_is_loaded_and_null_when_it_has_nothing() -> None:
    listed = {"data": [{"id": "a", "state": "loaded"}, {"id": "b", "state": "not-loaded"}], "object": "list"}
    with serving({"/v1/models": listed}) as stub:
        found = asyncio.run(check_openai_compatible_models(stub.url, "", output=NONE))
        assert [(s.name, s.available, s.loaded) for s in found] == [("a", True, True), ("b", True, False)]
        stub.routes["/v1/models"] = {"data": None, "object": "list"}
        nothing = asyncio.run(check_openai_compatible_models(stub.url, "", output=NONE))
        assert [(s.available, "no model at all" in s.detail) for s in nothing] == [(False, True)]
        missing = asyncio.run(check_openai_compatible_models(stub.url, "", "a", output=NONE))[0]
    assert missing.detail.startswith("not served here, which has no model at all")


@pytest.mark.parametrize(("backend", "prefix"), [("ollama", "OLLAMA"), ("openai", "OPENAI_COMPATIBLE")])
def test_the_orchestrators_variable_is_what_the_orchestrator_asks_for(tmp_path: Path, backend: str, prefix: str) -> None:
    env = tmp_path / ".env"
    env.write_text(f"LLM_BACKEND={backend}\n{prefix}_MODEL=small\n{prefix}_ORCHESTRATOR_MODEL=large\n")
    assert address_for(load(env), "orchestrator").model == "large"
    assert address_for(load(env), None).model == "small"
