"""Serving a model: plan, pick a port, start, wait for the first token - or attach to a server that already runs."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline import engines
from pipeline.engines.base import Engine, Launch, require_feasible
from pipeline.engines.flags import require_known_flags
from pipeline.errors import EngineError, InputError, MissingDependency, PipelineError, StartFailure
from pipeline.machine.hardware import Hardware
from pipeline.model.model import Model
from pipeline.modelfile.modelfile import read_modelfile, to_create_request
from pipeline.net.chat import PATH, SAMPLING, hello
from pipeline.net.client import Refused, Unanswered, open_client, post, status_of, wait_for
from pipeline.net.loopback import claim
from pipeline.planning.plan import Adapter, Node, Plan, Purpose, Request
from pipeline.runs.folder import RunFolder
from pipeline.runs.hashes import sha256_file
from pipeline.runs.manifest import Manifest
from pipeline.serve import records, server
from pipeline.serve.artefacts import of_file
from pipeline.serve.records import Ready
from pipeline.serve.retries import MAX_RETRIES, Change, next_plan
from pipeline.serve.server import Progress, Server, classify

log = logging.getLogger(__name__)
LOOPBACK = "127.0.0.1"
_DEATH_SECONDS = 5.0
_LIST_SECONDS = 30.0
_JOIN_SECONDS = 0.5


@dataclass(frozen=True)
class Target:
    """What is served: a model folder or GGUF, under which name; logs and server records go below ``folder``."""

    model: Path
    name: str
    folder: Path
    modelfile: Path | None = None
    key: str = field(default="", repr=False)  # what its server asks for
    private: bool = False  # made to be asked, and removed afterwards

    @property
    def servers(self) -> Path:
        """Records of the servers started for this target, or of what was made for it in a server that is not ours."""
        return _private(self.folder) if self.private else self.folder / "servers"

    @property
    def modelfile_hash(self) -> str:
        """SHA-256 of the Modelfile; empty without one."""
        return sha256_file(self.modelfile) if self.modelfile and self.modelfile.is_file() else ""

    @property
    def manifest(self) -> Path:
        """The run's record, where the folder is a run's."""
        return self.folder / "manifest.json"

    @classmethod
    def of_run(cls, run: RunFolder, engine: str, name: str | None = None, key: str = "") -> "Target":
        """The artefact of a run that an engine serves; InputError when it has not been exported."""
        facts = engines.get(engine)
        model = facts.artefact(run)
        if model is None:
            raise InputError(f"{engine} is not started from here", remedy=f"set {facts.prefix}_BASE_URL to the running server")
        if not model.exists():
            raise InputError(f"run {run.name} has no {model.name}", remedy=f"granite-pipeline export --run {run.name}")
        modelfile = run.modelfile if facts.creates_model and run.modelfile.exists() else None
        return cls(model, name or run.name, run.path, modelfile, key)


@dataclass(frozen=True)
class Options:
    """How to serve. ``port`` 0 picks a free one; ``owner`` is the process the server ends with, None for no one.

    In a server that is not ours: ``replace`` a model that was not made from here, ``remote_ok`` to send it to another machine.
    ``node`` is this machine's place where several hold one model, ``hardware`` what each of them is (None: as this one is).
    """

    purpose: Purpose = "serve"
    host: str = LOOPBACK
    port: int = 0
    owner: int | None = None
    timeout: float | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)
    adapters: tuple[Adapter, ...] = ()
    replace: bool = False
    remote_ok: bool = False
    node: Node | None = None
    hardware: Hardware | None = None


@dataclass(frozen=True)
class Endpoint:
    """A server that answers chats: its URL without ``/v1``, and the process when it was started from here.

    ``base`` is the name of the model that an adapter called ``model`` is applied to there; empty where the merged model is served.
    """

    engine: str
    url: str
    model: str
    version: str | None = None
    server: Server | None = None
    plan: dict[str, Any] | None = None
    ready_seconds: float | None = None
    api_key: str = field(default="", repr=False)
    sha256: str | None = None  # of the run's artefact as it was when this server had loaded it
    base: str = ""


def request_for(target: Target, options: Options, hardware: Hardware | None = None) -> Request:
    """The planning request for a target on this machine (or on the one given)."""
    machine = hardware or options.hardware or Hardware.detect(target.folder)
    # another model than a run's is sampled as its engine likes
    sampling = SAMPLING if target.manifest.is_file() else {}
    said = (options.purpose, target.name, options.overrides, options.adapters, sampling)
    return Request(Model.open(target.model), machine, *said, nodes=options.node.nodes if options.node else 1)


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
    records.require_none(engine_name, target.servers, to_stop(target))
    return start_planned(engine, request_for(target, options), target, options, progress)


def start_planned(
    engine: Engine, request: Request, target: Target, options: Options, progress: Progress, plan: Plan | None = None
) -> Endpoint:
    """Start with the plan made for ``request`` (or the one given) and go down the retry ladder; see :func:`serve`."""
    plan = plan or engine.plan(request)
    require_feasible(plan)
    require_known_flags(engine, plan)
    start = _Start(engine, request, target, options, progress)
    try:
        endpoint = start.with_retries(plan)
    except EngineError:
        start.record(None)
        raise
    start.record(endpoint.ready_seconds)
    return endpoint


@dataclass(frozen=True)
class _Start:
    """An engine being started for a target; ``attempts`` is what the run's manifest keeps of each try."""

    engine: Engine
    request: Request
    target: Target
    options: Options
    progress: Progress
    attempts: list[dict[str, Any]] = field(default_factory=list)

    def with_retries(self, plan: Plan) -> Endpoint:
        """Down the retry ladder until a first token comes, or until a failure that no retry can mend is raised."""
        changes: list[Change] = []
        while True:
            try:
                return self._once(plan)
            except StartFailure as failed:
                if self.options.node:  # the other nodes run with the same settings, which nobody here can change
                    raise
                plan = next_plan(self.engine, self.request, plan, failed, changes, port_given=self.options.port != 0)
                change = changes[-1]
                self.attempts[-1]["retry"] = {"reason": change.reason, "settings": dict(change.settings)}
                which = f"retry {len(changes)} of {MAX_RETRIES}"
                self.progress(f"{failed.message}; {which}: {change.reason} {change.words}".rstrip())

    def record(self, ready_seconds: float | None) -> None:
        """Append this start to the run's manifest, where the target is a run."""
        if self.target.manifest.is_file():
            said = {"engine": self.engine.name, "ready_seconds": ready_seconds, "attempts": self.attempts}
            Manifest(self.target.manifest).append("starts", said)

    def _once(self, plan: Plan) -> Endpoint:
        """One try, to the first token; nothing is left on failure."""
        name, target, options = self.engine.name, self.target, self.options
        launch = _launch(self.engine, plan, self.request, options)
        launch = _with_own_store(launch, self.engine, target)
        number = f"-{len(self.attempts)}" if self.attempts else ""
        log = target.folder / "logs" / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}{number}.log"
        attempt: dict[str, Any] = {"argv": list(launch.argv), "env": dict(launch.env), "log": str(log)}
        self.attempts.append(attempt)
        self.progress(f"starting {name} on {launch.url}, log {log}")
        begun = time.monotonic()
        process = records.begin(launch, log, target.servers, owner=options.owner, remedy=to_stop(target))
        try:
            endpoint = self._first_token(plan, launch, process)
        except BaseException as error:
            records.end(process, target.servers)
            attempt |= {"seconds": round(time.monotonic() - begun, 1), "failed": str(getattr(error, "message", repr(error)))}
            attempt |= {"kind": error.kind} if isinstance(error, StartFailure) else {}
            raise
        theirs = self.engine.creates_model and not launch.store
        endpoint = note_ready(endpoint, target, begun, digest_of(self.engine, endpoint.url, endpoint.model) if theirs else "")
        attempt["seconds"] = endpoint.ready_seconds
        return endpoint

    def _first_token(self, plan: Plan, launch: Launch, process: Server) -> Endpoint:
        """Wait until the server is up and its model answers."""
        server.wait_ready(process, self.options.timeout or launch.start_timeout, self.progress)
        described = {**plan.to_json(), "argv": list(launch.argv)}
        version = self.engine.available().version
        endpoint = Endpoint(process.engine, launch.url, launch.model, version, process, described, api_key=self.target.key)
        if self.engine.creates_model:
            if not launch.store and not self.options.replace:  # the user's own models are there
                require_ours(self.engine, launch.url, self.target)
            try:
                create_model(endpoint, self.target, self.progress, plan)
            except Unanswered as silent:
                raise _silent(process, silent, "its model was made") from None
        first_token(endpoint)
        return endpoint


def _launch(engine: Engine, plan: Plan, request: Request, options: Options) -> Launch:
    """The process to start, with a port that is free now."""
    host, port = options.host, claim(options.host, options.port)
    if options.node is None:
        return engine.launch(plan, request, host=host, port=port)
    return engine.rank(plan, request, options.node, host=host, port=port)


def _with_own_store(launch: Launch, engine: Engine, target: Target) -> Launch:
    """The launch with a folder for the models made in it that is nobody else's, unless the user's settings name one."""
    if not engine.store_variable or engine.store_variable in launch.env:
        return launch
    store = str((target.servers / f"{engine.name}-models").resolve())
    return replace(launch, env={**launch.env, engine.store_variable: store}, store=store)


def join(engine_name: str, target: Target, options: Options, progress: Progress) -> Server:
    """Start this machine's headless rank (``options.node``) of a model that several hold; returns once it waits for the others.

    It answers nobody: it is up when rank 0 is. Its record and log are in a folder of its own beside the run's, which the nodes
    may share. StartFailure when it ends, or does not come so far in time.
    """
    engine, node = engines.get(engine_name), options.node
    assert node is not None
    request = request_for(target, options)
    plan = engine.plan(request)
    require_feasible(plan)
    require_known_flags(engine, plan)
    folder = target.folder.with_name(f"{target.folder.name}-node{node.rank}")
    launch = engine.rank(plan, request, node, host=options.host, port=options.port)
    log = folder / "logs" / f"{engine_name}-{time.strftime('%Y%m%d-%H%M%S')}.log"
    progress(f"starting {engine_name}, node {node.rank} of {node.nodes}, towards {node.master}, log {log}")
    remedy = f"granite-pipeline stop --run {folder.name}"
    process, begun = records.begin(launch, log, folder / "servers", owner=options.owner, remedy=remedy), time.monotonic()
    try:
        while engine.joined not in server.end_of(log, log.stat().st_size):
            if not process.alive:
                raise server.failure(process, "ended before it waited for the other machines")
            if time.monotonic() - begun > (options.timeout or launch.start_timeout):
                raise server.failure(process, "did not come to wait for the other machines", ended=False)
            time.sleep(_JOIN_SECONDS)
    except BaseException:
        records.end(process, folder / "servers")
        raise
    return process


def note_ready(endpoint: Endpoint, target: Target, begun: float, digest: str = "") -> Endpoint:
    """Record what answered its first token, and which artefact was loaded then: the file may be exported again meanwhile."""
    # the file's own hash, not the manifest's word; remembered since the export, so that nothing is read again
    sealed = target.manifest.is_file() and target.model.exists()
    sha256 = Manifest(target.manifest).sha256(target.model) if sealed else None
    done = replace(endpoint, ready_seconds=round(time.monotonic() - begun, 1), sha256=sha256)
    said = {name: getattr(done, name) for name in ("url", "model", "version", "plan", "ready_seconds", "sha256")}
    ready = Ready(**said, artefact=of_file(target.model), digest=digest, modelfile=target.modelfile_hash)
    records.mark_ready(target.servers, done.engine, done.server, ready)
    return done


def to_stop(target: Target) -> str:
    """The command that ends a server of this target."""
    return f"granite-pipeline stop --run {target.folder.name}"


def attach(engine_name: str, target: Target) -> Endpoint | None:
    """The endpoint of a server started earlier for this target, alive and past its first token, or None."""
    record = records.read(target.servers, engine_name)
    if record is None or record.ready is None or not (process := record.running):
        return None
    there = record.ready
    known = {name: getattr(there, name) for name in ("version", "plan", "ready_seconds", "sha256")}
    return Endpoint(engine_name, process.url, process.model, server=process, api_key=target.key, **known)


def create_model(endpoint: Endpoint, target: Target, progress: Progress, plan: Plan | None = None) -> None:
    """Make the model in a running server (Ollama's) from the target's GGUF and Modelfile.

    The plan's parameters (num_ctx, num_gpu, num_thread) are for this machine and replace the Modelfile's.
    """
    engine = engines.get(endpoint.engine)
    if target.modelfile is None:
        remedy = "granite-pipeline modelfile says why there is none"
        raise EngineError(f"serving a GGUF with {engine.title} needs its Modelfile", remedy=remedy)
    request = to_create_request(read_modelfile(target.modelfile), "", endpoint.model)
    parts = {name: value for name, value in request.items() if name not in ("model", "files", "stream")}
    planned = {s.name: int(s.value) for s in (plan.parameters if plan else ()) if s.value is not None}
    parts["parameters"] = {**parts.get("parameters", {}), **planned}

    said = ", ".join(f"{name} {value}" for name, value in planned.items())
    progress(f"creating {endpoint.model} in {engine.title}{f' with {said}' if said else ''}")
    engine.create(endpoint.url, endpoint.model, target.model, parts)


def digest_of(engine: Engine, url: str, name: str, timeout: float = _LIST_SECONDS) -> str:
    """The server's digest of a model, which changes when someone makes another one of that name; empty where there is none.

    Raises EngineError when the server does not list its models in time: then nobody knows.
    """
    listing = wait_for(engine.listing(url, "", timeout))
    if listing.models is None:
        raise EngineError(f"{engine.title} at {url} does not list its models: {listing.reached.detail}")
    wanted = engine.canonical(name)
    return next((one.digest for one in listing.models if engine.canonical(one.name) == wanted), "")


def require_ours(engine: Engine, url: str, target: Target) -> None:
    """Raise InputError when the server has a model of the target's name that no run here is known to have made."""
    digest, output = digest_of(engine, url, target.name), target.folder.parent
    if digest and not any(record.ready and record.ready.digest == digest for record in records.every(output)):
        words = f"{engine.title} at {url} already has a model {target.name}, which was not made from a run in {output}"
        raise InputError(words, remedy="choose another name with --served-model-name, or replace it with --replace")


def first_token(endpoint: Endpoint, timeout: float = 300) -> None:
    """One-token chat; StartFailure when the model behind a healthy server does not answer, classified by its words and its log."""
    try:
        with open_client(endpoint.url, endpoint.api_key, timeout) as client:
            post(client, PATH, hello(endpoint.model))
    except Refused as refused:
        known, words = classify(refused.evidence), f"{endpoint.engine} is up but refuses a chat ({refused.status})"
        words += f": {known.cause}" if known else ""
        raise StartFailure(words, evidence=refused.evidence, **(known.facts if known else {})) from None
    except Unanswered as silent:
        if endpoint.server is None:
            raise EngineError(f"{endpoint.engine} is up but does not answer a chat: {silent.cause!r}") from None
        raise _silent(endpoint.server, silent, "answering its first token") from None


def _silent(process: Server, silent: Unanswered, work: str) -> StartFailure:
    """Died or only silent: a broken connection comes a moment before the guard has seen the end of its server."""
    if not _dies(process, silent):
        return server.failure(process, f"is up but does not answer ({silent.cause!r}) while {work}", ended=False)
    return server.failure(process, f"died while {work}")


def _dies(process: Server, error: EngineError) -> bool:
    """Whether a server has died, or does within the moment after a broken connection."""
    waits = isinstance(error, Unanswered) and not error.timed_out
    deadline = time.monotonic() + (_DEATH_SECONDS if waits else 0)
    while process.alive and time.monotonic() < deadline:
        time.sleep(0.1)
    return not process.alive


def explained(endpoint: Endpoint, error: PipelineError) -> PipelineError:
    """What went wrong while an endpoint was asked: its death, with its log, where it has died; else the error itself."""
    if not isinstance(error, EngineError):
        return error
    if endpoint.server is not None:
        return server.failure(endpoint.server, "died while it was asked") if _dies(endpoint.server, error) else error
    if isinstance(error, Unanswered) and not status_of(endpoint.url):
        title = engines.get(endpoint.engine).title
        return EngineError(f"{title} at {endpoint.url} ended while it was asked", remedy="look into that server's log")
    return error


def stop(folder: Path, engine: str) -> bool:
    """Stop the server of one engine recorded below a run folder, and remove what was made to be asked; False when there is neither."""
    stopped = records.stop(folder / "servers", engine)
    return _remove_private(folder, engine) or stopped


def private_models(folder: Path) -> list[str]:
    """The engines in a server of which, not ours, a model of this run was made to be asked."""
    return [name for name in engines.NAMES if (_private(folder) / f"{name}.json").is_file()]


def _private(folder: Path) -> Path:
    return folder / "servers" / "private"


def _remove_private(folder: Path, engine: str) -> bool:
    """Delete the models made to be asked; one whose server is gone is kept in mind, since it is still there."""
    record = records.read(_private(folder), engine)
    if record is None:
        return False
    gone = list[Ready]()
    for made in record.served:
        try:
            engines.get(engine).remove(made.url, made.model)
            gone.append(made)
        except EngineError as error:
            log.warning("%s: model %s could not be deleted from %s: %s", engine, made.model, made.url, error.message)
    records.forget_served(_private(folder), engine, gone)
    return bool(gone)


def reachable(url: str) -> bool:
    """True when something answers HTTP at a URL within two seconds."""
    return 0 < status_of(url) < 500
