"""The run folder: where each artefact of one named run lives."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import InputError

DEFAULT_OUTPUT = Path("training/output")
DEFAULT_NAME = "generic"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run below ``output``; the name is one path component of letters, digits, '.', '_' and '-'."""

    name: str = DEFAULT_NAME
    output: Path = DEFAULT_OUTPUT

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InputError(
                f"run name {self.name!r} is not usable",
                remedy="use 1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit",
            )

    @property
    def path(self) -> Path:
        """The folder itself."""
        return self.output / self.name

    def require_inside(self) -> None:
        """Raise InputError when the run folder, or what is in it under a name of ours, is a link to somewhere else."""
        parts = (self.adapter, self.merged, self.gguf, self.modelfile, self.manifest, self.report, self.logs)
        more = (self.checkpoints, self.heldout, self.notebooks, self.certificate)
        for path in (self.path, *parts, *more, self.path / "reference", self.servers):
            if path.is_symlink():
                raise InputError(
                    f"{path} is a symbolic link (to {path.readlink()})",
                    remedy="a run is written only below the output folder: move it there, or link the whole --output folder",
                )

    @property
    def adapter(self) -> Path:
        """LoRA adapter (or, after full fine-tuning, the whole model) as training saved it."""
        return self.path / "adapter"

    @property
    def merged(self) -> Path:
        """Merged float16 model folder: safetensors, config, tokenizer, chat template."""
        return self.path / "merged_fp16"

    @property
    def gguf(self) -> Path:
        """Q8_0 GGUF made from the merged weights."""
        return self.path / "unsloth.Q8_0.gguf"

    @property
    def modelfile(self) -> Path:
        """Ollama Modelfile."""
        return self.path / "Modelfile"

    @property
    def manifest(self) -> Path:
        """The run's record: inputs, parameters, hashes, metrics, launches."""
        return self.path / "manifest.json"

    @property
    def notebooks(self) -> Path:
        """Executed notebook copies."""
        return self.path / "notebooks"

    @property
    def report(self) -> Path:
        """report.html, report.json, junit.xml."""
        return self.path / "report"

    @property
    def logs(self) -> Path:
        """One log per server start."""
        return self.path / "logs"

    @property
    def checkpoints(self) -> Path:
        """Trainer checkpoints, kept until training ends."""
        return self.path / "checkpoints"

    @property
    def heldout(self) -> Path:
        """Held-out conversations, control tokens neutralised, one JSON object a line."""
        return self.path / "heldout.jsonl"

    @property
    def certificate(self) -> Path:
        """certificate.json, its JUnit file, and the evidence it was judged on."""
        return self.path / "certificate"

    @property
    def certificate_file(self) -> Path:
        """The certificate itself."""
        return self.certificate / "certificate.json"

    @property
    def servers(self) -> Path:
        """Records of the servers that were started for this run."""
        return self.path / "servers"

    @property
    def base_cache(self) -> Path:
        """Where the embedded base is built, beside the runs that share it."""
        return self.output / ".base"

    @property
    def report_file(self) -> Path:
        """The report as other programs read it."""
        return self.report / "report.json"

    @property
    def evidence(self) -> Path:
        """What each backend said in the last verification."""
        return self.report / "evidence.json"

    @property
    def probes(self) -> Path:
        """In-process next-token distributions at some positions, for the certificate."""
        return self.path / "reference" / "probes.json"

    def reference(self, which: str) -> Path:
        """In-process answers of ``base`` or ``tuned`` to the held-out prompts."""
        return self.path / "reference" / f"{which}.jsonl"
