"""Weights summed: base + LoRA, a few rows at a time, as a float16 model folder with the tokenizer and config of the base.

The base may be an adapter itself: what that was trained on, and the sum of both.
"""

import logging
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from math import prod
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError, PipelineError
from pipeline.machine.hardware import usable_cores
from pipeline.model.safetensors import INDEX, SINGLE, file_header, read_header, weight_files
from pipeline.prompts.chat import TOOL_USE, ChatTemplate
from pipeline.prompts.stops import repair_folder, special_ids, turn_end
from pipeline.runs import lock
from pipeline.runs.files import read_json, read_object, require_free_space, staged, write_atomic, write_json
from pipeline.runs.folder import cached
from pipeline.runs.hashes import sha256_json, sha256_tree
from training.memory import merge_need, require_memory

log = logging.getLogger(__name__)
_SUM_RECIPE = 1
SHARD_BYTES = 2**30
# weights that are summed and cast at a time: a float32 piece of 2 MB stays in a core's cache
_PIECE = 2**19
_THREADS = 8
_HALF_MAX = 65504.0
_WEIGHTS = "adapter_model.safetensors"
# settings of PEFT that, when used, make an adapter more than W + scale * B @ A
_MORE: tuple[str, ...] = (
    "use_dora",
    "fan_in_fan_out",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
_MORE += ("modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters", "alora_invocation_tokens")
_MORE += ("rank_pattern", "alpha_pattern", "bias", "arrow_config", "loftq_config", "megatron_config")
_UNUSED: tuple[object, ...] = (None, False, "none", [], {})
# ways to begin that leave the base's weights as they are; pissa and the like change them
_KEEPS_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
_Stored = tuple[str, tuple[int, ...]]
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

    A few rows at a time are summed in float32, cast and written, on every core; the base's files are mapped, so that memory
    holds little more than the adapter. The outcome does not depend on the number of cores. Raises PipelineError when a
    weight does not fit float16, ModelError when the adapter does not belong to the base.
    """
    weights = adapter if full else base
    stored = _read(weights)
    lora = Adapter({}, 0.0) if full else read_adapter(adapter)
    strange = sorted(set(lora.pairs) - set(stored))
    if strange:
        raise ModelError(f"the adapter changes {strange[0]}, which the base does not have ({len(strange)} such weights)")
    for name, (a, b) in lora.pairs.items():
        if (shape := stored[name][1]) != (b.shape[0], a.shape[1]):
            wide = f"{b.shape[0]} x {a.shape[1]}, the base's is {' x '.join(map(str, shape))}"
            raise ModelError(f"the adapter was trained on another base: its {name} is {wide}")
    total = 2 * sum(prod(shape) for _, shape in stored.values())
    require_free_space(merged, int(total * 1.02) + 2**24, "the merged FP16 model")
    require_memory("merge", merge_need(), "free some memory: a merge holds a few rows at a time already")
    with staged(merged) as target:
        target.mkdir()
        report = _write_shards(_weights(weights), lora, stored, target)
        save_config(base, target)
        report["tokenizer"] = save_tokenizer(base, target)
    return {**report, "adapted": len(lora.pairs), "tensors": len(stored), "bytes": total}


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


def _read(folder: Path) -> dict[str, _Stored]:
    """Dtype as it will be written and shape of every weight, in the order in which they are merged."""
    from safetensors import SafetensorError, safe_open

    stored: dict[str, _Stored] = {}
    for path in weight_files(folder):
        try:
            with safe_open(str(path), framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - a safetensors handle is not iterable
                    part = handle.get_slice(name)
                    kind = part.get_dtype()
                    stored[name] = "F16" if "F" in kind else kind, tuple(part.get_shape())
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} cannot be read: {error}", remedy="fetch or save the model again") from None
    return stored


def merged_weights(folder: Path, lora: Adapter) -> Iterator[tuple[str, Any]]:
    """Every weight of the folder in float32, with its LoRA delta added."""
    import torch

    for name, tensor in _weights(folder):
        summed = tensor.to(torch.float32) if tensor.is_floating_point() else tensor
        if name in lora.pairs:
            a, b = (half.to(torch.float32) for half in lora.pairs[name])
            summed = summed.addmm(b, a, alpha=lora.scale)
        yield name, summed


def _weights(folder: Path) -> Iterator[tuple[str, Any]]:
    """Every weight as it is stored, mapped from its file."""
    from safetensors import safe_open

    for path in weight_files(folder):
        with safe_open(str(path), framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                yield name, handle.get_tensor(name)


def _plan_shards(stored: dict[str, _Stored]) -> list[list[str]]:
    """Weights grouped in file order into shards of at most about 1 GiB of float16."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, (_, shape) in stored.items():
        size = 2 * prod(shape)
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_shards(tensors: Iterator[tuple[str, Any]], lora: Adapter, stored: dict[str, _Stored], target: Path) -> dict[str, Any]:
    """Sum, cast and write every weight, some rows at a time on every core; what was lost on the way."""
    shards = _plan_shards(stored)
    largest, lost, total, weight_map = 0.0, 0, 0, {}
    with _workers() as pool:
        for number, names in enumerate(shards, 1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            header, places = file_header({name: stored[name] for name in names})
            with (target / file).open("wb") as out:
                out.write(header)
                out.flush()
                for _ in names:
                    name, tensor = next(tensors)
                    peak, zeroed = _write_weight(pool, out.fileno(), places[name], tensor, lora, name)
                    largest, lost, total = max(largest, peak), lost + zeroed, total + tensor.numel()
                    weight_map[name] = file
            log.info("merge: shard %d of %d written", number, len(shards))
    if len(shards) > 1:
        write_json(target / INDEX, {"metadata": {"total_size": 2 * total}, "weight_map": weight_map})
    if lost:
        log.warning("merge: %d of %d weights were too small for float16 and became 0", lost, total)
    return {"largest_weight": largest, "underflow_to_zero": lost, "weights": total}


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """A thread a core; inside, torch starts none of its own."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(_THREADS, usable_cores())) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _write_weight(pool: ThreadPoolExecutor, file: int, place: int, tensor: Any, lora: Adapter, name: str) -> tuple[float, int]:
    """Write one weight at its place in an open file; its largest magnitude, and how many non-zero values became zero.

    Raises PipelineError when a value does not fit float16.
    """
    if name in lora.pairs:
        a, b = (half.float() for half in lora.pairs[name])
        rows = max(1, _PIECE // tensor.shape[1])
        deltas: Iterable[Any] = ((piece, a, lora.scale) for piece in b.split(rows))
        pieces = tensor.split(rows)
    else:
        deltas, pieces = repeat(None), tensor.reshape(-1).split(_PIECE)
    width = 2 if tensor.is_floating_point() else tensor.element_size()
    places = [place]
    for piece in pieces:
        places.append(places[-1] + width * piece.numel())
    done = list(pool.map(_write_piece, repeat(file), places, pieces, deltas))
    bad = [peak for peak, _ in done if not peak <= _HALF_MAX]
    if bad:
        remedy = "a training that diverged needs a lower learning rate; the previous merged folder is untouched"
        worst = next((peak for peak in bad if math.isnan(peak)), max(bad))
        raise PipelineError(f"{name} holds {worst:g}, which float16 cannot (largest 65504)", remedy=remedy)
    return max((peak for peak, _ in done), default=0.0), sum(zeroed for _, zeroed in done)


def _write_piece(file: int, place: int, piece: Any, delta: tuple[Any, Any, float] | None) -> tuple[float, int]:
    """Sum, cast and write some rows; their largest magnitude (NaN if one is), and how many values became zero."""
    import torch

    half, peak, zeroed = piece.contiguous(), 0.0, 0
    if piece.is_floating_point() and piece.numel():
        exact = half
        if delta or piece.dtype != torch.float16:
            exact = piece.float()
            if delta:
                b, a, scale = delta
                exact = exact.addmm(b, a, alpha=scale)
            half = exact.to(torch.float16)
            zeroed = _count(exact, torch.int32) - _count(half, torch.int16)
        low, high = exact.aminmax()
        peak = max(-low.item(), high.item())
    data = memoryview(half.numpy()).cast("B")
    while data:
        written = os.pwrite(file, data, place)
        data, place = data[written:], place + written
    return peak, zeroed


def _count(tensor: Any, bits: Any) -> int:
    """Values that are not zero, counted as integers without their sign: that is several times as fast."""
    import numpy as np

    return int(np.count_nonzero(tensor.contiguous().view(bits).numpy() << 1))


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


@dataclass(frozen=True)
class Wanted:
    """The base an adapter names: a hub id or folder, and its revision (None when none is named)."""

    base: str
    revision: str | None

    @property
    def name(self) -> str:
        """The id, or the last part of a folder's path, and the revision."""
        return str(Wanted(Path(self.base).name if Path(self.base).is_absolute() else self.base, self.revision))

    def __str__(self) -> str:
        return f"{self.base} at revision {self.revision}" if self.revision else self.base


def read_wanted(folder: Path) -> Wanted:
    """What the adapter was trained on; ModelError when it does not say, or is no plain LoRA that can be merged."""
    config = read_object(folder / "adapter_config.json")
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base:
        what = f"{folder} holds only an adapter, and its adapter_config.json names no base_model_name_or_path"
        raise ModelError(what, remedy="merge the adapter into the model it was trained on, and give that folder as --base")
    wanted = Wanted(base, str(revision) if revision else None)
    strange = [key for key in _MORE if config.get(key) not in _UNUSED]
    strange += ["peft_type"] * (config.get("peft_type", "LORA") != "LORA")
    strange += ["init_lora_weights"] * (config.get("init_lora_weights") not in _KEEPS_BASE)
    strange += [key for key in ("r", "lora_alpha") if not isinstance(config.get(key), int | float) or not config[key] > 0]
    if strange:
        shown = f"{strange[0]}={config.get(strange[0])!r}"
        raise refused(folder, wanted, f"it has {shown}, and only plain LoRA can be merged here", base=False)
    if not (folder / _WEIGHTS).is_file():
        raise refused(folder, wanted, f"it has no {_WEIGHTS}", base=False)
    read_header(folder / _WEIGHTS)
    return wanted


def refused(folder: Path, wanted: Wanted, why: str, *, base: bool = True) -> ModelError:
    """The error for an adapter that cannot be trained on: because of ``base`` or, when false, of the adapter itself."""
    problem = f"which cannot be had: {why}" if base else f"and it cannot be merged onto it: {why}"
    what = f"{folder} holds only an adapter, trained on {wanted}, {problem}"
    return ModelError(what, remedy=f"train on {wanted.base}, or merge the adapter first and give the merged folder as --base")


def summed(adapter: Path, base: Path, base_sha256: str, cache: Path) -> Path:
    """Base + adapter as a float16 model folder in the cache, made when it is not there yet; its path."""
    files = {name: sha256_tree(adapter / name) for name in ("adapter_config.json", _WEIGHTS)}
    target = cached(cache, f"summed-{sha256_json([_SUM_RECIPE, base_sha256, files])[:16]}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with lock.guarded(target.parent):
        if not target.is_dir():
            merge_folder(base, adapter, target)
    return target
