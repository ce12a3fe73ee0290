"""Random Granite models of every architecture, a few megabytes each, with the embedded base's tokenizer."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from training.base import write_tokenizer

_COMMON: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "tie_word_embeddings": True, "embedding_multiplier": 12.0, "attention_multiplier": 0.0625,
    "residual_multiplier": 0.22, "logits_scaling": 8.0, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 16,
    "initializer_range": 0.1,
}  # fmt: skip
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_d_conv": 4}
_HYBRID = {"layer_types": ["mamba", "attention", "mamba", "attention"], "position_embedding_type": "nope", **_MAMBA}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "3.x-dense": ("Granite", {"intermediate_size": 128}),
    "3.x-moe": ("GraniteMoe", _MOE),
    "4.0-dense": ("GraniteMoeHybrid", {"layer_types": ["attention"] * 4, "shared_intermediate_size": 128, "num_local_experts": 0, "position_embedding_type": "rope"}),
    "4.0-hybrid": ("GraniteMoeHybrid", {**_HYBRID, "shared_intermediate_size": 128, "num_local_experts": 0}),
    "4.0-hybrid-moe": ("GraniteMoeHybrid", {**_HYBRID, **_MOE, "shared_intermediate_size": 64}),
    "4.1": ("Granite", {"intermediate_size": 128, "head_dim": 16}),
}  # fmt: skip


def make(variant: str, folder: Path, **more: Any) -> Path:
    """Save the variant's random float32 model and tokenizer to a folder; ``more`` are settings of its config."""
    import torch
    import transformers

    name, settings = VARIANTS[variant]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**_COMMON, **settings, **more})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(folder))
    shutil.copytree(_tokenizer(), folder, dirs_exist_ok=True)
    return folder


# Granite's marks that are added tokens; in 4.x, those without a bar are not marked special
PUBLISHED = {
    "3.3": ["<|tool_call|>", "<|start_of_cite|>", "<|end_of_cite|>", "<|start_of_plugin|>", "<|end_of_plugin|>"],
    "4.0": ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<|tool_call|>"],
}
PUBLISHED["4.1"] = PUBLISHED["4.0"]
TEMPLATES = Path(__file__).parents[3] / "shared/granite/chat-templates"


def published(version: str, folder: Path) -> Path:
    """A folder with the published chat template of a version ("embedded": ours) and a tokenizer with its added tokens."""
    from tokenizers import AddedToken, Tokenizer

    shutil.copytree(_tokenizer(), folder, dirs_exist_ok=True)
    if version == "embedded":
        return folder
    source = (TEMPLATES / f"granite-{version}.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for mark in PUBLISHED[version]:
        add = tokenizer.add_special_tokens if "|" in mark else tokenizer.add_tokens
        add([AddedToken(mark, special="|" in mark, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def published_base(version: str, folder: Path) -> Path:
    """A random model with the published chat template of a version, and an embedding for each of its added tokens."""
    return published(version, make("3.x-dense" if version == "3.3" else "4.1", folder, vocab_size=49152 + 16))


def put_shards_beside(folder: Path) -> dict[str, Any]:
    """Put other random weights beside model.safetensors, as two shards with their index; those weights."""
    import torch
    from safetensors.torch import load_file, save_file

    torch.manual_seed(1)
    new = {name: torch.randn_like(tensor) * 0.1 for name, tensor in load_file(str(folder / "model.safetensors")).items()}
    names, weight_map = sorted(new), dict[str, str]()
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: new[name] for name in part}, str(folder / file), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return new


@cache
def _tokenizer() -> Path:
    """The tokenizer's files, read out of the package once in a test run."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-tokenizer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_tokenizer(folder)
    return folder
