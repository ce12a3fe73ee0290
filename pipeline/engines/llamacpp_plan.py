"""Plan for llama.cpp's server: slots and context that fit, threads, and GPU layers left to its own fitting."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.engines.flags import LLAMACPP
from pipeline.gguf_types import BITS, gguf_gib
from pipeline.hardware import Hardware
from pipeline.memory import LLAMACPP_MARGIN, compute_gib, kv_gib, llamacpp_state_gib
from pipeline.model import Model
from pipeline.overrides import Overrides
from pipeline.plan import Memory, Plan, Purpose, Request, Setting

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
_ALIASES = {
    "--ctx-size": "-c", "--c": "-c", "--np": "--parallel", "--t": "--threads", "--ngl": "--n-gpu-layers", "--fa": "--flash-attn",
    "--ctk": "--cache-type-k", "--ctv": "--cache-type-v", "--b": "--batch-size", "--ub": "--ubatch-size",
    "--kvu": "--kv-unified", "--a": "--alias", "--tb": "--threads-batch", "--m": "--model",
}  # fmt: skip


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


def plan(request: Request) -> Plan:
    """Flags for one GGUF; ``-c`` is the context of all slots together, so it is slots x context per request."""
    user = Overrides.of(request.overrides, _ALIASES)
    model = request.model
    why_not = "" if model.format != "safetensors" else f"llama.cpp reads GGUF files, {model.path} is a safetensors folder"
    fit = fit_gguf(request, user)
    flags, env = user.lay_over(_settings(request, fit), LLAMACPP)
    kind = model.quantization or ("Q8_0" if model.format == "shape" else None)
    return Plan(
        engine="llamacpp",
        feasible=fit.feasible and not why_not,
        flags=flags,
        env=env,
        dtype=model.dtype,
        quantization=kind,
        tensor_parallel=1,
        max_model_len=fit.length,
        max_num_seqs=fit.slots,
        memory=fit.memory,
        alternatives=_alternatives(request, fit, why_not),
        warnings=_warnings(request, fit, why_not),
    )


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
        weights=parts.weights / share,
        kv_cache=parts.kv_cache / share,
        overhead=parts.overhead / share,
        available=available,
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


def _settings(request: Request, fit: GgufFit) -> list[Setting]:
    model, cpu = request.model, request.hardware.cpu
    total = fit.slots * fit.length
    settings = [
        Setting("--model", str(model.path or f"{model.name}.Q8_0.gguf"), "the GGUF to serve"),
        Setting("--alias", request.served_name or model.name, "the name clients ask for"),
        Setting(
            "-c",
            str(total),
            f"{fit.slots} slots x {fit.length} tokens; left out, the model's declared context is taken (hybrids: 1,048,576)",
        ),
        Setting("--parallel", str(fit.slots), "requests computed together; each slot owns an equal share of -c"),
        Setting("--threads", str(cpu.cores), "the cores this process may use (affinity and container quota applied)"),
        Setting("--jinja", None, "prompts come from the model's own chat template"),
    ]
    if cpu.numa_nodes > 1 and not fit.on_gpu:
        settings.append(Setting("--numa", "distribute", f"threads and memory spread over {cpu.numa_nodes} NUMA nodes"))
    if not fit.on_gpu:
        settings.append(SHORT_SPIN)
    return settings


def _alternatives(request: Request, fit: GgufFit, why_not: str) -> tuple[str, ...]:
    if why_not:
        return ("granite-pipeline export makes a Q8_0 GGUF of it", "the vllm engine serves the folder as it is")
    if fit.feasible and (fit.on_gpu or not request.hardware.gpus):
        return ()
    found = gguf_that_fits(request.model, request.hardware) if request.model.format == "shape" else None
    words = [f"the {found[0]} GGUF ({found[1]:.1f} GiB), {found[2]}"] if found and found[0] != "Q8_0" else []
    if not fit.feasible:
        words += ["a GGUF with fewer bits per weight (Q4_K_M), or a smaller Granite"] if not words else []
    return tuple(words)


def _warnings(request: Request, fit: GgufFit, why_not: str) -> tuple[str, ...]:
    m, found = fit.memory, [why_not] if why_not else []
    if not fit.feasible:
        found.append(
            f"needs {m.total:.1f} GiB (weights {m.weights:.1f}, KV cache {m.kv_cache:.1f}, buffers {m.overhead:.1f}), {m.available:.1f} GiB are available"
        )
    elif request.hardware.gpus and not fit.on_gpu:
        found.append(
            f"{m.total:.1f} GiB do not fit on the GPU ({room(request.hardware).gpu:.1f} GiB usable): part of the layers run on the CPU"
        )
    if not request.model.has_chat_template:
        found.append("the GGUF has no chat template: llama.cpp would guess a format; export it with its template")
    if request.model.format == "shape":
        found.append("planned for a Q8_0 GGUF; give --model FILE.gguf for another type")
    return tuple(found)
