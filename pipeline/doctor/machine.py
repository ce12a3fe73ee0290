"""What is wrong with this machine, its packages or a run, with the evidence and the way to mend it; nothing is changed.

Facts are read from metadata, never by importing torch.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import httpx
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from pipeline import engines
from pipeline.doctor.findings import Examiner, Facts, Finding, Status
from pipeline.engines.vllm.engine import vllm_python
from pipeline.errors import PipelineError
from pipeline.net.client import bearer
from pipeline.net.loopback import holder, listening
from pipeline.operate.services import listing
from pipeline.runs.files import read_json
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest
from pipeline.runs.stages import LOOKING
from pipeline.serve import backends

# GiB: below the first it is a failure, below the second a warning
_DISK, _RAM = (2.0, 10.0), (2.0, 6.0)


def torch_build(facts: Facts) -> Iterator[Finding]:
    """A torch for this machine: CUDA where there is an NVIDIA GPU, CPU elsewhere."""
    version, cuda = facts.packages.versions.get("torch"), facts.packages.cuda.get("torch")
    if version is None:
        yield Finding("torch build", "warn", "torch is not installed: nothing can be trained or exported here", "make setup")
    elif facts.hardware.accelerator == "nvidia" and cuda == "":
        names = ", ".join(g.name for g in facts.hardware.gpus)
        yield Finding(
            "torch build", "fail", f"torch {version} is a CPU build, but there is a GPU ({names})", "make setup DEVICE=cuda"
        )
    elif not facts.hardware.gpus and cuda:
        evidence = f"torch {version} is built for CUDA {cuda}, but there is no GPU: gigabytes unused"
        yield Finding("torch build", "warn", evidence, "make setup DEVICE=cpu")
    else:
        yield Finding("torch build", "ok", f"torch {version}, {f'CUDA {cuda}' if cuda else 'CPU'}")


def torch_companions(facts: Facts) -> Iterator[Finding]:
    """CUDA builds of torchvision and its kin beside a CPU torch break every import of transformers."""
    builds = facts.packages.cuda
    if builds.get("torch") != "":
        return
    # without a label and without a word of its own it comes from the default index, which on Linux means CUDA
    bad = [f"{name} {facts.packages.versions[name]}" for name, cuda in builds.items() if name != "torch" and cuda != ""]
    evidence = f"{', '.join(bad)} (CUDA) beside a CPU torch: importing transformers fails with torchvision::nms"
    failed = Finding("torchvision", "fail", evidence, "pip uninstall -y torchvision torchaudio torchcodec")
    yield failed if bad else Finding("torchvision", "ok", "nothing built for CUDA beside the CPU torch")


def driver(facts: Facts) -> Iterator[Finding]:
    """A driver new enough for torch's CUDA: the same major version at least."""
    wants, has = facts.packages.cuda.get("torch"), facts.hardware.cuda
    if not wants or facts.hardware.accelerator != "nvidia":
        return
    evidence = f"driver {facts.hardware.driver} supports CUDA {has}, torch is built for {wants}"
    if not has:
        unknown = f"the driver's CUDA version is unknown; torch is built for {wants}"
        yield Finding("driver", "warn", unknown, "nvidia-smi shows it")
    elif Version(has).major < Version(wants).major:
        yield Finding("driver", "fail", evidence, f"install a driver for CUDA {wants}, or a torch built for CUDA {has}")
    elif Version(has) < Version(wants):
        yield Finding("driver", "warn", f"{evidence}: works by minor-version compatibility only", "update the driver")
    else:
        yield Finding("driver", "ok", evidence)


def inference_engines(facts: Facts) -> Iterator[Finding]:
    """At least one engine, each in the build this machine wants."""
    if not any(available.usable for available in facts.engines.values()):
        yield Finding("engines", "fail", "no inference engine is installed", "make setup")
    packages = facts.server.versions if facts.server else {}
    for name, available in facts.engines.items():
        check, version = f"engine {name}", available.version or ""
        if not available.usable:
            if not engines.get(name).creates_model:  # one that runs elsewhere may do: looked at by itself
                yield Finding(check, "warn", available.reason, available.remedy)
        elif wrong := engines.get(name).mismatch(facts.hardware, version, packages):
            yield Finding(check, "fail" if wrong.fatal else "warn", f"{name} {version} {wrong.text}", wrong.remedy)
        else:
            yield Finding(check, "ok", f"{name} {version}")


def ollama(facts: Facts) -> Iterator[Finding]:
    """Ollama is a program here, or a server that runs at OLLAMA_BASE_URL or OLLAMA_HOST: in Docker, a desktop app, elsewhere."""
    for engine in filter(lambda engine: engine.creates_model, engines.every()):
        program, (there, seen) = facts.engines.get(engine.name), backends.look(engine, facts.settings)
        wanted = facts.settings.llm_backend == engine.name or bool(facts.settings.named_servers(engine.name))
        if there:
            yield Finding(engine.title, "ok", f"{there.version} answers at {there.url}")
        elif seen.there or wanted:
            yield Finding(engine.title, "fail" if wanted else "warn", seen.reason, seen.remedy)
        elif program and not program.usable:
            yield Finding(f"engine {engine.name}", "warn", f"{program.reason}, and {seen.reason}", program.remedy)


def transformers(facts: Facts) -> Iterator[Finding]:
    """A transformers that what trains and what serves both accept; what a run was saved with is not newer than the server's."""
    server = facts.server or facts.packages
    for where, packages in {"": facts.packages, " of the server": server}.items():
        version = packages.versions.get("transformers")
        if version is None or (where and packages.python == facts.packages.python):
            continue
        for name, need in packages.transformers.items():
            if not SpecifierSet(need).contains(version, prereleases=True):
                evidence = f"transformers {version}{where}, but {name} {packages.versions[name]} needs {need}"
                yield Finding("transformers", "fail", evidence, f"{packages.python} -m pip install 'transformers{need}'")
    saved, served = _saved_with(facts.run), server.versions.get("transformers")
    if saved and served and _newer(saved, served):
        words = f"run {facts.run.name} was saved by transformers {saved}, the server has {served}"
        evidence, remedy = f"{words}: its tokenizer class may not exist there", f"'transformers>={saved}'"
        yield Finding("transformers", "fail", evidence, f"upgrade the server's: {vllm_python()} -m pip install {remedy}")
    else:
        words = f"{served or 'not installed'} in the server's Python{f', run saved by {saved}' if saved else ''}"
        yield Finding("transformers", "ok", words)


def _saved_with(run: RunFolder) -> str | None:
    path = run.merged / "config.json"
    config = read_json(path) if path.is_file() else None
    return str(config["transformers_version"]) if isinstance(config, dict) and "transformers_version" in config else None


def _newer(saved: str, served: str) -> bool:
    with contextlib.suppress(InvalidVersion):
        return Version(saved).major > Version(served).major
    return False


def disk(facts: Facts) -> Iterator[Finding]:
    """Room for a run: merged weights, GGUF and checkpoints of even a small model take gigabytes."""
    free = facts.hardware.disk_free_gib
    remedy = "free some space, or give --output on a larger disk; a model needs about 5 times its 16-bit size"
    yield _room("disk", free, _DISK, f"{free:.1f} GiB free below {facts.run.output}", remedy)


def memory(facts: Facts) -> Iterator[Finding]:
    """RAM that is really available here, container limit applied."""
    free, total = facts.hardware.ram_free_gib, facts.hardware.ram_gib
    remedy = "end other programs (granite-pipeline ps, stop --all), or raise the container's memory limit"
    yield _room("RAM", free, _RAM, f"{free:.1f} of {total:.1f} GiB available", remedy)


def _room(check: str, free: float, bounds: tuple[float, float], evidence: str, remedy: str) -> Finding:
    status: Status = "fail" if free < bounds[0] else "warn" if free < bounds[1] else "ok"
    return Finding(check, status, evidence, "" if status == "ok" else remedy)


def ports(facts: Facts) -> Iterator[Finding]:
    """The documented ports: free, ours, or taken - and by whom."""
    mine, taken = {entry.port: entry for entry in listing(facts.run.output)}, False
    for name in facts.engines:
        port = engines.get(name).default_port
        if port in mine:
            yield Finding("ports", "ok", f"{port}: {mine[port].server.engine} of run {mine[port].run}, {mine[port].state}")
        elif listening("127.0.0.1", port) and not engines.get(name).creates_model:
            taken = True
            who = holder(port) or "by a process this user may not see"
            yield Finding("ports", "warn", f"{port} ({name}) is taken, {who}", "stop it, or serve with --port 0")
    if not taken:
        yield Finding("ports", "ok", "the engines' documented ports are free or ours")


def compiler(facts: Facts) -> Iterator[Finding]:
    """torch.compile on a CPU needs a C++ compiler."""
    if not facts.hardware.compiler and not facts.hardware.gpus:
        evidence = "no C++ compiler: vLLM is planned without compilation, about 15 % slower"
        yield Finding("compiler", "warn", evidence, "apt install g++")


def hub(facts: Facts) -> Iterator[Finding]:
    """A hub model that asks for a token, when there is none; the hub is only asked about a base that is a hub id."""
    base, token = facts.base, facts.token
    if not base or base == "embedded" or Path(base).exists() or base.count("/") != 1:
        return
    url = (facts.environment.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    try:
        path = f"{url}/{base}/resolve/main/config.json"
        code = httpx.head(path, headers=bearer(token), timeout=5, follow_redirects=True).status_code
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        remedy = "go online, set HF_ENDPOINT to a mirror, or give --base a folder"
        yield Finding("hub", "warn", f"{url} cannot be reached ({type(error).__name__})", remedy)
        return
    if code in (401, 403):
        why = "the token may not read it" if token else "and there is no HF_TOKEN"
        remedy = f"accept its terms at {url}/{base}, then set HF_TOKEN in .env"
        yield Finding("hub", "fail", f"{base} is gated or private ({code}), {why}", remedy)
    elif code == 404:
        yield Finding("hub", "fail", f"{base} is not on the hub (or private)", "check the name; private models need HF_TOKEN")
    else:
        yield Finding("hub", "ok", f"{base} can be read")


def run_folder(facts: Facts) -> Iterator[Finding]:
    """The run's files are those its manifest records."""
    run = facts.run
    if not run.manifest.is_file():
        return
    try:
        changed = Manifest(run.manifest).changed()
    except (PipelineError, KeyError, TypeError, AttributeError) as error:
        evidence = f"{run.manifest} cannot be read: {error!r}"[:300]
        yield Finding("run folder", "fail", evidence, "restore it, or train again with --force")
        return
    for stage, relative, what in changed:
        remedy = f"granite-pipeline export --run {run.name} --force" if stage != "finetune" else "train again with --force"
        remedy = f"granite-pipeline verify --run {run.name}" if stage in LOOKING else remedy
        yield Finding("run folder", "fail", f"{run.path / relative} is {what} since {stage} made it", remedy)
    if not changed:
        yield Finding("run folder", "ok", f"every file of run {run.name} is as its manifest says")


MACHINE: tuple[Examiner, ...] = (
    *(torch_build, torch_companions, driver, inference_engines, ollama, transformers),
    *(disk, memory, ports, compiler, hub, run_folder),
)
