"""A finished run in miniature: real manifest, artefacts of a few bytes."""

from __future__ import annotations

from pipeline.manifest import Manifest
from pipeline.runs import RunFolder


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
