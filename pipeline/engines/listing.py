"""The models that a running server lists, as each engine's API tells them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.net.reach import Reached


@dataclass(frozen=True)
class Listed:
    """One model of a running server; ``path`` is the folder or file it says it loaded, ``size`` in bytes.

    ``digest`` tells a model from another one of the same name, where the server has digests.
    """

    name: str
    loaded: bool = True
    context: int | None = None
    size: int | None = None
    path: str = ""
    digest: str = ""
    adapter: bool = False


@dataclass(frozen=True)
class Listing:
    """What came of asking: ``models`` None when there was no list of models, and ``reached`` says why, and how long it took."""

    reached: Reached
    models: tuple[Listed, ...] | None


def openai_listing(reached: Reached) -> Listing:
    """The answer of ``/v1/models``, with what vLLM, llama.cpp and LM Studio add to OpenAI's fields."""
    listed = entries(reached, "data")
    return Listing(reached, None if listed is None else tuple(map(_openai_model, listed)))


def _openai_model(entry: Mapping[str, Any]) -> Listed:
    said = entry.get("meta")
    meta = said if isinstance(said, dict) else {}
    return Listed(
        name=str(entry.get("id", "")),
        loaded=str(entry["state"]) == "loaded" if "state" in entry else True,
        context=integer(entry.get("max_model_len")) or integer(entry.get("context_length")) or integer(meta.get("n_ctx_train")),
        size=integer(meta.get("size")),
        path=str(entry.get("root") or ""),
        adapter=bool(entry.get("parent")),
    )


def entries(reached: Reached, key: str) -> list[Mapping[str, Any]] | None:
    """The objects listed under a key of an answer, or None when there was no such answer."""
    if not reached.ok or not isinstance(reached.data, dict):
        return None
    listed = reached.data.get(key)
    if not isinstance(listed, list):
        # Ollama and LM Studio answer null for an empty list
        return [] if key in reached.data and listed is None else None
    return [entry for entry in listed if isinstance(entry, dict)]


def integer(value: object) -> int | None:
    """A whole number, else None: what a stranger's server says may be anything."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None
