"""The training verbs of the command line: ``data``, ``train``, ``export``, ``certify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from pipeline.commands import certify, train
from pipeline.runs.files import require_path
from training.datasets.dataset import Dataset, read, require_clean
from training.datasets.summary import Summary, summarise

_BIG = 20 << 20
_SHOWN_REFUSALS = 20
_SHOWN_VALUES = 8


def register(app: typer.Typer) -> None:
    """Add the training verbs."""
    app.command("data")(data)
    app.command("train")(train.train)
    app.command("export")(train.export)
    app.command("certify")(certify.certify)


def data(
    source: Annotated[
        str, typer.Argument(metavar="FILE", help=".jsonl, .json, .csv, .tsv or .parquet file, or hub:owner/name[@rev][:split].")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")] = False,
    tokenizer: Annotated[
        Path | None,
        typer.Option("--tokenizer", help="Model folder whose tokenizer.json counts the tokens; else they are estimated."),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", min=1, help="Count the rows that have more tokens than this.")
    ] = None,
) -> None:
    """Check a dataset and summarise it: rows, turns, token lengths, labels, duplicates, refused rows with file:line.

    The format is detected: messages (OpenAI chat), conversations (ShareGPT), prompt/completion, or alpaca
    (instruction, input, output). Nothing is written and torch is not loaded. The exit code is 2 when a row is refused.

    Example: granite-pipeline data training/data/soc_train.jsonl --max-length 128
    """
    dataset = _read(source)
    summary = summarise(dataset, tokenizer, max_length)
    if as_json:
        typer.echo(summary.to_json())
    else:
        _print(summary)
    require_clean(dataset)


def _read(source: str) -> Dataset:
    """Read with a progress bar on stderr when the file is big enough to wait for."""
    path = Path(source)
    require_path(path)
    size = path.stat().st_size if path.is_file() else 0
    if size < _BIG:
        return read(source)
    columns = (TextColumn("reading"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading", total=size)
        return read(source, lambda count: progress.advance(task, count))


def _print(summary: Summary) -> None:
    """Tables for people; text from the file is shown as it is, never as markup or terminal codes."""
    console = Console()
    table = Table(title=_plain(summary.source), show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in _lines(summary):
        table.add_row(name, _plain(value))
    console.print(table)
    if summary.labels:
        console.print(_label_table(summary))
    if summary.refused:
        refused = Table(title="refused rows", title_justify="left")
        refused.add_column("where", overflow="fold")
        refused.add_column("reason", overflow="fold")
        for where, reason in summary.refused[:_SHOWN_REFUSALS]:
            refused.add_row(_plain(where), _plain(reason))
        console.print(refused)
        if len(summary.refused) > _SHOWN_REFUSALS:
            console.print(f"and {len(summary.refused) - _SHOWN_REFUSALS} more; --json lists them all")


def _lines(summary: Summary) -> list[tuple[str, str]]:
    tokens = summary.tokens
    lengths = "none"
    if tokens:
        lengths = f"min {tokens.minimum}, median {tokens.median}, p95 {tokens.p95}, max {tokens.maximum} ({tokens.how})"
    lines = [
        ("format", summary.format),
        ("rows", f"{summary.rows} usable, {len(summary.refused)} refused"),
        ("turns", f"{summary.turns} ({', '.join(f'{role} {count}' for role, count in summary.roles.items())})"),
        ("tokens a row", lengths),
        ("tokens in all", f"{tokens.total if tokens else 0}"),
        ("over max length", "" if summary.over_length is None else f"{summary.over_length} over {summary.max_length}"),
        ("duplicate rows", f"{summary.duplicates}; {summary.repeated_prompts} more repeat a prompt"),
        ("with control tokens", f"{summary.control_token_rows} (trained on as ordinary text)"),
        ("with tools", str(summary.tools_rows)),
        ("not used", ", ".join(summary.ignored)),
        ("JSON answers", str(summary.json_answers)),
        ("sha256", summary.sha256),
    ]
    return [(name, value) for name, value in lines if value]


def _label_table(summary: Summary) -> Table:
    table = Table(title="answer fields", title_justify="left")
    for column in ("field", "values", "most frequent"):
        table.add_column(column, overflow="fold")
    for label in summary.labels:
        shown = [f"{value[:40]} {count}" for value, count in label.top[:_SHOWN_VALUES]]
        more = ["..."] if label.distinct > len(shown) else []
        table.add_row(_plain(label.field), str(label.distinct), _plain(", ".join(shown + more)))
    return table


def _plain(text: str) -> Text:
    return Text("".join(character if character.isprintable() else "�" for character in text))
