"""Text that leaves the process: secrets masked, control characters spelled out, nothing in it that JSON or XML cannot carry.

Masked are the values of variables whose names say so - ordinary words apart, for they are no keys - and what looks like a
token wherever it came from. Everything that leaves the process goes through here: logs, error messages, manifest, report,
executed notebooks.
"""

import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

MASK = "********"
_NAMES = re.compile(r"(^|_)(API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.IGNORECASE)
# shorter values are words and numbers ("none", "1234") that would black out ordinary text, and so would CACHE_KEY=training;
# a password may be a word
_SHORTEST = 8
_WORD = re.compile(r"[A-Za-z]?[a-z]{1,14}|[A-Z]{1,15}")
_PASSWORDS = re.compile(r"PASSW(OR)?D", re.IGNORECASE)
# nothing that ends a word (task-, desk-), unless that is the n of an escaped line break
_START = r"(?:(?<![a-z])|(?<=\\[nrt]))"
_LOOKS = re.compile(
    rf"{_START}hf_(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{{16,}}"  # Hugging Face
    rf"|{_START}sk-(?=[A-Za-z_-]*[0-9])[A-Za-z0-9_-]{{16,}}"  # OpenAI and those that copy its form
    r"|(?:(?<=Bearer )|(?<=bearer ))[A-Za-z0-9._~+/=-]{8,}"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"  # user:password in a URL
)
# a variable whose value a report hides altogether, whatever it looks like
_HIDDEN = re.compile(r"(?:^|_)(?:KEY|TOKEN|SECRET|PASSWORD)$")
_USERINFO = re.compile(r"(\w+://)[^/@\s]+@")
_SURROGATE = re.compile("[\ud800-\udfff]")
# C0/C1 controls except tab and newline, and the bidirectional overrides that can make text read as something else
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff\ud800-\udfff]")


def is_secret_name(name: str) -> bool:
    """Whether a variable's name says that its value is secret."""
    return bool(_NAMES.search(name))


def values() -> list[str]:
    """The secret values of the environment, longest first."""
    named = [(name, value.strip()) for name, value in os.environ.items() if is_secret_name(name)]
    secrets = {value for name, value in named if _PASSWORDS.search(name) or not _WORD.fullmatch(value)}
    return sorted((value for value in secrets if len(value) >= _SHORTEST), key=len, reverse=True)


def mask(text: str, known: Sequence[str] | None = None) -> str:
    """The text with every secret in it replaced; ``known`` spares a caller with many texts :func:`values` for each."""
    for value in values() if known is None else known:
        text = text.replace(value, MASK)
    return _LOOKS.sub(MASK, text)


def masked(value: Any) -> Any:
    """A copy of JSON-like data with every text in it masked, keys too."""
    known = values()
    return _mapped(value, lambda leaf: mask(leaf, known) if isinstance(leaf, str) else leaf)


def clean(value: Any) -> Any:
    """A copy that JSON, HTML and XML can carry: NaN and infinity become null, lone surrogates U+FFFD, secrets are masked."""
    known = values()

    def cleaned(leaf: Any) -> Any:
        if isinstance(leaf, str):
            return mask(_SURROGATE.sub("\ufffd", leaf), known)
        return None if isinstance(leaf, float) and not math.isfinite(leaf) else leaf

    return _mapped(value, cleaned, _HIDDEN)


def _mapped(value: Any, leaf: Callable[[Any], Any], hidden: re.Pattern[str] | None = None) -> Any:
    """A copy of JSON-like data, each leaf and key as ``leaf`` makes it; what a key that matches ``hidden`` holds is not shown."""
    if isinstance(value, Mapping):
        return {
            leaf(str(key)): "(hidden)" if hidden and item and hidden.search(str(key)) else _mapped(item, leaf, hidden)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_mapped(item, leaf, hidden) for item in value]
    return leaf(value)


def relative(value: Any, folder: Path) -> Any:
    """A copy of JSON-like data in which paths below a folder begin with ``./``: they stay true when the folder is moved."""
    names = sorted({str(path) for path in (folder, folder.absolute(), folder.resolve())}, key=len, reverse=True)
    # at the start of a word, a value or a list's entry: inside of one it is part of another path
    inside = re.compile(rf"(?<![^\s=:,;'\"(]){'|'.join(map(re.escape, names)).join(('(?:', ')'))}(?=/)")
    return _mapped(value, lambda leaf: inside.sub(".", leaf) if isinstance(leaf, str) else leaf)


def visible(text: str) -> str:
    """The text with control and direction-changing characters spelled out, so that it shows what it holds."""
    return _INVISIBLE.sub(lambda match: f"‹U+{ord(match.group()):04X}›", text)


def printable(text: str) -> str:
    """The text with a replacement character for each that cannot be printed, line ends too: one line, and no terminal codes."""
    return "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in text)


def without_password(text: str) -> str:
    """A URL with the password or key in front of its host masked; any other text as it is."""
    return _USERINFO.sub(rf"\1{MASK}@", text)


class MaskingWriter:
    """Writes to a text stream with secrets masked: what notebooks print on its way to the terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Write the masked text."""
        self._stream.write(mask(text))

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()


class MaskingFilter(logging.Filter):
    """Masks a log record's text, and that of the exception it carries, before any handler writes it."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Always lets the record through."""
        record.msg, record.args = mask(record.getMessage()), None
        if record.exc_info and not record.exc_text:
            record.exc_text = mask(logging.Formatter().formatException(record.exc_info))
        return True
