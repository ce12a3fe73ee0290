"""Inference engines: pure functions from plan to argv and environment, and how to ask each for its rendered prompt."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.engines.base import Availability, Engine, Launch
from pipeline.errors import InputError
from pipeline.prompts.conversation import NotApplicable, Prompt


def _vllm() -> Engine:
    from pipeline.engines.vllm.engine import Vllm

    return Vllm()


def _llamacpp() -> Engine:
    from pipeline.engines.llamacpp import LlamaCpp

    return LlamaCpp()


def _ollama() -> Engine:
    from pipeline.engines.ollama import Ollama

    return Ollama()


def _sglang() -> Engine:
    from pipeline.engines.sglang import Sglang

    return Sglang()


def _openai() -> Engine:
    from pipeline.engines.openai import OpenAiCompatible

    return OpenAiCompatible()


_ENGINES: dict[str, Callable[[], Engine]] = {
    "vllm": _vllm,
    "llamacpp": _llamacpp,
    "ollama": _ollama,
    "sglang": _sglang,
    "openai": _openai,
}
NAMES = tuple(_ENGINES)


def get(name: str) -> Engine:
    """The engine of that name; raises InputError listing the known ones."""
    if name not in _ENGINES:
        raise InputError(f"no engine {name!r}", remedy="known engines: " + ", ".join(NAMES))
    return _ENGINES[name]()


__all__ = ["NAMES", "Availability", "Engine", "Launch", "NotApplicable", "Prompt", "get"]
