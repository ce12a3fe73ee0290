"""How a Granite generation writes tool calls and thoughts, read off its chat template; both written so, and read back.

Granite 3.2 and 3.3 write ``<think>...</think><response>...</response>``, which 3.3's chat template asks for in its system message;
4.0 and 4.1 have ``<think>`` among their tokens and no form for the answer. :data:`TOOL` is one to try an engine with.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

# vLLM's parser for that form -> the mark before a call. Granite 3: one list of calls; Granite 4: one JSON object a mark.
MARKS = {"granite": "<|tool_call|>", "granite4": "<tool_call>"}
OPEN, CLOSE = "<think>", "</think>"
_RESPONSE = re.compile(r"\s*<response>(.*?)(?:</response>)?\s*", re.DOTALL)
NAME, ARGUMENTS = "lookup_host", {"host": "web-01"}
_FUNCTION = {
    "name": NAME,
    "description": "Looks up the owner of a host",
    "parameters": {"type": "object", "properties": {"host": {"type": "string", "enum": ["web-01"]}}, "required": ["host"]},
}
TOOL: Mapping[str, Any] = {"type": "function", "function": _FUNCTION}
QUESTION: Mapping[str, Any] = {"role": "user", "content": "Who owns web-01? Look it up."}


def tool_format(template: str) -> str | None:
    """``granite`` or ``granite4`` by the mark that a chat template's source names; None when it has no tools."""
    if "tools" not in template:
        return None
    return next((name for name, mark in MARKS.items() if mark in template), None)


@dataclass(frozen=True)
class Call:
    """One tool call as the model is to write it: ``opening`` comes before its JSON, ``text`` is the whole answer."""

    opening: str
    text: str


def example_call(form: str) -> Call:
    """A call of :data:`TOOL` in one form."""
    opening = MARKS[form] if form == "granite" else f"{MARKS[form]}\n"
    return Call(opening, written_calls(form, [{"name": NAME, "arguments": ARGUMENTS}]))


def plain_calls(calls: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Calls as ``{"name", "arguments"}``, out of OpenAI's wrapping or without it; arguments in JSON text are parsed where they can be."""
    found = []
    for call in calls:
        function = call.get("function", call)
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            with suppress(ValueError):  # a model may write what is no JSON; it is then compared as it stands
                arguments = json.loads(arguments)
        found.append({"name": function.get("name"), "arguments": {} if arguments is None else arguments})
    return found


def written_calls(form: str, calls: Sequence[Mapping[str, Any]]) -> str:
    """Calls (``{"name", "arguments"}``) as a model of this form writes them.

    ``granite``: https://www.ibm.com/granite/docs, "function calling" of 3.x, a mark and one JSON list;
    ``granite4``: one marked JSON object a call, as the templates of 4.0 and 4.1 write them.
    """
    texts = [json.dumps({"name": c["name"], "arguments": c["arguments"]}, ensure_ascii=False) for c in calls]
    if form == "granite":
        return f"{MARKS[form]}[{', '.join(texts)}]"
    return "\n".join(f"{MARKS[form]}\n{text}\n</tool_call>" for text in texts)


def read_calls(text: str, loads: Callable[[str], Any] = json.loads) -> tuple[str, list[dict[str, Any]]]:
    """What an answer says before its calls, and the calls as ``{"name", "arguments"}``, in either form; ``loads`` reads their JSON.

    No calls, and the whole text, when it holds none, when one is not JSON with a name, or when text follows them.
    """
    before, mark, after = text.partition(MARKS["granite"])
    found = _calls(after, loads, whole=True) if mark else None
    if found is None:
        before, mark, after = text.partition(MARKS["granite4"])
        found = _blocks(mark + after, loads) if mark else None
    return (before.removesuffix("\n"), found) if found else (text, [])


def _blocks(text: str, loads: Callable[[str], Any]) -> list[dict[str, Any]] | None:
    """Calls between marks, with nothing but white space around them; None when it is something else."""
    *blocks, rest = text.split("</tool_call>")
    found: list[dict[str, Any]] = []
    for block in blocks:
        opened = block.lstrip()
        calls = _calls(opened.removeprefix(MARKS["granite4"]), loads) if opened.startswith(MARKS["granite4"]) else None
        if not calls:
            return None
        found += calls
    return found if found and not rest.strip() else None


def _calls(text: str, loads: Callable[[str], Any], *, whole: bool = False) -> list[dict[str, Any]] | None:
    """The calls that a JSON text says: one object, or with ``whole`` a list of them; None when it is something else."""
    try:
        value = loads(text.strip())
    except (ValueError, RecursionError):
        return None
    values = value if whole else [value]
    if not isinstance(values, list) or not values:
        return None
    named = all(isinstance(v, dict) and isinstance(v.get("name"), str) and set(v) <= {"name", "arguments"} for v in values)
    return plain_calls(values) if named else None


class Said(NamedTuple):
    """An answer's thought (None: it did not think) and what it says after it."""

    thought: str | None
    answer: str


def written_thought(template: str, thought: str, answer: str) -> str:
    """Thought and answer as one text, in the form that a chat template's source asks for."""
    if "<response>" in template:
        return f"{OPEN}{thought}{CLOSE}<response>{answer}</response>"
    return f"{OPEN}\n{thought}\n{CLOSE}\n\n{answer}"


def read_thought(text: str) -> Said:
    """The thought at the beginning of a text and what follows it; a thought that never ends has no answer."""
    begun = text.lstrip()
    if not begun.startswith(OPEN):
        return Said(None, text)
    thought, closed, answer = begun.removeprefix(OPEN).partition(CLOSE)
    if not closed:
        return Said(thought.strip(), "")
    whole = _RESPONSE.fullmatch(answer)
    return Said(thought.strip(), (whole[1] if whole else answer).strip())
