"""``data``: what is in a dataset and what the model will see of it, before a training is started with it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from pipeline.commands import options, show
from pipeline.errors import InputError
from pipeline.runs.files import require_path, write_atomic
from pipeline.runs.folder import DEFAULT_NAME, DEFAULT_OUTPUT, RunFolder
from pipeline.runs.text import printable

if TYPE_CHECKING:
    from training.datasets.dataset import Dataset
    from training.datasets.summary import Summary
    from training.datasets.turns import Reading
    from training.tuning.prepare import Tried

EMBEDDED = "embedded"
_BIG = 20 << 20
_SHOWN_REFUSALS = 20
_SHOWN_VALUES = 8


def data(
    source: Annotated[
        str,
        Argument(
            metavar="FILE",
            help="File (.jsonl, .json, .csv, .tsv, .parquet, .gz), folder, glob, or hub:owner/name[@rev][:config][:split].",
        ),
    ],
    base: Annotated[
        str | None, Option(help="Prepare every row for this base: embedded, a hub id, or a model folder; nothing is trained.")
    ] = None,
    rows: Annotated[
        int, Option("--show", min=0, help="Print the exact text of the first N rows instead, and what is learned.")
    ] = 0,
    write: Annotated[Path | None, Option(help="Write the rows that can be used to this file, one JSON object a line.")] = None,
    columns: options.Columns = "",
    ignore: options.Ignore = None,
    greeting: options.Greeting = "refuse",
    repeated: options.Repeated = "refuse",
    skip_bad: options.SkipBad = False,
    as_json: options.AsJson = False,
    tokenizer: Annotated[
        Path | None,
        Option(help="Model folder whose tokenizer.json counts the tokens; else --base counts, or they are estimated."),
    ] = None,
    max_length: Annotated[int | None, Option(min=1, help="Count the rows that have more tokens than this.")] = None,
) -> None:
    """Check a dataset and account for it: rows, turns, token lengths, labels, and what becomes of every key of a row.

    A key is used, harmless (ids, sources), or its row is refused until --ignore names it. With --base every row is also rendered as
    the model will see it, and refused where its chat template drops a call, a document or a thought. The format is detected: messages
    (OpenAI chat), conversations (ShareGPT), prompt/completion, alpaca, dolly, question/answer, xlam, text in Granite's format.

    --show prints for each row its text, with what is learned from set apart; with --json one object a line: row, text, trained, unused,
    neutralised. torch is not loaded. The exit code is 2 when a row is refused, unless --skip-bad or --write goes on without it.

    Examples:
      granite-pipeline data training/data/soc_train.jsonl --max-length 128
      granite-pipeline data alerts.jsonl --base ibm-granite/granite-4.0-350m --show 3
      granite-pipeline data alerts.jsonl --columns prompt=question,completion=answer --write good.jsonl
    """
    from training.datasets.dataset import Refusal
    from training.datasets.summary import summarise
    from training.parameters import reading
    from training.tuning.prepare import Preparer, collected
    from training.tuning.view import account

    dataset = _read(source, reading(columns, ignore or (), greeting, repeated))
    if not base and not rows:
        _tell(summarise(dataset, tokenizer, max_length), account([dataset]), as_json)
        _end(dataset, write, skip_bad)
        return
    with _folder(base or EMBEDDED) as folder:
        preparer = Preparer(folder)
        # to be shown a few rows is not to wait for all of them
        count = rows if rows and not write else len(dataset.rows)
        with show.progress(f"preparing {count} rows"):
            tried = [preparer.tried(row) for row in dataset.rows[:count]]
        prepared = collected(tried)
        found = account([dataset], [prepared])
        kept = tuple(one.row for one in tried if not isinstance(one.made, Refusal))
        dataset = replace(dataset, rows=(*kept, *dataset.rows[count:]), refused=(*dataset.refused, *prepared.refused))
        if rows:
            _show(tried[:rows], as_json)
        else:
            _tell(summarise(dataset, tokenizer or folder, max_length), found, as_json)
    _end(dataset, write, skip_bad)


def _end(dataset: Dataset, write: Path | None, skip_bad: bool) -> None:
    """Write what can be used, or fail when something cannot."""
    from training.datasets.dataset import require_clean

    if write and dataset.rows:
        _write(write, dataset)
    elif not (skip_bad and dataset.rows):
        require_clean(dataset)


def _tell(summary: Summary, found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        show.as_json({**summary.to_json(), "account": found})
    else:
        _print(summary, found)


def _read(source: str, reading: Reading) -> Dataset:
    """Read with a progress bar on stderr when the file is big enough to wait for."""
    from training.datasets.dataset import read

    path = Path(source)
    require_path(path)
    if not path.is_file() or (size := path.stat().st_size) < _BIG:
        return read(source, reading=reading)
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("reading"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=show.console(err=True), transient=True) as progress:
        task = progress.add_task("reading", total=size)
        return read(source, lambda count: progress.advance(task, count), reading)


@contextmanager
def _folder(base: str) -> Iterator[Path]:
    """A base's folder; of the embedded one only its tokenizer and chat template, which are made in a moment."""
    from training.base import resolve, write_tokenizer

    if base != EMBEDDED:
        yield resolve(base, RunFolder(DEFAULT_NAME, DEFAULT_OUTPUT).base_cache).folder
        return
    with TemporaryDirectory(prefix="granite-pipeline-") as made:
        write_tokenizer(Path(made))
        yield Path(made)


def _show(tried: Sequence[Tried], as_json: bool) -> None:
    """The first rows as the model sees them; what is learned is green, or set apart on lines of its own where nothing is coloured."""
    from training.datasets.dataset import Refusal
    from training.tuning.view import shown

    for one in tried:
        seen = shown(one)
        if as_json:
            show.as_json(seen, indent=None)
            continue
        show.line(f"--- {printable(seen['row'])}", style="bold")
        if isinstance(one.made, Refusal):
            show.line(f"refused: {printable(seen['refused'])}; {printable(seen['remedy'])}", style="red")
            continue
        show.spans(_lines_of(seen["text"]), one.made[1].spans)
        show.line(f"not used: {printable(', '.join(seen['unused'])) or 'nothing'}; texts neutralised: {seen['neutralised']}")


def _write(target: Path, dataset: Dataset) -> None:
    """The rows that can be used, as messages; a file that is there already is never replaced."""
    if target.exists():
        raise InputError(f"{target} is there already", remedy="give --write the name of a new file")
    lines = []
    for row in dataset.rows:
        extras = {name: list(value) for name in ("tools", "documents") if (value := getattr(row, name))}
        lines.append(json.dumps({"messages": list(row.messages), **extras}, ensure_ascii=False) + "\n")
    write_atomic(target, "".join(lines))
    show.line(f"{len(lines)} rows written to {target}, {len(dataset.refused)} left out", err=True)


def _print(summary: Summary, found: dict[str, Any]) -> None:
    """Tables for people; text from the file is shown as it is, never as markup or terminal codes."""
    show.table(printable(summary.source), ("", ""), [(name, printable(value)) for name, value in _lines(summary)])
    became = [(printable(row["what"]), row["became"], row["rows"]) for row in found["table"]]
    if became:
        show.table("what becomes of each key", ("key", "becomes", "rows"), became)
    rows = []
    for label in summary.labels:
        shown = [f"{value[:40]} {count}" for value, count in label.top[:_SHOWN_VALUES]]
        shown += ["..."] if label.distinct > len(shown) else []
        rows.append((printable(label.field), label.distinct, printable(", ".join(shown))))
    if rows:
        show.table("answer fields", ("field", "values", "most frequent"), rows)
    if summary.refused:
        refused = [(printable(one.where), printable(one.reason)) for one in summary.refused[:_SHOWN_REFUSALS]]
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
        ("with control tokens", f"{summary.control_token_rows} (text that is not the assistant's is written as ordinary text)"),
        ("with tools", str(summary.tools_rows)),
        ("with documents", str(summary.documents_rows)),
        ("JSON answers", str(summary.json_answers)),
        ("sha256", summary.sha256),
    ]
    return [(name, value) for name, value in lines if value]


def _lines_of(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))
