"""The servers of a run that prompts are compared on: those that are up, and with ``start`` those that can be."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from pipeline import backends, serving
from pipeline.config import Settings
from pipeline.errors import EngineError
from pipeline.renderers import EngineRenderer
from pipeline.runs import RunFolder
from pipeline.serving import Options, Target

log = logging.getLogger(__name__)


@dataclass
class Running:
    """Renderers by engine name, and why the others are left out."""

    renderers: dict[str, EngineRenderer] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


@contextmanager
def run_servers(run: RunFolder, names: Sequence[str], settings: Settings, *, start: bool) -> Iterator[Running]:
    """The run's servers of these engines; those started here are stopped at the end.

    An engine that is not installed is left out with its reason; one that does not come up raises EngineError.
    """
    found, mine = Running(), list[str]()
    try:
        for name in names:
            endpoint = serving.attach(name, Target.of_run(run, name)) if (run.path / "servers").is_dir() else None
            if endpoint is None and start:
                log.info("parity: starting %s", name)
                begun = backends.start(run, name, settings, Options(purpose="verify", owner=os.getpid()))
                if begun.status == "failed":
                    raise EngineError(f"{name} did not start for the comparison", evidence=begun.reason)
                endpoint = begun.endpoint
                if endpoint is None:
                    found.absent[name] = begun.reason
                    continue
                mine.append(name)
            if endpoint is not None:
                found.renderers[name] = EngineRenderer(name, endpoint.url, endpoint.model)
        yield found
    finally:
        for name in mine:
            serving.stop(run.path, name)
