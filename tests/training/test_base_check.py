"""What cannot be trained on is refused before training, with the way out; what can is never refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import ModelError
from training import base, base_check

Tensors = dict[str, torch.Tensor]
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}
_CT = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}
LINEAR = "model.layers.1.mlp.down_proj.weight"


def _config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _weights(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(str(folder / "model.safetensors"))
    change(tensors)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def _resolve(folder: Path) -> base.BaseModel:
    return base.resolve(str(folder), folder.parent / ".base")


@pytest.mark.slow
@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_no_architecture_is_refused(variant: str, tmp_path: Path) -> None:
    found = _resolve(tiny.make(variant, tmp_path / "base"))
    assert found.folder == tmp_path / "base"
    base_check.require_whole(found.folder)


@pytest.mark.slow
def test_the_embedded_base_is_not_refused(tmp_path: Path) -> None:
    base_check.require_whole(base.resolve("embedded", tmp_path).folder)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, r"gptq, 4 bits \(quantization_config"),
        (_AWQ, "awq, 4 bits"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes, 4 bits"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, r"fp8 \("),
        (_CT, "compressed-tensors pack-quantized"),
        ({"something": "new"}, "an unnamed method"),
    ],
)
def test_a_quantised_base_is_refused_by_its_method(folder: Path, settings: dict[str, Any], said: str) -> None:
    _config(folder, quantization_config=settings)
    with pytest.raises(ModelError, match=rf"is quantised: {said}") as caught:
        _resolve(folder)
    assert "use the 16-bit model it was made from" in caught.value.remedy


def test_older_places_that_say_quantised_are_looked_at_too(folder: Path) -> None:
    (folder / "quantize_config.json").write_text('{"bits": 4}')
    with pytest.raises(ModelError, match=r"is quantised: GPTQ \(quantize_config.json\)"):
        _resolve(folder)
    (folder / "quantize_config.json").unlink()
    _config(folder, compression_config=_CT)
    with pytest.raises(ModelError, match=r"compression_config in config\.json"):
        _resolve(folder)


@pytest.mark.parametrize("card", ["base_model: ibm-granite/granite-4.0-1b", "base_model:\n- ibm-granite/granite-4.0-1b", None])
def test_the_16_bit_model_is_named_where_the_folder_tells(folder: Path, card: str | None) -> None:
    _config(folder, quantization_config=_AWQ, **({} if card else {"_name_or_path": "ibm-granite/granite-4.0-1b"}))
    if card:
        (folder / "README.md").write_text(f"---\nlicense: apache-2.0\n{card}\n---\n# Model\n")
    with pytest.raises(ModelError) as caught:
        _resolve(folder)
    assert "seems to be ibm-granite/granite-4.0-1b" in caught.value.remedy


def test_the_16_bit_model_is_told_from_a_hub_id(folder: Path) -> None:
    _config(folder, quantization_config=_AWQ)
    with pytest.raises(ModelError) as caught:
        base_check.require_unquantized(folder, "someone/granite-4.0-1b-AWQ-INT4")
    assert "seems to be someone/granite-4.0-1b;" in caught.value.remedy


def _gptq(tensors: Tensors) -> None:
    out, width = tensors.pop(LINEAR).shape
    stem = LINEAR.removesuffix(".weight")
    tensors[f"{stem}.qweight"] = torch.zeros(width // 8, out, dtype=torch.int32)
    tensors[f"{stem}.qzeros"] = torch.zeros(1, out // 8, dtype=torch.int32)
    tensors[f"{stem}.scales"] = torch.ones(1, out, dtype=torch.float16)


def _bnb(tensors: Tensors) -> None:
    count = tensors[LINEAR].numel()
    tensors[LINEAR] = torch.zeros(count // 2, 1, dtype=torch.uint8)
    tensors[f"{LINEAR}.absmax"] = torch.ones(count // 64)
    tensors[f"{LINEAR}.quant_map"] = torch.zeros(16)


def _fp8(tensors: Tensors) -> None:
    tensors[LINEAR] = tensors[LINEAR].to(torch.float8_e4m3fn)


@pytest.mark.parametrize("pack", [_gptq, _bnb, _fp8])
def test_packed_weights_are_seen_without_any_setting(folder: Path, pack: Callable[[Tensors], None]) -> None:
    _weights(folder, pack)
    with pytest.raises(ModelError, match=r"is quantised: packed weights \(model.layers.1.mlp.down_proj"):
        base_check.require_whole(_resolve(folder).folder)


def _missing(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith("model.layers.3.")]:
        del tensors[name]


def _head_without_a_place(tensors: Tensors) -> None:
    tensors["model.layers.4.input_layernorm.weight"] = torch.ones(64)


@pytest.mark.parametrize(
    ("change", "config", "said"),
    [
        (_missing, {}, r"9 missing; first missing: model\.layers\.3\.input_layernorm\.weight, .*, .*"),
        (_head_without_a_place, {}, r"1 unexpected; first unexpected: model\.layers\.4\.input_layernorm\.weight"),
        (_missing, {"num_hidden_layers": 2}, r"9 unexpected; first unexpected: model\.layers\.2\."),
        (dict, {"tie_word_embeddings": False}, r"1 missing; first missing: lm_head\.weight"),
        (dict, {"intermediate_size": 256}, r"12 of another shape; first of another shape: .*\[64, 128\] instead of \[64, 256\]"),
    ],
)
def test_weights_that_the_config_does_not_describe_are_named(
    folder: Path, change: Callable[[Tensors], object], config: dict[str, Any], said: str
) -> None:
    _weights(folder, change)
    _config(folder, **config)
    with pytest.raises(ModelError, match=f"not those that config.json describes: {said}"):
        base_check.require_whole(_resolve(folder).folder)


@pytest.mark.parametrize("config", [{"model_type": "nosuch"}, {"model_type": "vit"}, {"hidden_size": "wide"}])
def test_a_config_of_no_language_model_is_one_clear_line(folder: Path, config: dict[str, Any]) -> None:
    _config(folder, **config)
    with pytest.raises(ModelError, match="describes no language model that can be built") as caught:
        base_check.require_whole(folder)
    assert "\n" not in caught.value.message


def test_a_tied_head_may_be_there_or_not(folder: Path) -> None:
    _weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    base_check.require_whole(folder)
    _weights(folder, lambda t: t["lm_head.weight"].add_(0.1))
    with pytest.raises(ModelError, match=r"ties lm_head\.weight to the embedding, but the two differ"):
        base_check.require_whole(folder)
    _config(folder, tie_word_embeddings=False)
    base_check.require_whole(folder)


def test_token_ids_without_an_embedding_are_refused(folder: Path) -> None:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 49152, "content": "<|new|>"})
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(
        ModelError, match=r"1 tokens of tokenizer.json have no embedding, the last is '<\|new\|>' = 49152 of 49152"
    ):
        base_check.require_whole(folder)


def test_a_vocabulary_size_that_is_not_the_embedding_s_is_refused(folder: Path) -> None:
    _config(folder, vocab_size=50000)
    with pytest.raises(ModelError, match="vocab_size 50000, the embedding has 49152 rows"):
        base_check.require_whole(folder)


def test_a_gguf_alone_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.Q8_0.gguf")
    with pytest.raises(ModelError, match=r"holds model.Q8_0.gguf only"):
        _resolve(folder)


def test_an_adapter_left_in_the_folder_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    save_file({"x": torch.zeros(1)}, str(folder / "adapter_model.safetensors"))
    with pytest.raises(ModelError, match="has an adapter in it") as caught:
        _resolve(folder)
    assert caught.value.remedy.startswith("move adapter_config.json and adapter_model.safetensors to a folder")


def test_a_file_under_another_name_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    with pytest.raises(ModelError, match=r"has consolidated\.safetensors, but neither model\.safetensors"):
        _resolve(folder)


def test_an_index_that_names_the_single_file_among_others_is_refused(folder: Path) -> None:
    save_file({"b": torch.zeros(1)}, str(folder / "model-2.safetensors"))
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"names model\.safetensors as one shard of 2"):
        _resolve(folder)


def test_an_old_single_file_beside_an_index_is_not_what_is_handed_on(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny.put_shards_beside(folder)
    found = _resolve(folder)
    assert found.folder.parent == folder.parent / ".base"
    assert "model.safetensors beside model.safetensors.index.json: the index counts" in caplog.text
    assert not (found.folder / "model.safetensors").exists()
    assert (found.folder / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    base_check.require_whole(found.folder)
    # what does not count does not change the base, and is not needed for it
    (folder / "model.safetensors").unlink()
    again = _resolve(folder)
    assert (again.folder, again.sha256) == (folder, found.sha256)


@pytest.mark.parametrize("quantised", [True, False])
def test_a_quantised_hub_model_is_refused_before_its_weights_are_fetched(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantised: bool
) -> None:
    snapshot = tmp_path / "hub" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    asked: list[str | None] = []

    def fetch(_: str, *, revision: str | None, allow_patterns: list[str], **others: object) -> str:
        asked.append(revision)
        for path in (path for pattern in allow_patterns for path in folder.glob(pattern)):
            shutil.copy(path, snapshot)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    if not quantised:
        found = base.resolve("owner/tiny", tmp_path / ".base", "main")
        assert (found.folder, found.revision, asked) == (snapshot, "abc", ["main", "abc"])
        return
    _config(folder, quantization_config=_AWQ)
    with pytest.raises(ModelError, match="base model owner/tiny-AWQ is quantised: awq, 4 bits") as caught:
        base.resolve("owner/tiny-AWQ", tmp_path / ".base")
    assert "seems to be owner/tiny;" in caught.value.remedy
    assert not (snapshot / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # bitsandbytes' own
def test_a_checkpoint_that_bitsandbytes_wrote_is_refused_with_and_without_its_setting(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(str(folder), quantization_config=nf4).save_pretrained(str(tmp_path / "bnb"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(folder / name, tmp_path / "bnb")
    with pytest.raises(ModelError, match="is quantised: bitsandbytes, 4 bits"):
        _resolve(tmp_path / "bnb")
    _config(tmp_path / "bnb", quantization_config=None)
    with pytest.raises(ModelError, match="is quantised: packed weights"):
        base_check.require_whole(_resolve(tmp_path / "bnb").folder)
