"""Untrusted text and control tokens: which strings a tokenizer turns into control tokens, and how text avoids them."""

import re
import unicodedata
from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError
from pipeline.runs.files import read_object

_MARKUP = re.compile(r"<.+>|\[.+\]", re.DOTALL)
_REPLACEMENT = "�"


def control_tokens(folder: Path) -> frozenset[str]:
    """Strings that the folder's tokenizer.json matches whole, before any other rule, and that steer the model.

    These are the added tokens marked special, and those written as ``<...>`` or ``[...]`` (tool and thinking marks are
    often added without the mark). Raises ModelError when the folder has no tokenizer.json.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        remedy = "save the tokenizer there with tokenizer.save_pretrained(folder)"
        raise ModelError(f"{folder} has no tokenizer.json", remedy=remedy)
    try:
        steer = [t["content"] for t in added_tokens(read_object(path)) if t.get("special") or _MARKUP.fullmatch(t["content"])]
        return frozenset(text for text in steer if text.strip())
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: an entry of added_tokens is malformed ({error!r})") from None


def added_tokens(tokenizer: Mapping[str, Any]) -> list[Any]:
    """The added tokens of a tokenizer.json's object."""
    return list(tokenizer.get("added_tokens") or [])


def neutralise(text: str, tokens: Collection[str]) -> str:
    """``text`` with a space after the first character of each control token, so that it tokenizes as ordinary text.

    Letter case and compatibility forms (full-width ``＜``) are seen through, because a tokenizer may normalise them.
    Text without control tokens comes back unchanged; applying it twice changes nothing more.
    """
    pattern = _pattern(frozenset(tokens))
    if pattern is None:
        return text
    # a break can join with what stands beside it to another token, so look again until none is left
    for _ in range(len(text) + 2):
        text, broken = pattern.subn(_break, text)
        if not broken and (text.isascii() or (folded := _without_forms(text, pattern)) == text):
            return text
        text = text if broken else folded
    raise ModelError("these control tokens cannot be broken up in text", evidence=", ".join(sorted(map(repr, tokens)))[:400])


def neutralise_message(message: Mapping[str, Any], tokens: Collection[str]) -> dict[str, Any]:
    """A chat message with :func:`neutralise` applied to every text in it; an assistant's, whose marks are its own, as it is."""
    if message.get("role") == "assistant":
        return {key: neutralise_all(value, tokens) if key == "name" else value for key, value in message.items()}
    return {key: value if key == "role" else neutralise_all(value, tokens) for key, value in message.items()}


def neutralise_all(value: Any, tokens: Collection[str]) -> Any:
    """Tools, documents or anything else of JSON with :func:`neutralise` applied to every text in it."""
    if isinstance(value, str):
        return neutralise(value, tokens)
    if isinstance(value, Mapping):
        return {neutralise(str(key), tokens): neutralise_all(inner, tokens) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [neutralise_all(inner, tokens) for inner in value]
    return value


def _without_forms(text: str, pattern: re.Pattern[str]) -> str:
    """A text with the control tokens broken up that it has in compatibility forms; nothing else of it is folded."""
    folded, origin = [], []
    for place, character in enumerate(text):
        forms = unicodedata.normalize("NFKC", character)
        folded.append(forms)
        origin += [place] * len(forms)
    made, at = [], 0
    for match in pattern.finditer("".join(folded)):
        start, stop = origin[match.start()], origin[match.end() - 1] + 1
        if start >= at:  # one character may be the end of one token and the beginning of the next
            made += [text[at:start], _break(match)]
            at = stop
    return "".join([*made, text[at:]])


def _break(match: re.Match[str]) -> str:
    found = match.group()
    return f"{found[0]} {found[1:]}" if len(found) > 1 else _REPLACEMENT


@lru_cache(maxsize=16)
def _pattern(tokens: frozenset[str]) -> re.Pattern[str] | None:
    ordered = sorted(filter(None, tokens), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, ordered)), re.IGNORECASE) if ordered else None
