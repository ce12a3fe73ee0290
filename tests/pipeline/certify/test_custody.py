"""Link 7 on small files: what may be edited in a manifest, and the finding that says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.certify.custody import check_custody
from pipeline.certify.finding import Finding
from pipeline.certify.subject import Data, Subject, hashes
from pipeline.files import write_json
from pipeline.manifest import Manifest, seal_holds, sealed
from pipeline.runs import RunFolder
from pipeline.score import read_held_out, read_reference, score


@pytest.fixture
def line(run: RunFolder) -> RunFolder:
    """A run whose every stage is recorded, on files of a few bytes."""
    rows = [{"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": f"{i}"}]} for i in range(3)]
    texts = {run.heldout: rows} | {
        run.reference(which): [{"text": f"{i}", "finish_reason": "stop"} for i in range(3)] for which in ("base", "tuned")
    }
    for path in (run.adapter / "adapter_model.safetensors", run.merged / "config.json", run.gguf, run.modelfile, *texts):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(entry) + "\n" for entry in texts.get(path, [path.name])))
    manifest, seen = Manifest(run.manifest), hashes(run)
    parameters = {"base": "somewhere", "data": "soc", "method": "lora"}
    trained = {"parameters": parameters, "base": {"id": "somewhere", "sha256": "b"}, "data": {"train": "d"}}
    manifest.record("finetune", trained, [run.adapter, run.heldout], {}, 1.0)
    manifest.record("merge", {"adapter": seen["adapter"], "base": "b"}, [run.merged], {}, 1.0)
    manifest.record("gguf", {"merged": seen["merged_fp16"]}, [run.gguf], {}, 1.0)
    manifest.record("modelfile", {"gguf": seen[run.gguf.name]}, [run.modelfile], {}, 1.0)
    for which, model in (("base", "b"), ("tuned", seen["merged_fp16"])):
        result = score(read_held_out(run.heldout), read_reference(run.reference(which)))
        inputs = {"heldout": seen["heldout.jsonl"], "model": model}
        manifest.record(f"evaluate_{which}", inputs, [run.reference(which)], result, 1.0)
    entry = {"engine_version": "1", "argv": ["llama-server", "--model", str(run.gguf)], "env": {}, "status": "passed"}
    with manifest.changing() as data:
        data["served"] = {"llamacpp": sealed(entry), "ollama": sealed({**entry, "argv": ["ollama", "serve"]})}
    return run


def judged(run: RunFolder) -> dict[str, Finding]:
    subject = Subject(run, Manifest(run.manifest), None, "b", Data({"train": "d"}), {}, hashes(run))
    return {finding.id: finding for finding in check_custody(subject)}


def failed(run: RunFolder) -> set[str]:
    return {name for name, finding in judged(run).items() if finding.status == "failed"}


def edit(run: RunFolder, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(run.manifest.read_text())
    change(data)
    write_json(run.manifest, data)


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
    assert seal_holds(Manifest(line.manifest).stage("modelfile"))
