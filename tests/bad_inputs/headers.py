"""GGUF and safetensors files that were cut, overwritten or made to hurt the reader."""

from __future__ import annotations

import json
import struct
from typing import Any

from bad_inputs.case import Case
from bad_inputs.models import CONFIG

_Q = struct.Struct("<Q").pack
_I = struct.Struct("<I").pack


def text(value: bytes) -> bytes:
    """A GGUF string."""
    return _Q(len(value)) + value


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    """A GGUF metadata pair."""
    return text(key) + _I(kind) + value


def gguf(*pairs: bytes, tensors: bytes = b"", count: int = 0, version: int = 3, said: int | None = None) -> bytes:
    """A GGUF file; ``said`` is the number of pairs that the header claims."""
    said = len(pairs) if said is None else said
    return b"GGUF" + struct.pack("<IQQ", version, count, said) + b"".join(pairs) + tensors


ARCHITECTURE = pair(b"general.architecture", 8, text(b"granite"))
_WIDTHS = [pair(b"granite." + key, 4, _I(value)) for key, value in (
    (b"attention.head_count", 4), (b"embedding_length", 64), (b"feed_forward_length", 128), (b"context_length", 512),
)]  # fmt: skip
_TENSOR = text(b"w") + _I(1) + _Q(32) + _I(0) + _Q(0)

_GGUF: list[tuple[str, bytes, tuple[str, ...]]] = [
    ("empty", b"", ("does not start with the letters GGUF",)),
    ("another format", b"PK\x03\x04" * 10, ("does not start with the letters GGUF",)),
    ("cut after the letters", b"GGUF", ("cut short",)),
    ("cut in the counts", b"GGUF" + b"\x03\0\0\0\1", ("cut short",)),
    ("version 1", gguf(version=1), ("version 1 is not 2 or 3",)),
    ("version of the other byte order", b"GGUF\0\0\0\3" + b"\0" * 16, ("version 50331648",)),
    ("2^63 metadata pairs", gguf(ARCHITECTURE, said=2**63), ("9223372036854775808 metadata pairs",)),
    ("2^40 tensors", gguf(ARCHITECTURE, count=2**40), ("1099511627776 tensors",)),
    ("a key of 2^60 bytes", b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + _Q(2**60) + b"x" * 64, ("a string of 1152921504606846976",)),
    ("a value of an unknown type", gguf(pair(b"k", 99, b"\0" * 40)), ("unknown value type 99",)),
    ("an array of an unknown type", gguf(pair(b"k", 9, _I(77) + _Q(10**6) + b"\0" * 64)), ("unknown value type 77",)),
    ("an array of 2^61 numbers", gguf(pair(b"k", 9, _I(4) + _Q(2**61) + b"\0" * 64), ARCHITECTURE), ("not a whole GGUF",)),
    ("an array of 2^50 strings", gguf(pair(b"k", 9, _I(8) + _Q(2**50) + _Q(2**62) * 8)), ("not a whole GGUF",)),
    ("arrays in arrays", gguf(pair(b"k", 9, (_I(9) + _Q(1)) * 200)), ("arrays nested more than 8 deep",)),
    ("no architecture", gguf(pair(b"k", 4, _I(1))), ("general.architecture is missing",)),
    ("alignment 0", gguf(ARCHITECTURE, pair(b"general.alignment", 4, _I(0))), ("general.alignment is 0",)),
    ("alignment as text", gguf(ARCHITECTURE, pair(b"general.alignment", 8, text(b"32"))), ("general.alignment is '32'",)),
    ("a tensor of 99 axes", gguf(ARCHITECTURE, tensors=text(b"w") + _I(99) + b"\0" * 90, count=1), ("99 axes",)),
    ("a tensor of an unknown type", gguf(ARCHITECTURE, tensors=_TENSOR[:-12] + _I(250) + _Q(0), count=1), ("unknown type 250",)),
    ("tensors beyond the end", gguf(ARCHITECTURE, tensors=_TENSOR, count=1), ("the tensors need",)),
    ("a shape of 2^60 x 2^60", gguf(ARCHITECTURE, tensors=text(b"w") + _I(2) + _Q(2**60) * 2 + _I(0) + _Q(0), count=1), ("need",)),
    ("no widths", gguf(ARCHITECTURE), ("does not describe a decoder model",)),
    ("4 billion layers", gguf(ARCHITECTURE, pair(b"granite.block_count", 4, _I(2**32 - 1)), *_WIDTHS), ("does not describe",)),
    ("100 million layers", gguf(ARCHITECTURE, pair(b"granite.block_count", 4, _I(10**8)), *_WIDTHS), ("100000000 layers",)),
    ("layers as text", gguf(ARCHITECTURE, pair(b"granite.block_count", 8, text(b"four")), *_WIDTHS), ("block_count is 'four'",)),
]  # fmt: skip


def tensor(shape: list[Any], offsets: list[Any], dtype: str = "F32") -> dict[str, Any]:
    """One entry of a safetensors header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def safetensors(header: Any, data: int = 16) -> bytes:
    """A safetensors file with this header (an object or raw bytes) and so many bytes of data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return _Q(len(raw)) + raw + b"\0" * data


_SAFETENSORS: list[tuple[str, bytes, tuple[str, ...]]] = [
    ("empty", b"", ("header length 0",)),
    ("cut in the length", b"\x10\0\0", ("header length 0",)),
    ("a header of 2^63 bytes", _Q(2**63) + b"{}", ("header length 9223372036854775808",)),
    ("a header longer than the file", _Q(1000) + b"{}", ("header length 1000",)),
    ("a pickle", b"\x80\x04\x95" + b"\0" * 60, ("not a whole safetensors file",)),
    ("a header that is no JSON", safetensors(b"{broken}"), ("not JSON",)),
    ("a header that is a list", safetensors([1, 2]), ("malformed",)),
    ("a header nested 50,000 deep", safetensors(b"[" * 50_000 + b"]" * 50_000), ("not JSON",)),
    ("an entry that is text", safetensors({"w": "x"}), ("malformed",)),
    ("no offsets", safetensors({"w": {"dtype": "F32", "shape": [4]}}), ("malformed", "data_offsets")),
    ("offsets turned round", safetensors({"w": tensor([4], [16, 0])}), ("data ends before it begins",)),
    ("offsets below 0", safetensors({"w": tensor([4], [-16, 0])}), ("not whole numbers",)),
    ("offsets with a point", safetensors({"w": tensor([4], [0, 16.0])}), ("not whole numbers",)),
    ("three offsets", safetensors({"w": tensor([4], [0, 8, 16])}), ("malformed",)),
    ("a shape below 0", safetensors({"w": tensor([-4], [0, 16])}), ("not whole numbers",)),
    ("a shape of text", safetensors({"w": tensor(["4"], [0, 16])}), ("not whole numbers",)),
    ("a shape that does not fit its bytes", safetensors({"w": tensor([5], [0, 16])}), ("does not take 16 bytes",)),
    ("two tensors in the same bytes", safetensors({"v": tensor([4], [0, 16]), "w": tensor([4], [0, 16])}), ("share the bytes",)),
    ("data cut short", safetensors({"w": tensor([4], [0, 16])}, data=3), ("the tensors need",)),
]  # fmt: skip

_FOLDER = ("plan", "--engine", "vllm", "--model", "{folder}")
_FILE = ("plan", "--engine", "llamacpp", "--gguf", "{folder}/m.gguf")
CASES = [Case(f"gguf: {name}", {"m.gguf": data}, _FILE, words, "ModelError") for name, data, words in _GGUF]
CASES += [
    Case(f"safetensors: {name}", {"config.json": CONFIG, "model.safetensors": data}, _FOLDER, words, "ModelError")
    for name, data, words in _SAFETENSORS
]
_TEXT_CONTEXT = (pair(b"tokenizer.chat_template", 8, text(b"{{ messages }}")), pair(b"granite.context_length", 8, text(b"many")))
CASES += [
    Case(
        "gguf: a context length as text",
        {"m.gguf": gguf(ARCHITECTURE, *_TEXT_CONTEXT)},
        ("modelfile", "--gguf", "{folder}/m.gguf"),
        ("context_length", "'many'"),
        "ModelError",
    )
]
_INDEX: list[tuple[str, bytes, str, str]] = [
    ("no JSON", b"{", "index.json:1: not valid JSON", "InputError"),
    ("without a weight_map", b"{}", "weight_map is missing", "ModelError"),
    ("a weight_map of numbers", b'{"weight_map": {"w": 1}}', "weight_map is missing or no table", "ModelError"),
    ("a shard outside the folder", b'{"weight_map": {"w": "../../etc/passwd"}}', "not a file of this folder", "ModelError"),
    ("a shard that is not there", b'{"weight_map": {"w": "model-2.safetensors"}}', "lacks 1 of 1 weight shards", "ModelError"),
]
CASES += [
    Case(f"safetensors index: {n}", {"config.json": CONFIG, "model.safetensors.index.json": d}, _FOLDER, (words,), kind)
    for n, d, words, kind in _INDEX
]
