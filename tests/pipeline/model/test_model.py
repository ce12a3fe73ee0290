import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import InputError, ModelError
from pipeline.model.model import Model
from pipeline.model.shape import SHAPES, Experts, Mamba, Shape, shape_from_config

_CONFIG: dict[str, Any] = {
    "architectures": ["GraniteForCausalLM"], "model_type": "granite", "hidden_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 3, "intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 512,
}  # fmt: skip
_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": "auto",
    "mamba_expand": 2,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
}


def _folder(folder: Path, config: dict[str, Any], elements: int = 1000, dtype: str = "F16") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    size = elements * {"F16": 2, "F32": 4, "I32": 4}[dtype]
    header = json.dumps({"w": {"dtype": dtype, "shape": [elements], "data_offsets": [0, size]}}).encode()
    with (folder / "model.safetensors").open("wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        out.truncate(8 + len(header) + size)
    return folder


def test_a_dense_folder(tmp_path: Path) -> None:
    model = Model.open(_folder(tmp_path / "m", _CONFIG))
    assert model == Model(
        "m", Shape("granite", 3, 64, 4, 2, 16, 128, 100, 512), "safetensors", "float16", 2000, 1000,
        path=tmp_path / "m", class_name="GraniteForCausalLM", has_chat_template=False,
    )  # fmt: skip


def test_hybrid_is_decided_by_layer_types_not_by_mamba_keys() -> None:
    dense = {**_CONFIG, "model_type": "granitemoehybrid", "shared_intermediate_size": 96, "num_local_experts": 0, **_MAMBA}
    for attention in ("attention", "full_attention"):
        shape = shape_from_config({**dense, "layer_types": [attention] * 3}, Path("x"))
        assert (shape.hybrid, shape.attention_layers, shape.intermediate) == (False, 3, 96)
    for mamba, attention in (("mamba", "attention"), ("linear_attention", "full_attention")):
        shape = shape_from_config({**dense, "layer_types": [mamba, attention, mamba]}, Path("x"))
        assert (shape.attention_layers, shape.mamba) == (1, Mamba(2, 4, 32, 16, 1, 4))


def test_experts() -> None:
    moe = {
        **_CONFIG,
        "model_type": "granitemoeshared",
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
    }
    shape = shape_from_config(moe, Path("x"))
    assert (shape.architecture, shape.intermediate, shape.experts) == ("granitemoe", 0, Experts(8, 2, 128, 32))


@pytest.mark.parametrize("missing", ["hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings"])
def test_a_config_that_is_no_decoder_is_refused(tmp_path: Path, missing: str) -> None:
    config = {key: value for key, value in _CONFIG.items() if key != missing}
    with pytest.raises(ModelError) as caught:
        Model.from_folder(_folder(tmp_path / "m", config))
    assert missing in caught.value.message


def test_folders_and_files_that_are_no_model(tmp_path: Path) -> None:
    for path, words in [
        (tmp_path / "absent", "no such model"),
        (tmp_path, "has no config.json"),
        (tmp_path / "absent.gguf", "no such GGUF"),
    ]:
        with pytest.raises(ModelError) as caught:
            Model.open(path)
        assert words in caught.value.message
    (tmp_path / "config.json").write_text(json.dumps(_CONFIG))
    with pytest.raises(ModelError) as caught:
        Model.open(tmp_path)
    assert "no *.safetensors" in caught.value.message


def test_quantised_checkpoints_keep_their_size(tmp_path: Path) -> None:
    config = {**_CONFIG, "quantization_config": {"quant_method": "awq", "bits": 4}}
    model = Model.from_folder(_folder(tmp_path / "m", config, dtype="I32"))
    assert model.quantization == "awq"
    assert model.weights_gib("bfloat16") == 4000 / 2**30
    assert model.parameters == model.shape.parameters


def test_chat_template_is_found_in_either_place(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "m", _CONFIG)
    (folder / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    assert Model.open(folder).has_chat_template
    (folder / "tokenizer_config.json").write_text("{}")
    assert not Model.open(folder).has_chat_template
    (folder / "chat_template.jinja").write_text("x")
    assert Model.open(folder).has_chat_template


@pytest.mark.parametrize("name", ["granite-4.1-8b", "ibm-granite/granite-4.1-8b", "granite-4.1-8b-base"])
def test_shapes_by_the_names_people_write(name: str) -> None:
    assert Model.from_shape(name).name == "granite-4.1-8b"


def test_an_unknown_shape_lists_the_known_ones() -> None:
    with pytest.raises(InputError) as caught:
        Model.from_shape("granite-9")
    assert all(name in caught.value.remedy for name in SHAPES)


# GiB of weights (bf16, fp8, bitsandbytes 4-bit, Q8_0), KV KiB per bf16 token, mamba MiB per request with and without prefix caching
_PUBLISHED: dict[str, tuple[float | None, ...]] = {
    "granite-3.1-2b": (4.72, 2.45, 1.46, 2.5, 80, None),
    "granite-3.1-8b": (15.22, 7.80, 4.55, 8.1, 160, None),
    "granite-3.1-1b-a400m": (2.49, None, None, None, 48, None),
    "granite-3.1-3b-a800m": (6.14, None, None, None, 64, None),
    "granite-4.0-350m": (0.66, 0.42, 0.32, 0.35, 28, None),
    "granite-4.0-1b": (3.04, 1.71, 1.13, 1.61, 80, None),
    "granite-4.0-micro": (6.34, 3.41, 2.13, 3.37, 80, None),
    "granite-4.0-h-350m": (0.63, 0.39, 0.28, 0.34, 4, 11),
    "granite-4.0-h-1b": (2.72, 1.50, 0.97, 1.45, 8, 28),
    "granite-4.0-h-micro": (5.94, 3.16, 1.95, 3.16, 8, 37),
    "granite-4.0-h-tiny": (12.92, 6.61, 3.84, 6.87, 8, 28),
    "granite-4.0-h-small": (59.99, 30.4, 17.4, 31.9, 16, 74),
    "granite-4.1-3b": (6.34, 3.41, 2.13, 3.37, 80, None),
    "granite-4.1-8b": (15.61, 8.19, 4.94, 8.29, 160, None),
    "granite-4.1-30b": (53.8, 27.3, 15.7, 28.6, 256, None),
}


@pytest.mark.parametrize("name", _PUBLISHED)
def test_predicted_sizes_are_within_three_percent_of_the_published_ones(name: str) -> None:
    model = Model.from_shape(name)
    predicted = (
        model.weights_gib("bfloat16"),
        model.weights_gib("bfloat16", "fp8"),
        model.weights_gib("bfloat16", "bitsandbytes"),
        model.q8_0_gib(),
        model.shape.kv_bytes_per_token() / 1024,
        model.shape.mamba_bytes_per_request() / 2**20,
    )
    for ours, published in zip(predicted, _PUBLISHED[name], strict=True):
        assert published is None or ours == pytest.approx(published, rel=0.03)


def _config_of(shape: Shape, class_name: str) -> dict[str, Any]:
    """The transformers settings of a shape."""
    settings: dict[str, Any] = {
        "vocab_size": shape.vocab, "hidden_size": shape.hidden, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "tie_word_embeddings": True,
        "intermediate_size": shape.intermediate, "max_position_embeddings": shape.max_positions,
    }  # fmt: skip
    if shape.experts:
        e = shape.experts
        settings |= {"num_local_experts": e.count, "num_experts_per_tok": e.active, "intermediate_size": e.width}
    if class_name == "GraniteMoeHybrid":
        settings |= {"shared_intermediate_size": shape.experts.shared if shape.experts else shape.intermediate}
        settings |= {"num_local_experts": 0} if not shape.experts else {}
        settings["layer_types"] = ["attention"] * shape.attention_layers
    if shape.mamba:
        m = shape.mamba
        settings["layer_types"] += ["mamba"] * m.layers
        settings |= {"mamba_n_heads": m.heads, "mamba_d_head": m.head_dim, "mamba_d_state": m.state, "mamba_n_groups": m.groups}
    return settings


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SHAPES if "3.0" not in name and "3.2" not in name])
def test_parameters_equal_those_of_the_transformers_model(name: str, tmp_path: Path) -> None:
    import torch
    import transformers

    model = Model.from_shape(name)
    class_name = model.class_name.removesuffix("ForCausalLM")
    config = getattr(transformers, f"{class_name}Config")(**_config_of(model.shape, class_name))
    with torch.device("meta"):
        real = getattr(transformers, model.class_name)(config)
    assert model.parameters == sum(p.numel() for p in real.parameters())
    config.save_pretrained(tmp_path)
    read = shape_from_config(json.loads((tmp_path / "config.json").read_text()), tmp_path)
    # the 4.0 dense models are of the hybrid class; their GGUF architecture is granite
    assert replace(read, architecture=model.shape.architecture) == model.shape


def test_a_gguf_of_a_hybrid_tells_mamba_layers_by_their_missing_kv_heads(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    import numpy

    writer = gguf.GGUFWriter(tmp_path / "h.gguf", "granitehybrid")
    writer.add_block_count(3)
    writer.add_context_length(1048576)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv([0, 2, 0])
    writer.add_vocab_size(100)
    writer.add_expert_count(8)
    writer.add_expert_used_count(2)
    writer.add_expert_shared_feed_forward_length(48)
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_state_size(16)
    writer.add_ssm_group_count(1)
    writer.add_ssm_inner_size(128)
    writer.add_ssm_time_step_rank(4)
    writer.add_chat_template("x")
    writer.add_tensor("w", numpy.zeros((10, 34 * 4), "uint8"), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("norm", numpy.zeros(64, "float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = Model.open(tmp_path / "h.gguf")
    assert model.shape == Shape(
        "granitehybrid", 1, 64, 4, 2, 16, 0, 100, 1048576, Mamba(2, 4, 32, 16, 1, 4), Experts(8, 2, 32, 48)
    )
    assert (model.quantization, model.weight_bytes, model.has_chat_template) == ("Q8_0", 10 * 136 + 256, True)
