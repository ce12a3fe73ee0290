from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import config, engines
from pipeline.errors import InputError
from pipeline.machine.named import hardware_from
from pipeline.model.model import Model
from pipeline.planning.plan import Request

pytestmark = pytest.mark.usefixtures("no_settings")


def _env(tmp_path: Path, text: str) -> Path:
    path = tmp_path / ".env"
    path.write_text(text)
    return path


def test_environment_wins_over_file_wins_over_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _env(tmp_path, "LLM_BACKEND=ollama\nVLLM_MODEL='from file'\n")
    monkeypatch.setenv("LLM_BACKEND", "llamacpp")
    rows = {row.name: (row.value, row.source) for row in config.resolved(path)}
    assert rows["LLM_BACKEND"] == ("llamacpp", "environment")
    assert rows["VLLM_MODEL"] == ("from file", ".env")
    assert rows["OLLAMA_BASE_URL"] == ("http://127.0.0.1:11434", "default")


def test_empty_means_not_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MAX_MODEL_LEN", "")
    assert config.load(_env(tmp_path, "VLLM_TENSOR_PARALLEL=\n")).overrides("vllm") == {}


def test_overrides_name_the_engines_flags(tmp_path: Path) -> None:
    settings = config.load(_env(tmp_path, "VLLM_GPU_MEMORY_UTIL=0.8\nVLLM_MAX_MODEL_LEN=4096\nLLAMACPP_PARALLEL=4\n"))
    assert settings.overrides("vllm") == {"gpu-memory-utilization": "0.8", "max-model-len": "4096"}
    assert settings.overrides("llamacpp") == {"parallel": "4"}


@pytest.mark.parametrize("line", ["LLM_BACKEND=tgi", "VLLM_GPU_MEMORY_UTIL=1.5", "VLLM_MAX_MODEL_LEN=long"])
def test_a_wrong_value_names_its_variable(tmp_path: Path, line: str) -> None:
    with pytest.raises(InputError, match="a setting has an unusable value") as caught:
        config.load(_env(tmp_path, line + "\n"))
    assert line.split("=")[0] in caught.value.evidence


def test_secrets_are_masked(tmp_path: Path) -> None:
    path = _env(tmp_path, "HF_TOKEN=hf_secret\nOPENAI_COMPATIBLE_API_KEY=sk-secret\n")
    assert "secret" not in repr(config.load(path))
    assert "secret" not in repr(config.resolved(path))


def test_the_example_file_holds_every_variable_and_loads(tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / ".env.example"
    names = {line.split("=")[0] for line in example.read_text().splitlines() if line and not line.startswith("#")}
    assert names == {name.upper() for name in config.Settings.model_fields}
    assert config.load(example) == config.load(tmp_path / "none")


def test_what_an_engine_declares_is_what_is_documented() -> None:
    for engine in engines.every():
        assert config.Settings.model_fields[f"{engine.prefix}_BASE_URL".lower()].default == engine.url()
        assert config.Settings.model_fields[f"{engine.prefix}_MODEL".lower()].default == engine.default_model
        assert {name.lower() for name in (*engine.settings, engine.key_variable) if name} <= set(config.Settings.model_fields)


@pytest.mark.parametrize(
    ("variable", "engine", "flag", "value"),
    [
        ("SGLANG_MAX_MODEL_LEN", "sglang", "--context-length", "3072"),
        ("LLAMACPP_CTX_SIZE", "llamacpp", "-c", "3072"),
        ("VLLM_TENSOR_PARALLEL", "vllm", "--tensor-parallel-size", "2"),
    ],
)
def test_a_documented_variable_reaches_the_plan(tmp_path: Path, variable: str, engine: str, flag: str, value: str) -> None:
    env = tmp_path / ".env"
    env.write_text(f"{variable}={value}\n")
    given = config.load(env).overrides(engine)
    made = engines.get(engine).plan(Request(Model.from_shape("granite-4.1-8b"), hardware_from("2xa10g"), "serve", "m", given))
    found = next(setting for setting in made.flags if setting.name == flag)
    assert (found.value, found.source) == (value, "user")
