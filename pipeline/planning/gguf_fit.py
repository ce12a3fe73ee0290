"""What fits of a GGUF on this machine, for llama.cpp and Ollama: slots, context, memory; and which quantisation, or which smaller Granite, would."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pipeline.machine.gpus import GIB
from pipeline.machine.hardware import Cpu, Hardware
from pipeline.model.model import Model
from pipeline.model.shape import SHAPES
from pipeline.planning.memory import LLAMACPP_MARGIN, compute_gib, kv_gib, mamba_gib
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
_BARRIER = "at each barrier all threads wait for the slowest"


def gguf_gib(model: Model, kind: str = "Q8_0") -> float:
    """GiB of weights of this model as a GGUF of that type; a GGUF on disk keeps its own size."""
    if model.format == "gguf":
        return model.weight_bytes / GIB
    return model.parameters * BITS[kind] / 8 / GIB


def barrier_threads(cpu: Cpu) -> tuple[int, str]:
    """How many threads a llama.cpp without OpenMP should have on this CPU, at least 1, and why.

    Its threads never sleep at a barrier, so that one whose core is taken holds up all. Measured on 2 cores, tokens/s with one
    and with two threads: 40 and 61-70 on a quiet machine, 37 and 1-9 on a busy one.
    """
    physical = min(cpu.physical or cpu.cores, cpu.cores)
    idle = physical if cpu.idle is None else max(1, int(cpu.idle + 0.5))
    if idle < physical:
        return idle, f"about {cpu.idle:g} cores are idle now, of {physical}: {_BARRIER}, so one too many costs most of the speed"
    return physical, f"the physical cores this process may use: {_BARRIER}"


@dataclass(frozen=True)
class GgufFit:
    """What a GGUF takes with this many slots of this context, and whether all of it is on the GPUs."""

    memory: Memory
    slots: int
    length: int
    on_gpu: bool
    feasible: bool


def _gpu_room(hardware: Hardware) -> float:
    """GiB that llama.cpp may use on all GPUs together (0 without): its own fitting leaves 1 GiB free on each."""
    return sum(max(0.0, gpu.free_gib - LLAMACPP_MARGIN) for gpu in hardware.gpus)


def _room(hardware: Hardware) -> float:
    """GPUs and RAM together: layers that do not fit on the GPUs run on the CPU; Apple's GPU memory is the RAM."""
    return _gpu_room(hardware) + (0.0 if hardware.accelerator == "apple" else hardware.ram_free_gib)


def fit_gguf(request: Request, user: Overrides, kind: str = "Q8_0", slots: int | None = None) -> GgufFit:
    """First fewer slots, then a shorter context, until everything fits: on the GPUs when possible, else over GPUs and RAM.

    ``slots`` is the number to start from; slots and context the user gave are kept.
    """
    limit = request.model.shape.max_positions
    asked_slots = user.integer("--parallel", 1, 256)
    most = asked_slots or slots or _SLOTS[request.purpose]
    asked = user.integer("-c", 1, limit * most, f"{most} slots of the model's {limit} tokens")
    kv_type = user.choice("--cache-type-k", tuple(_KV_BYTES)) or "f16"
    if asked is not None:
        return _fit(request, (most, asked // most), kv_type, kind)
    contexts = [n for n in _halved(min(limit, _CONTEXT[request.purpose])) if n >= min(limit, _LEAST_CONTEXT)]
    slots_tried = [most] if asked_slots else _halved(most)
    tries = [_fit(request, (s, n), kv_type, kind) for n in contexts for s in slots_tried]
    whole = [fit for fit in tries if fit.on_gpu and fit.length >= min(limit, 2 * _LEAST_CONTEXT)]
    modest = [fit for fit in tries if fit.feasible and fit.memory.kv_cache <= max(_SMALL_KV, _KV_SHARE * _room(request.hardware))]
    partly = [fit for fit in tries if fit.feasible]
    return (whole or modest or partly or tries[-1:])[0]


def _halved(most: int) -> list[int]:
    return [most >> n for n in range(most.bit_length())]


def _fit(request: Request, size: tuple[int, int], kv_type: str, kind: str) -> GgufFit:
    model, (slots, length), count = request.model, size, len(request.hardware.gpus)
    on_gpus, everywhere = _gpu_room(request.hardware), _room(request.hardware)
    # the mamba state is one in float32 for each slot
    state = mamba_gib(model.shape, slots, 4.0, prefix_caching=False)
    weights, kv = gguf_gib(model, kind), kv_gib(model.shape, slots * length, _KV_BYTES[kv_type]) + state
    buffers = compute_gib(model.shape)
    total = Memory(weights=weights, kv_cache=kv, overhead=buffers).total
    on_gpu = count > 0 and total <= on_gpus
    available, share = (on_gpus / count, count) if on_gpu else (everywhere, 1)
    memory = Memory(weights=weights / share, kv_cache=kv / share, overhead=buffers / share, available=available)
    return GgufFit(memory, slots, length, on_gpu, total <= everywhere)


def gguf_that_fits(model: Model, hardware: Hardware) -> tuple[str, float, str] | None:
    """(type, GiB, where) of the best GGUF here for one request at a time: the best wholly on the GPUs, else the best that fits."""
    request = Request(model, hardware, "latency")
    kinds = [model.quantization or model.dtype] if model.format == "gguf" else list(BITS)
    fits = {kind: fit_gguf(request, Overrides({}), kind) for kind in kinds}
    shared = "layers shared between GPU and CPU, several times slower" if hardware.gpus else "in RAM on the CPU"
    found = [(kind, gguf_gib(model, kind), "all of it on the GPU") for kind, fit in fits.items() if fit.on_gpu]
    found += [(kind, gguf_gib(model, kind), shared) for kind, fit in fits.items() if fit.feasible]
    return found[0] if found else None


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
        usable = f"{m.total:.1f} GiB do not fit on the GPU ({_gpu_room(request.hardware):.1f} GiB usable)"
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


def other_gguf(request: Request) -> str:
    """A GGUF on llama.cpp or Ollama that fits this machine, or ""."""
    fits = gguf_that_fits(request.model, request.hardware)
    return f"the {fits[0]} GGUF ({fits[1]:.1f} GiB) with llamacpp or ollama, {fits[2]}" if fits else ""


def smaller(request: Request, fits: Callable[[Model], bool]) -> str:
    """The largest published Granite that is smaller and fits, or ""."""
    for name in sorted(SHAPES, key=lambda name: SHAPES[name].parameters, reverse=True):
        model = Model.from_shape(name)
        if model.parameters < request.model.parameters and not name.startswith("granite-3.0") and fits(model):
            return f"{name} ({model.parameters / 1e9:.1f} billion parameters, {model.weights_gib('bfloat16'):.1f} GiB in 16 bits)"
    return ""


def nearest_cpu(request: Request, fits: Callable[[Request], bool]) -> tuple[str, ...]:
    """For the CPU build: the plan without the user's limits, a GGUF, a smaller Granite."""
    free = replace(request, overrides={})
    found = ["without your --set it fits"] if request.overrides and fits(free) else []
    found += [other_gguf(request), smaller(request, lambda model: fits(replace(free, model=model)))]
    return tuple(words for words in found if words)
