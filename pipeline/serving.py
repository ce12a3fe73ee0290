"""Serving a model: plan, pick a port, start, wait for the first token - or attach to a server that already runs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from pipeline import engines, server
from pipeline.engines.base import Launch
from pipeline.engines.ollama import Ollama
from pipeline.errors import EngineError, InputError, MissingDependency, PipelineError
from pipeline.files import read_json, write_json
from pipeline.hardware import Hardware
from pipeline.model import Model
from pipeline.modelfile import parse_modelfile, to_create_request
from pipeline.plan import Plan, Purpose, Request
from pipeline.ports import claim
from pipeline.runs import RunFolder
from pipeline.server import Progress, Server
from pipeline.waiting import wait_for

LOOPBACK = "127.0.0.1"
# which artefact of a run each engine serves
_SERVES_FOLDER = frozenset({"vllm", "sglang"})


@dataclass(frozen=True)
class Target:
    """What is served: a model folder or GGUF, under which name; logs and server records go below ``folder``."""

    model: Path
    name: str
    folder: Path
    modelfile: Path | None = None

    @property
    def servers(self) -> Path:
        """Records of the servers started for this target."""
        return self.folder / "servers"

    @classmethod
    def of_run(cls, run: RunFolder, engine: str, name: str | None = None) -> Target:
        """The artefact of a run that an engine serves; InputError when it has not been exported."""
        model = run.merged if engine in _SERVES_FOLDER else run.gguf
        if not model.exists():
            raise InputError(f"run {run.name} has no {model.name}", remedy=f"granite-pipeline export --run {run.name}")
        modelfile = run.modelfile if engine == "ollama" and run.modelfile.exists() else None
        return cls(model, name or run.name, run.path, modelfile)


@dataclass(frozen=True)
class Options:
    """How to serve. ``port`` 0 picks a free one; ``owner`` is the process the server ends with, None for no one."""

    purpose: Purpose = "serve"
    host: str = LOOPBACK
    port: int = 0
    owner: int | None = None
    timeout: float | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Endpoint:
    """A server that answers chats: its URL without ``/v1``, and the process when it was started from here."""

    engine: str
    url: str
    model: str
    version: str | None = None
    server: Server | None = None
    plan: dict[str, Any] | None = None
    ready_seconds: float | None = None
    api_key: str = field(default="", repr=False)

    @property
    def headers(self) -> dict[str, str]:
        """Authorization, when the endpoint has a key."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


def request_for(target: Target, options: Options, hardware: Hardware | None = None) -> Request:
    """The planning request for a target on this machine (or on the one given)."""
    model = Model.open(target.model)
    machine = hardware or Hardware.detect(target.folder)
    return Request(model, machine, options.purpose, target.name, options.overrides)


def serve(engine_name: str, target: Target, options: Options, progress: Progress) -> Endpoint:
    """Start an engine for a target and return once it has answered its first token.

    Raises MissingDependency when the engine is not installed, EnvironmentFailure when the port is taken, EngineError
    with cause and remedy when the server does not come up; nothing is left running then.
    """
    engine = engines.get(engine_name)
    available = engine.available()
    if not available.usable:
        raise MissingDependency(f"{engine_name}: {available.reason}", remedy=available.remedy)
    request = request_for(target, options)
    plan = engine.plan(request)
    port = claim(options.host, options.port)
    launch = engine.launch(plan, request, host=options.host, port=port)
    log = target.folder / "logs" / f"{engine_name}-{time.strftime('%Y%m%d-%H%M%S')}.log"
    begun = time.monotonic()
    progress(f"starting {engine_name} on {launch.url}, log {log}")
    process = server.start(launch, log, owner=options.owner)
    record = server.save(process, target.servers)
    try:
        server.wait_ready(process, options.timeout or launch.start_timeout, progress)
        endpoint = Endpoint(engine_name, launch.url, launch.model, available.version, process, _described(plan, launch))
        if engine_name == "ollama":
            create_in_ollama(endpoint, target, progress)
        first_token(endpoint)
    except BaseException:
        server.stop(process)
        record.unlink(missing_ok=True)
        raise
    return _with_ready(endpoint, begun, target)


def attach(engine_name: str, target: Target) -> Endpoint | None:
    """The endpoint of a server started earlier for this target and still alive, or None."""
    for process in server.running(target.servers):
        if process.engine == engine_name:
            notes = target.servers / f"{engine_name}.endpoint"
            extra = _read_notes(notes)
            return Endpoint(engine_name, process.url, process.model, server=process, **extra)
    return None


def create_in_ollama(endpoint: Endpoint, target: Target, progress: Progress) -> None:
    """Make the model in a running Ollama from the target's GGUF and Modelfile."""
    if target.modelfile is None:
        raise EngineError(
            "serving a GGUF with Ollama needs its Modelfile", remedy="granite-pipeline modelfile says why there is none"
        )
    modelfile = parse_modelfile(target.modelfile.read_text(encoding="utf-8"))
    request = to_create_request(modelfile, "", endpoint.model)
    parts = {name: value for name, value in request.items() if name not in ("model", "files", "stream")}

    async def create() -> None:
        async with httpx.AsyncClient(base_url=endpoint.url, timeout=600) as client:
            await Ollama().create(client, endpoint.model, target.model, parts)

    progress(f"creating {endpoint.model} in Ollama")
    wait_for(create())


def first_token(endpoint: Endpoint, timeout: float = 300) -> None:
    """One-token chat; EngineError when the model behind a healthy server does not answer."""
    body = {
        "model": endpoint.model,
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 1,
        "temperature": 0,
    }
    try:
        answer = httpx.post(f"{endpoint.url}/v1/chat/completions", json=body, headers=endpoint.headers, timeout=timeout)
        answer.raise_for_status()
    except httpx.HTTPStatusError as error:
        raise EngineError(
            f"{endpoint.engine} is up but refuses a chat ({error.response.status_code})",
            evidence=error.response.text[:2000],
        ) from None
    except httpx.HTTPError as error:
        if endpoint.server is not None and not endpoint.server.alive:
            raise server.failure(endpoint.server, "died while answering its first token") from None
        raise EngineError(f"{endpoint.engine} is up but does not answer a chat: {error!r}") from None


def stop(folder: Path, engine: str) -> bool:
    """Stop the server of one engine recorded below a run folder; False when none runs."""
    for process in server.running(folder / "servers"):
        if process.engine == engine:
            server.stop(process)
            for suffix in (".json", ".endpoint"):
                (folder / "servers" / f"{engine}{suffix}").unlink(missing_ok=True)
            return True
    return False


def reachable(url: str) -> bool:
    """True when something answers HTTP at a URL within two seconds."""
    with contextlib.suppress(httpx.HTTPError, PipelineError):
        return httpx.get(url, timeout=2).status_code < 500
    return False


def _described(plan: Plan, launch: Launch) -> dict[str, Any]:
    return {**plan.to_json(), "argv": list(launch.argv)}


def _with_ready(endpoint: Endpoint, begun: float, target: Target) -> Endpoint:
    seconds = round(time.monotonic() - begun, 1)
    notes = {"version": endpoint.version, "plan": endpoint.plan, "ready_seconds": seconds}
    write_json(target.servers / f"{endpoint.engine}.endpoint", notes)
    return replace(endpoint, ready_seconds=seconds)


def _read_notes(path: Path) -> dict[str, Any]:
    return dict(read_json(path)) if path.is_file() else {}
