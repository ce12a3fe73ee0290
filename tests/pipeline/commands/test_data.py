import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.commands import data
from pipeline.errors import PipelineError

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
