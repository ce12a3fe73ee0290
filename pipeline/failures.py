"""Why a server did not start: log patterns, their cause and what to do; the table is in ``failures.json``."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Failure:
    """A recognised failure: its name in the table, cause and remedy, the log line that shows it and the numbers found there."""

    name: str
    cause: str
    remedy: str
    line: str
    numbers: tuple[float, ...] = ()


@cache
def _table() -> list[tuple[str, re.Pattern[str], str, str]]:
    rows = json.loads((Path(__file__).parent / "failures.json").read_text(encoding="utf-8"))
    return [(row["name"], re.compile(row["pattern"]), row["cause"], row["remedy"]) for row in rows]


def classify(log: str) -> Failure | None:
    """The first row of the table that matches any line; rows are ordered from specific to general."""
    lines = _COLOUR.sub("", log).splitlines()
    for name, pattern, cause, remedy in _table():
        for line in lines:
            if found := pattern.search(line):
                numbers = tuple(float(text) for text in found.groups() if text)
                return Failure(name, cause, remedy, line.strip()[:400], numbers)
    return None
