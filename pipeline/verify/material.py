"""What a run is verified with: held-out rows, the prompts they make, and the answers given in process."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.model.tokenizer import Tokenizer
from pipeline.prompts.chat import ChatTemplate
from pipeline.prompts.neutralise import control_tokens, neutralise_message
from pipeline.runs.folder import RunFolder
from pipeline.verify.score import Answer, HeldOut, answer_budget, read_held_out, read_reference, score


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
        return self.tokenizer.encode(self.template.render([_user(text)], add_generation_prompt=True))


def _user(text: str) -> Mapping[str, Any]:
    return {"role": "user", "content": text}


@dataclass(frozen=True)
class Material:
    """What a run is verified with: held-out rows, their prompts as the tokenizer makes them, reference answers."""

    rows: list[HeldOut]
    prompts: list[tuple[str, list[int]]]
    base: list[Answer]
    tuned: list[Answer]
    tuned_score: dict[str, Any]
    max_tokens: int
    yardstick: Yardstick


def read_material(run: RunFolder, limit: int | None = None) -> Material:
    """Held-out rows (the first ``limit``), prompts and reference answers; InputError when a stage is missing."""
    yardstick = Yardstick.of_folder(run.merged)
    rows = [_clean(row, yardstick.controls) for row in read_held_out(run.heldout)][:limit]
    references = {which: read_reference(run.reference(which))[:limit] for which in ("base", "tuned")}
    if any(len(answers) != len(rows) for answers in references.values()):
        raise InputError(
            "the reference answers do not match the held-out rows", remedy=f"granite-pipeline export --run {run.name}"
        )
    template, tokenizer = yardstick.template, yardstick.tokenizer
    texts = [template.render(row.messages, tools=row.tools, add_generation_prompt=True) for row in rows]
    budget = answer_budget([row.expected for row in rows], [len(tokenizer.encode(row.expected)) for row in rows])
    prompts = [(text, tokenizer.encode(text)) for text in texts]
    tuned_score = score(rows, references["tuned"])
    return Material(rows, prompts, references["base"], references["tuned"], tuned_score, budget, yardstick)


def _clean(row: HeldOut, controls: frozenset[str]) -> HeldOut:
    return HeldOut(tuple(neutralise_message(message, controls) for message in row.messages), row.expected, row.tools)
