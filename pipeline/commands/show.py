"""What verbs print: lines, tables and JSON. Where there is no terminal nothing is wrapped, cut or styled."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from pipeline.runs import log

if TYPE_CHECKING:
    from rich.table import Table

_ONE_LINE = 1_000_000  # columns of what is no terminal: no value is as long


def console(*, err: bool = False) -> Console:
    """The console of stdout or stderr."""
    made = Console(stderr=err)
    if not made.file.isatty():
        made.width = _ONE_LINE
    return made


def line(text: str, *, err: bool = False, style: str = "") -> None:
    """Print a line as it is, never cut, wrapped or read as markup."""
    console(err=err).print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def spans(text: str, marked: Sequence[tuple[int, int]], *, style: str = "black on green") -> None:
    """Print a text as it is, parts of it (first character, one after the last) in a colour, or below it where nothing is coloured."""
    from rich.text import Text

    out, made = console(), Text(text)
    for start, stop in marked:
        made.stylize(style, start, stop)
    out.print(made, markup=False, highlight=False, soft_wrap=True)
    if not out.is_terminal:
        for start, stop in marked:
            line(f"learned: {text[start:stop]!r}")


def as_json(value: Any, *, indent: int | None = 2, ascii_only: bool = True) -> None:
    """Print a value as JSON on stdout."""
    typer.echo(json.dumps(value, indent=indent, ensure_ascii=ascii_only))


def table(title: str, heads: Sequence[str], rows: Iterable[Sequence[Any]], *, err: bool = False) -> None:
    """Print rows under a title; text is shown as it is, never as markup. Empty heads make a table without a head line."""
    from rich.table import Table
    from rich.text import Text

    made = Table(title=Text(title) if title else None, title_justify="left", show_header=any(heads))
    for head in heads:
        made.add_column(Text(head), overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text("" if cell is None else str(cell)) for cell in row))
    draw(made, err=err)


def draw(made: Table, *, err: bool = False) -> None:
    """Print a table; where there is no terminal its title and caption are lines, which it would wrap to its own width."""
    out = console(err=err)
    if out.file.isatty():
        out.print(made)
        return
    title, caption, made.title, made.caption = made.title, made.caption, None, None
    for part in (title, made, caption):
        if part:
            out.print(part)


@contextmanager
def progress(begun: str) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr, and the function that changes its words."""
    with console(err=True).status(begun) as spinner:
        yield lambda text: spinner.update(text[:120])


def log_to_stderr(level: int) -> None:
    """Send the log to stderr without secrets: in colour on a terminal, else one plain line each with the time of day."""
    from rich.logging import RichHandler

    out = console(err=True)
    if out.file.isatty():
        coloured = RichHandler(console=out, show_path=False, show_level=False, log_time_format="%H:%M:%S")
        log.begin(coloured, level, words="%(message)s")
    else:
        log.without_bars()
        log.begin(logging.StreamHandler(), level)
