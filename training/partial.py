"""Answers kept while a long evaluation runs, so that an interrupted one goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.files import write_atomic
from pipeline.score import Answer


class Partial:
    """An append-only file of answers by row number; its first line says what they are answers to."""

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.done: dict[int, Answer] = {}
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        if lines and _read(lines[0]) == {"key": key}:
            for line in lines[1:]:
                entry = _read(line)  # the last line may be cut
                if set(entry) == {"row", "text", "finish_reason"}:
                    self.done[int(entry["row"])] = Answer(entry["text"], entry["finish_reason"])
        # written anew, so that what is appended never joins a cut line
        kept = [{"key": key}, *({"row": row, **asdict(answer)} for row, answer in self.done.items())]
        write_atomic(path, "".join(_line(entry) for entry in kept))

    def add(self, answers: Mapping[int, Answer]) -> None:
        """Append answers and flush them to disk."""
        self.done |= answers
        with self.path.open("a", encoding="utf-8") as out:
            out.write("".join(_line({"row": row, **asdict(answer)}) for row, answer in answers.items()))
            out.flush()
            os.fsync(out.fileno())

    def remove(self) -> None:
        """Remove the file: the answers have their final place."""
        self.path.unlink(missing_ok=True)


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry) + "\n"


def _read(line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}
