from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import pipeline
from pipeline.serve.server import classify

ROWS = json.loads((Path(pipeline.__file__).parent / "serve" / "failures.json").read_text())


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("ValueError: Free memory on device cuda:0 (3.1/23.9 GiB) on startup is less than desired GPU memory utilization (0.92, 22 GiB).", "another process holds"),
        ("the estimated maximum model length is 2048. Try increasing", "cannot hold one request"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "out of memory while loading"),
        ("OSError: [Errno 98] error while attempting to bind on address", "the port is taken"),
        ("llama_model_load: error loading model: check_tensor_dims: tensor 'blk.0.ssm_in.weight' not found", "misread config"),
        ("RuntimeError: operator torchvision::nms does not exist", "CUDA build of torchvision"),
        ("gguf_init_from_file_impl: invalid magic characters", "not a GGUF"),
        ("safetensors_rust.SafetensorError: Error while deserializing header: MetadataIncompleteBuffer", "damaged"),
    ],
)  # fmt: skip
def test_known_failures_are_recognised(line: str, cause: str) -> None:
    found = classify(f"INFO starting\n{line}\nINFO more\n")
    assert found is not None
    assert cause in found.cause
    assert found.line == line
    assert found.remedy


def test_the_specific_reason_wins_over_vllms_last_word() -> None:
    log = "RuntimeError: Engine core initialization failed. See root cause above.\nValueError: No available memory for the cache blocks."
    found = classify(log)
    assert found is not None
    assert "weights and activations" in found.cause


def test_an_unknown_log_is_not_guessed_at() -> None:
    assert classify("all is well\nor is it") is None


def test_every_row_compiles_and_says_what_to_do() -> None:
    for row in ROWS:
        assert re.compile(row["pattern"])
        assert row["cause"]
        assert row["remedy"]
