"""The nearest things that do work, with numbers, for a model that does not fit or fits only quantised."""

from collections.abc import Callable
from dataclasses import replace

from pipeline.model.model import Model
from pipeline.model.shape import SHAPES
from pipeline.planning.gguf_fit import gguf_that_fits
from pipeline.planning.gpu_fit import Fit, Wish, alike, best, choices, legal_tensor_parallel, refusal
from pipeline.planning.plan import Request

_MOST_GPUS = 8


def nearest_gpu(request: Request, fit: Fit, wish: Wish) -> tuple[str, ...]:
    """For GPUs: without the user's limits, another precision, a GGUF, more GPUs, a smaller Granite."""
    if fit.feasible and not fit.choice.quantization:
        return ()
    found = [gguf(request)]
    if not fit.feasible and not refusal(request, request.hardware.gpus[0]):
        found += [_without_limits(request, wish), _more_gpus(request, wish), smaller(request, lambda m: _fits(request, m, wish))]
    return tuple(words for words in found if words)


def gguf(request: Request) -> str:
    """A GGUF on llama.cpp or Ollama that fits this machine, or ""."""
    found = gguf_that_fits(request.model, request.hardware)
    if found is None:
        return ""
    kind, size, where = found
    return f"the {kind} GGUF ({size:.1f} GiB) with llamacpp or ollama, {where}"


def smaller(request: Request, fits: Callable[[Model], bool]) -> str:
    """The largest published Granite that is smaller and fits, or ""."""
    shapes = sorted(SHAPES, key=lambda name: SHAPES[name].parameters, reverse=True)
    for name in shapes:
        model = Model.from_shape(name)
        if model.parameters < request.model.parameters and not name.startswith("granite-3.0") and fits(model):
            return f"{name} ({model.parameters / 1e9:.1f} billion parameters, {model.weights_gib('bfloat16'):.1f} GiB in 16 bits)"
    return ""


def _fits(request: Request, model: Model, wish: Wish) -> bool:
    free = replace(wish, choices=tuple(choices(model, alike(request.hardware.gpus), eager=False)), length=None)
    return best(model, alike(request.hardware.gpus), free).feasible


def _without_limits(request: Request, wish: Wish) -> str:
    """What would fit if the user's own settings were dropped."""
    gpus = alike(request.hardware.gpus)
    free = replace(wish, choices=tuple(choices(request.model, gpus, eager=False)), length=None, utilization=None)
    fit = best(request.model, gpus, free) if request.overrides else None
    if fit is None or not fit.feasible:
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
        gpus = (gpu,) * count
        if not legal_tensor_parallel(model.shape, count):
            continue
        fit = best(model, gpus, replace(wish, choices=tuple(choices(model, gpus, eager=False))))
        if fit.feasible:
            return (
                f"{count} x {gpu.name} (tensor parallel {fit.choice.tensor_parallel}, {fit.choice.quantization or 'unquantised'})"
            )
    return ""


def nearest_cpu(request: Request, fits: Callable[[Request], bool]) -> tuple[str, ...]:
    """For the CPU build: the plan without the user's limits, a GGUF, a smaller Granite."""
    free = replace(request, overrides={})
    found = ["without your --set it fits"] if request.overrides and fits(free) else []
    found += [gguf(request), smaller(request, lambda model: fits(replace(free, model=model)))]
    return tuple(words for words in found if words)
