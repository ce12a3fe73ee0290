"""Which rows are asked, and that no model is loaded that cannot fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import OutOfMemory
from pipeline.verify.score import spread
from training.certify import probes
from training.memory import Need


@pytest.mark.parametrize(
    ("count", "wanted", "found"), [(204, 1, [0]), (1, 1, [0]), (3, 5, [0, 1, 2]), (9, 3, [0, 4, 8]), (204, 2, [0, 203])]
)
def test_rows_are_evenly_spread(count: int, wanted: int, found: list[int]) -> None:
    assert spread(count, wanted) == found


def test_a_model_that_cannot_fit_is_refused_before_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # no machine has this little: the need is made larger than any
    monkeypatch.setattr(probes, "evaluate_need", lambda folder, on_gpu: Need(1e6, "weights"))
    with pytest.raises(OutOfMemory, match="comparing distributions"):
        probes._loaded(tmp_path)
