import json
import struct
from pathlib import Path

import pytest

from pipeline.errors import ModelError
from pipeline.model.safetensors import TensorInfo, read_folder, read_header

_ENTRY = {"a": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}, "__metadata__": {"format": "pt"}}


def _write(path: Path, header: object, data: int = 12) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"\0" * data)
    return path


def test_tensors_of_a_file(tmp_path: Path) -> None:
    assert read_header(_write(tmp_path / "x.safetensors", _ENTRY)) == [TensorInfo("a", "F16", (2, 3), 12)]


def test_elements() -> None:
    assert TensorInfo("a", "F16", (2, 3), 12).elements == 6


def test_it_agrees_with_the_safetensors_package(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    safetensors = pytest.importorskip("safetensors.numpy")
    safetensors.save_file({"w": numpy.zeros((4, 5), "float32"), "b": numpy.zeros(3, "float16")}, tmp_path / "m.safetensors")
    assert sorted(read_header(tmp_path / "m.safetensors"), key=lambda t: t.name) == [
        TensorInfo("b", "F16", (3,), 6),
        TensorInfo("w", "F32", (4, 5), 80),
    ]


@pytest.mark.parametrize(
    ("header", "data", "why"),
    [
        (_ENTRY, 11, "the tensors need"),
        (b"{", 0, "does not fit a file"),
        (b"nope", 12, "not JSON"),
        ({"a": {"dtype": "F16"}}, 12, "malformed"),
        ({"a": []}, 12, "malformed"),
        ({"a": {"dtype": "F16", "shape": [1], "data_offsets": [12, 0]}}, 12, "malformed"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, header: object, data: int, why: str) -> None:
    with pytest.raises(ModelError) as caught:
        read_header(_write(tmp_path / "x.safetensors", header, data))
    assert why in caught.value.message


@pytest.mark.parametrize("raw", [b"", b"1234567", struct.pack("<Q", 2**63) + b"{}"])
def test_files_without_a_header_are_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(raw)
    with pytest.raises(ModelError):
        read_header(tmp_path / "x.safetensors")


def test_shards_come_from_the_index_and_a_missing_one_is_named(tmp_path: Path) -> None:
    _write(tmp_path / "model-1.safetensors", _ENTRY)
    _write(tmp_path / "stray.safetensors", _ENTRY)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert [t.name for t in read_folder(tmp_path)] == ["a"]
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    with pytest.raises(ModelError) as caught:
        read_folder(tmp_path)
    assert "model-2.safetensors" in caught.value.message
