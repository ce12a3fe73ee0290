"""What a dataset holds, in numbers: sizes, turns, token lengths, labels, duplicates."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from training.datasets.dataset import Dataset, KeyCount, Refusal, Row, digest, prompt_key, showable
from training.datasets.rows import parse

# role name, two role marks, end of text, newline, and one for a role name of two tokens
_TURN_OVERHEAD = 6
_CHARACTERS_PER_TOKEN = 4
_FIELDS = 12
_VALUES = 24
_CONTROL = re.compile(r"<\|[A-Za-z0-9_]+\|>")


@dataclass(frozen=True)
class Lengths:
    """Tokens of whole rows; ``how`` says whether a tokenizer counted them or they are estimated."""

    minimum: int
    median: int
    p95: int
    maximum: int
    total: int
    how: str


@dataclass(frozen=True)
class Label:
    """A field of JSON answers: how many different values it has, and the most frequent with their counts."""

    field: str
    distinct: int
    top: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Summary:
    """Counts over a dataset; ``over_length`` is None when no maximum was given.

    ``duplicates`` are rows equal to an earlier one, ``repeated_prompts`` those that only ask the same again;
    ``control_token_rows`` have text like ``<|end_of_text|>``, which training writes as ordinary text.
    """

    source: str
    format: str
    sha256: str
    rows: int
    refused: tuple[Refusal, ...]
    turns: int
    roles: dict[str, int]
    tools_rows: int
    tokens: Lengths | None
    max_length: int | None
    over_length: int | None
    json_answers: int
    labels: tuple[Label, ...]
    duplicates: int
    repeated_prompts: int
    control_token_rows: int
    documents_rows: int
    keys: tuple[KeyCount, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON, labels as ``{field: {"distinct", "top": {value: count}}}``."""
        value = asdict(self)
        value["refused"] = [{"where": one.where, "reason": one.reason} for one in self.refused]
        value["keys"] = [one._asdict() for one in self.keys]
        value["labels"] = {label.field: {"distinct": label.distinct, "top": dict(label.top)} for label in self.labels}
        return value


def summarise(dataset: Dataset, tokenizer_folder: Path | None = None, max_length: int | None = None) -> Summary:
    """Count a dataset; with a folder holding tokenizer.json its tokens are counted, else characters / 4 estimates them.

    Raises ModelError when the folder has no usable tokenizer.json.
    """
    rows = dataset.rows
    count, how = _counter(tokenizer_folder)
    lengths = sorted(sum(map(count, _texts(row))) + _TURN_OVERHEAD * len(row.messages) for row in rows)
    exact = {digest(row) for row in rows}
    answers = [answer for row in rows if (answer := _json_answer(row)) is not None]
    roles = Counter(message["role"] for row in rows for message in row.messages)
    return Summary(
        source=dataset.source,
        format=dataset.format,
        sha256=dataset.sha256,
        rows=len(rows),
        refused=dataset.refused,
        turns=sum(roles.values()),
        roles=dict(roles.most_common()),
        tools_rows=sum(1 for row in rows if row.tools),
        tokens=_lengths(lengths, how),
        max_length=max_length,
        over_length=None if max_length is None else sum(length > max_length for length in lengths),
        json_answers=len(answers),
        labels=_labels(answers),
        duplicates=len(rows) - len(exact),
        repeated_prompts=len(exact) - len({prompt_key(row) for row in rows}),
        control_token_rows=sum(any(_CONTROL.search(text) for text in _texts(row)) for row in rows),
        documents_rows=sum(1 for row in rows if row.documents),
        keys=dataset.keys,
    )


def _counter(folder: Path | None) -> tuple[Callable[[str], int], str]:
    if folder is None:
        return (lambda text: -(-len(text) // _CHARACTERS_PER_TOKEN)), "estimated as characters / 4"
    from pipeline.model.tokenizer import Tokenizer

    tokenizer = Tokenizer(folder)
    return (lambda text: len(tokenizer.encode(text))), "counted by the tokenizer"


def _texts(row: Row) -> list[str]:
    """The text of each turn, tool calls written as JSON, then the tools and documents."""
    texts = [
        m.get("reasoning_content", "") + m["content"] + (json.dumps(m["tool_calls"]) if "tool_calls" in m else "")
        for m in row.messages
    ]
    return [*texts, *(json.dumps(extra) for extra in (row.tools, row.documents) if extra)]


def _lengths(lengths: Sequence[int], how: str) -> Lengths | None:
    """None for no rows; the 95th percentile is the smallest length that 95 % of rows do not exceed."""
    if not lengths:
        return None
    n = len(lengths)
    return Lengths(lengths[0], lengths[(n - 1) // 2], lengths[-(-95 * n // 100) - 1], lengths[-1], sum(lengths), how)


def _json_answer(row: Row) -> dict[str, Any] | None:
    try:
        value = parse(row.messages[-1]["content"])
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _labels(answers: list[dict[str, Any]]) -> tuple[Label, ...]:
    """Fields in order of first appearance; a text field is counted too, its ``distinct`` shows that it is no label."""
    counts: dict[str, Counter[str]] = {}
    for answer in answers:
        for field, value in answer.items():
            if isinstance(value, str | int | float | None):
                text = value if isinstance(value, str) else json.dumps(value)
                counts.setdefault(showable(field), Counter())[showable(text)] += 1
    return tuple(
        Label(field, len(counter), tuple(sorted(counter.items(), key=lambda item: (-item[1], item[0]))[:_VALUES]))
        for field, counter in list(counts.items())[:_FIELDS]
    )
