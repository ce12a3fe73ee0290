"""Which models each backend serves, whether they answer, and whether they are ours. A backend's fault is a status, never an exception."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config import Address, Settings, root_url
from pipeline.errors import InputError, PipelineError
from pipeline.net.chat import PATH, hello
from pipeline.net.client import Refused, Unanswered, open_async, post_async
from pipeline.net.loopback import same_place
from pipeline.net.reach import TIMEOUT, Reached, get_json
from pipeline.operate.agents import Agents
from pipeline.runs.folder import DEFAULT_NAME, DEFAULT_OUTPUT, RunFolder
from pipeline.serve import notes
from pipeline.serve import notes as artefact
from pipeline.serve.notes import Artefact, Note


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
    root = root_url(host)
    tags, ps = await asyncio.gather(get_json(root, "/api/tags", timeout=timeout), get_json(root, "/api/ps", timeout=timeout))
    entries = _entries(tags, "models")
    if entries is None:
        return [_unreachable(model, tags)]
    running = {str(entry.get("name")): entry for entry in _entries(ps, "models") or []}
    known, found = tuple(notes.every(output)), []
    for entry in entries:
        name = str(entry.get("name", ""))
        in_memory = running.get(name, {})
        ours = _recorded(root, name, known, str(entry.get("digest") or ""))
        context = _integer(in_memory.get("context_length"))
        found.append(
            ModelStatus(name, True, name in running, context, _integer(entry.get("size")), tags.latency_ms, artefact=ours)
        )
    wanted = model if ":" in model or not model else f"{model}:latest"
    remedy = f"granite-pipeline serve ollama creates it, `ollama pull {model}` fetches a published one"
    return _with_wanted(found, wanted, remedy, tags.latency_ms)


async def check_vllm_models(
    base: str, model: str = "", *, api_key: str = "", timeout: float = TIMEOUT, output: Path = DEFAULT_OUTPUT
) -> list[ModelStatus]:
    """Models of a vLLM server, adapters included; healthy only while its engine answers ``/health``."""
    root = root_url(base)
    listed, health = await asyncio.gather(
        get_json(root, "/v1/models", api_key, timeout), get_json(root, "/health", timeout=timeout)
    )
    if listed.ok and not health.ok and health.kind != "not_found":
        return [replace(_unreachable(model, health), latency_ms=listed.latency_ms)]
    return _openai_statuses(root, listed, model, output)


async def check_openai_compatible_models(
    base_url: str, api_key: str = "", model: str = "", *, timeout: float = TIMEOUT, output: Path = DEFAULT_OUTPUT
) -> list[ModelStatus]:
    """Models of any OpenAI-compatible endpoint: TGI, LM Studio, a gateway or a hosted service."""
    root = root_url(base_url)
    return _openai_statuses(root, await get_json(root, "/v1/models", api_key, timeout), model, output)


async def check_llamacpp_models(
    base: str, model: str = "", *, api_key: str = "", timeout: float = TIMEOUT, output: Path = DEFAULT_OUTPUT
) -> list[ModelStatus]:
    """The model of a llama.cpp server, with the context of one slot and the file it loaded (``/props``)."""
    root = root_url(base)
    listed, props = await asyncio.gather(
        get_json(root, "/v1/models", api_key, timeout), get_json(root, "/props", api_key, timeout)
    )
    statuses = _openai_statuses(root, listed, model, output)
    said = props.data if props.ok and isinstance(props.data, dict) else {}
    slot = said.get("default_generation_settings")
    context = _integer(slot.get("n_ctx")) if isinstance(slot, dict) else None
    ours = artefact.of_served_path(str(said.get("model_path", "")), output, notes.up_since(root, notes.every(output)))
    return [
        replace(s, context=context or s.context, artefact=s.artefact or ours, loaded=True) if s.available else s for s in statuses
    ]


async def check_sglang_models(
    base: str, model: str = "", *, timeout: float = TIMEOUT, output: Path = DEFAULT_OUTPUT
) -> list[ModelStatus]:
    """The model of an SGLang server; its model list has vLLM's fields."""
    root = root_url(base)
    return _openai_statuses(root, await get_json(root, "/v1/models", timeout=timeout), model, output)


async def check(
    address: Address, model: str = "", *, timeout: float = TIMEOUT, output: Path = DEFAULT_OUTPUT
) -> list[ModelStatus]:
    """The models of one configured backend; ``model`` (default: the configured one) appears in the list in any case."""
    wanted = model or address.model
    if not address.base_url:
        return [ModelStatus(wanted, False, detail=f"{address.backend} has no base URL: nothing is asked", kind="url")]
    key = address.api_key.get_secret_value()
    if address.backend == "openai":
        return await check_openai_compatible_models(address.base_url, key, wanted, timeout=timeout, output=output)
    if address.backend in ("vllm", "llamacpp"):
        keyed = check_vllm_models if address.backend == "vllm" else check_llamacpp_models
        return await keyed(address.base_url, wanted, api_key=key, timeout=timeout, output=output)
    checks = {"ollama": check_ollama_models, "sglang": check_sglang_models}
    return await checks[address.backend](address.base_url, wanted, timeout=timeout, output=output)


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
        words = (
            f"this is run {wanted.artefact.run}, and agent {agent_name} is run {run}: granite-pipeline serve --agent {agent_name}"
        )
        return replace(wanted, available=False, detail=words)
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
    note = notes.of_run(RunFolder(run, output), address.backend)
    if note:
        # started on another port than the configured one, it is found there as long as it runs
        return replace(address, model=note.model, base_url=note.process.url if note.process else address.base_url)
    if run == DEFAULT_NAME:
        return address
    raise InputError(
        f"agent {agent_name} is run {run}, and nothing says under which name {address.backend} serves it",
        remedy=f"granite-pipeline serve {address.backend} --agent {agent_name}, or give the agent a model in {config.agents_file}",
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
    return next((s for s in statuses if notes.same_name(s.name, name)), None)


def _openai_statuses(root: str, listed: Reached, model: str, output: Path) -> list[ModelStatus]:
    entries = _entries(listed, "data")
    if entries is None:
        return [_unreachable(model, listed)]
    known = tuple(notes.every(output))
    found, since = [], notes.up_since(root, known)
    for entry in entries:
        name, meta = str(entry.get("id", "")), entry.get("meta")
        meta = meta if isinstance(meta, dict) else {}
        context = (
            _integer(entry.get("max_model_len")) or _integer(entry.get("context_length")) or _integer(meta.get("n_ctx_train"))
        )
        # an adapter is not the artefact the server was started with
        started = None if entry.get("parent") else _recorded(root, name, known)
        ours = started or artefact.of_served_path(str(entry.get("root") or ""), output, since)
        loaded = str(entry["state"]) == "loaded" if "state" in entry else True
        found.append(ModelStatus(name, True, loaded, context, _integer(meta.get("size")), listed.latency_ms, artefact=ours))
    return _with_wanted(found, model, "serve the run under that name, or ask for one of these", listed.latency_ms)


def _with_wanted(found: list[ModelStatus], model: str, remedy: str, latency: float | None) -> list[ModelStatus]:
    """The list, never empty: with an entry for the wanted model when the server does not have it, or has none at all."""
    if (found and not model) or any(status.name == model for status in found):
        return found
    names = ", ".join(status.name for status in found[:10]) or "no model at all"
    missing = ModelStatus(model, False, False, None, None, latency, f"not served here, which has {names}: {remedy}", kind="model")
    return [missing, *found]


def _unreachable(model: str, reached: Reached) -> ModelStatus:
    detail = reached.detail or "the answer has no list of models: another kind of server listens there, or the base URL is wrong"
    return ModelStatus(model, False, None, None, None, reached.latency_ms, detail, kind=reached.kind or "not_json")


def _entries(reached: Reached, key: str) -> list[Mapping[str, Any]] | None:
    """The listed models, or None when there was no such answer."""
    if not reached.ok or not isinstance(reached.data, dict):
        return None
    listed = reached.data.get(key)
    if not isinstance(listed, list):
        # Ollama and LM Studio answer null for an empty list
        return [] if key in reached.data and listed is None else None
    return [entry for entry in listed if isinstance(entry, dict)]


def _recorded(root: str, model: str, known: Sequence[Note], digest: str = "") -> Artefact | None:
    """What was loaded by a server that was started from here and still runs at this URL, or made in someone's Ollama."""
    for note in known:
        # what was made in an Ollama that is not ours is told by its digest, also when it was made again by someone else
        still = note.digest == digest if note.digest else note.process is not None
        if still and note.artefact and same_place(note.url, root) and notes.same_name(model, note.model):
            return note.artefact
    return None


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
