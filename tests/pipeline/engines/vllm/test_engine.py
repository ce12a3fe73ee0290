import json
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from pipeline import engines
from pipeline.engines.vllm.engine import Vllm
from pipeline.errors import EngineError, InputError
from pipeline.machine.gpus import Gpu
from pipeline.machine.hardware import Hardware
from pipeline.machine.named import hardware_from
from pipeline.model.model import Model
from pipeline.planning.plan import Plan, Purpose, Request
from pipeline.prompts.conversation import Conversation, Prompt

_QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


def _plan(machine: str, shape: str, purpose: Purpose = "serve", **overrides: str) -> Plan:
    return Vllm().plan(Request(Model.from_shape(shape), hardware_from(machine), purpose, "m", overrides))


_COMPACT = '--structured-outputs-config {"backend":"xgrammar","disable_any_whitespace":true}'


def _words(text: str) -> list[str]:
    return text.split()


def test_an_avx2_cpu_gets_float32_and_a_bounded_kv_cache() -> None:
    plan = _plan("cpu-2c-24g", "granite-4.0-350m", "verify")
    assert plan.arguments == _words(
        "--model ibm-granite/granite-4.0-350m --served-model-name m --dtype float32 --max-model-len 4096 --max-num-seqs 32 --enforce-eager "
        "--enable-auto-tool-choice --tool-call-parser granite4 " + _COMPACT
    )
    assert plan.environment == {
        **_QUIET,
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "2",
        "GOMP_SPINCOUNT": "10000",
    }


def test_a_bfloat16_cpu_serves_compiled() -> None:
    plan = _plan("cpu-16c-64g-bf16", "granite-4.0-h-tiny")
    assert plan.arguments == _words(
        "--model ibm-granite/granite-4.0-h-tiny --served-model-name m --dtype bfloat16 --max-model-len 8192 --max-num-seqs 32 "
        "--enable-auto-tool-choice --tool-call-parser granite4 " + _COMPACT
    )
    assert plan.environment == {**_QUIET, "VLLM_CPU_KVCACHE_SPACE": "6"}


@pytest.mark.parametrize(
    ("isa", "dtype"), [("avx2", "float32"), ("avx512", "float32"), ("bf16", "bfloat16"), ("amx", "bfloat16"), ("arm", "float32")]
)
def test_a_cpu_computes_bfloat16_only_with_the_instructions_for_it(isa: str, dtype: str) -> None:
    assert _plan(f"cpu-2c-24g-{isa}", "granite-4.0-1b").dtype == dtype


def test_a_cpu_without_a_compiler_serves_eager() -> None:
    machine = replace(hardware_from("cpu-2c-24g"), compiler=False)
    plan = Vllm().plan(Request(Model.from_shape("granite-4.0-350m"), machine))
    assert "--enforce-eager" in plan.arguments


def test_a_local_folder_is_served_offline(tmp_path: Path) -> None:
    model = replace(Model.from_shape("granite-4.0-350m"), path=tmp_path)
    plan = Vllm().plan(Request(model, hardware_from("l4"), "verify"))
    assert plan.arguments[:2] == ["--model", str(tmp_path)]
    assert plan.environment["HF_HUB_OFFLINE"] == "1"


def test_l4_serves_the_8b_unquantised() -> None:
    assert _plan("l4", "granite-4.1-8b").arguments == _words(
        "--model ibm-granite/granite-4.1-8b --served-model-name m --dtype bfloat16 --max-model-len 10240 --max-num-seqs 20 "
        "--gpu-memory-utilization 0.92 --enable-auto-tool-choice --tool-call-parser granite4 " + _COMPACT
    )


@pytest.mark.parametrize("machine", ["rtx3090", "rtx4090", "l4", "a10g"])
def test_24_gb_serve_the_8b_in_bfloat16(machine: str) -> None:
    plan = _plan(machine, "granite-4.1-8b")
    assert (plan.feasible, plan.dtype, plan.quantization) == (True, "bfloat16", None)
    assert plan.max_model_len >= 8192


def test_rtx_4060_serves_the_8b_in_4_bits_and_says_why() -> None:
    plan = _plan("rtx4060", "granite-4.1-8b")
    assert plan.arguments == _words(
        "--model ibm-granite/granite-4.1-8b --served-model-name m --dtype bfloat16 --max-model-len 4096 --max-num-seqs 6 "
        "--gpu-memory-utilization 0.85 --quantization bitsandbytes --kv-cache-dtype fp8 --enforce-eager "
        "--enable-auto-tool-choice --tool-call-parser granite4 " + _COMPACT
    )
    reason = next(s.reason for s in plan.flags if s.name == "--quantization")
    assert reason.startswith("16-bit weights take 15.6 GiB")
    assert plan.alternatives == ("the Q4_K_M GGUF (4.8 GiB) with llamacpp or ollama, all of it on the GPU",)
    assert any("vllm-bnb-plugin" in warning for warning in plan.warnings)


@pytest.mark.parametrize("machine", ["t4", "v100-16"])
def test_old_gpus_never_get_bfloat16(machine: str) -> None:
    assert _plan(machine, "granite-4.1-3b").dtype == "float16"
    with pytest.raises(InputError, match="--dtype is 'bfloat16'"):
        _plan(machine, "granite-4.1-3b", dtype="bfloat16")


def test_two_a10g_serve_the_30b_quantised_over_both() -> None:
    plan = _plan("2xa10g", "granite-4.1-30b", "verify")
    assert plan.arguments == _words(
        "--model ibm-granite/granite-4.1-30b --served-model-name m --dtype bfloat16 --max-model-len 4096 --max-num-seqs 16 "
        "--gpu-memory-utilization 0.92 --quantization fp8 --tensor-parallel-size 2 --enforce-eager "
        "--enable-auto-tool-choice --tool-call-parser granite4 " + _COMPACT
    )
    assert plan.memory.weights == pytest.approx(27.27 / 2, rel=0.01)


def test_h100_serves_h_small_in_bfloat16_limited_by_mamba_state() -> None:
    plan = _plan("h100", "granite-4.0-h-small")
    assert (plan.dtype, plan.quantization, plan.max_num_seqs) == ("bfloat16", None, 26)
    assert "mamba state" in next(s.reason for s in plan.flags if s.name == "--max-num-seqs")


def test_hybrids_drop_prefix_caching_for_throughput() -> None:
    plan = _plan("h100", "granite-4.0-h-small", "throughput")
    assert "--no-enable-prefix-caching" in plan.arguments
    assert plan.max_num_seqs > _plan("h100", "granite-4.0-h-small").max_num_seqs


@pytest.mark.parametrize(("machine", "word"), [("rtx3090", "awq_marlin"), ("rtx4090", "awq_marlin"), ("t4", "awq")])
def test_awq_checkpoints_use_marlin_where_it_runs(machine: str, word: str) -> None:
    model = replace(Model.from_shape("granite-4.1-8b"), quantization="awq", weight_bytes=5 * 2**30)
    plan = Vllm().plan(Request(model, hardware_from(machine)))
    assert plan.quantization == word
    assert ("--quantization" in plan.arguments) == (word == "awq_marlin")


def test_quantised_hybrid_mixtures_are_never_planned() -> None:
    plan = _plan("rtx4060ti16", "granite-4.0-h-tiny")
    assert not plan.feasible
    assert "GGUF (6.9 GiB)" in plan.alternatives[0]
    with pytest.raises(InputError, match="--quantization fp8 does not work"):
        _plan("l4", "granite-4.0-h-tiny", quantization="fp8")


def test_a_refusal_has_numbers_and_the_nearest_things_that_fit() -> None:
    plan = _plan("a100-40", "granite-4.0-h-small")
    assert not plan.feasible
    assert "needs 63.4 GiB per GPU (weights 60.0" in plan.warnings[0]
    assert plan.alternatives == (
        "the Q8_0 GGUF (31.9 GiB) with llamacpp or ollama, all of it on the GPU",
        "2 x NVIDIA A100-SXM4-40GB (tensor parallel 2, unquantised)",
        "granite-4.1-30b (28.9 billion parameters, 53.8 GiB in 16 bits)",
    )


def test_a_cpu_refusal_has_numbers_and_alternatives() -> None:
    plan = _plan("cpu-2c-24g", "granite-4.1-8b")
    assert not plan.feasible
    assert "weights 31.2 as float32" in plan.warnings[0]
    assert plan.alternatives == (
        "the Q8_0 GGUF (8.3 GiB) with llamacpp or ollama, in RAM on the CPU",
        "granite-4.0-micro (3.4 billion parameters, 6.3 GiB in 16 bits)",
    )


def test_a_head_size_without_a_cpu_kernel_is_refused_before_the_first_request_fails() -> None:
    model = Model.from_shape("granite-4.0-350m")
    odd = replace(model, shape=replace(model.shape, head_dim=16))
    plan = Vllm().plan(Request(odd, hardware_from("cpu-2c-24g")))
    assert not plan.feasible
    assert "head_dim 16" in plan.warnings[0]


def test_a_shared_card_lowers_the_utilisation_to_what_is_free() -> None:
    machine = replace(hardware_from("l4"), gpus=(Gpu("NVIDIA L4", 22.05, 11.03, "8.9"),))
    plan = Vllm().plan(Request(Model.from_shape("granite-4.1-3b"), machine))
    assert plan.arguments[plan.arguments.index("--gpu-memory-utilization") + 1] == "0.48"
    assert plan.memory.total <= 11.03


def test_gpus_of_another_kind_and_mig_slices_do_not_share_a_model() -> None:
    l4, a10g = (hardware_from(name).gpus[0] for name in ("l4", "a10g"))
    mixed = replace(hardware_from("l4"), gpus=(l4, a10g))
    plan = Vllm().plan(Request(Model.from_shape("granite-4.1-8b"), mixed))
    assert (plan.tensor_parallel, plan.feasible) == (1, True)
    assert "different kinds" in plan.warnings[0]
    slices = (replace(hardware_from("h100").gpus[0], mig=True, memory_gib=15.5, free_gib=15.4),) * 2
    plan = Vllm().plan(Request(Model.from_shape("granite-4.1-8b"), replace(hardware_from("h100"), gpus=slices)))
    assert (plan.tensor_parallel, plan.quantization) == (1, "fp8")


def test_a_folder_without_a_chat_template_is_told() -> None:
    for machine in ("l4", "cpu-2c-24g"):
        model = replace(Model.from_shape("granite-4.0-350m"), has_chat_template=False)
        assert "no chat template" in Vllm().plan(Request(model, hardware_from(machine))).warnings[0]


def test_apple_and_gguf_are_refused_with_the_engine_that_works() -> None:
    apple = _plan("m2-16g", "granite-4.1-3b")
    assert (apple.feasible, apple.alternatives) == (
        False,
        ("the Q8_0 GGUF (3.4 GiB) with llamacpp or ollama, all of it on the GPU",),
    )
    gguf = replace(Model.from_shape("granite-4.0-350m"), format="gguf")
    assert not Vllm().plan(Request(gguf, hardware_from("l4"))).feasible
    assert not Vllm().plan(Request(gguf, hardware_from("cpu-2c-24g"))).feasible


# --- the user's own values ---------------------------------------------------------------------------------------------


def test_overrides_win_and_are_marked() -> None:
    plan = _plan("l4", "granite-4.1-3b", max_model_len="5000", seed="7")
    settings = {s.name: (s.value, s.source) for s in plan.flags}
    assert settings["--max-model-len"] == ("5000", "user")
    assert settings["--seed"] == ("7", "user")
    assert settings["--dtype"] == ("bfloat16", "planned")
    assert plan.max_model_len == 5000


def test_switches_take_true_and_false() -> None:
    assert "--enforce-eager" in _plan("l4", "granite-4.1-3b", enforce_eager="true").arguments
    plan = _plan("l4", "granite-4.1-3b", "verify", enforce_eager="false")
    assert "--enforce-eager" not in plan.arguments
    assert "--no-enforce-eager" in plan.arguments
    assert plan.memory.graphs > 0


def test_an_override_that_does_not_fit_is_refused_with_what_would() -> None:
    plan = _plan("l4", "granite-4.1-8b", max_model_len="131072", quantization="none")
    assert not plan.feasible
    assert plan.alternatives[1].startswith("without your --set: unquantised, --max-model-len")
    too_much = _plan("l4", "granite-4.1-8b", gpu_memory_utilization="1.0")
    assert not too_much.feasible


def test_a_long_context_the_user_wants_may_cost_precision() -> None:
    plan = _plan("l4", "granite-4.1-8b", max_model_len="131072")
    assert (plan.feasible, plan.quantization, plan.max_model_len) == (True, "fp8", 131072)
    assert "--kv-cache-dtype" in plan.arguments


def test_variables_are_overrides_too() -> None:
    plan = _plan("cpu-2c-24g", "granite-4.0-350m", "verify", VLLM_CPU_KVCACHE_SPACE="3")
    assert plan.environment["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert plan.memory.kv_cache == 3.0
    refused = _plan("cpu-2c-24g", "granite-4.0-350m", "verify", VLLM_CPU_KVCACHE_SPACE="40")
    assert (refused.feasible, refused.alternatives[0]) == (False, "without your --set it fits")


@pytest.mark.parametrize(
    ("machine", "overrides", "words"),
    [
        ("l4", {"max_model_len": "131073"}, "the model's own limit is 131072"),
        ("l4", {"max_model_len": "many"}, "must be a whole number"),
        ("l4", {"max_modle_len": "4096"}, "no setting --max-modle-len"),
        ("l4", {"VLLM_CPU_KVCACHE": "4"}, "no setting VLLM_CPU_KVCACHE"),
        ("l4", {"tensor_parallel_size": "2"}, "GPUs that can work together here: 1"),
        ("4xl4", {"tensor_parallel_size": "3"}, "does not divide"),
        ("l4", {"gpu_memory_utilization": "1.5"}, "must be a number"),
        ("a10g", {"kv_cache_dtype": "fp8"}, "needs compute capability 8.9"),
        ("mi300x", {"quantization": "bitsandbytes"}, "does not work for this model"),
        ("l4", {"api_key": "secret"}, "cannot be set with --set"),
        ("l4", {"port": "1"}, "cannot be set with --set"),
        ("cpu-2c-24g", {"dtype": "float16"}, "--dtype is 'float16'"),
    ],
)
def test_illegal_overrides_are_refused(machine: str, overrides: dict[str, str], words: str) -> None:
    with pytest.raises(InputError) as caught:
        _plan(machine, "granite-4.1-3b", **overrides)
    assert words in str(caught.value)


def test_quantization_none_keeps_the_weights_as_they_are() -> None:
    plan = _plan("rtx4060", "granite-4.1-3b", quantization="none")
    assert plan.quantization is None
    assert "--quantization" not in plan.arguments


# --- launch, availability, prompts -----------------------------------------------------------------------------------------


def _request(machine: Hardware | None = None) -> Request:
    return Request(Model.from_shape("granite-4.0-350m"), machine or hardware_from("cpu-2c-24g"), "verify", "m")


def test_launch_is_the_module_with_host_and_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PYTHON", raising=False)
    engine = engines.get("vllm")
    request = _request()
    plan = engine.plan(request)
    launch = engine.launch(plan, request, host="127.0.0.1", port=8003)
    prefix = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert list(launch.argv) == [*prefix, *plan.arguments, "--host", "127.0.0.1", "--port", "8003"]
    assert launch.env == plan.environment
    assert (launch.url, launch.ready_path, launch.model) == ("http://127.0.0.1:8003", "/health", "m")


def test_vllm_python_chooses_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PYTHON", "/elsewhere/python")
    request = _request()
    assert Vllm().launch(Vllm().plan(request), request, host="127.0.0.1", port=1).argv[0] == "/elsewhere/python"
    found = Vllm().available()
    assert (found.usable, found.reason) == (False, "vLLM is not installed in /elsewhere/python")
    assert "VLLM_PYTHON" in found.remedy


def test_an_infeasible_plan_is_not_launched() -> None:
    request = Request(Model.from_shape("granite-4.1-8b"), hardware_from("cpu-2c-24g"))
    with pytest.raises(EngineError) as caught:
        Vllm().launch(Vllm().plan(request), request, host="127.0.0.1", port=1)
    assert "weights 31.2" in caught.value.evidence
    assert "GGUF" in caught.value.remedy


def _prompt(handler: httpx.MockTransport, tools: tuple[dict[str, object], ...] | None = None) -> Prompt:
    with httpx.Client(transport=handler, base_url="http://x") as client:
        return Vllm().prompt(client, "m", Conversation("c", ({"role": "user", "content": "hi"},), tools))


def test_the_prompt_comes_from_tokenize() -> None:
    seen = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append((request.url.path, json.loads(request.content)))
        return httpx.Response(200, json={"tokens": [1, 2], "count": 2})

    assert _prompt(httpx.MockTransport(answer), ({"type": "function"},)) == Prompt(ids=(1, 2))
    asked = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": [{"type": "function"}]}
    assert seen == [("/tokenize", {**asked, "add_generation_prompt": True, "continue_final_message": False})]


def test_a_refused_question_shows_the_server_s_words() -> None:
    with pytest.raises(EngineError) as caught:
        _prompt(httpx.MockTransport(lambda _: httpx.Response(404, text="no such model")))
    assert (caught.value.message, caught.value.evidence) == ("POST /tokenize answered 404", "no such model")
