import json
import subprocess
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

import training.base
from pipeline.cli import app
from pipeline.commands import data, show
from pipeline.errors import PipelineError
from pipeline.prompts.chat import EMBEDDED_TEMPLATE

ROW = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def _run(*arguments):
    return CliRunner().invoke(app, ["data", *map(str, arguments)])


def test_the_command_prints_a_table(write):
    result = _run(write({**ROW, "id": 1}), "--max-length", 10)
    assert result.exit_code == 0
    for text in ("messages", "1 usable, 0 refused", "user 1, assistant 1", "1 over 10", "harmless"):
        assert text in result.stdout


def test_the_command_prints_json(write):
    path = write(ROW)
    result = _run(path, "--json")
    assert (result.exit_code, json.loads(result.stdout)["source"]) == (0, str(path))


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_the_command_shows_the_summary_and_then_fails(write, flags):
    path = write(ROW, "{")
    result = _run(path, *flags)
    assert isinstance(result.exception, PipelineError)
    assert result.exception.exit_code == 2
    assert "not valid JSON" in result.stdout
    assert ("1 usable, 1 refused" in result.stdout) == (not flags)


def test_text_from_the_file_is_not_markup_or_terminal_codes(write):
    row = {"prompt": "q", "completion": json.dumps({"[red]x": "[bold]\x1b[31my\n"})}
    result = _run(write(row))
    assert "[red]x" in result.stdout
    assert "[bold]\N{REPLACEMENT CHARACTER}[31my\N{REPLACEMENT CHARACTER} 1" in result.stdout


def test_a_big_file_shows_progress_on_stderr_only(write, monkeypatch):
    monkeypatch.setattr(data, "_BIG", 10)
    result = _run(write(ROW), "--json")
    assert json.loads(result.stdout)["rows"] == 1


def test_the_command_does_not_load_torch(write):
    code = f"import sys, pipeline.commands.data as c; c.data({str(write(ROW))!r}, base='embedded', as_json=True); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


CALL = {"function": {"name": "f", "arguments": {"x": "y"}}}
MANY = {
    "messages": [
        {"role": "user", "content": "q<|end_of_text|>", "name": "ann"},
        {"role": "assistant", "content": "no", "weight": 0},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "no"},
    ],
    "id": 7,
}


def test_show_prints_what_the_model_sees_and_learns_as_one_object_a_line(write):
    result = _run(write(MANY, ROW), "--show", 5, "--json")
    assert result.exit_code == 0
    first, second = map(json.loads, result.stdout.splitlines())
    assert set(first) == {"row", "text", "trained", "unused", "neutralised"}
    assert first["row"].endswith("rows.jsonl:1")
    assert (first["trained"], first["unused"], first["neutralised"]) == (["no<|end_of_text|>"], ["id", "messages[].name"], 1)
    assert "<|start_of_role|>user<|end_of_role|>q< |end_of_text|><|end_of_text|>" in first["text"]
    assert second["trained"] == ["a<|end_of_text|>"]


def test_show_colours_the_turn_that_is_learned(write, monkeypatch):
    monkeypatch.setattr(show, "console", lambda err=False: Console(force_terminal=True, width=200))
    shown = _run(write(MANY), "--show", 1).stdout
    unlearned, learned = shown.split("again")
    assert ("\x1b[30;42mno" in unlearned, "\x1b[30;42mno" in learned) == (False, True)


def test_a_row_that_the_base_has_no_form_for_is_refused_however_it_is_asked(write, tmp_path, monkeypatch):
    template = EMBEDDED_TEMPLATE.replace("tool_calls", "no_calls").replace("<tool_call>", "<call>")
    monkeypatch.setattr(training.base, "EMBEDDED_TEMPLATE", template)
    path = write({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [CALL]}]}, ROW)
    for options in (["--base", "embedded"], ["--show", 1], ["--show", 2]):
        result = _run(path, *options)
        assert isinstance(result.exception, PipelineError), options
        assert "writes no tool calls" in str(result.exception)
    written = tmp_path / "good.jsonl"
    assert _run(path, "--base", "embedded", "--write", written).exit_code == 0
    assert [json.loads(line)["messages"] for line in written.read_text().splitlines()] == [ROW["messages"]]
    assert _run(path, "--base", "embedded", "--skip-bad").exit_code == 0


def test_write_replaces_nothing_and_writes_nothing_for_nothing(write, tmp_path):
    target = tmp_path / "good.jsonl"
    assert isinstance(_run(write("{"), "--write", target).exception, PipelineError)
    assert not target.exists()
    assert _run(write(MANY, "{"), "--write", target).exit_code == 0
    assert json.loads(target.read_text())["messages"] == MANY["messages"]
    assert "is there already" in str(_run(write(ROW), "--write", target).exception)


def test_names_from_a_file_send_no_codes_to_the_terminal(write):
    result = _run(write({**ROW, "\x1b]0;owned\x07\u202e": 1}))
    assert not {"\x1b", "\x07", "\u202e"} & set(result.stdout + str(result.exception))


def test_a_choice_that_does_not_exist_is_refused(write):
    assert "use one of refuse, keep, drop" in str(_run(write(ROW), "--greeting", "maybe").exception)


def test_rows_of_one_line_are_told_apart(write, monkeypatch):
    template = EMBEDDED_TEMPLATE.replace("tool_calls", "no_calls").replace("<tool_call>", "<call>")
    monkeypatch.setattr(training.base, "EMBEDDED_TEMPLATE", template)
    called = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [CALL]}]}
    made = json.loads(_run(write(json.dumps([ROW, called, ROW])), "--base", "embedded", "--json", "--skip-bad").stdout)
    assert (made["rows"], len(made["refused"]), made["account"]["refused"]) == (2, 1, 1)
