"""Link 3, the numbers: sizes, multipliers, positions, end and text splitting of a GGUF against config.json.

Which key means what: llama.cpp's src/llama-model.cpp and src/models/granite*.cpp (a key that is absent gets llama.cpp's default).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.certify.finding import Finding, held
from pipeline.chat import ChatTemplate
from pipeline.errors import ModelError
from pipeline.files import read_json
from pipeline.gguf_header import GgufHeader
from pipeline.stops import gguf_problems, special_ids, turn_end

# config.json key -> GGUF key; both hold the same number
_NUMBERS = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
    "vocab_size": "vocab_size",
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
}
# rope_parameters key -> GGUF key, for the scalings that the converter writes as metadata
_SCALING = {
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "extrapolation_factor": "rope.scaling.yarn_ext_factor",
    "attention_factor": "rope.scaling.yarn_attn_factor",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}
_SCALED = {"linear": ("factor",), "yarn": tuple(_SCALING)}
# llama.cpp derives these from the head size when they are absent
_HEAD = ("rope.dimension_count", "attention.key_length", "attention.value_length")


def metadata(merged: Path, header: GgufHeader, pre: str | None = None) -> Finding:
    """Sizes, multipliers, context, positions, text splitting and end token of the GGUF are the merged folder's."""
    config = read_json(merged / "config.json")
    numbers = dict(_numbers(config))
    problems = [text for theirs, want in numbers.items() if (text := _difference(header, theirs, want, config))]
    problems += [*_head_problems(header, config), *_rope_problems(header, config)]
    known = header.metadata.get("tokenizer.ggml.pre")
    if pre is not None and known != pre:
        problems.append(f"tokenizer.ggml.pre is {known}, the converter gave {pre}")
    try:
        problems += _token_problems(merged, header, config)
    except ModelError as error:
        problems.append(error.message)
    figure = "; ".join(problems) or f"{len(numbers)} numbers, positions and the end token equal"
    return held("gguf.metadata", not problems, figure, "equal to config.json", "definition")


def rope_type(config: Mapping[str, Any]) -> str:
    """How positions are scaled: ``default``, ``linear``, ``yarn``, ``llama3``, as config.json says."""
    rope = _rope(config)
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return found


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """GGUF keys with the number each must hold."""
    experts = bool(config.get("num_local_experts"))
    for key, theirs in _NUMBERS.items():
        if config.get(key) is not None and (experts or not theirs.startswith("expert")):
            yield theirs, config[key]
    theta = _rope(config).get("rope_theta", config.get("rope_theta"))
    if theta and not _endless(config):
        yield "rope.freq_base", theta


def _endless(config: Mapping[str, Any]) -> bool:
    """A state-space model without positions: it has no longest context, and its rope numbers are not used."""
    return config.get("position_embedding_type") == "nope"


def _difference(header: GgufHeader, theirs: str, want: float, config: Mapping[str, Any]) -> str | None:
    known = header.get(theirs)
    if known is None:  # the converter leaves a 0 out
        return f"{header.architecture}.{theirs} is missing, config.json has {_shown(want)}" if want else None
    # the converter then writes 2**20 as context
    if _same(want, known) or (theirs == "context_length" and known == 1 << 20 and _endless(config)):
        return None
    return f"{header.architecture}.{theirs} is {_shown(known)}, config.json has {_shown(want)}"


def _head_problems(header: GgufHeader, config: Mapping[str, Any]) -> Iterator[str]:
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    for theirs in _HEAD:
        known = header.get(theirs)
        if known is not None and not _same(size, known):
            yield f"{header.architecture}.{theirs} is {_shown(known)}, a head has {size}"


def _rope_problems(header: GgufHeader, config: Mapping[str, Any]) -> Iterator[str]:
    rotated, rope, kind = header.get("rope.scaling.finetuned", True), _rope(config), rope_type(config)
    if bool(rotated) == _endless(config):  # Granite's switch for positions in llama.cpp, on by default
        yield f"{header.architecture}.rope.scaling.finetuned is {rotated}, position_embedding_type is {config.get('position_embedding_type')}"
    want = {_SCALING[key]: rope[key] for key in _SCALED.get(kind, ()) if rope.get(key) is not None}
    want |= {"rope.scaling.type": kind} if kind in _SCALED else {}
    prefix = f"{header.architecture}."
    seen = {key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(f"{prefix}rope.scaling.")}
    seen.pop("rope.scaling.finetuned", None)
    if seen.get("rope.scaling.type") == "none":
        seen.pop("rope.scaling.type")
    for key in sorted(set(want) | set(seen)):
        ours, theirs = want.get(key), seen.get(key)
        same = ours == theirs if None in (ours, theirs) or isinstance(ours, str) else _same(ours, theirs)
        if not same:
            yield f"{prefix}{key} is {theirs}, config.json has {ours}"


def _token_problems(merged: Path, header: GgufHeader, config: Mapping[str, Any]) -> list[str]:
    vocabulary = special_ids(merged)
    problems = gguf_problems(header.metadata, turn_end(ChatTemplate.from_folder(merged), vocabulary))
    template = merged / "tokenizer_config.json"
    named = read_json(template).get("bos_token") if template.is_file() else None
    text = named["content"] if isinstance(named, Mapping) else named
    known, right = header.metadata.get("tokenizer.ggml.bos_token_id"), {vocabulary.get(str(text)), config.get("bos_token_id")}
    if known is not None and right != {None} and known not in right:
        problems.append(f"tokenizer.ggml.bos_token_id is {known}, the merged folder's is {config.get('bos_token_id')}")
    return problems


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, list):  # one entry a layer: 0 where a layer has no attention
        return all(_same(ours, item) for item in theirs if item)
    return abs(float(ours) - float(theirs)) <= 1e-6 * abs(float(ours))


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
