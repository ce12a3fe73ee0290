"""Settings from the environment and ``.env``: the documented variables, their defaults and where each value came from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from pipeline.errors import InputError

Backend = Literal["ollama", "vllm", "openai", "llamacpp", "sglang"]
ENV_FILE = Path(".env")


class Settings(BaseSettings):
    """Every documented variable; the field name in capitals is the variable's name."""

    # an empty variable, as in a copied .env.example or a compose file, means "not set"
    model_config = SettingsConfigDict(
        env_file=ENV_FILE, env_file_encoding="utf-8", env_ignore_empty=True, extra="ignore", frozen=True
    )

    llm_backend: Backend = Field("vllm", description="backend that applications use")
    ollama_base_url: str = Field("http://127.0.0.1:11434", description="where Ollama answers")
    ollama_model: str = Field("granite-soc:latest", description="model name in Ollama")
    ollama_orchestrator_model: str = Field("", description="orchestrator's model in Ollama; empty: the same")
    vllm_base_url: str = Field("http://127.0.0.1:8003/v1", description="where vLLM answers")
    vllm_model: str = Field("granite-soc-specialist", description="name vLLM serves the model under")
    vllm_orchestrator_model: str = Field("", description="orchestrator's model in vLLM; empty: the same")
    vllm_gpu_memory_util: float | None = Field(None, gt=0, le=1, description="share of GPU memory; empty: planned")
    vllm_max_model_len: int | None = Field(None, gt=0, description="context in tokens; empty: planned")
    vllm_tensor_parallel: int | None = Field(None, gt=0, description="GPUs for one model; empty: planned")
    openai_compatible_base_url: str = Field("", description="any OpenAI-compatible endpoint")
    openai_compatible_model: str = Field("", description="model name there")
    openai_compatible_orchestrator_model: str = Field("", description="orchestrator's model there; empty: the same")
    openai_compatible_api_key: SecretStr = Field(SecretStr(""), description="its key")
    sglang_model: str = Field("", description="name SGLang serves the model under")
    sglang_max_model_len: int | None = Field(None, gt=0, description="context in tokens; empty: planned")
    llamacpp_model: str = Field("granite-soc", description="name llama.cpp serves the model under")
    llamacpp_ctx_size: int | None = Field(None, gt=0, description="context of all slots together; empty: planned")
    llamacpp_parallel: int | None = Field(None, gt=0, description="requests served at once; empty: planned")
    hf_token: SecretStr = Field(SecretStr(""), description="hub token for gated or private models")

    def overrides(self, engine: str) -> dict[str, str]:
        """The planning overrides these variables hold for an engine, by flag name."""
        named: dict[str, dict[str, float | int | None]] = {
            "vllm": {
                "gpu-memory-utilization": self.vllm_gpu_memory_util,
                "max-model-len": self.vllm_max_model_len,
                "tensor-parallel-size": self.vllm_tensor_parallel,
            },
            "sglang": {"context-length": self.sglang_max_model_len},
            "llamacpp": {"ctx-size": self.llamacpp_ctx_size, "parallel": self.llamacpp_parallel},
        }
        return {flag: str(value) for flag, value in named.get(engine, {}).items() if value is not None}


@dataclass(frozen=True)
class Resolved:
    """One setting as it is in force; secrets are masked."""

    name: str
    value: str
    source: Literal["default", ".env", "environment"]
    description: str


def load(env_file: Path = ENV_FILE) -> Settings:
    """Read the settings; raises InputError naming each variable that does not fit."""
    try:
        return Settings(_env_file=env_file)
    except ValidationError as error:
        lines = [f"{str(e['loc'][0]).upper()}={e['input']!r}: {e['msg']}" for e in error.errors()]
        raise InputError(
            "a setting has an unusable value", evidence="\n".join(lines), remedy=f"correct it in {env_file} or the environment"
        ) from None


def resolved(env_file: Path = ENV_FILE) -> list[Resolved]:
    """Every setting with its value and source, in documented order."""
    from dotenv import dotenv_values

    settings, in_file = load(env_file), dotenv_values(env_file) if env_file.is_file() else {}
    rows = []
    for field, info in Settings.model_fields.items():
        value, name = getattr(settings, field), field.upper()
        shown = (
            ("********" if value.get_secret_value() else "")
            if isinstance(value, SecretStr)
            else str("" if value is None else value)
        )
        source = "environment" if os.environ.get(name) else ".env" if in_file.get(name) else "default"
        rows.append(Resolved(name, shown, cast(Literal["default", ".env", "environment"], source), info.description or ""))
    return rows
