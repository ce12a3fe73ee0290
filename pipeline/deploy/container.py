"""An engine's server in a container: the one place where its words come from, for compose and for Kubernetes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.engines.base import Container, Engine, require_feasible
from pipeline.errors import InputError
from pipeline.planning.plan import Plan, Request


@dataclass(frozen=True)
class Contained:
    """A planned server whose model lies at a path of its container.

    ``arguments`` follow the program (or stand after the image's entry point), host and port with them.
    """

    engine: Engine
    facts: Container
    request: Request
    plan: Plan
    arguments: tuple[str, ...]
    env: Mapping[str, str]


def contained(engine: Engine, request: Request, path: Path, port: int = 0) -> Contained:
    """Plan a request with the model at ``path``; answers on every address of the container, on the engine's port or on ``port``.

    InputError for an engine that is not run in a container from here, EngineError when the plan is not feasible.
    """
    if engine.container is None:
        raise InputError(f"{engine.title} is not run in a container from here", remedy="use vllm, llamacpp, sglang or ollama")
    placed = replace(request, model=replace(request.model, path=path))
    plan = engine.plan(placed)
    require_feasible(plan)
    launch = engine.launch(plan, placed, host="0.0.0.0", port=port or engine.default_port)
    return Contained(engine, engine.container, placed, plan, launch.argv[len(engine.program()) :], launch.env)
