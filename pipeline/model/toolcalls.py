"""How a Granite generation writes a tool call, read off its chat template, and one call to try an engine with."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# vLLM's parser for that form -> the mark before a call. Granite 3: one list of calls; Granite 4: one JSON object a mark.
MARKS = {"granite": "<|tool_call|>", "granite4": "<tool_call>"}
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
    written = json.dumps({"name": NAME, "arguments": ARGUMENTS})
    if form == "granite":
        return Call(MARKS[form], f"{MARKS[form]}[{written}]")
    return Call(f"{MARKS[form]}\n", f"{MARKS[form]}\n{written}\n</tool_call>")
