"""Where rows come from: JSONL, JSON, CSV, TSV and Parquet files and hub datasets, as plain records with file:line.

A record that cannot be read becomes a problem with its place, so that one bad line does not hide the others. Text must
be UTF-8; a byte order mark and CRLF line ends are fine. JSON is read strictly: no key twice, no NaN, no silent stop. Not
covered: compressed files and hub configurations.
"""

import csv
import json
import logging
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pipeline.errors import DataError, EnvironmentFailure, MissingDependency
from pipeline.runs.files import require_path

Advance = Callable[[int], None]
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_MAGIC = {
    b"\x1f\x8b": "is gzip-compressed; unpack it first",
    b"PK\x03\x04": "is a ZIP archive or a spreadsheet; unpack it, or save the sheet as CSV",
    b"\xff\xfe": "is UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "is UTF-16 text; save it as UTF-8",
    b"PAR1": "is a Parquet file; name it .parquet",
}
_HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<split>[\w.\[\]%:+-]+))?", re.ASCII)


@dataclass(frozen=True)
class Record:
    """One row as it was found: its columns, or what is wrong with it. ``where`` is file:line."""

    where: str
    value: dict[str, Any] | None
    problem: str = ""


@dataclass(frozen=True)
class HubId:
    """A dataset on the hub: ``owner/name``, a revision (None: the default branch) and a split."""

    name: str
    revision: str | None = None
    split: str = "train"


def resolve(source: str | Path) -> Path | HubId:
    """What a ``--data`` value means: a file, or ``hub:owner/name[@revision][:split]`` (``hub:`` may be left out).

    Raises DataError when it is neither.
    """
    text, path = str(source), Path(source)
    require_path(path)
    explicit = text.startswith("hub:")
    hub = _HUB.fullmatch(text.removeprefix("hub:"))
    local = path.exists() or path.suffix.lower() in SUFFIXES or path.parent.is_dir()
    if isinstance(source, str) and hub and (explicit or not local):
        return HubId(hub["name"], hub["revision"], hub["split"] or "train")
    if explicit:
        raise DataError(f"{text} is not a hub dataset", remedy="write hub:owner/name[@revision][:split]")
    if not path.exists():
        raise DataError(f"{path}: no such file", remedy="check the path; a dataset on the hub is hub:owner/name")
    if path.is_dir():
        raise DataError(f"{path} is a folder", remedy=f"name the data file in it ({', '.join(SUFFIXES)})")
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{path}: unknown kind of file", remedy=f"use one of {', '.join(SUFFIXES)}")
    return path


def records(place: Path | HubId, advance: Advance | None = None) -> Iterator[Record]:
    """Every record of a file or hub dataset in order; ``advance`` is told the bytes of each text line read.

    Raises DataError when nothing of it can be read, EnvironmentFailure when the hub does not answer.
    """
    if isinstance(place, HubId):
        return _hub(place)
    try:
        with place.open("rb") as handle:
            start = handle.read(4)
    except OSError as error:
        raise DataError(f"{place} cannot be read: {error.strerror}") from None
    if (suffix := place.suffix.lower()) == ".parquet":
        return _parquet(place)
    for magic, what in _MAGIC.items():
        if start.startswith(magic):
            raise DataError(f"{place} {what}")
    lines = _lines(place, advance)
    return _csv(place, lines, tabs=suffix == ".tsv") if suffix in (".csv", ".tsv") else _json(place, lines)


def _lines(path: Path, advance: Advance | None) -> Iterator[str]:
    """Lines with their ends; bytes that are not UTF-8 come as lone surrogates, which the row check refuses."""
    with path.open("rb") as handle:
        for number, raw in enumerate(handle):
            if advance:
                advance(len(raw))
            yield (raw.removeprefix(b"\xef\xbb\xbf") if number == 0 else raw).decode("utf-8", "surrogateescape")


def parse(text: str) -> Any:
    """JSON, strictly: no key twice in an object, no NaN or Infinity. Raises ValueError with the reason."""
    try:
        return _STRICT.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise ValueError("not valid JSON (nested too deeply)") from None


def _json(path: Path, lines: Iterator[str]) -> Iterator[Record]:
    """Records of JSON Lines or of one array: told apart by the first character, because both names hold both."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if line.lstrip().startswith("["):
            yield from _array(path, "\n" * (number - 1) + line + "".join(lines))
            return
        try:
            record = _record(f"{path}:{number}", parse(line.strip()))
        except ValueError as error:
            hint = "; each row takes one line, or the whole file is one array" if number == 1 and line.strip() == "{" else ""
            record = Record(f"{path}:{number}", None, f"{error}{hint}")
        yield record


def _record(where: str, value: Any) -> Record:
    if isinstance(value, dict):
        return Record(where, value)
    return Record(where, None, f"a row must be a JSON object, this is {type(value).__name__}")


def _array(path: Path, text: str) -> Iterator[Record]:
    """Elements one by one, so that each has its line; a syntax error ends the file, because what follows is unclear."""
    line, counted = 1, 0
    try:
        for position, value in _elements(text):
            line, counted = line + text.count("\n", counted, position), position
            where = f"{path}:{line}"
            yield Record(where, None, str(value)) if isinstance(value, ValueError) else _record(where, value)
    except json.JSONDecodeError as error:
        reason = f"not valid JSON ({error.msg}, column {error.colno}); the rest of the file was not read"
        yield Record(f"{path}:{error.lineno}", None, reason)


def _elements(text: str) -> Iterator[tuple[int, Any]]:
    """Offset and value of each array element; an element that is JSON but not strict comes as its ValueError."""
    position = _skip(text, text.index("[") + 1)
    while not text.startswith("]", position):
        try:
            try:
                value, end = _STRICT.raw_decode(text, position)
            except json.JSONDecodeError:
                raise
            except ValueError as error:
                value, end = error, _LENIENT.raw_decode(text, position)[1]
        except RecursionError:
            raise json.JSONDecodeError("nested too deeply", text, position) from None
        yield position, value
        position = _skip(text, end)
        if text.startswith(",", position):
            position = _skip(text, position + 1)
            if text.startswith("]", position):
                raise json.JSONDecodeError("comma before ']'", text, position)
        elif not text.startswith("]", position):
            raise json.JSONDecodeError("expected ',' or ']' after a row", text, position)
    if text[position + 1 :].strip():
        raise json.JSONDecodeError("text after the array", text, _skip(text, position + 1))


def _skip(text: str, position: int) -> int:
    blank = _BLANK.match(text, position)
    return blank.end() if blank else position


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value, keys = dict(pairs), [key for key, _ in pairs]
    if len(value) < len(keys):
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} appears twice in one object")
    return value


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _number(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _constant(text)


_BLANK = re.compile(r"[ \t\r\n]*")
_STRICT = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_number)
_LENIENT = json.JSONDecoder(parse_int=float)


def _csv(path: Path, lines: Iterator[str], tabs: bool) -> Iterator[Record]:
    """Rows by header name; the delimiter is a comma, or a semicolon where the header has only those."""
    header_line = next(lines, "")
    delimiter = "\t" if tabs else ";" if ";" in header_line and "," not in header_line else ","
    try:
        header = [name.strip() for name in next(csv.reader([header_line], delimiter=delimiter), [])]
    except csv.Error as error:
        raise DataError(f"{path}:1: not valid CSV ({error})", remedy="save it with newlines (LF) between rows") from None
    if len(set(header)) < len(header):
        raise DataError(f"{path}:1: a column name appears twice in the header: {', '.join(header)}")
    # process-wide, and the default of 128 KiB is less than a long document
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        where = f"{path}:{reader.line_num + 2}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Record(where, None, f"not valid CSV ({error})")
            continue
        if len(fields) == len(header):
            yield Record(where, dict(zip(header, fields, strict=True)))
        elif fields:
            yield Record(where, None, f"{len(fields)} fields where the header has {len(header)}")


def _parquet(path: Path) -> Iterator[Record]:
    """Rows counted from 1; a null in a nested object is a key another row has, so it is left out."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingDependency("reading Parquet needs pyarrow", remedy="pip install pyarrow") from None
    try:
        number = 0
        for batch in parquet.ParquetFile(path).iter_batches(1000):
            for value in _values(path, number, batch):
                number += 1
                yield Record(f"{path}:{number}", _without_nulls(value))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from None


def _values(path: Path, before: int, batch: Any) -> list[Any]:
    """The rows of a batch; a value that Python has no room for (a date of the year 12000) is a DataError with its place."""
    try:
        return list(batch.to_pylist())
    except (OverflowError, ValueError) as error:
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            for number, item in enumerate(column, before + 1):
                try:
                    item.as_py()
                except (OverflowError, ValueError):
                    raise DataError(f"{path}:{number}: {name} cannot be read ({error})") from None
        raise


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _hub(place: HubId) -> Iterator[Record]:
    """Rows of one split, downloaded once into the hub's own cache, counted from 1."""
    try:
        import datasets
    except ImportError:
        remedy = "pip install 'granite-pipeline[train]'"
        raise MissingDependency("reading hub datasets needs the package datasets", remedy=remedy) from None
    name = f"hub:{place.name}" + (f"@{place.revision}" if place.revision else "")
    # its retries are told line by line in the middle of ours; what failed is told once, below
    http = logging.getLogger("huggingface_hub.utils._http")
    level = http.level
    http.setLevel(logging.ERROR)
    try:
        rows = datasets.load_dataset(place.name, revision=place.revision, split=place.split)
    except Exception as error:  # the library and its HTTP stack raise some twenty unrelated types
        raise _hub_failure(name, place.split, error) from None
    finally:
        http.setLevel(level)
    for number, value in enumerate(rows, 1):
        yield Record(f"{name}:{number}", _without_nulls(value))


def _hub_failure(name: str, split: str, error: Exception) -> DataError | EnvironmentFailure:
    """One clear line out of what the datasets library raised, told apart by who can put it right."""
    said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "DatasetNotFoundError" in kinds:
        remedy = "check the name; a gated or private dataset needs HF_TOKEN and its terms accepted"
        return DataError(f"{name} is not on the hub, or not open to this account", evidence=said, remedy=remedy)
    if kinds & {"ConnectionError", "TimeoutError", "TransportError", "OfflineModeIsEnabled", "LocalEntryNotFoundError"}:
        remedy = "check the network and HF_ENDPOINT, or give a local file"
        return EnvironmentFailure(f"{name}: the hub cannot be reached", evidence=said, remedy=remedy)
    if isinstance(error, OSError):
        return EnvironmentFailure(f"{name} could not be downloaded", evidence=said)
    return DataError(f"{name} has no usable split {split!r}", evidence=said, remedy="write hub:owner/name:split")
