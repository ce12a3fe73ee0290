"""Which backend to use: an answer with its reasons, from the hardware, the number of users and the purpose.

Figures are this project's own measurements with a 135M model on two cores (README); they rank the engines, they do not
predict a larger model. ``granite-pipeline plan`` says whether a given model fits.
"""

from dataclasses import asdict, dataclass
from typing import Any

from pipeline import engines
from pipeline.errors import InputError
from pipeline.machine.hardware import Hardware

PURPOSES = ("try", "develop", "serve", "batch")
# vLLM's CUDA contexts, graphs and activations take 2-3 GiB beside weights and KV cache
_SMALL_GPU = 8.0
# so many at once, and batching decides; below it, the time to start and the first token do
_FEW_USERS = 4
_SMALL_RAM, _LEAST_RAM = 6.0, 1.5


@dataclass(frozen=True)
class Choice:
    """The backend, the command that serves with it, why, and why not each of the others."""

    backend: str
    command: str
    reasons: tuple[str, ...]
    others: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """For ``choose --json``."""
        return asdict(self)


def recommend(hardware: Hardware, users: int = 1, purpose: str = "serve") -> Choice:
    """The backend for this machine; InputError for an unknown purpose or fewer than one user."""
    if purpose not in PURPOSES:
        raise InputError(f"no purpose {purpose!r}", remedy="use " + ", ".join(PURPOSES))
    if users < 1:
        raise InputError(f"{users} users make no sense", remedy="give 1 or more")
    backend, reasons = _decide(hardware, users, purpose)
    others = {e.name: e.advice(hardware, users) for e in engines.every() if e.name != backend}
    words = {"batch": " --purpose throughput"}.get(purpose, " --purpose latency" if users == 1 and backend == "vllm" else "")
    command, engine = f"granite-pipeline serve {backend}{words}", engines.get(backend)
    if engine.serves == "url":
        command = f"set {engine.prefix}_BASE_URL and {engine.prefix}_MODEL, then LLM_BACKEND={backend}"
    return Choice(backend, command, tuple(reasons), others)


def _decide(hardware: Hardware, users: int, purpose: str) -> tuple[str, list[str]]:
    gpu, many = hardware.accelerator, users > _FEW_USERS or purpose == "batch"
    room = max((g.free_gib for g in hardware.gpus), default=0.0)
    seen = _machine(hardware)
    if hardware.ram_free_gib < _LEAST_RAM and room < _LEAST_RAM:
        return "openai", [seen, "that does not hold even a small Granite beside its server: use one that runs elsewhere"]
    if gpu == "apple":
        return "llamacpp", [seen, "llama.cpp uses the GPU through Metal; vLLM has no Metal build that serves Granite"]
    if gpu in ("nvidia", "amd") and purpose == "try":
        return "llamacpp", [seen, "it starts in seconds and shares the GPU's memory politely, which is what trying needs"]
    if gpu in ("nvidia", "amd") and room < _SMALL_GPU:
        return "llamacpp", [seen, f"{room:.1f} GiB free: vLLM's own 2-3 GiB leave little; llama.cpp may keep layers in RAM"]
    if gpu in ("nvidia", "amd"):
        why = "continuous batching serves many at once" if many else "the merged model is served as trained, without quantisation"
        return "vllm", [seen, why, f"{users} at once, purpose {purpose}"]
    if many and hardware.cpu.fast_bfloat16 and hardware.ram_free_gib >= _SMALL_RAM:
        measured = "measured at 32 concurrent chats: vLLM in bfloat16 533 tokens/s, llama.cpp 128 at 8"
        return "vllm", [seen, f"bfloat16 runs in hardware and {users} ask at once, so batching pays", measured]
    why = "few ask at once: llama.cpp starts in seconds and a Q8_0 model takes half the memory"
    if many:
        why = "without bfloat16 in hardware vLLM computes in float32, where its batching gains little over llama.cpp's Q8_0"
    return "llamacpp", [seen, why, f"{users} at once, purpose {purpose}"]


def _machine(hardware: Hardware) -> str:
    if hardware.gpus:
        cards = ", ".join(f"{g.name} with {g.free_gib:.1f} GiB free" for g in hardware.gpus)
        return f"this machine has {cards}"
    kind = "bfloat16 in hardware" if hardware.cpu.fast_bfloat16 else "no fast bfloat16"
    return f"no GPU; {hardware.cpu.cores} cores ({kind}), {hardware.ram_free_gib:.1f} GiB of RAM available"
