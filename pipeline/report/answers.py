"""How an answer differs from the expected one: by JSON field when both are JSON objects, else by word."""

import json
import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal

from pipeline.runs.text import visible

Kind = Literal["same", "differs", "missing", "extra"]

# the field of an answer that holds its thought: shown, and not compared, since no one thought is the right one
THOUGHT = "thought (not scored)"
_MAX_WORDS = 400  # SequenceMatcher is quadratic; a longer answer is shown without marks
_MIN_RATIO = 0.3  # below this nearly every word would be marked, which tells nothing
_WORD = re.compile(r"\s+|\w+|[^\w\s]")


@dataclass(frozen=True)
class Span:
    """A piece of an answer; ``missing`` is what the expected answer has and this one lacks."""

    text: str
    kind: Kind = "same"


@dataclass(frozen=True)
class Line:
    """One JSON field of an answer, or (``field`` None) its whole text."""

    field: str | None
    spans: tuple[Span, ...]

    @property
    def differs(self) -> bool:
        """True when any part of the line is not as expected."""
        return any(span.kind != "same" for span in self.spans)


@dataclass(frozen=True)
class Comparison:
    """An answer cut into lines, with one phrase that sums up the difference."""

    lines: tuple[Line, ...]
    matches: bool
    note: str


def compare(expected: str, answer: str) -> Comparison:
    """Mark where ``answer`` differs from ``expected``."""
    want, got = _json_object(expected), _json_object(answer)
    if want is not None and got is not None:
        return _compare_fields(want, got)
    whole = (Line(None, (Span(visible(answer)),)),)
    if expected.strip() == answer.strip():
        return Comparison(whole, True, "as expected")
    if not answer.strip():
        return Comparison((Line(None, (Span("(empty answer)", "missing"),)),), False, "empty answer")
    if want is not None:
        return Comparison(whole, False, "not a JSON object")
    return _compare_words(expected, answer)


def show(answer: str) -> Comparison:
    """An answer on its own, nothing marked."""
    fields = _json_object(answer)
    if fields is None:
        return Comparison((Line(None, (Span(visible(answer)),)),), True, "")
    return Comparison(tuple(Line(visible(k), (Span(_value(v)),)) for k, v in fields.items()), True, "")


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _value(value: Any) -> str:
    return visible(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _compare_fields(want: dict[str, Any], got: dict[str, Any]) -> Comparison:
    lines = []
    for name in [*want, *(key for key in got if key not in want)]:
        if name == THOUGHT:
            spans = (Span(_value(got.get(name, ""))),)
        elif name not in got:
            spans = (Span("(missing)", "missing"),)
        elif name not in want:
            spans = (Span(_value(got[name]), "extra"),)
        else:
            same = type(got[name]) is type(want[name]) and got[name] == want[name]
            spans = (Span(_value(got[name]), "same" if same else "differs"),)
        lines.append(Line(visible(name), spans))
    different = [line.field or "" for line in lines if line.differs]
    note = f"differs in {', '.join(different)}" if different else "as expected"
    return Comparison(tuple(lines), not different, note)


def _compare_words(expected: str, answer: str) -> Comparison:
    plain = Comparison((Line(None, (Span(visible(answer)),)),), False, "a different text")
    want, got = _WORD.findall(expected.strip()), _WORD.findall(answer.strip())
    if max(len(want), len(got)) > _MAX_WORDS:
        return plain
    matcher = SequenceMatcher(None, want, got, autojunk=False)
    if matcher.ratio() < _MIN_RATIO:
        return plain
    spans: list[Span] = []
    for tag, w1, w2, g1, g2 in matcher.get_opcodes():
        if tag in ("delete", "replace"):
            spans.append(Span(visible("".join(want[w1:w2])), "missing"))
        if g2 > g1:
            spans.append(Span(visible("".join(got[g1:g2])), "same" if tag == "equal" else "extra"))
    return Comparison((Line(None, tuple(spans)),), False, "some words differ")
