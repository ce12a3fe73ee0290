"""Metadata of a GGUF and settings beside the merged weights that would make another model answer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.certify.links.gguf import metadata
from pipeline.certify.links.merged import compare_files
from pipeline.model.gguf import GgufHeader
from pipeline.prompts.stops import Token, extra_ends, special_ids
from pipeline.runs.files import read_json, write_json

CONFIG: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 300,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "attention_multiplier": 0.0625, "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22, "logits_scaling": 8.0, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
}  # fmt: skip


@pytest.fixture
def merged(tokenizer_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "merged"
    shutil.copytree(tokenizer_folder, folder)
    end = special_ids(folder)["<|end_of_text|>"]
    write_json(folder / "config.json", CONFIG | {"bos_token_id": end, "eos_token_id": end})
    write_json(folder / "generation_config.json", {"bos_token_id": end, "eos_token_id": end})
    return folder


def _header(merged: Path, **changes: Any) -> GgufHeader:
    """What the converter writes for CONFIG; a change to None removes the key."""
    end = special_ids(merged)["<|end_of_text|>"]
    values = {
        "context_length": 512, "embedding_length": 64, "block_count": 4, "attention.head_count": 2, "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": 1e-6, "attention.scale": 0.0625, "embedding_scale": 12.0, "residual_scale": 0.22,
        "logit_scale": 8.0, "vocab_size": 300, "rope.dimension_count": 32, "rope.freq_base": 1e4,
    }  # fmt: skip
    pairs: dict[str, Any] = {f"granite.{key}": value for key, value in values.items()}
    tokens = {"pre": "smollm", "bos_token_id": end, "eos_token_id": end, "add_bos_token": False}
    pairs |= {"general.architecture": "granite"} | {f"tokenizer.ggml.{key}": value for key, value in tokens.items()} | changes
    return GgufHeader(3, {key: value for key, value in pairs.items() if value is not None}, ())


def test_what_the_converter_writes_is_equal(merged: Path) -> None:
    found = metadata(merged, _header(merged), "smollm")
    assert (found.status, found.figure) == ("passed", "12 numbers, positions and the end token equal")
    # an older export recorded no splitting rule
    assert metadata(merged, _header(merged)).status == "passed"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("granite.rope.dimension_count", 16),
        ("granite.attention.key_length", 16),
        ("granite.rope.freq_base", None),
        ("granite.attention.layer_norm_rms_epsilon", None),
        ("granite.context_length", None),
        ("granite.attention.scale", None),
        ("granite.rope.scaling.type", "linear"),
        ("granite.rope.scaling.factor", 4.0),
        ("granite.rope.scaling.finetuned", False),
        ("tokenizer.ggml.pre", "llama-bpe"),
        ("tokenizer.ggml.pre", None),
        ("tokenizer.ggml.bos_token_id", 7),
        ("tokenizer.ggml.eos_token_id", 7),
        ("tokenizer.ggml.eot_token_id", 7),
        ("tokenizer.ggml.add_bos_token", True),
    ],
)
def test_metadata_that_changes_the_model_is_named(merged: Path, key: str, value: object) -> None:
    found = metadata(merged, _header(merged, **{key: value}), "smollm")
    assert found.status == "failed"
    assert key.rpartition(".")[2].removesuffix("_token") in found.figure.replace("adds its bos", "add_bos")


def test_scaled_positions_are_compared_with_the_config(merged: Path) -> None:
    write_json(merged / "config.json", CONFIG | {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}})
    scaled = {"granite.rope.scaling.type": "linear", "granite.rope.scaling.factor": 2.0}
    assert metadata(merged, _header(merged, **scaled)).status == "passed"
    assert (
        "rope.scaling.factor is 4.0" in metadata(merged, _header(merged, **scaled | {"granite.rope.scaling.factor": 4.0})).figure
    )
    assert "rope.scaling.type is None" in metadata(merged, _header(merged)).figure


def test_a_hybrid_without_positions_is_no_false_alarm(merged: Path) -> None:
    write_json(merged / "config.json", CONFIG | {"position_embedding_type": "nope"})
    hybrid = {
        "granite.context_length": 1 << 20,
        "granite.rope.scaling.finetuned": False,
        "granite.attention.head_count_kv": [0, 1, 0, 1],
    }
    assert metadata(merged, _header(merged, **hybrid)).status == "passed"
    assert "finetuned is True" in metadata(merged, _header(merged, **hybrid | {"granite.rope.scaling.finetuned": None})).figure


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("generation_config.json", {"repetition_penalty": 1.3}),
        ("generation_config.json", {"do_sample": True, "temperature": 0.7}),
        ("tokenizer_config.json", {"add_bos_token": True}),
        ("config.json", {"rms_norm_eps": 0.1}),
    ],
)
def test_settings_that_engines_read_are_the_bases(merged: Path, tmp_path: Path, file: str, change: dict[str, Any]) -> None:
    base = tmp_path / "base"
    shutil.copytree(merged, base)
    write_json(
        merged / file, read_json(merged / file) | {"eos_token_id" if file != "tokenizer_config.json" else "eos_token": "repaired"}
    )
    assert [found.status for found in compare_files(base, merged)] == ["passed", "passed"]
    write_json(merged / file, read_json(merged / file) | change)
    found = compare_files(base, merged)[1]
    assert (found.id, found.status) == ("merge.config", "failed")
    assert f"{file}: {next(iter(change))} is" in found.figure


def test_a_base_without_generation_settings_is_no_false_alarm(merged: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(merged, base)
    (base / "generation_config.json").unlink()
    assert compare_files(base, merged)[1].status == "passed"


def _ids(path: Path, change: Callable[[int], object]) -> None:
    held = read_json(path)
    write_json(path, held | {"eos_token_id": change(held["eos_token_id"])})


def test_ordinary_tokens_among_the_end_tokens_are_named(merged: Path, tmp_path: Path) -> None:
    vocabulary = special_ids(merged)
    end, base = Token("<|end_of_text|>", vocabulary["<|end_of_text|>"]), tmp_path / "base"
    shutil.copytree(merged, base)
    assert extra_ends(merged, base, end, vocabulary) == extra_ends(merged, None, end, vocabulary) == []
    _ids(merged / "generation_config.json", lambda known: [known, 250])
    for against in (base, None):
        assert "generation_config.json: eos_token_id [250]" in extra_ends(merged, against, end, vocabulary)[0]
    _ids(base / "config.json", lambda known: [known, 250])  # the base had it
    assert extra_ends(merged, base, end, vocabulary) == []
