"""vLLM on NVIDIA and AMD GPUs: precision by compute capability, quantisation only where it must be, memory predicted per GPU.

``asked_by_user``, ``with_common`` and ``template_warning`` are for every kind of machine: the user's settings, the model and
its name, tool calling, environment.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from pipeline.engines.base import WHY_DEFAULT
from pipeline.engines.flags import listed_flags
from pipeline.errors import InputError
from pipeline.machine.gpus import Gpu
from pipeline.planning.gpu_fit import Choice, Fit, Wish, alike, best, choices, gpu_plan, hub_id, legal_tensor_parallel, refusal
from pipeline.planning.memory import default_max_num_seqs, utilization
from pipeline.planning.overrides import Overrides
from pipeline.planning.plan import Plan, Purpose, Request, Setting

_SEQUENCES: dict[Purpose, int] = {"verify": 16, "serve": 128, "throughput": 1024, "latency": 8}
_ALIASES = {"--tp": "--tensor-parallel-size", "--gpu-memory-util": "--gpu-memory-utilization"}
_MODES = {"latency": "interactivity", "throughput": "throughput"}
# a prequantised checkpoint: the kernel family to name, where the checkpoint's own word is not the fast one
_MARLIN = {"awq": "awq_marlin", "gptq": "gptq_marlin"}
_COMPACT = '{"backend":"xgrammar","disable_any_whitespace":true}'


def plan(request: Request) -> Plan:
    """The best plan that fits, or a refusal with its numbers and the nearest things that do fit."""
    user = asked_by_user(request)
    gpu = request.hardware.gpus[0]
    why_not = refusal(request, gpu)
    wish = _wish(request, user)
    fit = best(request.model, alike(request.hardware.gpus), wish)
    fit = replace(fit, feasible=fit.feasible and not why_not)
    chosen = {k: v for k, v in user.values.items() if (k, v) != ("--quantization", "none")}
    laid = Overrides(chosen).lay_over(with_common(request, _settings(request, wish, fit)), listed_flags("vllm"))
    fit = replace(fit, sequences=user.integer("--max-num-seqs", 1, 65536) or fit.sequences)
    warnings = [why_not] if why_not else _warnings(request, fit, wish, user)
    return gpu_plan("vllm", request, (wish, fit), laid, quantization_word(request, fit.choice, gpu), warnings)


def asked_by_user(request: Request) -> Overrides:
    """The user's settings as vLLM names them, on any machine."""
    return Overrides.of(request.overrides, listed_flags("vllm"), _ALIASES)


def _wish(request: Request, user: Overrides) -> Wish:
    gpu, shape = request.hardware.gpus[0], request.model.shape
    sequences = min(_SEQUENCES[request.purpose], default_max_num_seqs(gpu))
    if request.purpose == "serve" and gpu.memory_gib < 25:
        sequences = 32 if "GeForce" in gpu.name else 64
    eager = user.switch("--enforce-eager")
    every = choices(request.model, alike(request.hardware.gpus), request.purpose == "verify" if eager is None else eager)
    found = _restrict(request, user, tuple(c for c in every if not (eager is False and c.eager)), gpu)
    return Wish(
        purpose=request.purpose,
        dtype=_dtype(user, gpu),
        sequences=user.integer("--max-num-seqs", 1, 65536) or sequences,
        choices=found,
        length=user.integer("--max-model-len", 1, shape.max_positions, f"the model's own limit is {shape.max_positions}"),
        utilization=user.number("--gpu-memory-utilization", 0.05, 1.0),
        prefix_caching=not shape.hybrid
        or (user.switch("--enable-prefix-caching") is not False and request.purpose != "throughput"),
    )


def _dtype(user: Overrides, gpu: Gpu) -> str:
    """bfloat16 from compute capability 8.0, float16 below it, where an explicit bfloat16 ends the start."""
    modern = gpu.vendor == "amd" or gpu.capability >= (8, 0)
    asked = user.choice("--dtype", (*(["bfloat16"] if modern else []), "float16", "half", "float32"))
    if asked in ("float32", "float16", "bfloat16"):
        return asked
    return "float16" if asked == "half" or not modern else "bfloat16"


def _restrict(request: Request, user: Overrides, found: tuple[Choice, ...], gpu: Gpu) -> tuple[Choice, ...]:
    """Keep the choices the user's settings leave; raises InputError for a setting that is illegal here."""
    shape, count = request.model.shape, len(alike(request.hardware.gpus))
    size = user.integer("--tensor-parallel-size", 1, count, f"GPUs that can work together here: {count}")
    if size and not legal_tensor_parallel(shape, size):
        raise InputError(f"--tensor-parallel-size {size} does not divide {shape.heads} heads and {shape.kv_heads} kv heads")
    found = tuple(c for c in found if size in (None, c.tensor_parallel))
    asked = user.values.get("--quantization")
    if asked and not request.model.quantization:
        known = [*sorted({c.quantization for c in found if c.quantization}), "none"]
        if asked not in known:
            remedy = f"possible: {', '.join(known)}"
            raise InputError(f"--quantization {asked} does not work for this model on {gpu.name}", remedy=remedy)
        found = tuple(c for c in found if c.quantization == (None if asked == "none" else asked))
    cache = user.values.get("--kv-cache-dtype")
    if not cache:
        return found
    kind = "fp8" if cache.startswith("fp8") else "auto"
    left = tuple(c for c in found if c.kv_dtype == kind)
    if kind == "fp8" and not left:
        has = f"{gpu.name} has {gpu.compute_capability or 'none'}"
        raise InputError(f"--kv-cache-dtype {cache} needs compute capability 8.9, {has}")
    return left


def quantization_word(request: Request, choice: Choice, gpu: Gpu) -> str | None:
    """What ``--quantization`` says: an online method, Marlin for AWQ and GPTQ checkpoints from 8.0, else the checkpoint's own."""
    stored = request.model.quantization
    if stored in _MARLIN and gpu.vendor == "nvidia" and gpu.capability >= (8, 0):
        return _MARLIN[stored]
    return stored or choice.quantization


def _settings(request: Request, wish: Wish, fit: Fit) -> list[Setting]:
    gpu, choice, limit = request.hardware.gpus[0], fit.choice, request.model.shape.max_positions
    share, why_share = utilization(gpu)
    settings = [
        Setting("--dtype", wish.dtype, _why_dtype(gpu, wish.dtype)),
        Setting("--max-model-len", str(fit.length), f"context per request that the KV cache holds; the model allows {limit}"),
        Setting("--max-num-seqs", str(fit.sequences), _why_sequences(request, fit)),
        Setting("--gpu-memory-utilization", f"{share:.2f}", why_share),
    ]
    word = quantization_word(request, choice, gpu)
    if word and (choice.quantization or word in _MARLIN.values()):
        settings.append(Setting("--quantization", word, _why_quantization(request, choice, word)))
    if choice.kv_dtype == "fp8":
        settings.append(Setting("--kv-cache-dtype", "fp8", "halves the KV cache, which would hold too little context in 16 bits"))
    if choice.tensor_parallel > 1:
        why = f"one GPU of {gpu.memory_gib:.1f} GiB does not hold the model; {choice.tensor_parallel} divides heads and kv heads"
        settings.append(Setting("--tensor-parallel-size", str(choice.tensor_parallel), why))
    if choice.eager:
        starts = request.purpose == "verify"
        why = "starts faster, no graph capture" if starts else "CUDA graphs would take the memory the KV cache needs"
        settings.append(Setting("--enforce-eager", None, why))
    if request.purpose in _MODES:
        settings.append(Setting("--performance-mode", _MODES[request.purpose], f"purpose {request.purpose}"))
    if not wish.prefix_caching:
        why = "a third of the mamba state per request, so three times the requests"
        settings.append(Setting("--no-enable-prefix-caching", None, why))
    return settings


def _why_dtype(gpu: Gpu, dtype: str) -> str:
    if dtype == "bfloat16":
        return f"{gpu.name} computes bfloat16 natively; Granite is trained in it, float16 can overflow"
    has = f"compute capability {gpu.compute_capability} has no bfloat16 (8.0 and later have)"
    return f"{has}; an explicit bfloat16 is fatal there"


def _why_sequences(request: Request, fit: Fit) -> str:
    if request.model.shape.hybrid:
        return f"each running request holds its mamba state: {fit.memory.kv_cache:.1f} GiB of cache allow this many"
    return f"purpose {request.purpose}; more would take graph memory and {fit.memory.kv_cache:.1f} GiB of KV cache could not feed them"


def _why_quantization(request: Request, choice: Choice, word: str) -> str:
    model = request.model
    if model.quantization:
        return f"the checkpoint is {model.quantization}; the Marlin kernels are several times faster than the plain ones"
    full, small = model.weights_gib("bfloat16"), model.weights_gib("bfloat16", choice.quantization)
    return f"16-bit weights take {full:.1f} GiB, more than fits with activations and KV cache; {word} takes {small:.1f}"


def _warnings(request: Request, fit: Fit, wish: Wish, user: Overrides) -> list[str]:
    gpu, memory, found = request.hardware.gpus[0], fit.memory, template_warning(request)
    budget = (user.number("--gpu-memory-utilization", 0.05, 1.0) or utilization(gpu)[0]) * gpu.memory_gib
    if not fit.feasible:
        found.append(
            f"needs {memory.total:.1f} GiB per GPU (weights {memory.weights:.1f}, KV for {wish.length or fit.length} tokens "
            f"{memory.kv_cache:.1f}, activation {memory.activation:.1f}, graphs {memory.graphs:.1f}, other {memory.overhead:.1f}); "
            f"{min(budget, gpu.free_gib):.1f} of {gpu.memory_gib:.1f} GiB may be used"
        )
    if fit.choice.quantization == "bitsandbytes":
        found.append("bitsandbytes left vLLM's core in 0.28: pip install vllm-bnb-plugin")
    if gpu.vendor == "nvidia" and gpu.capability < (7, 5):
        has = f"compute capability {gpu.compute_capability}"
        found.append(f"{has}: wheels built with CUDA 13 have no kernels for it; use a CUDA 12 build")
    if len({g.name for g in request.hardware.gpus}) > 1:
        found.append(f"GPUs of different kinds: planned for {gpu.name} only; CUDA_VISIBLE_DEVICES chooses others")
    return found


def with_common(request: Request, planned: Sequence[Setting]) -> list[Setting]:
    """The settings planned for a machine, between those of every machine."""
    model, parser = request.model, request.model.tool_format
    settings = [
        Setting("--model", str(model.path or hub_id(model.name)), "the model to serve"),
        Setting("--served-model-name", request.name, "the name clients ask for"),
        *planned,
    ]
    if parser is not None:
        settings += [
            Setting("--enable-auto-tool-choice", None, "requests with tools are refused without it"),
            Setting("--tool-call-parser", parser, "the form in which the chat template writes tool calls"),
        ]
    why = "JSON by schema comes compact: left free, a small model pads it with white space until the token limit"
    settings += [
        Setting("--structured-outputs-config", _COMPACT, why),
        Setting("VLLM_NO_USAGE_STATS", "1", "no usage reports leave the machine"),
        Setting("DO_NOT_TRACK", "1", "no usage reports leave the machine"),
    ]
    if model.path is not None:
        settings.append(Setting("HF_HUB_OFFLINE", "1", "the model is a local folder: no hub look-ups at start"))
    return settings + default_flags(request.sampling)


def default_flags(sampling: Mapping[str, float]) -> list[Setting]:
    """The flag with which vLLM samples so where a client names nothing: over its own defaults and the folder's."""
    return [Setting("--override-generation-config", json.dumps(dict(sampling)), WHY_DEFAULT)] if sampling else []


def template_warning(request: Request) -> list[str]:
    """A folder without a chat template refuses every chat, and only when asked."""
    if request.model.has_chat_template:
        return []
    return ["the folder has no chat template: every chat would be refused; save it with the tokenizer"]
