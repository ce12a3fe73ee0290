"""The export's memory: the merged FP16 model plus 2 GiB at most, however it is measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from training.base import resolve

pytestmark = pytest.mark.slow
# resident memory of the largest process of the export, KiB, measured by a parent that runs nothing else
MEASURE = """
import resource, subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
EXPORT = """
from pathlib import Path
from training.export.weights import merge_folder
from training.export.gguf import convert
base, adapter, out = map(Path, {paths!r})
merge_folder(base, adapter, out / "merged")
convert(out / "merged", out / "model.gguf", name="m")
"""


def test_peak_memory_stays_near_one_copy_of_the_model(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    base = resolve("embedded", tmp_path / ".base").folder
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    module = "base_model.model.model.layers.0.mlp.up_proj"
    halves = {f"{module}.lora_A.weight": torch.randn(4, 576), f"{module}.lora_B.weight": torch.randn(1536, 4)}
    save_file(halves, str(adapter / "adapter_model.safetensors"))
    (adapter / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4, "r": 4}))
    code = EXPORT.format(paths=[str(base), str(adapter), str(tmp_path)])
    done = subprocess.run([sys.executable, "-c", MEASURE, code], capture_output=True, text=True, timeout=300, check=True)
    peak = int(done.stdout.split()[-1]) * 1024
    model = (tmp_path / "merged" / "model.safetensors").stat().st_size
    assert peak <= model + 2 * 2**30, f"{peak / 2**30:.2f} GiB for a model of {model / 2**30:.2f} GiB"
