from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest, seal_holds


def _recorded(run: RunFolder) -> Manifest:
    run.adapter.mkdir(parents=True)
    (run.adapter / "w").write_text("weights")
    manifest = Manifest(run.manifest)
    manifest.record("finetune", {"seed": 1}, [run.adapter], {"loss": 0.5}, 12.34)
    return Manifest(run.manifest)


def test_a_finished_stage_is_current_with_the_same_inputs_only(run: RunFolder) -> None:
    manifest = _recorded(run)
    assert manifest.is_current("finetune", {"seed": 1})
    assert not manifest.is_current("finetune", {"seed": 2})
    assert not manifest.is_current("merge", {"seed": 1})
    assert manifest.stage("finetune")["result"] == {"loss": 0.5}
    assert manifest.stage("finetune")["seconds"] == 12.3


def test_a_changed_or_missing_artefact_is_not_current(run: RunFolder) -> None:
    manifest = _recorded(run)
    (run.adapter / "w").write_text("WEIGHTS")
    assert not manifest.is_current("finetune", {"seed": 1})
    (run.adapter / "w").unlink()
    assert not manifest.is_current("finetune", {"seed": 1})


def test_artefact_hash_is_recorded_by_relative_path(run: RunFolder) -> None:
    assert len(_recorded(run).artefact_sha256("finetune", "adapter")) == 64


def test_a_start_noted_beside_a_running_stage_is_kept_with_the_stages_own_record(run: RunFolder) -> None:
    training = _recorded(run)
    Manifest(run.manifest).append("starts", {"engine": "llamacpp"})
    training.record("merge", {}, [], {}, 1)
    found = Manifest(run.manifest).data
    assert set(found["stages"]) == {"finetune", "merge"}
    assert [entry["engine"] for entry in found["starts"]] == ["llamacpp"]
    assert training.data == found


def test_writers_at_once_lose_nothing(run: RunFolder) -> None:
    run.path.mkdir(parents=True)

    def note(number: int) -> None:
        Manifest(run.manifest).append("starts", {"number": number})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(note, range(16)))
    assert sorted(entry["number"] for entry in Manifest(run.manifest).data["starts"]) == list(range(16))


def test_a_record_with_a_secret_in_it_is_sealed_as_it_is_written(run: RunFolder) -> None:
    run.path.mkdir(parents=True)
    Manifest(run.manifest).record("finetune", {"base": "https://me:pass@host/x"}, [], {}, 1)
    assert "pass" not in run.manifest.read_text()
    assert seal_holds(Manifest(run.manifest).stage("finetune")) is True


def test_a_path_that_only_resembles_a_key_is_recorded_as_it_is(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_KEY", "training")
    inputs = {"base": "/models/granite-task-classification-v2", "data": "/data/training/rows.jsonl"}
    Manifest(run.manifest).record("finetune", inputs, [], {}, 1)
    assert Manifest(run.manifest).stage("finetune")["inputs"] == inputs
