from __future__ import annotations

import json
import logging
import struct
from pathlib import Path

import pytest

from pipeline.errors import OutOfMemory
from training.memory import GIB, Need, evaluate_need, finetune_need, gguf_need, merge_need, require_memory
from training.parameters import FinetuneParameters


def _base(folder: Path, elements: int) -> Path:
    """A folder whose header says it holds a float16 weight of so many elements; the data is a hole."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 32, "hidden_size": 4096, "vocab_size": 100_000}))
    header = json.dumps({"w": {"dtype": "F16", "shape": [elements], "data_offsets": [0, 2 * elements]}}).encode()
    with (folder / "model.safetensors").open("wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        out.truncate(8 + len(header) + 2 * elements)
    return folder


def test_what_a_fine_tune_needs_grows_with_what_can_be_lowered(tmp_path: Path) -> None:
    base = _base(tmp_path / "base", 8_000_000_000)
    lora = finetune_need(base, FinetuneParameters(base=str(base)), 1024).gib
    assert lora == pytest.approx(0.6 + 16e9 / GIB + 4 * 1024 * (32 * 4096 * 28 + 800_000) / GIB)
    assert finetune_need(base, FinetuneParameters(base=str(base), batch_size=1), 1024).gib < lora
    assert finetune_need(base, FinetuneParameters(base=str(base)), 128).gib < lora
    assert finetune_need(base, FinetuneParameters(base=str(base), method="full"), 1024).gib > lora + 100


def test_what_is_computed_again_is_not_counted_as_kept(tmp_path: Path) -> None:
    base = _base(tmp_path / "base", 8_000_000_000)
    plain, quantized = (FinetuneParameters(base=str(base), method=method) for method in ("lora", "qlora"))
    tokens = 4 * 1024
    assert finetune_need(base, plain, 1024, pieces=True).gib == pytest.approx(0.6 + (16e9 + tokens * 4096 * 28) / GIB)
    assert finetune_need(base, quantized, 1024).gib == pytest.approx(0.6 + (4.8e9 + tokens * (32 * 4096 * 2 + 800_000)) / GIB)


# GiB that an H200 was seen to give to trainings of 336 tokens a batch, its own context included: docs/settings.md
@pytest.mark.parametrize(
    ("weights", "sizes", "pieces", "seen"),
    [
        (134_515_008, (30, 576, 49_152), False, 2.18),
        (134_515_008, (30, 576, 49_152), True, 1.47),
        (1_631_750_144, (40, 2048, 100_352), False, 6.70),
        (1_631_750_144, (40, 2048, 100_352), True, 4.81),
    ],
)
def test_what_was_measured_on_a_gpu_would_not_have_been_refused_with_that_much_memory(
    tmp_path: Path, weights: int, sizes: tuple[int, int, int], pieces: bool, seen: float
) -> None:
    base = _base(tmp_path / "base", weights)
    named = dict(zip(("num_hidden_layers", "hidden_size", "vocab_size"), sizes, strict=True))
    (base / "config.json").write_text(json.dumps(named))
    need = finetune_need(base, FinetuneParameters(base=str(base)), 84, pieces=pieces)
    assert seen / 2 - 0.3 < need.gib <= seen


def test_a_merge_needs_the_rows_at_work_and_a_conversion_its_largest_weight(tmp_path: Path) -> None:
    base = _base(tmp_path / "base", 1_000_000_000)
    assert merge_need().gib == pytest.approx(0.7)
    assert gguf_need(base).gib == pytest.approx(0.6 + 4e9 / GIB)


def test_what_does_not_fit_is_said_with_numbers_and_the_setting_to_lower() -> None:
    with pytest.raises(
        OutOfMemory, match=r"fine-tuning needs about 80\.0 GiB of memory \(weights\), 22\.6 GiB are free"
    ) as caught:
        require_memory("fine-tuning", Need(80, "weights"), "lower --batch-size", free=22.6)
    assert (caught.value.remedy, caught.value.exit_code) == ("lower --batch-size", 3)


def test_what_is_tight_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        require_memory("merge", Need(9, "a shard"), "", free=10)
        require_memory("merge", Need(5, "a shard"), "", free=10)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_answering_an_8b_model_fits_24_gib_with_weights_as_they_are_stored(tmp_path: Path) -> None:
    tmp_path.joinpath("config.json").write_text(
        json.dumps({
            "hidden_size": 4096, "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8,
            "vocab_size": 49_155, "intermediate_size": 12_800,
        })
    )  # fmt: skip
    size = 204_000_000
    tensors = {f"w{i}": {"dtype": "F16", "shape": [size], "data_offsets": [2 * size * i, 2 * size * (i + 1)]} for i in range(40)}
    header = json.dumps(tensors).encode()
    with (tmp_path / "model.safetensors").open("wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        out.truncate(8 + len(header) + 80 * size)
    assert evaluate_need(tmp_path, on_gpu=False).gib > 24
    # preflight asks for this; and a batch of 64 rows of 100 tokens
    assert evaluate_need(tmp_path, on_gpu=False, mapped=True).gib < 17
    assert 17 < evaluate_need(tmp_path, False, 6400, 64, mapped=True).gib < 20
