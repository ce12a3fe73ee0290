"""What one malformed input is and what must be said about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """``files`` are written into an empty folder; ``verb`` is the command line ({folder} stands for it), or a function's
    name in test_bad_inputs; the error must be of ``kind`` and say every one of ``words``."""

    name: str
    files: dict[str, bytes | Callable[[Path], None]]
    verb: tuple[str, ...]
    words: tuple[str, ...]
    kind: str = "DataError"
