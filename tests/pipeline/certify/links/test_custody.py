"""Link 7 on small files: what may be edited in a manifest, and the finding that says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from recorded import edit, failed, judged

from pipeline.certify.certificate import hashes
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest, sealed


def test_an_untouched_manifest_passes_and_counts_what_was_compared(line: RunFolder) -> None:
    found = judged(line)
    assert {finding.status for finding in found.values()} == {"passed"}
    assert found["custody.chain"].figure == "8 joints hold"
    assert found["custody.artefacts"].figure == "7 artefacts unchanged"


def _without_evaluation(run: RunFolder) -> None:
    edit(run, lambda data: [data["stages"].pop(f"evaluate_{which}") for which in ("base", "tuned")])
    run.reference("tuned").write_text('{"text": "better", "finish_reason": "stop"}\n' * 3)


def _without_modelfile_stage(run: RunFolder) -> None:
    edit(run, lambda data: data["stages"].pop("modelfile"))
    run.modelfile.write_text("FROM somewhere else")


@pytest.mark.parametrize(
    ("spoil", "check"),
    [
        (_without_evaluation, "custody.chain"),
        (_without_modelfile_stage, "custody.artefacts"),
        (lambda run: edit(run, lambda data: data["served"]["llamacpp"].update(engine_version="99")), "custody.launch"),
        (lambda run: edit(run, lambda data: data["served"].update(vllm={"status": "passed", "argv": None})), "custody.launch"),
        (lambda run: edit(run, lambda data: data["served"]["ollama"].pop("seal")), "custody.launch"),
        (lambda run: edit(run, lambda data: data["stages"]["gguf"].update(seconds=9)), "custody.records"),
        (lambda run: edit(run, lambda data: data["stages"]["gguf"]["inputs"].pop("merged")), "custody.chain"),
    ],
)
def test_an_edit_of_the_manifest_is_seen(line: RunFolder, spoil: Callable[[RunFolder], object], check: str) -> None:
    spoil(line)
    assert check in failed(line)


def test_a_launch_of_another_file_of_the_same_name_is_not_this_run_s(line: RunFolder, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / line.name / line.gguf.name
    entry = {"engine_version": "1", "argv": ["llama-server", "--note", str(line.gguf), "--model", str(other)]}
    edit(line, lambda data: data["served"].update(llamacpp=sealed(entry)))
    assert failed(line) == {"custody.launch"}


def test_a_launch_is_known_by_its_hash_when_the_folder_was_moved_and_stale_after_another_export(line: RunFolder) -> None:
    known = hashes(line)[line.gguf.name]
    entry = {"engine_version": "1", "argv": ["llama-server", "--model", "/was/here/before.gguf"], "sha256": known}
    edit(line, lambda data: data["served"].update(llamacpp=sealed(entry)))
    assert failed(line) == set()
    stale = {**entry, "argv": ["llama-server", "--model", str(line.gguf)], "sha256": "0" * 64}
    edit(line, lambda data: data["served"].update(llamacpp=sealed(stale)))
    assert failed(line) == {"custody.launch"}


def test_scores_without_answers_are_not_compared_and_not_passed(line: RunFolder) -> None:
    for which in ("base", "tuned"):
        line.reference(which).unlink()
    assert judged(line)["custody.scores"].status == "skipped"
    assert failed(line) == {"custody.artefacts"}


def test_a_secret_in_a_record_does_not_break_its_seal(line: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "a-secret-value")
    Manifest(line.manifest).record("modelfile", {"gguf": hashes(line)[line.gguf.name], "system": "a-secret-value"}, [line.modelfile], {}, 1.0)  # fmt: skip
    assert "a-secret-value" not in line.manifest.read_text()
    monkeypatch.delenv("SOME_API_KEY")
    assert Manifest(line.manifest).stages["modelfile"].intact
