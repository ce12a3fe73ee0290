"""Routing without processes: what the observer saw is given, which backends may answer is expected."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from small_run import make_run

pytest.importorskip("fastapi", reason="the gateway extra is not installed")

from pipeline.config import Settings, Strategy, load
from pipeline.errors import InputError
from pipeline.operate import services
from pipeline.operate.observer import Observation, Observer
from pipeline.operate.proxy import Keys, guarded
from pipeline.operate.registry import ModelStatus
from pipeline.operate.routing import Router, litellm_config, write_config
from pipeline.runs.folder import RunFolder
from pipeline.serve import records
from pipeline.serve.artefacts import Artefact
from pipeline.serve.records import Ready

OURS = Artefact("mine", "f" * 64, "merged_fp16", "a" * 64)
SAME = Artefact("mine", "f" * 64, "unsloth.Q8_0.gguf", "b" * 64)
OTHER = Artefact("other", "0" * 64, "unsloth.Q8_0.gguf", "c" * 64)


def _settings(tmp_path: Path, extra: str = "", agents: str = "") -> Settings:
    (tmp_path / "agents.yaml").write_text(agents)
    lines = [
        "LLM_BACKEND=vllm", "VLLM_MODEL=soc", "LLAMACPP_MODEL=soc-gguf", "OLLAMA_MODEL=soc:latest", f"AGENTS_FILE={tmp_path}/agents.yaml",
        "OPENAI_COMPATIBLE_BASE_URL=https://models.example/v1", "OPENAI_COMPATIBLE_MODEL=big", "OPENAI_COMPATIBLE_API_KEY=sk-planted",
    ]  # fmt: skip
    env = tmp_path / ".env"
    env.write_text("\n".join([*lines, extra]))
    return load(env)


def _router(
    settings: Settings,
    seen: dict[str, tuple[bool, Artefact | None]],
    strategy: Strategy = "local-first",
    output: Path = Path("none"),
) -> Router:
    observer = Observer.of(settings, output)
    for backend, (up, ours) in seen.items():
        address = observer.seen[backend].address
        models = (ModelStatus(address.model, up, artefact=ours),)
        observer.seen[backend] = Observation(address, up, models, "", 1, time.time())
    return Router(settings, observer, strategy)


def _order(router: Router, name: str) -> list[str]:
    route = router.route(name)
    return [d.id for d in route.order] if route else []


def test_the_same_fine_tune_elsewhere_is_the_fallback_and_another_is_not(tmp_path: Path) -> None:
    seen = {"vllm": (True, OURS), "llamacpp": (True, SAME), "ollama": (True, OTHER), "openai": (True, None)}
    router = _router(_settings(tmp_path), seen)
    assert _order(router, "soc") == ["soc@vllm", "soc-gguf@llamacpp"]
    assert _order(router, "soc-gguf") == ["soc@vllm", "soc-gguf@llamacpp"]
    assert _order(router, "soc:latest") == ["soc:latest@ollama"]
    assert _order(router, "big") == ["big@openai"]
    assert _order(router, "nothing") == []


def test_a_backend_that_is_down_is_passed_over_and_comes_back_first(tmp_path: Path) -> None:
    settings = _settings(tmp_path)
    down = _router(settings, {"vllm": (False, OURS), "llamacpp": (True, SAME)})
    assert _order(down, "soc") == ["soc-gguf@llamacpp"]
    assert down.headers("soc-gguf@llamacpp", "soc@vllm") == {
        "x-granite-backend": "llamacpp",
        "x-granite-model": "soc-gguf",
        "x-granite-fallback": "yes",
        "x-granite-run": "mine",
        "x-granite-manifest": "f" * 64,
        "x-granite-artefact": f"unsloth.Q8_0.gguf sha256:{'b' * 64}",
    }
    up = _router(settings, {"vllm": (True, OURS), "llamacpp": (True, SAME)})
    assert _order(up, "soc")[0] == "soc@vllm"
    assert up.headers("soc@vllm", "soc@vllm")["x-granite-fallback"] == "no"


def test_when_everything_is_down_all_are_tried_in_order(tmp_path: Path) -> None:
    router = _router(_settings(tmp_path), {"vllm": (False, OURS), "llamacpp": (False, SAME)})
    assert _order(router, "soc") == ["soc@vllm", "soc-gguf@llamacpp"]


def test_what_was_seen_long_ago_is_not_healthy(tmp_path: Path) -> None:
    router = _router(_settings(tmp_path), {"vllm": (True, OURS), "llamacpp": (True, SAME)})
    seen = router.observer.seen
    seen["vllm"] = replace(seen["vllm"], checked_at=time.time() - 60)
    assert _order(router, "soc") == ["soc-gguf@llamacpp"]


def test_an_unknown_artefact_is_never_a_fallback(tmp_path: Path) -> None:
    router = _router(_settings(tmp_path), {"vllm": (False, None), "llamacpp": (True, None)})
    assert _order(router, "soc") == ["soc@vllm"]


def test_another_model_is_a_fallback_only_when_allowed_by_name(tmp_path: Path) -> None:
    settings = _settings(tmp_path, agents="allow_fallback: {soc: [big@openai]}")
    router = _router(settings, {"vllm": (False, OURS), "openai": (True, None)})
    assert _order(router, "soc") == ["big@openai"]
    assert router.headers("big@openai", "soc@vllm")["x-granite-run"] == "unknown"
    assert _order(router, "soc-gguf") == ["soc-gguf@llamacpp"]


def test_an_exact_deployment_has_no_fallback(tmp_path: Path) -> None:
    router = _router(_settings(tmp_path), {"vllm": (False, OURS), "llamacpp": (True, SAME)})
    assert _order(router, "soc@vllm") == ["soc@vllm"]


@pytest.mark.parametrize(
    ("strategy", "first"), [("local-first", "soc@vllm"), ("cloud-first", "big@openai"), ("cheapest", "soc-gguf@llamacpp")]
)
def test_strategies(tmp_path: Path, strategy: Strategy, first: str) -> None:
    settings = _settings(tmp_path, agents="prices: {vllm: 0.1, openai: 2}")
    seen = {"vllm": (True, OURS), "llamacpp": (True, SAME), "openai": (True, OURS)}
    assert _order(_router(settings, seen, strategy), "soc" if strategy != "cloud-first" else "big")[0] == first


def test_an_agent_is_answered_by_its_runs_fine_tune_only(tmp_path: Path) -> None:
    run = make_run(RunFolder("mine", tmp_path))
    from pipeline.serve import artefacts

    mine = artefacts.of_file(run.gguf)
    settings = _settings(tmp_path, agents="agents: {triage: {run: mine}, fast: {run: mine, backend: llamacpp}}")
    router = _router(settings, {"vllm": (True, OTHER), "llamacpp": (True, mine)}, output=tmp_path)
    assert _order(router, "triage") == ["soc-gguf@llamacpp"]
    assert _order(router, "mine") == ["soc-gguf@llamacpp"]
    assert _order(router, "fast") == ["soc-gguf@llamacpp"]
    wrong = _router(settings, {"vllm": (True, OTHER), "llamacpp": (True, OTHER)}, output=tmp_path)
    assert _order(wrong, "triage") == []
    assert _order(wrong, "fast") == []


def test_litellms_configuration_names_keys_and_never_holds_them(tmp_path: Path) -> None:
    settings = _settings(tmp_path)
    router = _router(settings, {})
    path = tmp_path / "litellm.yaml"
    write_config(path, router.deployments)
    text = path.read_text()
    assert "planted" not in text
    by_name = {e["model_name"]: e["litellm_params"] for e in json.loads(text)["model_list"]}
    assert by_name["big@openai"]["api_key"] == "os.environ/OPENAI_COMPATIBLE_API_KEY"
    assert by_name["soc@vllm"]["api_base"] == "http://127.0.0.1:8003/v1"
    assert by_name["soc@vllm"]["api_key"] == "os.environ/VLLM_API_KEY"
    assert by_name["soc-gguf@llamacpp"]["api_key"] == "os.environ/LLAMA_API_KEY"
    assert by_name["soc:latest@ollama"]["api_key"] == "none"
    assert litellm_config(router.deployments)["general_settings"]["master_key"] == "os.environ/LITELLM_MASTER_KEY"


def test_a_gateway_for_others_needs_a_key(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="could be used by everyone") as caught:
        services.gateway_launch(_settings(tmp_path), "0.0.0.0", 0, tmp_path)
    assert "GATEWAY_API_KEY" in caught.value.remedy
    open_one = services.gateway_launch(_settings(tmp_path, "GATEWAY_API_KEY=sk-planted2"), "0.0.0.0", 0, tmp_path)
    assert "planted" not in repr(open_one)
    assert services.gateway_launch(_settings(tmp_path), "127.0.0.1", 0, tmp_path).argv[3:5] == ("--host", "127.0.0.1")


def _ask(router: Router, keys: Keys, path: str, headers: list[tuple[bytes, bytes]]) -> tuple[int, dict[bytes, bytes], list[str]]:
    """Status, the headers LiteLLM would see (none when it was not reached), and the body's keys."""
    sent: list[dict[str, object]] = []
    reached: dict[bytes, bytes] = {}

    async def app(scope: dict[str, object], receive: object, send: object) -> None:
        reached.update(dict(scope["headers"]))  # type: ignore[call-overload]
        sent.append({"type": "http.response.start", "status": 200})

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "headers": headers}
    asyncio.run(guarded(app, router, keys, asyncio.Event())(scope, None, send))
    return int(str(sent[0]["status"])), reached, [str(m.get("body", "")) for m in sent]


def test_only_documented_paths_reach_litellm_and_only_with_the_key(tmp_path: Path) -> None:
    router = _router(_settings(tmp_path), {})
    keys = Keys("sk-client", "sk-inner")
    right = [(b"authorization", b"Bearer sk-client"), (b"x-litellm-api-key", b"sk-x")]
    assert _ask(router, keys, "/key/generate", right)[0] == 404
    assert _ask(router, keys, "/v1/chat/completions", [])[0] == 401
    assert _ask(router, keys, "/v1/chat/completions", [(b"authorization", b"Bearer sk-wrong")])[0] == 401
    assert _ask(router, keys, "/v1/chat/completions", right)[:2] == (200, {b"authorization": b"Bearer sk-inner"})
    assert _ask(router, Keys("", "sk-inner"), "/v1/chat/completions", [])[:2] == (200, {b"authorization": b"Bearer sk-inner"})
    assert "soc@vllm" in _ask(router, keys, "/v1/models", right)[2][1]
    assert "sk-" not in repr(keys)


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        (b"origin", b"https://evil.example", 403),
        (b"origin", b"null", 403),
        (b"origin", b"http://127.0.0.1.evil.example", 403),
        (b"host", b"rebound.example:4000", 403),
        (b"host", b"localhost.evil.example", 403),
        (b"origin", b"http://localhost:8888", 200),
        (b"host", b"127.0.0.1:4000", 200),
        (b"host", b"localhost", 200),
        (b"host", b"[::1]:4000", 200),
    ],
)
def test_without_a_key_pages_of_other_sites_are_refused(tmp_path: Path, name: bytes, value: bytes, status: int) -> None:
    router = _router(_settings(tmp_path), {})
    for path in ("/v1/chat/completions", "/v1/models"):
        assert _ask(router, Keys("", "sk-inner"), path, [(name, value)])[0] == status
    # with a key, whoever has it may ask from anywhere
    right = [(name, value), (b"authorization", b"Bearer sk-client")]
    assert _ask(router, Keys("sk-client", "sk-inner"), "/v1/models", right)[0] == 200


def test_a_password_in_a_url_does_not_reach_litellms_file(tmp_path: Path) -> None:
    settings = _settings(tmp_path, "SGLANG_MODEL=x\nSGLANG_BASE_URL=http://me:planted@127.0.0.1:8004/v1")
    with pytest.raises(InputError, match="does not take a URL with a password: sglang") as caught:
        services.gateway_launch(settings, "127.0.0.1", 0, tmp_path)
    assert "planted" not in str(caught.value)
    path = tmp_path / "litellm.yaml"
    write_config(path, _router(_settings(tmp_path), {}).deployments)
    assert path.stat().st_mode & 0o777 == 0o600


def _filled(settings: Settings) -> dict[str, dict[str, float]]:
    """What LiteLLM fills into a request that names no sampling settings, by deployment."""
    entries = litellm_config(_router(settings, {}).deployments)["model_list"]
    given = [(entry["model_name"], entry["litellm_params"]) for entry in entries]
    return {name: {key: params[key] for key in ("temperature", "top_p") if key in params} for name, params in given}


def test_every_backend_is_given_the_runs_sampling_settings_unless_agents_yaml_says_others(tmp_path: Path) -> None:
    both = {"temperature": 0, "top_p": 1}
    ours = {"soc@vllm": both, "soc-gguf@llamacpp": both, "soc:latest@ollama": both, "granite-soc@sglang": both}
    assert _filled(_settings(tmp_path)) == {**ours, "big@openai": {"temperature": 0}}
    agents = "sampling: {openai: {}, vllm: {temperature: 0.5}}"
    assert _filled(_settings(tmp_path, agents=agents)) == {**ours, "big@openai": {}, "soc@vllm": {"temperature": 0.5}}


@pytest.mark.parametrize("wrong", ["{vllm: {top_k: 3}}", "{vllm: {temperature: hot}}", "{vllm: {temperature: -1}}", "{x: {}}"])
def test_sampling_settings_that_no_request_has_are_refused(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(InputError, match="entries that do not fit") as caught:
        _router(_settings(tmp_path, agents=f"sampling: {wrong}"), {})
    assert "sampling." in str(caught.value)


def test_an_ipv6_address_is_refused_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="::1 is an IPv6 address, which nothing here binds"):
        services.gateway_launch(_settings(tmp_path), "::1", 0, tmp_path)


def test_a_gateway_that_never_saw_the_primary_up_knows_it_from_its_note(tmp_path: Path) -> None:
    settings = _settings(tmp_path)
    seen: dict[str, tuple[bool, Artefact | None]] = {"vllm": (False, None), "llamacpp": (True, SAME)}
    assert _order(_router(settings, seen, output=tmp_path), "soc") == ["soc@vllm"]
    ready = Ready("http://localhost:8003", "soc", artefact=OURS)
    records.mark_ready(RunFolder("mine", tmp_path).servers, "vllm", None, ready)
    assert _order(_router(settings, seen, output=tmp_path), "soc") == ["soc-gguf@llamacpp"]
    # one that is up and serves something unknown is not taken for what it served once
    seen["vllm"] = (True, None)
    assert _order(_router(settings, seen, output=tmp_path), "soc") == ["soc@vllm"]


def test_cloud_first_among_backends_of_the_same_fine_tune(tmp_path: Path) -> None:
    seen = {"vllm": (True, OURS), "llamacpp": (True, SAME), "openai": (True, OURS)}
    orders = {s: _order(_router(_settings(tmp_path), seen, s), "soc") for s in get_args(Strategy)}
    assert orders["cloud-first"] == ["big@openai", "soc@vllm", "soc-gguf@llamacpp"]
    assert orders["local-first"] == ["soc@vllm", "soc-gguf@llamacpp", "big@openai"]
