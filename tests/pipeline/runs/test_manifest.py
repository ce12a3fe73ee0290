from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.errors import InputError
from pipeline.runs.files import write_json
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import BaseRecord, Manifest, ServedRecord, StageRecord, TrainingRecord


def _recorded(run: RunFolder) -> Manifest:
    run.adapter.mkdir(parents=True)
    (run.adapter / "w").write_text("weights")
    manifest = Manifest(run.manifest)
    manifest.record("finetune", {"seed": 1}, [run.adapter], {"loss": 0.5}, 12.34)
    return Manifest(run.manifest)


def _stage(manifest: Manifest, name: str) -> StageRecord:
    record = manifest.stage(name)
    assert record is not None
    return record


def test_a_finished_stage_is_current_with_the_same_inputs_only(run: RunFolder) -> None:
    manifest = _recorded(run)
    assert manifest.holds(manifest.stage("finetune"), {"seed": 1})
    assert not manifest.holds(manifest.stage("finetune"), {"seed": 2})
    assert not manifest.holds(manifest.stage("merge"), {"seed": 1})
    record = _stage(manifest, "finetune")
    assert (record.result, record.seconds) == ({"loss": 0.5}, 12.3)
    assert manifest.stage("merge") is None


def test_a_changed_or_missing_artefact_is_not_current(run: RunFolder) -> None:
    manifest = _recorded(run)
    (run.adapter / "w").write_text("WEIGHTS")
    assert not manifest.holds(manifest.stage("finetune"), {"seed": 1})
    (run.adapter / "w").unlink()
    assert not manifest.holds(manifest.stage("finetune"), {"seed": 1})


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
    assert _stage(Manifest(run.manifest), "finetune").intact is True


def test_a_path_that_only_resembles_a_key_is_recorded_as_it_is(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_KEY", "training")
    inputs = {"base": "/models/granite-task-classification-v2", "data": "/data/training/rows.jsonl"}
    Manifest(run.manifest).record("finetune", inputs, [], {}, 1)
    assert _stage(Manifest(run.manifest), "finetune").inputs == inputs


def test_a_training_is_read_by_name_and_what_an_older_version_left_out_is_empty(run: RunFolder) -> None:
    inputs = {"base": {"id": "b", "sha256": "1"}, "data": {"train": "2"}, "parameters": {"method": "full", "max_steps": 3}}
    result = {"steps": 3, "eval_loss": {"before": 2.0, "after": 1.0}, "unknown": 1}
    Manifest(run.manifest).record("finetune", inputs, [], result, 1)
    training = Manifest(run.manifest).require_training()
    assert training == TrainingRecord(
        BaseRecord("b", sha256="1"),
        inputs["data"],
        inputs["parameters"],
        steps=3,
        eval_loss=result["eval_loss"],  # type: ignore[arg-type]
    )
    assert training.full and training.cut_short and training.system is None


def test_a_training_that_is_not_there_says_what_to_run(run: RunFolder) -> None:
    assert Manifest(run.manifest).training is None
    with pytest.raises(InputError, match="no finished fine-tune") as caught:
        Manifest(run.manifest).require_training()
    assert caught.value.remedy == f"granite-pipeline train --name {run.name}"


def test_served_records_are_sealed_and_keys_of_other_versions_are_kept(run: RunFolder) -> None:
    _recorded(run)
    with Manifest(run.manifest).changing() as data:
        data["later"], data["stages"]["finetune"]["more"] = {"a": 1}, 2
    Manifest(run.manifest).record_served({"vllm": ServedRecord("1", ["vllm"], {}, None, "passed")})
    found = Manifest(run.manifest)
    assert found.served["vllm"] == ServedRecord("1", ["vllm"], {}, None, "passed") and found.served["vllm"].intact
    assert list(found.data["served"]["vllm"]) == ["engine_version", "argv", "env", "sha256", "status", "seal"]
    assert (found.data["later"], found.data["stages"]["finetune"]["more"]) == ({"a": 1}, 2)
    assert _stage(found, "finetune").intact is False


@pytest.mark.parametrize("stages", [[], {"merge": 3}, {"merge": {"key": "k"}}, {"merge": {"key": "", "artefacts": {"a": 1}}}])
def test_a_manifest_of_another_form_is_refused(run: RunFolder, stages: object) -> None:
    write_json(run.manifest, {"schema": 1, "stages": stages})
    with pytest.raises(InputError, match="not a run's manifest"):
        Manifest(run.manifest)
