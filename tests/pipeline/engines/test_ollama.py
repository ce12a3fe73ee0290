import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from pipeline import engines
from pipeline.engines.ollama import Ollama
from pipeline.errors import EngineError, InputError
from pipeline.machine.hardware import Cpu
from pipeline.machine.named import hardware_from
from pipeline.model.model import Model
from pipeline.planning.plan import Plan, Purpose, Request
from pipeline.prompts.conversation import Conversation, Prompt


def _plan(machine: str, shape: str, purpose: Purpose = "serve", **overrides: str) -> Plan:
    return Ollama().plan(Request(Model.from_shape(shape), hardware_from(machine), purpose, "m", overrides))


def test_a_cpu_machine() -> None:
    plan = _plan("cpu-2c-24g", "granite-4.1-3b")
    assert plan.arguments == []
    assert plan.environment == {
        "OLLAMA_NUM_PARALLEL": "4",
        "OLLAMA_MAX_LOADED_MODELS": "1",
        "OLLAMA_KEEP_ALIVE": "30m",
        "OLLAMA_CONTEXT_LENGTH": "8192",
    }
    assert {p.name: p.value for p in plan.parameters} == {"num_ctx": "8192", "num_gpu": "0", "num_thread": "2"}


@pytest.mark.parametrize(
    ("cpu", "threads", "why"),
    [
        (Cpu(2), 2, "physical cores"),
        (Cpu(2, idle=2.0), 2, "physical cores"),
        (Cpu(2, idle=1.5), 2, "physical cores"),
        (Cpu(2, idle=1.1), 1, "about 1.1 cores are idle now, of 2"),
        (Cpu(2, idle=0.0), 1, "about 0 cores are idle now, of 2"),
        # hyperthreads do not compute more; the quota of a container, which Ollama does not see, counts
        (Cpu(16, physical=8, idle=15.8), 8, "physical cores"),
        (Cpu(16, physical=8, idle=5.2), 5, "about 5.2 cores"),
        (Cpu(2, physical=32, idle=60.0), 2, "physical cores"),
    ],
)
def test_threads_are_the_cores_that_other_work_leaves_idle(cpu: Cpu, threads: int, why: str) -> None:
    machine = replace(hardware_from("cpu-2c-24g"), cpu=cpu)
    plan = Ollama().plan(Request(Model.from_shape("granite-4.0-350m"), machine, "serve", "m"))
    planned = next(p for p in plan.parameters if p.name == "num_thread")
    assert (planned.value, planned.source) == (str(threads), "planned")
    assert why in planned.reason


def test_threads_given_by_the_user_win_and_variables_of_openmp_are_refused() -> None:
    plan = _plan("cpu-2c-24g", "granite-4.0-350m", **{"num-thread": "7"})
    assert [(p.value, p.source) for p in plan.parameters if p.name == "num_thread"] == [("7", "user")]
    for wrong in ({"num_thread": "0"}, {"GOMP_SPINCOUNT": "1000"}, {"OMP_WAIT_POLICY": "passive"}):
        with pytest.raises(InputError):
            _plan("cpu-2c-24g", "granite-4.0-350m", **wrong)


def test_a_gpu_machine_leaves_the_layers_to_ollama() -> None:
    assert {p.name: p.value for p in _plan("t4", "granite-4.1-3b").parameters} == {"num_ctx": "8192", "num_gpu": "-1"}


def test_parameters_are_in_the_json_with_their_reasons() -> None:
    described = _plan("t4", "granite-4.1-3b").to_json()
    assert described["parameters"] == {"num_ctx": "8192", "num_gpu": "-1"}
    assert "num_ctx" in [row["flag"] for row in described["reasons"]]


def test_overrides() -> None:
    plan = _plan("l4", "granite-4.1-3b", num_ctx="16384", OLLAMA_NUM_PARALLEL="3", num_gpu="20")
    assert (plan.max_model_len, plan.max_num_seqs) == (16384, 3)
    assert [(p.name, p.value, p.source) for p in plan.parameters] == [("num_ctx", "16384", "user"), ("num_gpu", "20", "user")]
    for wrong in ({"num_ctx": "999999"}, {"num_gpu": "-2"}, {"OLLAMA_GPU_LAYERS": "3"}):
        with pytest.raises(InputError):
            _plan("l4", "granite-4.1-3b", **wrong)


def test_folders_are_refused_and_large_models_say_what_fits() -> None:
    folder = replace(Model.from_shape("granite-4.0-350m"), format="safetensors")
    assert not Ollama().plan(Request(folder, hardware_from("l4"))).feasible
    plan = _plan("cpu-2c-24g", "granite-4.1-30b")
    assert (plan.feasible, plan.alternatives) == (False, ("the Q5_K_M GGUF (19.2 GiB), in RAM on the CPU",))


def test_launch_serves_on_the_given_address() -> None:
    request = Request(Model.from_shape("granite-4.0-350m"), hardware_from("cpu-2c-24g"), "serve", "granite-soc:latest")
    engine = engines.get("ollama")
    launch = engine.launch(engine.plan(request), request, host="127.0.0.1", port=11434)
    assert Path(launch.argv[0]).name == "ollama"
    assert launch.argv[1:] == ("serve",)
    assert launch.env["OLLAMA_HOST"] == "127.0.0.1:11434"
    assert (launch.url, launch.ready_path, launch.model) == ("http://127.0.0.1:11434", "/api/version", "granite-soc:latest")


def test_an_absent_ollama_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    found = Ollama().available()
    assert (found.usable, found.reason) == (False, "ollama is not on PATH")
    assert "install" in found.remedy


class _Server:
    """Ollama's HTTP API as the notes describe it: blobs by digest, and create."""

    def __init__(self, created: dict[str, Any], known: bool = False) -> None:
        self.created, self.known, self.seen = created, known, list[tuple[str, str, Any]]()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        content = request.read()
        path = request.url.path
        body = json.loads(content) if path == "/api/create" else content
        self.seen.append((request.method, path, body))
        if path == "/api/create":
            return httpx.Response(200, json=self.created)
        return httpx.Response(200 if self.known or request.method == "POST" else 404)


def _create(server: _Server, gguf: Path) -> None:
    with httpx.Client(transport=httpx.MockTransport(server), base_url="http://x") as client:
        Ollama().create(client, "m", gguf, {"template": "{{ .Prompt }}", "parameters": {"num_ctx": 4096}})


def test_create_uploads_the_blob_once_and_names_it(tmp_path: Path) -> None:
    gguf = tmp_path / "x.gguf"
    gguf.write_bytes(b"GGUF" * 1000)
    digest = "sha256:" + hashlib.sha256(gguf.read_bytes()).hexdigest()
    server = _Server({"status": "success"})
    _create(server, gguf)
    body = {
        "model": "m",
        "files": {"x.gguf": digest},
        "stream": False,
        "template": "{{ .Prompt }}",
        "parameters": {"num_ctx": 4096},
    }
    assert server.seen == [
        ("HEAD", f"/api/blobs/{digest}", b""),
        ("POST", f"/api/blobs/{digest}", gguf.read_bytes()),
        ("POST", "/api/create", body),
    ]
    again = _Server({"status": "success"}, known=True)
    _create(again, gguf)
    assert [method for method, _, _ in again.seen] == ["HEAD", "POST"]


def test_a_refused_create_shows_ollama_s_words(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(EngineError) as caught:
        _create(_Server({"error": "unknown parameter 'foo'"}), tmp_path / "x.gguf")
    assert caught.value.evidence == "unknown parameter 'foo'"


def test_the_prompt_is_the_rendered_text() -> None:
    answers = iter([{"_debug_info": {"rendered_template": "<|x|>hi"}}, {"message": {}}])
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json=next(answers)))
    conversation = Conversation("c", ({"role": "user", "content": "hi"},))
    with httpx.Client(transport=transport, base_url="http://x") as client:
        assert Ollama().prompt(client, "m", conversation) == Prompt("<|x|>hi")
        with pytest.raises(EngineError, match="does not tell the prompt"):
            Ollama().prompt(client, "m", conversation)
