"""Every make target: listed by help, and what it would run is a verb that exists."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from pipeline.cli import app

ROOT = Path(__file__).parents[1]
VERBS = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
TARGETS = sorted(
    set(re.search(r"^\.PHONY: ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text(), re.M)[1].replace("\\\n", " ").split())
)  # type: ignore[index]


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_runs_verbs_that_exist(target: str) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    shown = _make("-n", target)
    assert shown.returncode == 0, shown.stderr
    used = set(re.findall(r"granite-pipeline ([a-z-]+)", shown.stdout))
    assert used <= VERBS
    if target in VERBS and target != "check":  # the repository's own: lint, types, fast tests
        assert target in used


def test_help_lists_every_target() -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    assert {line.split()[0] for line in _make("help").stdout.splitlines()[1:]} == set(TARGETS)


@pytest.mark.parametrize(
    ("target", "said"), [("config", "LLM_BACKEND"), ("ps", "no server is running"), ("status", "no server of run"), ("runs", "")]
)
def test_a_cheap_target_does_what_it_says(target: str, said: str, tmp_path: Path) -> None:
    if shutil.which("make") is None or not (Path(sys.executable).parent / "granite-pipeline").exists():
        pytest.skip("make or the granite-pipeline command is not installed")
    (tmp_path / "bin").symlink_to(Path(sys.executable).parent)
    stamp = re.search(r"touch (\S+)", _make("-n", "setup", f"VENV={tmp_path}").stdout)
    assert stamp
    Path(stamp[1]).touch()
    done = _make(target, f"VENV={tmp_path}", f"OUTPUT={tmp_path / 'out'}", LLM_BACKEND="vllm")
    assert done.returncode == 0, done.stderr
    assert said in done.stdout + done.stderr


def test_set_up_is_not_left_out_because_it_was_done_before(tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    stamp = re.search(r"touch (\S+)", _make("-n", "setup", f"VENV={tmp_path}").stdout)
    assert stamp
    Path(stamp[1]).touch()
    assert (
        f"setup_environment.py --venv '{tmp_path}' --device cuda"
        in _make("-n", "setup", f"VENV={tmp_path}", "DEVICE=cuda").stdout
    )
    assert "setup_environment.py" not in _make("-n", "runs", f"VENV={tmp_path}").stdout


def test_a_python_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    done = _make("setup", f"VENV={tmp_path}", "PYTHON=python3.99")
    assert done.returncode != 0
    assert "there is no python3.99: install Python 3.11, 3.12 or 3.13" in done.stdout + done.stderr


def test_ci_runs_every_test_and_nothing_of_make_test_twice() -> None:
    """The third command of CI is the rest of the second: one marker, once refused and once asked for."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    ci = re.findall(r"^make ([a-z-]+)(.*)$", (ROOT / ".ci" / "run").read_text(), re.M)
    assert [target for target, _ in ci] == ["check", "test", "test-all"]
    asked = [_make("-n", target, *shlex.split(words)).stdout.split("-m pytest", 1)[1] for target, words in ci]
    assert [re.findall(r"-m ('[^']+'|\"[^\"]+\"|\w+)", words) for words in asked] == [
        ['"not slow and not e2e"'],
        ['"not wide"'],
        ["wide"],
    ]
    assert " -m " not in _make("-n", "test-all").stdout.split("-m pytest", 1)[1]


def _make(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run make as from a shell, also when these tests are themselves run by make."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))} | more
    return subprocess.run(["make", *words], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT, env=environment)


def test_a_failed_compose_leaves_the_committed_files(tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    (tmp_path / "docker-compose.yml").write_text("kept")
    words = ("-f", str(ROOT / "Makefile"), "-C", str(tmp_path), "compose", "PIPELINE=false", "STAMP=docker-compose.yml")
    assert _make(*words).returncode != 0
    assert (tmp_path / "docker-compose.yml").read_text() == "kept"
