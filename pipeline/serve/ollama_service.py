"""An Ollama that already runs, as the system service it is on Linux: the model is made in it; nothing of it is started or stopped."""

import time
from dataclasses import replace

from pipeline import engines
from pipeline.config import root_url
from pipeline.engines.base import require_feasible
from pipeline.errors import InputError
from pipeline.net.client import wait_for
from pipeline.net.loopback import is_local
from pipeline.net.reach import get_json
from pipeline.planning.plan import Plan
from pipeline.serve import records
from pipeline.serve.server import Progress
from pipeline.serve.start import Endpoint, Options, Target, create_in_ollama, first_token, note_ready, request_for, to_stop

_ASK_SECONDS = 2.0


def find(base_url: str) -> Endpoint | None:
    """The Ollama that answers at a URL, without a model yet; None when nothing, or something else, answers."""
    root = root_url(base_url)
    if not root:
        return None
    seen = wait_for(get_json(root, "/api/version", timeout=_ASK_SECONDS))
    version = seen.data.get("version") if seen.ok and isinstance(seen.data, dict) else None
    return Endpoint("ollama", root, "", str(version)) if version else None


def serve_there(there: Endpoint, target: Target, options: Options, progress: Progress) -> Endpoint:
    """Make the target's model in that Ollama, wait for its first token, and note which artefact it is.

    Raises EngineError when Ollama refuses, InputError for a server setting: those are its owner's.
    """
    begun = time.monotonic()
    records.require_none("ollama", target.servers, to_stop(target))
    plan = _plan(target, options) if is_local(there.url) else None
    endpoint = replace(there, model=target.name, plan=plan.to_json([]) if plan else None)
    progress(f"Ollama already runs at {there.url}: the model is made there")
    create_in_ollama(endpoint, target, progress, plan)
    first_token(endpoint)
    return note_ready(endpoint, target, begun, _digest(endpoint))


def _plan(target: Target, options: Options) -> Plan:
    """The model's own parameters; the variables of the server stay what its owner set."""
    request = request_for(target, options)
    plan = engines.get("ollama").plan(request)
    require_feasible(plan)
    given = [setting.name for setting in plan.env if setting.source == "user"]
    if given:
        raise InputError(
            f"{', '.join(given)} is a setting of the server, and this Ollama already runs",
            remedy="set it where that Ollama is started, or start another one with --port 0",
        )
    return replace(plan, env=())


def _digest(endpoint: Endpoint) -> str:
    """Ollama's digest of the model, which changes when someone makes another one of the same name."""
    listing = wait_for(engines.get(endpoint.engine).listing(endpoint.url, "", _ASK_SECONDS))
    return next((one.digest for one in listing.models or () if records.same_name(one.name, endpoint.model)), "")
