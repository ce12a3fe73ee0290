"""Datasets: read a file or hub dataset into rows, refuse bad ones with file:line, split and compare by prompt.

    data = load("alerts.jsonl")
    train, held_out = split(data.rows, share=0.1, seed=1)

Formats are in ``formats``, kinds of file in ``sources``. Not covered: datasets larger than memory.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import DataError
from pipeline.runs.hashes import sha256_file
from training.datasets.formats import UNDERSTOOD, RowError, convert, detect
from training.datasets.sources import Advance, Record, records, resolve

# the built-in SOC alerts; benchmarks/soc_data.py makes them
SOC_TRAIN, SOC_EVAL = (Path(__file__).parents[1] / "data" / f"soc_{part}.jsonl" for part in ("train", "eval"))
_SHOWN = 5


@dataclass(frozen=True)
class Row:
    """One conversation to train on. ``where`` is file:line; ``tools`` are JSON schemas the conversation may call."""

    messages: tuple[dict[str, Any], ...]
    where: str
    tools: tuple[dict[str, Any], ...] | None = None


class Refusal(NamedTuple):
    """A row that was not taken, where it is and why."""

    where: str
    reason: str


@dataclass(frozen=True)
class Dataset:
    """What was read: ``sha256`` is of the file's bytes, or of the rows for a hub dataset.

    ``format`` is one of formats.UNDERSTOOD, or 'unknown' when every row was refused before a format could be told;
    ``ignored`` names columns and message keys that are not used.
    """

    source: str
    format: str
    rows: tuple[Row, ...]
    refused: tuple[Refusal, ...]
    sha256: str
    ignored: tuple[str, ...] = ()


def read(source: str | Path, advance: Advance | None = None) -> Dataset:
    """Rows and refusals of a file, or of ``hub:owner/name[@revision][:split]``.

    ``advance`` is told the bytes of each text line read. Raises DataError when the file is missing, empty, not
    decodable, or has columns of no known format; EnvironmentFailure when the hub does not answer.
    """
    place = resolve(source)
    reader = _Reader()
    for record in records(place, advance):
        reader.take(record)
    if not reader.seen:
        raise DataError(f"{source} has no rows", remedy="give a file with at least one row")
    if reader.format is None and reader.columns:
        understood = "; ".join(f"{name}: {', '.join(needed)}" for name, (needed, _) in UNDERSTOOD.items())
        unknown = f"{source}: unknown column set ({', '.join(sorted(reader.columns)[:20])})"
        remedy = 'rename the columns, or write each row as {"messages": [...]}'
        raise DataError(unknown, evidence=f"understood are {understood}", remedy=remedy)
    rows = "".join(digest(row.messages, row.tools) for row in reader.rows)
    sha256 = sha256_file(place) if isinstance(place, Path) else hashlib.sha256(rows.encode()).hexdigest()
    ignored = tuple(sorted(reader.ignored))
    return Dataset(str(source), reader.format or "unknown", tuple(reader.rows), tuple(reader.refused), sha256, ignored)


def load(source: str | Path) -> Dataset:
    """As ``read``, but raises DataError when any row is refused: nothing is trained on part of a file by accident."""
    dataset = read(source)
    require_clean(dataset)
    return dataset


def require_clean(dataset: Dataset) -> None:
    """Raise DataError with the first refusals when a dataset has any."""
    refused = dataset.refused
    if not refused:
        return
    total = len(refused) + len(dataset.rows)
    more = [f"... and {len(refused) - _SHOWN} more"] if len(refused) > _SHOWN else []
    evidence = "\n".join([*(f"{where}: {reason}" for where, reason in refused[:_SHOWN]), *more])
    remedy = f"correct or remove them; `granite-pipeline data {dataset.source} --json` lists them all"
    raise DataError(f"{dataset.source}: {len(refused)} of {total} rows cannot be used", evidence=evidence, remedy=remedy)


class _Reader:
    """Collects rows; the first row with known columns decides the format of all."""

    def __init__(self) -> None:
        self.format: str | None = None
        self.rows: list[Row] = []
        self.refused: list[Refusal] = []
        self.columns: dict[str, None] = {}
        self.ignored: set[str] = set()
        self.seen = False

    def take(self, record: Record) -> None:
        """Add one record as a row or a refusal."""
        self.seen = True
        if record.value is None:
            self.refused.append(Refusal(record.where, showable(record.problem)))
            return
        if self.format is None:
            self.columns |= dict.fromkeys(showable(str(column), 40) for column in record.value)
            self.format = detect(record.value)
        try:
            if self.format is None:
                raise RowError(f"no known columns (columns: {', '.join(map(str, record.value)) or 'none'})")
            made = convert(self.format, record.value)
        except RowError as error:
            self.refused.append(Refusal(record.where, showable(str(error))))
        else:
            self.rows.append(Row(made.messages, record.where, made.tools))
            self.ignored |= {showable(key, 60) for key in made.ignored}


def split(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows, each in their given order; ``share``, between 0 and 1, is held out, at least one row.

    Which rows depends only on their prompts and the seed, not on their order. Rows of one prompt stay together, as
    do conversations of which one begins with another's prompt. Raises DataError when that leaves one side empty.
    """
    if not 0 < share < 1:
        raise DataError(f"the held-out share must lie between 0 and 1, not {share}")
    groups = _groups(rows)
    if len(groups) < 2:
        raise DataError(f"{len(rows)} rows with {len(groups)} different prompts cannot be split", remedy="add rows")
    order = sorted(groups, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).hexdigest())
    most = min(max(1, round(share * len(rows))), len(rows) - 1)
    chosen: set[int] = set()
    for key in order:
        if len(chosen) + len(groups[key]) <= most:
            chosen.update(groups[key])
    if not chosen:
        chosen.update(groups[min(order, key=lambda key: len(groups[key]))])
    train = [row for index, row in enumerate(rows) if index not in chosen]
    return train, [rows[index] for index in sorted(chosen)]


def _groups(rows: Sequence[Row]) -> dict[str, list[int]]:
    """Row numbers by the shortest of a row's prompts that is some row's last one: linked rows have it in common."""
    prompts = [prompt_keys(row) for row in rows]
    last = {keys[-1] for keys in prompts}
    groups: dict[str, list[int]] = {}
    for index, keys in enumerate(prompts):
        groups.setdefault(next(key for key in keys if key in last), []).append(index)
    return groups


def overlap(train: Sequence[Row], held_out: Sequence[Row]) -> list[Row]:
    """Held-out rows whose prompt is answered somewhere in training, case and white space aside."""
    known = {key for row in train for key in prompt_keys(row)}
    return [row for row in held_out if prompt_key(row) in known]


def showable(text: str, limit: int = 300) -> str:
    """Text from a file as it can be printed: no lone surrogates, and cut at ``limit`` characters."""
    cut = text if len(text) <= limit else text[:limit] + "..."
    return cut.encode("utf-8", "replace").decode()


def digest(messages: tuple[dict[str, Any], ...], tools: Any = None) -> str:
    """Hex SHA-256 of messages exactly as they are."""
    return hashlib.sha256(json.dumps([messages, tools], sort_keys=True).encode()).hexdigest()


def prompt_keys(row: Row) -> list[str]:
    """A key for the prompt before each assistant turn, shortest first; case and white space do not count."""
    running = hashlib.sha256()
    keys = []
    for message in row.messages:
        if message["role"] == "assistant":
            keys.append(running.hexdigest())
        folded = " ".join(message["content"].casefold().split())
        calls = json.dumps(message.get("tool_calls"), sort_keys=True)
        running.update(json.dumps([message["role"], folded, calls]).encode())
    return keys


def prompt_key(row: Row) -> str:
    """The key of the prompt that the last assistant turn answers."""
    return prompt_keys(row)[-1]
