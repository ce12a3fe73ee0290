"""The export benchmark: its random models have the size asked for, and two ways that differ are no comparison."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks import export


@pytest.mark.parametrize("parameters", [3e8, 1.9e9, 8e9])
def test_a_random_model_has_as_many_weights_as_asked(parameters: float) -> None:
    shapes = export._shapes(parameters)
    assert sum(map(math.prod, shapes.values())) == pytest.approx(parameters, rel=0.03)
    assert all(shape[-1] % 32 == 0 for shape in shapes.values())


def _stages(monkeypatch: pytest.MonkeyPatch, written: dict[Path, str]) -> None:
    """Stages that cost what their checkout's name says and write so much."""

    def measured(stage: str, code: Path, *paths: Path) -> export.Cost:
        (paths[-1] / {"merge": "merged", "GGUF": "model.gguf"}[stage]).write_text(written[code])
        return export.Cost(float(code.name), 2 * float(code.name), 1.0)

    monkeypatch.setattr(export, "measure", measured)
    monkeypatch.setattr(export, "adapter", lambda base, folder: folder)


def test_the_table_ends_with_the_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = {"old": Path("4"), "new": Path("1")}
    _stages(monkeypatch, dict.fromkeys(ways.values(), "same"))
    lines = export.table(export.compare(Path(), ways, 1)).splitlines()
    assert lines[4] == "| old | both | 8.0 | 16.0 | 1.00 |"
    assert lines[-1] == "| ratio | both | 0.25 | 0.25 | 1.00 |"


def test_other_bytes_are_no_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = {"old": Path("4"), "new": Path("1")}
    _stages(monkeypatch, {Path("4"): "one", Path("1"): "other"})
    with pytest.raises(RuntimeError, match="do not write the same bytes"):
        export.compare(Path(), ways, 1)
