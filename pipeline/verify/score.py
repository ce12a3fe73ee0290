"""How answers to held-out rows are scored: each row for what its answer is - tool calls, JSON, text, or what follows a thought."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pipeline.errors import InputError
from pipeline.model.toolcalls import CLOSE, MARKS, OPEN, plain_calls, read_calls, read_thought
from pipeline.runs.files import read_utf8

# ``exact`` means these are all right, in an answer that parses; the recommended action may differ without harm
KEY_FIELDS = ("severity", "technique", "verdict")
# room beyond the longest expected answer, in process and served alike, so that a model that does not stop is seen not to
SPARE_TOKENS = 12
# tokens up to which free text may be twice as long as its author's; and a thought, which has no one right length
_FREE_TEXT, _THOUGHT = 256, 1024
# marks that a model sets around calls; where they are special tokens, they must not be left out of an answer that may have calls
CALL_MARKS = (*MARKS.values(), "</tool_call>")
# why an answer ended that was not asked to go on, since it could no longer be right
CUT = "cut"
_T = TypeVar("_T")
_Object = Mapping[str, Any]


class Said(NamedTuple):
    """What an answer says after its thought (None: it has none): the text, and the calls as ``{"name", "arguments"}``."""

    text: str
    calls: list[dict[str, Any]]
    thought: str | None = None


@dataclass(frozen=True)
class Answer:
    """What a model said and why it ended (``stop``, ``length``, :data:`CUT`, or the engine's word).

    ``calls`` and ``thought`` are what an API returned beside the text; None: not told apart, they are in the text.
    """

    text: str
    finish_reason: str
    calls: tuple[dict[str, Any], ...] | None = None
    thought: str | None = None


@dataclass(frozen=True)
class HeldOut:
    """One held-out conversation: what to send, and the text its author expects, without the end token.

    ``calls`` are the expected tool calls as ``{"name", "arguments"}`` (None: none are expected), ``last`` the message that the
    expected text was rendered from, ``opened`` whether the prompt ends in the midst of a thought.
    """

    messages: tuple[dict[str, Any], ...]
    expected: str
    tools: tuple[dict[str, Any], ...] | None = None
    documents: tuple[dict[str, Any], ...] | None = None
    calls: tuple[dict[str, Any], ...] | None = None
    last: _Object | None = field(default=None, compare=False)
    opened: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        """The marks of calls, for a row that an answer with calls may be given to."""
        return CALL_MARKS if self.tools or self.calls else ()

    @property
    def prompt(self) -> str:
        """The last user message, for people to read."""
        return next((str(m["content"]) for m in reversed(self.messages) if m["role"] == "user"), "")

    @cached_property
    def thinks(self) -> bool:
        """Whether the expected text begins with a thought, or ends the one that the prompt opens (``opened``)."""
        text = _opened(self.expected) if self.opened else self.expected
        return CLOSE in text and read_thought(text).thought is not None

    @cached_property
    def answer(self) -> str:
        """The expected final text: after the thought, before the calls."""
        return said(self, Answer(self.expected, "stop")).text


def _opened(text: str) -> str:
    """A thought whose opening mark an engine left out, with that mark."""
    return text if OPEN in text or CLOSE not in text else f"{OPEN}{text}"


def said(row: HeldOut, answer: Answer) -> Said:
    """What an answer to a row says, told apart by the API or read off its text; a row without any of that: its whole text."""
    thought, text = None, answer.text
    if answer.thought is not None:
        text = f"{OPEN}{answer.thought}{CLOSE}{text}"
    if row.thinks or row.marks:
        thought, text = read_thought(_opened(text) if row.thinks else text)
    if answer.calls is not None:
        return Said(text, list(answer.calls), thought)
    return Said(*(read_calls(text) if row.marks else (text, [])), thought)


def same(row: HeldOut, one: Answer, other: Answer) -> bool:
    """Whether two answers to a row say the same: the final text, and the calls in any order.

    One that was cut may have gone on as the other does, if that begins so.
    """
    if CUT in (one.finish_reason, other.finish_reason):
        cut, whole = (one, other) if one.finish_reason == CUT else (other, one)
        return whole.text.startswith(cut.text)
    ours, theirs = said(row, one), said(row, other)
    return ours.text.strip() == theirs.text.strip() and same_calls(ours.calls, theirs.calls)


def same_calls(ours: Sequence[_Object], theirs: Sequence[_Object]) -> bool:
    """The same functions with the same arguments; order, of arguments too, and 1 for 1.0 are free."""
    return sorted(map(call_key, ours)) == sorted(map(call_key, theirs))


def call_key(call: _Object) -> str:
    """A text that two calls have in common exactly when they are the same call."""
    return json.dumps([call["name"], _whole(call["arguments"])], sort_keys=True, ensure_ascii=False)


def _whole(value: Any) -> Any:
    """JSON with whole numbers as integers: an engine may read every number as a float, or print it as it likes."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {name: _whole(inner) for name, inner in value.items()}
    return [_whole(inner) for inner in value] if isinstance(value, list | tuple) else value


def read_held_out(path: Path) -> list[HeldOut]:
    """Read a run's ``heldout.jsonl``: the last message of each line is the answer.

    ``expected`` is the text that answer is written as, where that is not its content.
    """
    if not path.is_file():
        raise InputError(f"{path}: no held-out rows", remedy="run the training stage first: granite-pipeline train")

    def row(entry: Any) -> HeldOut:
        *messages, last = entry["messages"]
        expected = str(entry.get("expected") or last.get("content") or "")
        calls = plain_calls(last.get("tool_calls") or ()) or read_calls(expected)[1]
        tools, documents = (tuple(entry[key]) if entry.get(key) else None for key in ("tools", "documents"))
        return HeldOut(tuple(messages), expected, tools, documents, tuple(calls) or None, last, bool(entry.get("opened")))

    return _each_line(path, row, "a held-out row", "train again to rewrite it")


def read_reference(path: Path) -> dict[int, Answer]:
    """Answers recorded in process, by held-out row counted from 0; InputError when there are none.

    A line without a row's number is that of the row in its place: then all rows were asked.
    """
    if not path.is_file():
        raise InputError(f"{path}: no reference answers", remedy="granite-pipeline export makes them after the merge")

    def answer(entry: Any) -> tuple[int | None, Answer]:
        return entry.get("row"), Answer(str(entry["text"]), str(entry["finish_reason"]))

    found = _each_line(path, answer, "an answer", "granite-pipeline export --force writes it anew")
    return {place if row is None else int(row) - 1: one for place, (row, one) in enumerate(found)}


def whole(rows: Sequence[HeldOut], answers: Mapping[int, Answer]) -> bool:
    """Whether these can be all answers to a set of rows, or to a sample of it, which has the first and the last row."""
    numbers = sorted(answers)
    return bool(numbers) and numbers[0] == 0 and numbers[-1] == len(rows) - 1


def rows_asked(rows: Sequence[HeldOut], answers: Mapping[int, Answer]) -> tuple[list[HeldOut], list[Answer]]:
    """The rows that were asked, in their order, and the answers to them."""
    return [rows[i] for i in sorted(answers)], [answers[i] for i in sorted(answers)]


def spread(count: int, wanted: int) -> list[int]:
    """At most ``wanted`` numbers below ``count``, evenly spread, the first and (of two or more) the last among them."""
    if count <= wanted:
        return list(range(count))
    if wanted == 1:
        return [0]
    return sorted({round(i * (count - 1) / (wanted - 1)) for i in range(wanted)})


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval (Wilson's) of a share that was seen in ``count`` rows."""
    z = 1.959964
    middle, half = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    low, high = ((middle + side) / (1 + z * z / count) for side in (-half, half))
    return max(0.0, round(low, 4)), min(1.0, round(high, 4))


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


def may_parse(text: str) -> bool:
    """Whether a text may still become a JSON object, as far as its beginning, or what follows a whole one, tells."""
    text = text.lstrip(" \t\r\n")
    if not text:
        return True
    if text[0] != "{" or text[1:].lstrip(" \t\r\n")[:1] not in ("", '"', "}"):
        return False
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return True
    return not text[end:].strip(" \t\r\n")


def fields_of(rows: Sequence[HeldOut]) -> tuple[str, ...]:
    """The fields that all expected answers without calls have, in their order; empty when they are not JSON objects."""
    objects = [parse(row.answer) for row in rows if not row.calls]
    if not objects or any(found is None for found in objects):
        return ()
    common = set.intersection(*(set(found or {}) for found in objects))
    return tuple(name for name in objects[0] or {} if name in common)


def answer_budget(rows: Sequence[HeldOut], lengths: Sequence[int]) -> int:
    """Tokens an answer may have, in process and served alike; ``lengths`` are the tokens of the rows' expected texts.

    Free text, and more so a thought, may be said at greater length than its author did; a JSON object, or a call, that is
    longer than all others is wrong anyway.
    """
    longest, thinks = max(lengths), any(row.thinks for row in rows)
    if not thinks and (fields_of(rows) or all(row.calls for row in rows)):
        return longest + SPARE_TOKENS
    return max(longest + SPARE_TOKENS, min(_THOUGHT if thinks else _FREE_TEXT, 2 * longest + 64))


def is_exact(row: HeldOut, answer: Answer, fields: Sequence[str]) -> bool:
    """Calls: the expected ones and no others. JSON: all key fields right in a final answer that parses. Else the same text."""
    text, calls, _ = said(row, answer)
    if row.calls or calls:
        return same_calls(row.calls or (), calls)
    if not fields:
        return text.strip() == row.answer.strip()
    want, got = parse(row.answer) or {}, parse(text)
    keys = [name for name in KEY_FIELDS if name in fields] or list(fields)
    return got is not None and all(name in got and got[name] == want[name] for name in keys)


def field_right(name: str, rows: Sequence[HeldOut], answers: Sequence[Answer]) -> list[bool]:
    """Whether one field of the answer is the expected one, for each row that expects no calls."""
    pairs = [(parse(row.answer) or {}, said(row, a)) for row, a in zip(rows, answers, strict=True) if not row.calls]
    return [_right(name, want, got.text) and not got.calls for want, got in pairs]


def _right(name: str, want: _Object, text: str) -> bool:
    got = parse(text)
    return got is not None and name in got and bool(got[name] == want[name])


def calls_right(rows: Sequence[HeldOut], answers: Sequence[Answer]) -> list[bool]:
    """Whether the answer makes the expected calls, for each row that expects any."""
    pairs = [(row, answer) for row, answer in zip(rows, answers, strict=True) if row.calls]
    return [is_exact(row, answer, ()) for row, answer in pairs]


def exactly(rows: Sequence[HeldOut], answers: Sequence[Answer], among: Sequence[HeldOut] | None = None) -> list[bool]:
    """:func:`is_exact` row by row, of rows that are a sample of ``among``, where given."""
    fields = fields_of(among or rows)
    return [is_exact(row, answer, fields) for row, answer in zip(rows, answers, strict=True)]


def score(rows: Sequence[HeldOut], answers: Sequence[Answer], among: Sequence[HeldOut] | None = None) -> dict[str, Any]:
    """Shares of rows: JSON valid, each field right, calls right, exact, ended by itself; ``n`` is the number of rows.

    Fields are shares of the rows without expected calls, ``calls`` of those with. ``severity``, ``technique`` and ``calls`` are
    None for data whose answers have none, ``finish_stop`` where an answer was cut. A call is JSON too. ``among`` are the rows that
    these are a sample of: a sample is scored as the whole is.
    """

    def share(right: Sequence[bool]) -> float:
        return round(sum(right) / len(right), 4)

    ends = [answer.finish_reason for answer in answers]
    called, every = calls_right(rows, answers), [said(row, answer) for row, answer in zip(rows, answers, strict=True)]
    return {
        "n": len(rows),
        "json_valid": share([bool(calls) or parse(text) is not None for text, calls, _ in every]),
        "severity": None,
        "technique": None,
        **{name: share(field_right(name, rows, answers)) for name in fields_of(among or rows)},
        "calls": share(called) if called else None,
        "exact": share(exactly(rows, answers, among)),
        "finish_stop": None if CUT in ends else share([end == "stop" for end in ends]),
    }
