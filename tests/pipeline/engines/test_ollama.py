import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import servers
from stub_server import serving

from pipeline import engines
from pipeline.engines.base import UNNAMED
from pipeline.engines.ollama import Ollama
from pipeline.errors import EngineError, InputError
from pipeline.machine.hardware import Cpu
from pipeline.machine.named import hardware_from
from pipeline.model.model import Model
from pipeline.model.tokenizer import Tokenizer
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


@pytest.fixture
def service(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """(URL, log) of a small server that follows the documented API."""
    with servers.stub_ollama(tmp_path) as server:
        yield server.url(20, "/api/version"), server.log


def test_create_uploads_the_blob_once_and_names_it(tmp_path: Path, service: tuple[str, Path]) -> None:
    url, log = service
    gguf = tmp_path / "x.gguf"
    gguf.write_bytes(b"GGUF" * 1000)
    digest = "sha256:" + hashlib.sha256(gguf.read_bytes()).hexdigest()
    for _ in range(2):
        Ollama().create(url, "m", gguf, {"template": "{{ .Prompt }}", "parameters": {"num_ctx": 4096}})
    made = json.loads((tmp_path / "service" / "manifests" / "m:latest").read_text())
    assert made["files"] == {"x.gguf": digest}
    assert (made["template"], made["parameters"]) == ("{{ .Prompt }}", {"num_ctx": 4096})
    asked = [line for line in log.read_text().splitlines() if "version" not in line and "Listening" not in line]
    once, again = f"HEAD /api/blobs/{digest}", "POST /api/create"
    assert asked == [once, f"POST /api/blobs/{digest}", again, once, again]


def test_what_was_made_is_removed_and_what_is_gone_is_no_error(tmp_path: Path, service: tuple[str, Path]) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    Ollama().create(service[0], "m", tmp_path / "x.gguf", {})
    for _ in range(2):
        Ollama().remove(service[0], "m")
    assert not list((tmp_path / "service" / "manifests").iterdir())


@pytest.mark.parametrize(
    "said",
    [
        (400, {}, {"error": "unknown parameter 'foo'"}),
        (200, {"Content-Type": "application/x-ndjson"}, b'{"status": "x"}\n{"error": "unknown parameter \'foo\'"}\n'),
    ],
)
def test_a_refused_create_shows_ollama_s_words(tmp_path: Path, said: Any) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with serving({"/api/create": said}) as stub:
        stub.routes["/api/blobs/sha256:" + hashlib.sha256(b"GGUF").hexdigest()] = {}
        with pytest.raises(EngineError, match="Ollama could not create m") as caught:
            Ollama().create(stub.url, "m", tmp_path / "x.gguf", {})
    assert caught.value.evidence == "unknown parameter 'foo'"


@pytest.mark.parametrize("said", [b"", b'{"status": "using existing layer"}\n', b"<html>"])
def test_a_create_that_does_not_end_well_is_an_error(said: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with serving({"/api/create": (200, {}, said)}) as stub:
        stub.routes["/api/blobs/sha256:" + hashlib.sha256(b"GGUF").hexdigest()] = {}
        with pytest.raises(EngineError):
            Ollama().create(stub.url, "m", tmp_path / "x.gguf", {})


def test_the_prompt_is_the_rendered_text() -> None:
    answers = iter([{"_debug_info": {"rendered_template": "<|x|>hi"}}, {"message": {}}])
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json=next(answers)))
    conversation = Conversation("c", ({"role": "user", "content": "hi"},))
    with httpx.Client(transport=transport, base_url="http://x") as client:
        assert Ollama().prompt(client, "m", conversation) == Prompt("<|x|>hi")
        with pytest.raises(EngineError, match="does not tell the prompt"):
            Ollama().prompt(client, "m", conversation)


BLOB = "/models/blobs/sha256-" + "ab" * 32


@pytest.mark.parametrize(
    ("modelfile", "file"),
    [
        (f"# FROM m:latest\n\nFROM {BLOB}\nTEMPLATE x", BLOB),
        (f"FROM {BLOB}\nFROM {BLOB}", None),
        (f"FROM {BLOB}\nADAPTER {BLOB}", None),
        ("FROM /elsewhere/x.gguf", None),
    ],
    ids=["one blob", "a projector too", "an adapter too", "no blob"],
)
def test_the_file_it_loaded_is_the_blob_it_names(modelfile: str, file: str | None) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json={"modelfile": modelfile, "system": "S"}))
    with httpx.Client(transport=transport, base_url="http://x") as client:
        assert Ollama().loaded_file(client, "m") == file
        assert Ollama().own_system(client, "m") == "S"
    gone = httpx.MockTransport(lambda _: httpx.Response(404, json={"error": "model not found"}))
    with httpx.Client(transport=gone, base_url="http://x") as client:
        assert Ollama().loaded_file(client, "m") is None


def test_next_tokens_are_asked_and_told_as_text(tokenizer_folder: Path) -> None:
    tokenizer, seen = Tokenizer(tokenizer_folder), list[Any]()
    tops = [{"token": token, "logprob": value} for token, value in (("a", -0.1), ("", -3), ("no token", -4))]

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append((request.url.path, json.loads(request.read())))
        return httpx.Response(200, json={"logprobs": [{"token": "true", "top_logprobs": tops}]})

    prompt = Prompt("x", tuple(tokenizer.encode("x")))
    with httpx.Client(transport=httpx.MockTransport(answer), base_url="http://x") as client:
        said = Ollama().next_tokens(client, "m", [prompt], tokenizer)
    assert said == [[(tokenizer.encode("a")[0], -0.1), (tokenizer.named(""), -3), (UNNAMED, -4)]]
    path, body = seen[0]
    assert (path, body["prompt"], body["raw"], body["top_logprobs"]) == ("/api/generate", "x", True, 20)
    assert body["options"] == {"temperature": 0, "num_predict": 1}


def test_an_ollama_that_tells_no_probabilities_says_so(tokenizer_folder: Path) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json={"response": "x"}))
    with (
        httpx.Client(transport=transport, base_url="http://x") as client,
        pytest.raises(EngineError, match="no log-prob") as caught,
    ):
        Ollama().next_tokens(client, "m", [Prompt("x", (1,))], Tokenizer(tokenizer_folder))
    assert "0.12.11" in caught.value.remedy
