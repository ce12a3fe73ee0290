"""What a certificate is about: one run's files with their hashes as they are now, its base, and the rows it learnt from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.runs.folder import RunFolder
from pipeline.runs.hashes import sha256_tree
from pipeline.runs.manifest import Manifest, TrainingRecord


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
    def training(self) -> TrainingRecord:
        """What the fine-tune recorded; InputError when it never finished."""
        return self.manifest.require_training()


def hashes(run: RunFolder) -> dict[str, str]:
    """SHA-256 of every artefact of a run that is there, by its path in the run folder."""
    parts = [run.adapter, run.heldout, run.merged, run.gguf, run.modelfile, run.reference("base"), run.reference("tuned")]
    return {path.relative_to(run.path).as_posix(): sha256_tree(path) for path in parts if path.exists()}
