"""The backends of a run: attach to those that are up, start those that are installed, say why of the rest."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from pipeline import engines
from pipeline.config import Settings
from pipeline.errors import EngineError, InputError, PipelineError
from pipeline.runs.folder import RunFolder
from pipeline.serve import ollama_service
from pipeline.serve import start as serving
from pipeline.serve.server import Progress
from pipeline.serve.start import Endpoint, Options, Target

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Started:
    """What became of one backend: ``ready``, ``skipped`` (not installed) or ``failed``, with the reason."""

    name: str
    status: str
    reason: str = ""
    endpoint: Endpoint | None = None

    def row(self) -> dict[str, Any]:
        """For a table."""
        e = self.endpoint
        seen = {"version": e.version, "url": e.url, "model": e.model, "ready, s": e.ready_seconds} if e else {}
        return {"backend": self.name, "status": self.status, **seen, "reason": self.reason}

    @property
    def reasons(self) -> list[dict[str, Any]]:
        """The planned settings with their reasons."""
        plan = self.endpoint.plan if self.endpoint else None
        return list((plan or {}).get("reasons", []))

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
        return ollama_service.serve_there(there, target, options, progress)
    return serving.serve(engine, target, options, progress)


def start(run: RunFolder, name: str, settings: Settings, options: Options) -> Started:
    """Find or start one backend; a failure to start is a result here, not an exception."""
    engine = engines.get(name)
    try:
        endpoint = find(run, name, settings)
        available = engine.available()
        if endpoint is None and not available.usable:
            return Started(name, "skipped", f"{available.reason}; to have it: {available.remedy}")
        if endpoint is None:
            wanted = replace(options, overrides={**settings.overrides(name), **options.overrides})
            endpoint = bring_up(name, Target.of_run(run, name, key=settings.key(name)), wanted, _say)
        return Started(name, "ready", endpoint=endpoint)
    except InputError:
        raise
    except PipelineError as error:
        return Started(name, "failed", str(error))


@contextmanager
def borrowed(run: RunFolder, name: str, settings: Settings, *, keep: bool) -> Iterator[Started]:
    """A backend to ask questions of, found or started; stopped at the end, unless it was up before and is to be kept."""
    was_up = find(run, name, settings) is not None
    started = start(run, name, settings, Options(purpose="verify", owner=os.getpid()))
    try:
        yield started
    finally:
        if started.endpoint and not (keep and was_up):
            serving.stop(run.path, name)


def start_backends(
    run: RunFolder, names: Sequence[str], settings: Settings, options: Options, ports: Mapping[str, int] | None = None
) -> list[Started]:
    """Find or start each backend in turn, on its port in ``ports`` or a free one; InputError for a name that is not an engine."""
    for name in names:
        engines.get(name)
    return [start(run, name, settings, replace(options, port=(ports or {}).get(name, options.port))) for name in names]


def require_any(started: Sequence[Started]) -> None:
    """Raise EngineError with every reason when not one backend is up."""
    if not any(s.endpoint for s in started):
        raise EngineError(
            "no backend could be started on this machine",
            evidence="\n".join(f"{s.name} {s.status}: {s.reason}" for s in started),
            remedy="granite-pipeline doctor names what is installed and what is missing",
        )


def _say(text: str) -> None:
    log.info("%s", text[:160])
