"""Inference engines: the one registry. Each is a class of facts and pure functions from plan to argv and environment."""

from collections.abc import Iterator
from importlib import import_module
from typing import TypeVar

from pipeline.engines.base import Availability, Engine, Launch
from pipeline.errors import InputError
from pipeline.prompts.conversation import NotApplicable, Prompt

E = TypeVar("E", bound=type[Engine])

# name -> class, or module:class, which is imported when it is asked for; in the order in which backends are listed and tried
_ENGINES: dict[str, type[Engine] | str] = {
    "ollama": "pipeline.engines.ollama:Ollama",
    "vllm": "pipeline.engines.vllm.engine:Vllm",
    "openai": "pipeline.engines.openai:OpenAiCompatible",
    "llamacpp": "pipeline.engines.llamacpp:LlamaCpp",
    "sglang": "pipeline.engines.sglang:Sglang",
}
# a view, so that engines registered later are in it
NAMES = _ENGINES.keys()


def register(engine: E) -> E:
    """Add an engine's class under its name; a decorator."""
    _ENGINES[engine.name] = engine
    return engine


def unregister(name: str) -> None:
    """Take an engine out again."""
    del _ENGINES[name]


def get(name: str) -> Engine:
    """The engine of that name; raises InputError listing the known ones."""
    found = _ENGINES.get(name)
    if found is None:
        raise InputError(f"no engine {name!r}", remedy="known engines: " + ", ".join(NAMES))
    if isinstance(found, str):
        module, _, kind = found.partition(":")
        found = getattr(import_module(module), kind)
        assert not isinstance(found, str)
    return found()


def every() -> Iterator[Engine]:
    """All engines, in the registry's order."""
    return map(get, NAMES)


__all__ = ["NAMES", "Availability", "Engine", "Launch", "NotApplicable", "Prompt", "every", "get", "register", "unregister"]
