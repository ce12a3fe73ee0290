"""Why two prompts differ, for the mistakes that are made again and again with Granite's chat format."""

from __future__ import annotations

from pipeline.conversation import Conversation
from pipeline.ollama_template import MIDDLE, START

_END = "<|end_of_text|>"
_CONTEXT = 60


def explain_difference(conversation: Conversation, expected: str, found: str) -> str:
    """The cause where it is known, and where the prompts part."""
    return "; ".join(filter(None, (_cause(conversation, expected, found), _place(expected, found))))


def _cause(conversation: Conversation, expected: str, found: str) -> str:
    if found.replace(f"{MIDDLE}\n", MIDDLE) in (expected, expected.replace(f"{MIDDLE}\n", MIDDLE)):
        return f"a line end stands after {MIDDLE}, where the model never saw one"
    if expected.replace(f"{_END}\n", _END) == found.replace(f"{_END}\n", _END):
        return f"the line end after {_END} is missing"
    names = [tool.get("function", {}).get("name", "") for tool in conversation.tools or ()]
    wanted, shown = (prompt.partition(f"{START}user{MIDDLE}")[0] for prompt in (expected, found))
    if any(f'"{name}"' in wanted and f'"{name}"' not in shown for name in names):
        return "the tools are not listed"
    given, got = _system(expected), _system(found)
    if given and not got:
        return "the system message is missing"
    if given and got and given != got and given.startswith(got):
        return "the system message is cut"
    calls = [call for message in conversation.messages for call in message.get("tool_calls") or ()]
    if calls and "<tool_call>" in expected and expected.count("<tool_call>") > found.count("<tool_call>"):
        return "tool calls are left out"
    if any(message["role"] == "tool" for message in conversation.messages) and "<tool_response>" not in found:
        return "tool results are not marked"
    return ""


def _system(prompt: str) -> str:
    """Text of the system turn that opens a prompt."""
    head = f"{START}system{MIDDLE}"
    return prompt.removeprefix(head).partition(_END)[0] if prompt.startswith(head) else ""


def _place(expected: str, found: str) -> str:
    """Where two prompts part, with what stands around it, line ends shown as \\n."""
    at = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), min(len(expected), len(found)))
    before = expected[max(0, at - _CONTEXT) : at]
    wanted, got = expected[at : at + _CONTEXT], found[at : at + _CONTEXT]
    return f"from character {at}, after {before!r}: expected {wanted!r}, got {got!r}"
