"""Plan for Ollama: server variables, and the model's own parameters num_ctx and num_gpu."""

from __future__ import annotations

from pipeline.engines.flags import OLLAMA
from pipeline.engines.llamacpp_plan import SHORT_SPIN, fit_gguf, gguf_that_fits, room
from pipeline.overrides import Overrides
from pipeline.plan import Plan, Purpose, Request, Setting

_PARALLEL: dict[Purpose, int] = {"verify": 4, "serve": 4, "throughput": 8, "latency": 1}
_ALIASES = {
    "--num-parallel": "OLLAMA_NUM_PARALLEL",
    "--keep-alive": "OLLAMA_KEEP_ALIVE",
    "--max-loaded-models": "OLLAMA_MAX_LOADED_MODELS",
}
_PARAMETERS = {"--num-ctx": "num_ctx", "--num-gpu": "num_gpu"}


def plan(request: Request) -> Plan:
    """Variables of ``ollama serve`` and Modelfile parameters; every parallel request takes its own num_ctx of KV cache."""
    user = Overrides.of(request.overrides, _ALIASES)
    model, limit = request.model, request.model.shape.max_positions
    parallel = user.integer("OLLAMA_NUM_PARALLEL", 1, 64)
    asked = user.integer("--num-ctx", 1, limit, f"the model's own limit is {limit}")
    layers = user.integer("--num-gpu", -1, 1000)
    most = parallel or _PARALLEL[request.purpose]
    sized = {"--parallel": str(parallel)} if parallel else {}
    fit = fit_gguf(request, Overrides(sized | ({"--parallel": str(most), "-c": str(asked * most)} if asked else {})), slots=most)
    why_not = "Ollama refuses Granite safetensors folders: it needs the GGUF" if model.format == "safetensors" else ""
    on_cpu = not request.hardware.gpus
    planned_layers = 0 if on_cpu else -1
    why_layers = "no GPU here" if on_cpu else "Ollama's own estimate of how many layers fit"
    settings = [
        Setting("OLLAMA_NUM_PARALLEL", str(fit.slots), "requests computed together; each takes its own num_ctx of KV cache"),
        Setting(
            "OLLAMA_MAX_LOADED_MODELS",
            "1",
            "the default loads up to three models a GPU; this plan counts on the memory for one",
        ),
        Setting("OLLAMA_KEEP_ALIVE", "30m", "the default unloads the model after five minutes without requests"),
        Setting(
            "OLLAMA_CONTEXT_LENGTH",
            str(fit.length),
            "for models created without num_ctx; the default of 4096 cuts prompts silently",
        ),
        Setting("--num-ctx", str(fit.length), "the default of 4096 on small machines cuts long prompts silently"),
        Setting("--num-gpu", str(planned_layers), why_layers),
    ]
    if on_cpu:
        settings.append(SHORT_SPIN)
    flags, env = user.lay_over(settings, OLLAMA)
    parameters = tuple(Setting(_PARAMETERS[s.name], s.value, s.reason, s.source) for s in flags)
    m = fit.memory
    short = f"needs {m.total:.1f} GiB (weights {m.weights:.1f}, KV cache {m.kv_cache:.1f}), {m.available:.1f} GiB are available"
    partly = (
        f"{m.total:.1f} GiB do not fit on the GPU ({room(request.hardware).gpu:.1f} usable): part of the layers run on the CPU"
    )
    warnings = (
        [why_not]
        if why_not
        else [short]
        if not fit.feasible
        else [partly]
        if not on_cpu and not fit.on_gpu and layers != 0
        else []
    )
    other = gguf_that_fits(model, request.hardware) if warnings and not why_not else None
    return Plan(
        engine="ollama",
        feasible=fit.feasible and not why_not,
        flags=(),
        env=env,
        dtype=model.dtype,
        quantization=model.quantization or ("Q8_0" if model.format == "shape" else None),
        tensor_parallel=1,
        max_model_len=fit.length,
        max_num_seqs=fit.slots,
        memory=m,
        parameters=parameters,
        alternatives=_alternatives(why_not, other),
        warnings=tuple(warnings),
    )


def _alternatives(why_not: str, other: tuple[str, float, str] | None) -> tuple[str, ...]:
    if why_not:
        return ("granite-pipeline export makes a Q8_0 GGUF of it", "the vllm engine serves the folder as it is")
    return (f"the {other[0]} GGUF ({other[1]:.1f} GiB), {other[2]}",) if other and other[0] != "Q8_0" else ()
