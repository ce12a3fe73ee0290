"""The units that the verb prints start what the verbs start, and systemd accepts them."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from small_run import make_run
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config import Settings, load
from pipeline.deploy import unit
from pipeline.engines.base import Launch
from pipeline.operate import services
from pipeline.runs.folder import RunFolder

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


def _printed(*words: str) -> str:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output
    return done.stdout


def test_units_quote_what_systemd_would_expand(tmp_path: Path) -> None:
    launch = Launch(
        "x",
        ("/bin/echo", "a b", "100%", "$HOME", 'say "hi"', "back\\slash"),
        {"A": "1 2", "B": "$HOME"},
        "http://x",
        "/health",
        "m",
    )
    text = unit(launch, "50% sure", tmp_path, [tmp_path])
    assert 'ExecStart=/bin/echo "a b" 100%% $$HOME "say \\"hi\\"" "back\\\\slash"\n' in text
    assert 'Environment="A=1 2"\n' in text
    # systemd expands no variable here, so nothing takes the doubling back
    assert "Environment=B=$HOME\n" in text
    assert f"ReadWritePaths=-{tmp_path}\n" in text
    assert "PYTHONPATH" not in text
    assert "Description=50%% sure\n" in text


def test_ollamas_unit_may_write_its_models_and_an_engine_has_its_own_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    make_run(RunFolder("test", tmp_path / "out"))
    monkeypatch.setattr("pipeline.deploy.planned_launch", lambda *_: Launch("ollama", ("ollama", "serve"), {}, "", "", "m"))
    text = _printed("systemd", "ollama", "--run", "test", "--output", str(tmp_path / "out"))
    assert f"ReadWritePaths=-{tmp_path}/out -{tmp_path}/.cache -{tmp_path}/.ollama\n" in text
    assert "PYTHONPATH" not in text
    assert f"Environment=PYTHONPATH={ROOT}\n" in _printed("systemd", "status-api", "--output", str(tmp_path / "out"))


def test_units_are_accepted_and_hold_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(RunFolder("test", tmp_path / "out"))
    (tmp_path / ".env").write_text("GATEWAY_API_KEY=sk-planted\nOPENAI_COMPATIBLE_API_KEY=sk-planted\n")
    for name in ("gateway", "status-api"):
        text = _printed("systemd", name, "--output", str(tmp_path / "out"))
        assert "planted" not in text
        assert "127.0.0.1" in text
        (tmp_path / f"granite-{name}.service").write_text(text)
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    units = [str(path) for path in tmp_path.glob("*.service")]
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_the_unit_starts_what_the_verb_starts(tmp_path: Path) -> None:
    settings = load(tmp_path / "none")
    launch = services.gateway_launch(settings, "127.0.0.1", 4000, tmp_path, free=False)
    line = next(w for w in unit(launch, "x", tmp_path).splitlines() if w.startswith("ExecStart="))
    assert tuple(shlex.split(line.removeprefix("ExecStart="))) == launch.argv
