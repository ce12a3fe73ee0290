"""JSON Lines and JSON arrays read strictly, each row with its line: no key twice, no NaN, no silent stop."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn


@dataclass(frozen=True)
class Record:
    """One row as it was found: its columns, or what is wrong with it. ``where`` is file:line."""

    where: str
    value: dict[str, Any] | None
    problem: str = ""


def parse(text: str) -> Any:
    """JSON, strictly: no key twice in an object, no NaN or Infinity. Raises ValueError with the reason."""
    try:
        return _STRICT.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise ValueError("not valid JSON (nested too deeply)") from None


def json_records(path: Path, lines: Iterator[str]) -> Iterator[Record]:
    """Records of JSON Lines or of one array: told apart by the first character, because both names hold both."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if line.lstrip().startswith("["):
            yield from _array(path, "\n" * (number - 1) + line + "".join(lines))
            return
        yield _line(f"{path}:{number}", line.strip(), first=number == 1)


def _line(where: str, text: str, first: bool) -> Record:
    try:
        return _record(where, parse(text))
    except ValueError as error:
        hint = "; each row takes one line, or the whole file is one array" if first and text == "{" else ""
        return Record(where, None, f"{error}{hint}")


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
            value, end = _STRICT.raw_decode(text, position)
        except json.JSONDecodeError:
            raise
        except RecursionError:
            raise json.JSONDecodeError("nested too deeply", text, position) from None
        except ValueError as error:
            value, end = error, _end(text, position)
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


def _end(text: str, position: int) -> int:
    """Where an element ends that is JSON but not strict."""
    try:
        return _LENIENT.raw_decode(text, position)[1]
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, position) from None


def _skip(text: str, position: int) -> int:
    found = _BLANK.match(text, position)
    return found.end() if found else position


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} appears twice in one object")
    return found


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _number(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _constant(text)


_BLANK = re.compile(r"[ \t\r\n]*")
_STRICT = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_number)
_LENIENT = json.JSONDecoder(parse_int=float)
