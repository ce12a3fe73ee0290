"""What a run is verified with: its own template and tokenizer, held-out rows with their prompts, the answers given in process."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import InputError, at
from pipeline.model.tokenizer import Tokenizer
from pipeline.prompts.chat import ChatTemplate
from pipeline.prompts.neutralise import control_tokens, neutralise_all, neutralise_message
from pipeline.runs.folder import RunFolder
from pipeline.verify.score import Answer, HeldOut, answer_budget, read_held_out, read_reference, score, whole


def user_message(text: str) -> dict[str, str]:
    """One user message."""
    return {"role": "user", "content": text}


@dataclass(frozen=True)
class Yardstick:
    """The run's own template, tokenizer and control tokens, to read an engine's prompts with."""

    template: ChatTemplate
    tokenizer: Tokenizer
    controls: frozenset[str]

    @classmethod
    def of_folder(cls, folder: Path) -> "Yardstick":
        """From a model folder."""
        return cls(ChatTemplate.from_folder(folder), Tokenizer(folder), control_tokens(folder))

    def count(self, ids: Collection[int]) -> int:
        """How many of these token IDs are control tokens."""
        known = {self.tokenizer.id_of(token) for token in self.controls}
        return sum(token in known for token in ids)

    def ids(self, text: str) -> list[int]:
        """Token IDs of the prompt that the chat template makes of a user's text."""
        return self.tokenizer.encode(self.template.render([user_message(text)], add_generation_prompt=True))

    def prompt(self, row: HeldOut) -> tuple[str, list[int]]:
        """The prompt of a held-out row, as text and token IDs."""
        text = self.template.render(row.messages, tools=row.tools, documents=row.documents, add_generation_prompt=True)
        return text, self.tokenizer.encode(text)

    def neutral(self, row: HeldOut) -> HeldOut:
        """The row as this product's clients send it: no text but the assistant's own has control tokens."""
        messages = tuple(neutralise_message(message, self.controls) for message in row.messages)
        tools, documents = (given and tuple(neutralise_all(given, self.controls)) for given in (row.tools, row.documents))
        return replace(row, messages=messages, tools=tools, documents=documents)


@dataclass(frozen=True)
class Material:
    """What a run is verified with: held-out rows, their prompts as the tokenizer makes them, reference answers.

    ``rows`` are those that the tuned model was asked in process; None in ``base``: the base was not asked that one.
    """

    rows: list[HeldOut]
    prompts: list[tuple[str, list[int]]]
    base: list[Answer | None]
    tuned: list[Answer]
    tuned_score: dict[str, Any]
    max_tokens: int
    yardstick: Yardstick


def read_material(run: RunFolder, limit: int | None = None) -> Material:
    """Held-out rows asked (the first ``limit``), prompts and reference answers; InputError when a stage is missing."""
    yardstick, every = Yardstick.of_folder(run.merged), read_held_out(run.heldout)
    base, tuned = (read_reference(run.reference(which)) for which in ("base", "tuned"))
    if not (whole(every, base) and whole(every, tuned)):
        remedy = f"granite-pipeline export --run {run.name}"
        raise InputError("the reference answers do not match the held-out rows", remedy=remedy)
    # of all rows, as they were answered in process
    budget = answer_budget(every, [len(yardstick.tokenizer.encode(yardstick.neutral(row).expected)) for row in every])
    numbers = sorted(tuned)[:limit]
    rows, answers = [yardstick.neutral(every[i]) for i in numbers], [tuned[i] for i in numbers]
    prompts = []
    for number, row in zip(numbers, rows, strict=True):
        with at(f"{run.heldout}:{number + 1}"):
            prompts.append(yardstick.prompt(row))
    return Material(rows, prompts, [base.get(i) for i in numbers], answers, score(rows, answers), budget, yardstick)
