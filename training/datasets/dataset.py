"""Datasets: read a file or hub dataset into rows, refuse bad ones with file:line, split and compare by prompt.

    data = load("alerts.jsonl")
    train, held_out = split(data.rows, share=0.1, seed=1)

Formats are in ``formats``, kinds of file in ``sources``. Not covered: datasets larger than memory.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import DataError
from pipeline.model.toolcalls import plain_calls
from pipeline.runs.hashes import sha256_file
from pipeline.runs.text import printable
from training.datasets.formats import convert
from training.datasets.keys import UNDERSTOOD, RowError, detect
from training.datasets.rows import Advance, Record
from training.datasets.sources import Files, HubId, records, resolve
from training.datasets.turns import REORDERED, Reading

# the built-in SOC alerts; benchmarks/soc_data.py makes them
SOC_TRAIN, SOC_EVAL = (Path(__file__).parents[1] / "data" / f"soc_{part}.jsonl" for part in ("train", "eval"))
_SHOWN = 5


@dataclass(frozen=True)
class Row:
    """One conversation to train on, its messages as ``turns`` describes them. ``where`` is file:line.

    ``tools`` are JSON schemas the conversation may call, ``documents`` what it may answer from; ``text`` is the conversation as
    its author rendered it, where it came so, and ``unused`` its keys that say nothing to a model or were ignored on request.
    """

    messages: tuple[dict[str, Any], ...]
    where: str
    tools: tuple[dict[str, Any], ...] | None = None
    documents: tuple[dict[str, Any], ...] | None = None
    text: str | None = None
    unused: tuple[str, ...] = ()


class Refusal(NamedTuple):
    """A row that was not taken, where it is and why."""

    where: str
    reason: str
    remedy: str = ""


class KeyCount(NamedTuple):
    """A key of rows (a column, or ``messages[].key``), what becomes of it, and in how many rows."""

    key: str
    fate: str
    rows: int


@dataclass(frozen=True)
class Dataset:
    """What was read: ``sha256`` is of the file's bytes, of names and hashes of several files, of a hub dataset's rows.

    ``format`` is one of formats.UNDERSTOOD, or 'unknown' when every row was refused before a format could be told;
    ``keys`` is the account of every key: used, harmless, ignored or refused, and what was done to turns on request.
    """

    source: str
    format: str
    rows: tuple[Row, ...]
    refused: tuple[Refusal, ...]
    sha256: str
    keys: tuple[KeyCount, ...] = ()


def read(source: str | Path, advance: Advance | None = None, reading: Reading = Reading()) -> Dataset:  # noqa: B008
    """Rows and refusals of a file, a folder or glob of files, or ``hub:owner/name[@revision][:config][:split]``.

    ``reading`` says how rows are to be taken.

    ``advance`` is told the bytes of each text line read. Raises DataError when the file is missing, empty, not
    decodable, or has columns of no known format; EnvironmentFailure when the hub does not answer.
    """
    place = resolve(source)
    reader = _Reader(reading)
    for record in records(place, advance):
        reader.take(record)
    if not reader.seen:
        raise DataError(f"{source} has no rows", remedy="give a file with at least one row")
    if reader.format is None and reader.columns:
        understood = "; ".join(f"{name}: {', '.join(needed)}" for name, (needed, _) in UNDERSTOOD.items())
        unknown = f"{source}: unknown column set ({', '.join(sorted(reader.columns)[:20])})"
        remedy = 'name them with --columns prompt=...,completion=..., or write each row as {"messages": [...]}'
        if "chosen" in reader.columns:
            whole = reader.first and isinstance(reader.first.get("chosen"), list)
            column = "messages" if whole else "completion"
            remedy = f"a set of preferences; to train on the answers chosen: --columns {column}=chosen --ignore rejected"
            if not whole and "prompt" not in reader.columns:
                remedy = 'a set of preferences; write each chosen conversation as {"messages": [...]}'
        raise DataError(unknown, evidence=f"understood are {understood}", remedy=remedy)
    rows, refused = tuple(reader.rows), tuple(reader.refused)
    return Dataset(str(source), reader.format or "unknown", rows, refused, _sha256(place, rows), reader.account())


def _sha256(place: Files | HubId, rows: Sequence[Row]) -> str:
    """Of one file's bytes; of names and hashes of several; of the rows of a hub dataset."""
    if isinstance(place, HubId):
        text = "".join(map(digest, rows))
    elif len(place) == 1:
        return sha256_file(place[0])
    else:
        text = "\n".join(f"{path.name} {sha256_file(path)}" for path in place)
    return hashlib.sha256(text.encode()).hexdigest()


def load(source: str | Path, reading: Reading = Reading(), *, skip_bad: bool = False) -> Dataset:  # noqa: B008
    """As ``read``, but raises DataError when any row is refused: nothing is trained on part of a file by accident.

    With ``skip_bad`` refused rows are left out, as long as there are others.
    """
    dataset = read(source, reading=reading)
    if not (skip_bad and dataset.rows):
        require_clean(dataset)
    return dataset


def require_clean(dataset: Dataset) -> None:
    """Raise DataError with the first refusals when a dataset has any."""
    if dataset.refused:
        raise bad_rows(dataset.source, dataset.refused, len(dataset.refused) + len(dataset.rows))


def bad_rows(source: str, refused: Sequence[Refusal], total: int) -> DataError:
    """The error that names the first of a source's refused rows, each with its reason."""
    causes: dict[str, list[str]] = {}
    for one in refused:
        causes.setdefault(one.reason, []).append(one.where)
    lines = [f"{places[0]}{f' (and {len(places) - 1} more)' if places[1:] else ''}: {cause}" for cause, places in causes.items()]
    lines = [showable(line) for line in lines]
    evidence = "\n".join([*lines[:_SHOWN], *([f"... and {len(lines) - _SHOWN} more reasons"] if len(lines) > _SHOWN else [])])
    remedies = list(dict.fromkeys(one.remedy for one in refused if one.remedy))
    others = ", or leave them out: --skip-bad" if len(refused) < total else ""
    remedy = "; ".join([*remedies[:2], f"correct or remove them{others}"])
    return DataError(f"{source}: {len(refused)} of {total} rows cannot be used", evidence=evidence, remedy=remedy)


class _Reader:
    """Collects rows; the first row with known columns decides the format of all."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.format: str | None = None
        self.rows: list[Row] = []
        self.refused: list[Refusal] = []
        self.columns: dict[str, None] = {}
        self.counts: Counter[tuple[str, str]] = Counter()
        self.first: dict[str, Any] | None = None
        self.seen = False

    def take(self, record: Record) -> None:
        """Add one record as a row or a refusal."""
        self.seen = True
        if record.value is None:
            self.refused.append(Refusal(record.where, showable(record.problem)))
            return
        try:
            value, left_out = _named(record.value, self.reading)
            self.first = self.first or value
            if self.format is None:
                self.columns |= dict.fromkeys(showable(str(column), 40) for column in value)
                self.format = detect(value)
            if self.format is None:
                raise RowError(f"no known columns (columns: {', '.join(map(str, value)) or 'none'})")
            # a column of theirs that was ignored may have made room for another one of ours
            still = self.reading._replace(ignore=self.reading.ignore - set(self.reading.columns))
            made = convert(self.format, value, still)
        except RowError as error:
            self.refused.append(Refusal(record.where, showable(str(error))))
            self.counts.update((showable(key, 60), "refused") for key in error.keys)
            return
        fates = {showable(key, 60): fate for key, fate in made.keys.items()}
        fates |= {f"{showable(key, 60)} (of the file)": "ignored" for key in left_out}
        unused = tuple(sorted(key for key, fate in fates.items() if fate != "used"))
        self.rows.append(Row(made.messages, record.where, made.tools, made.documents, made.text, unused))
        self.counts.update(
            [*fates.items(), *((note, "reordered" if note == REORDERED else "on request") for note in set(made.notes))]
        )

    def account(self) -> tuple[KeyCount, ...]:
        """Every key with its fate and rows, the used ones first."""
        order = ("used", "on request", "reordered", "harmless", "ignored", "refused")
        counted = [KeyCount(key, fate, rows) for (key, fate), rows in self.counts.items() if rows]
        return tuple(sorted(counted, key=lambda one: (order.index(one.fate), one.key)))


def _named(row: dict[str, Any], reading: Reading) -> tuple[dict[str, Any], list[str]]:
    """A row with its columns under our names, and those left out to make room; RowError when one is missing or its name is taken."""
    if not reading.columns:
        return row, []
    theirs = {theirs: ours for ours, theirs in reading.columns.items()}
    if missing := [column for column in theirs if column not in row]:
        raise RowError(f"has no {missing[0]!r}, which --columns names (columns: {', '.join(map(str, row)) or 'none'})")
    taken = [ours for ours in reading.columns if ours in row and ours not in theirs and ours not in reading.ignore]
    if taken:
        raise RowError(f"has a column {taken[0]!r} already, which --columns wants to fill; --ignore {taken[0]} leaves it out")
    left_out = [key for key in row if key in reading.columns and key not in theirs]
    return {theirs.get(key, key): value for key, value in row.items() if key not in left_out}, left_out


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


def showable(text: str, limit: int = 2000) -> str:
    """Text from a file as it can be printed: no lone surrogates or control characters, and cut at ``limit`` characters."""
    cut = text if len(text) <= limit else text[:limit] + "..."
    return printable(cut).encode("utf-8", "replace").decode()


def digest(row: Row) -> str:
    """Hex SHA-256 of a conversation exactly as it is."""
    parts = [row.messages, row.tools, *([row.documents] if row.documents else [])]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def prompt_keys(row: Row) -> list[str]:
    """A key for the prompt before each assistant turn, shortest first; case and white space do not count, documents do."""
    running = hashlib.sha256(json.dumps(row.documents, sort_keys=True).encode() if row.documents else b"")
    keys = []
    for message in row.messages:
        if message["role"] == "assistant":
            keys.append(running.hexdigest())
        folded = " ".join(message["content"].casefold().split())
        # a call's id is another one each time, and in no prompt
        calls = json.dumps(plain_calls(message.get("tool_calls") or ()), sort_keys=True) if message.get("tool_calls") else "null"
        running.update(json.dumps([message["role"], folded, calls]).encode())
    return keys


def prompt_key(row: Row) -> str:
    """The key of the prompt that the last assistant turn answers."""
    return prompt_keys(row)[-1]
