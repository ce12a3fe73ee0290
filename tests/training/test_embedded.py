"""The embedded base: what its package's GGUF holds, as a Granite model that works."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.runs.hashes import sha256_tree
from training import embedded

QUESTION = (
    "<|start_of_role|>user<|end_of_role|>What is the capital of France?<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"
)


@pytest.mark.slow
def test_the_embedded_base_answers_and_is_made_the_same_each_time(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("first", "second"):
        embedded.build(tmp_path / name)
    assert sha256_tree(tmp_path / "first") == sha256_tree(tmp_path / "second")
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "first"), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "first"))
    assert type(model).__name__ == "GraniteForCausalLM"
    ids = tokenizer(QUESTION, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0][ids.shape[1] :])
