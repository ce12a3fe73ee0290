"""Dataset formats: which one a row's columns are, and the row as chat messages.

    messages           [{"role", "content", "tool_calls"?, ...}]      OpenAI chat
    conversations      [{"from", "value"}]                           ShareGPT, LLaMA-Factory
    prompt/completion  two strings, or two lists of messages          TRL
    alpaca             instruction, input, output, history            Stanford Alpaca
    dolly              instruction, context, response                 Databricks Dolly
    question/answer    question, context, answer
    xlam               query, tools, answers (calls)                  Salesforce xLAM
    text               a conversation rendered in Granite's format

Beside any of them: tools (or OpenAI's older functions), documents, system. What comes out is described in ``turns``.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from shlex import quote
from typing import Any

from pipeline.prompts.chat import END, MIDDLE, START
from training.datasets.keys import UNDERSTOOD, Fate, RowError, row_keys, says_nothing
from training.datasets.rows import Inexact
from training.datasets.turns import Account, Message, Reading, as_list, function_of, messages_of, parsed, role_of

BESIDE = ("tools", "functions", "documents", "system")
_TOOL_KEYS = ("name", "description", "parameters")
_PAIRS = {
    "prompt/completion": ("prompt", "", "completion"),
    "alpaca": ("instruction", "input", "output"),
    "dolly": ("instruction", "context", "response"),
    "question/answer": ("question", "context", "answer"),
}
_DEPTH = 64
_Objects = tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Converted:
    """A row as messages, its tools and documents, and what became of its keys (columns, and ``messages[].key``).

    ``notes`` say what was done to its turns on request; ``text`` is the row as its author rendered it, where it came so.
    """

    messages: tuple[Message, ...]
    tools: _Objects | None
    documents: _Objects | None
    keys: Mapping[str, Fate]
    notes: tuple[str, ...] = ()
    text: str | None = None


def convert(name: str, row: Mapping[str, Any], reading: Reading = Reading()) -> Converted:  # noqa: B008 - a constant
    """A row of the named format, its columns under our names, as checked messages; raises RowError with the reason."""
    needed, optional = UNDERSTOOD[name]
    if missing := [column for column in needed if column not in row]:
        raise RowError(f"has no {' and no '.join(map(repr, missing))} (columns: {', '.join(map(str, row)) or 'none'})")
    if asked := [column for column in needed if column in reading.ignore]:
        raise RowError(f"{asked[0]!r} is what is trained on; it cannot be ignored")
    known = {key: value for key, value in row.items() if key not in reading.ignore}
    account = Account()
    messages = messages_of(_turns(name, known), reading, account)
    of_tools: dict[str, Fate] = {}
    tools, documents = _tools(known, reading.ignore, of_tools), _documents(known.get("documents"))
    texts = [message["content"] for message in messages if message["content"].strip()]
    keys = row_keys(row, (*needed, *optional, *BESIDE), reading.ignore, texts)
    _check_text([messages, tools, documents])
    text = row["text"] if name == "text" else None
    of_turns = {} if name in ("xlam", "text") else account.keys  # their turns are of our making
    return Converted(tuple(messages), tools, documents, {**keys, **of_turns, **of_tools}, tuple(account.notes), text)


def _turns(name: str, row: Mapping[str, Any]) -> list[Any]:
    """A row's turns as they are written, the row's system message before them."""
    if name in ("messages", "conversations"):
        turns = as_list(row[name], name)
    elif name == "text":
        turns = _rendered(_text(row, "text"))
    elif name == "xlam":
        calls = {"role": "assistant", "content": "", "tool_calls": as_list(row["answers"], "answers")}
        turns = [{"role": "user", "content": _text(row, "query")}, calls]
    else:
        turns = _pair(row, *_PAIRS[name])
    system = _text(row, "system")
    if not system.strip():
        return turns
    if role_of(turns[0]) != "system":
        return [{"role": "system", "content": system}, *turns]
    if system != turns[0].get("content", turns[0].get("value")):
        raise RowError(
            "has a 'system' that differs from its first turn, which is a system turn too; --ignore system keeps the turn"
        )
    return turns


def _pair(row: Mapping[str, Any], asked: str, given: str, answer: str) -> list[Any]:
    """What was said before, the question (with what it is about) and the answer; each text or TRL's list of messages."""
    turns: list[Any] = []
    for pair in as_list(row["history"], "history") if not says_nothing(row.get("history")) else ():
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError("'history' must be a list of [question, answer]")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    turns += _part(row, asked, "user")
    if about := _text(row, given) if given else "":
        turns[-1] = {"role": "user", "content": f"{_text(row, asked)}\n\n{about}"}
    return [*turns, *_part(row, answer, "assistant")]


def _part(row: Mapping[str, Any], column: str, role: str) -> list[Any]:
    """One side of a pair: a list of messages, or the text of one."""
    if isinstance(row[column], list) and column in UNDERSTOOD["prompt/completion"][0]:
        return as_list(row[column], column)
    return [{"role": role, "content": _text(row, column)}]


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if says_nothing(value) and not isinstance(value, str):
        return ""
    if not isinstance(value, str):
        raise RowError(f"{column!r} must be text, this is {type(value).__name__}")
    return value


def _rendered(text: str) -> list[Any]:
    """The turns of a conversation that was rendered in Granite's format; RowError when it is in another one.

    Preparation renders them with the base's template and refuses the row when that is not the author's text.
    """
    if not text.strip():
        raise RowError("'text' is empty")
    found, at = [], 0
    while text.startswith(START, at):
        role, middle, _ = text[at + len(START) : at + len(START) + 40].partition(MIDDLE)
        begin = at + len(START) + len(role) + len(MIDDLE)
        end = text.find(END.strip(), begin)
        if not middle or end < 0:
            break
        found.append({"role": role, "content": text[begin:end]})
        at = end + len(END.strip())
        at += len(text[at : at + 2]) - len(text[at : at + 2].lstrip())
    if at != len(text):
        where = f"from character {at + 1} on ({text[at : at + 40]!r}) " if found else ""
        said = f"'text' is {where}not a conversation in Granite's format ({START}role{MIDDLE}...{END.strip()})"
        raise RowError(f"{said}; give the turns as messages, or the two sides with --columns prompt=...,completion=...")
    return found


def _tools(row: Mapping[str, Any], ignore: Collection[str], keys: dict[str, Fate]) -> _Objects | None:
    """Tools in the one shape that engines leave as it is: OpenAI's, with a description and parameters, in that order.

    They may be objects, JSON text, or a list of JSON texts, with OpenAI's wrapping or without. vLLM writes null for what is left out,
    llama.cpp an empty text, and both drop keys of their own choice: ``strict``, which no model reads, is dropped here.
    """
    given = [column for column in ("tools", "functions") if not says_nothing(row.get(column))]
    if not given:
        return None
    if len(given) > 1:
        raise RowError("has 'tools' and 'functions'; --ignore functions keeps the tools")
    made = []
    for entry in as_list(row[given[0]], given[0]):
        tool = parsed(entry, f"an entry of {given[0]!r} is")
        function = function_of(tool)
        if not function:
            raise RowError(f"{given[0]!r} has an entry without a function name")
        around = [] if function is tool else [pair for pair in tool.items() if pair[0] not in ("type", "function")]
        own = [
            (key, value) for key, value in function.items() if key not in _TOOL_KEYS and (key != "type" or function is not tool)
        ]
        for key, value in (*own, *around):
            name = f"{given[0]}[].{key}"
            if says_nothing(value):
                continue
            if key != "strict" and not {key, name} & set(ignore):
                said = f"the tool {function['name']} has {key!r}, which engines leave out of the prompt"
                raise RowError(f"{said}; --ignore {quote(key)} leaves it out in training too", name)
            keys[name] = "ignored" if {key, name} & set(ignore) else "harmless"
        description, parameters = function.get("description") or "", function.get("parameters") or {}
        if not isinstance(description, str) or not isinstance(parameters, Mapping):
            raise RowError(f"the tool {function['name']} must have a text as description and an object as parameters")
        inner = {"name": function["name"], "description": description, "parameters": parameters}
        made.append({"type": "function", "function": inner})
    return tuple(made)


def _documents(value: Any) -> _Objects | None:
    """Documents as objects that have a text; a plain text is a document without a title."""
    if says_nothing(value):
        return None
    made = []
    plain = isinstance(value, str) and not value.lstrip().startswith(("[", "{"))
    for entry in [value] if plain or isinstance(value, dict) else as_list(value, "documents"):
        document = {"text": entry} if isinstance(entry, str) else entry
        if not isinstance(document, dict):
            raise RowError(f"'documents' must hold texts or objects, one is {type(entry).__name__}")
        told = (
            document["text"] if "text" in document else [part for key, part in document.items() if key not in ("doc_id", "title")]
        )
        if not any(isinstance(part, str) and part.strip() for part in (told if isinstance(told, list) else [told])):
            raise RowError(f"'documents' has one without a text (keys: {', '.join(map(str, document)) or 'none'})")
        if not isinstance(document.get("text", ""), str):
            raise RowError(f"'documents' has one whose text is no text ({type(document['text']).__name__})")
        made.append(document)
    return tuple(made)


def _check_text(value: Any) -> None:
    """Refuse what a tokenizer or template stumbles over: NUL, text that is not UTF-8, deep nesting, dates, NaN."""
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
        elif isinstance(item, Inexact):
            raise RowError(f"holds a number with more digits than a number keeps ({item!r}); write it as text")
        elif isinstance(item, float) and not math.isfinite(item):
            raise RowError("holds NaN or an infinite number where it is used; JSON has neither")
        elif not isinstance(item, int | float | None):
            raise RowError(f"holds a value that JSON cannot ({type(item).__name__})")
