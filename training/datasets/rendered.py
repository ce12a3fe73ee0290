"""Conversations that were rendered into one text already, taken apart again at Granite's own marks.

Preparation renders the turns with the base's template and refuses the row when that is not the author's text.
"""

import re
from typing import Any

from pipeline.prompts.chat import END, MIDDLE, START
from training.datasets.keys import RowError

_TURN = re.compile(
    f"{re.escape(START)}(?P<role>[a-z_]+){re.escape(MIDDLE)}(?P<content>.*?){re.escape(END.strip())}\\s*", re.DOTALL
)


def turns(text: str) -> list[Any]:
    """The turns of a text in Granite's format; RowError when it is in another one."""
    if not text.strip():
        raise RowError("'text' is empty")
    found, at = [], 0
    for turn in _TURN.finditer(text):
        if turn.start() != at:
            break
        at = turn.end()
        found.append({"role": turn["role"], "content": turn["content"]})
    if at != len(text):
        where = f"from character {at + 1} on ({text[at : at + 40]!r}) " if found else ""
        said = f"'text' is {where}not a conversation in Granite's format ({START}role{MIDDLE}...{END.strip()})"
        raise RowError(f"{said}; give the turns as messages, or the two sides with --columns prompt=...,completion=...")
    return found
