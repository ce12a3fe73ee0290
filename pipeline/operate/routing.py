"""The gateway's routing: which deployments may answer for a model name, in which order, and what LiteLLM is told about them."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipeline import engines
from pipeline.config import Settings, Strategy, key_variables, root_url
from pipeline.errors import InputError
from pipeline.net.loopback import is_local
from pipeline.operate.agents import Agents
from pipeline.operate.observer import Observer
from pipeline.runs.files import write_atomic
from pipeline.runs.folder import DEFAULT_OUTPUT, RunFolder
from pipeline.runs.manifest import Manifest
from pipeline.runs.text import without_password
from pipeline.serve import records
from pipeline.serve.artefacts import Artefact, manifest_hash

DEFAULT_PORT = 4000
# seconds a request may take before the next backend is tried; a hanging backend is noticed sooner by the health checks
REQUEST_TIMEOUT = 300.0


@dataclass(frozen=True)
class Deployment:
    """One model at one backend; ``id`` is ``model@backend``, ``price`` per million tokens.

    ``sampling`` is what a request that leaves it out is given: engines have defaults of their own, and another one each.
    """

    backend: str
    model: str
    url: str
    local: bool
    price: float
    sampling: Mapping[str, float] = field(default_factory=dict, hash=False)

    @property
    def id(self) -> str:
        """The name LiteLLM knows it by (a slash would name a provider), and that a client may ask for to have exactly this one."""
        return f"{self.model}@{self.backend}"


@dataclass(frozen=True)
class Route:
    """Deployments that may answer a request, first choice first; ``first`` is the one that would answer when all are healthy."""

    first: Deployment
    order: tuple[Deployment, ...]


class Router:
    """Turns a requested model name into a :class:`Route`, from what the observer has seen."""

    def __init__(self, settings: Settings, observer: Observer, strategy: Strategy = "local-first") -> None:
        self.settings = settings
        self.observer = observer
        self.strategy = strategy
        self.agents = Agents.load(settings.agents_file)
        self.deployments = deployments(settings, self.agents)

    def names(self) -> list[str]:
        """Every name a client may ask for: models, ``model@backend``, agents and their runs."""
        models = [name for d in self.deployments for name in (d.model, d.id)]
        agents = [name for key, agent in self.agents.agents.items() for name in (key, agent.run)]
        return list(dict.fromkeys([*models, *agents, *(["orchestrator"] if self.deployments else [])]))

    def route(self, name: str) -> Route | None:
        """Who may answer for ``name``: the same fine-tune everywhere it is served, and what agents.yaml allows by name."""
        exact = next((d for d in self.deployments if d.id == name), None)
        if exact:
            return Route(exact, (exact,))
        wanted = self._wanted(name)
        named = self._named(name) or [d for d in self.deployments if wanted and self.fine_tune(d) == wanted]
        if not named:
            return None
        first = min(named, key=self._rank)
        wanted = wanted or self.fine_tune(first)
        same = [d for d in self.deployments if d == first or (wanted and self.fine_tune(d) == wanted)]
        # the first choice, though it bears the name, may by now serve another fine-tune than the agent's
        same = [d for d in same if self.fine_tune(d) in (wanted, None)]
        words = self.agents.allow_fallback.get(name, [])
        allowed = [d for word in words for d in self.deployments if word in (d.model, d.id) and d not in same]
        order = [*sorted(same, key=self._rank), *allowed]
        healthy = [d for d in order if self.healthy(d)]
        return Route(order[0], tuple(healthy or order)) if order else None

    def artefact(self, deployment: Deployment) -> Artefact | None:
        """What this deployment serves, as last observed; of one that was never seen up, what its run's note says it served."""
        seen = self.observer.seen.get(deployment.backend)
        found = seen.artefact(deployment.model) if seen else None
        if found is None and not self.healthy(deployment):
            return records.last_served(root_url(deployment.url), deployment.model, records.every(self.observer.output))
        return found

    def fine_tune(self, deployment: Deployment) -> str | None:
        """Manifest hash of what it serves, or None when that is not known to be ours."""
        found = self.artefact(deployment)
        return found.fine_tune if found else None

    def healthy(self, deployment: Deployment) -> bool:
        """True when the last observation lists the model as available, and is not an old one."""
        seen = self.observer.seen.get(deployment.backend)
        if seen is None or self.observer.outdated(seen):
            return False
        return any(model.available and records.same_name(model.name, deployment.model) for model in seen.models)

    def headers(self, deployment_id: str, first: str) -> dict[str, str]:
        """What every answer says about who gave it: backend, model, run, manifest hash, artefact, and whether it is a fallback."""
        found = next((d for d in self.deployments if d.id == deployment_id), None)
        if found is None:
            return {}
        ours = self.artefact(found)
        values = {
            "x-granite-backend": found.backend,
            "x-granite-model": found.model,
            "x-granite-fallback": "no" if found.id == first else "yes",
            "x-granite-run": ours.run if ours else "unknown",
            "x-granite-manifest": ours.fine_tune if ours else "unknown",
            "x-granite-artefact": f"{ours.file} sha256:{ours.sha256}" if ours else "unknown",
        }
        return {name: quote(value, safe=" :/._-@+") for name, value in values.items()}

    def _named(self, name: str) -> list[Deployment]:
        if name == "orchestrator" and name not in self.agents.agents:
            address = self.settings.address()
            return [d for d in self.deployments if d.backend == address.backend and d.model == address.orchestrator_model]
        agent = self.agents.agents.get(name)
        if agent and (agent.backend or agent.model):
            return [d for d in self.deployments if agent.backend in (None, d.backend) and agent.model in (None, d.model)]
        return [d for d in self.deployments if d.model == name]

    def _wanted(self, name: str) -> str | None:
        """The fine-tune an agent's or run's name stands for, from the run's manifest."""
        runs = [a.run for key, a in self.agents.agents.items() if name in (key, a.run, a.model)]
        if not runs:
            return None
        with contextlib.suppress(InputError, KeyError, TypeError):
            return manifest_hash(Manifest(RunFolder(runs[0], self.observer.output).manifest))
        return None

    def _rank(self, deployment: Deployment) -> tuple[float, ...]:
        """Sorting key of the strategy; the selected backend goes first among equals."""
        selected = deployment.backend != self.settings.llm_backend
        position = list(engines.NAMES).index(deployment.backend)
        first = {"local-first": not deployment.local, "cloud-first": deployment.local, "cheapest": deployment.price}
        return first[self.strategy], selected, position


def deployments(settings: Settings, agents: Agents) -> list[Deployment]:
    """Every configured model of every backend that has a URL: the model, the orchestrator's and the agents'.

    InputError for a URL with a password in it: LiteLLM's configuration would hold it in clear text.
    """
    found = []
    for engine in engines.every():
        backend, address = engine.name, settings.address(engine.name)
        if not address.base_url:
            continue
        if without_password(address.base_url) != address.base_url:
            words = f"the gateway does not take a URL with a password: {backend} is {without_password(address.base_url)}"
            remedy = "leave user and password out of it, and send a key with OPENAI_COMPATIBLE_API_KEY"
            raise InputError(words, remedy=remedy)
        named = [a.model for a in agents.agents.values() if a.model and (a.backend or settings.llm_backend) == backend]
        for model in dict.fromkeys(filter(None, [address.model, address.orchestrator_model, *named])):
            local = engine.serves != "url" or is_local(address.root)
            sampling = agents.sampling.get(backend, engine.sampling)
            found.append(Deployment(backend, model, address.v1, local, agents.prices.get(backend, 0.0), sampling))
    return found


def litellm_config(found: Sequence[Deployment], timeout: float = REQUEST_TIMEOUT) -> dict[str, Any]:
    """LiteLLM's configuration: one model group for each deployment, keys by reference, no cool-down, no database, no reports."""
    keys, entries = key_variables(), []
    for d in found:
        key = f"os.environ/{keys[d.backend]}" if d.backend in keys else "none"
        place = {"model": f"openai/{d.model}", "api_base": d.url, "api_key": key}
        limits = {"timeout": timeout, "stream_timeout": timeout, "max_retries": 0}
        costs = dict.fromkeys(("input_cost_per_token", "output_cost_per_token"), d.price / 1e6)
        # what a client says goes before these
        said = {**place, **limits, **costs, **d.sampling}
        entries.append({"model_name": d.id, "litellm_params": said, "model_info": {"id": d.id}})
    quiet = {"disable_spend_logs": True, "disable_error_logs": True}
    return {
        "model_list": entries,
        "router_settings": {"num_retries": 0, "disable_cooldowns": True},
        "litellm_settings": {"turn_off_message_logging": True, "num_retries": 0, "json_logs": False},
        "general_settings": {**quiet, "master_key": "os.environ/LITELLM_MASTER_KEY"},
    }


def write_config(path: Path, found: Sequence[Deployment], timeout: float = REQUEST_TIMEOUT) -> None:
    """Write the configuration (JSON is YAML); it holds variable names, never keys. InputError when nothing is configured."""
    if not found:
        words = "no backend has a URL and a model, so the gateway has nothing to route to"
        raise InputError(words, remedy="granite-pipeline config")
    write_atomic(path, json.dumps(litellm_config(found, timeout), indent=2), 0o600)


def gateway_folder(output: Path = DEFAULT_OUTPUT) -> Path:
    """Where the gateway's configuration, log and server record live."""
    return output / ".gateway"
