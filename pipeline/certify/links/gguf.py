"""Link 3, from the files: every GGUF tensor against the merged one, metadata against config, vocabulary against tokenizer."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError
from pipeline.model.gguf import DERIVED, GgufHeader, GgufTensor, gguf_tensors, read_gguf_header
from pipeline.model.safetensors import TensorFolder
from pipeline.prompts.chat import ChatTemplate
from pipeline.prompts.stops import gguf_problems, special_ids, turn_end
from pipeline.report.check import Check, guarded, held
from pipeline.runs.files import read_json

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
# weights that share a step in Q8_0; a control token's kind in a GGUF
_BLOCK = 32
_Q8_SOURCE = "Q8_0's definition: half a step of max|block|/127, plus the float16 rounding of the step"
_CONTROL = 3


def check_gguf(merged: Path, gguf: Path, pre: str | None = None) -> list[Check]:
    """Tensors, metadata, template and vocabulary of a GGUF against the merged folder it was made from.

    ``pre`` is the name of the text splitting rule that the converter gave at export, None where none was recorded.
    """
    header = read_gguf_header(gguf, whole_arrays=True)
    return [
        *guarded("gguf.tensors", lambda: [_tensors(merged, gguf, header)]),
        *guarded("gguf.metadata", lambda: [metadata(merged, header, pre)]),
        *guarded("gguf.template", lambda: [template(merged, header)]),
        *guarded("gguf.vocabulary", lambda: [_vocabulary(merged, header)]),
    ]


def metadata(merged: Path, header: GgufHeader, pre: str | None = None) -> Check:
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


def _tensors(merged: Path, gguf: Path, header: GgufHeader) -> Check:
    config, folder = read_json(merged / "config.json"), TensorFolder(merged)
    stored = {tensor.name: tensor for tensor in header.tensors}
    unknown: list[str] = []
    seen: list[tuple[str, float]] = []
    for name in folder.names:
        parts = gguf_tensors(name, folder.read(name), config)
        if parts is None:
            unknown.append(name)
            continue
        seen += [(one, error_ratio(gguf, stored[one], want) if one in stored else math.inf) for one, want in parts.items()]
    bad = [name for name, ratio in seen if not ratio <= 1]
    derived = DERIVED if rope_type(config) == "llama3" else frozenset()
    extra = sorted(set(stored) - {name for name, _ in seen} - derived)
    lists = {"tensors differ": bad, "GGUF tensors come from no merged tensor": extra}
    lists["merged tensors have no known place in a GGUF"] = unknown
    problems = [f"{len(names)} {what}, first {names[0]}" for what, names in lists.items() if names]
    worst = max(seen, key=lambda pair: pair[1], default=("none", 0.0))
    figure = f"{len(seen) - len(bad)} of {len(seen)} tensors within the bound; largest error {worst[1]:.3g} of it ({worst[0]})"
    errors = [list(pair) for pair in seen]
    return held("gguf.tensors", not problems, "; ".join([figure, *problems]), "1 (every weight)", _Q8_SOURCE, errors=errors)


def error_ratio(gguf: Path, stored: GgufTensor, want: Any) -> float:
    """Largest error of a stored tensor as a share of what its type allows at that place; infinite for another size."""
    import numpy as np

    got = read_gguf_tensor(gguf, stored)
    want = np.ascontiguousarray(want, dtype=np.float32).reshape(-1)
    if got.size != want.size:
        return math.inf
    error, size = np.abs(got - want), np.abs(want)
    if stored.type == "Q8_0":
        error = error.reshape(-1, _BLOCK)
        allowed = size.reshape(-1, _BLOCK).max(axis=1, keepdims=True) * (1 / 254 + 2.0**-11) + 127 * 2.0**-25
    else:
        # the converter takes the exponential of a state-space decay in the merged weights' own float16
        digits = 11 if stored.type == "F16" or stored.name.endswith("ssm_a") else 8 if stored.type == "BF16" else 21
        allowed = size * 2.0**-digits + 2.0**-60
    ratio = float((error / allowed).max(initial=0.0))
    return ratio if math.isfinite(ratio) else math.inf


def read_gguf_tensor(gguf: Path, tensor: GgufTensor) -> Any:
    """A tensor's values as a flat float32 array, dequantised; ModelError for a type that this product does not write."""
    import numpy as np

    raw = np.fromfile(gguf, dtype=np.uint8, count=tensor.nbytes, offset=tensor.offset)
    if tensor.type == "Q8_0":  # per block of 32: a float16 step, then 32 signed bytes
        blocks = raw.reshape(-1, 2 + _BLOCK)
        steps = blocks[:, :2].copy().view("<f2").astype(np.float32)
        return (steps * blocks[:, 2:].view(np.int8)).reshape(-1)
    if tensor.type == "BF16":
        return (raw.view("<u2").astype("<u4") << 16).view("<f4")
    if tensor.type not in ("F32", "F16"):
        raise ModelError(f"{gguf}: {tensor.name} is {tensor.type}; the certificate knows Q8_0, F16, BF16 and F32")
    return raw.view("<f4" if tensor.type == "F32" else "<f2").astype(np.float32)


def template(merged: Path, header: GgufHeader) -> Check:
    """The chat template inside the GGUF is the merged folder's."""
    ours, theirs = ChatTemplate.from_folder(merged).source, str(header.metadata.get("tokenizer.chat_template") or "")
    # converters may drop line ends at the very end of the file; jinja drops the first of them too
    same = ours.rstrip("\n") == theirs.rstrip("\n")
    figure = "equal" if same else _where(ours, theirs)
    return held("gguf.template", same, figure, "equal to merged_fp16's", "definition")


def _where(ours: str, theirs: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return f"differs at character {at}: merged {ours[at : at + 30]!r}, GGUF {theirs[at : at + 30]!r}"


def _vocabulary(merged: Path, header: GgufHeader) -> Check:
    tokens, merges, kinds = (header.metadata.get(f"tokenizer.ggml.{name}") for name in ("tokens", "merges", "token_type"))
    problems = vocabulary_problems(read_json(merged / "tokenizer.json"), tokens or [], merges, kinds)
    figure = "; ".join(problems) or f"{len(tokens or [])} tokens and {len(merges or [])} merges equal"
    return held("gguf.vocabulary", not problems, figure, "equal to tokenizer.json", "definition")


def vocabulary_problems(
    tokenizer: Mapping[str, Any], tokens: Sequence[str], merges: Sequence[str] | None, kinds: Sequence[int] | None
) -> list[str]:
    """How a GGUF's token list, merges and token kinds differ from a tokenizer.json."""
    model, added = tokenizer["model"], tokenizer.get("added_tokens") or []
    wanted = {int(i): token for token, i in model["vocab"].items()} | {int(t["id"]): t["content"] for t in added}
    wrong = [i for i, token in wanted.items() if i >= len(tokens) or tokens[i] != token]
    problems = [f"{len(wrong)} tokens differ, first id {min(wrong)} ({wanted[min(wrong)]!r})"] if wrong else []
    ours = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or []]
    if merges is not None and list(merges) != ours:
        at = [i for i, (a, b) in enumerate(zip(ours, merges, strict=False)) if a != b]
        problems.append(
            f"{len(at)} merges differ, first number {at[0]}" if at else f"{len(merges)} merges instead of {len(ours)}"
        )
    plain = [t["content"] for t in added if t.get("special") and kinds is not None and kinds[int(t["id"])] != _CONTROL]
    return problems + ([f"{plain[0]!r} is no control token in the GGUF"] if plain else [])
