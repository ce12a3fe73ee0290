"""Prompt parity: every renderer against the tokenizer's chat template, case by case, as token IDs or bytes.

A known deviation is a prompt that differs for a reason nobody here can remove: a function from the conversation sent to the
conversation as the engine sees it. A prompt is excused only when the chat template over that changed conversation gives
exactly it. A test for each fails when the deviation stops being true.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import ModelError, VerificationFailed, at
from pipeline.model.tokenizer import Tokenizer
from pipeline.prompts.chat import MIDDLE, START, ChatTemplate
from pipeline.prompts.conversation import Conversation, NotApplicable, Prompt, load_suite
from pipeline.prompts.ollama_view import as_api, merged, remade_tools, reordered_tools, restored, sorted_arguments, split_parts
from pipeline.prompts.renderers import Renderer, render_chat

_END = "<|end_of_text|>"
# characters shown around the place where two prompts part
_CONTEXT = 60
# paths that begin with Ollama's API: it renders with its TEMPLATE, or hands the chat to llama.cpp
_OLLAMA = ("template", "ollama-jinja")
# what stands before a path's name when the chat comes by OpenAI's form of that API
_V1 = "v1:"
Status = Literal["equal", "listed", "not applicable", "different"]


@dataclass(frozen=True)
class Deviation:
    """One known deviation: on which paths, why, and what it makes of (conversation, chat template)."""

    id: str
    paths: frozenset[str]
    reason: str
    change: Callable[[Conversation, str], Conversation]


def _filled(conversation: Conversation, description: Any, parameters: Any) -> Conversation:
    def fill(tool: Mapping[str, Any]) -> dict[str, Any]:
        function = tool["function"]
        filled = {"description": function.get("description", description), "parameters": function.get("parameters", parameters)}
        return {"type": tool["type"], "function": {"name": function["name"]} | filled}

    return replace(conversation, tools=conversation.tools and tuple(map(fill, conversation.tools)))


def _thinking_closed(conversation: Conversation, template: str) -> Conversation:
    if not (conversation.continued and "<think>" in template and "</think>" in template):
        return conversation
    last = conversation.messages[-1]
    return replace(conversation, messages=(*conversation.messages[:-1], {**last, "content": f"<think></think>{last['content']}"}))


# what each one makes of (conversation, chat template)
_CHANGES: dict[str, Callable[[Conversation, str], Conversation]] = {
    "split-parts": lambda conversation, _: split_parts(conversation),
    "merged-turns": lambda conversation, _: merged(conversation),
    "remade-tools": lambda conversation, _: remade_tools(conversation),
    "reordered-tools": lambda conversation, _: reordered_tools(conversation),
    "sorted-arguments": lambda conversation, _: sorted_arguments(conversation),
    "empty-tool-keys": lambda conversation, _: _filled(conversation, "", {}),
    "null-tool-keys": lambda conversation, _: _filled(conversation, None, None),
    "closed-thinking": _thinking_closed,
}
_LISTED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("deviations.json").read_text(encoding="utf-8"))
DEVIATIONS = tuple(Deviation(id, frozenset(e["paths"]), e["reason"], _CHANGES[id]) for id, e in _LISTED.items())


def predictions(paths: Sequence[str], conversation: Conversation, template: str) -> list[tuple[Conversation, tuple[str, ...]]]:
    """The conversation as an engine may see it, once for each path it may take, with the deviations that changed it."""
    found = []
    for path in paths:
        here = path.removeprefix(_V1)
        view = as_api if here in _OLLAMA else _as_it_is
        # the first on that way sees the parts of a content, which later ones find joined
        seen, used = conversation if path.startswith(_V1) else view(conversation), []
        for deviation in (known for known in DEVIATIONS if {path, here} & known.paths):
            changed = view(deviation.change(seen, template))
            # as text, which also shows the order of names
            if json.dumps(asdict(changed)) != json.dumps(asdict(view(seen))):
                used.append(deviation.id)
            seen = changed
        if used:
            found.append((seen, tuple(used)))
    return found


def _as_it_is(conversation: Conversation) -> Conversation:
    return conversation


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
    if given != got and given.startswith(got):
        return "the system message is cut"
    called = any(message.get("tool_calls") for message in conversation.messages)
    if called and expected.count("<tool_call>") > found.count("<tool_call>"):
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
    i = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), min(len(expected), len(found)))
    before = expected[max(0, i - _CONTEXT) : i]
    wanted, got = expected[i : i + _CONTEXT], found[i : i + _CONTEXT]
    return f"from character {i}, after {before!r}: expected {wanted!r}, got {got!r}"


@dataclass(frozen=True)
class Cell:
    """One conversation through one renderer. ``detail`` is the reason, the deviation ids, or a readable difference."""

    conversation: str
    renderer: str
    status: Status
    detail: str = ""


@dataclass(frozen=True)
class Reference:
    """The truth: a chat template, the clock it sees, and the tokenizer where token IDs are to be compared."""

    template: ChatTemplate
    now: datetime
    tokenizer: Tokenizer | None = None

    def same(self, prompt: Prompt, text: str) -> bool:
        """Whether a prompt is this text, by token IDs where both sides have them."""
        if prompt.ids is not None and self.tokenizer is not None:
            return list(prompt.ids) == self.tokenizer.encode(text)
        return prompt.text == text

    def shown(self, prompt: Prompt) -> str:
        """A prompt as text, decoded when the engine gave only IDs."""
        if prompt.text is None and prompt.ids is not None and self.tokenizer is not None:
            return self.tokenizer.decode(prompt.ids)
        return prompt.text or ""


@dataclass(frozen=True)
class Matrix:
    """All cells, in the order conversation by conversation."""

    cells: tuple[Cell, ...]

    @property
    def passed(self) -> bool:
        """True when no cell differs unexplained."""
        return not self.differences

    @property
    def differences(self) -> list[Cell]:
        """Cells that differ for no listed reason."""
        return [cell for cell in self.cells if cell.status == "different"]

    def counts(self) -> dict[str, dict[str, int]]:
        """Number of cells by renderer and status."""
        names = dict.fromkeys(cell.renderer for cell in self.cells)
        return {name: dict(Counter(cell.status for cell in self.cells if cell.renderer == name)) for name in names}

    def to_json(self) -> dict[str, Any]:
        """The matrix as a JSON object."""
        return {"passed": self.passed, "counts": self.counts(), "cells": [asdict(cell) for cell in self.cells]}


def compare(reference: Reference, renderers: Sequence[Renderer], conversations: Iterable[Conversation] | None = None) -> Matrix:
    """Render every conversation (default: the suite) with every renderer and compare with the reference.

    An engine that stops answering ends the comparison with its EngineError.
    """
    suite = load_suite() if conversations is None else conversations
    cells = []
    for one in suite:
        for renderer in renderers:
            with at(f"conversation {one.id} with {renderer.name}"):
                cells.append(_cell(reference, renderer, one))
    return Matrix(tuple(cells))


def require_same(matrix: Matrix, problems: Sequence[str] = ()) -> None:
    """Raise VerificationFailed with each cause once when a prompt differs unexplained, or the files have other problems."""
    if matrix.passed and not problems:
        return
    causes: dict[str, Cell] = {}
    for cell in matrix.differences:
        causes.setdefault(f"{cell.renderer}: {cell.detail.partition(';')[0]}", cell)
    seen = [f"{cause} (first in {cell.conversation})" for cause, cell in causes.items()]
    what = "the run's files disagree about prompts"
    if matrix.differences:
        what = f"{len(matrix.differences)} prompts differ from the tokenizer's for no listed reason"
    raise VerificationFailed(what, evidence="\n".join([*problems, *seen[:20]]))


def _cell(reference: Reference, renderer: Renderer, conversation: Conversation) -> Cell:
    def cell(status: Status, detail: str = "") -> Cell:
        return Cell(conversation.id, renderer.name, status, detail)

    # what the engine puts before it is part of what it should render
    asked = conversation.opened(renderer.system)
    try:
        expected = render_chat(reference.template, asked, reference.now)
    except ModelError as error:
        return cell("not applicable", error.message)
    try:
        prompt = renderer.render(conversation)
    except NotApplicable as reason:
        return cell("not applicable", str(reason))
    except ModelError as error:
        return cell("different", f"{renderer.name} refuses: {error}")
    if reference.same(prompt, expected):
        return cell("equal")
    if used := _listed(reference, renderer.paths, asked, prompt):
        return cell("listed", ", ".join(used))
    shown = reference.shown(prompt)
    return cell("different", "; ".join(filter(None, (_cause(asked, expected, shown), _place(expected, shown)))))


def _listed(reference: Reference, paths: Sequence[str], conversation: Conversation, prompt: Prompt) -> tuple[str, ...]:
    """The deviations that predict this prompt exactly; empty when none does."""
    for changed, used in predictions(paths, conversation, reference.template.source):
        try:
            predicted = restored(render_chat(reference.template, changed, reference.now))
        except ModelError:
            continue
        if reference.same(prompt, predicted):
            return used
    return ()
