"""Why a server did not start: log patterns, their cause and what to do; the table is in ``failures.json``."""

from __future__ import annotations

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


# log line -> words; {} takes what the pattern's group found. vLLM 0.32, llama.cpp b11549, Ollama, SGLang 0.5
_MILESTONES = [
    (r"checkpoint shards:\s+\d+% Completed \| (\d+/\d+)", "loading weights, file {}"),
    (r"Starting to load model|load_model: loading model|llama_model_loader: loaded meta|Load weight begin", "loading weights"),
    (r"Loading weights took ([\d.]+) s|Load weight end", "weights loaded"),
    (
        r"Dynamo bytecode transform|Compiling a graph|torch\.compile (?:takes|took)|Using cache directory: .*torch_compile",
        "compiling",
    ),
    (r"Capturing CUDA graphs?.*?(\d+/\d+)", "capturing graphs, {}"),
    (r"Capturing CUDA graph|Capture cuda graph begin|Graph capturing", "capturing graphs"),
    (r"KV cache size: ([\d,]+) tokens", "KV cache of {} tokens, warming up"),
    (r"warming up the model|Warming up model", "warming up"),
    (r"srv\s+load_model: initializing, (n_slots = \d+)", "making the KV cache, {}"),
    (r"init engine \(profile|model loaded|Application startup complete", "loaded, waiting for the first token"),
    (r"llama runner started|starting (?:runner|llama-server)", "starting the model's runner"),
]
_COMPILED = [(re.compile(pattern), words) for pattern, words in _MILESTONES]


def phase(log: str) -> str:
    """The last milestone in the log; "starting" before the first."""
    for line in reversed(_COLOUR.sub("", log).splitlines()):
        for pattern, words in _COMPILED:
            if found := pattern.search(line):
                return words.format(found[1]) if "{}" in words else words
    return "starting"
