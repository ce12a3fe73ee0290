"""``gateway`` and ``status-api``: one address for applications, and one for those who watch."""

import importlib.util
import os
from pathlib import Path
from typing import Annotated, get_args

import typer
from typer import Argument, Option

from pipeline import config, engines
from pipeline.commands import options, show
from pipeline.commands.serve import attend
from pipeline.config import Strategy
from pipeline.deploy import compose as files
from pipeline.deploy import systemd as units
from pipeline.engines.base import Launch
from pipeline.errors import MissingDependency
from pipeline.machine.named import hardware_from
from pipeline.model.model import Model
from pipeline.operate import services
from pipeline.operate.routing import DEFAULT_PORT, REQUEST_TIMEOUT
from pipeline.runs.folder import DEFAULT_NAME, DEFAULT_OUTPUT, RunFolder, user_caches

STATUS_PORT = 8080
# what the committed files are planned for
COMPOSE_MODEL, COMPOSE_CPU, COMPOSE_GPU = "granite-4.0-350m", "cpu-4c-16g", "l4"


def gateway(
    strategy: Annotated[str | None, Option(help="local-first, cloud-first or cheapest; default: GATEWAY_STRATEGY.")] = None,
    host: options.Host = "127.0.0.1",
    port: options.Port = DEFAULT_PORT,
    timeout: Annotated[float, Option(help="Seconds a backend may take for one answer.")] = REQUEST_TIMEOUT,
    output: options.Output = DEFAULT_OUTPUT,
    detach: options.Detach = False,
    stop: options.Stop = False,
) -> None:
    """One OpenAI-compatible address for all backends, with health checks and fallback (LiteLLM's proxy).

    A request goes to the first healthy backend of the strategy; when that one fails, to another one that serves the same
    fine-tune - or a model that agents.yaml allows by name, and to nothing else. Answers say where they come from in the
    headers x-granite-backend, x-granite-run, x-granite-manifest, x-granite-artefact and x-granite-fallback.

    Examples:
      granite-pipeline gateway --detach
      curl http://127.0.0.1:4000/v1/models
      granite-pipeline gateway --strategy cheapest --port 4100
    """
    if stop:
        _stop("gateway", output)
        return
    settings = config.load()
    strategy = strategy or settings.gateway_strategy
    options.require_known("strategy", strategy, get_args(Strategy))
    _require("litellm", "gateway")
    words = ("--strategy", strategy, "--timeout", f"{timeout:g}")
    _serve(services.gateway_launch(settings, host, port, output, words), output, detach=detach)


def status_api(
    host: options.Host = "127.0.0.1",
    port: options.Port = STATUS_PORT,
    output: options.Output = DEFAULT_OUTPUT,
    detach: options.Detach = False,
    stop: options.Stop = False,
) -> None:
    """Serve the health of the backends: a page for people, JSON for applications, /metrics for Prometheus.

    GET /api/v1/inference/status answers {"backend", "base_url", "model", "orchestrator_model", "healthy"}.
    The backends are asked every second; requests read what was last seen.

    Example: granite-pipeline status-api --port 8080
    """
    if stop:
        _stop("status-api", output)
        return
    _require("fastapi", "gateway")
    _serve(services.status_launch(host, port, output), output, detach=detach)


def compose(
    gpu: Annotated[bool, Option("--gpu", help="The overlay for NVIDIA GPUs (docker-compose.gpu.yml).")] = False,
    model_shape: Annotated[str, Option(help="Plan for a published model's shape.")] = COMPOSE_MODEL,
    machine: options.Hardware = None,
    run: options.SomeRun = None,
    output: options.Output = DEFAULT_OUTPUT,
    agent: options.Agent = None,
) -> None:
    """Print docker-compose.yml, or with --gpu its overlay, with planned flags; the committed files are this verb's output.

    Profiles: local-ollama (11434), local-vllm (8003), local-sglang (8004, GPU overlay only), local-llamacpp (8005); the status
    API (8080) and the gateway (4000) come with each. Ports are published on 127.0.0.1. RUN chooses the run, and the
    documented variables (VLLM_MAX_MODEL_LEN, LLAMACPP_PARALLEL, ...) override single flags. Give LLM_BACKEND the profile's
    engine (default: vllm), GATEWAY_STRATEGY the order, and AGENTS_FILE the agents.yaml that the containers are to see.

    Examples:
      granite-pipeline compose > docker-compose.yml
      granite-pipeline compose --gpu --hardware 2xa10g > docker-compose.gpu.yml
      LLM_BACKEND=llamacpp docker compose --profile local-llamacpp up
    """
    run = options.chosen(agent, run).run
    where = hardware_from(machine or (COMPOSE_GPU if gpu else COMPOSE_CPU))
    shape = Model.open(RunFolder(run, output).merged) if run else Model.from_shape(model_shape)
    command = "granite-pipeline compose" + (" --gpu" if gpu else "")
    command += f" --run {run}" if run else f" --model-shape {model_shape}" if model_shape != COMPOSE_MODEL else ""
    command += f" --hardware {machine}" if machine else ""
    made = files.gpu_overlay(shape, where) if gpu else files.compose(shape, where)
    typer.echo(files.to_yaml(made, command, f"{run or model_shape} on {where.name}"), nl=False)


def systemd(
    service: Annotated[str, Argument(help="vllm, llamacpp, sglang, ollama, gateway or status-api; default: LLM_BACKEND.")] = "",
    run: options.Run = DEFAULT_NAME,
    output: options.Output = DEFAULT_OUTPUT,
    name: options.ServedName = None,
    agent: options.Agent = None,
) -> None:
    """Print a systemd unit with the flags planned for this machine. Keys are read from .env, never written here.

    Example: granite-pipeline systemd llamacpp > ~/.config/systemd/user/granite-llamacpp.service
    """
    settings = config.load()
    run, service, name = options.chosen(agent, run, service, name, word="service")
    chosen = service or settings.llm_backend
    out = output.resolve()
    if chosen == "gateway":
        launch = services.gateway_launch(settings, "127.0.0.1", DEFAULT_PORT, out, free=False)
    elif chosen == "status-api":
        launch = services.status_launch("127.0.0.1", STATUS_PORT, out, free=False)
    else:
        launch = units.planned_launch(chosen, RunFolder(run, out), settings, name)
    writable, what = [out, user_caches()], f"Granite {chosen}"
    if chosen in engines.NAMES:
        writable, what = writable + engines.get(chosen).folders(), f"{what}, run {run}"
    typer.echo(units.unit(launch, what, Path.cwd(), writable), nl=False)


def _serve(launch: Launch, output: Path, *, detach: bool) -> None:
    with show.progress(f"starting {launch.engine}") as progress:
        process = services.start(launch, output, None if detach else os.getpid(), progress)
    show.line(f"{launch.engine}: {launch.url}, log {process.log}", err=True)
    if not detach:
        attend(process, services.folder(output))


def _stop(name: str, output: Path) -> None:
    stopped = services.stop(name, output)
    show.line(f"stopped: {name}" if stopped else f"no {name} was left running", err=True)


def _require(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise MissingDependency(f"{package} is not installed", remedy=f"pip install 'granite-pipeline[{extra}]'")
