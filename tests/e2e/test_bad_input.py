"""What a person in a hurry gives: one clear error, the documented exit code, and nothing earlier touched."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
GOOD = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
NO_ANSWER = json.dumps({"messages": [{"role": "user", "content": "a"}]})


def _cli(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", *words]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )


CASES = {
    "missing": (None, "no such file"),
    "empty": ("", "has no rows"),
    "no assistant turn": (f"{GOOD}\n{NO_ANSWER}\n", "data.jsonl:2"),
    "broken JSON on line 7": ((GOOD + "\n") * 6 + "{broken\n", "data.jsonl:7"),
    "a set of preferences": (GOOD[:-1] + ', "chosen": "b", "rejected": "c"}\n', "--ignore chosen --ignore rejected"),
    "unknown columns": ('{"foo": 1, "bar": 2}\n', "foo"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_data_is_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    text, expected = CASES[case]
    if text is not None:
        (tmp_path / "data.jsonl").write_text(text)
    done = _cli("train", "--data", str(tmp_path / "data.jsonl"), "--output", str(tmp_path / "out"))
    assert done.returncode == 2, done.stderr[-2000:]
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "generic").exists()


@pytest.mark.parametrize(
    ("base", "code", "expected"),
    [
        ("no-such-model", 2, "neither a folder nor a hub id"),
        ("./no/folder", 2, "neither a folder nor a hub id"),
        ("ibm-granite/granite-4.0-350m", 3, "cannot be reached"),
    ],
)
def test_a_base_that_cannot_be_had(base: str, code: int, expected: str, tmp_path: Path) -> None:
    done = _cli("train", "--base", base, "--output", str(tmp_path))
    assert (done.returncode, expected in done.stderr, "Traceback" in done.stderr) == (code, True, False), done.stderr[-2000:]


def test_pickled_weights_are_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    done = _cli("train", "--base", str(tmp_path), "--output", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "pickled weights can run code" in done.stderr


def test_the_exit_code_of_a_failing_cell_is_the_errors_own(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text((GOOD + "\n") * 6 + "{broken\n")
    done = _cli("run", "--data", str(tmp_path / "data.jsonl"), "--output", str(tmp_path / "out"))
    assert done.returncode == 2, done.stderr[-3000:]
    assert "data.jsonl:7" in done.stderr
    assert "read_split(params)" in done.stderr


def test_unknown_parameters_and_names_are_refused(tmp_path: Path) -> None:
    assert _cli("run", "-p", "EPOCH=1", "--output", str(tmp_path)).returncode == 2
    assert _cli("run", "--name", "../x", "--output", str(tmp_path)).returncode == 2
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_port_in_use_says_who_holds_it(taken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tiny

    monkeypatch.setitem(tiny._COMMON, "hidden_size", 128)  # heads of 32, for which vLLM has a kernel
    folder = tiny.make("3.x-dense", tmp_path / "model")
    done = _cli("serve", "vllm", "--model", str(folder), "--port", str(taken), "--output", str(tmp_path))
    assert done.returncode == 3, done.stderr[-2000:]
    assert f"port {taken} on 127.0.0.1 is not free" in done.stderr
    assert f"process {os.getpid()}" in done.stderr
