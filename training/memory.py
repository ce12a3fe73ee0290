"""Whether a stage fits the memory, said before it starts, with the setting to lower.

Estimates, on purpose on the low side: a stage that surely does not fit is refused, one that may not is warned about.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from pipeline.errors import OutOfMemory
from pipeline.machine.hardware import Hardware
from pipeline.model.safetensors import read_folder
from pipeline.runs.files import read_json
from training.parameters import FinetuneParameters

log = logging.getLogger(__name__)
GIB = 2**30
_LIBRARIES = 0.6  # GiB that torch and transformers take before any weight
_MERGING = 0.1  # GiB of the rows at work in a merge
_ANSWERING = 0.5  # the same with the tokenizer, and what the matrix products keep
# tokens of prompts that are computed at a time: enough for a CPU's matrix products
PREFILL_TOKENS = 2048
FILLED = 0.85
# values a layer keeps for the backward pass, in multiples of batch x length x hidden, with fused attention
_KEPT_PER_LAYER = 14


@dataclass(frozen=True)
class Need:
    """What a stage needs in GiB, and what it is made of."""

    gib: float
    made_of: str


def finetune_need(base: Path, params: FinetuneParameters, longest: int, *, pieces: bool = False, parts: int = 1) -> Need:
    """Weights, gradients and optimizer, and the activations of one batch of the longest row.

    ``pieces``: each layer is computed again in the backward pass and the loss piece by piece, as unsloth does on a GPU.
    ``parts``: the weights and what belongs to them are divided over so many processes, of which this is for one; a layer's are
    together while it computes.
    """
    config = read_json(base / "config.json")
    weights = sum(t.elements for t in read_folder(base))
    per_weight = {"full": 16.0, "lora": 2.0, "qlora": 0.6}[params.method]  # full: float32 weight, gradient, two moments
    layers, hidden = int(config.get("num_hidden_layers", 0)), int(config.get("hidden_size", 0))
    tokens, layer, logits = params.batch_size * longest, hidden * _KEPT_PER_LAYER * 2, int(config.get("vocab_size", 0)) * 4 * 2
    if pieces:
        kept = layer
    elif params.method == "qlora":  # PEFT's preparation for 4 bits keeps what goes into each layer and computes the rest again
        kept = layers * hidden * 2 + logits
    else:
        kept = layers * layer + logits
    activations = tokens * kept
    together = weights / max(layers, 1) * (4.0 if params.method == "full" else per_weight) if parts > 1 else 0.0
    fixed, moving = (weights * per_weight / parts + together) / GIB, activations / GIB
    return Need(_LIBRARIES + fixed + moving, f"{fixed:.2f} weights and optimizer, {moving:.2f} for {tokens} tokens a batch")


def merge_need() -> Need:
    """A few rows a core: base and adapter are mapped, not read."""
    return Need(_LIBRARIES + _MERGING, f"{_MERGING:.2f} for the rows at work")


def evaluate_need(folder: Path, on_gpu: bool, tokens: int = 1, rows: int = 1, *, mapped: bool = False) -> Need:
    """Answering in float32 on a CPU, float16 on a GPU: weights, keys and values of ``tokens`` in ``rows``, and one pass.

    ``mapped``: the weights stay as they are stored, and the largest module's are converted when they are used.
    """
    config, tensors = read_json(folder / "config.json"), read_folder(folder)
    size = 2 if on_gpu else 4
    weights = sum(t.nbytes if mapped else t.elements * size for t in tensors)
    weights += size * max((t.elements for t in tensors), default=0) if mapped else 0
    hidden, vocabulary = (int(config.get(name) or 0) for name in ("hidden_size", "vocab_size"))
    inner = max(int(config.get(name) or 0) for name in ("intermediate_size", "shared_intermediate_size"))
    passed = min(tokens, PREFILL_TOKENS) * size * (6 * hidden + 3 * inner) + rows * size * 2 * vocabulary
    kept = tokens * kept_bytes(config, size)
    made_of = f"{weights / GIB:.2f} weights, {kept / GIB:.2f} keys and values of {tokens} tokens, {passed / GIB:.2f} for a pass"
    return Need(_ANSWERING + (weights + kept + passed) / GIB, made_of)


def kept_bytes(config: Mapping[str, Any], size: int) -> int:
    """Bytes of keys and values of one token, in a model whose layers all attend to all tokens."""
    layers, hidden, heads = (int(config.get(name) or 0) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    head = int(config.get("head_dim") or 0) or hidden // max(heads, 1)
    types = config.get("layer_types")
    layers = types.count("attention") + types.count("full_attention") if isinstance(types, list) else layers
    return 2 * layers * int(config.get("num_key_value_heads") or heads) * head * size


def gguf_need(base: Path) -> Need:
    """The largest weight in float32: the converter holds one tensor at a time, in float16 and converted."""
    largest = 4 * max((prod(t.shape) for t in read_folder(base)), default=0) / GIB
    return Need(_LIBRARIES + largest, f"{largest:.2f} for the largest weight")


def require_memory(stage: str, need: Need, lower: str, free: float | None = None, where: str = "memory") -> None:
    """Say what a stage needs and what is free; raise OutOfMemory when it cannot fit. ``lower`` is the advice."""
    if free is None:
        machine = Hardware.detect()
        on_gpu = bool(machine.gpus) and stage != "merge"
        free = max(gpu.free_gib for gpu in machine.gpus) if on_gpu else machine.ram_free_gib
        where = "GPU memory" if on_gpu else "memory"
    said = f"{stage} needs about {need.gib:.1f} GiB of {where} ({need.made_of}), {free:.1f} GiB are free"
    if need.gib > free:
        raise OutOfMemory(said, remedy=lower)
    log.log(logging.WARNING if need.gib > FILLED * free else logging.INFO, "%s", said)
