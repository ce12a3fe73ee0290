"""SGLang: GPU servers from their own Python environment (``SGLANG_PYTHON``), since its pins exclude this one's."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from pipeline.engines.base import Availability, Container, Engine
from pipeline.engines.flags import listed_flags
from pipeline.errors import InputError
from pipeline.machine.hardware import Hardware
from pipeline.net.chat import Defaults
from pipeline.planning.gpu_fit import Fit, Wish, alike, best, choices, gpu_plan, hub_id, refusal
from pipeline.planning.overrides import Overrides
from pipeline.planning.plan import Memory, Plan, Purpose, Request, Setting

_SEQUENCES: dict[Purpose, int] = {"verify": 16, "serve": 64, "throughput": 256, "latency": 8}
_ALIASES = {"--tensor-parallel-size": "--tp-size", "--tp": "--tp-size", "--max-model-len": "--context-length"}
_INSTALL = "python -m venv sglang-env && sglang-env/bin/pip install sglang, then SGLANG_PYTHON=sglang-env/bin/python"
_VERSION_CODE = "import importlib.metadata as m; print(m.version('sglang'))"


class Sglang(Engine):
    """SGLang's OpenAI-compatible server. Its /tokenize takes text only and no route renders a chat, so it tells no prompts."""

    name = "sglang"
    title = "SGLang"
    default_port = 8004
    tells_flags = True
    settings: ClassVar[Mapping[str, str]] = {"SGLANG_MAX_MODEL_LEN": "context-length"}
    call_forms = ()  # it has no parser for Granite
    flags = listed_flags("sglang")
    # after the model's generation_config.json, which no flag of it overrides
    defaults = Defaults("SGLang's OpenAI protocol", temperature=1.0, top_p=1.0, top_k=-1, repetition_penalty=1.0)
    sequences_flag = "--max-running-requests"
    container = Container(
        gpu_image="lmsysorg/sglang:v0.5.20",
        variables={"--served-model-name": "SGLANG_MODEL", "--context-length": "SGLANG_MAX_MODEL_LEN"},
        entry=("python3", "-m", "sglang.launch_server"),
        gpu_ipc="host",
    )

    def available(self) -> Availability:
        """Ask the Python that would launch SGLang for its version, without importing it."""
        try:
            asked = subprocess.run([_python(), "-c", _VERSION_CODE], capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.SubprocessError) as error:
            return Availability(False, reason=f"{_python()} does not run: {error}", remedy=_INSTALL)
        if asked.returncode:
            return Availability(False, reason=f"SGLang is not installed in {_python()}", remedy=_INSTALL)
        return Availability(True, version=asked.stdout.strip())

    def advice(self, hardware: Hardware, users: int) -> str:
        """It needs an environment of its own, or a GPU that is not here."""
        if hardware.accelerator in ("nvidia", "amd"):
            return "as fast as vLLM with long shared prompts; it needs its own environment and is planned here, not run"
        return "its packages need a CUDA or ROCm GPU"

    def plan(self, request: Request) -> Plan:
        """Flags for these GPUs, or a refusal: it needs a CUDA or ROCm GPU."""
        user, model, hardware = Overrides.of(request.overrides, self.flags, _ALIASES), request.model, request.hardware
        if not hardware.gpus:
            return Plan(
                engine=self.name,
                feasible=False,
                dtype="float32",
                quantization=model.quantization,
                max_model_len=model.shape.max_positions,
                memory=Memory(weights=model.weights_gib("float32"), available=hardware.ram_free_gib),
                alternatives=("the vllm engine's CPU build, or llamacpp",),
                warnings=("SGLang's packages need a CUDA or ROCm GPU; its CPU build is compiled from source",),
            )
        why_not = refusal(request, hardware.gpus[0]).replace("vLLM", "SGLang")
        wish = _wish(request, user)
        fit = best(model, alike(hardware.gpus), wish)
        fit = replace(fit, feasible=fit.feasible and not why_not)
        m = fit.memory
        short = f"needs {m.total:.1f} GiB per GPU (weights {m.weights:.1f}), {m.available:.1f} GiB are free"
        laid = user.lay_over(_settings(request, wish, fit), self.flags)
        quantization = model.quantization or fit.choice.quantization
        warnings = [why_not] if why_not else [] if fit.feasible else [short]
        return gpu_plan(self.name, request, (wish, fit), laid, quantization, warnings)

    def program(self) -> Sequence[str]:
        """The server's module."""
        return [_python(), "-m", "sglang.launch_server"]


def _python() -> str:
    return os.environ.get("SGLANG_PYTHON") or sys.executable


def _wish(request: Request, user: Overrides) -> Wish:
    gpus, shape = alike(request.hardware.gpus), request.model.shape
    dtype = "bfloat16" if gpus[0].vendor == "amd" or gpus[0].capability >= (8, 0) else "float16"
    if user.values.get("--dtype") == "bfloat16" and dtype == "float16":
        raise InputError(f"--dtype bfloat16 needs compute capability 8.0, {gpus[0].name} has {gpus[0].compute_capability}")
    asked = user.integer("--tp-size", 1, len(gpus), f"GPUs that can work together here: {len(gpus)}")
    every = choices(request.model, gpus, eager=request.purpose == "verify")
    # SGLang has no bitsandbytes loader for Granite worth planning; fp8 is its online quantisation
    usable = tuple(c for c in every if c.quantization != "bitsandbytes" and asked in (None, c.tensor_parallel))
    if not usable:
        raise InputError(f"--tp-size {asked} does not divide {shape.heads} heads and {shape.kv_heads} kv heads")
    sequences = user.integer("--max-running-requests", 1, 4096) or _SEQUENCES[request.purpose]
    length = user.integer("--context-length", 1, shape.max_positions, f"the model's own limit is {shape.max_positions}")
    return Wish(request.purpose, dtype, sequences, usable, length)


def _settings(request: Request, wish: Wish, fit: Fit) -> list[Setting]:
    model, choice, capability = request.model, fit.choice, request.hardware.gpus[0].compute_capability
    why = f"context per request that the KV cache holds; the model allows {model.shape.max_positions}"
    settings = [
        Setting("--model-path", str(model.path or hub_id(model.name)), "the model to serve"),
        Setting("--served-model-name", request.name, "the name clients ask for"),
        Setting("--dtype", wish.dtype, f"compute capability {capability or 'unknown'}"),
        Setting("--context-length", str(fit.length), why),
        Setting("--max-running-requests", str(fit.sequences), f"purpose {request.purpose}"),
    ]
    if choice.quantization:
        settings.append(Setting("--quantization", choice.quantization, "16-bit weights do not fit with activations and KV cache"))
    if choice.kv_dtype == "fp8":
        settings.append(Setting("--kv-cache-dtype", "fp8_e4m3", "halves the KV cache"))
    if choice.tensor_parallel > 1:
        settings.append(Setting("--tp-size", str(choice.tensor_parallel), "one GPU does not hold the model"))
    if choice.eager:
        settings.append(Setting("--disable-cuda-graph", None, "starts faster and leaves the memory to the KV cache"))
    return settings
