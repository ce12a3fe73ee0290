"""What a server's log says: why it did not start (``failures.json``), and how far a start has come (``milestones.json``)."""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Failure:
    """A recognised failure: its name in the table, cause and remedy, the log line that shows it and the numbers found there."""

    name: str
    cause: str
    remedy: str
    line: str
    numbers: tuple[float, ...] = ()

    @property
    def facts(self) -> dict[str, Any]:
        """What a :class:`StartFailure` carries of it."""
        return {"remedy": self.remedy, "kind": self.name, "cause": self.cause, "numbers": self.numbers}


def plain(log: str) -> str:
    """A log without its colours."""
    return _COLOUR.sub("", log)


def classify(log: str) -> Failure | None:
    """The first row of the table that matches any line; rows are ordered from specific to general."""
    lines = plain(log).splitlines()
    for name, pattern, cause, remedy in _table():
        for line in lines:
            if found := pattern.search(line):
                numbers = tuple(float(text) for text in found.groups() if text)
                return Failure(name, cause, remedy, line.strip()[:400], numbers)
    return None


def end_of(log: Path, most: int) -> str:
    """The last bytes of a log, at most so many, as text."""
    with log.open("rb") as handle:
        handle.seek(max(0, log.stat().st_size - most))
        return handle.read().decode("utf-8", errors="replace")


def phase(log: str) -> str:
    """The last milestone in the log; "starting" before the first."""
    for line in reversed(plain(log).splitlines()):
        for pattern, words in _milestones():
            if found := pattern.search(line):
                return words.format(found[1]) if "{}" in words else words
    return "starting"


@cache
def _table() -> list[tuple[str, re.Pattern[str], str, str]]:
    return [(row["name"], re.compile(row["pattern"]), row["cause"], row["remedy"]) for row in _rows("failures.json")]


@cache
def _milestones() -> list[tuple[re.Pattern[str], str]]:
    # {} takes what the pattern's group found; vLLM 0.32, llama.cpp b11549, Ollama, SGLang 0.5
    return [(re.compile(row["pattern"]), row["words"]) for row in _rows("milestones.json")]


def _rows(name: str) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = json.loads((Path(__file__).parent / name).read_text(encoding="utf-8"))
    return rows
