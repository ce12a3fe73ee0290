"""Turn conversations into token IDs and labels: loss on assistant turns only, exactly one end-of-text per turn."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.model.tokenizer import load
from pipeline.prompts.chat import ChatTemplate, assistant_spans
from pipeline.prompts.neutralise import control_tokens, neutralise_message
from pipeline.prompts.stops import special_ids, turn_end
from pipeline.runs.folder import RunFolder
from training.base import resolve
from training.datasets.dataset import Row
from training.parameters import FinetuneParameters

IGNORED = -100


@dataclass(frozen=True)
class Example:
    """One training row: ``input_ids`` and ``labels`` have the same length; labels are IGNORED outside assistant turns."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    where: str


@dataclass(frozen=True)
class Prepared:
    """Examples ready to train on, and the rows that were too long (named, not cut)."""

    examples: tuple[Example, ...]
    too_long: tuple[str, ...]
    neutralised: int

    @property
    def tokens(self) -> int:
        """Tokens in all examples."""
        return sum(len(e.input_ids) for e in self.examples)

    @property
    def trained_tokens(self) -> int:
        """Tokens that carry loss."""
        return sum(label != IGNORED for e in self.examples for label in e.labels)


class Preparer:
    """Renders, tokenises and masks rows for one model folder (tokenizer.json, chat template, eos token).

    ``now`` is the clock that dated templates see; the same one makes the same rows on any day.
    """

    def __init__(self, folder: Path, now: datetime | None = None) -> None:
        self.now = now or datetime.now()
        self.template = ChatTemplate.from_folder(folder)
        self.tokenizer = load(folder)
        self.controls = control_tokens(folder)
        self.eos_id = turn_end(self.template, special_ids(folder)).id

    def clean(self, row: Row) -> Row:
        """The row with control tokens inside its texts turned into ordinary text."""
        return Row(tuple(neutralise_message(message, self.controls) for message in row.messages), row.where, row.tools)

    def example(self, row: Row) -> Example:
        """Token IDs and labels of one clean row; raises DataError when its mask is not exactly one end-of-text per turn."""
        messages, tools = list(row.messages), list(row.tools) if row.tools else None
        text = self.template.render(messages, tools=tools, now=self.now)
        spans = assistant_spans(self.template, messages, tools=tools, now=self.now)
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        labels = [
            token if any(start <= a and b <= end for start, end in spans) and b > a else IGNORED
            for token, (a, b) in zip(encoding.ids, encoding.offsets, strict=True)
        ]
        turns = sum(message["role"] == "assistant" for message in messages)
        ends = sum(label == self.eos_id for label in labels)
        if ends != turns:
            remedy = "the chat template must end each assistant turn with the tokenizer's eos token, once"
            raise DataError(f"{row.where}: {ends} trained end-of-text tokens for {turns} assistant turns", remedy=remedy)
        return Example(tuple(encoding.ids), tuple(labels), row.where)

    def prepare(self, rows: Sequence[Row], max_length: int) -> Prepared:
        """All rows as examples; rows over ``max_length`` tokens are listed apart. DataError when none is left."""
        clean = [self.clean(row) for row in rows]
        examples = [self.example(row) for row in clean]
        kept = tuple(e for e in examples if len(e.input_ids) <= max_length)
        if not kept:
            remedy = "raise --max-length or shorten the rows"
            raise DataError(f"all {len(rows)} rows are longer than {max_length} tokens", remedy=remedy)
        too_long = tuple(e.where for e in examples if len(e.input_ids) > max_length)
        return Prepared(kept, too_long, sum(row.messages != made.messages for row, made in zip(rows, clean, strict=True)))


def trained_tokens(params: FinetuneParameters, run: RunFolder, row: Row) -> Any:
    """The row as the model sees it, token by token; tokens that carry loss are marked."""
    from IPython.display import HTML

    preparer = Preparer(resolve(params.base, run.base_cache, params.revision).folder)
    example = preparer.example(preparer.clean(row))
    pieces = []
    for token, label in zip(example.input_ids, example.labels, strict=True):
        text = escape(preparer.tokenizer.decode([token], skip_special_tokens=False)).replace("\n", "↵<br>")
        style = "background:#b7e4c7" if label != IGNORED else "background:#eee"
        pieces.append(f'<span style="{style};color:#111;border-right:1px solid #fff">{text}</span>')
    return HTML(f'<div style="font-family:monospace;line-height:1.9">{"".join(pieces)}</div>')
