"""The ladder as a table: failure and plan in, changed setting out; what the user set is never changed."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline import engines
from pipeline.errors import StartFailure
from pipeline.machine.named import hardware_from
from pipeline.model.model import Model
from pipeline.planning.plan import Plan, Request
from pipeline.serve.retries import MAX_RETRIES, Change, next_plan, propose, replan
from pipeline.serve.server import classify

SHARED = (
    "Free memory on device cuda:0 (11.02/22.05 GiB) on startup is less than desired GPU memory utilization (0.92, 20.29 GiB)."
)
KV = "Available memory on node 0 (10.2/23.5 GiB) on kv cache allocation is less than requested memory for kv (40.0 GiB)."
LENGTH = "GiB). Based on the available memory, the estimated maximum model length is 6144. Try increasing"
POSITIONS = "User-specified max_model_len (999999) is greater than the derived max_model_len (max_position_embeddings=4096 or"


def _request(machine: str, **overrides: str) -> Request:
    return Request(Model.from_shape("granite-4.0-1b"), hardware_from(machine), "serve", "m", overrides)


def _failed(line: str) -> StartFailure:
    known = classify(line)
    assert known is not None
    return StartFailure("it failed", kind=known.name, cause=known.cause, numbers=known.numbers, evidence="evidence")


def _plan(engine: str, request: Request) -> Plan:
    return engines.get(engine).plan(request)


@pytest.mark.parametrize(
    ("engine", "machine", "line", "settings"),
    [
        ("vllm", "l4", SHARED, {"--gpu-memory-utilization": "0.47"}),
        ("vllm", "l4", LENGTH, {"--max-model-len": "6144"}),
        ("vllm", "l4", POSITIONS, {"--max-model-len": "4096"}),
        ("vllm", "l4", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate", {"--enforce-eager": None}),
        ("vllm", "l4", "CUDA graph capture failed: operation", {"--enforce-eager": None}),
        ("vllm", "l4", "RuntimeError: CUDA out of memory occurred when warming up sampler with 64 dummy requests", {"--max-num-seqs": "32"}),
        ("vllm", "l4", "ValueError: Bfloat16 is only supported on GPUs with compute capability", {"--dtype": "float16"}),
        ("vllm", "cpu-16c-64g", KV, {"VLLM_CPU_KVCACHE_SPACE": "4"}),
        ("vllm", "cpu-16c-64g", "torch._inductor.exc.InductorError: CppCompileError: C++ compile error", {"--enforce-eager": None}),
        ("vllm", "cpu-16c-64g", "RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried", {"--max-num-seqs": "16"}),
        ("llamacpp", "cpu-16c-64g", "ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 3", {"-c": "32768", "--parallel": "8"}),
        ("ollama", "cpu-16c-64g", "model requires more system memory (9 GiB) than is available", {"--num-ctx": "4096"}),
    ],
)  # fmt: skip
def test_what_a_failure_changes(engine: str, machine: str, line: str, settings: dict[str, Any]) -> None:
    request = _request(machine)
    change = propose(_failed(line), _plan(engine, request), request, port_given=False)
    assert change is not None
    assert dict(change.settings) == settings
    assert change.reason
    following = replan(engines.get(engine), request, [change])
    assert following.feasible
    marked = [s for s in (*following.flags, *following.env, *following.parameters) if s.source == "retry"]
    assert sorted(str(s.value) for s in marked) == sorted(str(value) for value in settings.values())
    assert {s.reason for s in marked} == {f"retry: {change.reason}"}


@pytest.mark.parametrize(
    "line",
    [
        "SafetensorError: Error while deserializing header: MetadataIncompleteBuffer",
        "OSError: Can't load tokenizer for '/m'. If you were",
        "The checkpoint you are trying to load has model type `x` but Transformers does not recognize this architecture.",
        "the estimated maximum model length is 96.",
    ],
)
def test_what_no_retry_can_mend_is_refused_at_once(line: str) -> None:
    request = _request("l4")
    with pytest.raises(StartFailure, match="it failed"):
        next_plan(engines.get("vllm"), request, _plan("vllm", request), _failed(line), [], port_given=False)


@pytest.mark.parametrize(
    ("engine", "machine", "line", "mine", "words"),
    [
        ("vllm", "l4", LENGTH, {"max_model_len": "8192"}, "your --set max-model-len=8192 is not changed"),
        ("vllm", "l4", "CUDA graph capture failed", {"enforce-eager": "false"}, "your --set no-enforce-eager is not changed"),
        ("vllm", "cpu-16c-64g", KV, {"VLLM_CPU_KVCACHE_SPACE": "40"}, "your --set VLLM_CPU_KVCACHE_SPACE=40 is not changed"),
        ("llamacpp", "cpu-16c-64g", "failed to allocate", {"ctx-size": "8192"}, "your --set c=8192 is not changed"),
        ("ollama", "cpu-16c-64g", "model requires more system memory", {"num-ctx": "8192"}, "your --set num_ctx=8192 is not changed"),
    ],
)  # fmt: skip
def test_what_the_user_set_is_refused_not_changed(engine: str, machine: str, line: str, mine: dict[str, str], words: str) -> None:
    request = _request(machine, **mine)
    with pytest.raises(StartFailure) as caught:
        propose(_failed(line), _plan(engine, request), request, port_given=False)
    assert words in caught.value.message
    assert caught.value.remedy.startswith("--set ")


def test_another_port_only_when_none_was_named() -> None:
    request = _request("l4")
    taken, plan = _failed("OSError: [Errno 98] address already in use"), _plan("vllm", request)
    found = propose(taken, plan, request, port_given=False)
    assert found is not None
    assert found.settings == {}
    assert propose(taken, plan, request, port_given=True) is None
    changes: list[Change] = []
    assert next_plan(engines.get("vllm"), request, plan, taken, changes, port_given=False) is plan
    assert changes == [found]


def test_three_retries_and_no_more_and_the_error_tells_them() -> None:
    request, oom = _request("cpu-16c-64g"), _failed("failed to allocate buffer")
    engine, changes = engines.get("llamacpp"), []
    plan = engine.plan(request)
    lengths = []
    for _ in range(MAX_RETRIES):
        plan = next_plan(engine, request, plan, oom, changes, port_given=False)
        lengths.append(next(s.value for s in plan.flags if s.name == "-c"))
    assert lengths == ["32768", "16384", "8192"]
    with pytest.raises(StartFailure) as caught:
        next_plan(engine, request, plan, oom, changes, port_given=False)
    assert caught.value.evidence.count("retried: ") == 3
    assert "-c=8192" in caught.value.evidence


def test_a_change_that_does_not_fit_either_is_the_end() -> None:
    tight = _request("cpu-16c-64g", **{"max-model-len": "32768"})
    plan = _plan("vllm", tight)
    assert plan.feasible
    line = "Available memory on node 0 (1.5/23.5 GiB) on kv cache allocation is less than requested memory for kv (40.0 GiB)."
    with pytest.raises(StartFailure, match="does not fit"):
        next_plan(engines.get("vllm"), tight, plan, _failed(line), [], port_given=False)
