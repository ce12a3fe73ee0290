"""Prompt parity: every renderer against the tokenizer's chat template, case by case, as token IDs or bytes."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal

from pipeline.errors import ModelError, VerificationFailed
from pipeline.model.tokenizer import Tokenizer
from pipeline.prompts.chat import MIDDLE, START, ChatTemplate
from pipeline.prompts.conversation import Conversation, NotApplicable, Prompt, load_suite
from pipeline.prompts.deviations import predictions
from pipeline.prompts.ollama_view import restored
from pipeline.prompts.renderers import Renderer, render_chat

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


Status = Literal["equal", "listed", "not applicable", "different"]


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
        found: dict[str, dict[str, int]] = {}
        for cell in self.cells:
            row = found.setdefault(cell.renderer, {})
            row[cell.status] = row.get(cell.status, 0) + 1
        return found

    def to_json(self) -> dict[str, Any]:
        """The matrix as a JSON object."""
        return {"passed": self.passed, "counts": self.counts(), "cells": [asdict(cell) for cell in self.cells]}


def compare(reference: Reference, renderers: Sequence[Renderer], conversations: Iterable[Conversation] | None = None) -> Matrix:
    """Render every conversation (default: the suite) with every renderer and compare with the reference.

    An engine that stops answering ends the comparison with its EngineError.
    """
    suite = load_suite() if conversations is None else conversations
    return Matrix(tuple(_cell(reference, renderer, one) for one in suite for renderer in renderers))


def require_same(matrix: Matrix, problems: Sequence[str] = ()) -> None:
    """Raise VerificationFailed with each cause once when a prompt differs unexplained, or the files have other problems."""
    if matrix.passed and not problems:
        return
    causes: dict[str, Cell] = {}
    for cell in matrix.differences:
        causes.setdefault(f"{cell.renderer}: {cell.detail.partition(';')[0]}", cell)
    seen = [f"{cause} (first in {cell.conversation})" for cause, cell in causes.items()]
    count = len(matrix.differences)
    what = (
        f"{count} prompts differ from the tokenizer's for no listed reason" if count else "the run's files disagree about prompts"
    )
    raise VerificationFailed(what, evidence="\n".join([*problems, *seen[:20]]))


def _cell(reference: Reference, renderer: Renderer, conversation: Conversation) -> Cell:
    def cell(status: Status, detail: str = "") -> Cell:
        return Cell(conversation.id, renderer.name, status, detail)

    try:
        expected = render_chat(reference.template, conversation, reference.now)
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
    used = _listed(reference, renderer.paths, conversation, prompt)
    if used:
        return cell("listed", ", ".join(used))
    return cell("different", explain_difference(conversation, expected, reference.shown(prompt)))


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
