"""Which models each backend serves, whether they answer, and whether they are ours. A backend's fault is a status, never an exception."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import engines
from pipeline.config import Address, Settings, root_url
from pipeline.engines.base import Engine
from pipeline.engines.listing import Listed
from pipeline.errors import InputError, PipelineError
from pipeline.net.chat import PATH, hello
from pipeline.net.client import Refused, Unanswered, open_async, post_async
from pipeline.net.reach import TIMEOUT
from pipeline.operate.agents import Agents
from pipeline.runs.folder import DEFAULT_NAME, DEFAULT_OUTPUT, RunFolder
from pipeline.serve import artefacts, records
from pipeline.serve.artefacts import Artefact


@dataclass(frozen=True)
class ModelStatus:
    """One model at one backend. ``size`` in bytes, ``latency_ms`` of the status request; ``detail`` says what to do when not available."""

    name: str
    available: bool
    loaded: bool | None = None
    context: int | None = None
    size: int | None = None
    latency_ms: float | None = None
    detail: str = ""
    artefact: Artefact | None = None
    kind: str = ""

    def to_json(self) -> dict[str, Any]:
        """For ``--json`` and the status API."""
        return asdict(self)


async def check_ollama_models(
    host: str, model: str = "", *, timeout: float = TIMEOUT, output: Path = DEFAULT_OUTPUT
) -> list[ModelStatus]:
    """Models in an Ollama (``/api/tags``), which of them are loaded (``/api/ps``); ``model`` is the one that is wanted."""
    return await _listed(engines.get("ollama"), host, "", model, timeout, output)


async def check_vllm_models(
    base: str, model: str = "", *, api_key: str = "", timeout: float = TIMEOUT, output: Path = DEFAULT_OUTPUT
) -> list[ModelStatus]:
    """Models of a vLLM server, adapters included; healthy only while its engine answers ``/health``."""
    return await _listed(engines.get("vllm"), base, api_key, model, timeout, output)


async def check_openai_compatible_models(
    base_url: str, api_key: str = "", model: str = "", *, timeout: float = TIMEOUT, output: Path = DEFAULT_OUTPUT
) -> list[ModelStatus]:
    """Models of any OpenAI-compatible endpoint: TGI, LM Studio, a gateway or a hosted service."""
    return await _listed(engines.get("openai"), base_url, api_key, model, timeout, output)


async def check(
    address: Address, model: str = "", *, timeout: float = TIMEOUT, output: Path = DEFAULT_OUTPUT
) -> list[ModelStatus]:
    """The models of one configured backend; ``model`` (default: the configured one) appears in the list in any case."""
    wanted = model or address.model
    if not address.base_url:
        return [ModelStatus(wanted, False, detail=f"{address.backend} has no base URL: nothing is asked", kind="url")]
    key = address.api_key.get_secret_value()
    return await _listed(engines.get(address.backend), address.base_url, key, wanted, timeout, output)


async def check_every(settings: Settings, only: str = "", output: Path = DEFAULT_OUTPUT) -> dict[str, list[ModelStatus]]:
    """The models of every backend that has a URL, or of one, asked at the same time."""
    names = [name for name in engines.NAMES if only in ("", name) and settings.address(name).base_url]
    listed = await asyncio.gather(*(check(settings.address(name), output=output) for name in names))
    return dict(zip(names, listed, strict=True))


async def _listed(engine: Engine, url: str, key: str, model: str, timeout: float, output: Path) -> list[ModelStatus]:
    """What a server lists, never empty: with an entry for the wanted model when the server does not have it, or has none at all."""
    root = root_url(url)
    listing = await engine.listing(root, key, timeout)
    reached, latency = listing.reached, listing.reached.latency_ms
    if listing.models is None:
        words = "the answer has no list of models: another kind of server listens there, or the base URL is wrong"
        return [ModelStatus(model, False, latency_ms=latency, detail=reached.detail or words, kind=reached.kind or "not_json")]
    # a file that was changed in place is read again, and other backends are asked meanwhile
    ours = await asyncio.to_thread(_artefacts, listing.models, root, output)
    found = [
        ModelStatus(one.name, True, one.loaded, one.context, one.size, latency, artefact=artefact)
        for one, artefact in zip(listing.models, ours, strict=True)
    ]
    wanted = model if ":" in model or not model else model + engine.tag
    if (found and not wanted) or any(status.name == wanted for status in found):
        return found
    names = ", ".join(status.name for status in found[:10]) or "no model at all"
    words = f"not served here, which has {names}: {engine.to_have(model)}"
    return [ModelStatus(wanted, False, False, latency_ms=latency, detail=words, kind="model"), *found]


def _artefacts(models: Sequence[Listed], root: str, output: Path) -> list[Artefact | None]:
    """What of ours each model of a server is, by what was noted when it was loaded, or by the file that it names."""
    known = tuple(records.every(output))
    since, found = records.up_since(root, known), list[Artefact | None]()
    for one in models:
        # an adapter is not the artefact the server was started with
        about = (note.artefact for note in known if not one.adapter and note.about(root, one.name, one.digest))
        found.append(next(filter(None, about), None) or artefacts.of_served_path(one.path, output, since))
    return found


async def warmup_model(
    config: Settings, agent_name: str | None = None, *, timeout: float = 300.0, output: Path = DEFAULT_OUTPUT
) -> ModelStatus:
    """Make the selected backend load a model and answer one token, for an agent or for everyone; the latency is of that answer.

    ``orchestrator`` uses the orchestrator's model. A model that is known to be another run's than the agent's is not
    available to it. Raises InputError for an agent that agents.yaml does not know, or whose run nothing serves by name.
    """
    address = address_for(config, agent_name, output)
    statuses = await check(address, timeout=min(timeout, TIMEOUT), output=output)
    wanted = same_model(statuses, address.model)
    if wanted is None or not wanted.available:
        return wanted or statuses[0]
    run = _run_of(config, agent_name)
    if run and wanted.artefact and wanted.artefact.run != run:
        words = f"this is run {wanted.artefact.run}, and agent {agent_name} is run {run}"
        return replace(wanted, available=False, detail=f"{words}: granite-pipeline serve --agent {agent_name}")
    return await _first_token(address, wanted, timeout)


async def _first_token(address: Address, wanted: ModelStatus, timeout: float) -> ModelStatus:
    begun = time.perf_counter()
    try:
        async with asyncio.timeout(timeout), open_async(address.root, address.api_key.get_secret_value(), timeout) as client:
            await post_async(client, PATH, hello(wanted.name))
    except Refused as refused:
        words = f"a chat is refused ({refused.status}): {refused.text[:300]}"
    except (TimeoutError, PipelineError) as error:
        slow = isinstance(error, TimeoutError) or (isinstance(error, Unanswered) and error.timed_out)
        cause = type(error.cause if isinstance(error, Unanswered) else error).__name__
        words = f"no token came within {timeout:g} s" if slow else f"the connection broke during a chat ({cause})"
    else:
        return replace(wanted, loaded=True, latency_ms=round((time.perf_counter() - begun) * 1000, 1))
    return replace(wanted, available=False, detail=f"listed, but {words}")


def address_for(config: Settings, agent_name: str | None, output: Path = DEFAULT_OUTPUT) -> Address:
    """The backend an agent uses, with the agent's model in it; InputError for an unknown agent, or a run with no known name.

    Without a model in agents.yaml it is the name that the run was last served under; the configured names are those of
    the default run.
    """
    run = _run_of(config, agent_name)
    if agent_name is None:
        return config.address()
    if run is None:
        address = config.address()
        return replace(address, model=address.orchestrator_model)
    agent = Agents.load(config.agents_file).get(agent_name)
    address = config.address(agent.backend or "")
    if agent.model:
        return replace(address, model=agent.model)
    record = records.of_run(RunFolder(run, output), address.backend)
    if record and record.ready:
        # started on another port than the configured one, it is found there as long as it runs
        up = record.running
        return replace(address, model=record.ready.model, base_url=up.url if up else address.base_url)
    if run == DEFAULT_NAME:
        return address
    remedy = f"granite-pipeline serve {address.backend} --agent {agent_name}, or give the agent a model in {config.agents_file}"
    raise InputError(
        f"agent {agent_name} is run {run}, and nothing says under which name {address.backend} serves it", remedy=remedy
    )


def _run_of(config: Settings, agent_name: str | None) -> str | None:
    """The agent's run; None for everyone, and for the orchestrator that agents.yaml does not mention."""
    if agent_name is None:
        return None
    agents = Agents.load(config.agents_file)
    if agent_name not in agents.agents and agent_name == "orchestrator":
        return None
    return agents.get(agent_name).run


def same_model(statuses: Sequence[ModelStatus], name: str) -> ModelStatus | None:
    """The status of a model by name; Ollama's ``:latest`` may be left out, and no name means the only model there is."""
    if not name and len(statuses) == 1:
        return statuses[0]
    return next((s for s in statuses if records.same_name(s.name, name)), None)
