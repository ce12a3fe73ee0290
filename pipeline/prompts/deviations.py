"""The known deviations: prompts that differ from the tokenizer's for a reason nobody here can remove.

Each is a function from the conversation sent to the conversation as the engine sees it; a prompt is excused only when the
chat template over that changed conversation gives exactly it. A test for each fails when the deviation stops being true.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.prompts.conversation import Conversation
from pipeline.prompts.ollama_view import as_api, merged, remade_tools, reordered_tools

# Paths that begin with Ollama's API: it renders with its TEMPLATE, or hands the chat to llama.cpp
_OLLAMA = ("template", "ollama-jinja")
Change = Callable[[Conversation, str], Conversation]


@dataclass(frozen=True)
class Deviation:
    """One known deviation: on which paths, why, and what it makes of (conversation, chat template)."""

    id: str
    paths: frozenset[str]
    reason: str
    change: Change


def _filled(conversation: Conversation, description: Any, parameters: Any) -> Conversation:
    def fill(tool: Mapping[str, Any]) -> dict[str, Any]:
        function = tool["function"]
        made = {"name": function["name"]}
        for name, default in (("description", description), ("parameters", parameters)):
            made[name] = function.get(name, default)
        return {"type": tool["type"], "function": made}

    return replace(conversation, tools=conversation.tools and tuple(map(fill, conversation.tools)))


def _thinking_closed(conversation: Conversation, template: str) -> Conversation:
    if not (conversation.continued and "<think>" in template and "</think>" in template):
        return conversation
    last = conversation.messages[-1]
    return replace(conversation, messages=(*conversation.messages[:-1], {**last, "content": f"<think></think>{last['content']}"}))


DEVIATIONS = (
    Deviation(
        "merged-turns",
        frozenset({"template"}),
        "Ollama joins neighbouring turns of one role with an empty line before a TEMPLATE sees them",
        lambda conversation, _: merged(conversation),
    ),
    Deviation(
        "remade-tools",
        frozenset({"template"}),
        "Ollama reads tools and call arguments into its own types: unknown keys go, names are sorted, <>& are escaped, "
        "and what a Go template can only print whole comes without spaces",
        lambda conversation, _: remade_tools(conversation),
    ),
    Deviation(
        "reordered-tools",
        frozenset({"ollama-jinja"}),
        "Ollama reads tools into its own types: unknown keys go and 'required' moves before 'properties'",
        lambda conversation, _: reordered_tools(conversation),
    ),
    Deviation(
        "empty-tool-keys",
        frozenset({"llamacpp", "ollama-jinja"}),
        "llama.cpp gives a tool without description or parameters empty ones",
        lambda conversation, _: _filled(conversation, "", {}),
    ),
    Deviation(
        "null-tool-keys",
        frozenset({"vllm"}),
        "vLLM gives a tool without description or parameters null ones",
        lambda conversation, _: _filled(conversation, None, None),
    ),
    Deviation(
        "closed-thinking",
        frozenset({"llamacpp", "ollama-jinja"}),
        "llama.cpp puts <think></think> before a continued answer when the chat template can ask for thinking",
        _thinking_closed,
    ),
)


def predictions(paths: Sequence[str], conversation: Conversation, template: str) -> list[tuple[Conversation, tuple[str, ...]]]:
    """The conversation as an engine may see it, once for each path it may take, with the deviations that changed it."""
    found = []
    for path in paths:
        seen, used = as_api(conversation) if path in _OLLAMA else conversation, []
        for deviation in (known for known in DEVIATIONS if path in known.paths):
            changed = deviation.change(seen, template)
            if _dump(changed) != _dump(seen):
                used.append(deviation.id)
            seen = changed
        if used:
            found.append((seen, tuple(used)))
    return found


def _dump(conversation: Conversation) -> str:
    """Text that also shows the order of names, which equality of dicts does not."""
    return json.dumps(asdict(conversation))
