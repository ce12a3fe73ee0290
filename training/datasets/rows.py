"""Rows of text files as plain records with file:line: JSON Lines, one JSON array, a JSON object around one list, CSV and TSV; gzip too.

A record that cannot be read becomes a problem with its place, so that one bad line does not hide the others; a file that is wrong as
a whole is one DataError. Text must be UTF-8; a byte order mark and CRLF line ends are fine. No key may stand twice in an object.
"""

import csv
import gzip
import json
import math
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, NoReturn

from pipeline.errors import DataError
from training.datasets.keys import HARMLESS, detect, says_nothing

Advance = Callable[[int], None]
# keys of a row under which lists of objects are no rows
_NO_ROWS = frozenset("messages conversations prompt completion turns dialog tools functions documents history answers".split())  # noqa: SIM905
_SAMPLE = 1 << 20
# a line longer than this, or a gzip file that grows beyond this and so many times, is no dataset
_LONGEST = 256 << 20
_BOMB, _TIMES = 1 << 30, 200


@dataclass(frozen=True)
class Record:
    """One row as it was found: its columns, or what is wrong with it. ``where`` is file:line."""

    where: str
    value: dict[str, Any] | None
    problem: str = ""


def text_rows(path: Path, kind: str, advance: Advance | None = None) -> Iterator[Record]:
    """Records of a text file of a kind (``.jsonl``, ``.json``, ``.csv``, ``.tsv``); ``advance`` is told the bytes of each line read.

    Raises DataError when the file is in another encoding, damaged, or wrong as a whole.
    """
    _require_utf8(path)
    lines = _lines(path, advance)
    return _csv(path, lines, tabs=kind == ".tsv") if kind in (".csv", ".tsv") else _json(path, lines)


def opened(path: Path) -> IO[bytes]:
    """A file's bytes, unpacked where its name ends in .gz."""
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _lines(path: Path, advance: Advance | None) -> Iterator[str]:
    """Lines with their ends; bytes that are not UTF-8 come as lone surrogates, which the row check refuses."""
    size, read, number = path.stat().st_size, 0, 0
    try:
        with opened(path) as handle:
            while raw := handle.readline(_LONGEST):
                number, read = number + 1, read + len(raw)
                if len(raw) == _LONGEST or (read > _BOMB and read > _TIMES * size):
                    raise DataError(
                        f"{path}:{number}: too large to be a row, or to be a dataset", remedy="check what the file is"
                    )
                if advance:
                    advance(len(raw))
                yield (raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw).decode("utf-8", "surrogateescape")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        remedy = "copy or download it again; a file that is not compressed must not be named .gz"
        raise DataError(f"{path} is a damaged gzip file, or none: {error}", remedy=remedy) from None


def _require_utf8(path: Path) -> None:
    """One DataError for a file whose text is in another encoding; a single bad line among others is that line's own fault."""
    try:
        with opened(path) as handle:
            sample = handle.read(_SAMPLE)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        return  # said when it is read
    if b"\0" in sample[:4096] and not sample.startswith(b"PAR1"):
        halves = (sample[:4096:2], sample[1:4096:2])
        if max(half.count(0) for half in halves) > len(halves[0]) // 2:
            raise DataError(f"{path} looks like UTF-16 text", remedy="save it as UTF-8")
    wrong, right = [], 0
    for number, line in enumerate(sample.split(b"\n")[:-1] or [sample], 1):
        if line.isascii():
            continue
        try:
            line.decode()
            right += 1
        except UnicodeDecodeError:
            wrong.append(number)
    if right or len(wrong) < 2:
        return
    try:
        sample.decode("cp1252")
        guess = "; it looks like cp1252 (Windows)"
    except UnicodeDecodeError:
        guess = ""
    save = "save it as CSV UTF-8" if {".csv", ".tsv"} & set(path.suffixes) else "save it as UTF-8"
    raise DataError(f"{path}:{wrong[0]}: not UTF-8{guess}", remedy=save)


def parse(text: str) -> Any:
    """JSON, strictly: no key twice in an object, no NaN or Infinity. Raises ValueError with the reason."""
    return _decoded(_STRICT, text)


def _decoded(decoder: json.JSONDecoder, text: str) -> Any:
    try:
        return decoder.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise ValueError("not valid JSON (nested too deeply)") from None


def _json(path: Path, lines: Iterator[str]) -> Iterator[Record]:
    """Records of JSON Lines, of one array or of an object around one: told apart by how they begin, for names hold all of them."""
    begun: list[str] = []
    for number, line in enumerate(lines, 1):
        begun.append(line)
        if not line.strip():
            continue
        if line.lstrip().startswith("["):
            yield from _array(path, "".join([*begun, *lines]))
            return
        first = _line(path, number, line)
        following = [] if first.value is not None else _until_full(lines)
        if first.value is None and following and not _is_object(following[-1]):
            yield from _object(path, "".join([*begun, *following, *lines]))
            return
        rest = following or _until_full(lines)
        if first.value is not None and not rest and (wrapped := _wrapped(path, first.value)):
            yield from _array(path, "".join(begun), wrapped)
            return
        yield first
        number += 1
        for other in (*rest, *lines):
            if other.strip():
                yield _line(path, number, other)
            number += 1
        return


def _until_full(lines: Iterator[str]) -> list[str]:
    """Lines up to the next that is not blank."""
    found: list[str] = []
    for line in lines:
        found.append(line)
        if line.strip():
            break
    return found if any(line.strip() for line in found) else []


def _is_object(line: str) -> bool:
    try:
        return isinstance(_decoded(_ROW, line.strip()), dict)
    except ValueError:
        return False


def _line(path: Path, number: int, line: str) -> Record:
    try:
        return _record(f"{path}:{number}", _decoded(_ROW, line.strip()))
    except ValueError as error:
        return Record(f"{path}:{number}", None, str(error))


def _record(where: str, value: Any) -> Record:
    if isinstance(value, dict):
        return Record(where, value)
    return Record(where, None, f"a row must be a JSON object, this is {type(value).__name__}")


def _object(path: Path, text: str) -> Iterator[Record]:
    """The rows of the one list in an object that spans lines; DataError, one line for one cause, when it is something else."""
    one_line = "write each row on one line, or all of them as one array"
    try:
        value = _decoded(_ROW, text.strip())
    except ValueError:
        # JSON Lines of which the first two lines are broken, or no JSON at all
        if any(_is_object(line) for line in text.split("\n")):
            yield from (_line(path, n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip())
            return
        raise DataError(f"{path} is neither JSON Lines nor one JSON value", remedy=one_line) from None
    wrapped = _wrapped(path, value)
    if wrapped is None:
        lists = [key for key, inner in value.items() if _is_rows(key, inner)]
        said = f"holds several lists ({', '.join(lists)})" if lists else "is one object over several lines"
        raise DataError(f"{path}:1: {said}", remedy="save the one list of rows as a file" if lists else one_line)
    yield from _array(path, text, wrapped)


def _wrapped(path: Path, value: dict[str, Any]) -> str | None:
    """The key of the one list of rows in an object; None when there are none or several, or the object is a row itself.

    Raises DataError when something beside the list may be meant for each of its rows.
    """
    lists = [key for key, inner in value.items() if _is_rows(key, inner)]
    if len(lists) != 1 or detect(value):
        return None
    beside = [key for key, inner in value.items() if key != lists[0] and key not in HARMLESS and not says_nothing(inner)]
    if more := [key for key in beside if key not in ("name", "description", "info", "features", "citation", "count", "total")]:
        remedy = f"put it into each row, or save the list {lists[0]!r} alone"
        raise DataError(f"{path}:1: {more[0]!r} stands beside the list of rows {lists[0]!r}", remedy=remedy)
    return lists[0]


def _is_rows(key: str, value: Any) -> bool:
    """Whether a value is a list of rows: objects, under a key that is not a part of a row."""
    if key in _NO_ROWS or not isinstance(value, list) or not value or not all(isinstance(row, dict) for row in value):
        return False
    return not all("role" in row or "from" in row for row in value)  # turns


def _array(path: Path, text: str, key: str | None = None) -> Iterator[Record]:
    """Elements one by one, so that each has its line; a syntax error ends the file, because what follows is unclear.

    With ``key`` they are those of the list under it in the object that the text is.
    """
    start = text.index("[") if key is None else _member(text, key)
    line, counted = 1, 0
    try:
        for position, value in _elements(text, start, last=key is None):
            line, counted = line + text.count("\n", counted, position), position
            where = f"{path}:{line}"
            yield Record(where, None, str(value)) if isinstance(value, ValueError) else _record(where, value)
    except json.JSONDecodeError as error:
        reason = f"not valid JSON ({error.msg}, column {error.colno}); the rest of the file was not read"
        yield Record(f"{path}:{error.lineno}", None, reason)


def _member(text: str, key: str) -> int:
    """Where the value of a key of the outermost object begins."""
    position = _skip(text, text.index("{") + 1)
    while True:
        name, position = _ROW.raw_decode(text, position)
        position = _skip(text, text.index(":", position) + 1)
        if name == key:
            return position
        _, position = _ROW.raw_decode(text, position)
        position = _skip(text, text.index(",", position) + 1)


def _elements(text: str, start: int, *, last: bool) -> Iterator[tuple[int, Any]]:
    """Offset and value of each array element; an element that is JSON but not strict comes as its ValueError."""
    position = _skip(text, start + 1)
    while not text.startswith("]", position):
        try:
            try:
                value, end = _ROW.raw_decode(text, position)
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
    if last and text[position + 1 :].strip():
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


class Inexact(float):
    """A number that was written with more digits than it keeps: no harm where nobody uses it."""


def _kept(text: str) -> float:
    number = float(text)
    exact = not math.isfinite(number) or Decimal(text) == Decimal(repr(number))
    return number if exact else Inexact(number)


def _number(text: str) -> float:
    number = _kept(text)
    if isinstance(number, Inexact):
        raise ValueError(f"{text} has more digits than a number keeps; write it as text")
    return number if math.isfinite(number) else _constant(text)


_BLANK = re.compile(r"[ \t\r\n]*")
_STRICT = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_number)
# of a row: NaN in a column that nobody uses is no harm, and where it is used it is refused
_ROW = json.JSONDecoder(object_pairs_hook=_pairs, parse_float=_kept)
_LENIENT = json.JSONDecoder(parse_int=float)


def _csv(path: Path, lines: Iterator[str], tabs: bool) -> Iterator[Record]:
    """Rows by header name; the delimiter is the one that Excel names in a line of its own, a tab in .tsv, a semicolon where the header
    has only those, else a comma.
    """
    header_line, first = next(lines, ""), 2
    if header_line.lower().startswith("sep=") and len(header_line.strip()) == len("sep=;"):
        delimiter, header_line, first = header_line.strip()[-1], next(lines, ""), 3
    elif tabs:
        delimiter = "\t"
    else:
        delimiter = ";" if ";" in header_line and "," not in header_line else ","
    try:
        header = [name.strip() for name in next(csv.reader([header_line], delimiter=delimiter), [])]
    except csv.Error as error:
        raise DataError(f"{path}:1: not valid CSV ({error})", remedy="save it with newlines (LF) between rows") from None
    named = [name for name in header if name]
    if not named and header_line:
        raise DataError(f"{path}:{first - 1}: the first line names no column", remedy="let the file begin with its column names")
    if len(set(named)) < len(named):
        raise DataError(f"{path}:1: a column name appears twice in the header: {', '.join(header)}")
    # process-wide, and the default of 128 KiB is less than a long document
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        where = f"{path}:{reader.line_num + first}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Record(where, None, f"not valid CSV ({error})")
            continue
        if fields and len(fields) == len(header):
            yield Record(where, _named(header, fields))
        elif fields:
            yield Record(where, None, f"{len(fields)} fields where the header has {len(header)}")


def _named(header: list[str], fields: list[str]) -> dict[str, str]:
    """Cells by column; of columns without a name the numbered first one is an index, as pandas writes it, and empty ones are none."""
    nameless = {
        f"column {place + 1}": cell for place, (name, cell) in enumerate(zip(header, fields, strict=True)) if not name and cell
    }
    if not header[0] and fields[0].isdigit():
        nameless["__index_level_0__"] = nameless.pop("column 1")
    return {**{name: cell for name, cell in zip(header, fields, strict=True) if name}, **nameless}
