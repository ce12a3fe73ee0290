"""How figures, names and times read to people, on the terminal and (``environment``) in every HTML page we write."""

import re
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.runs.text import visible

TEMPLATES = Path(__file__).with_name("templates")
NONE = "–"
_HEADLINE = 280  # characters of a failed check's detail that fit under the headline; the rest is in the list
_ACRONYMS = re.compile(r"\b(?:json|gguf|kv|id|ids|eos|gpu|cpu|ttft)\b")


def percent(share: float | None) -> str:
    """0.865 as '86.5 %'; never rounds something short of all up to 100 %, or of none down to 0 %."""
    if share is None:
        return NONE
    if 0.9995 <= share < 1:
        return "> 99.9\u00a0%"
    if 0 < share < 0.0005:
        return "< 0.1\u00a0%"
    return f"{share * 100:.1f}".removesuffix(".0") + "\u00a0%"


def points(difference: float) -> str:
    """A difference of shares in words, in percentage points."""
    amount = f"{abs(difference) * 100:.1f}".removesuffix(".0")
    if amount == "0":
        return "the same as"
    return f"{amount} {'point' if amount == '1' else 'points'} {'above' if difference > 0 else 'below'}"


def duration(seconds: float | None) -> str:
    """Seconds as '0.8 s', '45 s', '8 min 42 s' or '2 h 05 min'."""
    if seconds is None:
        return NONE
    if seconds < 9.95:
        return f"{seconds:.1f}\u00a0s"
    whole = round(seconds)
    if whole < 100:
        return f"{whole}\u00a0s"
    if whole < 3600:
        return f"{whole // 60}\u00a0min {whole % 60:02d}\u00a0s"
    return f"{whole // 3600}\u00a0h {whole % 3600 // 60:02d}\u00a0min"


def moment(iso: str) -> str:
    """An ISO time as '2026-11-14 09:31 UTC'; other text as it is."""
    try:
        time = datetime.fromisoformat(iso)
    except ValueError:
        return visible(iso)
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M} UTC" if time.tzinfo else f"{time:%Y-%m-%d %H:%M}"


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested JSON as (dotted name, text) rows; lists of plain values stay on one row."""
    if isinstance(value, Mapping):
        return [row for key, inner in value.items() for row in flatten(inner, f"{prefix}{'.' if prefix else ''}{key}")]
    if isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        return [row for i, inner in enumerate(value) for row in flatten(inner, f"{prefix}[{i}]")]
    return [(visible(prefix), visible(plain(value)))]


def plain(value: Any) -> str:
    """A JSON value in words."""
    if value is None or value in ([], {}, ""):
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(plain(item) for item in value) if isinstance(value, list) else str(value)


def words(name: str) -> str:
    """``export.gguf_loads`` as 'export: GGUF loads'."""
    spoken = visible(name).replace("_", " ").replace(".", ": ")
    return _ACRONYMS.sub(lambda match: match.group().upper(), spoken)


def first_line(detail: str) -> str:
    """The first line of a detail, as a sentence no longer than a headline's second line should be."""
    line = next((line.strip() for line in detail.splitlines() if line.strip()), "no detail given")
    line = line if len(line) <= _HEADLINE else f"{line[: _HEADLINE - 1]}…"
    return line if line.endswith((".", "!", "?", "…")) else f"{line}."


def listing(names: Sequence[str]) -> str:
    """['a', 'b', 'c'] as 'a, b and c'."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def was(names: Sequence[str]) -> str:
    """The verb for so many names."""
    return "was" if len(names) == 1 else "were"


def environment() -> Environment:
    """A new environment over the package's templates: all text escaped, none hidden or reordered, a missing name an error."""
    options: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    made = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, finalize=_finalize, **options)
    spoken = (percent, duration, moment, flatten, words, plain)
    made.filters.update({filter_.__name__: filter_ for filter_ in spoken}, shell=shlex.join)
    return made


def _finalize(value: Any) -> Any:
    """Applied to every expression of a template before escaping: no text from outside can hide or reorder what is shown."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
