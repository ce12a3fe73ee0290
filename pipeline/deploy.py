"""``docker-compose.yml`` and its GPU overlay, made from plans: one copy of every flag, with the documented variables in their places."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import engines
from pipeline.config import Settings
from pipeline.engines.base import Container, Engine, Launch, require_feasible
from pipeline.machine.hardware import Hardware
from pipeline.model.model import Model
from pipeline.planning.plan import Plan, Request
from pipeline.runs.folder import RunFolder
from pipeline.serve.start import LOOPBACK, Options, Target, request_for

# what docker calls the containers of these files by
PROJECT = "granite"
_RUN = "/app/training/output/${RUN:-generic}"
_GPUS = {"resources": {"reservations": {"devices": [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]}}}
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


class Override(list[str]):
    """A list that stands in place of the CPU file's, where compose would merge the two (``!override``, compose 2.24.4 and later)."""


def compose(model: Model, hardware: Hardware) -> dict[str, Any]:
    """The CPU file: an engine a profile, status API and gateway with every profile, all published on 127.0.0.1 only."""
    services: dict[str, Any] = {}
    for engine in _contained():
        services[engine.name] = _service(engine, model, hardware) if _container(engine).image else _gpu_only(engine)
        if engine.creates_model:
            services[f"{engine.name}-create"] = _create(engine)
    services["status-api"] = _ours(8080, ["python", "-m", "pipeline.operate.status"], [])
    words = ["python", "-m", "pipeline.operate.proxy", "--config", "/tmp/litellm.yaml"]
    services["gateway"] = _ours(4000, words, ["GATEWAY_API_KEY=${GATEWAY_API_KEY:?set a key in .env}"])
    volumes = [volume for engine in _contained() for volume in _container(engine).volumes]
    return {"name": PROJECT, "services": services, "volumes": {volume.partition(":")[0]: {} for volume in volumes}}


def gpu_overlay(model: Model, hardware: Hardware) -> dict[str, Any]:
    """What changes on NVIDIA GPUs: images, devices, and the flags planned for that machine."""
    services: dict[str, Any] = {}
    for engine in _contained():
        facts, planned = _container(engine), _service(engine, model, hardware)
        # merged by name, variables planned for a CPU would stay beside these
        environment = Override(planned.get("environment", ()))
        service: dict[str, Any] = {"image": facts.gpu_image}
        if "command" in planned:
            missing = [flag for flag in facts.gpu_flags if flag not in planned["command"]]
            words = [word for flag in missing for word in (flag, f"${{{facts.variables[flag]}:-{facts.gpu_flags[flag]}}}")]
            service["command"] = planned["command"] + words
        service |= {"environment": environment, "deploy": deepcopy(_GPUS)}
        services[engine.name] = service | ({"ipc": facts.gpu_ipc} if facts.gpu_ipc else {})
    return {"services": services}


def to_yaml(document: Mapping[str, Any], command: str, machine: str) -> str:
    """The file's text, with the command that makes it again in its first lines."""
    import yaml

    class Dumper(yaml.SafeDumper):  # type: ignore[misc]
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: Any, value: str) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    def override(dumper: Any, value: Override) -> Any:
        return dumper.represent_sequence("!override", value)

    Dumper.add_representer(str, text)
    Dumper.add_representer(Override, override)
    head = f"# Made by: {command}\n# Flags are planned for {machine}; plan for yours with --hardware, and change nothing here by hand.\n"
    return head + str(yaml.dump(dict(document), Dumper=Dumper, sort_keys=False, width=120, allow_unicode=True))


def _contained() -> list[Engine]:
    """The engines that run in containers."""
    return [engine for engine in engines.every() if engine.container]


def _container(engine: Engine) -> Container:
    assert engine.container
    return engine.container


def _profile(engine: Engine) -> str:
    return f"local-{engine.name}"


def _plan(engine: Engine, model: Model, hardware: Hardware) -> tuple[Plan, Request]:
    """The plan for this engine's artefact at its place in the container."""
    artefact = engine.artefact(RunFolder("run", Path("output")))
    where = Path(_RUN, artefact.name if artefact else "")
    placed = replace(model, path=where)
    if where.suffix == ".gguf" and model.format != "gguf":
        placed = replace(placed, format="gguf", quantization="Q8_0", weight_bytes=int(model.q8_0_gib() * 2**30))
    request = Request(placed, hardware, "serve", engine.default_model)
    plan = engine.plan(request)
    require_feasible(plan)
    return plan, request


def _service(engine: Engine, model: Model, hardware: Hardware) -> dict[str, Any]:
    plan, request = _plan(engine, model, hardware)
    launch = engine.launch(plan, request, host="0.0.0.0", port=engine.default_port)
    service = _frame(engine)
    if engine.creates_model:
        service["environment"] = sorted(f"{key}={value}" for key, value in launch.env.items())
        return service
    # the image's own entry point takes the place of the program; ``launch`` ends with the planned flags, host and port
    flags = list(launch.argv[-(len(plan.arguments) + 4) :])
    service["command"] = [*_container(engine).entry, *_with_variables(_container(engine).variables, flags)]
    if launch.env:
        service["environment"] = [f"{key}={value}" for key, value in launch.env.items()]
    return service


def _gpu_only(engine: Engine) -> dict[str, Any]:
    """Without a CPU image: the service is here so that the profile is known, and gets its flags from the GPU file."""
    words = f"echo add -f docker-compose.gpu.yml: {engine.title} needs a GPU; exit 1"
    return {**_frame(engine), "command": ["sh", "-c", words]}


def _with_variables(variables: Mapping[str, str], flags: list[str]) -> list[str]:
    """The value after each overridable flag becomes ``${VARIABLE:-planned}``."""
    found = list(flags)
    for i, flag in enumerate(flags[:-1]):
        if flag in variables:
            found[i + 1] = f"${{{variables[flag]}:-{flags[i + 1]}}}"
    return found


def _frame(engine: Engine) -> dict[str, Any]:
    port, facts = engine.default_port, _container(engine)
    service: dict[str, Any] = {
        "image": facts.image or facts.gpu_image,
        "profiles": [_profile(engine)],
        "ports": [f"127.0.0.1:{port}:{port}"],
        "volumes": ["./training/output:/app/training/output:ro", *facts.volumes],
        "restart": "unless-stopped",
        "security_opt": ["no-new-privileges:true"],
        "healthcheck": _health(port, facts.health),
    }
    return service | ({"shm_size": facts.shm_size} if facts.shm_size else {})


def _health(port: int, test: Sequence[str] = ()) -> dict[str, Any]:
    code = f"import urllib.request as u; u.urlopen('http://127.0.0.1:{port}/health', timeout=4)"
    asked = [word.replace("{port}", str(port)) for word in test] or ["CMD", "python3", "-c", code]
    return {"test": asked, "interval": "10s", "timeout": "5s", "retries": 6, "start_period": "10m"}


def _create(engine: Engine) -> dict[str, Any]:
    """A model that is made in the server needs to be made once, from the run's Modelfile; then this container ends."""
    return {
        "image": _container(engine).image,
        "profiles": [_profile(engine)],
        "volumes": ["./training/output:/app/training/output:ro"],
        "environment": [f"OLLAMA_HOST={engine.url(engine.name)}"],
        "working_dir": _RUN,
        "entrypoint": ["ollama", "create", f"${{{engine.prefix}_MODEL:-{engine.default_model}}}", "-f", "Modelfile"],
        "depends_on": {engine.name: {"condition": "service_healthy"}},
        "restart": "no",
    }


def _ours(port: int, words: list[str], environment: list[str]) -> dict[str, Any]:
    """The status API or the gateway: our own image, reaching the engines by their service names."""
    chosen = [f"{v}=${{{v}:-{Settings.model_fields[v.lower()].default}}}" for v in ("LLM_BACKEND", "GATEWAY_STRATEGY")]
    # the null device stands for "no file": an absent one would fail, or be made as a folder
    agents = {"type": "bind", "source": "${AGENTS_FILE:-/dev/null}", "target": "/app/agents.yaml", "read_only": True}
    urls = [f"{engine.prefix}_BASE_URL={engine.url(engine.name)}" for engine in _contained()]
    return {
        "image": "granite-pipeline:local",
        "build": {"context": ".", "dockerfile_inline": _SERVICE},
        "profiles": [_profile(engine) for engine in _contained()],
        "command": [*words, "--host", "0.0.0.0", "--port", str(port)],
        "ports": [f"127.0.0.1:{port}:{port}"],
        "env_file": [{"path": ".env", "required": False}],
        "environment": [*urls, *chosen, "AGENTS_FILE=/app/agents.yaml", *environment],
        "volumes": ["./training/output:/app/training/output:ro", {**agents, "bind": {"create_host_path": False}}],
        "restart": "unless-stopped",
        "security_opt": ["no-new-privileges:true"],
        "healthcheck": {**_health(port), "start_period": "2m"},
    }


_RESTART_SECONDS = 5


def planned_launch(engine_name: str, run: RunFolder, settings: Settings, name: str | None = None) -> Launch:
    """The process that ``serve`` would start for a run on the engine's documented port; nothing is started or checked for."""
    engine = engines.get(engine_name)
    target = Target.of_run(run, engine_name, name or settings.address(engine_name).model or None)
    request = request_for(target, Options("serve", overrides=settings.overrides(engine_name)))
    return engine.launch(engine.plan(request), request, host=LOOPBACK, port=engine.default_port)


def unit(launch: Launch, what: str, folder: Path, writable: Sequence[Path] = ()) -> str:
    """One unit file: started again when it fails, no new privileges, writing only below ``writable``; keys come from ``.env``."""
    lines = [
        "[Unit]",
        f"Description={_text(what)}",
        "After=network.target",
        "",
        "[Service]",
        f"WorkingDirectory={_text(str(folder))}",
        f"EnvironmentFile=-{_text(str(folder / '.env'))}",
        *(f"Environment={_quoted(f'{key}={value}')}" for key, value in sorted(_environment(launch).items())),
        # variables are expanded in this line only
        f"ExecStart={' '.join(_quoted(word).replace('$', '$$') for word in launch.argv)}",
        "Restart=on-failure",
        f"RestartSec={_RESTART_SECONDS}",
        f"TimeoutStartSec={launch.start_timeout:.0f}",
        "KillMode=control-group",
        "NoNewPrivileges=yes",
        "PrivateTmp=yes",
        "ProtectSystem=strict",
        # one that does not exist yet is passed over: without the dash the unit would not start
        f"ReadWritePaths={' '.join(_quoted(f'-{path}') for path in writable)}" if writable else "ReadOnlyPaths=/",
        "",
        "[Install]",
        "WantedBy=default.target",
    ]
    return "\n".join(lines) + "\n"


def _environment(launch: Launch) -> dict[str, str]:
    """What the process needs besides: our package, where it is ours and not installed for this interpreter."""
    return {
        **launch.env,
        **({"PYTHONPATH": str(Path(__file__).parents[1])} if launch.ours else {}),
        "PYTHONUNBUFFERED": "1",
        "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
    }


def _quoted(word: str) -> str:
    """A word as systemd reads it: specifiers escaped, quoted where it must be."""
    plain = _text(word).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{plain}"' if not plain or any(c in plain for c in " \t'\"\\;") else plain


def _text(text: str) -> str:
    return text.replace("%", "%%").replace("\n", " ")
