from pathlib import Path

import pytest

from pipeline.errors import ModelError
from pipeline.model.gguf import GgufComparison, GgufTensor, compare_gguf, read_gguf_header

gguf = pytest.importorskip("gguf")
numpy = pytest.importorskip("numpy")


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "granite")
    writer.add_block_count(2)
    writer.add_array("granite.attention.head_count_kv", [2, 0])
    writer.add_float32("granite.scale", 0.5)
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    writer.add_token_list([f"t{i}" for i in range(5000)])
    writer.add_token_types([1] * 5000)
    writer.add_tensor("a", numpy.zeros((3, 64), "float32"))
    writer.add_tensor("q", numpy.zeros((2, 34 * 2), "uint8"), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_and_tensors(written: Path) -> None:
    header = read_gguf_header(written)
    assert header.architecture == "granite"
    assert header.get("block_count") == 2
    assert header.get("attention.head_count_kv") == [2, 0]
    assert header.get("absent", 7) == 7
    assert header.metadata["tokenizer.ggml.add_bos_token"] is False
    assert header.metadata["granite.scale"] == 0.5
    assert header.tensors == (GgufTensor("a", "F32", (64, 3), 768), GgufTensor("q", "Q8_0", (64, 2), 136))


def test_long_arrays_are_kept_as_their_length(written: Path) -> None:
    header = read_gguf_header(written)
    assert header.metadata["tokenizer.ggml.tokens"] == 5000
    assert header.metadata["tokenizer.ggml.token_type"] == 5000


def test_every_prefix_of_a_file_is_refused(written: Path, tmp_path: Path) -> None:
    whole = written.read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [*range(0, 300, 7), 50_000, len(whole) - 64]:
        cut.write_bytes(whole[:size])
        with pytest.raises(ModelError):
            read_gguf_header(cut)


def test_tensor_types_agree_with_the_gguf_package() -> None:
    from pipeline.model.gguf import _TYPES

    for number, (name, block, size) in _TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, *gguf.GGML_QUANT_SIZES[kind]) == (name, block, size)


def test_a_file_that_is_something_else(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" + b"\0" * 100)
    with pytest.raises(ModelError) as caught:
        read_gguf_header(tmp_path / "x.gguf")
    assert "does not start with" in caught.value.message


def test_absurd_lengths_do_not_fill_the_memory(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 8 + b"\xff" * 8 + b"\xff" * 64)
    with pytest.raises(ModelError):
        read_gguf_header(tmp_path / "x.gguf")


def _rewritten(path: Path, *, weight: float = 0.0, context: int | None = None) -> Path:
    """The same content in another order, as a quantiser's copy has it, with changes."""
    writer = gguf.GGUFWriter(path, "granite")
    writer.add_token_types([1] * 5000)
    writer.add_token_list([f"t{i}" for i in range(5000)])
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    writer.add_float32("granite.scale", 0.5)
    writer.add_array("granite.attention.head_count_kv", [2, 0])
    writer.add_block_count(2)
    if context:
        writer.add_context_length(context)
    writer.add_tensor("q", numpy.zeros((2, 34 * 2), "uint8"), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    values = numpy.zeros((3, 64), "float32")
    values[-1, -1] = weight
    writer.add_tensor("a", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_copy_in_another_order_holds_the_same(written: Path, tmp_path: Path) -> None:
    copy = _rewritten(tmp_path / "copy.gguf")
    assert copy.read_bytes() != written.read_bytes()
    values = len(read_gguf_header(written).metadata)
    assert compare_gguf(written, copy) == GgufComparison((2, 2), (values, values))


def test_one_weight_or_value_that_differs_is_named(written: Path, tmp_path: Path) -> None:
    found = compare_gguf(written, _rewritten(tmp_path / "copy.gguf", weight=1.0, context=512))
    assert found.tensors == (1, 2)
    assert found.problems == ("1 tensors differ, first a", "1 values are new, first granite.context_length")
    assert compare_gguf(tmp_path / "copy.gguf", written).problems[1] == "1 values differ, first granite.context_length"
