from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.prompts.chat import EMBEDDED_TEMPLATE, ChatTemplate
from pipeline.prompts.stops import special_ids
from pipeline.runs.files import write_json
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest
from pipeline.verify.files import prompt_problems, run_checks, system_problems, trained_template

CHANGED = EMBEDDED_TEMPLATE.replace("<|end_of_role|>' + text", "<|end_of_role|>\\n' + text")


@pytest.fixture
def run(tmp_path: Path, tokenizer_folder: Path, write_gguf) -> RunFolder:
    folder = RunFolder("r", tmp_path)
    shutil.copytree(tokenizer_folder, folder.merged)
    ids = special_ids(folder.merged)
    write_json(folder.merged / "config.json", {"eos_token_id": ids["<|end_of_text|>"], "pad_token_id": ids["<|pad|>"]})
    write_gguf(folder.gguf, {
        # the converter drops the file's last line end
        "general.architecture": "granite", "tokenizer.chat_template": EMBEDDED_TEMPLATE.rstrip("\n"),
        "tokenizer.ggml.eos_token_id": ids["<|end_of_text|>"], "tokenizer.ggml.padding_token_id": ids["<|pad|>"],
    })  # fmt: skip
    manifest = Manifest(folder.manifest)
    recorded = {
        "chat_template_sha256": ChatTemplate.from_folder(folder.merged).sha256,
        "end_token": "<|end_of_text|>",
        "end_token_id": ids["<|end_of_text|>"],
    }
    manifest.record("merge", {}, [], {"tokenizer": recorded}, 0)
    manifest.record("finetune", {}, [], {"system": "Answer in JSON."}, 0)
    return folder


def statuses(run: RunFolder) -> dict[str, str]:
    return {check.id: check.status for check in run_checks(run)}


def test_files_as_exported_pass(run):
    assert statuses(run) == {"export.chat_template": "passed", "export.stops": "passed"}
    assert prompt_problems(run) == []
    assert trained_template(run).recorded is True


def test_the_gguf_tells_what_the_merged_folder_was(run):
    (run.merged / "chat_template.jinja").write_text(CHANGED)
    found = trained_template(run)
    assert (found.template.source, found.recorded) == (EMBEDDED_TEMPLATE, True)
    failed = run_checks(run)[0]
    assert failed.status == "failed"
    assert "merged_fp16" in failed.detail
    assert "a line end stands after <|end_of_role|>" in failed.detail


def test_both_changed_is_only_a_hash(run, write_gguf):
    (run.merged / "chat_template.jinja").write_text(CHANGED)
    write_gguf(run.gguf, {"general.architecture": "granite", "tokenizer.chat_template": CHANGED})
    assert trained_template(run).recorded is False
    assert statuses(run)["export.chat_template"] == "failed"


def test_without_a_record_the_merged_folder_is_the_truth(run):
    run.manifest.unlink()
    assert trained_template(run).recorded is None
    assert statuses(run) == {"export.chat_template": "passed", "export.stops": "passed"}


def test_swapped_stops_fail_verification(run):
    ids = special_ids(run.merged)
    write_json(run.merged / "config.json", {"eos_token_id": ids["<|pad|>"], "pad_token_id": ids["<|end_of_text|>"]})
    failed = run_checks(run)[1]
    assert (failed.status, failed.detail.partition(";")[0]) == ("failed", "eos and pad are swapped")


def test_only_the_beginning_of_the_trained_system_message_is_a_cut(run):
    def said(system: str) -> list[str]:
        run.modelfile.write_text(f'FROM ./x.gguf\nSYSTEM """{system}"""\n')
        return system_problems(run)

    assert said("Answer in") == ["the Modelfile's SYSTEM is cut: 'Answer in', trained with 'Answer in JSON.'"]
    assert said("Answer in JSON.") == said("Another of the user's own.") == []
