"""Conversations that prompts are compared on: the suite in ``conversations/`` and users' own message files."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.runs.files import read_json

_KEYS = {"id", "messages", "tools", "documents", "continue"}


@dataclass(frozen=True)
class Conversation:
    """Messages, tools and documents as a client sends them; ``continued`` = the last (assistant) message goes on."""

    id: str
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    documents: tuple[Mapping[str, Any], ...] | None = None
    continued: bool = False

    def opened(self, system: str) -> "Conversation":
        """With this system message (empty: none) before a conversation that does not begin with one of its own."""
        if not system or (self.messages and self.messages[0]["role"].lower() == "system"):
            return self
        return replace(self, messages=({"role": "system", "content": system}, *self.messages))

    @property
    def ending(self) -> dict[str, Any]:
        """How chat templates are told whether an answer begins or the last message goes on."""
        return {"add_generation_prompt": not self.continued, "continue_final_message": self.continued}


def load_suite() -> list[Conversation]:
    """Every conversation of the suite, in the order of the files' names."""
    folder = Path(__file__).parent / "conversations"
    return [conversation for path in sorted(folder.glob("*.json")) for conversation in load_file(path)]


def load_file(path: Path) -> list[Conversation]:
    """Conversations of one JSON file; a content ``{"repeat": text, "times": n}`` stands for a long text."""
    return [_conversation(entry, f"{path}, entry {number}") for number, entry in enumerate(read_json(path), 1)]


def read_messages(path: Path) -> tuple[Mapping[str, Any], ...]:
    """A user's own JSON file: a list of messages, or an object with ``messages``."""
    value = read_json(path)
    return _checked(value.get("messages") if isinstance(value, dict) else value, str(path))


def read_tools(path: Path) -> tuple[Mapping[str, Any], ...]:
    """A user's own JSON file: a list of tools in OpenAI's form, or an object with ``tools``."""
    value = read_json(path)
    tools = value.get("tools") if isinstance(value, dict) else value
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f"{path}: expected a JSON list of tools")
    return tuple(tools)


def _conversation(entry: Mapping[str, Any], where: str) -> Conversation:
    if unknown := set(entry) - _KEYS:
        raise InputError(f"{where}: unknown key {', '.join(sorted(unknown))}")
    messages = []
    for message in _checked(entry.get("messages"), where):
        content = message.get("content")
        written = str(content["repeat"]) * int(content["times"]) if isinstance(content, dict) else content
        messages.append({**message, "content": written})
    tools, documents = (tuple(entry[name]) if entry.get(name) else None for name in ("tools", "documents"))
    return Conversation(entry["id"], tuple(messages), tools, documents, bool(entry.get("continue")))


def _checked(messages: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: expected a JSON list of messages")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(f"{where}: message {number} is not an object with a role")
    return tuple(messages)


@dataclass(frozen=True)
class Prompt:
    """What an engine feeds the model: token IDs where it tells them, and the text where it tells that."""

    text: str | None = None
    ids: tuple[int, ...] | None = None


class NotApplicable(Exception):
    """The engine's API cannot express this conversation; the message says what it lacks."""


def openai_body(conversation: Conversation) -> dict[str, Any]:
    """The conversation as OpenAI's chat API carries it; documents go to the chat template by its keyword arguments."""
    body: dict[str, Any] = {"messages": [_openai_message(message) for message in conversation.messages]}
    if conversation.tools:
        body["tools"] = list(conversation.tools)
    if conversation.documents:
        body["chat_template_kwargs"] = {"documents": list(conversation.documents)}
    return body


def _openai_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's form: call arguments are a JSON string, and every call has the type and the ID that servers insist on."""
    made = []
    for number, call in enumerate(message.get("tool_calls") or ()):
        function = call.get("function", call)
        arguments = function.get("arguments") or {}
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        named = {"type": "function", "id": f"call_{number}"} | {key: call[key] for key in ("type", "id") if call.get(key)}
        made.append({**named, "function": {"name": function["name"], "arguments": text}})
    return {**message, "tool_calls": made} if made else dict(message)
