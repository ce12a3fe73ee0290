"""What a run is verified with - held-out rows, their prompts, the answers given in process - and how answers are scored."""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import InputError, at
from pipeline.model.tokenizer import Tokenizer
from pipeline.prompts.chat import ChatTemplate
from pipeline.prompts.neutralise import control_tokens, neutralise_message
from pipeline.runs.files import read_utf8
from pipeline.runs.folder import RunFolder

# ``exact`` means these are all right, in an answer that parses; the recommended action may differ without harm
KEY_FIELDS = ("severity", "technique", "verdict")
# room beyond the longest expected answer, in process and served alike, so that a model that does not stop is seen not to
SPARE_TOKENS = 12
_T = TypeVar("_T")


@dataclass(frozen=True)
class HeldOut:
    """One held-out conversation: the messages to send, and the answer its author expected."""

    messages: tuple[dict[str, Any], ...]
    expected: str
    tools: tuple[dict[str, Any], ...] | None = None

    @property
    def prompt(self) -> str:
        """The last user message, for people to read."""
        return next((str(m["content"]) for m in reversed(self.messages) if m["role"] == "user"), "")


@dataclass(frozen=True)
class Answer:
    """What a model said and why it ended (``stop``, ``length``, or the engine's word)."""

    text: str
    finish_reason: str


def read_held_out(path: Path) -> list[HeldOut]:
    """Read a run's ``heldout.jsonl``; the last assistant message of each line is the expected answer."""
    if not path.is_file():
        raise InputError(f"{path}: no held-out rows", remedy="run the training stage first: granite-pipeline train")

    def row(entry: Any) -> HeldOut:
        *messages, last = entry["messages"]
        return HeldOut(tuple(messages), str(last.get("content") or ""), entry.get("tools"))

    return _each_line(path, row, "a held-out row", "train again to rewrite it")


def read_reference(path: Path) -> list[Answer]:
    """Answers recorded in process; InputError when there are none."""
    if not path.is_file():
        raise InputError(f"{path}: no reference answers", remedy="granite-pipeline export makes them after the merge")

    def answer(entry: Any) -> Answer:
        return Answer(str(entry["text"]), str(entry["finish_reason"]))

    return _each_line(path, answer, "an answer", "granite-pipeline export --force writes it anew")


def _each_line(path: Path, made: Callable[[Any], _T], what: str, remedy: str) -> list[_T]:
    """What is made of each JSON line; InputError names the line that is not one."""
    found = []
    for number, line in enumerate(read_utf8(path).split("\n"), 1):  # splitlines() would also split at U+2028
        if not line:
            continue
        try:
            found.append(made(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}:{number}: not {what} ({error!r})", remedy=remedy) from None
    return found


def parse(text: str) -> dict[str, Any] | None:
    """The JSON object an answer is, or None when it is anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def fields_of(expected: Sequence[str]) -> tuple[str, ...]:
    """The fields that all expected answers have, in their order; empty when they are not JSON objects."""
    objects = [parse(text) for text in expected]
    if not objects or any(found is None for found in objects):
        return ()
    common = set.intersection(*(set(found or {}) for found in objects))
    return tuple(name for name in objects[0] or {} if name in common)


def answer_budget(expected: Sequence[str], lengths: Sequence[int]) -> int:
    """Tokens an answer may have, in process and served alike; ``lengths`` are the tokens of the expected answers.

    Free text may be said at greater length than its author did; a JSON object that is longer than all others is wrong anyway.
    """
    longest = max(lengths)
    if fields_of(expected):
        return longest + SPARE_TOKENS
    return max(longest + SPARE_TOKENS, min(256, 2 * longest + 64))


def is_exact(expected: str, text: str, fields: Sequence[str]) -> bool:
    """All key fields right in an answer that parses; for answers that are not JSON, the same text."""
    if not fields:
        return text.strip() == expected.strip()
    want, got = parse(expected) or {}, parse(text)
    keys = [name for name in KEY_FIELDS if name in fields] or list(fields)
    return got is not None and all(name in got and got[name] == want[name] for name in keys)


def field_right(name: str, rows: Sequence[HeldOut], answers: Sequence[Answer]) -> list[bool]:
    """Row by row, whether one field of the answer is the expected one."""
    pairs = ((parse(row.expected) or {}, parse(answer.text)) for row, answer in zip(rows, answers, strict=True))
    return [got is not None and name in got and got[name] == want[name] for want, got in pairs]


def score(rows: Sequence[HeldOut], answers: Sequence[Answer]) -> dict[str, Any]:
    """Shares of rows: JSON valid, each field right, exact, ended by itself; ``n`` is the number of rows.

    ``severity`` and ``technique`` are None for data whose answers have no such field.
    """
    fields = fields_of([row.expected for row in rows])

    def share(right: int) -> float:
        return round(right / len(rows), 4)

    return {
        "n": len(rows),
        "json_valid": share(sum(parse(answer.text) is not None for answer in answers)),
        "severity": None,
        "technique": None,
        **{name: share(sum(field_right(name, rows, answers))) for name in fields},
        "exact": share(sum(is_exact(row.expected, a.text, fields) for row, a in zip(rows, answers, strict=True))),
        "finish_stop": share(sum(answer.finish_reason == "stop" for answer in answers)),
    }


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
    template, tokenizer, controls = yardstick.template, yardstick.tokenizer, yardstick.controls
    rows = [
        HeldOut(tuple(neutralise_message(message, controls) for message in row.messages), row.expected, row.tools)
        for row in read_held_out(run.heldout)[:limit]
    ]
    references = {which: read_reference(run.reference(which))[:limit] for which in ("base", "tuned")}
    if any(len(answers) != len(rows) for answers in references.values()):
        remedy = f"granite-pipeline export --run {run.name}"
        raise InputError("the reference answers do not match the held-out rows", remedy=remedy)
    texts = []
    for number, row in enumerate(rows, 1):
        with at(f"{run.heldout}:{number}"):
            texts.append(template.render(row.messages, tools=row.tools, add_generation_prompt=True))
    budget = answer_budget([row.expected for row in rows], [len(tokenizer.encode(row.expected)) for row in rows])
    prompts = [(text, tokenizer.encode(text)) for text in texts]
    tuned_score = score(rows, references["tuned"])
    return Material(rows, prompts, references["base"], references["tuned"], tuned_score, budget, yardstick)
