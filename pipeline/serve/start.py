"""Serving a model: plan, pick a port, start, wait for the first token - or attach to a server that already runs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from pipeline import engines
from pipeline.config import key_for
from pipeline.engines.base import Engine, Launch, require_feasible
from pipeline.engines.flags import require_known_flags
from pipeline.engines.ollama import Ollama
from pipeline.errors import EngineError, InputError, MissingDependency, StartFailure
from pipeline.machine.hardware import Hardware
from pipeline.model.model import Model
from pipeline.modelfile.modelfile import read_modelfile, to_create_request
from pipeline.net.chat import PATH, hello
from pipeline.net.client import Refused, Unanswered, open_client, post, status_of, wait_for
from pipeline.net.loopback import claim
from pipeline.planning.plan import Adapter, Plan, Purpose, Request
from pipeline.runs.files import read_json
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest
from pipeline.serve import notes, server
from pipeline.serve import notes as artefact
from pipeline.serve.logs import classify
from pipeline.serve.retries import MAX_RETRIES, Change, next_plan
from pipeline.serve.server import Progress, Server

LOOPBACK = "127.0.0.1"
_DEATH_SECONDS = 5.0


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
        facts = engines.get(engine)
        model = facts.artefact(run)
        if model is None:
            raise InputError(f"{engine} is not started from here", remedy=f"set {facts.prefix}_BASE_URL to the running server")
        if not model.exists():
            raise InputError(f"run {run.name} has no {model.name}", remedy=f"granite-pipeline export --run {run.name}")
        modelfile = run.modelfile if facts.creates_model and run.modelfile.exists() else None
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
    adapters: tuple[Adapter, ...] = ()


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
    sha256: str | None = None  # of the run's artefact as it was when this server had loaded it

    @property
    def headers(self) -> dict[str, str]:
        """Authorization, when the endpoint has a key."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


def request_for(target: Target, options: Options, hardware: Hardware | None = None) -> Request:
    """The planning request for a target on this machine (or on the one given)."""
    model = Model.open(target.model)
    machine = hardware or Hardware.detect(target.folder)
    return Request(model, machine, options.purpose, target.name, options.overrides, options.adapters)


def serve(engine_name: str, target: Target, options: Options, progress: Progress) -> Endpoint:
    """Start an engine for a target and return once it has answered its first token.

    A failure that one changed setting may mend is tried again, at most three times, each time stated; every start is
    recorded in the run's manifest. Raises MissingDependency when the engine is not installed, EnvironmentFailure when
    the port is taken, EngineError with cause and remedy when the server does not come up; nothing is left running then.
    """
    engine = engines.get(engine_name)
    available = engine.available()
    if not available.usable:
        raise MissingDependency(f"{engine_name}: {available.reason}", remedy=available.remedy)
    server.require_none(engine_name, target.servers, to_stop(target))
    return start_planned(engine, request_for(target, options), target, options, progress)


def start_planned(
    engine: Engine, request: Request, target: Target, options: Options, progress: Progress, plan: Plan | None = None
) -> Endpoint:
    """Start with the plan made for ``request`` (or the one given) and go down the retry ladder; see :func:`serve`."""
    plan = plan or engine.plan(request)
    require_feasible(plan)
    require_known_flags(engine, plan)
    changes: list[Change] = []
    attempts: list[dict[str, Any]] = []
    while True:
        try:
            endpoint = _start_once(engine, plan, request, target, options, progress, attempts)
            _remember(target, engine.name, attempts, endpoint.ready_seconds)
            return endpoint
        except StartFailure as failed:
            try:
                plan = next_plan(engine, request, plan, failed, changes, port_given=options.port != 0)
            except EngineError:
                _remember(target, engine.name, attempts, None)
                raise
            attempts[-1]["retry"] = {"reason": changes[-1].reason, "settings": dict(changes[-1].settings)}
            progress(
                f"{failed.message}; retry {len(changes)} of {MAX_RETRIES}: {changes[-1].reason} {changes[-1].words}".rstrip()
            )


def _start_once(engine: Engine, plan: Plan, request: Request, target: Target, options: Options, progress: Progress, attempts: list[dict[str, Any]]) -> Endpoint:  # fmt: skip
    """One start, to the first token; what it was and how it ended is appended to ``attempts``; nothing is left on failure."""
    port = claim(options.host, options.port)
    launch = engine.launch(plan, request, host=options.host, port=port)
    log = target.folder / "logs" / f"{engine.name}-{time.strftime('%Y%m%d-%H%M%S')}{f'-{len(attempts)}' if attempts else ''}.log"
    begun = time.monotonic()
    attempt: dict[str, Any] = {"argv": list(launch.argv), "env": dict(launch.env), "log": str(log)}
    attempts.append(attempt)
    progress(f"starting {engine.name} on {launch.url}, log {log}")
    process = server.begin(launch, log, target.servers, owner=options.owner, remedy=to_stop(target))
    try:
        server.wait_ready(process, options.timeout or launch.start_timeout, progress)
        version = engine.available().version
        described = _described(plan, launch)
        endpoint = Endpoint(engine.name, launch.url, launch.model, version, process, described, api_key=key_for(engine.name))
        if engine.creates_model:
            create_in_ollama(endpoint, target, progress, plan)
        first_token(endpoint)
    except BaseException as error:
        server.end(process, target.servers)
        attempt |= {"seconds": round(time.monotonic() - begun, 1), "failed": str(getattr(error, "message", repr(error)))}
        attempt |= {"kind": error.kind} if isinstance(error, StartFailure) else {}
        raise
    endpoint = _with_ready(endpoint, begun, target)
    attempt["seconds"] = endpoint.ready_seconds
    return endpoint


def to_stop(target: Target) -> str:
    """The command that ends a server of this target."""
    return f"granite-pipeline stop --run {target.folder.name}"


def _remember(target: Target, engine: str, attempts: list[dict[str, Any]], ready: float | None) -> None:
    """Append this start to the run's manifest, where the target is a run."""
    path = target.folder / "manifest.json"
    if path.is_file():
        Manifest(path).append("starts", {"engine": engine, "ready_seconds": ready, "attempts": attempts})


def attach(engine_name: str, target: Target) -> Endpoint | None:
    """The endpoint of a server started earlier for this target, alive and past its first token, or None."""
    for process in server.running(target.servers):
        # the note is written after the first token: without it the server is still loading
        note = server.note_path(target.servers, engine_name)
        if process.engine == engine_name and note.is_file():
            said = read_json(note)
            extra = {key: said.get(key) for key in ("version", "plan", "ready_seconds", "sha256")}
            return Endpoint(engine_name, process.url, process.model, server=process, api_key=key_for(engine_name), **extra)
    return None


def create_in_ollama(endpoint: Endpoint, target: Target, progress: Progress, plan: Plan | None = None) -> None:
    """Make the model in a running Ollama from the target's GGUF and Modelfile.

    The plan's parameters (num_ctx, num_gpu) are for this machine and replace the Modelfile's.
    """
    if target.modelfile is None:
        raise EngineError(
            "serving a GGUF with Ollama needs its Modelfile", remedy="granite-pipeline modelfile says why there is none"
        )
    modelfile = read_modelfile(target.modelfile)
    request = to_create_request(modelfile, "", endpoint.model)
    parts = {name: value for name, value in request.items() if name not in ("model", "files", "stream")}
    planned = {s.name: int(s.value) for s in (plan.parameters if plan else ()) if s.value is not None}
    parts["parameters"] = {**parts.get("parameters", {}), **planned}

    async def create() -> None:
        async with httpx.AsyncClient(base_url=endpoint.url, timeout=600) as client:
            await Ollama().create(client, endpoint.model, target.model, parts)

    said = ", ".join(f"{name} {value}" for name, value in planned.items())
    progress(f"creating {endpoint.model} in Ollama{f' with {said}' if said else ''}")
    wait_for(create())


def first_token(endpoint: Endpoint, timeout: float = 300) -> None:
    """One-token chat; StartFailure when the model behind a healthy server does not answer, classified by its words and its log."""
    try:
        with open_client(endpoint.url, endpoint.api_key, timeout) as client:
            post(client, PATH, hello(endpoint.model))
    except Refused as refused:
        known = classify(refused.evidence)
        raise StartFailure(
            f"{endpoint.engine} is up but refuses a chat ({refused.status}){f': {known.cause}' if known else ''}",
            evidence=refused.evidence,
            **(known.facts if known else {}),
        ) from None
    except Unanswered as silent:
        if endpoint.server is None:
            raise EngineError(f"{endpoint.engine} is up but does not answer a chat: {silent.cause!r}") from None
        raise _silent(endpoint.server, silent) from None


def _silent(process: Server, silent: Unanswered) -> StartFailure:
    """Died or only silent: a broken connection comes a moment before the guard has seen the end of its server."""
    deadline = time.monotonic() + _DEATH_SECONDS
    while process.alive and not silent.timed_out and time.monotonic() < deadline:
        time.sleep(0.1)
    if process.alive:
        return server.failure(process, f"is up but does not answer a chat ({silent.cause!r})", ended=False)
    return server.failure(process, "died while answering its first token")


def stop(folder: Path, engine: str) -> bool:
    """Stop the server of one engine recorded below a run folder; False when none runs."""
    for process in server.running(folder / "servers"):
        if process.engine == engine:
            server.end(process, folder / "servers")
            return True
    return False


def reachable(url: str) -> bool:
    """True when something answers HTTP at a URL within two seconds."""
    return 0 < status_of(url) < 500


def _described(plan: Plan, launch: Launch) -> dict[str, Any]:
    return {**plan.to_json(), "argv": list(launch.argv)}


def _with_ready(endpoint: Endpoint, begun: float, target: Target) -> Endpoint:
    seconds = round(time.monotonic() - begun, 1)
    manifest = target.folder / "manifest.json"
    # the file's own hash, not the manifest's word; remembered since the export, so that nothing is read again
    sha256 = Manifest(manifest).sha256(target.model) if manifest.is_file() and target.model.exists() else None
    said = {"url": endpoint.url, "model": endpoint.model, "version": endpoint.version, "plan": endpoint.plan, "sha256": sha256}
    notes.write(target.servers, endpoint.engine, {**said, "ready_seconds": seconds}, artefact.of_file(target.model))
    return replace(endpoint, ready_seconds=seconds, sha256=sha256)
