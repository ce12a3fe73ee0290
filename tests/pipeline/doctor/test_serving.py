"""The documented troubles, each caused for real: a closed port, another model name, a changed backend, a failed start, a dead container."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

import pytest
from stub_server import serving
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config import Settings, load
from pipeline.doctor.findings import Facts, Finding, examine, worst_first
from pipeline.doctor.serving import APPLICATIONS, backend, containers, last_starts, settings, status_api
from pipeline.engines.base import Launch
from pipeline.errors import InputError
from pipeline.machine.named import hardware_from
from pipeline.machine.packages import Installed
from pipeline.net.loopback import claim
from pipeline.operate import services
from pipeline.runs.folder import RunFolder
from pipeline.serve import records, server
from pipeline.serve.records import Record

pytestmark = pytest.mark.usefixtures("no_settings")


def _settings(tmp_path: Path, **values: str) -> Settings:
    env = tmp_path / ".env"
    env.write_text("".join(f"{name}={value}\n" for name, value in values.items()))
    return load(env)


def _facts(settings: Settings, run: RunFolder, env_file: Path = Path("none")) -> Facts:
    nothing = Installed("python", {}, {}, {})
    return Facts(hardware_from("cpu-2c-24g"), nothing, None, {}, settings, run, env_file=env_file)


def _answers(settings: Settings, run: RunFolder) -> Finding:
    (found,) = backend(_facts(settings, run))
    return found


def test_connection_refused_names_the_command_that_starts_the_server(tmp_path: Path, run: RunFolder) -> None:
    port = claim("127.0.0.1", 0)
    found = _answers(_settings(tmp_path, VLLM_BASE_URL=f"http://127.0.0.1:{port}/v1"), run)
    assert (found.check, found.status) == ("vllm answers", "warn")
    assert "connection refused" in found.evidence
    assert found.remedy == "granite-pipeline serve vllm --run test"


def test_connection_refused_while_the_runs_server_is_at_another_port(tmp_path: Path, run: RunFolder) -> None:
    launch = Launch(
        "llamacpp", (sys.executable, "-c", "import time; time.sleep(60)"), {}, "http://127.0.0.1:54321", "/health", "m"
    )
    process = server.start(launch, run.logs / "llamacpp-1.log", owner=os.getpid())
    records.save(run.path / "servers", Record(process.engine, process))
    try:
        url = f"http://127.0.0.1:{claim('127.0.0.1', 0)}"
        found = _answers(_settings(tmp_path, LLM_BACKEND="llamacpp", LLAMACPP_BASE_URL=url), run)
    finally:
        server.stop(process)
    assert found.remedy == (
        "llamacpp of run test runs at http://127.0.0.1:54321: set LLAMACPP_BASE_URL=http://127.0.0.1:54321/v1"
    )


def test_model_not_found(tmp_path: Path, run: RunFolder) -> None:
    with serving({"/v1/models": {"data": [{"id": "served"}]}, "/health": b""}) as stub:
        found = _answers(_settings(tmp_path, VLLM_BASE_URL=stub.url, VLLM_MODEL="wanted"), run)
    assert found.status == "fail"
    assert "not served here, which has served" in found.evidence
    assert found.remedy == "set VLLM_MODEL to a name that is served, or serve the run as --served-model-name wanted"


def test_ollama_model_not_found(tmp_path: Path, run: RunFolder) -> None:
    with serving({"/api/tags": {"models": [{"name": "llama3:8b"}]}, "/api/ps": {"models": []}}) as stub:
        found = _answers(_settings(tmp_path, LLM_BACKEND="ollama", OLLAMA_BASE_URL=stub.url), run)
    assert "llama3:8b" in found.evidence
    assert found.remedy == "granite-pipeline serve ollama --run test creates it; or set OLLAMA_MODEL to one of these"


def test_a_backend_that_answers_is_ok(tmp_path: Path, run: RunFolder) -> None:
    with serving({"/v1/models": {"data": [{"id": "granite-soc-specialist"}]}, "/health": b""}) as stub:
        assert _answers(_settings(tmp_path, VLLM_BASE_URL=stub.url), run).status == "ok"


def test_the_backend_was_changed_in_the_file_but_the_environment_still_holds_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_BACKEND", "vllm")
    [found] = settings(_facts(_settings(tmp_path, LLM_BACKEND="llamacpp"), RunFolder("test", tmp_path), tmp_path / ".env"))
    assert found.evidence.startswith("LLM_BACKEND: the environment wins over")


@pytest.mark.slow
def test_the_backend_was_changed_but_the_status_api_still_uses_the_old_one(tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="the gateway extra is not installed")
    launch = services.status_launch("127.0.0.1", 0, tmp_path)
    process = services.start(launch, tmp_path, os.getpid(), lambda _: None)
    try:
        run = RunFolder("test", tmp_path)
        [found] = status_api(_facts(_settings(tmp_path, LLM_BACKEND="llamacpp"), run))
        assert list(status_api(_facts(_settings(tmp_path), run))) == []
    finally:
        server.stop(process)
    assert found.evidence == f"LLM_BACKEND=llamacpp, but the status API at {launch.url} was started with vllm"
    assert "restart" in found.remedy


def test_cuda_out_of_memory_in_the_last_start(run: RunFolder) -> None:
    run.logs.mkdir(parents=True)
    (run.logs / "vllm-20260101-000000.log").write_text("older: address already in use\n")
    newest = run.logs / "vllm-20260102-000000.log"
    newest.write_text("x\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB\n")
    [found] = last_starts(_facts(Settings(_env_file=None), run))
    assert found.check == "last start of vllm"
    assert "memory" in found.evidence
    assert str(newest) in found.evidence
    assert found.remedy


def test_a_stages_log_is_no_server_log(run: RunFolder) -> None:
    run.logs.mkdir(parents=True)
    server_log = run.logs / "vllm-20260101-000000.log"
    server_log.write_text("ready\n")
    (run.logs / "verify-20260102-000000.log").write_text("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n")
    assert list(last_starts(_facts(Settings(_env_file=None), run))) == []
    assert services.logs(run.path) == services.logs(run.path, "vllm") == [server_log]
    server_log.unlink()
    with pytest.raises(InputError, match="run test has no server log"):
        services.logs(run.path)


def test_a_container_that_exits_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # no container engine runs in CI: a docker command that answers as docker does
    docker = tmp_path / "docker"
    docker.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = ps ]; then case "$*" in *project=granite*) ;; *) exit 9;; esac\n'
        'echo \'{"Names":"granite-vllm-1","Status":"Exited (1) 3 seconds ago"}\'\n'
        'echo \'{"Names":"granite-gateway-1","Status":"Exited (2) 3 seconds ago"}\'\n'
        'echo \'{"Names":"granite-setup-1","Status":"Exited (0) 3 seconds ago"}\'\n'
        'elif [ "$4" = granite-vllm-1 ]; then echo "RuntimeError: Failed to infer device type" >&2\n'
        "else echo 'refused: Bearer planted-0815'; fi\n"
    )
    docker.chmod(docker.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found, other = containers(_facts(Settings(_env_file=None), RunFolder("test", tmp_path)))
    assert (other.check, other.evidence) == ("container granite-gateway-1", "Exited (2) 3 seconds ago: refused: Bearer ********")
    assert found.check == "container granite-vllm-1"
    assert found.evidence.startswith("Exited (1) 3 seconds ago: ")
    assert found.remedy != "docker logs granite-vllm-1"


def test_without_a_container_engine_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list(containers(_facts(Settings(_env_file=None), RunFolder("test", tmp_path)))) == []


def test_doctor_tells_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with serving({"/v1/models": {"data": [{"id": "served"}]}, "/health": b""}) as stub:
        monkeypatch.setenv("VLLM_BASE_URL", stub.url)
        done = CliRunner().invoke(app, ["doctor", "--json", "--output", str(tmp_path)])
    [found] = [f for f in json.loads(done.stdout)["findings"] if f["check"] == "vllm answers"]
    assert (done.exit_code, found["status"]) == (1, "fail")


def _applications(settings: Settings, run: RunFolder, env_file: Path) -> list[Finding]:
    return worst_first(examine(_facts(settings, run, env_file), APPLICATIONS))


def test_a_damaged_server_record_is_a_finding(tmp_path: Path, run: RunFolder) -> None:
    record = run.path / "servers" / "vllm.json"
    record.parent.mkdir(parents=True)
    record.write_text('{"engine": "vllm"}')
    (run.path / "servers" / "llamacpp.json").write_text("{")
    found = _applications(_settings(tmp_path, VLLM_BASE_URL="ftp://127.0.0.1"), run, tmp_path / ".env")
    [damaged] = [f for f in found if f.check == "last starts"]
    assert (damaged.status, "llamacpp.json:1: not valid JSON" in damaged.evidence) == ("fail", True)
    (run.path / "servers" / "llamacpp.json").unlink()
    [damaged] = [f for f in _applications(_settings(tmp_path), run, tmp_path / ".env") if f.check == "last starts"]
    assert (damaged.evidence.startswith(f"{record} is not a server record"), damaged.remedy) == (True, "delete it")


def test_everything_at_once_is_worst_first(tmp_path: Path, run: RunFolder) -> None:
    env = tmp_path / ".env"
    env.write_text("VLLM_BASEURL=x\nVLLM_BASE_URL=ftp://127.0.0.1\n")
    found = [t for t in _applications(load(env), run, env) if not t.check.startswith("container")]
    assert [(t.check, t.status) for t in found] == [("settings", "fail"), ("vllm answers", "fail"), ("settings", "warn")]
