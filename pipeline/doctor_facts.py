"""What ``doctor`` looks at, and how it says what it found."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pipeline import engines, installed
from pipeline.config import Settings, load
from pipeline.engines.base import Availability
from pipeline.engines.vllm import vllm_python
from pipeline.errors import PipelineError
from pipeline.hardware import Hardware
from pipeline.installed import Installed
from pipeline.manifest import Manifest
from pipeline.runs import DEFAULT_NAME, DEFAULT_OUTPUT, RunFolder

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One thing looked at: what was seen, and what to do about it when it is not all right."""

    check: str
    status: Status
    evidence: str
    remedy: str = ""

    def to_json(self) -> dict[str, str]:
        """For ``doctor --json``."""
        return asdict(self)


@dataclass(frozen=True)
class Facts:
    """What the checks look at."""

    hardware: Hardware
    packages: Installed
    server: Installed | None
    engines: dict[str, Availability]
    settings: Settings
    run: RunFolder
    base: str | None = None
    token: bool = False
    environment: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def gather(run: RunFolder | None = None, base: str | None = None) -> Facts:
        """Look at this machine; ``base`` is a hub id about to be trained, else the run's own."""
        folder = run or RunFolder(DEFAULT_NAME, DEFAULT_OUTPUT)
        settings = load()
        home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
        token = bool(settings.hf_token.get_secret_value() or os.environ.get("HF_TOKEN")) or (home / "token").is_file()
        return Facts(
            hardware=Hardware.detect(folder.output),
            packages=installed.here(),
            server=installed.of(vllm_python()),
            engines={name: engines.get(name).available() for name in engines.NAMES if name != "openai"},
            settings=settings,
            run=folder,
            base=base or _base_of(folder),
            token=token,
            environment=dict(os.environ),
        )


def _base_of(run: RunFolder) -> str | None:
    try:
        return str(Manifest(run.manifest).stage("finetune")["inputs"]["base"]["id"])
    except (PipelineError, KeyError, TypeError, ValueError, OSError):
        return None
