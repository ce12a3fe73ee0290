"""The jinja environment of every HTML page we write: all text escaped, and nothing in it hidden or reordered."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.runs.text import visible

TEMPLATES = Path(__file__).with_name("templates")


def environment() -> Environment:
    """A new environment over the package's templates; a name that a template lacks is an error."""
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _finalize(value: Any) -> Any:
    """Applied to every expression of a template before escaping: no text from outside can hide or reorder what is shown."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
