"""A small real run: a tiny Granite model trained, merged, converted, packaged and evaluated in seconds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import tamper
import tiny

from pipeline.runs.folder import RunFolder
from training.export import evaluate, gguf, merge
from training.parameters import FinetuneParameters
from training.tuning.finetune import finetune

ANSWERS = ('{"severity":"low","verdict":"benign"}', '{"severity":"high","verdict":"malicious"}')


def rows(path: Path, numbers: range) -> Path:
    lines = [{"prompt": f"alert number {i}", "completion": ANSWERS[i % 2]} for i in numbers]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def make(folder: Path, *, seed: int = 7, variant: str = "3.x-dense", steps: int = 30) -> RunFolder:
    """The whole export of one training; its base and data lie beside the output folder."""
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / "base"
    if not base.exists():
        tiny.make(variant, base)
        # sharper logits than a tiny model has by itself: distributions of two trainings are then as far apart as real ones
        # and heads of 32, the same weights, because vLLM's CPU attention has no kernel for 16
        wanted = {"logits_scaling": 0.5, "num_attention_heads": 2, "num_key_value_heads": 1}
        tamper.change_json(base / "config.json", lambda config: config.update(wanted))
    run = RunFolder(f"tiny{seed}", folder / "output")
    train, held_out = rows(folder / "train.jsonl", range(40)), rows(folder / "held_out.jsonl", range(100, 112))
    params = FinetuneParameters(base=str(base), data=str(train), eval_data=str(held_out), trainer="hf", max_steps=steps, learning_rate=1e-2, seed=seed)  # fmt: skip
    finetune(run, params)
    for stage in (merge.merge, gguf.export_gguf, gguf.package, evaluate.evaluate):
        stage(run)
    return run


def copy(made: RunFolder, folder: Path) -> RunFolder:
    """A copy with its base and data, free to be spoilt."""
    shutil.copytree(made.output.parent, folder)
    copied = RunFolder(made.name, folder / "output")
    copied.manifest.write_text(copied.manifest.read_text().replace(str(made.output.parent), str(folder)))
    tamper.reseal(copied)
    return copied
