"""An engine's server in a container: the one place where its words come from, for compose and for Kubernetes; and a pod's run folder."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.engines.base import Container, Engine, require_feasible
from pipeline.errors import InputError
from pipeline.planning.plan import Plan, Request

Object = dict[str, Any]
# where a pod has the runs
RUNS = PurePosixPath("/runs")
DNS_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
FILE_PATH = re.compile(r"(?!.*(?:^|/)\.{1,2}(?:/|$))[A-Za-z0-9._/-]+")
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]*@sha256:[0-9a-f]{64}")


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
    # what ends the command line: the planned flags, host and port; a server that is started without a model has words of its own
    told = len(plan.arguments) + len(engine.more_words(placed)) + 4
    return Contained(engine, engine.container, placed, plan, launch.argv[1 if engine.creates_model else -told :], launch.env)


@dataclass(frozen=True)
class Storage:
    """Where a pod has the run folder from: a claim's folder of runs, or an image whose root is the run folder."""

    claim: str = ""
    path: str = ""
    image: str = ""

    @classmethod
    def of(cls, text: str) -> "Storage":
        """Read ``pvc://CLAIM[/FOLDER]`` or ``image://REFERENCE@sha256:...``; InputError for anything else."""
        kind, _, rest = text.partition("://")
        claim, _, path = rest.partition("/")
        path = path.strip("/")
        if kind == "pvc" and DNS_NAME.fullmatch(claim) and (not path or FILE_PATH.fullmatch(path)):
            return cls(claim=claim, path=path)
        if kind == "image" and _IMAGE.fullmatch(rest):
            return cls(image=rest)
        remedy = "pvc://CLAIM or pvc://CLAIM/FOLDER, or image://REGISTRY/NAME@sha256:DIGEST (a tag may be given other bytes)"
        raise InputError(f"--storage {text!r} is no place for a run folder", remedy=remedy)

    def volume(self, *, read_only: bool = True) -> Object:
        """The pod's volume."""
        if self.image:
            return {"name": "runs", "image": {"reference": self.image, "pullPolicy": "IfNotPresent"}}
        return {"name": "runs", "persistentVolumeClaim": {"claimName": self.claim, "readOnly": read_only}}

    def mount(self, run: str) -> Object:
        """The run's folder at its place in a container; of a claim nothing else is seen there."""
        below = {} if self.image else {"subPath": f"{self.path}/{run}".lstrip("/")}
        return {"name": "runs", "mountPath": str(RUNS / run), "readOnly": True, **below}
