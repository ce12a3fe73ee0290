"""Output where the terminal or pipe knows few characters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import commands

_NARROW: list[dict[str, str]] = [
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "latin-1"},
    {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
]


@pytest.mark.parametrize("narrow", _NARROW, ids=["ascii", "latin-1", "C"])
def test_what_stdout_cannot_show_is_replaced(narrow: dict[str, str], tmp_path: Path) -> None:
    words = (
        "import sys; from pipeline import cli; from pipeline.commands import show; "
        "cli.app = lambda: (show.line('\\u2713 \\u4e2d \\udcff'), sys.stdout.write('\\u2026 \\udcff\\n'), print('\\u2713')); cli.main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), **narrow}
    done = subprocess.run(
        [sys.executable, "-c", words], env=environment, cwd=tmp_path, capture_output=True, timeout=60, check=False
    )
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr
    assert b"?" in done.stdout


def test_the_help_of_every_verb_is_shown_in_ascii(tmp_path: Path) -> None:
    words = (
        "import sys; from pipeline import cli, commands\n"
        "for verb in commands.FILES:\n"
        "    sys.argv = ['granite-pipeline', verb, '--help']\n"
        "    try:\n        cli.main()\n"
        "    except SystemExit as left:\n        assert not left.code, verb"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", words], env=environment, cwd=tmp_path, capture_output=True, timeout=100, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(b"Usage: ") >= len(commands.FILES)
