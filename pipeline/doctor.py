"""What is wrong with this machine, its packages or a run, with the evidence and the way to mend it; nothing is changed.

Every check is a function from :class:`Facts` to findings; facts are read from metadata, never by importing torch. A check that
cannot be made says so as a warning: the doctor itself does not fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import httpx

from pipeline import engines, processes
from pipeline.doctor_facts import Facts, Finding, Status, made
from pipeline.doctor_packages import (
    driver,
    inference_engines,
    ollama_reachable,
    torch_build,
    torch_companions,
    transformers_window,
)
from pipeline.errors import PipelineError
from pipeline.manifest import Manifest
from pipeline.ports import holder, listening

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
    mine = {entry.port: entry for entry in processes.listing(facts.run.output)}
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
        yield Finding("run folder", "fail", f"{facts.run.path / relative} is {what} since {stage} made it", remedy)
    if not changed:
        yield Finding("run folder", "ok", f"every file of run {facts.run.name} is as its manifest says")


CHECKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    torch_build, torch_companions, driver, inference_engines, ollama_reachable, transformers_window,
    disk, memory, ports, compiler, gated_model, run_folder,
)  # fmt: skip
