"""What becomes of each key of a row: used, harmless, ignored because it was asked for - or the row is refused.

There is no fourth list: a key that is neither used nor known to say nothing about the answer may change what the row means.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from shlex import quote
from typing import Any, Literal

Fate = Literal["used", "harmless", "ignored"]

UNDERSTOOD = {
    "messages": (("messages",), ()),
    "conversations": (("conversations",), ()),
    "xlam": (("query", "answers", "tools"), ()),
    "prompt/completion": (("prompt", "completion"), ()),
    "alpaca": (("instruction", "output"), ("input", "history")),
    "dolly": (("instruction", "response"), ("context",)),
    "question/answer": (("question", "answer"), ("context",)),
    "text": (("text",), ()),
}
"""Each format's columns: those a row must have, those it may have beside BESIDE."""

# names of rows and turns, where they come from, how they were judged or counted: nothing that a model is told
_OF_ROWS = """
id idx index uid uuid guid key hash md5 sha256 row_id prompt_id question_id sample_id doc_id conversation_id dialog_id dialogue_id
thread_id session_id task_id message_id parent_id __index_level_0__ source sources data_source origin dataset dataset_name subset split
category categories subcategory topic topics domain tag tags task task_name task_type type language lang locale license url link author
annotator created created_at updated_at date time timestamp version metadata meta difficulty quality score scores rating ratings
num_tokens token_count length num_turns model parallel_tool_calls
"""
_OF_TURNS = "id uid uuid index turn message_id parent_id created created_at timestamp time date model tool_call_id"
_OF_PREFERENCES = frozenset("chosen rejected label preference winner loser chosen_response rejected_response".split())  # noqa: SIM905
HARMLESS, HARMLESS_IN_TURNS = frozenset(_OF_ROWS.split()), frozenset(_OF_TURNS.split())

# what a column may be that has another name
_MEANINGS = ("prompt", "completion", "messages", "system", "documents", "tools", "input")
# characters of a text that is not in another one by chance
_LONG = 40


class RowError(ValueError):
    """A row cannot be trained on; the text is the reason. ``keys`` are those it is refused for, where it is for keys."""

    def __init__(self, reason: str, *keys: str) -> None:
        super().__init__(reason)
        self.keys = keys


def detect(columns: Mapping[str, Any]) -> str | None:
    """The format whose required columns are all there, None when there is none; the first of UNDERSTOOD wins."""
    return next((name for name, (needed, _) in UNDERSTOOD.items() if all(c in columns for c in needed)), None)


def says_nothing(value: Any) -> bool:
    """Whether a value is as good as no key at all: None, empty, or the NaN that stands for a missing number."""
    return value is None or value in ("", [], {}, "[]", "{}") or (isinstance(value, float) and math.isnan(value))


def row_keys(row: Mapping[str, Any], used: Collection[str], ignore: Collection[str], texts: Sequence[str]) -> dict[str, Fate]:
    """The fate of each key of a row that says anything; ``texts`` are the turns' texts. RowError for a key on no list."""
    fates: dict[str, Fate] = {}
    strange = []
    for key, value in row.items():
        if key in ignore:
            fates[key] = "ignored"
        elif says_nothing(value):
            continue
        elif key in used:
            fates[key] = "used"
        elif key.lower() in HARMLESS or (key.lower() not in _OF_PREFERENCES and _is_copy(value, texts)):
            fates[key] = "harmless"
        else:
            strange.append(key)
    if strange:
        raise RowError(_reason(strange, row), *strange)
    return fates


def turn_keys(turn: Mapping[str, Any], used: Collection[str], ignore: Collection[str], role: str, number: int) -> dict[str, Fate]:
    """As :func:`row_keys`, for the keys of one turn, which are named ``messages[].key``."""
    fates: dict[str, Fate] = {}
    for key, value in turn.items():
        name = f"messages[].{key}"
        if key in ignore or name in ignore:
            fates[name] = "ignored"
        elif says_nothing(value):
            continue
        elif key in HARMLESS_IN_TURNS or (key == "name" and role == "tool"):
            fates[name] = "harmless"
        elif key in used:
            fates[name] = "used"
        else:
            raise RowError(
                f"turn {number} has {key!r}, which is not used and may matter; --ignore {quote(key)} leaves it out", name
            )
    return fates


def _is_copy(value: Any, texts: Sequence[str]) -> bool:
    """Whether a text only repeats the turns: it is one of them, or a long part of one."""
    if not isinstance(value, str) or not value.strip():
        return False
    mine = value.strip()
    return any(mine == text.strip() or (len(mine) >= _LONG and mine in text) for text in texts)


def _reason(keys: Sequence[str], row: Mapping[str, Any]) -> str:
    named, ignore = " and ".join(map(repr, keys)), " ".join(f"--ignore {quote(key)}" for key in keys)
    if isinstance(row.get("label"), bool) and "label" in keys:
        return f"has {named}, which tells good answers from bad ones: keep the rows whose label is true, then {ignore}"
    if {key.lower() for key in keys} & _OF_PREFERENCES:
        return f"has {named}, as sets of preferences have; training is on one answer: {ignore} trains on the one in the turns"
    them = "it" if len(keys) == 1 else "them"
    meaning = f"--columns NAME={quote(keys[0])} gives one a meaning (NAME: {', '.join(_MEANINGS)})"
    return f"has {named}, not used, which may matter: {ignore} leaves {them} out, {meaning}"
