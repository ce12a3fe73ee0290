"""What a certificate is about: one run's files with their hashes as they are now, its base, and the rows it learnt from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.runs.folder import RunFolder
from pipeline.runs.hashes import sha256_tree
from pipeline.runs.manifest import Manifest


@dataclass(frozen=True)
class Data:
    """The dataset as it is now: hash of each file, and held-out prompts that are also training rows (file:line)."""

    sha256: Mapping[str, str]
    leaked: tuple[str, ...] = ()
    train_rows: int = 0


@dataclass(frozen=True)
class Subject:
    """A run and what it was made from; ``missing`` says in words what could not be had here (base, data)."""

    run: RunFolder
    manifest: Manifest
    base: Path | None
    base_sha256: str | None
    data: Data | None
    missing: Mapping[str, str]
    sha256: Mapping[str, str]

    @property
    def full(self) -> bool:
        """True after full fine-tuning: ``adapter/`` is then a whole model."""
        return bool(self.stage("finetune").get("inputs", {}).get("parameters", {}).get("method") == "full")

    @property
    def cut_short(self) -> bool:
        """True for a training that was limited on purpose (steps, rows, less than one epoch): a try-out or a test."""
        asked = self.stage("finetune").get("inputs", {}).get("parameters", {})
        return asked.get("max_steps") is not None or asked.get("max_rows") is not None or asked.get("epochs", 1) < 1

    def stage(self, name: str) -> dict[str, Any]:
        """A stage's record in the manifest."""
        return self.manifest.stage(name)


def training_inputs(manifest: Manifest) -> dict[str, Any]:
    """What the recorded training was given; InputError when there is no whole record of one."""
    run, inputs = manifest.path.parent.name, manifest.stage("finetune").get("inputs")
    if not isinstance(inputs, dict) or not {"parameters", "base", "data"} <= set(inputs):
        raise InputError(f"run {run} has no manifest of a training", remedy=f"granite-pipeline run --name {run}")
    return inputs


def hashes(run: RunFolder) -> dict[str, str]:
    """SHA-256 of every artefact of a run that is there, by its path in the run folder."""
    parts = [run.adapter, run.heldout, run.merged, run.gguf, run.modelfile, run.reference("base"), run.reference("tuned")]
    return {path.relative_to(run.path).as_posix(): sha256_tree(path) for path in parts if path.exists()}
