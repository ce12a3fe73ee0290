"""Turn conversations into token IDs and labels: loss on assistant turns only, exactly one end-of-text per turn."""

import json
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import DataError, InputError, PipelineError, at
from pipeline.model.tokenizer import load
from pipeline.model.toolcalls import (
    CLOSE,
    OPEN,
    plain_calls,
    read_calls,
    read_thought,
    tool_format,
    written_calls,
    written_thought,
)
from pipeline.prompts.chat import END, MIDDLE, START, ChatTemplate, assistant_spans
from pipeline.prompts.neutralise import control_tokens, neutralise_all, neutralise_message
from pipeline.prompts.stops import special_ids, turn_end
from pipeline.runs.hashes import sha256_json
from training.datasets.dataset import Refusal, Row, bad_rows, showable
from training.tuning.receipt import Chat, unused

IGNORED = -100
# what a tokenizer's decoder writes for bytes that are no character
_NO_CHARACTER = "\N{REPLACEMENT CHARACTER}"
_PROBE_NAME = "a_probed_call"
_PROBE_CALL = {"type": "function", "function": {"name": _PROBE_NAME, "arguments": {"probed": "value"}}}
_ASKED = {"role": "user", "content": "q"}


@dataclass(frozen=True)
class Example:
    """One training row: ``input_ids`` and ``labels`` have the same length; labels are IGNORED outside what is learned.

    ``spans`` are the characters of ``text`` that are learned, ``unused`` what of the row the template has no place for. Rows of one
    ``head`` have the same system message, tools and documents.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    where: str
    text: str = ""
    spans: tuple[tuple[int, int], ...] = ()
    unused: tuple[str, ...] = ()
    head: str = ""

    @property
    def trained(self) -> list[str]:
        """The texts that are learned."""
        return [self.text[start:end] for start, end in self.spans]


@dataclass(frozen=True)
class Prepared:
    """Examples ready to train on, the rows that were too long (named, not cut), and those that were refused.

    ``neutralised`` counts the rows in whose texts control tokens were broken up; ``pairs`` are all clean rows with their examples,
    the too long ones among them.
    """

    examples: tuple[Example, ...]
    too_long: tuple[str, ...]
    neutralised: int
    pairs: tuple[tuple[Row, Example], ...] = ()
    refused: tuple[Refusal, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens in all examples."""
        return sum(len(e.input_ids) for e in self.examples)

    @property
    def trained_tokens(self) -> int:
        """Tokens that carry loss."""
        return sum(label != IGNORED for e in self.examples for label in e.labels)


class Tried(NamedTuple):
    """A row as it was read, what was made of it - the clean row and its example, or the refusal - and its texts neutralised."""

    row: Row
    made: tuple[Row, Example] | Refusal
    neutralised: int = 0


def collected(tried: Sequence[Tried]) -> Prepared:
    """Rows of any length that were tried, those that were refused apart."""
    pairs = tuple(one.made for one in tried if not isinstance(one.made, Refusal))
    refused = tuple(one.made for one in tried if isinstance(one.made, Refusal))
    return Prepared(tuple(example for _, example in pairs), (), sum(bool(one.neutralised) for one in tried), pairs, refused)


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
        self._calls: dict[bool, bool] = {}
        # what frames turns can be no part of an answer
        self.frame = self.controls & {START, MIDDLE, END.strip(), self.template.variables.get("eos_token", "")}

    def clean(self, row: Row) -> Row:
        """The row as the base's template takes it: control tokens in texts that are not the assistant's turned into ordinary text,
        thoughts and calls in the form that the model was made for. Raises DataError where it has none.
        """
        with at(row.where):
            messages = tuple(neutralise_message(self._own_form(message, row.tools), self.controls) for message in row.messages)
        tools, documents = (value and tuple(neutralise_all(value, self.controls)) for value in (row.tools, row.documents))
        return replace(row, messages=messages, tools=tools, documents=documents)

    def neutralised(self, row: Row, clean: Row) -> int:
        """In how many of a row's messages, tools and documents control tokens were broken up."""
        pairs = [
            pair
            for name in ("messages", "tools", "documents")
            for pair in zip(getattr(row, name) or (), getattr(clean, name) or (), strict=True)
        ]
        return sum(before != after for before, after in pairs if before.get("role") != "assistant")

    def example(self, row: Row) -> Example:
        """Token IDs and labels of one clean row.

        Raises DataError, beginning with the row's place, when a piece of it is not in the prompt, or when an answer is not learned
        whole with exactly one end-of-text; ModelError when the template refuses the row.
        """
        with at(row.where):
            return self._example(row)

    def _example(self, row: Row) -> Example:
        turns = [{key: value for key, value in message.items() if key != "weight"} for message in row.messages]
        chat = Chat(turns, row.tools, row.documents)
        text = self._rendered(chat)
        spans = assistant_spans(self.template, turns, tools=row.tools, documents=row.documents, now=self.now)
        left_out = unused(chat, text, self._rendered)
        if row.text is not None and not text.strip().endswith(row.text.strip()):
            said = "the base's chat template makes another text of these turns than the row has"
            raise DataError(said, evidence=_parting(row.text.strip(), text.strip()), remedy="give the turns as messages")
        answers = [message for message in row.messages if message["role"] == "assistant"]
        pairs = [(span, message) for span, message in zip(spans, answers, strict=True) if message.get("weight") != 0]
        learned = tuple(span for span, _ in pairs)
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        for start, end in spans:
            self._check(text[start:end])
        chosen = set[int]()
        for (start, end), message in pairs:
            if (calls := message.get("tool_calls")) and tool_format(self.template.chosen(row.tools)):
                _require_readable(text[start:end].removesuffix(self.template.variables["eos_token"]), calls)
            tokens = _tokens(text, encoding.offsets, start, end)
            if lost := self._lost(text[start:end], encoding.ids[tokens.start : tokens.stop]):
                remedy = "take the character out, or use another base"
                raise DataError(f"the base's tokenizer has no tokens for {lost!r}, which an answer holds", remedy=remedy)
            chosen.update(tokens)
        labels = [token if i in chosen else IGNORED for i, token in enumerate(encoding.ids)]
        ends = sum(label == self.eos_id for label in labels)
        if ends != len(learned):
            remedy = "the chat template must end each assistant turn with the tokenizer's eos token, once"
            raise DataError(f"{ends} trained end-of-text tokens for {len(learned)} assistant turns", remedy=remedy)
        if lost := self._lost(text, encoding.ids):
            left_out = (*left_out, f"characters the tokenizer has no tokens for ({lost!r})")
        head = sha256_json([turns[0]["content"] if turns[0]["role"] == "system" else None, row.tools, row.documents])
        left_out = tuple(sorted({*row.unused, *left_out}))
        return Example(tuple(encoding.ids), tuple(labels), row.where, text, learned, left_out, head)

    def _rendered(self, chat: Chat) -> str:
        return self.template.render(chat.messages, tools=chat.tools, documents=chat.documents, now=self.now)

    def _lost(self, text: str, ids: Sequence[int]) -> str:
        """The first character that the tokenizer has no tokens for and leaves out; empty where nothing is lost."""
        made, normalizer = self._decoded(ids), self.tokenizer.normalizer
        wanted = normalizer.normalize_str(text) if normalizer else text
        # other decoders than this one trim and join words anew, which loses nothing
        exact = type(self.tokenizer.decoder).__name__ == "ByteLevel"
        if made == wanted or (not exact and made.count(_NO_CHARACTER) <= wanted.count(_NO_CHARACTER)):
            return ""
        return next((c for c in wanted if self._decoded(self.tokenizer.encode(c, add_special_tokens=False).ids) != c), "")

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def _check(self, answer: str) -> None:
        """DataError when an answer holds what frames turns, or says nothing."""
        body = answer.removesuffix(self.template.variables["eos_token"])
        if found := next((token for token in sorted(self.frame) if token in body), None):
            raise DataError(f"an answer holds {found}, which frames turns", remedy="take it out of the answer")
        if not body.strip():
            raise DataError("an answer is nothing but its end, which would teach the model to say nothing")

    def _own_form(self, message: Mapping[str, Any], tools: Any) -> dict[str, Any]:
        """A message with its thought and calls as text, where the template does not write them itself."""
        made, source = dict(message), self.template.chosen(tools)
        calls = made.get("tool_calls")
        if calls and not self._writes_calls(tools):
            form = tool_format(source)
            if form is None:
                remedy = "use a base whose chat template has tool calls"
                raise DataError("the base's chat template writes no tool calls and names no form for them", remedy=remedy)
            if made["content"].strip() or made.get("reasoning_content"):
                before = made["content"] or made["reasoning_content"]
                remedy = "take the text out of the row, or use a base whose chat template writes calls (Granite 4)"
                raise DataError(f"{before[:40]!r} stands before a call, where this base writes calls alone", remedy=remedy)
            made["content"] = written_calls(form, plain_calls(calls))
            _require_readable(made["content"], calls)
            del made["tool_calls"]
        thought = made.get("reasoning_content")
        if thought and "reasoning_content" not in source:
            if CLOSE in thought:
                raise DataError(f"a thought holds {CLOSE}, which ends thoughts", remedy="take it out of the thought")
            made["content"] = written_thought(source, thought, made["content"])
            del made["reasoning_content"]
        return made

    def _writes_calls(self, tools: Any) -> bool:
        """Whether the template writes an assistant's ``tool_calls``, found by rendering one."""
        if (key := bool(tools)) not in self._calls:
            chat: list[dict[str, Any]] = [_ASKED, {"role": "assistant", "content": "", "tool_calls": [_PROBE_CALL]}]
            try:
                self._calls[key] = _PROBE_NAME in self.template.render(chat, tools=tools, now=self.now)
            except PipelineError:
                self._calls[key] = False
        return self._calls[key]

    def prepare(self, rows: Sequence[Row], max_length: int, *, skip_bad: bool = False) -> Prepared:
        """All rows as examples; rows over ``max_length`` tokens are listed apart, and so are refused ones with ``skip_bad``.

        Raises DataError with the rows that are refused, or when none is left.
        """
        tried = self.attempt(rows)
        if tried.refused and not (skip_bad and tried.pairs):
            raise bad_rows("the rows", tried.refused, len(rows))
        kept = tuple(e for e in tried.examples if len(e.input_ids) <= max_length)
        if not kept:
            remedy = "raise --max-length or shorten the rows"
            raise DataError(f"all {len(tried.examples)} rows are longer than {max_length} tokens", remedy=remedy)
        too_long = tuple(e.where for e in tried.examples if len(e.input_ids) > max_length)
        return replace(tried, examples=kept, too_long=too_long)

    def attempt(self, rows: Sequence[Row]) -> Prepared:
        """Rows of any length as examples; those that are refused are listed with the reason, nothing is raised."""
        return collected([self.tried(row) for row in rows])

    def tried(self, row: Row) -> Tried:
        """A row as it came, and its example or why it is refused."""
        try:
            clean = self.clean(row)
            return Tried(row, (clean, self.example(clean)), self.neutralised(row, clean))
        except InputError as error:
            return Tried(row, Refusal(row.where, showable(error.message.removeprefix(f"{row.where}: ")), error.remedy))


def held_out_line(row: Row, example: Example, preparer: Preparer) -> str:
    """A clean row as a line of ``heldout.jsonl``: up to the last answer that is learned, which is expected.

    ``expected`` is what the model is to write, where that is not the answer's content alone (calls).
    """
    answers = [i for i, message in enumerate(row.messages) if message["role"] == "assistant" and message.get("weight") != 0]
    messages = [{key: value for key, value in m.items() if key != "weight"} for m in row.messages[: answers[-1] + 1]]
    line: dict[str, Any] = {"messages": messages}
    line |= {name: list(value) for name in ("tools", "documents") if (value := getattr(row, name))}
    expected = example.trained[-1].removesuffix(preparer.template.variables["eos_token"])
    if expected != messages[-1]["content"]:
        line["expected"] = expected
    if example.text[: example.spans[-1][0]].rstrip().endswith(OPEN):  # the prompt ends in the midst of a thought
        line["opened"] = True
    return json.dumps(line, ensure_ascii=False) + "\n"


def _require_readable(answer: str, calls: Sequence[Mapping[str, Any]]) -> None:
    """DataError when the calls that an answer was written with are not found in it again, by engines neither."""
    if read_calls(read_thought(answer).answer)[1] != plain_calls(calls):
        said = f"the calls of an answer cannot be told apart from the text around or in them ({answer[:60]!r})"
        raise DataError(said, remedy="take the marks of calls out of the text and the arguments")


def _tokens(text: str, offsets: Sequence[tuple[int, int]], start: int, end: int) -> range:
    """The tokens of a span, by their character offsets; DataError when they do not cover it, or reach over its ends.

    Some tokenizers leave white space out of a token's offsets, so a gap of white space is none.
    """
    first = bisect_right(offsets, start, key=lambda offset: offset[1])
    last = bisect_left(offsets, end, key=lambda offset: offset[0])
    if (
        first < last
        and not text[start : offsets[first][0]].strip()
        and offsets[first][0] >= start
        and offsets[last - 1][1] <= end
    ):
        return range(first, last)
    remedy = "report the base's tokenizer.json: one of its tokens reaches over the beginning or the end of an answer"
    raise DataError(f"the tokens of an answer do not cover it ({text[start : start + 40]!r})", remedy=remedy)


def _parting(wanted: str, made: str) -> str:
    """Where two texts part, from their ends, for people to read."""
    same = next(
        (i for i, (a, b) in enumerate(zip(wanted[::-1], made[::-1], strict=False)) if a != b), min(len(wanted), len(made))
    )
    return "\n".join(f"{who}: ...{text[-same - 40 :][:80]!r}..." for who, text in (("row", wanted), ("template", made)))
