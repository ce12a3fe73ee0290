"""Every Granite architecture through train -> merge -> GGUF -> load -> generate, with tiny random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from pipeline.modelfile.grammar import parse_modelfile
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest
from training.export import gguf, merge
from training.parameters import FinetuneParameters
from training.tuning.finetune import finetune

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    answers = ('{"severity":"low"}', '{"severity":"high"}')
    path.write_text("".join(json.dumps({"prompt": f"alert number {i}", "completion": answers[i % 2]}) + "\n" for i in range(30)))
    return path


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=() if v in ("4.0-hybrid-moe", "4.1") else pytest.mark.wide) for v in tiny.VARIANTS]
)
def test_the_line_from_random_weights_to_a_gguf_that_generates(variant: str, rows: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    base = tiny.make(variant, tmp_path / "base")
    run = RunFolder("tiny", tmp_path / "output")
    params = FinetuneParameters(base=str(base), data=str(rows), max_steps=3, batch_size=4, learning_rate=1e-2)
    trained = finetune(run, params)
    assert trained.result["eval_loss"]["after"] < trained.result["eval_loss"]["before"]
    merged = merge.merge(run)
    assert merged.result["adapted"] > 0
    model = AutoModelForCausalLM.from_pretrained(str(run.merged), dtype=torch.float32)
    assert torch.isfinite(model(torch.tensor([[1, 2, 3, 4]])).logits).all()
    converted = gguf.export_gguf(run)
    assert converted.result["probe_tokens"] == 8
    gguf.package(run)
    assert parse_modelfile(run.modelfile.read_text()).source == "./unsloth.Q8_0.gguf"
    assert set(Manifest(run.manifest).data["stages"]) == {"finetune", "merge", "gguf", "modelfile"}
    assert [merge.merge(run).skipped, gguf.export_gguf(run).skipped, finetune(run, params).skipped] == [True] * 3
