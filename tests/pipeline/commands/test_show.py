"""What is printed where there is no terminal: whole values, a line each, no colour."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

from pipeline.commands import show

LONG = "/" + "a long path/" * 30


def test_a_log_line_is_one_plain_line_without_a_secret(tmp_path: Path) -> None:
    code = f"from pipeline.commands import show; import logging; show.log_to_stderr(20); logging.info('copy -> %s', {LONG!r} + 'planted-value-0815')"
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path.cwd()),
        "HF_TOKEN": "planted-value-0815",
        "COLUMNS": "40",
        "FORCE_COLOR": "",
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, timeout=60)
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr[2] == done.stderr[5] == ":"
    assert done.stderr[8:] == f" copy -> {LONG}********\n"


def test_lines_and_tables_are_neither_wrapped_nor_cut(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    show.line(f"[red]{LONG}", err=True, style="red")
    show.table(f"title {LONG}", ("path", "[x]"), [(LONG, None), (1, "[bold]y")])
    made = Table("a", title="[bold]t", caption=f"caption {LONG}")
    made.add_row("b")
    show.draw(made)
    out, err = capsys.readouterr()
    assert err == f"[red]{LONG}\n"
    lines = out.splitlines()
    assert lines[0] == f"title {LONG}"
    assert sum(LONG in line for line in lines) == 3
    assert any("[x]" in line for line in lines)
    assert any("[bold]y" in line for line in lines)
    assert "t" in lines
    assert lines[-1] == f"caption {LONG}"
    assert "\x1b" not in out


def test_a_quiet_library_does_not_fill_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    show.log_to_stderr(logging.INFO)
    assert logging.getLogger("httpx").level == logging.ERROR
