"""Datasets that cannot be trained on."""

from __future__ import annotations

import json
from typing import Any

from bad_inputs.case import Case

GOOD = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


def _turns(*roles: str, content: Any = "x") -> bytes:
    return json.dumps({"messages": [{"role": role, "content": content} for role in roles]}).encode() + b"\n"


def _deep(levels: int) -> bytes:
    return b'{"messages": ' + b"[" * levels + b"]" * levels + b"}\n"


def _row(**columns: Any) -> bytes:
    return json.dumps(columns).encode() + b"\n"


_CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{broken"}}]}
_USER = {"role": "user", "content": "q"}
# name, file, bytes, words that the error must say
_TABLE: list[tuple[str, str, bytes, tuple[str, ...]]] = [
    ("empty file", "d.jsonl", b"", ("has no rows",)),
    ("only blank lines", "d.jsonl", b"\n  \n\n", ("has no rows",)),
    ("only a byte order mark", "d.jsonl", b"\xef\xbb\xbf", ("has no rows",)),
    ("empty array", "d.json", b"[]", ("has no rows",)),
    ("csv with a header only", "d.csv", b"prompt,completion\n", ("has no rows",)),
    ("unknown suffix", "d.txt", GOOD, ("d.txt: unknown kind of file",)),
    ("no suffix", "d", GOOD, ("unknown kind of file",)),
    ("gzip", "d.jsonl", b"\x1f\x8b\x08\x00", ("gzip-compressed",)),
    ("zip archive", "d.csv", b"PK\x03\x04rest", ("ZIP archive",)),
    ("utf-16", "d.jsonl", GOOD.decode().encode("utf-16"), ("UTF-16",)),
    ("utf-16 big endian", "d.csv", b"\xfe\xff" + "a,b".encode("utf-16-be"), ("UTF-16",)),
    ("parquet under another name", "d.jsonl", b"PAR1....PAR1", ("Parquet", ".parquet")),
    ("latin-1 text", "d.jsonl", GOOD + GOOD.replace(b'"b"', b'"\xe9"'), ("d.jsonl:2", "not valid UTF-8")),
    ("lone surrogate", "d.jsonl", GOOD.replace(b'"b"', b'"\\ud800"'), ("d.jsonl:1", "not valid UTF-8")),
    ("NUL in a text", "d.jsonl", GOOD + GOOD.replace(b'"b"', b'"b\\u0000"'), ("d.jsonl:2", "NUL")),
    ("NUL bytes between rows", "d.jsonl", GOOD + b"\0\0\0\n" + GOOD, ("d.jsonl:2", "not valid JSON")),
    ("BOM and CRLF around a broken row", "d.jsonl", b"\xef\xbb\xbf" + GOOD.strip() + b"\r\n{bad\r\n", ("d.jsonl:2",)),
    ("cut in the middle of a row", "d.jsonl", GOOD * 3 + GOOD[:40], ("d.jsonl:4", "not valid JSON")),
    ("single quotes", "d.jsonl", b"{'messages': []}\n", ("d.jsonl:1", "not valid JSON")),
    ("pretty-printed object", "d.jsonl", b'{\n"messages": []\n}\n', ("d.jsonl:1", "one object over several lines", "each row on one line")),
    ("trailing comma in an array", "d.json", b"[" + GOOD.strip() + b",]", ("comma before",)),
    ("array that is not closed", "d.json", b"[" + GOOD.strip(), ("d.json:1", "expected")),
    ("text after the array", "d.json", b"[" + GOOD.strip() + b"] more", ("text after the array",)),
    ("array of numbers", "d.json", b"[1, 2]", ("row must be a JSON object", "int")),
    ("rows that are strings", "d.jsonl", b'"hello"\n', ("d.jsonl:1", "row must be a JSON object")),
    ("duplicate key", "d.jsonl", b'{"prompt": "a", "prompt": "b", "completion": "c"}\n', ("d.jsonl:1", "'prompt' appears twice")),
    ("NaN", "d.jsonl", b'{"prompt": "a", "completion": "b", "tools": [{"name": "f", "parameters": {"x": NaN}}]}\n', ("d.jsonl:1", "NaN")),
    ("Infinity", "d.jsonl", b'{"prompt": "a", "completion": "b", "documents": [{"text": "t", "x": -Infinity}]}\n', ("d.jsonl:1", "infinite")),
    ("1e999", "d.jsonl", b'{"prompt": "a", "completion": "b", "x": 1e999}\n', ("d.jsonl:1", "'x'")),
    ("number of 5,000 digits", "d.jsonl", b'{"prompt": "a", "completion": "b", "x": ' + b"9" * 5000 + b"}\n", ("d.jsonl:1",)),
    ("nested 100,000 deep", "d.jsonl", _deep(100_000), ("d.jsonl:1", "nested too deeply")),
    ("nested 200 deep", "d.jsonl", GOOD[:-2] + b', "tools": ' + b"[" * 200 + b"]" * 200 + b"}\n", ("d.jsonl:1",)),
    ("array nested 100,000 deep", "d.json", b"[" * 100_000, ("d.json:1", "nested too deeply")),
    ("array nested 100,000 deep after a NaN", "d.json", b'[{"a": NaN, "b": ' + b"[" * 100_000, ("d.json:1", "nested too deeply")),
    ("10 MB in one line, cut", "d.jsonl", b'{"prompt": "' + b"a" * 10_000_000, ("d.jsonl:1", "not valid JSON")),
    ("10 MB row with an unknown role", "d.jsonl", _turns("robot", content="a" * 10_000_000), ("unknown role",)),
    ("unknown columns", "d.jsonl", b'{"foo": 1, "bar": 2}\n', ("unknown column set (bar, foo)",)),
    ("messages is text", "d.jsonl", _row(messages="hello"), ("d.jsonl:1", "'messages'")),
    ("messages is a number", "d.jsonl", _row(messages=7), ("'messages' must be a list", "int")),
    ("messages is empty", "d.jsonl", _row(messages=[]), ("'messages' is empty",)),
    ("a turn is a string", "d.jsonl", _row(messages=["hi"]), ("turn 1 must be an object",)),
    ("a turn has no role", "d.jsonl", _row(messages=[{"content": "x"}]), ("turn 1 has no 'role'",)),
    ("role is a list", "d.jsonl", _row(messages=[{"role": ["user"], "content": "x"}]), ("unknown role",)),
    ("unknown role", "d.jsonl", _turns("user", "bot"), ("turn 2", "unknown role 'bot'")),
    ("no assistant turn", "d.jsonl", GOOD + _turns("user"), ("d.jsonl:2", "no assistant turn")),
    ("ends with the user", "d.jsonl", _turns("user", "assistant", "user"), ("ends with a user turn",)),
    ("two user turns in a row", "d.jsonl", _turns("user", "user", "assistant"), ("turn 2 is user after a user turn",)),
    ("assistant first", "d.jsonl", _turns("assistant", "user", "assistant"), ("begins with an assistant turn", "--greeting keep")),
    ("system in the middle", "d.jsonl", _turns("user", "system", "assistant"), ("turn 2 is system",)),
    ("tool result without a call", "d.jsonl", _turns("user", "tool", "assistant"), ("turn 2 is tool",)),
    ("empty user turn", "d.jsonl", _row(messages=[{"role": "user", "content": " "}, {"role": "assistant", "content": "x"}]),
     ("turn 1 (user) is empty",)),
    ("empty answer", "d.jsonl", _row(prompt="a", completion=""), ("turn 2 (assistant) is empty",)),
    ("answer is null", "d.jsonl", _row(prompt="a", completion=None), ("turn 2 (assistant) is empty",)),
    ("content is an object", "d.jsonl", _turns("user", "assistant", content={"a": 1}), ("content must be text", "dict")),
    ("content is a picture", "d.jsonl", _turns("user", "assistant", content=[{"type": "image_url"}]), ("'image_url'",)),
    ("prompt is a number", "d.jsonl", _row(prompt=1, completion="x"), ("'prompt' must be text",)),
    ("alpaca with a list", "d.jsonl", _row(instruction=["a"], output="b"), ("'instruction'",)),
    ("sharegpt with an unknown speaker", "d.jsonl", _row(conversations=[{"from": "alien", "value": "x"}]), ("'alien'",)),
    ("second row of another format", "d.jsonl", GOOD + _row(prompt="a", completion="b"), ("d.jsonl:2", "'messages'")),
    ("tool call without a name", "d.jsonl", _row(messages=[_USER, {"role": "assistant", "tool_calls": [{"function": {}}]}]),
     ("turn 2", "without a function name")),
    ("tool arguments that are no JSON", "d.jsonl", _row(messages=[_USER, _CALL]), ("arguments of f", "not valid JSON")),
    ("tools that are text", "d.jsonl", _row(messages=[_USER, {"role": "assistant", "content": "x"}], tools="no"), ("'tools'",)),
    ("csv with too few fields", "d.csv", b"prompt,completion\na,b\nc\n", ("d.csv:3", "1 fields where the header has 2")),
    ("csv with too many fields", "d.csv", b"prompt,completion\na,b,c\n", ("d.csv:2", "3 fields")),
    ("csv with a column twice", "d.csv", b"prompt,prompt\na,b\n", ("d.csv:1", "column name appears twice")),
    ("csv with an open quote", "d.csv", b'prompt,completion\na,"b\n', ("not valid CSV",)),
    ("tsv with commas", "d.tsv", b"prompt,completion\na,b\n", ("unknown column set",)),
    ("csv with NUL", "d.csv", b"prompt,completion\na,b\0\n", ("d.csv:2", "NUL")),
    ("parquet that is text", "d.parquet", b"not parquet", ("cannot be read as Parquet",)),
    ("parquet cut short", "d.parquet", b"PAR1" + b"\0" * 20, ("cannot be read as Parquet",)),
]  # fmt: skip

CASES = [Case(f"dataset: {name}", {file: data}, ("data", f"{{folder}}/{file}"), words) for name, file, data, words in _TABLE]
CASES += [
    Case("dataset: missing file", {}, ("data", "{folder}/none.jsonl"), ("no such file",)),
    Case("dataset: a name of 300 letters", {}, ("data", "{folder}/" + "x" * 300), ("check the path",), "InputError"),
    Case("dataset: a folder", {"sub/x": b""}, ("data", "{folder}/sub"), ("has no data file in it",)),
]
