"""Link 6, the Modelfile: every command is the one that export writes; turns that are tool calls end once too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.certify.certificate import Subject
from pipeline.certify.links.stops import check_files, check_turns
from pipeline.modelfile.modelfile import write_modelfile
from pipeline.prompts.chat import ChatTemplate
from pipeline.prompts.stops import special_ids
from pipeline.runs.files import write_json
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest
from pipeline.verify.score import read_held_out

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


LOOK = {"type": "function", "function": {"name": "look", "arguments": {"host": "a"}}}
TOOL = {"type": "function", "function": {"name": "look", "description": "", "parameters": {}}}
TEXT = '<tool_call>\n{"name": "look", "arguments": {"host": "a"}}\n</tool_call>'
ASKED = {"role": "user", "content": "q"}


def test_turns_that_are_calls_and_turns_with_documents_end_once(run: RunFolder, tokenizer_folder: Path) -> None:
    shutil.copytree(tokenizer_folder, run.merged)
    called = {"role": "assistant", "content": "", "tool_calls": [LOOK]}
    lines = [
        {"messages": [ASKED, called], "tools": [TOOL], "expected": TEXT},
        {"messages": [ASKED, called, {"role": "tool", "content": "r"}, {"role": "assistant", "content": "x"}], "tools": [TOOL]},
        {"messages": [ASKED, {"role": "assistant", "content": "x"}], "documents": [{"doc_id": "1", "text": "d"}]},
    ]
    run.heldout.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = read_held_out(run.heldout)
    found = check_turns(run, rows)
    assert (found.status, found.figure) == ("passed", "exactly one <|end_of_text|> after each of 3 answers")
    # without its call the turn would be empty; with a second end the row is named
    twice = replace(rows[0], last={**called, "content": "a<|end_of_text|>\n"})
    assert check_turns(run, [rows[1], twice]).figure == "row 2 has 2"
