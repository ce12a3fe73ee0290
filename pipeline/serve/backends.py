"""The backends of a run: attach to those that are up, start those that are installed, say why of the rest.

An Ollama that already runs, as the system service it is on Linux, is used as it is: nothing of it is started or stopped.
"""

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from pipeline import engines
from pipeline.config import Settings, root_url
from pipeline.engines.base import require_feasible
from pipeline.errors import EngineError, InputError, PipelineError
from pipeline.net.client import wait_for
from pipeline.net.loopback import is_local
from pipeline.net.reach import get_json
from pipeline.planning.plan import Plan
from pipeline.runs.folder import RunFolder
from pipeline.serve import records
from pipeline.serve import start as serving
from pipeline.serve.server import Progress
from pipeline.serve.start import Endpoint, Options, Target

log = logging.getLogger(__name__)
_ASK_SECONDS = 2.0


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
        return serving.attach(name, Target.of_run(run, name, key=settings.key(name)))
    if not there.base_url:
        raise InputError(f"{name}: no endpoint given", remedy=f"set {engine.prefix}_BASE_URL and {engine.prefix}_MODEL")
    return Endpoint(name, there.root, there.model, api_key=settings.key(name))


def bring_up(engine: str, target: Target, options: Options, progress: Progress, there: Endpoint | None = None) -> Endpoint:
    """An endpoint for a target that is not up: made in ``there``, a service that already runs, or a server started for it."""
    if there is not None:
        return _serve_there(there, target, options, progress)
    return serving.serve(engine, target, options, progress)


def start(run: RunFolder, name: str, settings: Settings, options: Options) -> Started:
    """Find or start one backend; a failure to start is a result here, not an exception."""
    engine = engines.get(name)
    try:
        endpoint = find(run, name, settings)
        if endpoint is not None:
            return Started(name, "ready", endpoint=endpoint, was_up=True)
        available = engine.available()
        if not available.usable:
            return Started(name, "skipped", f"{available.reason}; to have it: {available.remedy}")
        wanted = replace(options, overrides={**settings.overrides(name), **options.overrides})
        target = Target.of_run(run, name, key=settings.key(name))
        return Started(name, "ready", endpoint=bring_up(name, target, wanted, lambda text: log.info("%s", text[:160])))
    except InputError:
        raise
    except PipelineError as error:
        return Started(name, "failed", str(error))


@contextmanager
def borrowed(run: RunFolder, name: str, settings: Settings, *, keep: bool) -> Iterator[Started]:
    """A backend to ask questions of, found or started; stopped at the end, unless it was up before and is to be kept."""
    started = start(run, name, settings, Options(purpose="verify", owner=os.getpid()))
    try:
        yield started
    finally:
        if started.endpoint and not (keep and started.was_up):
            serving.stop(run.path, name)


def start_backends(
    run: RunFolder, names: Sequence[str], settings: Settings, options: Options, ports: Mapping[str, int] | None = None
) -> list[Started]:
    """Find or start each backend in turn, on its port in ``ports`` or a free one; InputError for a name that is not an engine."""
    for name in names:
        engines.get(name)
    return [start(run, name, settings, replace(options, port=(ports or {}).get(name, options.port))) for name in names]


def find_service(base_url: str) -> Endpoint | None:
    """The Ollama that answers at a URL, without a model yet; None when nothing, or something else, answers."""
    root = root_url(base_url)
    if not root:
        return None
    seen = wait_for(get_json(root, "/api/version", timeout=_ASK_SECONDS))
    version = seen.data.get("version") if seen.ok and isinstance(seen.data, dict) else None
    return Endpoint("ollama", root, "", str(version)) if version else None


def require_any(started: Sequence[Started]) -> None:
    """Raise EngineError with every reason when not one backend is up."""
    if not any(s.endpoint for s in started):
        evidence = "\n".join(f"{s.name} {s.status}: {s.reason}" for s in started)
        remedy = "granite-pipeline doctor names what is installed and what is missing"
        raise EngineError("no backend could be started on this machine", evidence=evidence, remedy=remedy)


def _serve_there(there: Endpoint, target: Target, options: Options, progress: Progress) -> Endpoint:
    """Make the target's model in that Ollama, wait for its first token, and note which artefact it is.

    Raises EngineError when Ollama refuses, InputError for a server setting: those are its owner's.
    """
    begun = time.monotonic()
    records.require_none("ollama", target.servers, serving.to_stop(target))
    plan = _parameters(target, options) if is_local(there.url) else None
    endpoint = replace(there, model=target.name, plan=plan.to_json([]) if plan else None)
    progress(f"Ollama already runs at {there.url}: the model is made there")
    serving.create_model(endpoint, target, progress, plan)
    serving.first_token(endpoint)
    # Ollama's digest of the model changes when someone makes another one of the same name
    listing = wait_for(engines.get(there.engine).listing(there.url, "", _ASK_SECONDS))
    digest = next((one.digest for one in listing.models or () if records.same_name(one.name, target.name)), "")
    return serving.note_ready(endpoint, target, begun, digest)


def _parameters(target: Target, options: Options) -> Plan:
    """The model's own parameters; the variables of the server stay what its owner set."""
    request = serving.request_for(target, options)
    plan = engines.get("ollama").plan(request)
    require_feasible(plan)
    if given := [setting.name for setting in plan.env if setting.source == "user"]:
        words = f"{', '.join(given)} is a setting of the server, and this Ollama already runs"
        raise InputError(words, remedy="set it where that Ollama is started, or start another one with --port 0")
    return replace(plan, env=())
