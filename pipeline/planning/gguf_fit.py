"""What fits of a GGUF on this machine, for llama.cpp and Ollama: slots, context, memory; and which quantisation would."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.machine.gpus import GIB
from pipeline.machine.hardware import Hardware
from pipeline.model.model import Model
from pipeline.planning.memory import LLAMACPP_MARGIN, compute_gib, kv_gib, llamacpp_state_gib
from pipeline.planning.overrides import Overrides
from pipeline.planning.plan import Memory, Plan, Purpose, Request, Setting

# bits per weight over a whole dense model; source: llama.cpp tools/quantize/README.md (8B figures); Q8_0 is exact (34/32 bytes)
BITS = {"Q8_0": 8.5, "Q6_K": 6.56, "Q5_K_M": 5.70, "Q4_K_M": 4.89}
_SLOTS: dict[Purpose, int] = {"verify": 8, "serve": 8, "throughput": 16, "latency": 1}
_CONTEXT: dict[Purpose, int] = {"verify": 4096, "serve": 8192, "throughput": 4096, "latency": 16384}
_LEAST_CONTEXT = 2048
# RAM is shared with everything else on the machine: a KV cache takes a quarter of it, or 2 GiB
_KV_SHARE, _SMALL_KV = 0.25, 2.0
# bytes of one KV element by llama.cpp's cache type
_KV_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
# libgomp's own count when there are more threads than cores. Measured on 2 shared cores, tokens/s at 1, 8 and 32 requests:
# sleeping at once 40, 59, 76; 1000 spins 81, 104, 91; 100,000 spins 106, 9, 13 (benchmarks/serve.py --sweep)
SHORT_SPIN = Setting(
    "GOMP_SPINCOUNT",
    "1000",
    "threads spin shortly at barriers, then sleep: sleeping at once halves the speed, long spins stall a machine that is shared",
)


def gguf_gib(model: Model, kind: str = "Q8_0") -> float:
    """GiB of weights of this model as a GGUF of that type; a GGUF on disk keeps its own size."""
    if model.format == "gguf":
        return model.weight_bytes / GIB
    return model.parameters * BITS[kind] / 8 / GIB


@dataclass(frozen=True)
class Room:
    """Memory llama.cpp may use, GiB: on GPUs together (0 without), in RAM, and the number of GPUs."""

    gpu: float
    ram: float
    count: int

    @property
    def total(self) -> float:
        """GPUs and RAM together: layers that do not fit on the GPUs run on the CPU."""
        return self.gpu + self.ram


@dataclass(frozen=True)
class GgufFit:
    """What a GGUF takes with this many slots of this context, and whether all of it is on the GPUs."""

    memory: Memory
    slots: int
    length: int
    kv_type: str
    on_gpu: bool
    feasible: bool


def room(hardware: Hardware) -> Room:
    """What may be used here; llama.cpp's own fitting leaves 1 GiB free on each GPU, and Apple's GPU memory is the RAM."""
    gpu = sum(max(0.0, g.free_gib - LLAMACPP_MARGIN) for g in hardware.gpus)
    ram = 0.0 if hardware.accelerator == "apple" else hardware.ram_free_gib
    return Room(gpu, ram, len(hardware.gpus))


def fit_gguf(request: Request, user: Overrides, kind: str = "Q8_0", slots: int | None = None) -> GgufFit:
    """First fewer slots, then a shorter context, until everything fits: on the GPUs when possible, else over GPUs and RAM.

    ``slots`` is the number to start from; slots and context the user gave are kept.
    """
    limit, here = request.model.shape.max_positions, room(request.hardware)
    asked_slots = user.integer("--parallel", 1, 256)
    most = asked_slots or slots or _SLOTS[request.purpose]
    asked = user.integer("-c", 1, limit * most, f"{most} slots of the model's {limit} tokens")
    kv_type = user.choice("--cache-type-k", tuple(_KV_BYTES)) or "f16"
    if asked is not None:
        return _fit(request, here, (most, asked // most), kv_type, kind)
    sizes = [(s, n) for n in _contexts(limit, request.purpose) for s in ([most] if asked_slots else _halved(most))]
    tries = [_fit(request, here, size, kv_type, kind) for size in sizes]
    whole = [fit for fit in tries if fit.on_gpu and fit.length >= min(limit, 2 * _LEAST_CONTEXT)]
    modest = [fit for fit in tries if fit.feasible and fit.memory.kv_cache <= max(_SMALL_KV, _KV_SHARE * here.total)]
    partly = [fit for fit in tries if fit.feasible]
    return (whole or modest or partly or tries[-1:])[0]


def _halved(most: int) -> list[int]:
    return [most >> n for n in range(most.bit_length())]


def _contexts(limit: int, purpose: Purpose) -> list[int]:
    return [n for n in _halved(min(limit, _CONTEXT[purpose])) if n >= min(limit, _LEAST_CONTEXT)]


def _fit(request: Request, here: Room, size: tuple[int, int], kv_type: str, kind: str) -> GgufFit:
    model, (slots, length) = request.model, size
    parts = Memory(
        weights=gguf_gib(model, kind),
        kv_cache=kv_gib(model.shape, slots * length, _KV_BYTES[kv_type]) + llamacpp_state_gib(model.shape, slots),
        overhead=compute_gib(model.shape),
    )
    on_gpu = here.count > 0 and parts.total <= here.gpu
    available, share = (here.gpu / here.count, here.count) if on_gpu else (here.total, 1)
    memory = Memory(
        weights=parts.weights / share, kv_cache=parts.kv_cache / share, overhead=parts.overhead / share, available=available
    )
    return GgufFit(memory, slots, length, kv_type, on_gpu, parts.total <= here.total)


def gguf_that_fits(model: Model, hardware: Hardware) -> tuple[str, float, str] | None:
    """(type, GiB, where) of the best GGUF here for one request at a time: the best wholly on the GPUs, else the best that fits."""
    request = Request(model, hardware, "latency")
    kinds = [model.quantization or model.dtype] if model.format == "gguf" else list(BITS)
    fits = {kind: fit_gguf(request, Overrides({}), kind) for kind in kinds}
    for kind, fit in fits.items():
        if fit.on_gpu:
            return kind, gguf_gib(model, kind), "all of it on the GPU"
    for kind, fit in fits.items():
        if fit.feasible:
            where = "in RAM on the CPU" if not hardware.gpus else "layers shared between GPU and CPU, several times slower"
            return kind, gguf_gib(model, kind), where
    return None


def gguf_plan(
    engine: str,
    request: Request,
    fit: GgufFit,
    settings: tuple[tuple[Setting, ...], tuple[Setting, ...]],
    *,
    refused: str = "",
    on_cpu: bool = False,
    parameters: tuple[Setting, ...] = (),
    notes: Sequence[str] = (),
) -> Plan:
    """The plan with this fit and these (flags, environment): what does not fit, and what would.

    ``refused`` says why the engine does not load the model at all, ``on_cpu`` that its owner wants no GPU.
    """
    model, m = request.model, fit.memory
    warnings, alternatives = [refused] if refused else [], list[str]()
    if not fit.feasible:
        parts = f"weights {m.weights:.1f}, KV cache {m.kv_cache:.1f}, buffers {m.overhead:.1f}"
        warnings.append(f"needs {m.total:.1f} GiB ({parts}), {m.available:.1f} GiB are available")
    elif request.hardware.gpus and not fit.on_gpu and not on_cpu:
        usable = f"{m.total:.1f} GiB do not fit on the GPU ({room(request.hardware).gpu:.1f} GiB usable)"
        warnings.append(f"{usable}: part of the layers run on the CPU")
    if refused:
        alternatives = ["granite-pipeline export makes a Q8_0 GGUF of it", "the vllm engine serves the folder as it is"]
    elif warnings:
        better = gguf_that_fits(model, request.hardware) if model.format == "shape" else None
        if better and better[0] != "Q8_0":
            alternatives = [f"the {better[0]} GGUF ({better[1]:.1f} GiB), {better[2]}"]
        elif not fit.feasible:
            alternatives = ["a GGUF with fewer bits per weight (Q4_K_M), or a smaller Granite"]
    return Plan(
        engine=engine,
        feasible=fit.feasible and not refused,
        flags=settings[0],
        env=settings[1],
        dtype=model.dtype,
        quantization=model.quantization or ("Q8_0" if model.format == "shape" else None),
        max_model_len=fit.length,
        max_num_seqs=fit.slots,
        memory=m,
        parameters=parameters,
        alternatives=tuple(alternatives),
        warnings=(*warnings, *notes),
    )
