"""Settings from the environment and ``.env``: the documented variables, their defaults and where each value came from."""

import os
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PrivateAttr, SecretStr, ValidationError
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

from pipeline import engines
from pipeline.errors import InputError
from pipeline.runs.files import read_utf8
from pipeline.runs.text import mask, without_password

Strategy = Literal["local-first", "cloud-first", "cheapest"]
ENV_FILE = Path(".env")
_NO_KEY = SecretStr("")


def _known(name: str) -> str:
    *others, last = map(repr, engines.NAMES)
    if name not in engines.NAMES:
        raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": f"{', '.join(others)} or {last}"})
    return name


Backend = Annotated[str, AfterValidator(_known)]


class Settings(BaseSettings):
    """Every documented variable; the field name in capitals is the variable's name."""

    # an empty variable, as in a copied .env.example or a compose file, means "not set"
    model_config = SettingsConfigDict(
        env_file=ENV_FILE, env_file_encoding="utf-8-sig", env_ignore_empty=True, extra="ignore", frozen=True
    )

    llm_backend: Backend = Field("vllm", description="the backend that applications use; also serve without an engine")
    ollama_base_url: str = Field("http://127.0.0.1:11434", description="where Ollama is looked for; unset: at OLLAMA_HOST")
    ollama_host: str = Field("", description="Ollama's own variable for its address: host, host:port or a URL")
    ollama_remote_ok: bool = Field(False, description="whether a model may be sent to an Ollama on another machine")
    ollama_model: str = Field("granite-soc:latest", description="model asked of Ollama, and the name serve ollama creates")
    ollama_orchestrator_model: str = Field("", description="orchestrator's model in Ollama; empty: the same")
    vllm_base_url: str = Field("http://127.0.0.1:8003/v1", description="where vLLM is looked for")
    vllm_model: str = Field("granite-soc-specialist", description="model asked of vLLM, and the name serve vllm gives it")
    vllm_orchestrator_model: str = Field("", description="orchestrator's model in vLLM; empty: the same")
    vllm_gpu_memory_util: float | None = Field(None, gt=0, le=1, description="share of GPU memory vLLM takes; empty: planned")
    vllm_max_model_len: int | None = Field(None, gt=0, description="vLLM's context in tokens; empty: planned")
    vllm_tensor_parallel: int | None = Field(None, gt=0, description="GPUs vLLM splits a model over; empty: planned")
    vllm_api_key: SecretStr = Field(_NO_KEY, description="key a vLLM started here asks for, sent to it and to no other")
    openai_compatible_base_url: str = Field("", description="any OpenAI-compatible endpoint: TGI, LM Studio, a hosted model")
    openai_compatible_model: str = Field("", description="model asked of that endpoint")
    openai_compatible_orchestrator_model: str = Field("", description="orchestrator's model there; empty: the same")
    openai_compatible_api_key: SecretStr = Field(_NO_KEY, description="key sent to that endpoint, and to no other")
    sglang_base_url: str = Field("http://127.0.0.1:8004/v1", description="where SGLang is looked for")
    sglang_model: str = Field("granite-soc", description="model asked of SGLang, and the name serve sglang gives it")
    sglang_max_model_len: int | None = Field(None, gt=0, description="SGLang's context in tokens; empty: planned")
    llamacpp_base_url: str = Field("http://127.0.0.1:8005/v1", description="where llama.cpp is looked for")
    llamacpp_model: str = Field("granite-soc", description="model asked of llama.cpp, and the name serve llamacpp gives it")
    llamacpp_ctx_size: int | None = Field(None, gt=0, description="llama.cpp's context, all slots together; empty: planned")
    llamacpp_parallel: int | None = Field(None, gt=0, description="requests llama.cpp computes at once; empty: planned")
    llama_api_key: SecretStr = Field(_NO_KEY, description="key a llama.cpp started here asks for, sent to it and to no other")
    gateway_api_key: SecretStr = Field(_NO_KEY, description="key the gateway asks of its clients; empty: none")
    gateway_strategy: Strategy = Field("local-first", description="which backend the gateway asks first")
    agents_file: Path = Field(Path("agents.yaml"), description="which run each agent uses, and what the gateway may do")
    hf_token: SecretStr = Field(_NO_KEY, description="hub token for gated or private models")
    # the env file's lines, for an engine whose variables are not among these fields
    _file: dict[str, str | None] = PrivateAttr(default_factory=dict)

    def overrides(self, engine: str) -> dict[str, str]:
        """The planning overrides these variables hold for an engine, by flag name."""
        held = {flag: self._value(variable) for variable, flag in engines.get(engine).settings.items()}
        return {flag: value for flag, value in held.items() if value}

    def address(self, backend: str = "") -> "Address":
        """Where a backend (default: the one in ``LLM_BACKEND``) answers, and the models asked of it."""
        engine = engines.get(backend or self.llm_backend)
        model = self._value(f"{engine.prefix}_MODEL", engine.default_model)
        orchestrator = self._value(f"{engine.prefix}_ORCHESTRATOR_MODEL") or model
        ours = f"{engine.prefix}_BASE_URL"
        url = self._given(ours) or self._given(engine.host_variable) or self._value(ours, engine.url())
        return Address(engine.name, engine.as_url(url), model, orchestrator, SecretStr(self._value(engine.key_variable)))

    def named_servers(self, backend: str) -> dict[str, str]:
        """The variables that say where a backend's server is, unless it is the default, with the URL that each means."""
        engine = engines.get(backend)
        given = {name: self._given(name) for name in (f"{engine.prefix}_BASE_URL", engine.host_variable) if name}
        return {name: engine.as_url(value) for name, value in given.items() if value}

    def remote_ok(self, backend: str) -> bool:
        """Whether a model may be sent to a server of this backend on another machine."""
        return self._value(f"{engines.get(backend).prefix}_REMOTE_OK").lower() in ("1", "true", "yes", "on")

    def _given(self, variable: str) -> str:
        """As :meth:`_value`, "" for one that says nothing beyond its default, as in a copied .env.example."""
        field, value = Settings.model_fields.get(variable.lower()), self._value(variable)
        return "" if field and value == field.default else value

    def _value(self, variable: str, default: str = "") -> str:
        """A variable as text, "" for none; one that is not documented is read too, so that a new engine needs no field here."""
        if variable.lower() in Settings.model_fields:
            value = getattr(self, variable.lower())
            return value.get_secret_value() if isinstance(value, SecretStr) else "" if value is None else str(value)
        return os.environ.get(variable) or self._file.get(variable) or default

    def key(self, backend: str) -> str:
        """The key that a server of this backend asks for; empty for none."""
        return self.address(backend).api_key.get_secret_value()


@dataclass(frozen=True)
class Address:
    """One backend as applications reach it: its URL as configured, its models, its key."""

    backend: str
    base_url: str
    model: str
    orchestrator_model: str
    api_key: SecretStr = _NO_KEY

    @property
    def root(self) -> str:
        """The server's URL without ``/v1``."""
        return root_url(self.base_url)

    @property
    def key(self) -> str:
        """The key for OpenAI clients, which refuse to start without one; "none" where the backend asks for none."""
        return self.api_key.get_secret_value() or "none"

    @property
    def v1(self) -> str:
        """The URL that OpenAI clients are given."""
        return f"{self.root}/v1"


def root_url(url: str) -> str:
    """A server's URL without a trailing slash or ``/v1``: variables are written both ways."""
    return url.strip().rstrip("/").removesuffix("/v1").rstrip("/")


@dataclass(frozen=True)
class Resolved:
    """One setting as it is in force; secrets are masked."""

    name: str
    value: str
    source: Literal["default", ".env", "environment"]
    description: str


def check_env_file(path: Path = ENV_FILE) -> None:
    """Raise InputError with the line when an env file cannot be read as one; a missing file is fine."""
    from dotenv.parser import parse_stream

    if not path.is_file():
        return
    text = read_utf8(path)
    if "\0" in text:
        raise InputError(f"{path}:{text[: text.index(chr(0))].count(chr(10)) + 1}: contains a NUL character")
    for binding in parse_stream(StringIO(text.removeprefix("\ufeff"))):
        if binding.error:
            remedy = "one assignment a line; put a value with spaces, # or quotes in quotes and close them"
            raise InputError(f"{path}:{binding.original.line}: not NAME=VALUE", remedy=remedy)


def load(env_file: Path = ENV_FILE) -> Settings:
    """Read the settings; raises InputError naming each variable that does not fit."""
    check_env_file(env_file)
    try:
        settings = Settings(_env_file=env_file)
    except ValidationError as error:
        lines = [f"{str(e['loc'][0]).upper()}={mask(str(e['input']))[:200]!r}: {e['msg']}" for e in error.errors()]
        remedy = f"correct it in {env_file} or the environment"
        raise InputError("a setting has an unusable value", evidence="\n".join(lines), remedy=remedy) from None
    settings._file = {name: value for name, value in _in_file(env_file).items() if name.lower() not in Settings.model_fields}
    return settings


def _in_file(env_file: Path) -> dict[str, str | None]:
    from dotenv import dotenv_values

    return dotenv_values(env_file, encoding="utf-8-sig") if env_file.is_file() else {}


def key_variables() -> dict[str, str]:
    """The variables that hold keys of servers, by engine."""
    return {engine.name: engine.key_variable for engine in engines.every() if engine.key_variable}


def resolved(env_file: Path = ENV_FILE) -> list[Resolved]:
    """Every setting with its value and source, in documented order."""
    settings, in_file, rows = load(env_file), _in_file(env_file), []
    for key, info in Settings.model_fields.items():
        name, value = key.upper(), settings._value(key.upper())
        secret = isinstance(getattr(settings, key), SecretStr)
        shown = value and "********" if secret else without_password(value)
        source = _source(os.environ.get(name), in_file.get(name))
        rows.append(Resolved(name, shown, source, info.description or ""))
    return rows


def _source(environment: str | None, in_file: str | None) -> Literal["default", ".env", "environment"]:
    """Where a value comes from; the command line loads the file into the environment, so equal values are the file's."""
    if environment and environment != in_file:
        return "environment"
    return ".env" if in_file else "default"
