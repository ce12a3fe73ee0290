"""GGUF: a file's metadata and tensor list from its header alone, and which tensors there a Granite checkpoint's become.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md - little-endian, versions 2 and 3.
Long arrays (the vocabulary, its scores and merges) are skipped; their length is kept instead. Names and layouts are written from
the two formats (transformers' modeling files; llama.cpp's src/llama-arch.cpp and src/models/granite*.cpp), not from the converter,
so that the converter's own mistakes are seen.
"""

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import ModelError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_KEPT_ARRAY = 4096
_LONGEST_STRING = 1 << 24
_LARGEST_HEADER = 1 << 28  # a vocabulary of 256k entries takes about 10 MB
_DEEPEST_ARRAY = 8
_PIECE = 1 << 22
# ggml type id -> (name, elements per block, bytes per block) of the types that files hold; source: ggml-common.h
_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 39: ("MXFP4", 32, 17),
}  # fmt: skip
# a Granite checkpoint's tensors -> GGUF's
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


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its ggml type name ("Q8_0"), shape (ggml order, fastest axis first), bytes and place in the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int = field(default=0, compare=False)


@dataclass(frozen=True)
class GgufHeader:
    """Metadata (arrays longer than 4096 items are replaced by their length, as int) and the tensor list."""

    version: int
    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]

    @property
    def architecture(self) -> str:
        """``general.architecture``, such as "granite" or "granitehybrid"."""
        return str(self.metadata["general.architecture"])

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value of this architecture, e.g. ``get("block_count")`` for ``granite.block_count``."""
        return self.metadata.get(f"{self.architecture}.{key}", default)


def read_gguf_header(path: Path, *, whole_arrays: bool = False) -> GgufHeader:
    """Read a header; raises ModelError when the file is no GGUF, is cut short, or lacks its architecture.

    ``whole_arrays`` keeps long arrays (the vocabulary and its merges) too.
    """
    longest = 1 << 40 if whole_arrays else _KEPT_ARRAY
    size = path.stat().st_size
    with path.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise _broken(path, "it does not start with the letters GGUF")
        try:
            version, count, pairs = _numbers(handle, "IQQ")
            if version not in (2, 3):
                raise ValueError(f"version {version} is not 2 or 3")
            # a pair takes at least 13 bytes, a tensor 24: an absurd count is told before anything is read
            if 13 * pairs + 24 * count > size:
                raise ValueError(f"{pairs} metadata pairs and {count} tensors do not fit a file of {size} bytes")
            metadata = {_string(handle): _value(handle, _numbers(handle, "I")[0], longest) for _ in range(pairs)}
            tensors, end = _tensor_list(handle, count)
            alignment = metadata.get("general.alignment", 32)
            if not isinstance(alignment, int) or isinstance(alignment, bool) or alignment <= 0:
                raise ValueError(f"general.alignment is {alignment!r}")
        except (EOFError, ValueError, OverflowError, OSError, struct.error) as error:
            raise _broken(path, str(error) or "the header is cut short") from None
        data = -(-handle.tell() // alignment) * alignment
    if "general.architecture" not in metadata:
        raise _broken(path, "general.architecture is missing")
    if tensors and data + end > size:
        raise _broken(path, f"the tensors need {data + end} bytes, the file has {size}")
    return GgufHeader(version, metadata, tuple(replace(tensor, offset=data + tensor.offset) for tensor in tensors))


@dataclass(frozen=True)
class GgufComparison:
    """How many tensors and metadata values of one file another holds too, of how many; ``problems``: the first that differ."""

    tensors: tuple[int, int]
    values: tuple[int, int]
    problems: tuple[str, ...] = ()


def compare_gguf(ours: Path, theirs: Path) -> GgufComparison:
    """Compare two GGUF files tensor by tensor (type, shape, bytes) and value by value; their order may differ.

    Raises ModelError when one is no GGUF, OSError when one cannot be read.
    """
    left, right = (read_gguf_header(path, whole_arrays=True) for path in (ours, theirs))
    known = {tensor.name: tensor for tensor in right.tensors}
    with ours.open("rb") as our_file, theirs.open("rb") as their_file:
        moved = [
            one.name
            for one in left.tensors
            if one != (other := known.get(one.name)) or not _same(our_file, one, their_file, other)
        ]
    names = {tensor.name for tensor in left.tensors}
    changed = [key for key, value in left.metadata.items() if key not in right.metadata or right.metadata[key] != value]
    lists = {"tensors differ": moved, "tensors are new": [name for name in known if name not in names], "values differ": changed}
    lists["values are new"] = [key for key in right.metadata if key not in left.metadata]
    problems = tuple(f"{len(found)} {what}, first {found[0]}" for what, found in lists.items() if found)
    tensors, values = len(left.tensors), len(left.metadata)
    return GgufComparison((tensors - len(moved), tensors), (values - len(changed), values), problems)


def _same(ours: BinaryIO, one: GgufTensor, theirs: BinaryIO, other: GgufTensor) -> bool:
    """Whether two tensors have the same bytes, a few MB in memory at a time."""
    ours.seek(one.offset)
    theirs.seek(other.offset)
    left = one.nbytes
    while left:
        size = min(left, _PIECE)
        if ours.read(size) != theirs.read(size):
            return False
        left -= size
    return True


def _tensor_list(handle: BinaryIO, count: int) -> tuple[tuple[GgufTensor, ...], int]:
    tensors, end = [], 0
    for _ in range(count):
        name = _string(handle)
        [axes] = _numbers(handle, "I")
        if axes > 8:
            raise ValueError(f"tensor {name!r} has {axes} axes")
        shape = _numbers(handle, f"{axes}Q")
        kind, offset = _numbers(handle, "IQ")
        if kind not in _TYPES:
            raise ValueError(f"tensor {name!r} has the unknown type {kind}")
        label, block, block_bytes = _TYPES[kind]
        nbytes = prod(shape) // block * block_bytes
        tensors.append(GgufTensor(name, label, shape, nbytes, offset))
        end = max(end, offset + nbytes)
    return tuple(tensors), end


def _value(handle: BinaryIO, kind: int, longest: int, depth: int = 0) -> Any:
    if kind == _STRING:
        return _string(handle)
    if kind == _ARRAY:
        if depth > _DEEPEST_ARRAY:
            raise ValueError(f"arrays nested more than {_DEEPEST_ARRAY} deep")
        item, length = _numbers(handle, "IQ")
        if length <= longest:
            return [_value(handle, item, longest, depth + 1) for _ in range(length)]
        return _skipped(handle, item, length)
    return _numbers(handle, _code(kind))[0]


def _skipped(handle: BinaryIO, item: int, length: int) -> int:
    if item == _STRING:
        for _ in range(length):
            handle.seek(_numbers(handle, "Q")[0], 1)
    else:
        handle.seek(length * struct.calcsize(_code(item)), 1)
    return int(length)


def _code(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"the unknown value type {kind}")
    return _SCALARS[kind]


def _string(handle: BinaryIO) -> str:
    [length] = _numbers(handle, "Q")
    if length > _LONGEST_STRING:
        raise ValueError(f"a string of {length} bytes")
    if handle.tell() > _LARGEST_HEADER:
        raise ValueError(f"a header of more than {_LARGEST_HEADER >> 20} MiB")
    return _exactly(handle, length).decode("utf-8", errors="replace")


def _numbers(handle: BinaryIO, codes: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{codes}", _exactly(handle, struct.calcsize(f"<{codes}")))


def _exactly(handle: BinaryIO, count: int) -> bytes:
    data = handle.read(count)
    if len(data) != count:
        raise EOFError("the header is cut short")
    return data


def _broken(path: Path, why: str) -> ModelError:
    return ModelError(f"{path} is not a whole GGUF file: {why}", remedy="copy or export it again (granite-pipeline export)")


def gguf_tensors(name: str, tensor: Any, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The GGUF tensors made of one checkpoint tensor, each with its values; None for a name that is not known."""
    if name in _WHOLE:
        return {_WHOLE[name]: tensor}
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return None
    prefix, part = f"blk.{layer[1]}.", layer[2]
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
    if part == "mamba.A_log":
        import numpy as np

        return -np.exp(tensor)
    return tensor


def _interleaved(tensor: Any, heads: int) -> Any:
    """Rows of each head from transformers' two halves (x0..xn, y0..yn) to llama.cpp's pairs (x0, y0, x1, y1, ...)."""
    return tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
