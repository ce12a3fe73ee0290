from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import config
from pipeline.doctor.serving import check, served_contradiction

pytestmark = pytest.mark.usefixtures("no_settings")


def _said(tmp_path: Path, text: str, environment: dict[str, str] | None = None) -> list[str]:
    path = tmp_path / ".env"
    path.write_text(text)
    return [
        f"{'error' if n.status == 'fail' else 'warning'}: {n.evidence}" for n in check(config.load(path), path, environment or {})
    ]


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("VLLM_BASEURL", "VLLM_BASE_URL"),
        ("OLAMA_BASE_URL", "OLLAMA_BASE_URL"),
        ("OPENAI_COMPATIBLE_URL", "OPENAI_COMPATIBLE_BASE_URL"),
        ("LLM_BACKENDS", "LLM_BACKEND"),
        ("VLLM_MODEL_NAME", "VLLM_MODEL"),
        ("LLAMA_CPP_MODEL", "LLAMACPP_MODEL"),
    ],
)
@pytest.mark.parametrize("where", ["file", "environment"])
def test_a_misspelt_variable_is_pointed_out_with_the_near_name(tmp_path: Path, wrong: str, near: str, where: str) -> None:
    said = _said(tmp_path, f"{wrong}=x\n") if where == "file" else _said(tmp_path, "", {wrong: "x"})
    assert said == [f"warning: {wrong} is set but nothing reads it: did you mean {near}?"]


@pytest.mark.parametrize("name", ["PATH", "VLLM_PYTHON", "VLLM_LOGGING_LEVEL", "OPENAI_API_KEY", "MODEL", "HF_HOME", "BASE_URL"])
def test_other_programs_variables_are_left_alone(tmp_path: Path, name: str) -> None:
    assert _said(tmp_path, "", {name: "x"}) == []


@pytest.mark.parametrize("name", ["VLLM_API_KEY", "LLAMA_API_KEY", "OLLAMA_MODELS", "OLLAMA_NUM_PARALLEL", "VLLM_CACHE_ROOT"])
@pytest.mark.parametrize("where", ["file", "environment"])
def test_what_the_engines_read_is_not_misspelt(tmp_path: Path, name: str, where: str) -> None:
    assert (_said(tmp_path, f"{name}=x\n") if where == "file" else _said(tmp_path, "", {name: "x"})) == []


def test_a_backend_without_url_or_model_names_both_sides(tmp_path: Path) -> None:
    assert _said(tmp_path, "LLM_BACKEND=openai\n") == [
        "error: LLM_BACKEND=openai, but OPENAI_COMPATIBLE_BASE_URL is empty: set OPENAI_COMPATIBLE_BASE_URL"
    ]
    assert _said(tmp_path, "LLM_BACKEND=openai\nOPENAI_COMPATIBLE_BASE_URL=http://127.0.0.1:1/v1\n") == [
        "error: LLM_BACKEND=openai, but OPENAI_COMPATIBLE_MODEL is empty: set OPENAI_COMPATIBLE_MODEL"
    ]
    assert _said(tmp_path, "LLM_BACKEND=sglang\n") == []


def test_two_engines_at_one_url(tmp_path: Path) -> None:
    assert _said(tmp_path, "LLAMACPP_BASE_URL=http://127.0.0.1:8003\n") == [
        "error: VLLM_BASE_URL and LLAMACPP_BASE_URL are both http://127.0.0.1:8003: two engines cannot answer there"
    ]


def test_a_url_that_is_none_is_shown_without_its_password(tmp_path: Path) -> None:
    assert _said(tmp_path, "VLLM_BASE_URL=ftp://me:planted@host\n") == [
        "error: VLLM_BASE_URL=ftp://********@host is not a URL: write http://host:port/v1"
    ]


def test_a_value_in_the_file_that_the_environment_hides(tmp_path: Path) -> None:
    [said] = _said(tmp_path, "LLM_BACKEND=ollama\nVLLM_MODEL=m\n", {"LLM_BACKEND": "vllm", "VLLM_MODEL": "m"})
    assert said.startswith("warning: LLM_BACKEND: the environment wins over ")
    assert said.endswith("so the value in the file is not used; unset LLM_BACKEND to use it")


def test_a_model_that_is_not_served_names_both_sides(tmp_path: Path) -> None:
    settings = config.load(tmp_path / "none")
    notice = served_contradiction(settings, ["a", "b"])
    assert notice is not None
    assert notice.evidence.startswith("VLLM_MODEL=granite-soc-specialist, but vllm at http://127.0.0.1:8003/v1 serves a, b: ")
    assert served_contradiction(settings, ["granite-soc-specialist"]) is None
