"""A run that was finished and verified with the same inputs is not done again."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline import batch
from pipeline.commands import run as line
from pipeline.runs import lock
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest

_STAGES = "01_finetune,04_verify"


@pytest.fixture
def executed(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The parameters of each execution; what the notebooks would leave is there."""
    calls: list[dict[str, Any]] = []

    def execute(folder: RunFolder, chosen: list[str], given: dict[str, Any]) -> tuple[list[Any], list[str]]:
        calls.append(given)
        for path in (run.adapter / "w", run.gguf, run.report_file, run.evidence):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("made")
        Manifest(run.manifest).record("gguf", {}, [run.gguf], {}, 1)
        return [], []

    monkeypatch.setattr(line, "_execute", execute)
    monkeypatch.setattr(line, "_conclude", lambda _: None)
    return calls


def _run(run: RunFolder, **given: Any) -> None:
    line.run(name=run.name, output=run.output, stages=_STAGES, **given)


def test_a_verified_run_with_the_same_inputs_needs_nothing(run: RunFolder, executed: list[Any]) -> None:
    _run(run)
    _run(run)
    assert len(executed) == 1


def test_a_run_that_another_machine_finishes_meanwhile_is_not_done_again(run: RunFolder, executed: list[Any]) -> None:
    _run(run)
    done = run.manifest.read_text()
    run.manifest.unlink()
    with lock.held(run, "run"):
        record = json.loads((run.path / "lock.json").read_text())
    record["owners"][0]["host"] = "node-b"
    (run.path / "lock.json").write_text(json.dumps(record))

    def other() -> None:
        run.manifest.write_text(done)
        (run.path / "lock.json").unlink()

    ends = threading.Timer(1, other)
    ends.start()
    _run(run)
    ends.join()
    assert len(executed) == 1


def test_other_parameters_settings_or_artefacts_do(run: RunFolder, executed: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _run(run)
    _run(run, parameter=["EPOCHS=2"])
    assert len(executed) == 2
    with monkeypatch.context() as changed:
        changed.setenv("VLLM_MAX_MODEL_LEN", "1024")
        _run(run, parameter=["EPOCHS=2"])
    assert len(executed) == 3
    run.gguf.write_text("edited")
    _run(run)
    _run(run)
    assert len(executed) == 4
    run.evidence.unlink()
    _run(run)
    _run(run, force="verify")
    assert [given.get("FORCE") for given in executed[4:]] == [None, "verify"]


def test_a_run_that_failed_is_done_again(run: RunFolder, executed: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: RunFolder) -> None:
        raise AssertionError("not passed")

    for _ in range(2):
        monkeypatch.setattr(line, "_conclude", refuse)
        with pytest.raises(AssertionError):
            _run(run)
    assert len(executed) == 2


def test_data_counts_by_content(run: RunFolder, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("one")
    first = batch.inputs(run, ["04_verify"], {"DATA": str(data)})
    data.write_text("two")
    assert first is not None
    assert batch.inputs(run, ["04_verify"], {"DATA": str(data)}) != first


def test_what_may_have_moved_on_is_never_taken_as_done(run: RunFolder, executed: list[Any]) -> None:
    assert batch.inputs(run, ["04_verify"], {"DATA": "hub:owner/name"}) is None
    for _ in range(2):
        _run(run, data="hub:owner/name")
    assert len(executed) == 2
