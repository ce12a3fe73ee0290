"""Read what a safetensors file holds from its header alone: names, dtypes, shapes, bytes (no torch, no weights read).

Format: 8 bytes little-endian header length, a JSON object of that length, then the data
(https://huggingface.co/docs/safetensors/index#format).
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError
from pipeline.runs.files import read_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# The reference implementation refuses longer headers too; it keeps a hostile file from filling the memory.
_MAX_HEADER = 100_000_000
# bits per element of the dtypes that the format names
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
# as numpy reads them; bfloat16 comes as its bits
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_NUMPY |= {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?"}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint: dtype as the format writes it ("F16", "BF16", "F32", ...), shape, bytes and place on disk."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int = field(default=0, compare=False)

    @property
    def elements(self) -> int:
        """Number of stored elements (of a packed quantised tensor: packed words)."""
        return prod(self.shape)


def read_header(path: Path) -> list[TensorInfo]:
    """Tensors of one file; raises ModelError when it is truncated, not safetensors, or its sizes contradict themselves."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        prefix = handle.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise _broken(path, f"the header length {length} does not fit a file of {size} bytes")
        try:
            header = json.loads(handle.read(length))
        except (ValueError, RecursionError) as error:
            raise _broken(path, f"the header is not JSON ({error})") from None
    try:
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        tensors, end = [_tensor(name, entry, 8 + length) for name, entry in entries.items()], 0
        for begin, stop in sorted(entry["data_offsets"] for entry in entries.values()):
            if begin < end and stop > begin:
                raise ValueError(f"two tensors share the bytes from {begin}")
            end = max(end, stop)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise _broken(path, f"a header entry is malformed ({error!r})") from None
    if 8 + length + end > size:
        raise _broken(path, f"the tensors need {8 + length + end} bytes, the file has {size}")
    return tensors


def file_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """What a file of these tensors (dtype and shape by name) begins with, and at which byte each one's data begins.

    Laid out as the reference implementation does it: wide types first, then by name.
    """
    entries, end = dict[str, Any](), 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda one: (-_BITS[one[1][0]], one[0])):
        begin, end = end, end + prod(shape) * _BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, {name: 8 + len(text) + one["data_offsets"][0] for name, one in entries.items()}


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model folder's weights: the shards its index names, else ``model.safetensors``; no other file counts.

    Empty without any safetensors file. Raises ModelError when a shard is missing or no file has a name that is looked for.
    """
    index = folder / INDEX
    if not index.is_file():
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        if SINGLE in others or not others:
            return [folder / SINGLE] if others else []
        many = f" and {len(others) - 1} more" if len(others) > 1 else ""
        remedy = f"name a single file {SINGLE}; shards need the {INDEX} that was saved with them"
        raise ModelError(
            f"{folder} has {others[0]}{many}, but neither {SINGLE} nor {INDEX}: none counts as weights", remedy=remedy
        )
    shard_of = read_object(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(name, str) for name in shard_of.values()):
        raise ModelError(f"{index}: weight_map is missing or no table of file names", remedy="copy or download the model again")
    names = sorted(set(shard_of.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ModelError(f"{index}: weight_map names {outside[0]!r}, which is not a file of this folder")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        lacking = f"{folder} lacks {len(missing)} of {len(names)} weight shards: {', '.join(missing[:3])}"
        raise ModelError(lacking, remedy="copy or download the model again")
    return [folder / name for name in names]


def read_folder(folder: Path) -> list[TensorInfo]:
    """Tensors of a model folder's weight files; raises ModelError when a shard is missing or two hold the same tensor."""
    found: dict[str, tuple[Path, TensorInfo]] = {}
    for path in weight_files(folder):
        for tensor in read_header(path):
            if tensor.name in found:
                twice = f"{path} and {found[tensor.name][0].name} both hold {tensor.name}: which one counts is not said"
                raise ModelError(twice, remedy="save the model again, or copy it again: shards of two models are mixed here")
            found[tensor.name] = (path, tensor)
    return [tensor for _, tensor in found.values()]


def _tensor(name: str, entry: dict[str, list[int]], data: int) -> TensorInfo:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(n) is int and n >= 0 for n in (begin, end, *shape)):
        raise ValueError(f"{name}: shape {shape} or offsets {begin}, {end} are not whole numbers from 0 up")
    if begin > end:
        raise ValueError(f"{name}: data ends before it begins")
    dtype = str(entry["dtype"])
    bits = _BITS.get(dtype)
    if bits is not None and prod(shape) * bits != 8 * (end - begin):
        raise ValueError(f"{name}: {dtype} of shape {shape} does not take {end - begin} bytes")
    return TensorInfo(name, dtype, shape, end - begin, data + begin)


def _broken(path: Path, why: str) -> ModelError:
    remedy = "copy, download or export the model again; the file was cut or overwritten"
    return ModelError(f"{path} is not a whole safetensors file: {why}", remedy=remedy)


class TensorFolder:
    """The tensors of a model folder's weight files (or of one file), by name."""

    def __init__(self, path: Path) -> None:
        files = [path] if path.is_file() else weight_files(path)
        if not files:
            raise ModelError(f"{path} has no *.safetensors", remedy="export or copy the model again")
        self._found: dict[str, tuple[Path, TensorInfo]] = {i.name: (file, i) for file in files for i in read_header(file)}

    @property
    def names(self) -> list[str]:
        """Tensor names in file order."""
        return list(self._found)

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor."""
        return self._found[name][1]

    def read(self, name: str) -> Any:
        """The tensor as a float32 array (float16 and bfloat16 widen exactly; integers and float64 keep their type)."""
        import numpy as np

        file, info = self._found[name]
        if info.dtype not in _NUMPY:
            raise ModelError(f"{file}: {name} is stored as {info.dtype}, which is not a plain number type")
        raw = np.fromfile(file, dtype=_NUMPY[info.dtype], count=info.elements, offset=info.offset).reshape(info.shape)
        if info.dtype == "BF16":  # the upper half of a float32
            return (raw.astype("<u4") << 16).view("<f4")
        return raw.astype("<f4") if info.dtype == "F16" else raw
