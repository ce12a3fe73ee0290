"""Merging on small tensors, against the formula done by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import ModelError, PipelineError
from training.export import weights

pytestmark = pytest.mark.slow


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.make("3.x-dense", tmp_path / "base")


def _adapter(folder: Path, module: str, a: torch.Tensor, b: torch.Tensor, **config: object) -> Path:
    folder.mkdir()
    save_file(
        {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b},
        str(folder / "adapter_model.safetensors"),
    )
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "r": 4, **config}))
    return folder


MODULE = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(("config", "scale"), [({}, 2.0), ({"use_rslora": True}, 4.0)])
def test_one_weight_gains_its_delta_and_the_rest_only_the_cast(
    base: Path, tmp_path: Path, config: dict[str, object], scale: float
) -> None:
    a, b = torch.randn(4, 64), torch.randn(64, 4)
    report = weights.merge_folder(base, _adapter(tmp_path / "adapter", MODULE, a, b, **config), tmp_path / "merged")
    before, after = load_file(str(base / "model.safetensors")), load_file(str(tmp_path / "merged" / "model.safetensors"))
    assert set(before) == set(after)
    assert {tensor.dtype for tensor in after.values()} == {torch.float16}
    name = f"{MODULE}.weight"
    torch.testing.assert_close(after[name].float(), before[name] + scale * b @ a, atol=2e-2, rtol=1e-3)
    assert all(torch.equal(after[n], before[n].half()) for n in before if n != name)
    assert (report["adapted"], report["tokenizer"]["end_token_id"]) == (1, 2)
    config_after = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (config_after["dtype"], config_after["use_cache"]) == ("float16", True)


def test_a_weight_beyond_float16_is_refused_and_the_old_folder_kept(base: Path, tmp_path: Path) -> None:
    adapter = _adapter(tmp_path / "adapter", MODULE, torch.full((4, 64), 100.0), torch.full((64, 4), 100.0))
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "old").touch()
    with pytest.raises(PipelineError, match=rf"{MODULE}.weight holds 80000[.\d]*, which float16 cannot"):
        weights.merge_folder(base, adapter, tmp_path / "merged")
    assert [p.name for p in (tmp_path / "merged").iterdir()] == ["old"]


def test_an_adapter_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = _adapter(tmp_path / "adapter", "model.layers.99.self_attn.q_proj", torch.zeros(4, 64), torch.zeros(64, 4))
    with pytest.raises(ModelError, match=r"changes model\.layers\.99\.self_attn\.q_proj\.weight, which the base does not have"):
        weights.merge_folder(base, adapter, tmp_path / "merged")


def test_underflow_is_counted(base: Path, tmp_path: Path) -> None:
    tensors = load_file(str(base / "model.safetensors"))
    tensors["model.norm.weight"][:3] = 1e-9
    save_file(tensors, str(base / "model.safetensors"), metadata={"format": "pt"})
    report = weights.merge_folder(
        base, _adapter(tmp_path / "a", MODULE, torch.zeros(4, 64), torch.zeros(64, 4)), tmp_path / "merged"
    )
    assert report["underflow_to_zero"] == 3


def test_several_shards_get_an_index(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "SHARD_BYTES", 2**16)
    adapter = _adapter(tmp_path / "a", MODULE, torch.zeros(4, 64), torch.zeros(64, 4))
    weights.merge_folder(base, adapter, tmp_path / "merged")
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"), dtype=torch.float32)
    assert model.config.model_type == "granite"


def test_a_corrupt_shard_is_named(base: Path, tmp_path: Path) -> None:
    adapter = _adapter(tmp_path / "a", MODULE, torch.zeros(4, 64), torch.zeros(64, 4))
    shutil.copy(base / "config.json", base / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        weights.merge_folder(base, adapter, tmp_path / "merged")


def test_what_is_written_is_what_a_whole_sum_and_the_reference_writer_give(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows at a time on several threads, straight into the file: no byte differs from one tensor after the other."""
    monkeypatch.setattr(weights, "_PIECE", 1000)
    a, b = torch.randn(4, 64), torch.randn(64, 4)
    adapter = _adapter(tmp_path / "adapter", MODULE, a, b)
    before = torch.get_num_threads()
    weights.merge_folder(base, adapter, tmp_path / "merged")
    assert torch.get_num_threads() == before
    whole = {name: tensor.half() for name, tensor in weights.merged_weights(base, weights.read_adapter(adapter))}
    save_file(whole, str(tmp_path / "whole.safetensors"), metadata={"format": "pt"})
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_other_types_keep_their_bytes_or_become_float16(base: Path, tmp_path: Path) -> None:
    tensors = load_file(str(base / "model.safetensors"))
    odd = {"model.counts": torch.arange(5), "model.empty": torch.zeros(0), "model.one": torch.tensor(0.1, dtype=torch.float64)}
    half = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items() if "mlp" in name}
    save_file({**tensors, **half, **odd}, str(base / "model.safetensors"), metadata={"format": "pt"})
    adapter = _adapter(tmp_path / "a", MODULE, torch.zeros(4, 64), torch.zeros(64, 4))
    report = weights.merge_folder(base, adapter, tmp_path / "merged")
    after = load_file(str(tmp_path / "merged" / "model.safetensors"))
    assert torch.equal(after["model.counts"], odd["model.counts"])
    assert after["model.one"] == odd["model.one"].half()
    assert all(torch.equal(after[name], tensor.half()) for name, tensor in half.items())
    assert (report["underflow_to_zero"], report["tensors"]) == (0, len(tensors) + 3)


def test_a_nan_is_refused(base: Path, tmp_path: Path) -> None:
    b = torch.zeros(64, 4)
    b[63, 3] = float("nan")
    with pytest.raises(PipelineError, match=rf"{MODULE}.weight holds nan, which float16 cannot"):
        weights.merge_folder(base, _adapter(tmp_path / "a", MODULE, torch.ones(4, 64), b), tmp_path / "merged")
