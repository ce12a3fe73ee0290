"""The run folder: where each artefact of one named run lives."""

import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import InputError

DEFAULT_OUTPUT = Path("training/output")
DEFAULT_NAME = "generic"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Part:
    """A path below the run folder, by what is joined to it."""

    def __init__(self, *parts: str) -> None:
        self.parts = parts

    def __get__(self, run: "RunFolder", owner: "type[RunFolder]") -> Path:
        return run.path.joinpath(*self.parts)


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run below ``output``; the name is one path component of letters, digits, '.', '_' and '-'."""

    name: str = DEFAULT_NAME
    output: Path = DEFAULT_OUTPUT

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            remedy = "use 1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit"
            raise InputError(f"run name {self.name!r} is not usable", remedy=remedy)

    @property
    def path(self) -> Path:
        """The folder itself."""
        return self.output / self.name

    adapter = Part("adapter")  # LoRA adapter (or, after full fine-tuning, the whole model) as training saved it
    merged = Part("merged_fp16")  # Merged float16 model folder: safetensors, config, tokenizer, chat template
    gguf = Part("unsloth.Q8_0.gguf")  # Q8_0 GGUF made from the merged weights
    modelfile = Part("Modelfile")  # Ollama Modelfile
    manifest = Part("manifest.json")  # The run's record: inputs, parameters, hashes, metrics, launches
    notebooks = Part("notebooks")  # Executed notebook copies
    report = Part("report")  # report.html, report.json, junit.xml
    report_file = Part("report", "report.json")  # The report as other programs read it
    evidence = Part("report", "evidence.json")  # What each backend said in the last verification
    logs = Part("logs")  # One log per server start
    checkpoints = Part("checkpoints")  # Trainer checkpoints, kept until training ends
    heldout = Part("heldout.jsonl")  # Held-out conversations, control tokens neutralised, one JSON object a line
    certificate = Part("certificate")  # certificate.json, its JUnit file, and the evidence it was judged on
    certificate_file = Part("certificate", "certificate.json")  # The certificate itself
    servers = Part("servers")  # Records of the servers that were started for this run
    probes = Part("reference", "probes.json")  # In-process next-token distributions at some positions, for the certificate

    def reference(self, which: str) -> Path:
        """In-process answers of ``base`` or ``tuned`` to the held-out prompts."""
        return self.path / "reference" / f"{which}.jsonl"

    @property
    def base_cache(self) -> Path:
        """Where the embedded base is built, beside the runs that share it."""
        return self.output / ".base"

    def require_inside(self) -> None:
        """Raise InputError when the run folder, or what is in it under a name of ours, is a link to somewhere else."""
        ours = dict.fromkeys(part.parts[0] for part in vars(RunFolder).values() if isinstance(part, Part))
        for path in (self.path, *(self.path / name for name in ours)):
            if path.is_symlink():
                remedy = "a run is written only below the output folder: move it there, or link the whole --output folder"
                raise InputError(f"{path} is a symbolic link (to {path.readlink()})", remedy=remedy)
