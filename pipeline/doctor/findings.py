"""What ``doctor`` looks at, gathered once; how it says what it found; how its examiners are asked."""

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from pipeline import engines
from pipeline.config import ENV_FILE, Settings, load
from pipeline.engines.base import Availability
from pipeline.engines.vllm.engine import vllm_python
from pipeline.errors import PipelineError
from pipeline.machine import packages as installed
from pipeline.machine.hardware import Hardware
from pipeline.machine.packages import Installed
from pipeline.runs.folder import RunFolder, user_caches
from pipeline.runs.manifest import Manifest
from pipeline.runs.text import mask
from pipeline.serve import records
from pipeline.serve.server import Server

Status = Literal["fail", "warn", "ok"]


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
    """What the examiners look at: the machine, this Python's packages and the server's, the settings, one run."""

    hardware: Hardware
    packages: Installed
    server: Installed | None
    engines: dict[str, Availability]
    settings: Settings
    run: RunFolder
    base: str | None = None
    token: str = field(default="", repr=False)
    environment: dict[str, str] = field(default_factory=dict)
    env_file: Path = ENV_FILE

    @staticmethod
    def gather(run: RunFolder, base: str | None = None) -> "Facts":
        """Look at this machine; ``base`` is a hub id about to be trained, else the run's own."""
        settings = load()
        return Facts(
            hardware=Hardware.detect(run.output),
            packages=installed.here(),
            server=installed.of(vllm_python()),
            engines={engine.name: engine.available() for engine in engines.every() if engine.serves != "url"},
            settings=settings,
            run=run,
            base=base or _base_of(run),
            token=hub_token(settings),
            environment=dict(os.environ),
        )

    @cached_property
    def servers(self) -> list[Server]:
        """The run's living servers; InputError for a damaged record."""
        return records.running(self.run.servers) if self.run.path.is_dir() else []


Examiner = Callable[[Facts], Iterable[Finding]]


def examine(facts: Facts, examiners: Sequence[Examiner]) -> list[Finding]:
    """What the examiners find, in order; of one that raises, what it met: a fault of ours is a warning, a damaged file is not."""
    found: list[Finding] = []
    for examiner in examiners:
        name = examiner.__name__.replace("_", " ")
        try:
            found.extend(examiner(facts))
        except PipelineError as error:
            found.append(Finding(name, "fail", error.message, error.remedy or "mend what is named there"))
        except Exception as error:
            words = mask(f"this check could not be made: {error!r}")[:300]
            found.append(Finding(name, "warn", words, "please report it"))
    return found


def worst_first(found: Iterable[Finding]) -> list[Finding]:
    """Failures, then warnings, then what is all right."""
    return sorted(found, key=lambda finding: ("fail", "warn", "ok").index(finding.status))


def hub_token(settings: Settings) -> str:
    """The token that the hub's client would send: HF_TOKEN, else that of the command line's login; "" when there is none."""
    home = Path(os.environ.get("HF_HOME") or user_caches() / "huggingface")
    saved = Path(os.environ.get("HF_TOKEN_PATH") or home / "token")
    with contextlib.suppress(OSError, ValueError):
        return settings.hf_token.get_secret_value() or saved.read_text(encoding="utf-8").strip()
    return ""


def _base_of(run: RunFolder) -> str | None:
    with contextlib.suppress(PipelineError, TypeError, ValueError, OSError):
        return training.base.id if (training := Manifest(run.manifest).training) else None
    return None
