from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline import batch
from pipeline.runs.folder import RunFolder

_STAGES = ["01_finetune", "04_verify"]


@pytest.fixture
def done(run: RunFolder) -> RunFolder:
    """A run whose artefacts are there and that was recorded as finished."""
    for path in (run.adapter / "w", run.merged / "w", run.gguf, run.modelfile, run.report / "report.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("made")
    batch.record(run, _inputs(run), 12.0)
    return run


def _inputs(run: RunFolder, **parameters: Any) -> dict[str, Any] | None:
    return batch.inputs(run, _STAGES, {"NAME": "test", "OUTPUT": str(run.output), **parameters})


def test_a_verified_run_with_the_same_inputs_needs_nothing(done: RunFolder) -> None:
    assert batch.is_current(done, _inputs(done)) is not None


def test_other_parameters_settings_or_artefacts_do(done: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert batch.is_current(done, _inputs(done, EPOCHS=2)) is None
    with monkeypatch.context() as changed:
        changed.setenv("VLLM_MAX_MODEL_LEN", "1024")
        assert batch.is_current(done, _inputs(done)) is None
    done.gguf.write_text("edited")
    assert batch.is_current(done, _inputs(done)) is None


def test_data_counts_by_content(run: RunFolder, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("one")
    first = _inputs(run, DATA=str(data))
    data.write_text("two")
    assert first is not None
    assert _inputs(run, DATA=str(data)) != first


def test_what_may_have_moved_on_is_never_taken_as_done(done: RunFolder) -> None:
    assert _inputs(done, DATA="hub:owner/name") is None
    assert batch.is_current(done, None) is None


def test_a_run_that_was_never_recorded_is_not_current(run: RunFolder) -> None:
    assert batch.is_current(run, _inputs(run)) is None
