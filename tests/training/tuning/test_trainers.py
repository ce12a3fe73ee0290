"""Which trainer is taken, by what was measured: docs/settings.md and benchmarks/train.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from pipeline.errors import MissingDependency
from pipeline.machine.hardware import Gpu, Hardware
from training.parameters import FinetuneParameters
from training.tuning import trainers
from training.tuning.prepare import Example

_ALIKE = [Example((*range(400), 1000 + i, 2000 + i), (-100,) * 401 + (2000 + i,), "row") for i in range(16)]
_APART = [Example((1000 + i, 2000 + i), (-100, 2000 + i), "row") for i in range(16)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.make("3.x-dense", tmp_path / "base")


def _on_a_gpu(monkeypatch: pytest.MonkeyPatch, free_gib: float) -> None:
    """A GPU as seen by the choice alone: there is none here to be had."""
    machine = replace(Hardware.detect(), gpus=(Gpu(name="a card", memory_gib=80.0, free_gib=free_gib),))
    monkeypatch.setattr(trainers, "_on_gpu", lambda: True)
    monkeypatch.setattr(trainers.Hardware, "detect", lambda *_: machine)
    monkeypatch.setattr(trainers, "import_unsloth", lambda: None)


def test_on_a_cpu_rows_in_one_sequence_are_the_faster_way(base: Path) -> None:
    chosen, why = trainers.choose(FinetuneParameters(base=str(base)), base, _APART)
    assert chosen == "hf" and "CPU" in why


@pytest.mark.parametrize(
    ("rows", "free_gib", "more", "chosen"),
    [
        (_ALIKE, 70.0, {}, "hf"),
        (_APART, 70.0, {}, "unsloth"),  # nothing to share
        (_ALIKE, 1.0, {}, "unsloth"),  # which needs the least memory
        (_ALIKE, 70.0, {"method": "qlora"}, "unsloth"),
        (_ALIKE, 70.0, {"dropout": 0.1}, "unsloth"),  # nothing is shared then
        (_APART, 70.0, {"trainer": "hf"}, "hf"),
        (_ALIKE, 70.0, {"trainer": "unsloth"}, "unsloth"),
    ],
)
def test_on_a_gpu_unsloth_stays_unless_most_tokens_are_common_beginnings(
    rows: list[Example], free_gib: float, more: dict[str, object], chosen: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _on_a_gpu(monkeypatch, free_gib)
    assert trainers.choose(FinetuneParameters(base=str(base), **more), base, rows)[0] == chosen  # type: ignore[arg-type]


def test_unsloth_that_is_demanded_and_cannot_be_had_is_said(tmp_path: Path) -> None:
    base = tiny.make("4.0-dense", tmp_path / "base")
    with pytest.raises(MissingDependency, match="no patched layers"):
        trainers.choose(FinetuneParameters(base=str(base), trainer="unsloth"), base, _ALIKE)
    assert trainers.choose(FinetuneParameters(base=str(base)), base, _ALIKE)[0] == "hf"
