"""Weights of a model folder as numpy arrays, one tensor at a time (no torch; bfloat16 included)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.errors import ModelError
from pipeline.safetensors_header import TensorInfo, read_header

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?"}  # fmt: skip


class TensorFolder:
    """The tensors of every safetensors file of a folder (or of one file), by name."""

    def __init__(self, path: Path) -> None:
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
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
        if info.dtype not in _DTYPES:
            raise ModelError(f"{file}: {name} is stored as {info.dtype}, which is not a plain number type")
        raw = np.fromfile(file, dtype=_DTYPES[info.dtype], count=info.elements, offset=info.offset).reshape(info.shape)
        if info.dtype == "BF16":  # the upper half of a float32
            return (raw.astype("<u4") << 16).view("<f4")
        return raw.astype("<f4") if info.dtype == "F16" else raw
