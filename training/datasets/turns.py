"""One turn of a conversation as a chat message, and whether the turns can follow each other.

What comes out has the roles system, user, assistant and tool, text content, calls in OpenAI's shape with arguments as objects, a
thought as ``reasoning_content`` and ``weight`` 0 on a turn that is not learned from.
"""

import ast
import json
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from pipeline.model.toolcalls import plain_calls, read_calls
from training.datasets.keys import Fate, RowError, says_nothing, turn_keys
from training.datasets.rows import parse

Message = dict[str, Any]
Greeting = Literal["refuse", "keep", "drop"]
Repeated = Literal["refuse", "keep", "join"]

_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "developer": "system"}
_ROLES |= dict.fromkeys(("observation", "function", "tool_response", "function_response"), "tool")
_ROLES |= dict.fromkeys(("function_call", "tool_call"), "assistant")  # LLaMA-Factory: a turn that is a call
_ROLES |= {role: role for role in ("system", "user", "assistant", "tool")}
_CALL_ROLES = ("function_call", "tool_call")
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
_USED = ("name", "tool_calls", "function_call", "weight", *_THOUGHTS)
_MAY_FOLLOW: dict[str | None, tuple[str, ...]] = {None: ("system", "user"), "system": ("user",), "user": ("assistant",)}
_MAY_FOLLOW |= {"assistant": ("user", "tool"), "tool": ("tool", "assistant")}
# Hermes wraps results as its template does; the template of the base adds the wrapping itself
_RESULT, _RESULT_END = "<tool_response>", "</tool_response>"
REORDERED = "results put in the order of their calls"
_CALL = re.compile(r"<tool_call>\s*[{\[]|<\|tool_call\|>")


@dataclass
class Account:
    """What became of a row's keys, and what was done to its turns on request (``notes``)."""

    keys: dict[str, Fate] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Reading(NamedTuple):
    """How rows are to be read: our column <- theirs, keys to leave out, an assistant's greeting, repeated user turns."""

    columns: Mapping[str, str] = {}
    ignore: frozenset[str] = frozenset()
    greeting: Greeting = "refuse"
    repeated: Repeated = "refuse"


def messages_of(turns: list[Any], reading: Reading, account: Account) -> list[Message]:
    """Checked messages of turns as they are written; raises RowError with the reason."""
    made: list[Message] = []
    for number, turn in enumerate(turns, 1):
        made += _message(turn, number, reading.ignore, account)
    made = _as_chosen(_results_in_order(made, account), reading, account)
    _check_order(made, reading)
    if not any(m["role"] == "assistant" and m.get("weight") != 0 for m in made):
        raise RowError("has weight 0 on every assistant turn, so there is nothing to learn from")
    return made


def role_of(turn: Any) -> str | None:
    """The role of a turn in either form, None when it has none that is known."""
    given = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    return _ROLES.get(given) if isinstance(given, str) else None


def as_list(value: Any, column: str) -> list[Any]:
    """A list of turns or tools; CSV and some Parquet files hold it as JSON text."""
    value = parsed(value, f"{column!r} is")
    if not isinstance(value, list):
        raise RowError(f"{column!r} must be a list, this is {type(value).__name__}")
    if not value:
        raise RowError(f"{column!r} is empty")
    return value


def parsed(value: Any, what: str) -> Any:
    """What a JSON text says, any other value as it is; ``what`` begins the reason when the text is no JSON."""
    try:
        return parse(value) if isinstance(value, str) else value
    except ValueError as error:
        raise RowError(f"{what} {error}") from None


def function_of(entry: Any) -> dict[str, Any] | None:
    """The named function of a tool or of a tool call, in OpenAI's wrapping or without it; None when it has no name."""
    function = entry.get("function", entry) if isinstance(entry, dict) else None
    return function if isinstance(function, dict) and function.get("name") and isinstance(function["name"], str) else None


def _message(turn: Any, number: int, ignore: Collection[str], account: Account) -> list[Message]:
    """A turn as one message, or as several where it holds the results of several calls."""
    if not isinstance(turn, dict):
        raise RowError(f"turn {number} must be an object, this is {type(turn).__name__}")
    role_key, text_key = ("role", "content") if "role" in turn else ("from", "value")
    if role_key not in turn:
        raise RowError(f"turn {number} has no 'role' (keys: {', '.join(map(str, turn)) or 'none'})")
    given, role = turn[role_key], role_of(turn)
    if role is None:
        raise RowError(f"turn {number} has the unknown role {given!r}; known: {', '.join(_ROLES)}")
    fates = turn_keys(turn, (role_key, text_key, *_USED), ignore, role, number)
    account.keys.update(
        {key: fate for key, fate in fates.items() if key not in (f"messages[].{role_key}", f"messages[].{text_key}")}
    )
    turn = {key: value for key, value in turn.items() if fates.get(f"messages[].{key}") != "ignored"}
    calls, thought, weight = _calls_of(turn, given, text_key, number), _thought(turn, role, number), _weight(turn, role, number)
    if calls and role != "assistant":
        raise RowError(f"turn {number} has tool_calls, but its role is {role}")
    if role == "tool":
        named = {key: turn[key] for key in ("name", "tool_call_id") if turn.get(key)}
        return [{"role": "tool", "content": part, **named} for part in _responses(_result(turn.get(text_key), number))]
    content = "" if given in _CALL_ROLES else _content(turn.get(text_key), number)
    if role == "assistant" and not calls:
        content, calls = _written_calls(content, number)
    message: Message = {"role": role, "content": content}
    if turn.get("name"):
        message["name"] = turn["name"]
    if calls:
        message["tool_calls"] = calls
    if thought:
        message["reasoning_content"] = thought
    if role == "assistant" and weight == 0:
        message["weight"] = 0
    if role != "system" and not content.strip() and not calls:
        raise RowError(f"turn {number} ({role}) is empty")
    return [message]


def _calls_of(turn: Mapping[str, Any], given: str, text_key: str, number: int) -> list[dict[str, Any]]:
    """The calls of a turn in any of the shapes they are kept in; RowError when it has two of them."""
    both = [key for key in ("tool_calls", "function_call") if not says_nothing(turn.get(key))]
    if len(both) > (given not in _CALL_ROLES):
        raise RowError(f"turn {number} has {' and '.join(both) if len(both) > 1 else f'{both[0]}, and is a call itself'}")
    if given in _CALL_ROLES:
        value = parsed(turn.get(text_key), f"turn {number} ({given}) is")
        return _calls(value if isinstance(value, list) else [value], number)
    if not both:
        return []
    value = turn[both[0]]
    return _calls([value] if both == ["function_call"] else as_list(value, "tool_calls"), number)


def _calls(values: list[Any], number: int) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's shape, the arguments parsed: a chat template writes an object, a string it would quote."""
    calls = []
    for call in values:
        call = parsed(call, f"turn {number}: a tool call is")
        function = function_of(call)
        if not function:
            raise RowError(f"turn {number} has a tool call without a function name")
        what = f"turn {number}: the arguments of {function['name']}"
        given = function.get("arguments")
        arguments = {} if given is None or given == "" else parsed(given, f"{what} are")
        if not isinstance(arguments, dict):
            raise RowError(f"{what} must be an object")
        wrapping = {key for key in call if not says_nothing(call[key])} - {"id", "type", "index", "function"}
        own = (
            {key for key in function if not says_nothing(function[key])} - {"name", "arguments"}
            if function is not call
            else set()
        )
        if strange := own | (wrapping - {"name", "arguments"} if function is call else wrapping):
            raise RowError(f"turn {number}: the call of {function['name']} has {min(strange)!r}, which calls do not have")
        known = {"id": call["id"]} if call.get("id") else {}
        calls.append({**known, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls


def _written_calls(content: str, number: int) -> tuple[str, list[dict[str, Any]]]:
    """Calls that the author wrote as text, in Hermes' form or Granite 3's, as real calls."""
    before, written = read_calls(content, _literal)
    if written and all(isinstance(call["arguments"], dict) for call in written):
        return before, [{"type": "function", "function": call} for call in plain_calls(written)]
    if _CALL.search(content):
        said = "has a mark of a call from which none can be read"
        raise RowError(
            f"turn {number} {said}: write one JSON object with name and arguments between the marks, and nothing after them"
        )
    return content, []


def _literal(text: str) -> Any:
    """What JSON says, or a Python literal: early Hermes sets write calls with single quotes."""
    with suppress(ValueError):
        return parse(text)
    try:
        tree = ast.parse(text.strip(), mode="eval")
        for keys in ([key.value for key in node.keys] for node in ast.walk(tree) if isinstance(node, ast.Dict)):  # type: ignore[union-attr]
            if not all(isinstance(key, str) for key in keys) or len(set(keys)) < len(keys):
                raise ValueError("a key is no text, or there twice")
        return parse(json.dumps(ast.literal_eval(tree)))
    except (ValueError, TypeError, AttributeError, SyntaxError, MemoryError, RecursionError):
        pass
    raise ValueError("neither JSON nor a literal")


def _thought(turn: Mapping[str, Any], role: str, number: int) -> str:
    given = {key: turn[key] for key in _THOUGHTS if not says_nothing(turn.get(key))}
    texts = {_content(value, number).strip() for value in given.values()}
    if len(texts) > 1:
        raise RowError(f"turn {number} has two different thoughts: {' and '.join(given)}")
    if texts and role != "assistant":
        raise RowError(f"turn {number} has {next(iter(given))}, but its role is {role}")
    return texts.pop() if texts else ""


def _weight(turn: Mapping[str, Any], role: str, number: int) -> int:
    weight = turn.get("weight")
    if says_nothing(weight):
        return 1
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowError(f"turn {number} has weight {weight!r}; a turn is learned from (1) or not (0)")
    if role != "assistant" and weight != 0:
        raise RowError(f"turn {number} has weight {weight!r}, but its role is {role}: only assistant turns are learned from")
    return int(weight)


def _result(value: Any, number: int) -> str:
    """A tool's result: text, or an object, which becomes JSON text as a client would send it."""
    parts = (
        isinstance(value, list) and bool(value) and all(isinstance(part, dict) and part.get("type") == "text" for part in value)
    )
    if value is None or isinstance(value, str) or parts:
        return _content(value, number)
    return json.dumps(value, ensure_ascii=False)


def _responses(text: str) -> list[str]:
    """The results in a turn that is nothing but wrapped results; else the text as it is."""
    *parts, rest = text.split(_RESULT_END)
    if rest.strip() or not parts or not all(part.lstrip().startswith(_RESULT) for part in parts):
        return [text]
    return [part.lstrip().removeprefix(_RESULT).removeprefix("\n").removesuffix("\n") for part in parts]


def _content(value: Any, number: int) -> str:
    """Text, or a list of text parts joined by newlines; None counts as empty."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise RowError(f"turn {number}: content must be text, this is {type(value).__name__}")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if isinstance(part, dict) and (
            more := [key for key in part if key not in ("type", "text") and not says_nothing(part[key])]
        ):
            raise RowError(f"turn {number} has a content part with {more[0]!r}; only text can be trained on")
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RowError(f"turn {number} has a content part of type {kind!r}; only text can be trained on")
        texts.append(part["text"])
    return "\n".join(texts)


def _as_chosen(messages: list[Message], reading: Reading, account: Account) -> list[Message]:
    """Greetings and repeated user turns as it was chosen to take them."""
    first = 1 if messages and messages[0]["role"] == "system" else 0
    if len(messages) > first + 1 and messages[first]["role"] == "assistant" and "tool_calls" not in messages[first]:
        if reading.greeting == "refuse" and messages[first].get("weight") != 0:
            how = "--greeting keep trains no loss on it, --greeting drop leaves it out"
            raise RowError(f"begins with an assistant turn, which answers nothing: {how}")
        if reading.greeting == "drop":
            messages = [*messages[:first], *messages[first + 1 :]]
            account.notes.append("greeting dropped")
        elif messages[first].get("weight") != 0:
            messages[first]["weight"] = 0
            account.notes.append("greeting kept without loss")
    if reading.repeated != "join":
        return messages
    joined: list[Message] = []
    for message in messages:
        if message["role"] == "user" and joined and joined[-1]["role"] == "user":
            if message.get("name") != joined[-1].get("name"):
                raise RowError("has user turns of two speakers after each other, which cannot become one")
            joined[-1] = {**joined[-1], "content": f"{joined[-1]['content']}\n\n{message['content']}"}
            account.notes.append("user turns joined")
        else:
            joined.append(message)
    return joined


def _results_in_order(messages: list[Message], account: Account) -> list[Message]:
    """Results in the order of their calls, which is all that a prompt has to tell them apart; RowError for one of no call."""
    made: list[Message] = []
    for message in messages:
        made.append(message)
        calls, first = [], len(made)
        while first and made[first - 1]["role"] == "tool":
            first -= 1
        if first and first < len(made):
            calls = [call.get("id") for call in made[first - 1].get("tool_calls", ())]
        ids = [result.get("tool_call_id") for result in made[first:]]
        if not all(calls) or not all(ids) or not calls or not ids:
            continue
        if strange := next((one for one in ids if one not in calls), None):
            raise RowError(f"has a result of the call {strange!r}, which the turn before it does not have")
        ordered = sorted(made[first:], key=lambda result: calls.index(result["tool_call_id"]))
        if ordered != made[first:]:
            made[first:] = ordered
            account.notes.append(REORDERED)
    return made


def _check_order(messages: list[Message], reading: Reading) -> None:
    """System only first, then user and assistant in turn, tool results after the assistant, an answer at the end."""
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise RowError("has no assistant turn, so there is nothing to learn from")
    if roles[-1] != "assistant":
        raise RowError(f"ends with a {roles[-1]} turn; the last turn must be the assistant's")
    for number, (before, role) in enumerate(zip([None, *roles], roles, strict=False), 1):
        if role in _MAY_FOLLOW[before]:
            continue
        if before == role == "user":
            if reading.repeated == "keep":
                continue
            how = "--repeated join puts them together, --repeated keep leaves them as they are"
            raise RowError(f"turn {number} is user after a user turn: {how}")
        greets = role == "assistant" and before in (None, "system") and number < len(roles)
        greets = greets and messages[number - 1].get("weight") == 0 and "tool_calls" not in messages[number - 1]
        if not greets:
            place = f"after {'an' if before == 'assistant' else 'a'} {before} turn" if before else "as the first turn"
            raise RowError(f"turn {number} is {role} {place}; expected {' or '.join(_MAY_FOLLOW[before])}")
