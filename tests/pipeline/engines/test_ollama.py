import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from pipeline import engines
from pipeline.engines.base import UNNAMED
from pipeline.engines.ollama import Ollama
from pipeline.errors import EngineError, InputError
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
        "GOMP_SPINCOUNT": "1000",
    }
    assert {p.name: p.value for p in plan.parameters} == {"num_ctx": "8192", "num_gpu": "0"}


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
