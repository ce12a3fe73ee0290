"""How a Granite generation writes what it thinks before it answers, and thought and answer told apart again.

Granite 3.2 and 3.3 write ``<think>...</think><response>...</response>``, which 3.3's chat template asks for in its system message;
4.0 and 4.1 have ``<think>`` among their tokens and no form for the answer.
"""

import re
from typing import NamedTuple

OPEN, CLOSE = "<think>", "</think>"
_RESPONSE = re.compile(r"\s*<response>(.*?)(?:</response>)?\s*", re.DOTALL)


class Said(NamedTuple):
    """An answer's thought (None: it did not think) and what it says after it."""

    thought: str | None
    answer: str


def written_thought(template: str, thought: str, answer: str) -> str:
    """Thought and answer as one text, in the form that a chat template's source asks for."""
    if "<response>" in template:
        return f"{OPEN}{thought}{CLOSE}<response>{answer}</response>"
    return f"{OPEN}\n{thought}\n{CLOSE}\n\n{answer}"


def read_thought(text: str) -> Said:
    """The thought at the beginning of a text and what follows it; a thought that never ends has no answer."""
    begun = text.lstrip()
    if not begun.startswith(OPEN):
        return Said(None, text)
    thought, closed, answer = begun.removeprefix(OPEN).partition(CLOSE)
    if not closed:
        return Said(thought.strip(), "")
    whole = _RESPONSE.fullmatch(answer)
    return Said(thought.strip(), (whole[1] if whole else answer).strip())
