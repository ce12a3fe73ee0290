"""An adapter given as the base: trained on is the sum of it and its own base, or nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import InputError, ModelError
from pipeline.runs.folder import RunFolder
from training import base
from training.parameters import FinetuneParameters
from training.tuning.finetune import finetune

MODULE = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def below(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make("3.x-dense", tmp_path_factory.mktemp("below") / "base")


def _adapter(folder: Path, below: str | Path, **config: Any) -> Path:
    folder.mkdir(parents=True)
    torch.manual_seed(3)
    halves = {f"base_model.model.{MODULE}.lora_{half}.weight": torch.randn(shape) for half, shape in (("A", (4, 64)), ("B", (64, 4)))}  # fmt: skip
    save_file(halves, str(folder / "adapter_model.safetensors"))
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(below), "revision": None, "r": 4, "lora_alpha": 8}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **config}))
    return folder


def test_the_sum_is_made_once_and_is_the_base(below: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapter, cache = _adapter(tmp_path / "adapter", below), tmp_path / ".base"
    with caplog.at_level("INFO"):
        found = base.resolve(str(adapter), cache)
    assert f"{adapter} is an adapter; it is merged onto {below}" in caplog.text
    assert (found.id, found.revision) == (str(adapter), None)
    assert found.note == "adapter merged onto base, whose licence holds"
    summed, before = load_file(str(found.folder / "model.safetensors")), load_file(str(below / "model.safetensors"))
    halves = load_file(str(adapter / "adapter_model.safetensors"))
    delta = 2 * halves[f"base_model.model.{MODULE}.lora_B.weight"] @ halves[f"base_model.model.{MODULE}.lora_A.weight"]
    torch.testing.assert_close(summed[f"{MODULE}.weight"].float(), before[f"{MODULE}.weight"] + delta, atol=2e-2, rtol=1e-3)
    made = (found.folder / "model.safetensors").stat()
    assert base.resolve(str(adapter), cache) == found
    assert (found.folder / "model.safetensors").stat() == made


@pytest.mark.parametrize(
    ("config", "shown"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save="),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern="),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"r": 0}, "r=0"),
    ],
)
def test_an_adapter_that_is_more_than_lora_is_refused(below: Path, tmp_path: Path, config: dict[str, Any], shown: str) -> None:
    adapter = _adapter(tmp_path / "adapter", below, **config)
    with pytest.raises(ModelError) as caught:
        base.resolve(str(adapter), tmp_path / ".base")
    assert f"trained on {below}, and it cannot be merged onto it: it has {shown}" in caught.value.message
    assert caught.value.remedy.startswith(f"train on {below}, or merge the adapter first")


def test_the_base_that_is_not_to_be_had_is_named_with_its_revision(tmp_path: Path) -> None:
    adapter = _adapter(tmp_path / "adapter", tmp_path / "gone", revision="abc")
    with pytest.raises(
        ModelError, match=r"holds only an adapter, trained on .*/gone at revision abc, which cannot be had"
    ) as caught:
        base.resolve(str(adapter), tmp_path / ".base")
    assert f"train on {tmp_path / 'gone'}" in caught.value.remedy


def test_an_adapter_that_names_no_base_or_another_adapter_is_refused(tmp_path: Path) -> None:
    nameless = _adapter(tmp_path / "nameless", "")
    with pytest.raises(ModelError, match="names no base_model_name_or_path"):
        base.resolve(str(nameless), tmp_path / ".base")
    with pytest.raises(ModelError, match="it is an adapter too"):
        base.resolve(str(_adapter(tmp_path / "second", nameless)), tmp_path / ".base")


def test_an_adapter_of_a_wider_base_is_refused(below: Path, tmp_path: Path) -> None:
    adapter = _adapter(tmp_path / "adapter", below)
    halves = {f"base_model.model.{MODULE}.lora_{half}.weight": torch.randn(s) for half, s in (("A", (4, 128)), ("B", (64, 4)))}
    save_file(halves, str(adapter / "adapter_model.safetensors"))
    with pytest.raises(ModelError, match=r"its model\.layers\.1\.self_attn\.q_proj\.weight is 64 x 128, the base's is 64 x 64"):
        base.resolve(str(adapter), tmp_path / ".base")


def test_a_run_is_not_trained_on_its_own_adapter(below: Path, run: RunFolder, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "alert {i}", "completion": "ok"}}\n' for i in range(40)))
    _adapter(run.adapter, below)
    with pytest.raises(InputError, match="lies in run test itself"):
        finetune(run, FinetuneParameters(base=str(run.adapter), data=str(rows)))


def test_an_adapter_trained_on_linked_shards_is_merged_onto_them(below: Path, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(below, tmp_path / "shards"))
    new = tiny.put_shards_beside(shards)
    links = base.resolve(str(shards), tmp_path / ".base").folder
    assert links != shards
    found = base.resolve(str(_adapter(tmp_path / "adapter", links)), tmp_path / ".base")
    norm = "model.norm.weight"
    assert torch.equal(load_file(str(found.folder / "model.safetensors"))[norm], new[norm].half())
    with pytest.raises(ModelError, match="is a symbolic link to a place outside"):
        base.resolve(str(links), tmp_path / "another")
