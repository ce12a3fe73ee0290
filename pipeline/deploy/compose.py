"""``docker-compose.yml`` and its GPU overlay, made from plans, with the documented variables in their places.

Keys are read from ``.env``, never written.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from pipeline import engines
from pipeline.config import Settings
from pipeline.deploy.container import contained
from pipeline.engines.base import Container, Engine
from pipeline.machine.hardware import Hardware
from pipeline.model.model import Model
from pipeline.net.chat import SAMPLING
from pipeline.planning.plan import Request
from pipeline.runs.folder import RunFolder

# what docker calls the containers of these files by
PROJECT = "granite"
_RUN = "/app/training/output/${RUN:-generic}"
_RUNS = "./training/output:/app/training/output:ro"
_GPUS = {"resources": {"reservations": {"devices": [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]}}}
_GUARDED = {"restart": "unless-stopped", "security_opt": ["no-new-privileges:true"]}
_SERVICE = """\
FROM python:3.11.14-slim
WORKDIR /app
COPY pyproject.toml README.md ./
COPY constraints constraints
COPY pipeline pipeline
COPY training training
RUN pip install --no-cache-dir -c constraints/cpu.txt '.[gateway]'
USER 1000
"""


def compose(model: Model, hardware: Hardware) -> dict[str, Any]:
    """The CPU file: an engine a profile, status API and gateway with every profile, all published on 127.0.0.1 only."""
    contained = _contained()
    services = {engine.name: _service(engine, facts, model, hardware) for engine, facts in contained if facts.image}
    services |= {f"{engine.name}-create": _create(engine, facts) for engine, facts in contained if facts.create}
    # without a CPU image a service is here so that its profile is known, and gets its flags from the GPU file
    for engine, facts in ((engine, facts) for engine, facts in contained if not facts.image):
        words = ["sh", "-c", f"echo add -f docker-compose.gpu.yml: {engine.title} needs a GPU; exit 1"]
        services[engine.name] = {**_frame(engine, facts), "command": words}
    services["status-api"] = _ours(8080, ["python", "-m", "pipeline.operate.status"])
    words = ["python", "-m", "pipeline.operate.proxy", "--config", "/tmp/litellm.yaml"]
    services["gateway"] = _ours(4000, words, "GATEWAY_API_KEY=${GATEWAY_API_KEY:?set a key in .env}")
    volumes: dict[str, Any] = {volume.partition(":")[0]: {} for _, facts in contained for volume in facts.volumes}
    return {"name": PROJECT, "services": services, "volumes": volumes}


def gpu_overlay(model: Model, hardware: Hardware) -> dict[str, Any]:
    """What changes on NVIDIA GPUs: images, devices, and the flags planned for that machine."""
    services: dict[str, Any] = {}
    for engine, facts in _contained():
        planned = _service(engine, facts, model, hardware)
        service = services[engine.name] = {"image": facts.gpu_image}
        if "command" in planned:
            missing = [flag for flag in facts.gpu_flags if flag not in planned["command"]]
            words = [word for flag in missing for word in (flag, f"${{{facts.variables[flag]}:-{facts.gpu_flags[flag]}}}")]
            service["command"] = planned["command"] + words
        # merged by name, variables planned for a CPU would stay beside these
        service |= {"environment": Override(planned.get("environment", ())), "deploy": deepcopy(_GPUS)}
        if facts.gpu_ipc:
            service["ipc"] = facts.gpu_ipc
    return {"services": services}


class Override(list[str]):
    """A list that stands in place of the CPU file's, where compose would merge the two (``!override``, compose 2.24.4 and later)."""


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Writes nothing by reference, and text of several lines as such."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)
)
_Dumper.add_representer(Override, lambda dumper, words: dumper.represent_sequence("!override", words))


def to_yaml(document: Mapping[str, Any], command: str, machine: str) -> str:
    """The file's text, with the command that makes it again in its first lines."""
    head = f"# Made by: {command}\n# Flags are planned for {machine}; plan for yours with --hardware, and change nothing here by hand.\n"
    return head + str(yaml.dump(dict(document), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True))


def _contained() -> list[tuple[Engine, Container]]:
    """The engines that run in containers, with how they do: that in which models are made first, then by port."""
    contained = [(engine, engine.container) for engine in engines.every() if engine.container]
    return sorted(contained, key=lambda pair: (not pair[0].creates_model, pair[0].default_port))


def _service(engine: Engine, facts: Container, model: Model, hardware: Hardware) -> dict[str, Any]:
    """The service with the flags planned for the engine's artefact at its place in the container."""
    artefact = engine.artefact(RunFolder())
    path = Path(_RUN, artefact.name if artefact else "")
    placed = replace(model, path=path)
    if engine.serves == "gguf" and model.format != "gguf":
        placed = replace(placed, format="gguf", quantization="Q8_0", weight_bytes=int(model.q8_0_gib() * 2**30))
    request = Request(placed, hardware, "serve", engine.default_model, sampling=SAMPLING)
    inside = contained(engine, request, path)
    environment = [f"{key}={value}" for key, value in inside.env.items()]
    if engine.creates_model:
        return {**_frame(engine, facts), "environment": sorted(environment)}
    named = [facts.variables.get(before) for before in ("", *inside.arguments)]
    # the value after each overridable flag becomes ${VARIABLE:-planned}
    words = [f"${{{name}:-{word}}}" if name else word for name, word in zip(named, inside.arguments, strict=False)]
    service = {**_frame(engine, facts), "command": [*facts.entry, *words]}
    return service | ({"environment": environment} if environment else {})


def _frame(engine: Engine, facts: Container) -> dict[str, Any]:
    port = engine.default_port
    where = {"profiles": [f"local-{engine.name}"], "ports": [f"127.0.0.1:{port}:{port}"], "volumes": [_RUNS, *facts.volumes]}
    service = {"image": facts.image or facts.gpu_image, **where, **_GUARDED, "healthcheck": _health(port, facts.health)}
    return service | ({"shm_size": facts.shm_size} if facts.shm_size else {})


def _health(port: int, test: Sequence[str] = (), start_period: str = "10m") -> dict[str, Any]:
    code = f"import urllib.request as u; u.urlopen('http://127.0.0.1:{port}/health', timeout=4)"
    asked = [word.replace("{port}", str(port)) for word in test] or ["CMD", "python3", "-c", code]
    return {"test": asked, "interval": "10s", "timeout": "5s", "retries": 6, "start_period": start_period}


def _create(engine: Engine, facts: Container) -> dict[str, Any]:
    """A model that is made in the server needs to be made once, from the run's Modelfile; then this container ends."""
    model = f"${{{engine.prefix}_MODEL:-{engine.default_model}}}"
    return {
        "image": facts.image,
        "profiles": [f"local-{engine.name}"],
        "volumes": [_RUNS],
        "environment": [f"{facts.create_at}={engine.url(engine.name)}"],
        "working_dir": _RUN,
        "entrypoint": [word.replace("{model}", model) for word in facts.create],
        "depends_on": {engine.name: {"condition": "service_healthy"}},
        "restart": "no",
    }


def _ours(port: int, words: list[str], *environment: str) -> dict[str, Any]:
    """The status API or the gateway: our own image, reaching the engines by their service names."""
    contained = [engine for engine, _ in _contained()]
    chosen = [f"{v}=${{{v}:-{Settings.model_fields[v.lower()].default}}}" for v in ("LLM_BACKEND", "GATEWAY_STRATEGY")]
    # the null device stands for "no file": an absent one would fail, or be made as a folder
    agents = {"type": "bind", "source": "${AGENTS_FILE:-/dev/null}", "target": "/app/agents.yaml", "read_only": True}
    urls = [f"{engine.prefix}_BASE_URL={engine.url(engine.name)}" for engine in contained]
    return {
        "image": "granite-pipeline:local",
        "build": {"context": ".", "dockerfile_inline": _SERVICE},
        "profiles": [f"local-{engine.name}" for engine in contained],
        "command": [*words, "--host", "0.0.0.0", "--port", str(port)],
        "ports": [f"127.0.0.1:{port}:{port}"],
        "env_file": [{"path": ".env", "required": False}],
        "environment": [*urls, *chosen, "AGENTS_FILE=/app/agents.yaml", *environment],
        "volumes": [_RUNS, {**agents, "bind": {"create_host_path": False}}],
        **_GUARDED,
        "healthcheck": _health(port, start_period="2m"),
    }
