"""GGUF quantisations a plan may recommend, best quality first, with their bits per weight."""

from __future__ import annotations

from pipeline.gpus import GIB
from pipeline.model import Model

# bits per weight over a whole dense model; source: llama.cpp tools/quantize/README.md (8B figures); Q8_0 is exact (34/32 bytes)
BITS = {"Q8_0": 8.5, "Q6_K": 6.56, "Q5_K_M": 5.70, "Q4_K_M": 4.89}


def gguf_gib(model: Model, kind: str = "Q8_0") -> float:
    """GiB of weights of this model as a GGUF of that type; a GGUF on disk keeps its own size."""
    if model.format == "gguf":
        return model.weight_bytes / GIB
    return model.parameters * BITS[kind] / 8 / GIB
