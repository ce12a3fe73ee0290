from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.runs.text import MaskingFilter, MaskingWriter, is_secret_name, mask, masked, relative

_KEY = "planted-value-0815"


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "OPENAI_COMPATIBLE_API_KEY", "VLLM_API_KEY", "DB_PASSWORD", "SECRET", "aws_secret_key"]
)
def test_names_that_say_so_are_secret(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "VLLM_MAX_MODEL_LEN", "KEYBOARD", "MAX_TOKENS", "PATH"])
def test_others_are_not(name: str) -> None:
    assert not is_secret_name(name)


def test_values_of_secret_variables_are_masked_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_COMPATIBLE_API_KEY", _KEY)
    assert mask(f"401 for key={_KEY}, {_KEY}") == "401 for key=********, ********"
    assert masked({"a": [f"x{_KEY}"], _KEY: 1, "n": 2}) == {"a": ["x********"], "********": 1, "n": 2}


def test_short_values_and_other_variables_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "none")
    monkeypatch.setenv("LLM_BACKEND", "long-enough-value")
    assert mask("none of long-enough-value") == "none of long-enough-value"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("hf_" + "a1B2" * 6, "********"),
        ("sk-proj-" + "a1B2" * 6, "********"),
        ("Authorization: Bearer abcdefgh.ijkl", "Authorization: Bearer ********"),
        ("https://me:pass@host/x", "https://********@host/x"),
        ("key=sk-proj-" + "a1B2" * 6, "key=********"),
        ("one\\nsk-proj-" + "a1B2" * 6, "one\\n********"),
        ("/models/granite-task-classification-v2", "/models/granite-task-classification-v2"),
        ("risk-assessment-2024-q1 and desk-reservations-1234", "risk-assessment-2024-q1 and desk-reservations-1234"),
        ("sk-learn-pipeline-example, hf_transformersexample", "sk-learn-pipeline-example, hf_transformersexample"),
        ("hf_hub and sk-1 and https://host:80/x", "hf_hub and sk-1 and https://host:80/x"),
    ],
)
def test_what_looks_like_a_token_is_masked(text: str, shown: str) -> None:
    assert mask(text) == shown


def test_log_records_lose_their_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", _KEY)
    try:
        raise ValueError(_KEY)
    except ValueError as error:
        record = logging.LogRecord("x", logging.INFO, "", 0, "token %s", (_KEY,), (ValueError, error, None))
    assert MaskingFilter().filter(record)
    assert _KEY not in logging.Formatter().format(record)
    assert record.getMessage() == "token ********"


@pytest.mark.parametrize(
    ("name", "value", "hidden"),
    [
        ("CACHE_KEY", "training", False),
        ("SORT_KEY", "Training", False),
        ("DB_PASSWORD", "training", True),
        ("HF_TOKEN", "traininG", True),
        ("HF_TOKEN", "training1", True),
        ("HF_TOKEN", "training-set", True),
        ("HF_TOKEN", "trainingtrainingtraining", True),
    ],
)
def test_an_ordinary_word_is_no_key(monkeypatch: pytest.MonkeyPatch, name: str, value: str, hidden: bool) -> None:
    monkeypatch.setenv(name, value)
    assert (mask(f"/data/{value}/x") == "/data/********/x") is hidden


def test_what_a_notebook_logs_is_masked_before_it_is_shown_or_saved(tmp_path: Path) -> None:
    cell = (
        "import logging, os; from pipeline import notebook; notebook.begin('x', 'out'); key = os.environ['HF_TOKEN']\n"
        "logging.info('with %s', key)\n"
        "try: raise ValueError(key)\n"
        "except ValueError: logging.exception('failed')\n"
    )
    environment = {**os.environ, "HF_TOKEN": _KEY, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", cell], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "with ********" in done.stdout
    assert "ValueError: ********" in done.stdout
    assert _KEY not in done.stdout + done.stderr


def test_what_a_notebook_prints_is_masked_on_its_way_to_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", _KEY)
    shown = io.StringIO()
    writer = MaskingWriter(shown)
    writer.write(f"a cell printed {_KEY}\n")
    writer.flush()
    assert shown.getvalue() == "a cell printed ********\n"


def test_paths_below_a_folder_are_told_as_seen_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out" / "mine"
    said = {"argv": ["serve", f"--model={folder}/m", str(folder / "m.gguf"), f"/other{folder}/m", f"{folder}-2/m"], "n": 1}
    assert relative(said, folder) == {"argv": ["serve", "--model=./m", "./m.gguf", f"/other{folder}/m", f"{folder}-2/m"], "n": 1}
    monkeypatch.chdir(tmp_path)
    assert relative(["out/mine/m", f"{folder}/m", "about out/mine"], Path("out/mine")) == ["./m", "./m", "about out/mine"]
