"""The parity matrix on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from pipeline.deviations import DEVIATIONS
from pipeline.parity import Matrix

_MARKS = {"equal": Text("=", "green"), "listed": Text("~", "yellow"), "not applicable": Text("·", "dim")}


def print_matrix(matrix: Matrix, absent: Mapping[str, str], problems: Sequence[str] = (), console: Console | None = None) -> None:
    """Print conversations by renderers, then what the marks mean: listed deviations, differences, absent renderers, problems."""
    out = console or Console()
    names = list(dict.fromkeys(cell.renderer for cell in matrix.cells))
    table = Table(Column("conversation", overflow="fold"), *names, title="Prompts compared with the tokenizer's chat template")
    rows: dict[str, dict[str, Text]] = {}
    for cell in matrix.cells:
        rows.setdefault(cell.conversation, {})[cell.renderer] = _MARKS.get(cell.status, Text("DIFFERS", "bold red"))
    for conversation, marks in rows.items():
        table.add_row(conversation, *(marks[name] for name in names))
    out.print(table)
    for name, counts in matrix.counts().items():
        out.print(Text(f"{name}: " + ", ".join(f"{count} {status}" for status, count in counts.items())))
    out.print(Text("= equal   ~ differs for a listed reason   · the template or the engine's API has no such conversation"))
    used = {found for cell in matrix.cells if cell.status == "listed" for found in cell.detail.split(", ")}
    for deviation in DEVIATIONS:
        if deviation.id in used:
            out.print(Text(f"~ {deviation.id}: {deviation.reason}", "yellow"))
    for name, reason in absent.items():
        out.print(Text(f"skipped {name}: {reason}", "dim"))
    for cell in matrix.differences:
        out.print(Text(f"{cell.conversation} / {cell.renderer}: {cell.detail}", "red"))
    for problem in problems:
        out.print(Text(problem, "bold red"))
