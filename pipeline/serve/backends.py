"""The backends of a run: attach to those that are up, start those that are installed, say why of the rest.

An Ollama that already runs, as the system service it is on Linux, is used as it is: nothing of it is started or stopped, and
no model in it that was not made from here is replaced. What is only asked there gets a name of its own and is deleted again.
"""

import contextlib
import logging
import os
import platform
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import config, engines
from pipeline.config import Settings
from pipeline.engines.base import Availability, Engine, require_feasible
from pipeline.engines.vllm.lora import read as read_adapter
from pipeline.errors import EngineError, InputError, PipelineError
from pipeline.machine.hardware import Hardware
from pipeline.net.client import wait_for
from pipeline.net.loopback import is_local, same_place
from pipeline.planning.plan import Plan
from pipeline.runs.folder import RunFolder
from pipeline.runs.hashes import sha256_json
from pipeline.runs.manifest import Manifest
from pipeline.serve import records
from pipeline.serve import start as serving
from pipeline.serve.artefacts import of_served_path
from pipeline.serve.server import Progress
from pipeline.serve.start import Endpoint, Options, Target

log = logging.getLogger(__name__)
_ASK_SECONDS = 2.0
_LOOK_SECONDS = 0.2
# of the free memory, what engines and the work beside them may take together
_SHARE = 0.8
# a model under such a name is this project's, and is deleted when it has been asked
PRIVATE = "gp-verify-"


@dataclass(frozen=True)
class Started:
    """What became of one backend: ``ready`` (``was_up``: before it was asked for), ``skipped`` (not installed) or ``failed``."""

    name: str
    status: str
    reason: str = ""
    endpoint: Endpoint | None = None
    was_up: bool = False

    def row(self) -> dict[str, Any]:
        """For a table."""
        e = self.endpoint
        seen = {"version": e.version, "url": e.url, "model": e.model, "ready, s": e.ready_seconds} if e else {}
        return {"backend": self.name, "status": self.status, **seen, "reason": self.reason}

    @property
    def reasons(self) -> list[dict[str, Any]]:
        """The planned settings with their reasons."""
        return list(self.endpoint.plan.get("reasons", [])) if self.endpoint and self.endpoint.plan else []

    @property
    def memory(self) -> dict[str, float]:
        """Predicted parts and the measured resident memory, GiB."""
        if self.endpoint is None or self.endpoint.plan is None or self.endpoint.server is None:
            return {}
        return {**self.endpoint.plan["memory_gib"], "measured": round(self.endpoint.server.memory_gib(), 2)}


def find(run: RunFolder, name: str, settings: Settings) -> Endpoint | None:
    """An endpoint that already runs: started for this run, or given by URL where none is started; None when there is none."""
    engine, there = engines.get(name), settings.address(name)
    if engine.serves != "url":
        target = Target.of_run(run, name, key=settings.key(name))
        return serving.attach(name, target) or _made_there(engine, target, there.root)
    if not there.base_url:
        raise InputError(f"{name}: no endpoint given", remedy=f"set {engine.prefix}_BASE_URL and {engine.prefix}_MODEL")
    return Endpoint(name, there.root, there.model, api_key=settings.key(name))


def bring_up(engine: str, target: Target, options: Options, progress: Progress, there: Endpoint | None = None) -> Endpoint:
    """An endpoint for a target that is not up: made in ``there``, a service that already runs, or a server started for it."""
    if there is not None:
        return _serve_there(there, target, options, progress)
    return serving.serve(engine, target, options, progress)


def start(run: RunFolder, name: str, settings: Settings, options: Options) -> Started:
    """Find or start one backend; a failure to start is a result here, not an exception.

    A model that has to be made in a server is made under a private name where that server is not ours: see :func:`borrowed`.
    """
    engine = engines.get(name)
    try:
        endpoint = find(run, name, settings)
        if endpoint is not None:
            return Started(name, "ready", endpoint=endpoint, was_up=True)
        target = Target.of_run(run, name, key=settings.key(name))
        wanted = replace(options, overrides={**settings.overrides(name), **options.overrides})
        there, seen = (None, Availability(False)) if options.port else look(engine, settings)
        if there is not None:
            if not is_local(there.url) and not settings.remote_ok(name):
                words = f"{engine.title} at {there.url} is another machine, and the model would be sent to it"
                return Started(name, "skipped", f"{words}; to have it: --remote-ok, or {engine.prefix}_REMOTE_OK=1")
            wanted, target = replace(wanted, remote_ok=True), replace(target, name=private_name(target), private=True)
        elif not (available := engine.available()).usable:
            return _not_here(name, available, seen, asked=bool(settings.named_servers(name)))
        elif seen.there:
            log.warning("%s: %s; one is started from here", name, seen.reason)
        try:
            endpoint = bring_up(name, target, wanted, lambda text: log.info("%s", text[:160]), there)
        except BaseException:
            if target.private:  # made, and did not answer
                serving.stop(run.path, name)
            raise
        return Started(name, "ready", endpoint=endpoint)
    except InputError:
        raise
    except PipelineError as error:
        return Started(name, "failed", str(error))


def _not_here(name: str, program: Availability, server: Availability, *, asked: bool) -> Started:
    """Neither a program to start nor a server to use: failed where there is a server or its address was given, else skipped."""
    if not server.reason:
        return Started(name, "skipped", f"{program.reason}; to have it: {program.remedy}")
    if server.there or asked:
        return Started(name, "failed", f"{server.reason}; {server.remedy}")
    return Started(name, "skipped", f"{program.reason}, and {server.reason}; to have it: {program.remedy}")


def look(engine: Engine, settings: Settings) -> tuple[Endpoint | None, Availability]:
    """The server in which an engine's models are made, where one runs at its configured address; and what was seen there."""
    if not engine.creates_model:
        return None, Availability(False)
    root = settings.address(engine.name).root
    seen = wait_for(engine.at(root, _ASK_SECONDS))
    return Endpoint(engine.name, root, "", seen.version) if seen.usable else None, seen


def private_name(target: Target) -> str:
    """The name of a model that is made to be asked only: one for each file, Modelfile, run folder and machine."""
    modelfile = target.modelfile.read_text(encoding="utf-8") if target.modelfile else ""
    told = [Manifest(target.manifest).sha256(target.model), modelfile, str(target.folder.resolve()), platform.node()]
    return f"{PRIVATE}{sha256_json(told)[:12]}"


@contextmanager
def borrowed(run: RunFolder, name: str, settings: Settings, *, keep: bool) -> Iterator[Started]:
    """A backend to ask questions of, found or started; stopped at the end, unless it was up before and is to be kept."""
    started = start(run, name, settings, Options(purpose="verify", owner=os.getpid()))
    try:
        yield started
    except PipelineError as error:
        raise (serving.explained(started.endpoint, error) if started.endpoint else error) from None
    finally:
        if started.endpoint and not (keep and started.was_up):
            serving.stop(run.path, name)


@contextmanager
def borrowed_adapter(run: RunFolder, name: str, settings: Settings, base: Path) -> Iterator[Started]:
    """A backend that serves a run's adapter unmerged, under a name of its own: the one at its configured address, else one started.

    What was started, on the ``base`` folder, is stopped at the end.
    """
    engine = engines.get(name)
    if not engine.serves_adapters:
        yield Started(name, "skipped", f"{engine.title} serves the merged model, no adapters")
        return
    if there := _adapter_there(engine, run, settings):
        yield Started(name, "ready", endpoint=there, was_up=True)
        return
    if not (available := engine.available()).usable:
        yield _not_here(name, available, Availability(False), asked=False)
        return
    options = Options("verify", owner=os.getpid(), adapters=(read_adapter(run.name, run.adapter),))
    # under the folder's name, which is not the run's, as serve --adapters does
    target = Target(base, f"{base.name}-base", run.path, key=settings.key(name))
    try:
        endpoint = serving.serve(name, target, replace(options, overrides=settings.overrides(name)), log.info)
    except InputError:
        raise
    except PipelineError as error:
        yield Started(name, "failed", str(error))
        return
    try:
        yield Started(name, "ready", endpoint=replace(endpoint, model=run.name, base=endpoint.model))
    except PipelineError as error:
        raise serving.explained(endpoint, error) from None
    finally:
        serving.stop(run.path, name)


def _adapter_there(engine: Engine, run: RunFolder, settings: Settings) -> Endpoint | None:
    """The running server that lists this run's adapter, and the name it has there."""
    address, key = settings.address(engine.name), settings.key(engine.name)
    listed = wait_for(engine.listing(address.root, key, _ASK_SECONDS)).models or ()
    ours = (one.name for one in listed if one.adapter and _is_adapter_of(run, one.path))
    model, base = next(ours, ""), next((one.name for one in listed if not one.adapter), "")
    return Endpoint(engine.name, address.root, model, api_key=key, base=base) if model and base else None


def _is_adapter_of(run: RunFolder, said: str) -> bool:
    found = of_served_path(said, run.output)
    return found is not None and (found.run, found.file) == (run.name, run.adapter.name)


def start_backends(
    run: RunFolder, names: Sequence[str], settings: Settings, options: Options, ports: Mapping[str, int] | None = None
) -> list[Started]:
    """Find or start each backend in turn, on its port in ``ports`` or a free one; InputError for a name that is not an engine."""
    for name in names:
        engines.get(name)
    return [start(run, name, settings, replace(options, port=(ports or {}).get(name, options.port))) for name in names]


@contextmanager
def meanwhile(
    run: RunFolder, names: Sequence[str], options: Options, need_gib: float, ports: Mapping[str, int] | None = None
) -> Iterator[None]:
    """Start backends in the background of other work, which needs ``need_gib``, where memory holds all of it; else only work.

    Left behind are those that came up. One that did not is started again, and then reported, by who asks for it next. When the
    work fails nothing that was started here is left.
    """
    if not names:
        yield
        return
    settings = config.load()
    wanted = _fitting(run, names, settings, options, need_gib)
    before, stopped = {process.pid for process in records.running(run.servers)}, threading.Event()

    def work() -> None:
        for name in wanted:
            with contextlib.suppress(PipelineError):
                if not stopped.is_set():
                    begun = start(run, name, settings, replace(options, port=(ports or {}).get(name, options.port)))
                    if not stopped.is_set():  # what was ended on purpose is no news
                        log.info("%s: %s%s", name, begun.status, f": {begun.reason}" if begun.reason else "")

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
        thread.join()
    except BaseException:
        stopped.set()
        alive = True
        while alive:  # what it is about to start comes up after the first look
            alive = thread.is_alive()
            for process in records.running(run.servers):
                if process.pid not in before:
                    records.end(process, run.servers)
            thread.join(_LOOK_SECONDS)
        raise


def _fitting(run: RunFolder, names: Sequence[str], settings: Settings, options: Options, need_gib: float) -> list[str]:
    """The backends that can be started beside work on a CPU that needs so much memory; none when it does not hold all of them."""
    machine, chosen = Hardware.detect(run.path), list[str]()
    if machine.gpus:  # the work and each engine want all of its memory
        return []
    try:
        for name in names:
            engine = engines.get(name)
            if engine.serves == "url" or engine.creates_model or not engine.available().usable:
                continue
            overrides = {**settings.overrides(name), **options.overrides}
            plan = engine.plan(serving.request_for(Target.of_run(run, name), replace(options, overrides=overrides), machine))
            chosen, need_gib = [*chosen, name], need_gib + plan.memory.total
    except PipelineError:  # said by who asks for it
        return []
    if need_gib > _SHARE * machine.ram_free_gib:
        words = "engines are not started beside this: together %.1f GiB of memory, %.1f are free"
        log.info(words, need_gib, machine.ram_free_gib)
        return []
    return chosen


def require_any(started: Sequence[Started]) -> None:
    """Raise EngineError with every reason when not one backend is up."""
    if not any(s.endpoint for s in started):
        evidence = "\n".join(f"{s.name} {s.status}: {s.reason}" for s in started)
        remedy = "granite-pipeline doctor names what is installed and what is missing"
        raise EngineError("no backend could be started on this machine", evidence=evidence, remedy=remedy)


def _serve_there(there: Endpoint, target: Target, options: Options, progress: Progress) -> Endpoint:
    """Make the target's model in that Ollama, wait for its first token, and note which artefact it is.

    Raises EngineError when Ollama refuses, InputError for a server setting (those are its owner's), for a model of that name
    that was not made from here, and for a server on another machine, unless ``options`` allow it.
    """
    begun, engine = time.monotonic(), engines.get(there.engine)
    if not is_local(there.url) and not options.remote_ok:
        words = f"{engine.title} at {there.url} is another machine, and the model would be sent to it"
        raise InputError(words, remedy=f"--remote-ok allows it, and so does {engine.prefix}_REMOTE_OK=1")
    plan = _parameters(engine, target, options) if is_local(there.url) else None
    if not target.private and not options.replace:
        serving.require_ours(engine, there.url, target)
    endpoint = replace(there, model=target.name, plan=plan.to_json([]) if plan else None)
    progress(f"{engine.title} already runs at {there.url}: the model is made there")
    if target.private:  # noted before it is there, so that it is deleted also where this process is killed in between
        serving.note_ready(endpoint, target, begun)
    serving.create_model(endpoint, target, progress, plan)
    digest = serving.digest_of(engine, there.url, target.name)
    # it is there from now on, also when it does not answer
    serving.note_ready(endpoint, target, begun, digest)
    serving.first_token(endpoint)
    return serving.note_ready(endpoint, target, begun, digest)


def _made_there(engine: Engine, target: Target, root: str) -> Endpoint | None:
    """The model of this very file and Modelfile that was made earlier in the configured server, while it is still there."""
    if not engine.creates_model or not target.manifest.is_file():
        return None
    now = (Manifest(target.manifest).sha256(target.model), target.modelfile_hash)
    for made in (replace(target, private=True), target):
        record = records.read(made.servers, engine.name)
        for ready in record.served if record else ():
            same = (ready.sha256, ready.modelfile) == now and same_place(ready.url, root)
            # one that does not answer now is not there
            with contextlib.suppress(EngineError):
                if same and ready.digest and ready.digest == serving.digest_of(engine, ready.url, ready.model, _ASK_SECONDS):
                    known = {name: getattr(ready, name) for name in ("version", "plan", "ready_seconds", "sha256")}
                    return Endpoint(engine.name, ready.url, ready.model, **known)
    return None


def _parameters(engine: Engine, target: Target, options: Options) -> Plan:
    """The model's own parameters; the variables of the server stay what its owner set."""
    plan = engine.plan(serving.request_for(target, options))
    require_feasible(plan)
    if given := [setting.name for setting in plan.env if setting.source == "user"]:
        words = f"{', '.join(given)} is a setting of the server, and this {engine.title} already runs"
        raise InputError(words, remedy="set it where that Ollama is started, or start another one with --port 0")
    return replace(plan, env=())
