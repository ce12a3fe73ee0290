import json
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from pipeline import engines
from pipeline.engines.llamacpp import LlamaCpp
from pipeline.errors import InputError
from pipeline.machine.named import hardware_from
from pipeline.model.model import Model
from pipeline.planning.gguf_fit import gguf_that_fits
from pipeline.planning.plan import Plan, Purpose, Request
from pipeline.prompts.conversation import Conversation, Prompt


def _plan(machine: str, shape: str, purpose: Purpose = "serve", **overrides: str) -> Plan:
    return LlamaCpp().plan(Request(Model.from_shape(shape), hardware_from(machine), purpose, "m", overrides))


def test_a_cpu_sleeps_at_barriers_and_uses_the_cores_it_has() -> None:
    plan = _plan("cpu-2c-24g", "granite-4.0-350m", "verify")
    assert plan.arguments == [
        "--model",
        "granite-4.0-350m.Q8_0.gguf",
        "--alias",
        "m",
        "-c",
        "32768",
        "--parallel",
        "8",
        "--threads",
        "2",
        "--jinja",
    ]
    assert plan.environment == {"GOMP_SPINCOUNT": "1000"}


def test_a_gpu_leaves_the_layers_to_llama_cpp() -> None:
    plan = _plan("rtx4090", "granite-4.1-8b")
    assert plan.arguments == [
        "--model",
        "granite-4.1-8b.Q8_0.gguf",
        "--alias",
        "m",
        "-c",
        "65536",
        "--parallel",
        "8",
        "--threads",
        "16",
        "--jinja",
    ]
    # the portable wheel computes on the CPU, beside a GPU too
    assert plan.environment == {"GOMP_SPINCOUNT": "1000"}


def test_context_and_port_are_always_given() -> None:
    request = Request(Model.from_shape("granite-4.0-h-micro"), hardware_from("cpu-2c-24g"))
    launch = LlamaCpp().launch(LlamaCpp().plan(request), request, host="127.0.0.1", port=8005)
    assert "-c" in launch.argv
    assert launch.argv[-2:] == ("--port", "8005")


def test_a_small_ram_gets_fewer_slots_before_a_shorter_context() -> None:
    plan = _plan("cpu-2c-24g", "granite-4.1-8b")
    assert (plan.feasible, plan.max_num_seqs, plan.max_model_len) == (True, 4, 8192)
    tight = _plan("cpu-4c-12g", "granite-4.1-8b")
    assert (tight.feasible, tight.max_num_seqs) == (True, 1)


def test_what_does_not_fit_the_gpu_is_shared_with_the_cpu_and_says_so() -> None:
    plan = _plan("rtx4060", "granite-4.1-8b")
    assert plan.feasible
    assert "part of the layers run on the CPU" in plan.warnings[0]
    assert plan.alternatives == ("the Q4_K_M GGUF (4.8 GiB), all of it on the GPU",)


def test_what_fits_nowhere_is_refused_with_numbers() -> None:
    plan = _plan("cpu-2c-24g", "granite-4.1-30b")
    assert not plan.feasible
    assert plan.warnings[0].startswith("needs 29.3 GiB (weights 28.6")
    assert plan.alternatives == ("the Q5_K_M GGUF (19.2 GiB), in RAM on the CPU",)


def test_memory_is_per_gpu_when_layers_are_split() -> None:
    one, two = _plan("a100-40", "granite-4.1-8b").memory, _plan("2xa100-40", "granite-4.1-8b").memory
    assert two.weights == pytest.approx(one.weights / 2)
    assert two.available == pytest.approx(one.available)


def test_a_safetensors_folder_is_refused_with_the_way_out() -> None:
    model = replace(Model.from_shape("granite-4.0-350m"), format="safetensors")
    plan = LlamaCpp().plan(Request(model, hardware_from("cpu-2c-24g")))
    assert not plan.feasible
    assert plan.alternatives[0] == "granite-pipeline export makes a Q8_0 GGUF of it"


@pytest.mark.parametrize("key", ["c", "ctx_size", "-c", "--ctx-size", "ctx-size"])
def test_context_by_any_of_its_names(key: str) -> None:
    plan = _plan("cpu-2c-24g", "granite-4.0-350m", **{key: "4096", "parallel": "2"})
    assert plan.arguments[plan.arguments.index("-c") + 1] == "4096"
    assert [s.source for s in plan.flags if s.name in ("-c", "--parallel")] == ["user", "user"]
    assert (plan.max_model_len, plan.max_num_seqs) == (2048, 2)


def test_a_quantised_cache_is_counted() -> None:
    full, small = _plan("l4", "granite-4.1-8b"), _plan("l4", "granite-4.1-8b", cache_type_k="q8_0", cache_type_v="q8_0")
    assert small.memory.kv_cache == pytest.approx(full.memory.kv_cache * 34 / 64)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"parallel": "0"}, "from 1 to 256"),
        ({"c": "999999999"}, "8 slots of the model's 32768 tokens"),
        ({"nonsense": "1"}, "no setting --nonsense"),
        ({"cache_type_k": "q3"}, "--cache-type-k is 'q3'"),
        ({"alias": "x"}, "cannot be set"),
    ],
)
def test_illegal_overrides_are_refused(overrides: dict[str, str], words: str) -> None:
    with pytest.raises(InputError) as caught:
        _plan("cpu-2c-24g", "granite-4.0-350m", **overrides)
    assert words in str(caught.value)


def test_the_best_gguf_for_a_machine() -> None:
    big = Model.from_shape("granite-4.1-30b")
    assert gguf_that_fits(big, hardware_from("h100")) == ("Q8_0", pytest.approx(28.56, rel=0.01), "all of it on the GPU")
    assert gguf_that_fits(big, hardware_from("cpu-2c-8g")) is None


def test_the_wheel_s_server_is_launched_without_llama_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    request = Request(Model.from_shape("granite-4.0-350m"), hardware_from("cpu-2c-24g"), "verify", "m")
    engine = engines.get("llamacpp")
    launch = engine.launch(engine.plan(request), request, host="127.0.0.1", port=8005)
    assert list(launch.argv) == [
        *(sys.executable, "-m", "pipeline.engines.llamacpp_server"),
        *["--model", "granite-4.0-350m.Q8_0.gguf", "--alias", "m", "-c", "32768", "--parallel", "8", "--threads", "2", "--jinja"],
        *["--host", "127.0.0.1", "--port", "8005"],
    ]
    assert (launch.url, launch.ready_path, launch.model) == ("http://127.0.0.1:8005", "/health", "m")


def test_a_llama_server_on_path_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\necho 'version: 6123 (abc)' >&2\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    request = Request(Model.from_shape("granite-4.0-350m"), hardware_from("cpu-2c-24g"))
    assert LlamaCpp().launch(LlamaCpp().plan(request), request, host="127.0.0.1", port=1).argv[0] == str(program)
    assert LlamaCpp().available().version == f"llama-server 6123 ({program})"


def test_several_numa_nodes_are_used() -> None:
    machine = hardware_from("cpu-64c-256g")
    machine = replace(machine, cpu=replace(machine.cpu, numa_nodes=2))
    plan = LlamaCpp().plan(Request(Model.from_shape("granite-4.1-8b"), machine))
    assert plan.arguments[plan.arguments.index("--numa") + 1] == "distribute"


def test_the_prompt_is_the_applied_template_tokenised_with_special_tokens() -> None:
    seen = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append((request.url.path, json.loads(request.content)))
        return httpx.Response(200, json={"prompt": "<|x|>hi"} if request.url.path == "/apply-template" else {"tokens": [5, 6]})

    conversation = Conversation("c", ({"role": "user", "content": "hi"},), ({"type": "function"},))
    with httpx.Client(transport=httpx.MockTransport(answer), base_url="http://x") as client:
        assert LlamaCpp().prompt(client, "m", conversation) == Prompt("<|x|>hi", (5, 6))
    assert seen == [
        ("/apply-template", {"messages": [{"role": "user", "content": "hi"}], "tools": [{"type": "function"}]}),
        ("/tokenize", {"content": "<|x|>hi", "add_special": True, "parse_special": True}),
    ]
