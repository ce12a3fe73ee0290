"""vLLM's CPU build: float32 or bfloat16 by instruction set, an explicit KV cache, eager or compiled by purpose."""

import math
from dataclasses import dataclass

from pipeline.engines.flags import listed_flags
from pipeline.engines.vllm.gpu import asked_by_user, template_warning, with_common
from pipeline.planning.gguf_fit import nearest_cpu
from pipeline.planning.gpu_fit import refusal
from pipeline.planning.memory import kv_gib, mamba_gib, vllm_cpu_activation_gib, vllm_cpu_overhead_gib
from pipeline.planning.overrides import Overrides
from pipeline.planning.plan import Memory, Plan, Purpose, Request, Setting

_CONTEXT: dict[Purpose, int] = {"verify": 4096, "serve": 8192, "throughput": 4096, "latency": 8192}
_SEQUENCES: dict[Purpose, int] = {"verify": 32, "serve": 32, "throughput": 128, "latency": 8}
# Tokens a request is expected to hold on average; the KV cache is sized for this many per sequence.
_TYPICAL_TOKENS = 1024
_STEP, _LEAST_CONTEXT = 1024, 2048
# vllm 0.32 v1/attention/backends/cpu_attn.py get_supported_head_sizes
_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
_KV = "VLLM_CPU_KVCACHE_SPACE"
# above this, binding threads to cores (vLLM's own choice) is worth more than the core it keeps for its scheduler
_FEW_CORES = 4


@dataclass(frozen=True)
class _Sizes:
    dtype: str
    length: int
    sequences: int
    eager: bool
    memory: Memory
    request_kv: float


def plan(request: Request) -> Plan:
    """Flags for the CPU build, or a refusal with numbers when weights and the smallest KV cache exceed the RAM available."""
    user = asked_by_user(request)
    user.integer("--tensor-parallel-size", 1, 1, "it counts GPUs, and this plan is for a CPU")
    sizes = _sizes(request, user)
    why_not = _why_not(request, sizes)
    flags, env = user.lay_over(with_common(request, _settings(request, sizes)), listed_flags("vllm"))
    return Plan(
        engine="vllm",
        feasible=not why_not,
        flags=flags,
        env=env,
        dtype=sizes.dtype,
        quantization=request.model.quantization,
        tensor_parallel=1,
        max_model_len=sizes.length,
        max_num_seqs=sizes.sequences,
        memory=sizes.memory,
        alternatives=nearest_cpu(request, _fits) if why_not else (),
        warnings=tuple([why_not] if why_not else template_warning(request)),
    )


def _fits(request: Request) -> bool:
    return not _why_not(request, _sizes(request, asked_by_user(request)))


def _sizes(request: Request, user: Overrides) -> _Sizes:
    model, hardware = request.model, request.hardware
    limit, shape = model.shape.max_positions, model.shape
    asked = user.choice("--dtype", ("float32", "bfloat16"))
    dtype = asked or ("bfloat16" if hardware.cpu.fast_bfloat16 else "float32")
    own_limit = f"the model's own limit is {limit}"
    length = user.integer("--max-model-len", 1, limit, own_limit) or min(limit, _CONTEXT[request.purpose])
    sequences = user.integer("--max-num-seqs", 1, 4096) or _SEQUENCES[request.purpose]
    element = 4.0 if dtype == "float32" else 2.0
    eager = user.switch("--enforce-eager")
    eager = (request.purpose == "verify" or not hardware.compiler) if eager is None else eager
    # the mamba state is float32 in the CPU kernels
    state = mamba_gib(shape, 1, 4.0)
    weights = model.weights_gib(dtype)
    overhead, activation = (
        vllm_cpu_overhead_gib(shape, weights, element, eager),
        vllm_cpu_activation_gib(shape, sequences, element),
    )
    room = hardware.ram_free_gib - weights - (overhead + activation)
    wanted = kv_gib(shape, max(length, sequences * min(length, _TYPICAL_TOKENS)), element) + state * sequences
    kv = user.integer(_KV, 1, 4096) or max(1, min(math.ceil(wanted), math.floor(room * 0.9)))
    if "--max-model-len" not in user.values:
        held = int((kv - state) / kv_gib(shape, 1, element)) // _STEP * _STEP
        length = min(length, max(held, _LEAST_CONTEXT))
    memory = Memory(weights, float(kv), activation, overhead=overhead, available=hardware.ram_free_gib)
    return _Sizes(dtype, length, sequences, eager, memory, kv_gib(shape, length, element) + state)


def _why_not(request: Request, sizes: _Sizes) -> str:
    memory = sizes.memory
    if never := refusal(request, None):
        return never
    if request.model.shape.head_dim not in _HEAD_DIMS:
        no_kernel = f"vLLM's CPU attention has no kernel for head_dim {request.model.shape.head_dim}"
        return f"{no_kernel}: it would start and fail at the first request"
    if memory.total > memory.available:
        return (
            f"needs {memory.total:.1f} GiB of RAM (weights {memory.weights:.1f} as {sizes.dtype}, KV cache {memory.kv_cache:.1f}, "
            f"processes {memory.overhead:.1f}), {memory.available:.1f} GiB are available"
        )
    if memory.kv_cache < sizes.request_kv:
        needs = f"one request of {sizes.length} tokens needs {sizes.request_kv:.1f} GiB of KV cache"
        return f"{needs}, {memory.kv_cache:.0f} GiB are left for it"
    return ""


def _settings(request: Request, sizes: _Sizes) -> list[Setting]:
    cpu, compiler = request.hardware.cpu, request.hardware.compiler
    isa = ", ".join(cpu.isa) or "no vector extensions known"
    why = f"this CPU has no AVX512_BF16 or AMX ({isa}): float32; float16 is emulated and up to 10 times slower"
    if cpu.fast_bfloat16:
        why = f"bfloat16 runs in hardware here ({isa}); float16, which auto takes from an FP16 checkpoint, is emulated: 10 times slower"
    allowed = f"context per request; the model allows {request.model.shape.max_positions}"
    together = f"requests computed together on {cpu.cores} cores; purpose {request.purpose}"
    settings = [
        Setting("--dtype", sizes.dtype, why),
        Setting("--max-model-len", str(sizes.length), allowed),
        Setting("--max-num-seqs", str(sizes.sequences), together),
    ]
    if sizes.eager:
        why = "starts in half the time; compiling pays off only later" if compiler else "torch.compile finds no C++ compiler here"
        settings.append(Setting("--enforce-eager", None, why))
    settings.append(Setting(_KV, f"{sizes.memory.kv_cache:.0f}", "GiB of KV cache; unset, vLLM reserves most of the RAM"))
    return settings + _threads(cpu.cores)


def _threads(cores: int) -> list[Setting]:
    """On few cores, compute on all of them: vLLM's own choice keeps one for a scheduler process that polls.

    Measured on 2 cores (80 M parameters, float32, 32 requests at a time): 91 tokens/s against 68, ready in 40 s against 59.
    vLLM runs its worker inside the engine process only when told so by the first variable (platforms/cpu.py, 0.32).
    """
    if cores > _FEW_CORES:
        return []
    inside = "the worker runs in the engine's process: one start less, no polling between two"
    all_compute = f"vLLM would keep 1 of {cores} cores for its scheduler; all of them compute"
    return [
        Setting("VLLM_ENABLE_V1_MULTIPROCESSING", "0", inside),
        Setting("VLLM_CPU_OMP_THREADS_BIND", "nobind", all_compute),
        Setting("OMP_NUM_THREADS", str(cores), "one thread a core"),
        Setting("GOMP_SPINCOUNT", "10000", "threads wait awake only briefly, so that the API process gets its turn"),
    ]
