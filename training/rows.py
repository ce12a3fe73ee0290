"""The value types of a dataset, and what makes two prompts the same."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One conversation to train on. ``where`` is file:line; ``tools`` are JSON schemas the conversation may call."""

    messages: tuple[dict[str, Any], ...]
    where: str
    tools: tuple[dict[str, Any], ...] | None = None


@dataclass(frozen=True)
class Refusal:
    """A row that was not taken, where it is and why."""

    where: str
    reason: str


@dataclass(frozen=True)
class Dataset:
    """What was read: ``sha256`` is of the file's bytes, or of the rows for a hub dataset.

    ``format`` is one of formats.UNDERSTOOD, or 'unknown' when every row was refused before a format could be told;
    ``ignored`` names columns and message keys that are not used.
    """

    source: str
    format: str
    rows: tuple[Row, ...]
    refused: tuple[Refusal, ...]
    sha256: str
    ignored: tuple[str, ...] = ()


def showable(text: str, limit: int = 300) -> str:
    """Text from a file as it can be printed: no lone surrogates, and cut at ``limit`` characters."""
    cut = text if len(text) <= limit else text[:limit] + "..."
    return cut.encode("utf-8", "replace").decode()


def digest(messages: tuple[dict[str, Any], ...], tools: Any = None) -> str:
    """Hex SHA-256 of messages exactly as they are."""
    return hashlib.sha256(json.dumps([messages, tools], sort_keys=True).encode()).hexdigest()


def prompt_keys(row: Row) -> list[str]:
    """A key for the prompt before each assistant turn, shortest first; case and white space do not count."""
    running = hashlib.sha256()
    keys = []
    for message in row.messages:
        if message["role"] == "assistant":
            keys.append(running.hexdigest())
        calls = json.dumps(message.get("tool_calls"), sort_keys=True)
        running.update(json.dumps([message["role"], _fold(message["content"]), calls]).encode())
    return keys


def prompt_key(row: Row) -> str:
    """The key of the prompt that the last assistant turn answers."""
    return prompt_keys(row)[-1]


def _fold(text: str) -> str:
    return " ".join(text.casefold().split())
