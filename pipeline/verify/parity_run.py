"""The servers of a run that prompts are compared on: those that are up, and with ``start`` those that can be."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from pipeline.config import Settings
from pipeline.errors import EngineError
from pipeline.prompts.parity import DEVIATIONS, Matrix, compare
from pipeline.runs.folder import RunFolder
from pipeline.serve import backends, records
from pipeline.serve.start import Options
from pipeline.verify.files import prompt_problems
from pipeline.verify.sources import EngineRenderer, Source, choose_renderers, servers

log = logging.getLogger(__name__)
_MARKS = {"equal": Text("=", "green"), "listed": Text("~", "yellow"), "not applicable": Text("·", "dim")}


@dataclass
class Running:
    """Renderers by engine name, and why the others are left out."""

    renderers: dict[str, EngineRenderer] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Compared:
    """The matrix, what else is wrong in the run's files, and the renderers that were left out, with the reason."""

    matrix: Matrix
    problems: list[str]
    absent: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        passed = self.matrix.passed and not self.problems
        return {**self.matrix.to_json(), "passed": passed, "problems": self.problems, "skipped": self.absent}


def compare_here(source: Source, engines: str | None, *, start: bool) -> Compared:
    """Compare the renderers named (default: all that are here), with the run's own servers; ``start`` brings those up."""
    run = source.run
    names = [name for name in servers() if engines is None or name in engines.split(",")]
    with run_servers(run, names, source.settings, start=start) if run else nullcontext(Running()) as running:
        chosen, absent = choose_renderers(engines, source, running.renderers)
        matrix = compare(source.reference, chosen)
    return Compared(matrix, prompt_problems(run) if run else [], absent | running.absent)


@contextmanager
def run_servers(run: RunFolder, names: Sequence[str], settings: Settings, *, start: bool) -> Iterator[Running]:
    """The run's servers of these engines; those started here are stopped at the end.

    An engine that is not installed is left out with its reason; one that does not come up raises EngineError.
    """
    found, mine = Running(), list[str]()
    try:
        for name in names:
            endpoint = backends.find(run, name, settings) if (run.servers).is_dir() else None
            if endpoint is None and start:
                log.info("parity: starting %s", name)
                begun = backends.start(run, name, settings, Options(purpose="verify", owner=os.getpid()))
                if begun.status == "failed":
                    raise EngineError(f"{name} did not start for the comparison", evidence=begun.reason)
                endpoint = begun.endpoint
                if endpoint is None:
                    found.absent[name] = begun.reason
                    continue
                mine.append(name)
            if endpoint is not None:
                found.renderers[name] = EngineRenderer(name, endpoint.url, endpoint.model, endpoint.api_key)
        yield found
    finally:
        for name in mine:
            records.stop(run.servers, name)


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
