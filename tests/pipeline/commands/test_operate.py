"""``config``, ``models`` and ``warmup`` as a user runs them, in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from stub_server import serving
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config import Settings
from pipeline.errors import EngineError, InputError
from pipeline.net.loopback import claim

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _clean(no_settings: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_config_shows_value_source_and_effect_and_masks_secrets(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(
        "VLLM_MODEL=mine\nHF_TOKEN=hf_planted\nVLLM_BASEURL=x\nOPENAI_COMPATIBLE_BASE_URL=http://me:planted@h/v1\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LLM_BACKEND": "llamacpp", "OPENAI_COMPATIBLE_API_KEY": "sk-planted"}
    words = [sys.executable, "-m", "pipeline", "config", "--offline", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "planted" not in done.stdout + done.stderr
    found = json.loads(done.stdout)
    rows = {row["name"]: row for row in found["settings"]}
    assert set(rows) == {name.upper() for name in Settings.model_fields}
    assert (rows["VLLM_MODEL"]["value"], rows["VLLM_MODEL"]["source"]) == ("mine", ".env")
    assert (rows["LLM_BACKEND"]["value"], rows["LLM_BACKEND"]["source"]) == ("llamacpp", "environment")
    assert (rows["HF_TOKEN"]["value"], rows["OPENAI_COMPATIBLE_API_KEY"]["value"]) == ("********", "********")
    assert rows["OPENAI_COMPATIBLE_BASE_URL"]["value"] == "http://********@h/v1"
    assert all(row["affects"] for row in rows.values())
    assert [n["text"] for n in found["notices"]] == ["VLLM_BASEURL is set but nothing reads it: did you mean VLLM_BASE_URL?"]


def test_config_asks_the_selected_backend_and_a_model_it_lacks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving({"/v1/models": {"data": [{"id": "served"}]}, "/health": b""}) as stub:
        monkeypatch.setenv("VLLM_BASE_URL", stub.url)
        wrong = CliRunner().invoke(app, ["config"])
        monkeypatch.setenv("VLLM_MODEL", "served")
        right = CliRunner().invoke(app, ["config"])
    assert isinstance(wrong.exception, InputError)
    assert "VLLM_MODEL=granite-soc-specialist, but vllm at" in str(wrong.exception)
    assert right.exit_code == 0


def test_a_backend_that_is_down_is_a_warning_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BASE_URL", f"http://127.0.0.1:{claim('127.0.0.1', 0)}")
    done = CliRunner().invoke(app, ["config", "--json"])
    assert done.exit_code == 0
    assert "connection refused" in done.output


def test_models_asks_every_backend_or_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving({"/v1/models": {"data": [{"id": "served", "max_model_len": 512}]}, "/health": b""}) as stub:
        monkeypatch.setenv("VLLM_BASE_URL", stub.url)
        one = json.loads(CliRunner().invoke(app, ["models", "--backend", "vllm", "--json"]).stdout)
        every = json.loads(CliRunner().invoke(app, ["models", "--json"]).stdout)
    assert [(s["name"], s["available"]) for s in one["vllm"]] == [("granite-soc-specialist", False), ("served", True)]
    assert set(every) == {"ollama", "vllm", "sglang", "llamacpp"}
    with pytest.raises(InputError, match="no backend 'tgi'"):
        CliRunner().invoke(app, ["models", "--backend", "tgi"], catch_exceptions=False)


def test_warmup_ends_with_an_error_when_nothing_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BASE_URL", f"http://127.0.0.1:{claim('127.0.0.1', 0)}")
    done = CliRunner().invoke(app, ["warmup"])
    assert isinstance(done.exception, EngineError)
    assert "connection refused" in str(done.exception)
