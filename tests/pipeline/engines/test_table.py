"""Every named kind of machine x every published Granite: what must hold whatever the plan is."""

from itertools import product

import pytest

from pipeline import engines
from pipeline.machine.named import NAMES, hardware_from
from pipeline.model.model import Model
from pipeline.model.shape import SHAPES
from pipeline.planning.gpu_fit import legal_tensor_parallel
from pipeline.planning.plan import Plan, Purpose, Request

_MORE = (
    *("2xt4", "2xa10g", "4xl4", "2xrtx3090", "2xa100-40", "4xh100", "2xmi300x", "3xl4"),
    *("cpu-1c-2g", "cpu-2c-24g", "cpu-8c-32g-avx512", "cpu-16c-64g-bf16", "cpu-64c-256g-amx", "cpu-4c-8g-arm"),
)
_MACHINES = (*NAMES, *_MORE)
_LAUNCHED = [engine.name for engine in engines.every() if engine.serves != "url"]
_PURPOSES: tuple[Purpose, ...] = ("verify", "serve", "throughput", "latency")


def _plan(engine: str, machine: str, shape: str, purpose: Purpose) -> tuple[Plan, Request]:
    request = Request(Model.from_shape(shape), hardware_from(machine), purpose)
    return engines.get(engine).plan(request), request


def _violations(engine: str, plan: Plan, request: Request) -> list[str]:
    known, shape, hardware = engines.get(engine).flags, request.model.shape, request.hardware
    gpu = hardware.gpus[0] if hardware.gpus else None
    dtype_flag = next((s.value for s in plan.flags if s.name == "--dtype"), None)
    rules = {
        "predicted total exceeds what is available": plan.feasible and plan.memory.total > plan.memory.available + 1e-6,
        "illegal tensor parallel": not legal_tensor_parallel(shape, plan.tensor_parallel),
        "more GPUs than there are": plan.tensor_parallel > max(1, len(hardware.gpus)),
        "bfloat16 below compute capability 8.0": bool(
            gpu and gpu.vendor == "nvidia" and gpu.capability < (8, 0) and dtype_flag == "bfloat16"
        ),
        "float16 on a CPU": gpu is None and dtype_flag == "float16",
        "bfloat16 on a CPU without the instructions": gpu is None and dtype_flag == "bfloat16" and not hardware.cpu.fast_bfloat16,
        "unknown flag": any(s.name not in {*known.flags, *known.switches} for s in plan.flags),
        "unknown variable": any(s.name not in known.variables for s in plan.env),
        "context above the model's": plan.max_model_len > shape.max_positions,
        "no request fits": plan.feasible and (plan.max_num_seqs < 1 or plan.max_model_len < 1),
        "quantised hybrid mixture": engine == "vllm" and shape.hybrid and bool(shape.experts) and plan.quantization is not None,
        "a flag without a reason": any(not s.reason for s in (*plan.flags, *plan.env, *plan.parameters)),
        "a refusal without its numbers": not plan.feasible and not plan.warnings,
        "one flag twice": len({s.name for s in plan.flags}) != len(plan.flags),
    }
    return [name for name, broken in rules.items() if broken]


@pytest.mark.parametrize("engine", _LAUNCHED)
@pytest.mark.parametrize("machine", _MACHINES)
def test_invariants(engine: str, machine: str) -> None:
    found = [
        f"{shape} {purpose}: {violation}"
        for shape, purpose in product(SHAPES, _PURPOSES)
        for violation in _violations(engine, *_plan(engine, machine, shape, purpose))
    ]
    assert found == []


def test_the_table_is_as_large_as_it_should_be() -> None:
    assert len(_MACHINES) >= 25
    assert len(_MACHINES) * len(SHAPES) >= 350


@pytest.mark.parametrize(("machine", "shape"), list(product(("h100", "l4", "cpu-64c-256g-amx"), SHAPES)))
def test_hybrids_are_not_planned_as_dense(machine: str, shape: str) -> None:
    """The KV cache of a hybrid counts its few attention layers, and its mamba state is counted on top."""
    model = Model.from_shape(shape)
    dense_kv = model.shape.layers * 2 * model.shape.kv_heads * model.shape.head_dim * 2
    assert (model.shape.kv_bytes_per_token() < dense_kv / 5) == model.shape.hybrid
    plan, _ = _plan("vllm", machine, shape, "serve")
    reason = next((s.reason for s in plan.flags if s.name == "--max-num-seqs"), "")
    assert ("mamba" in reason) == (model.shape.hybrid and machine in ("h100", "l4"))


# SERVING table of first choices [computed there, not run]: quantisation, and the KV tokens where it names them
@pytest.mark.parametrize(
    ("machine", "shape", "quantization"),
    [
        ("rtx4060", "granite-4.1-3b", "fp8"),
        ("rtx4060", "granite-4.1-8b", "bitsandbytes"),
        ("rtx3060", "granite-4.1-3b", None),
        ("rtx3060", "granite-4.1-8b", "bitsandbytes"),
        ("t4", "granite-4.1-3b", None),
        ("t4", "granite-4.1-8b", "fp8"),
        ("l4", "granite-4.1-3b", None),
        ("l4", "granite-4.1-8b", None),
        ("l4", "granite-4.0-h-tiny", None),
        ("l4", "granite-4.1-30b", "bitsandbytes"),
        ("a100-40", "granite-4.1-8b", None),
        ("a100-40", "granite-4.1-30b", "fp8"),
        ("a100-80", "granite-4.1-30b", None),
        ("h100", "granite-4.0-h-small", None),
        ("h200", "granite-4.0-h-small", None),
    ],
)
def test_first_choices_by_memory(machine: str, shape: str, quantization: str | None) -> None:
    plan, _ = _plan("vllm", machine, shape, "serve")
    assert (plan.feasible, plan.quantization, plan.tensor_parallel) == (True, quantization, 1)


@pytest.mark.parametrize(
    ("machine", "shape"),
    [
        ("rtx4060", "granite-4.0-h-tiny"),
        ("rtx3060", "granite-4.0-h-tiny"),
        ("t4", "granite-4.1-30b"),
        ("rtx3060", "granite-4.0-h-small"),
    ],
)
def test_what_fits_nowhere_on_the_card_is_refused(machine: str, shape: str) -> None:
    assert not _plan("vllm", machine, shape, "serve")[0].feasible


@pytest.mark.parametrize(
    ("machine", "shape", "tokens"),
    [
        ("a100-40", "granite-4.1-8b", 126_000),
        ("h100", "granite-4.1-8b", 361_000),
        ("h100", "granite-4.1-30b", 69_000),
        ("a100-40", "granite-4.1-30b", 31_000),
    ],
)
def test_kv_tokens_agree_with_the_published_estimates(machine: str, shape: str, tokens: int) -> None:
    plan, request = _plan("vllm", machine, shape, "serve")
    assert plan.memory.kv_cache * 2**30 / request.model.shape.kv_bytes_per_token() == pytest.approx(tokens, rel=0.06)
