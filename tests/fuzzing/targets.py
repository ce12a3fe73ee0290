"""What is fuzzed: each target takes generated input and may only succeed or raise an error of ours."""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from bad_inputs import datasets, headers, models
from hypothesis import strategies as st

from pipeline import config
from pipeline.errors import InputError, PipelineError
from pipeline.model.gguf import read_gguf_header
from pipeline.model.model import Model
from pipeline.model.safetensors import read_header
from pipeline.modelfile.grammar import parse_modelfile, quoted
from training.datasets.dataset import read

_FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-"))


def _file(name: str, data: bytes) -> Path:
    path = _FOLDER / name
    path.write_bytes(data)
    return path


# -- strategies -------------------------------------------------------------------------------------------------------

_words = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "role", "content", "from", "value", "messages",
                          "conversations", "prompt", "completion", "instruction", "output", "input", "tools", "tool_calls",
                          "function", "name", "arguments", "{}", "[]", "\u2028", "\x85", "\0", "\ud800", "<|end_of_text|>", ""])  # fmt: skip
_texts = _words | st.text(max_size=20)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_texts, inner, max_size=4),
    max_leaves=12,
)
_turns = st.lists(st.fixed_dictionaries({}, optional={"role": _json, "content": _json, "from": _json, "value": _json, "tool_calls": _json}), max_size=5)  # fmt: skip
_rows = st.fixed_dictionaries(
    {}, optional={"messages": _turns | _json, "conversations": _turns | _json, "prompt": _json, "completion": _json,
                  "instruction": _json, "output": _json, "input": _json, "tools": _json, "system": _json, "x": _json},
)  # fmt: skip


@st.composite
def _mutated(draw: Any, seeds: list[bytes]) -> bytes:
    """A valid file with some of its bytes changed, removed, repeated or inserted."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, len(data)))
        action = draw(st.integers(0, 4))
        if action == 0:
            data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
        elif action == 1:
            del data[at : at + draw(st.integers(1, 40))]
        elif action == 2:
            data[at:at] = draw(st.binary(max_size=16))
        elif action == 3:
            data[at : at + 8] = struct.pack("<Q", draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1])))
        else:
            data[at:at] = data[at : at + draw(st.integers(1, 64))]
    return bytes(data)


def _lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


_dataset_bytes = st.one_of(
    st.lists(_rows, max_size=4).map(_lines),
    st.lists(_rows, max_size=4).map(lambda rows: json.dumps(rows).encode()),
    _mutated([datasets.GOOD * 3, b"[" + datasets.GOOD.strip() + b"]", b"prompt,completion\na,b\n\"c\nd\",e\n"]),
    st.binary(max_size=200),
)  # fmt: skip
_tensors = st.fixed_dictionaries({"dtype": _json, "shape": _json, "data_offsets": _json})
_header = st.dictionaries(_texts, _tensors | _json, max_size=4).map(lambda h: headers.safetensors(json.dumps(h).encode()))
_good_gguf = headers.gguf(
    headers.ARCHITECTURE, headers.pair(b"granite.block_count", 4, struct.pack("<I", 4)), *headers._WIDTHS,
    headers.pair(b"tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 3) + headers.text(b"a") + headers.text(b"b") + headers.text(b"c")),
    headers.pair(b"granite.attention.head_count_kv", 9, struct.pack("<IQ", 4, 4) + struct.pack("<4I", 0, 2, 0, 2)),
    headers.pair(b"general.alignment", 4, struct.pack("<I", 32)),
)  # fmt: skip
_value = st.text(max_size=40) | st.text(alphabet='" \t\n\r\\#x"', max_size=30)
_modelfile_text = st.lists(
    st.tuples(st.sampled_from(["FROM", "SYSTEM", "PARAMETER stop", "PARAMETER num_ctx", "TEMPLATE", "MESSAGE user", "LICENSE", "#", "", "FORM"]),
              st.sampled_from([" ", "\t", "", '"""', " \""]), _value, st.sampled_from(["\n", "\r\n", "", '"""\n', '"\n'])),
    max_size=6,
).map(lambda parts: "".join("".join(part) for part in parts))  # fmt: skip
_env_line = st.tuples(
    st.sampled_from(["LLM_BACKEND", "VLLM_MAX_MODEL_LEN", "HF_TOKEN", "VLLM_GPU_MEMORY_UTIL", "export X", "A B", "", "#", "\ufeffX"]),
    st.sampled_from(["=", " = ", "", "==", ": "]), st.text(max_size=15) | st.sampled_from(['"a', "'a b'", "${HF_TOKEN}", "1", "vllm", "\0"]),
).map("".join)  # fmt: skip
_env_bytes = st.lists(_env_line, max_size=5).map(lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass")) | st.binary(
    max_size=60
)


# -- targets ----------------------------------------------------------------------------------------------------------


def dataset(data: bytes, suffix: str) -> None:
    """Rows or refusals with a line that is in the file; every row ends with an answer."""
    path = _file(f"d{suffix}", data)
    with suppress(PipelineError):
        found = read(path)
        for row in found.rows:
            assert row.messages[-1]["role"] == "assistant"
            json.dumps(row.messages).encode()
        lines = data.count(b"\n") + data.count(b"\r") + 2
        for refusal in found.refused:
            assert 1 <= int(refusal.where.rpartition(":")[2]) <= lines
            refusal.reason.encode()


def modelfile_reader(text: str) -> None:
    """Commands, or an InputError with a line."""
    with suppress(InputError):
        assert parse_modelfile(text).source is not None


def modelfile_writer(value: str) -> None:
    """What is written is read back unchanged, or refused."""
    with suppress(InputError):
        written = quoted(value, "SYSTEM")
        assert parse_modelfile(f"FROM x\nSYSTEM {written}\nPARAMETER num_ctx 1\n").commands == (
            ("from", "x"), ("system", value), ("parameter num_ctx", "1"),
        )  # fmt: skip


def env(data: bytes) -> None:
    """Settings, or an InputError."""
    with suppress(InputError):
        path = _file("env", data)
        config.load(path)
        config.resolved(path)


def gguf(data: bytes) -> None:
    """A header and a shape, or a ModelError; the reader never takes more than the file holds."""
    path = _file("m.gguf", data)
    with suppress(PipelineError):
        assert len(read_gguf_header(path).tensors) <= len(data)
        assert Model.from_gguf(path).parameters > 0


def safetensors(data: bytes) -> None:
    """Tensors inside the file, or a ModelError."""
    with suppress(PipelineError):
        assert sum(tensor.nbytes for tensor in read_header(_file("m.safetensors", data))) <= len(data)


Target = tuple[Callable[..., None], tuple[st.SearchStrategy[Any], ...]]
TARGETS: dict[str, Target] = {
    "dataset": (dataset, (_dataset_bytes, st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet"]))),
    "modelfile_reader": (modelfile_reader, (_modelfile_text | st.text(max_size=80),)),
    "modelfile_writer": (modelfile_writer, (_value,)),
    "env": (env, (_env_bytes,)),
    "gguf": (gguf, (_mutated([_good_gguf]) | st.binary(max_size=100).map(lambda b: b"GGUF" + b),)),
    "safetensors": (safetensors, (_header | _mutated([models.WEIGHTS]) | st.binary(max_size=80),)),
}


def run(name: str, examples: int, seed: int) -> None:
    """Run one target with so many generated inputs; hypothesis reports the smallest input that breaks it."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import seed as seeded

    function, strategies = TARGETS[name]
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    chosen = settings(max_examples=examples, deadline=None, database=None, suppress_health_check=checks, print_blob=True)
    seeded(seed)(chosen(given(st.tuples(*strategies))(lambda values: function(*values))))()
