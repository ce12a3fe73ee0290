"""Which GGUF tensors a Granite checkpoint's tensors become, and how they are laid out there.

Written from the two formats (transformers' modeling files; llama.cpp's src/llama-arch.cpp and src/models/granite*.cpp),
not from the converter, so that the converter's own mistakes are seen.
"""

import re
from collections.abc import Mapping
from typing import Any

_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_PLAIN = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    **{f"self_attn.{letter}_proj.{kind}": f"attn_{letter}.{kind}" for letter in "qkv" for kind in ("weight", "bias")},
    **{f"self_attn.o_proj.{kind}": f"attn_output.{kind}" for kind in ("weight", "bias")},
    **{f"mlp.{part}_proj.{kind}": f"ffn_{part}.{kind}" for part in ("gate", "up", "down") for kind in ("weight", "bias")},
    "block_sparse_moe.output_linear.weight": "ffn_down_exps.weight",
    "block_sparse_moe.router.layer.weight": "ffn_gate_inp.weight",
    "mamba.A_log": "ssm_a",
    "mamba.D": "ssm_d",
    "mamba.dt_bias": "ssm_dt.bias",
    "mamba.conv1d.weight": "ssm_conv1d.weight",
    "mamba.conv1d.bias": "ssm_conv1d.bias",
    "mamba.in_proj.weight": "ssm_in.weight",
    "mamba.out_proj.weight": "ssm_out.weight",
    "mamba.norm.weight": "ssm_norm.weight",
}
_WHOLE_BACK, _PLAIN_BACK = ({theirs: ours for ours, theirs in names.items()} for names in (_WHOLE, _PLAIN))
# GGUF tensors that hold constants of the configuration (llama3's rope scaling), not trained weights
DERIVED = frozenset({"rope_freqs.weight"})


def gguf_tensors(name: str, tensor: Any, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The GGUF tensors made of one checkpoint tensor, each with its values; None for a name that is not known."""
    if name in _WHOLE:
        return {_WHOLE[name]: tensor}
    found = _LAYER.fullmatch(name)
    if found is None:
        return None
    prefix, part = f"blk.{found[1]}.", found[2]
    experts = bool(config.get("num_local_experts"))
    if part in ("block_sparse_moe.input_linear.weight", "shared_mlp.input_linear.weight"):
        # gate and up lie one above the other in the checkpoint
        kind = "exps" if part.startswith("block") else "shexp"
        tail = f"_{kind}.weight" if experts else ".weight"
        half = tensor.shape[-2] // 2
        return {f"{prefix}ffn_gate{tail}": tensor[..., :half, :], f"{prefix}ffn_up{tail}": tensor[..., half:, :]}
    if part == "shared_mlp.output_linear.weight":
        return {f"{prefix}ffn_down{'_shexp' if experts else ''}.weight": tensor}
    if part not in _PLAIN:
        return None
    return {prefix + _PLAIN[part]: _layout(part, tensor, config)}


def checkpoint_tensor(name: str, tensor: Any, config: Mapping[str, Any]) -> tuple[str, Any]:
    """The way back for a dense model: the checkpoint's name and layout of one GGUF tensor; KeyError for a name not known."""
    if name in _WHOLE_BACK:
        return _WHOLE_BACK[name], tensor
    _, layer, part = name.split(".", 2)
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(part.partition(".")[0])
    if heads:
        count = int(config[heads])
        tensor = tensor.reshape(count, tensor.shape[0] // count // 2, 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
    return f"model.layers.{layer}.{_PLAIN_BACK[part]}", tensor


def _layout(part: str, tensor: Any, config: Mapping[str, Any]) -> Any:
    if part.startswith("self_attn.q_proj"):
        return _interleaved(tensor, int(config["num_attention_heads"]))
    if part.startswith("self_attn.k_proj"):
        return _interleaved(tensor, int(config["num_key_value_heads"]))
    return _decay(tensor) if part == "mamba.A_log" else tensor


def _interleaved(tensor: Any, heads: int) -> Any:
    """Rows of each head from transformers' two halves (x0..xn, y0..yn) to llama.cpp's pairs (x0, y0, x1, y1, ...)."""
    return tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def _decay(tensor: Any) -> Any:
    import numpy as np

    return -np.exp(tensor)
