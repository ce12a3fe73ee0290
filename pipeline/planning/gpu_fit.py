"""What fits on these GPUs: quantisation, KV precision, tensor parallelism and graphs, tried from best quality downwards.

What else would fit is said with numbers where a model does not fit, or only quantised. Used for vLLM and SGLang, which hold
weights and KV cache alike. All memory is GiB per GPU.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from pipeline.machine.gpus import Gpu
from pipeline.model.model import Model
from pipeline.model.shape import Shape
from pipeline.planning.gguf_fit import other_gguf, smaller
from pipeline.planning.memory import activation_gib, graphs_gib, kv_gib, mamba_gib, non_torch_gib, utilization
from pipeline.planning.plan import Memory, Plan, Purpose, Request, Setting

# longest context planned per request (None: the model's own), and how many requests of that length must fit
_CONTEXT: dict[Purpose, int] = {"verify": 4096, "serve": 32768, "throughput": 8192, "latency": 32768}
_FULL_LENGTH: dict[Purpose, int] = {"verify": 1, "serve": 2, "throughput": 4, "latency": 1}
_STEP = 1024
# contexts below which the next quantisation is tried first; 2048 is the last resort
_ACCEPTABLE = (8192, 4096, 2048)
# up to so many GPUs are suggested for a model that does not fit
_MOST_GPUS = 8


@dataclass(frozen=True)
class Choice:
    """One way to hold a model: weights quantised how, KV cache in what, over how many GPUs, with CUDA graphs or without."""

    quantization: str | None
    kv_dtype: str
    tensor_parallel: int
    eager: bool


@dataclass(frozen=True)
class Wish:
    """What is asked of a fit: the cap on sequences, and the limits the user set (None: free)."""

    purpose: Purpose
    dtype: str
    sequences: int
    choices: tuple[Choice, ...]
    length: int | None = None
    utilization: float | None = None
    prefix_caching: bool = True


@dataclass(frozen=True)
class Fit:
    """A choice with its predicted memory, and the context and number of sequences that memory allows."""

    choice: Choice
    memory: Memory
    length: int
    sequences: int
    feasible: bool


def alike(gpus: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    """The GPUs that can share one model: those of the first one's kind; MIG slices cannot talk to each other."""
    return gpus[:1] if gpus[0].mig else tuple(gpu for gpu in gpus if gpu.name == gpus[0].name)


def legal_tensor_parallel(shape: Shape, size: int) -> bool:
    """vLLM's rule: heads divide evenly, and kv heads divide or are divided by the size; mamba heads divide too."""
    if shape.mamba and shape.mamba.heads % size:
        return False
    return shape.heads % size == 0 and (shape.kv_heads % size == 0 or size % shape.kv_heads == 0)


def native_fp8(gpu: Gpu) -> bool:
    """True where the hardware computes fp8: NVIDIA from 8.9, AMD's MI300 and MI350 (gfx94x, gfx95x) and RDNA 4 (gfx12)."""
    return gpu.capability >= (8, 9) if gpu.vendor == "nvidia" else gpu.capability in ((9, 4), (9, 5), (12, 0))


def quantizations(model: Model, gpu: Gpu) -> list[str | None]:
    """Ways to hold the weights, best quality first: as they are, fp8, bitsandbytes 4-bit.

    Online fp8 needs compute capability 7.5, or AMD hardware that computes it; the bitsandbytes plugin needs 7.0 and is not for
    AMD. A quantised hybrid mixture of experts fails to load (KeyError experts.w13_weight); 4-bit is planned for dense models only.
    """
    found: list[str | None] = [None]
    if model.quantization or (model.shape.hybrid and model.shape.experts):
        return found
    if native_fp8(gpu) or (gpu.vendor == "nvidia" and gpu.capability >= (7, 5)):
        found.append("fp8")
    if gpu.vendor == "nvidia" and gpu.capability >= (7, 0) and not model.shape.experts and not model.shape.hybrid:
        found.append("bitsandbytes")
    return found


def choices(model: Model, gpus: tuple[Gpu, ...], eager: bool) -> Iterator[Choice]:
    """Every legal choice, in order of preference: unquantised first, few GPUs first, then fp8 KV, then no CUDA graphs.

    An fp8 KV cache needs compute capability 8.9 (vLLM's Triton attention refuses it below).
    """
    gpu = gpus[0]
    sizes = [n for n in range(1, len(gpus) + 1) if legal_tensor_parallel(model.shape, n)]
    cache = ["auto", "fp8"] if native_fp8(gpu) and not model.shape.hybrid else ["auto"]
    for quantization, size, without in product(quantizations(model, gpu), sizes, (True,) if eager else (False, True)):
        yield from (Choice(quantization, kv, size, without) for kv in cache)


def best(model: Model, gpus: tuple[Gpu, ...], wish: Wish) -> Fit:
    """The first choice that fits with an acceptable context; when none does, the smallest one, marked not feasible."""
    wanted = [wish.length] if wish.length else sorted({min(a, model.shape.max_positions) for a in _ACCEPTABLE}, reverse=True)
    for least in wanted:
        for choice in wish.choices:
            if (fit := _fit(model, gpus[0], wish, choice, least)).feasible:
                return fit
    return min((_fit(model, gpus[0], wish, choice, wanted[-1]) for choice in wish.choices), key=lambda fit: fit.memory.total)


def _fit(model: Model, gpu: Gpu, wish: Wish, choice: Choice, least: int) -> Fit:
    shape, size = model.shape, choice.tensor_parallel
    share = wish.utilization or utilization(gpu)[0]
    weights = model.weights_gib(wish.dtype, choice.quantization) / size
    graphs = graphs_gib(wish.sequences, choice.eager)
    fixed = weights + activation_gib(shape) + graphs + non_torch_gib(size)
    pool = share * gpu.memory_gib - fixed
    element = 1.0 if choice.kv_dtype.startswith("fp8") else 4.0 if wish.dtype == "float32" else 2.0
    token = kv_gib(shape, 1, element) / min(size, shape.kv_heads)
    state = mamba_gib(shape, 1, prefix_caching=wish.prefix_caching) / size
    enough = pool >= least * token + state and share * gpu.memory_gib <= gpu.free_gib
    length = wish.length or _length(shape, wish.purpose, pool, token, state, least)
    sequences = _sequences(wish, pool, token, state, length) if enough else 1
    memory = Memory(
        weights=weights,
        kv_cache=pool if enough else least * token + state,
        activation=activation_gib(shape),
        graphs=graphs,
        overhead=non_torch_gib(size),
        available=gpu.free_gib,
    )
    return Fit(choice, memory, length, sequences, enough)


def _length(shape: Shape, purpose: Purpose, pool: float, token: float, state: float, least: int) -> int:
    most = min(shape.max_positions, _CONTEXT[purpose])
    room = (pool / _FULL_LENGTH[purpose] - state) / token
    return max(min(most, least), min(most, int(room) // _STEP * _STEP))


def _sequences(wish: Wish, pool: float, token: float, state: float, length: int) -> int:
    """As many as the pool holds: dense at 1024 tokens each (they grow and queue), hybrids at 8192, since their state cannot wait."""
    typical = min(length, 8192 if state else _STEP)
    return max(1, min(wish.sequences, int(pool / (typical * token + state))))


def hub_id(name: str) -> str:
    """The public id of a shape's chat model; 3.x ids end in -instruct."""
    return f"ibm-granite/{name}-instruct" if name.startswith("granite-3.") else f"ibm-granite/{name}"


def refusal(request: Request, gpu: Gpu | None) -> str:
    """Why vLLM cannot serve this model on this kind of machine at all, or ""."""
    if request.model.format == "gguf":
        return "vLLM is given a GGUF: its GGUF loader is experimental and does not know Granite; serve the merged folder"
    if gpu is None:
        return ""
    if gpu.vendor == "apple":
        return "vLLM has no Metal build that serves Granite: use llama.cpp or Ollama on this Mac"
    if gpu.vendor == "nvidia" and gpu.capability < (7, 0):
        return f"vLLM needs compute capability 7.0; {gpu.name} has {gpu.compute_capability}"
    return ""


def gpu_plan(
    engine: str,
    request: Request,
    wanted: tuple[Wish, Fit],
    settings: tuple[tuple[Setting, ...], tuple[Setting, ...]],
    quantization: str | None,
    warnings: Sequence[str],
) -> Plan:
    """The plan with the fit found for a wish and these (flags, environment), and what else would fit."""
    wish, fit = wanted
    return Plan(
        engine=engine,
        feasible=fit.feasible,
        flags=settings[0],
        env=settings[1],
        dtype=wish.dtype,
        quantization=quantization,
        tensor_parallel=fit.choice.tensor_parallel,
        max_model_len=fit.length,
        max_num_seqs=fit.sequences,
        memory=fit.memory,
        alternatives=_nearest(request, fit, wish),
        warnings=tuple(warnings),
    )


def _nearest(request: Request, fit: Fit, wish: Wish) -> tuple[str, ...]:
    """What else fits: without the user's limits, a GGUF, more GPUs, a smaller Granite."""
    if fit.feasible and not fit.choice.quantization:
        return ()
    found, gpus = [other_gguf(request)], alike(request.hardware.gpus)
    if not fit.feasible and not refusal(request, gpus[0]):
        free = replace(wish, length=None)
        found += [_without_limits(request, wish), _more_gpus(request, wish)]
        found.append(smaller(request, lambda model: _best_of_all(model, gpus, free).feasible))
    return tuple(words for words in found if words)


def _best_of_all(model: Model, gpus: tuple[Gpu, ...], wish: Wish) -> Fit:
    """The best fit whatever choices the user's settings left."""
    return best(model, gpus, replace(wish, choices=tuple(choices(model, gpus, eager=False))))


def _without_limits(request: Request, wish: Wish) -> str:
    """What would fit if the user's own settings were dropped."""
    fit = _best_of_all(request.model, alike(request.hardware.gpus), replace(wish, length=None, utilization=None))
    if not request.overrides or not fit.feasible:
        return ""
    choice = fit.choice
    how = [choice.quantization or "unquantised", f"--max-model-len {fit.length}"]
    how += [f"tensor parallel {choice.tensor_parallel}"] if choice.tensor_parallel > 1 else []
    how += ["fp8 KV cache"] if choice.kv_dtype == "fp8" else []
    return "without your --set: " + ", ".join(how)


def _more_gpus(request: Request, wish: Wish) -> str:
    """The smallest number of the same GPU that holds the model, unquantised where that needs no more of them."""
    gpu, model = request.hardware.gpus[0], request.model
    for count in range(len(request.hardware.gpus) + 1, _MOST_GPUS + 1):
        if not legal_tensor_parallel(model.shape, count):
            continue
        fit = _best_of_all(model, (gpu,) * count, wish)
        if fit.feasible:
            how = f"tensor parallel {fit.choice.tensor_parallel}, {fit.choice.quantization or 'unquantised'}"
            return f"{count} x {gpu.name} ({how})"
    return ""
