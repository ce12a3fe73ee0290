"""Dataset formats: which one a row's columns are, and the row as chat messages.

    messages           [{"role", "content", "tool_calls"?, ...}]      OpenAI chat
    conversations      [{"from", "value"}]                           ShareGPT
    prompt/completion  two strings, or two lists of messages          TRL
    alpaca             instruction, input, output, system             Stanford Alpaca

What comes out has the roles system, user, assistant and tool, text content, and tool-call arguments as objects.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training.datasets.sources import parse

Message = dict[str, Any]

UNDERSTOOD = {
    "messages": (("messages",), ("tools",)),
    "conversations": (("conversations",), ("tools", "system")),
    "prompt/completion": (("prompt", "completion"), ("tools", "system")),
    "alpaca": (("instruction", "output"), ("input", "system")),
}
"""Each format's columns: those a row must have, those it may have."""

_ROLES = {"human": "user", "gpt": "assistant", "developer": "system", "observation": "tool"}
_ROLES |= {role: role for role in ("system", "user", "assistant", "tool")}
_KEPT = ("name", "tool_calls", "tool_call_id")
_MAY_FOLLOW: dict[str | None, tuple[str, ...]] = {None: ("system", "user"), "system": ("user",), "user": ("assistant",)}
_MAY_FOLLOW |= {"assistant": ("user", "tool"), "tool": ("tool", "assistant")}
_DEPTH = 64


class RowError(ValueError):
    """A row cannot be trained on; the text is the reason."""


@dataclass(frozen=True)
class Converted:
    """A row as messages, its tools, and what of it was not used (columns, and ``messages[].key``)."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None
    ignored: frozenset[str]


def detect(columns: Mapping[str, Any]) -> str | None:
    """The format whose required columns are all there, None when there is none; ``messages`` wins over the others."""
    return next((name for name, (needed, _) in UNDERSTOOD.items() if all(c in columns for c in needed)), None)


def convert(name: str, row: Mapping[str, Any]) -> Converted:
    """A row of the named format as checked messages; raises RowError with the reason."""
    needed, optional = UNDERSTOOD[name]
    if missing := [column for column in needed if column not in row]:
        raise RowError(f"has no {' and no '.join(map(repr, missing))} (columns: {', '.join(map(str, row)) or 'none'})")
    ignored = {str(column) for column in row if column not in (*needed, *optional)}
    messages = [_message(turn, number, ignored) for number, turn in enumerate(_turns(name, row), 1)]
    tools = _tools(row.get("tools")) if "tools" in optional else None
    _check_order(messages)
    _check_text([messages, tools])
    return Converted(tuple(messages), tools, frozenset(ignored))


def _turns(name: str, row: Mapping[str, Any]) -> list[Any]:
    """A row's turns as they are written, the row's system message before them unless they begin with one."""
    if name == "messages":
        return _list(row["messages"], "messages")
    if name == "conversations":
        turns = _list(row["conversations"], "conversations")
    elif name == "alpaca":
        asked, given = _text(row, "instruction"), _text(row, "input")
        both = {"user": f"{asked}\n\n{given}" if given else asked, "assistant": _text(row, "output")}
        turns = [{"role": role, "content": text} for role, text in both.items()]
    else:
        turns = [*_part(row, "prompt", "user"), *_part(row, "completion", "assistant")]
    first = turns[0]
    if isinstance(first, dict) and _ROLES.get(str(first.get("role", first.get("from")))) == "system":
        return turns
    system = _text(row, "system")
    return [{"role": "system", "content": system}, *turns] if system.strip() else turns


def _part(row: Mapping[str, Any], column: str, role: str) -> list[Any]:
    """One side of TRL's pair: a list of messages, or the text of one."""
    return _list(row[column], column) if isinstance(row[column], list) else [{"role": role, "content": _text(row, column)}]


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError(f"{column!r} must be text, this is {type(value).__name__}")
    return value


def _list(value: Any, column: str) -> list[Any]:
    """A list of turns or tools; CSV and some Parquet files hold it as JSON text."""
    value = _parsed(value, f"{column!r} is")
    if not isinstance(value, list):
        raise RowError(f"{column!r} must be a list, this is {type(value).__name__}")
    if not value:
        raise RowError(f"{column!r} is empty")
    return value


def _parsed(value: Any, what: str) -> Any:
    """What a JSON text says, any other value as it is; ``what`` begins the reason when the text is no JSON."""
    try:
        return parse(value) if isinstance(value, str) else value
    except ValueError as error:
        raise RowError(f"{what} {error}") from None


def _function(entry: Any) -> dict[str, Any] | None:
    """The named function of a tool or of a tool call, in OpenAI's wrapping or without it; None when it has no name."""
    function = entry.get("function", entry) if isinstance(entry, dict) else None
    return function if isinstance(function, dict) and isinstance(function.get("name"), str) else None


def _message(turn: Any, number: int, ignored: set[str]) -> Message:
    if not isinstance(turn, dict):
        raise RowError(f"turn {number} must be an object, this is {type(turn).__name__}")
    role_key, text_key = ("role", "content") if "role" in turn else ("from", "value")
    if role_key not in turn:
        raise RowError(f"turn {number} has no 'role' (keys: {', '.join(map(str, turn)) or 'none'})")
    role = _ROLES.get(turn[role_key]) if isinstance(turn[role_key], str) else None
    if role is None:
        raise RowError(f"turn {number} has the unknown role {turn[role_key]!r}; known: {', '.join(_ROLES)}")
    ignored |= {f"messages[].{key}" for key in turn if key not in (role_key, text_key, *_KEPT)}
    message: Message = {"role": role, "content": _content(turn.get(text_key), number)}
    for key in _KEPT:
        if turn.get(key):
            message[key] = _calls(turn[key], number) if key == "tool_calls" else turn[key]
    if "tool_calls" in message and role != "assistant":
        raise RowError(f"turn {number} has tool_calls, but its role is {role}")
    if role in ("user", "assistant") and not message["content"].strip() and "tool_calls" not in message:
        raise RowError(f"turn {number} ({role}) is empty")
    return message


def _content(value: Any, number: int) -> str:
    """Text, or a list of text parts joined by newlines; None counts as empty."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise RowError(f"turn {number}: content must be text, this is {type(value).__name__}")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RowError(f"turn {number} has a content part of type {kind!r}; only text can be trained on")
        texts.append(part["text"])
    return "\n".join(texts)


def _calls(value: Any, number: int) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's shape, the arguments parsed: a chat template writes an object, a string it would quote."""
    calls = []
    for call in _list(value, "tool_calls"):
        function = _function(call)
        if not function or not function["name"]:
            raise RowError(f"turn {number} has a tool call without a function name")
        what = f"turn {number}: the arguments of {function['name']}"
        arguments = _parsed(function.get("arguments") or {}, f"{what} are")
        if not isinstance(arguments, dict):
            raise RowError(f"{what} must be an object")
        known = {"id": call["id"]} if call.get("id") else {}
        calls.append({**known, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls


def _tools(value: Any) -> tuple[dict[str, Any], ...] | None:
    if value is None or value in ("", "[]", []):
        return None
    tools = _list(value, "tools")
    if not all(map(_function, tools)):
        raise RowError("'tools' has an entry without a function name")
    return tuple(tools)


def _check_order(messages: list[Message]) -> None:
    """System only first, then user and assistant in turn, tool results after the assistant, an answer at the end."""
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise RowError("has no assistant turn, so there is nothing to learn from")
    if roles[-1] != "assistant":
        raise RowError(f"ends with a {roles[-1]} turn; the last turn must be the assistant's")
    for number, (before, role) in enumerate(zip([None, *roles], roles, strict=False), 1):
        if role not in _MAY_FOLLOW[before]:
            place = f"after {'an' if before == 'assistant' else 'a'} {before} turn" if before else "as the first turn"
            raise RowError(f"turn {number} is {role} {place}; expected {' or '.join(_MAY_FOLLOW[before])}")


def _check_text(value: Any) -> None:
    """Refuse what a tokenizer or template stumbles over: NUL, text that is not UTF-8, deep nesting, dates."""
    stack = [(value, 0)]  # a loop, because the input decides the depth
    while stack:
        item, depth = stack.pop()
        if depth > _DEPTH:
            raise RowError(f"is nested more than {_DEPTH} levels deep")
        if isinstance(item, str):
            if "\0" in item:
                raise RowError("contains a NUL character")
            try:
                item.encode()
            except UnicodeEncodeError:
                raise RowError("is not valid UTF-8") from None
        elif isinstance(item, dict | list | tuple):
            parts = [part for pair in item.items() for part in pair] if isinstance(item, dict) else item
            stack += [(part, depth + 1) for part in parts]
        elif not isinstance(item, int | float | None):
            raise RowError(f"holds a value that JSON cannot ({type(item).__name__})")
