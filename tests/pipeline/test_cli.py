"""How errors end the command line: their exit code, one clear line, no secret."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipeline import cli

_KEY = "planted-value-0815"


def _ended(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["granite-pipeline"])  # no words at all: they are only looked at for --force
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (NotADirectoryError(20, "Not a directory", "out/file/sub"), 2, "error: out/file/sub: Not a directory"),
        (PermissionError(13, "Permission denied", f"/srv/{_KEY}"), 3, "error: /srv/********: Permission denied"),
        (ZeroDivisionError(_KEY), 3, "ZeroDivisionError: ********"),
    ],
)
def test_no_other_exception_looks_like_a_failed_verification(
    error: Exception, code: int, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", _KEY)
    monkeypatch.setattr(cli, "app", broken)  # a defect cannot be ordered
    assert _ended(monkeypatch) == code
    shown = capsys.readouterr().err
    assert said in shown
    assert _KEY not in shown
