"""Weights summed: base + LoRA, one tensor at a time, as a float16 model folder with the tokenizer and config of the base."""

import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError, PipelineError
from pipeline.model.safetensors import weight_files
from pipeline.prompts.chat import TOOL_USE, ChatTemplate
from pipeline.prompts.stops import repair_folder, special_ids, turn_end
from pipeline.runs.files import read_json, require_free_space, staged, write_atomic, write_json
from training.memory import merge_need, require_memory

log = logging.getLogger(__name__)
SHARD_BYTES = 2**30
_PREFIX = "base_model.model."
_TOKENIZER_JSON = ("tokenizer", "tokenizer_config", "special_tokens_map", "added_tokens", "vocab")
_TOKENIZER_FILES = (*(f"{name}.json" for name in _TOKENIZER_JSON), "merges.txt", "tokenizer.model")


@dataclass(frozen=True)
class Adapter:
    """LoRA pairs by the weight they change: W becomes W + scale * B @ A."""

    pairs: dict[str, tuple[Any, Any]]
    scale: float


def merge_folder(base: Path, adapter: Path, merged: Path, *, full: bool = False) -> dict[str, Any]:
    """Merge a LoRA adapter into a base folder (or, when ``full``, take the fully tuned weights) as float16.

    Tensors are read, merged in float32 and cast one by one, so memory stays near one shard (1 GiB). Raises
    PipelineError when a weight does not fit float16, ModelError when the adapter does not belong to the base.
    """
    weights = adapter if full else base
    shapes = _shapes(weights)
    lora = Adapter({}, 0.0) if full else read_adapter(adapter)
    strange = sorted(set(lora.pairs) - set(shapes))
    if strange:
        raise ModelError(f"the adapter changes {strange[0]}, which the base does not have ({len(strange)} such weights)")
    for name, (a, b) in lora.pairs.items():
        if shapes[name] != (b.shape[0], a.shape[1]):
            wide = f"{b.shape[0]} x {a.shape[1]}, the base's is {' x '.join(map(str, shapes[name]))}"
            raise ModelError(f"the adapter was trained on another base: its {name} is {wide}")
    total = 2 * sum(prod(shape) for shape in shapes.values())
    require_free_space(merged, int(total * 1.02) + 2**24, "the merged FP16 model")
    require_memory("merge", merge_need(weights, SHARD_BYTES), "free some memory: a merge holds one shard at a time already")
    with staged(merged) as target:
        target.mkdir()
        report = _write_shards(merged_weights(weights, lora), _plan_shards(shapes), target)
        save_config(base, target)
        report["tokenizer"] = save_tokenizer(base, target)
    return {**report, "adapted": len(lora.pairs), "tensors": len(shapes), "bytes": total}


def save_tokenizer(base: Path, target: Path) -> dict[str, Any]:
    """Copy the base's tokenizer beside the merged weights; every config then names the token that ends a turn.

    Returns that token and what had to be repaired. Raises ModelError when the template ends a turn with no token of
    the vocabulary, or nothing can serve as padding.
    """
    for name in _TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, target / name)
    template = ChatTemplate.from_folder(base)
    write_atomic(target / "chat_template.jinja", template.source)
    if template.tool_use:
        (target / TOOL_USE).parent.mkdir(exist_ok=True)
        write_atomic(target / TOOL_USE, template.tool_use)
    repaired = repair_folder(target)
    for sentence in repaired:
        log.warning("export: %s", sentence)
    end = turn_end(template, special_ids(target))
    return {"end_token": end.text, "end_token_id": end.id, "chat_template_sha256": template.sha256, "repaired": repaired}


def read_adapter(folder: Path) -> Adapter:
    """Read ``adapter_config.json`` and ``adapter_model.safetensors``; ModelError when a half of a pair is missing."""
    from safetensors.torch import load_file

    config = read_json(folder / "adapter_config.json")
    halves: dict[str, dict[str, Any]] = {}
    for name, tensor in load_file(str(folder / "adapter_model.safetensors")).items():
        module, _, half = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        if half not in ("lora_A", "lora_B"):
            raise ModelError(f"{folder}: {name} is not a LoRA weight this merge knows")
        halves.setdefault(f"{module}.weight", {})[half] = tensor
    broken = [name for name, pair in halves.items() if len(pair) != 2]
    if broken or not halves:
        raise ModelError(f"{folder}: incomplete LoRA pair for {broken[0] if broken else 'every weight'}")
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    return Adapter({name: (pair["lora_A"], pair["lora_B"]) for name, pair in halves.items()}, scale)


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every weight, in the order in which they are merged."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        try:
            with safe_open(str(path), framework="pt") as handle:
                shapes.update({name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} cannot be read: {error}", remedy="fetch or save the model again") from None
    return shapes


def merged_weights(folder: Path, lora: Adapter) -> Iterator[tuple[str, Any]]:
    """Every weight of the folder in float32, with its LoRA delta added."""
    import torch
    from safetensors import safe_open

    for path in weight_files(folder):
        with safe_open(str(path), framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - a safetensors handle is not iterable
                tensor = handle.get_tensor(name)
                if tensor.is_floating_point():
                    tensor = tensor.to(torch.float32)
                if name in lora.pairs:
                    a, b = (half.to(torch.float32) for half in lora.pairs[name])
                    tensor = tensor.addmm(b, a, alpha=lora.scale)
                yield name, tensor


def _plan_shards(shapes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    """Weights grouped in file order into shards of at most about 1 GiB of float16."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = 2 * prod(shape)
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_shards(tensors: Iterator[tuple[str, Any]], shards: list[list[str]], target: Path) -> dict[str, Any]:
    from safetensors.torch import save_file

    largest, lost, total, weight_map = 0.0, 0, 0, {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        shard = {}
        for _ in names:
            name, tensor = next(tensors)
            half, peak, zeroed = _to_float16(name, tensor)
            largest, lost, total = max(largest, peak), lost + zeroed, total + half.numel()
            shard[name] = half
            weight_map[name] = file
        save_file(shard, str(target / file), metadata={"format": "pt"})
        log.info("merge: shard %d of %d written", number, len(shards))
    if len(shards) > 1:
        write_json(target / "model.safetensors.index.json", {"metadata": {"total_size": 2 * total}, "weight_map": weight_map})
    if lost:
        log.warning("merge: %d of %d weights were too small for float16 and became 0", lost, total)
    return {"largest_weight": largest, "underflow_to_zero": lost, "weights": total}


def _to_float16(name: str, tensor: Any) -> tuple[Any, float, int]:
    """The tensor in float16, its largest magnitude, and how many non-zero values became zero."""
    import torch

    if not tensor.is_floating_point():
        return tensor, 0.0, 0
    peak = float(tensor.abs().max()) if tensor.numel() else 0.0
    if not peak <= torch.finfo(torch.float16).max:
        remedy = "a training that diverged needs a lower learning rate; the previous merged folder is untouched"
        raise PipelineError(f"{name} holds {peak:g}, which float16 cannot (largest 65504)", remedy=remedy)
    half = tensor.to(torch.float16).contiguous()
    return half, peak, int(((half == 0) & (tensor != 0)).sum())


def save_config(base: Path, target: Path) -> None:
    """Write the base's config.json as a float16 model's, and generation_config.json, made from it where the base has none."""
    # auto_map points to code; none is ever copied
    gone = ("torch_dtype", "quantization_config", "auto_map")
    config = {name: value for name, value in read_json(base / "config.json").items() if name not in gone}
    write_json(target / "config.json", {**config, "dtype": "float16", "use_cache": True})
    generation = base / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, target / "generation_config.json")
    else:
        ids = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(k) is not None}
        write_json(target / "generation_config.json", ids)
