import json
import struct
from pathlib import Path

import pytest

from pipeline.errors import ModelError
from pipeline.model.safetensors import TensorFolder, TensorInfo, read_folder, read_header, weight_files

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


def test_an_index_counts_before_an_old_single_file_and_every_reader_agrees(tmp_path: Path) -> None:
    _write(tmp_path / "model-1.safetensors", _ENTRY)
    _write(tmp_path / "model.safetensors", {"old": _ENTRY["a"]})
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert weight_files(tmp_path) == [tmp_path / "model-1.safetensors"]
    assert [t.name for t in read_folder(tmp_path)] == TensorFolder(tmp_path).names == ["a"]


def test_no_file_beside_model_safetensors_counts(tmp_path: Path) -> None:
    assert weight_files(tmp_path) == []
    _write(tmp_path / "consolidated.safetensors", {"c": _ENTRY["a"]})
    _write(tmp_path / "model.safetensors", _ENTRY)
    assert [t.name for t in read_folder(tmp_path)] == TensorFolder(tmp_path).names == ["a"]


@pytest.mark.parametrize("name", ["pytorch.safetensors", "consolidated.safetensors", "model-00001-of-00002.safetensors"])
def test_a_file_of_another_name_is_refused_with_the_names_that_count(name: str, tmp_path: Path) -> None:
    _write(tmp_path / name, _ENTRY)
    for read in (weight_files, read_folder, TensorFolder):
        with pytest.raises(ModelError, match=f"has {name}, but neither model.safetensors nor") as caught:
            read(tmp_path)
        assert "model.safetensors.index.json" in caught.value.remedy


def test_a_tensor_that_two_shards_hold_is_refused(tmp_path: Path) -> None:
    for number in (1, 2):
        _write(tmp_path / f"model-{number}.safetensors", _ENTRY)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"both hold a"):
        read_folder(tmp_path)
