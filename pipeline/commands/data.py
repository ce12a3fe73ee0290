"""``data``: what is in a dataset, before a training is started with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from pipeline.commands import options, show
from pipeline.runs.files import require_path

if TYPE_CHECKING:
    from training.datasets.dataset import Dataset
    from training.datasets.summary import Summary

_BIG = 20 << 20
_SHOWN_REFUSALS = 20
_SHOWN_VALUES = 8


def data(
    source: Annotated[
        str, Argument(metavar="FILE", help=".jsonl, .json, .csv, .tsv or .parquet file, or hub:owner/name[@rev][:split].")
    ],
    as_json: options.AsJson = False,
    tokenizer: Annotated[
        Path | None, Option(help="Model folder whose tokenizer.json counts the tokens; else they are estimated.")
    ] = None,
    max_length: Annotated[int | None, Option(min=1, help="Count the rows that have more tokens than this.")] = None,
) -> None:
    """Check a dataset and summarise it: rows, turns, token lengths, labels, duplicates, refused rows with file:line.

    The format is detected: messages (OpenAI chat), conversations (ShareGPT), prompt/completion, or alpaca
    (instruction, input, output). Nothing is written and torch is not loaded. The exit code is 2 when a row is refused.

    Example: granite-pipeline data training/data/soc_train.jsonl --max-length 128
    """
    from training.datasets.dataset import require_clean
    from training.datasets.summary import summarise

    dataset = _read(source)
    summary = summarise(dataset, tokenizer, max_length)
    if as_json:
        typer.echo(summary.to_json())
    else:
        _print(summary)
    require_clean(dataset)


def _read(source: str) -> Dataset:
    """Read with a progress bar on stderr when the file is big enough to wait for."""
    from training.datasets.dataset import read

    path = Path(source)
    require_path(path)
    if not path.is_file() or (size := path.stat().st_size) < _BIG:
        return read(source)
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("reading"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=show.console(err=True), transient=True) as progress:
        task = progress.add_task("reading", total=size)
        return read(source, lambda count: progress.advance(task, count))


def _print(summary: Summary) -> None:
    """Tables for people; text from the file is shown as it is, never as markup or terminal codes."""
    show.table(_plain(summary.source), ("", ""), [(name, _plain(value)) for name, value in _lines(summary)])
    rows = []
    for label in summary.labels:
        shown = [f"{value[:40]} {count}" for value, count in label.top[:_SHOWN_VALUES]]
        shown += ["..."] if label.distinct > len(shown) else []
        rows.append((_plain(label.field), label.distinct, _plain(", ".join(shown))))
    if rows:
        show.table("answer fields", ("field", "values", "most frequent"), rows)
    if summary.refused:
        refused = [(_plain(where), _plain(reason)) for where, reason in summary.refused[:_SHOWN_REFUSALS]]
        show.table("refused rows", ("where", "reason"), refused)
        if len(summary.refused) > _SHOWN_REFUSALS:
            show.line(f"and {len(summary.refused) - _SHOWN_REFUSALS} more; --json lists them all")


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


def _plain(text: str) -> str:
    return "".join(character if character.isprintable() else "�" for character in text)
