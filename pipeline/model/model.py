"""A model as planning sees it: shape, format, precision and bytes - read from headers, never by loading weights."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import InputError, ModelError
from pipeline.model.gguf import GgufTensor, read_gguf_header
from pipeline.model.safetensors import TensorInfo, read_folder
from pipeline.model.shape import ALIASES, SHAPES, Shape, shape_from_config, shape_from_gguf
from pipeline.model.toolcalls import tool_format
from pipeline.runs.files import read_object, read_utf8

GIB = 2**30
Format = Literal["safetensors", "gguf", "shape"]
BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "fp8": 1.0, "int8": 1.0}
# Bytes per linear weight; bnb4 = 4 bits + one fp32 scale per 64 weights (bitsandbytes' NF4 block size). Embeddings stay 16-bit.
QUANTIZED_BYTES = {"fp8": 1.0, "bitsandbytes": 0.5 + 4 / 64, "awq_marlin": 0.5 + 4 / 128, "gptq_marlin": 0.5 + 4 / 128}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "fp8", "I8": "int8"}
_UNQUANTIZED = ("F32", "F16", "BF16")
# vocabulary size of a published generation -> the form of its tool calls
_TOOL_FORMATS = {49155: "granite", 49159: "granite", 100352: "granite4"}
_CLASSES = {"granite": "Granite", "granitemoe": "GraniteMoe", "granitehybrid": "GraniteMoeHybrid"}


@dataclass(frozen=True)
class Model:
    """A model to serve: its shape, its format, dtype and quantisation on disk, its bytes, and where it is (None: shape only).

    ``tool_format`` is the form its chat template writes tool calls in (``pipeline.model.toolcalls``), None without tools.
    """

    name: str
    shape: Shape
    format: Format
    dtype: str
    weight_bytes: int
    parameters: int
    quantization: str | None = None
    path: Path | None = None
    class_name: str = ""
    has_chat_template: bool = True
    tool_format: str | None = None

    def weights_gib(self, dtype: str, quantization: str | None = None) -> float:
        """GiB of weights once loaded as ``dtype``, with linear layers quantised while loading when ``quantization`` is given.

        A checkpoint that is already quantised, and every GGUF, keeps its size on disk.
        """
        if self.quantization or self.format == "gguf":
            return self.weight_bytes / GIB
        embeddings = min(self.shape.embedding_parameters, self.parameters)
        if quantization:
            linear = (self.parameters - embeddings) * QUANTIZED_BYTES[quantization]
            return (linear + embeddings * 2) / GIB
        return self.parameters * BYTES[dtype] / GIB

    def q8_0_gib(self) -> float:
        """GiB of the model as a Q8_0 GGUF: 34 bytes per 32 weights."""
        return self.parameters * 34 / 32 / GIB

    @staticmethod
    def open(path: Path) -> "Model":
        """Read a GGUF file or a model folder, whichever ``path`` is."""
        if path.is_dir():
            return Model.from_folder(path)
        if path.suffix == ".gguf":
            return Model.from_gguf(path)
        wrong = f"{path} is neither a model folder nor a .gguf file" if path.exists() else f"{path}: no such model"
        raise ModelError(wrong, remedy="give a folder with config.json and *.safetensors, or a .gguf file")

    @staticmethod
    def from_folder(path: Path) -> "Model":
        """Read config.json and the safetensors headers of a folder; raises ModelError for a missing or broken one."""
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} has no config.json", remedy="give a model folder, or a .gguf file")
        config = read_object(path / "config.json")
        tensors = read_folder(path)
        if not tensors:
            raise ModelError(f"{path} has no *.safetensors", remedy="save the model with save_pretrained(...)")
        shape = shape_from_config(config, path)
        quantization = _checkpoint_quantization(config)
        template, classes = _template(path), config.get("architectures")
        return Model(
            name=path.resolve().name,
            shape=shape,
            format="safetensors",
            dtype=_DTYPES.get(stored := _most_bytes(tensors), stored),
            weight_bytes=sum(t.nbytes for t in tensors),
            parameters=shape.parameters if quantization else sum(t.elements for t in tensors),
            quantization=quantization,
            path=path,
            class_name=str(classes[0]) if isinstance(classes, list) and classes else "",
            has_chat_template=bool(template),
            tool_format=tool_format(template),
        )

    @staticmethod
    def from_gguf(path: Path) -> "Model":
        """Read a GGUF header; raises ModelError for a missing, cut or foreign file."""
        if not path.is_file():
            raise ModelError(f"{path}: no such GGUF file", remedy="make it with granite-pipeline export")
        header = read_gguf_header(path)
        shape = shape_from_gguf(header, path)
        kind = _most_bytes(header.tensors)
        return Model(
            name=path.stem,
            shape=shape,
            format="gguf",
            dtype=_DTYPES[kind] if kind in _UNQUANTIZED else "float16",
            weight_bytes=sum(tensor.nbytes for tensor in header.tensors),
            parameters=shape.parameters,
            quantization=None if kind in _UNQUANTIZED else kind,
            path=path,
            class_name=header.architecture,
            has_chat_template="tokenizer.chat_template" in header.metadata,
            tool_format=tool_format(str(header.metadata.get("tokenizer.chat_template", ""))),
        )

    @staticmethod
    def from_shape(name: str) -> "Model":
        """A published Granite model known by name only (``granite-4.1-8b``), as its bfloat16 checkpoint would be."""
        key = name.removeprefix("ibm-granite/").removesuffix("-instruct").removesuffix("-base")
        key = ALIASES.get(key, key)
        if key not in SHAPES:
            raise InputError(f"no model shape {name!r}", remedy="known shapes: " + ", ".join(SHAPES))
        shape = SHAPES[key]
        size = shape.parameters
        # every 4.0 model, the all-attention ones included, is of the hybrids' class; the shape alone does not tell
        kind = "granitehybrid" if key.startswith("granite-4.0-") else shape.architecture
        form = _TOOL_FORMATS.get(shape.vocab)
        return Model(key, shape, "shape", "bfloat16", 2 * size, size, class_name=f"{_CLASSES[kind]}ForCausalLM", tool_format=form)


def _checkpoint_quantization(config: dict[str, Any]) -> str | None:
    settings = config.get("quantization_config") or {}
    if not isinstance(settings, dict):
        raise ModelError(f"config.json: quantization_config must be an object, this is {type(settings).__name__}")
    method = settings.get("quant_method") or settings.get("quantization_method")
    return str(method) if method else None


def _most_bytes(tensors: Iterable[TensorInfo | GgufTensor]) -> str:
    """The type that most of the bytes are of, as its format writes it; F16 where there are none."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.type if isinstance(tensor, GgufTensor) else tensor.dtype] += tensor.nbytes
    return max(sizes, key=lambda kind: sizes[kind], default="F16")


def _template(folder: Path) -> str:
    """Source of the folder's chat template (of all of them, where it has several), "" without one."""
    if (folder / "chat_template.jinja").is_file():
        return read_utf8(folder / "chat_template.jinja")
    config = folder / "tokenizer_config.json"
    found = read_object(config).get("chat_template") if config.is_file() else None
    return found if isinstance(found, str) else json.dumps(found) if found else ""
