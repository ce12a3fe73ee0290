"""Link 6, the Modelfile: every command is the one that export writes; turns that are tool calls end once too."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.certify.certificate import Subject
from pipeline.certify.links.stops import check_files
from pipeline.modelfile.modelfile import write_modelfile
from pipeline.prompts.chat import ChatTemplate
from pipeline.prompts.stops import special_ids
from pipeline.runs.files import write_json
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest

SYSTEM = "Triage the alert."


@pytest.fixture
def exported(run: RunFolder, tokenizer_folder: Path, write_gguf: Callable[[Path, dict[str, object]], None]) -> RunFolder:
    """Merged folder and GGUF of a model trained with SYSTEM, whatever the Modelfile."""
    shutil.copytree(tokenizer_folder, run.merged)
    ids = special_ids(run.merged)
    end, pad = ids["<|end_of_text|>"], ids["<|pad|>"]
    for name in ("config.json", "generation_config.json"):
        write_json(run.merged / name, {"eos_token_id": end, "pad_token_id": pad, "max_position_embeddings": 512})
    template = ChatTemplate.from_folder(run.merged).source
    write_gguf(
        run.gguf, {"general.architecture": "granite", "tokenizer.ggml.eos_token_id": end, "tokenizer.chat_template": template}
    )
    return run


def _found(run: RunFolder, system: str | None) -> tuple[str, str]:
    if "finetune" not in Manifest(run.manifest).data["stages"]:
        inputs = {"base": {"id": "embedded", "note": "N"}, "data": {}, "parameters": {}}
        Manifest(run.manifest).record("finetune", inputs, [], {"system": system}, 1.0)
    files, modelfile = check_files(Subject(run, Manifest(run.manifest), run.merged, None, None, {}, {}))
    assert files.status == "passed", files.figure
    return modelfile.status, modelfile.figure


@pytest.mark.parametrize("system", [None, SYSTEM, "a\u200bb", "a\x07b", "a\u00a0b", "a\u00adb", 'ends in """\nand goes on'])
def test_what_export_writes_passes_whatever_the_system_message(exported: RunFolder, system: str | None) -> None:
    write_modelfile(exported, system=system, license="N")
    assert _found(exported, system)[0] == "passed"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "FROM ./unsloth",
            "FROM /elsewhere/other-unsloth",
            "FROM ./unsloth.Q8_0.gguf is missing (it has /elsewhere/other-unsloth",
        ),
        ("PARAMETER top_p", "ADAPTER ./other.gguf\nPARAMETER top_p", "ADAPTER ./other.gguf was added"),
        (SYSTEM, "Ignore the alert.", "SYSTEM Triage the alert. is missing (it has Ignore the alert.)"),
        ("PARAMETER top_p", "PARAMETER stop benign\nPARAMETER top_p", "PARAMETER STOP benign was added"),
        ("PARAMETER stop <|end_of_text|>\n", "", "PARAMETER stop <|end_of_text|> is missing"),
        ("PARAMETER temperature 0", "PARAMETER temperature 2", "PARAMETER temperature 0 is missing (it has 2)"),
    ],
)
def test_a_changed_command_is_named(exported: RunFolder, old: str, new: str, words: str) -> None:
    write_modelfile(exported, system=SYSTEM, license="N")
    text = exported.modelfile.read_text(encoding="utf-8")
    assert old in text
    exported.modelfile.write_text(text.replace(old, new), encoding="utf-8")
    status, figure = _found(exported, SYSTEM)
    assert status == "failed"
    assert words in figure
