"""Prompt parity: every renderer against the tokenizer's chat template, case by case, as token IDs or bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal

from pipeline.chat import ChatTemplate, Tokenizer
from pipeline.conversation import Conversation, load_suite
from pipeline.deviations import predictions
from pipeline.engines.base import NotApplicable, Prompt
from pipeline.errors import ModelError, VerificationFailed
from pipeline.ollama_template import OllamaTemplate
from pipeline.ollama_view import as_api, restored
from pipeline.prompt_causes import explain_difference
from pipeline.renderers import GoRenderer, Renderer, render_chat

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


def go_differences(derived: OllamaTemplate, template: ChatTemplate, now: datetime | None = None) -> list[str]:
    """Unexplained differences between a TEMPLATE run by Go and the chat template, one line each."""
    clock = now or datetime.now()
    matrix = compare(Reference(template, clock), [GoRenderer(derived.text, clock)])
    return [f"{cell.conversation}: {cell.detail}" for cell in matrix.differences]


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
    used = _listed(reference, renderer.name, conversation, prompt)
    if used:
        return cell("listed", ", ".join(used))
    return cell("different", explain_difference(conversation, expected, reference.shown(prompt)))


def _listed(reference: Reference, renderer: str, conversation: Conversation, prompt: Prompt) -> tuple[str, ...]:
    """The deviations that predict this prompt exactly; empty when none does."""
    sent = as_api(conversation) if renderer in ("go", "modelfile", "ollama") else conversation
    for changed, used in predictions(renderer, sent, reference.template.source):
        try:
            predicted = restored(render_chat(reference.template, changed, reference.now))
        except ModelError:
            continue
        if reference.same(prompt, predicted):
            return used
    return ()
