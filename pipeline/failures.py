"""Why a server did not start: log patterns, their cause and what to do; the table is in ``failures.json``."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Failure:
    """A recognised failure: the log line that shows it, its cause and the remedy."""

    cause: str
    remedy: str
    line: str


@cache
def _table() -> list[tuple[re.Pattern[str], str, str]]:
    rows = json.loads((Path(__file__).parent / "failures.json").read_text(encoding="utf-8"))
    return [(re.compile(row["pattern"]), row["cause"], row["remedy"]) for row in rows]


def classify(log: str) -> Failure | None:
    """The first row of the table that matches any line; rows are ordered from specific to general."""
    for pattern, cause, remedy in _table():
        for line in log.splitlines():
            if pattern.search(line):
                return Failure(cause, remedy, line.strip()[:400])
    return None
