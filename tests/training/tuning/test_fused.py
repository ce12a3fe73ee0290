"""Layers with their own backward pass: the values and gradients of the plain ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from training.tuning import fused


def _model(variant: str, folder: Path, **lora: Any) -> Any:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "router" not in n and "lm_head" not in n]
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules=names, **lora))
    torch.manual_seed(2)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return model


def _ran(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.arange(200, 248).view(2, 24)
    out = model(input_ids=ids, labels=ids, use_cache=False)
    model.zero_grad()
    out.loss.backward()
    return out.logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("variant", ["3.x-dense", "3.x-moe", "4.0-dense", "4.0-hybrid", "4.1"])
def test_values_and_gradients_are_the_plain_ones(variant: str, tmp_path: Path) -> None:
    base = tiny.make(variant, tmp_path / "base")
    plain, ours = _model(variant, base), _model(variant, base)
    assert fused.fuse(ours) > 0
    (wanted, expected), (logits, gradients) = _ran(plain), _ran(ours)
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
    assert float((gradients - expected).norm() / expected.norm()) <= 1e-5
    with plain.disable_adapter(), ours.disable_adapter(), torch.no_grad():
        ids = torch.arange(300, 320)[None]
        torch.testing.assert_close(ours(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*lora_bias=True")
@pytest.mark.parametrize("lora", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_what_is_no_plain_lora_stays_as_it_is(lora: dict[str, Any], tmp_path: Path) -> None:
    base = tiny.make("3.x-dense", tmp_path / "base")
    lora = {**lora, "bias": "none"}
    assert fused.fuse(_model("3.x-dense", base, **lora)) == 0


def test_under_autocast_it_computes_in_the_weights_type_or_leaves_it_to_peft(tmp_path: Path) -> None:
    base = tiny.make("3.x-dense", tmp_path / "base")
    plain, ours = _model("3.x-dense", base), _model("3.x-dense", base)
    fused.fuse(ours)
    ids = torch.arange(200, 224)[None]
    for model in (plain, ours):
        model.eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        # float32 weights: PEFT's own way, bit by bit but for the norms' one rounding
        torch.testing.assert_close(ours(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=3e-2, atol=3e-2)
    for model in (plain, ours):
        for name, weight in model.named_parameters():
            if "lora" not in name:
                weight.data = weight.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(ours(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=5e-2, atol=5e-2)
