from __future__ import annotations

import json
import logging
import struct
from pathlib import Path

import pytest

from pipeline.errors import OutOfMemory
from training.memory import GIB, Need, finetune_need, merge_need, require_memory
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


def test_a_merge_needs_a_shard_and_its_largest_weight(tmp_path: Path) -> None:
    base = _base(tmp_path / "base", 1_000_000_000)
    assert merge_need(base, GIB).gib == pytest.approx(0.6 + 1 + 8e9 / GIB)


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
