"""What a conversation is by the time Ollama's Go path renders it: merged turns, re-made tool schemas, Go's JSON.

Each change is a function from conversation to conversation, so that an expected deviation is not just tolerated but
predicted: the chat template over the changed conversation must give the Go output to the byte.
Sources: Ollama's api/types.go and template/template.go (August 2026), Go's encoding/json.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipeline.prompts.conversation import Conversation

# A JSON string that stands for text which Go prints differently; swapped for it after rendering.
_OPEN, _CLOSE = "\U000f0001", "\U000f0002"
_MARK = re.compile(f'"{_OPEN}([0-9a-f]*){_CLOSE}"')
_ESCAPED = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
_PROPERTY_KEYS = ("anyOf", "type", "items", "description", "enum", "properties", "required")


def as_api(conversation: Conversation) -> Conversation:
    """Only what /api/chat can carry: text content (parts joined by a line end) and arguments as objects."""
    return replace(conversation, messages=tuple(map(_api_message, conversation.messages)))


def split_parts(conversation: Conversation) -> Conversation:
    """Every part of a content as a message of its own, as Ollama's ``/v1`` reads them; calls stay with the last."""
    return replace(conversation, messages=tuple(one for message in conversation.messages for one in _split(message)))


def merged(conversation: Conversation) -> Conversation:
    """Neighbouring turns of one role become one, an empty line between; tool results stay apart."""
    turns: list[dict[str, Any]] = []
    for message in conversation.messages:
        if turns and turns[-1]["role"] == message["role"] != "tool":
            turns[-1]["content"] += "\n\n" + message["content"]
        else:
            turns.append(dict(message))
    return replace(conversation, messages=tuple(turns))


def remade_tools(conversation: Conversation) -> Conversation:
    """Tools and call arguments after a pass through Ollama's types: known keys only, names sorted, Go's escapes."""
    tools = conversation.tools and tuple(map(_tool, conversation.tools))
    return replace(conversation, messages=tuple(map(_remade_calls, conversation.messages)), tools=tools)


def reordered_tools(conversation: Conversation) -> Conversation:
    """Tools after a pass through Ollama's types on the way to llama.cpp: known keys only, in its order."""
    return replace(conversation, tools=conversation.tools and tuple(map(_passed, conversation.tools)))


def sorted_arguments(conversation: Conversation) -> Conversation:
    """Call arguments on the way to llama.cpp: their own names keep their order, the maps inside are sorted."""
    return replace(conversation, messages=tuple(map(_sorted_call, conversation.messages)))


def restored(text: str) -> str:
    """Rendered text with each stand-in swapped for what Go prints."""
    return _MARK.sub(lambda found: bytes.fromhex(found.group(1)).decode("utf-8"), text)


def go_json(value: Any) -> str:
    """``json.Marshal``: no spaces, ``<``, ``>`` and ``&`` escaped, whole numbers without a point."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{go_json(name)}:{go_json(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(go_json, value)) + "]"
    text = json.dumps(_number(value), ensure_ascii=False)
    return "".join(_ESCAPED.get(char, char) for char in text) if isinstance(value, str) else text


def _raw(text: str) -> str:
    return f"{_OPEN}{text.encode('utf-8').hex()}{_CLOSE}"


def _number(value: Any) -> Any:
    """Go reads every JSON number as a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return int(float(value)) if float(value).is_integer() and abs(value) < 1e21 else float(value)


def joined(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message whose text parts are one text, with line ends between, as Granite's chat templates print them."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "\n".join(part["text"] for part in content if part.get("type") == "text")}


def _api_message(message: Mapping[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    made = {"tool_calls": list(map(_api_call, calls))} if calls else {}
    return {**message, "role": message["role"].lower(), "content": joined(message).get("content") or ""} | made


def _split(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    content = message.get("content")
    if not isinstance(content, list):
        return [message]
    texts = [part["text"] for part in content if part.get("type") == "text"]
    made = [{"role": message["role"], "content": text} for text in texts]
    return [*made[:-1], {**message, "content": texts[-1]}] if made else []


def _sorted_call(message: Mapping[str, Any]) -> Mapping[str, Any]:
    made = []
    for call in message.get("tool_calls") or ():
        arguments = {name: _deep(value) for name, value in call["function"]["arguments"].items()}
        made.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": made} if made else message


def _api_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    return {**call, "function": {**function, "arguments": arguments}}


def _remade_calls(message: Mapping[str, Any]) -> dict[str, Any]:
    functions = [call.get("function", call) for call in message.get("tool_calls") or ()]
    made = [{"function": {**function, "arguments": _sorted(function["arguments"])}} for function in functions]
    return {**message, "tool_calls": made} if made else dict(message)


def _sorted(value: Any) -> Any:
    """Maps sorted by name at every level, leaves as Go prints them; spaces come from the template."""
    if isinstance(value, Mapping):
        return {name: _sorted(item) for name, item in sorted(value.items())}
    if isinstance(value, list):
        return [_sorted(item) for item in value]
    return _leaf(value)


def _leaf(value: Any) -> Any:
    """A value that prints as Go prints it: itself, or a stand-in."""
    plain = json.dumps(value, ensure_ascii=False)
    return value if go_json(value) == plain else _raw(go_json(value))


def _tool(tool: Mapping[str, Any]) -> Any:
    """A tool as TEMPLATE prints it: spaced like the tokenizer's JSON when nothing would be lost, else compact."""
    function = tool.get("function", {})
    given = function.get("parameters") or {}
    properties = {name: _property(item) for name, item in sorted((given.get("properties") or {}).items())}
    if given.get("$defs") or given.get("items") or tool.get("items"):
        return _raw(go_json(_ollama_tool(tool, properties)))
    made: dict[str, Any] = {"name": _leaf(function.get("name", ""))}
    if function.get("description"):
        made["description"] = _leaf(function["description"])
    if given.get("type"):
        shown = {name: _shown(item) for name, item in properties.items()}
        made["parameters"] = {"type": _leaf(given["type"]), "properties": shown}
        if given.get("required"):
            made["parameters"]["required"] = [_leaf(name) for name in given["required"]]
    return {"type": _leaf(tool.get("type", "")), "function": made}


def _passed(tool: Mapping[str, Any]) -> dict[str, Any]:
    given = tool.get("function", {}).get("parameters") or {}
    properties = {name: _property(item) for name, item in (given.get("properties") or {}).items()}
    made = _ollama_tool(tool, properties if "properties" in given else None)
    if not made["function"]["description"]:
        del made["function"]["description"]
    return made


def _ollama_tool(tool: Mapping[str, Any], properties: Any) -> dict[str, Any]:
    function = tool.get("function", {})
    given = function.get("parameters") or {}
    required = {"required": given["required"]} if given.get("required") else {}
    extra = {name: given[name] for name in ("$defs", "items") if given.get(name)}
    parameters = {"type": given.get("type", ""), **_deep(extra), **required, "properties": properties}
    described = {"name": function.get("name", ""), "description": function.get("description", ""), "parameters": parameters}
    items = {"items": _deep(tool["items"])} if tool.get("items") else {}
    return {"type": tool.get("type", ""), **items, "function": described}


def _property(given: Mapping[str, Any]) -> dict[str, Any]:
    """A property as Ollama keeps it: its keys, in its order, empty ones left out."""
    made: dict[str, Any] = {}
    for name in _PROPERTY_KEYS:
        value = given.get(name)
        if not value:
            continue
        if name == "anyOf":
            value = [_property(item) for item in value]
        elif name == "properties":
            value = {key: _property(item) for key, item in value.items()}
        elif name == "type" and isinstance(value, list) and len(value) == 1:
            value = value[0]
        made[name] = _deep(value) if name in ("items", "enum") else value
    return made


def _deep(value: Any) -> Any:
    """A value of no known type: Go keeps it in maps, which print sorted."""
    if isinstance(value, Mapping):
        return {name: _deep(item) for name, item in sorted(value.items())}
    return [_deep(item) for item in value] if isinstance(value, list) else value


def _shown(kept: Mapping[str, Any]) -> Any:
    """The simple properties (type, description, enum) print spaced, all others compact."""
    if "type" not in kept or set(kept) - {"type", "description", "enum"}:
        return _raw(go_json(kept))
    made: dict[str, Any] = {name: _leaf(kept[name]) for name in ("type", "description") if name in kept}
    return made | ({"enum": list(map(_leaf, kept["enum"]))} if "enum" in kept else {})
