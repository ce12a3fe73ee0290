"""``docker-compose.yml`` and its GPU overlay, made from plans: one copy of every flag, with the documented variables in their places."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import engines
from pipeline.config import Settings
from pipeline.engines.base import require_feasible
from pipeline.machine.hardware import Hardware
from pipeline.model.model import Model
from pipeline.planning.plan import Plan, Request

# what docker calls the containers of these files by
PROJECT = "granite"
# tags seen in use; their flags are those the planner knows (pipeline.engines.flags)
IMAGES = {
    "vllm": "vllm/vllm-openai-cpu:v0.32.0",
    "llamacpp": "ghcr.io/ggml-org/llama.cpp:server-b10731",
    "ollama": "ollama/ollama:0.33.3",
    "sglang": "lmsysorg/sglang:v0.5.20",
}
GPU_IMAGES = {
    "vllm": "vllm/vllm-openai:v0.32.0",
    "llamacpp": "ghcr.io/ggml-org/llama.cpp:server-cuda-b10731",
    "ollama": IMAGES["ollama"],
    "sglang": IMAGES["sglang"],
}
PROFILES = {"ollama": "local-ollama", "vllm": "local-vllm", "sglang": "local-sglang", "llamacpp": "local-llamacpp"}
_RUN = "/app/training/output/${RUN:-generic}"
_ARTEFACTS = {"vllm": f"{_RUN}/merged_fp16", "sglang": f"{_RUN}/merged_fp16", "llamacpp": f"{_RUN}/unsloth.Q8_0.gguf"}
# planned flag -> the documented variable that overrides it
_VARIABLES = {
    "vllm": {
        "--served-model-name": "VLLM_MODEL",
        "--gpu-memory-utilization": "VLLM_GPU_MEMORY_UTIL",
        "--max-model-len": "VLLM_MAX_MODEL_LEN",
        "--tensor-parallel-size": "VLLM_TENSOR_PARALLEL",
    },
    "sglang": {"--served-model-name": "SGLANG_MODEL", "--context-length": "SGLANG_MAX_MODEL_LEN"},
    "llamacpp": {"--alias": "LLAMACPP_MODEL", "-c": "LLAMACPP_CTX_SIZE", "--parallel": "LLAMACPP_PARALLEL"},
    "ollama": {},
}
# the names that applications ask for when nothing is set
_NAMES = {name: str(Settings.model_fields[f"{name}_model"].default) for name in PROFILES}
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
    services = {name: _engine(name, _plan(name, model, hardware)) for name in ("ollama", "vllm", "llamacpp")}
    services["ollama-create"] = _create()
    # SGLang has no CPU image: its service exists here so that the profile is known, and gets its flags from the GPU file
    services["sglang"] = {
        **_frame("sglang"),
        "command": ["sh", "-c", "echo add -f docker-compose.gpu.yml: SGLang needs a GPU; exit 1"],
    }
    services["status-api"] = _ours("status-api", 8080, ["python", "-m", "pipeline.operate.status"], [])
    words = ["python", "-m", "pipeline.operate.proxy", "--config", "/tmp/litellm.yaml"]
    services["gateway"] = _ours("gateway", 4000, words, ["GATEWAY_API_KEY=${GATEWAY_API_KEY:?set a key in .env}"])
    return {"name": PROJECT, "services": services, "volumes": {"ollama": {}}}


def gpu_overlay(model: Model, hardware: Hardware) -> dict[str, Any]:
    """What changes on NVIDIA GPUs: images, devices, and the flags planned for that machine."""
    services: dict[str, Any] = {}
    for name in ("ollama", "vllm", "sglang", "llamacpp"):
        planned = _engine(name, _plan(name, model, hardware))
        changed = {"command": planned["command"]} if "command" in planned else {}
        # merged by name, variables planned for a CPU would stay beside these
        changed["environment"] = Override(planned.get("environment", ()))
        services[name] = {"image": GPU_IMAGES[name], **changed, "deploy": deepcopy(_GPUS)}
    for name in ("vllm", "sglang"):
        services[name]["ipc"] = "host"
    if "--tensor-parallel-size" not in services["vllm"]["command"]:
        services["vllm"]["command"] += ["--tensor-parallel-size", "${VLLM_TENSOR_PARALLEL:-1}"]
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


def _plan(engine: str, model: Model, hardware: Hardware) -> tuple[Plan, Request]:
    """The plan for this engine's artefact at its place in the container."""
    where = Path(_ARTEFACTS.get(engine, f"{_RUN}/unsloth.Q8_0.gguf"))
    gguf = where.suffix == ".gguf"
    placed = replace(model, path=where)
    if gguf and model.format != "gguf":
        placed = replace(placed, format="gguf", quantization="Q8_0", weight_bytes=int(model.q8_0_gib() * 2**30))
    request = Request(placed, hardware, "serve", _NAMES[engine])
    plan = engines.get(engine).plan(request)
    require_feasible(plan)
    return plan, request


def _engine(name: str, planned: tuple[Plan, Request]) -> dict[str, Any]:
    plan, request = planned
    launch = engines.get(name).launch(plan, request, host="0.0.0.0", port=engines.get(name).default_port)
    service = _frame(name)
    # the image's own entry point takes the place of the program; ``launch`` ends with the planned flags, host and port
    flags = list(launch.argv[-(len(plan.arguments) + 4) :])
    if name == "ollama":
        service["environment"] = sorted(f"{key}={value}" for key, value in launch.env.items())
        return service
    entry = {"sglang": ["python3", "-m", "sglang.launch_server"]}.get(name, [])
    service["command"] = entry + _with_variables(name, flags)
    if launch.env:
        service["environment"] = [f"{key}={value}" for key, value in launch.env.items()]
    return service


def _with_variables(engine: str, flags: list[str]) -> list[str]:
    """The value after each overridable flag becomes ``${VARIABLE:-planned}``."""
    found = list(flags)
    for i, flag in enumerate(flags[:-1]):
        variable = _VARIABLES[engine].get(flag)
        if variable:
            found[i + 1] = f"${{{variable}:-{flags[i + 1]}}}"
    return found


def _frame(name: str) -> dict[str, Any]:
    port = engines.get(name).default_port
    service: dict[str, Any] = {
        "image": IMAGES[name],
        "profiles": [PROFILES[name]],
        "ports": [f"127.0.0.1:{port}:{port}"],
        "volumes": ["./training/output:/app/training/output:ro"],
        "restart": "unless-stopped",
        "security_opt": ["no-new-privileges:true"],
        "healthcheck": _health(name, port),
    }
    if name == "ollama":
        service["volumes"].append("ollama:/root/.ollama")
    if name == "vllm":
        service["shm_size"] = "2g"
    return service


def _health(name: str, port: int) -> dict[str, Any]:
    code = f"import urllib.request as u; u.urlopen('http://127.0.0.1:{port}/health', timeout=4)"
    tests = {"ollama": ["CMD", "ollama", "list"], "llamacpp": ["CMD", "curl", "-fsS", f"http://127.0.0.1:{port}/health"]}
    test = tests.get(name, ["CMD", "python3", "-c", code])
    return {"test": test, "interval": "10s", "timeout": "5s", "retries": 6, "start_period": "10m"}


def _create() -> dict[str, Any]:
    """Ollama needs its model made once, from the run's Modelfile; then this container ends."""
    return {
        "image": IMAGES["ollama"],
        "profiles": [PROFILES["ollama"]],
        "volumes": ["./training/output:/app/training/output:ro"],
        "environment": ["OLLAMA_HOST=http://ollama:11434"],
        "working_dir": _RUN,
        "entrypoint": ["ollama", "create", "${OLLAMA_MODEL:-granite-soc:latest}", "-f", "Modelfile"],
        "depends_on": {"ollama": {"condition": "service_healthy"}},
        "restart": "no",
    }


def _ours(name: str, port: int, words: list[str], environment: list[str]) -> dict[str, Any]:
    """The status API or the gateway: our own image, reaching the engines by their service names."""
    chosen = [f"{v}=${{{v}:-{Settings.model_fields[v.lower()].default}}}" for v in ("LLM_BACKEND", "GATEWAY_STRATEGY")]
    # the null device stands for "no file": an absent one would fail, or be made as a folder
    agents = {"type": "bind", "source": "${AGENTS_FILE:-/dev/null}", "target": "/app/agents.yaml", "read_only": True}
    urls = [f"{e.upper()}_BASE_URL=http://{e}:{engines.get(e).default_port}/v1" for e in ("vllm", "sglang", "llamacpp")]
    return {
        "image": "granite-pipeline:local",
        "build": {"context": ".", "dockerfile_inline": _SERVICE},
        "profiles": list(PROFILES.values()),
        "command": [*words, "--host", "0.0.0.0", "--port", str(port)],
        "ports": [f"127.0.0.1:{port}:{port}"],
        "env_file": [{"path": ".env", "required": False}],
        "environment": ["OLLAMA_BASE_URL=http://ollama:11434", *urls, *chosen, "AGENTS_FILE=/app/agents.yaml", *environment],
        "volumes": ["./training/output:/app/training/output:ro", {**agents, "bind": {"create_host_path": False}}],
        "restart": "unless-stopped",
        "security_opt": ["no-new-privileges:true"],
        "healthcheck": {**_health(name, port), "start_period": "2m"},
    }
