"""Every server behind one name: is each of them this fine-tune, by its prompts, answers and next-token distributions.

A certificate is about one artefact and one server; a name in a cluster stands for many, and after a rollout any of them may be
another one. Each is held to the bounds of the certificate for the number type that was certified.
"""

import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pipeline import engines
from pipeline.certify.certificate import read
from pipeline.certify.links.served import NUMBER_TYPES, said
from pipeline.errors import EngineError, EnvironmentFailure, InputError, PipelineError, VerificationFailed
from pipeline.net.client import Refused, Unanswered, at_address, get_async, open_async, wait_for
from pipeline.report.check import Check
from pipeline.runs.files import read_json, write_json
from pipeline.runs.folder import RunFolder
from pipeline.runs.text import clean
from pipeline.serve.start import Endpoint
from pipeline.verify.distributions import Reference
from pipeline.verify.evidence import Plan, interrogate
from pipeline.verify.material import Material, read_material
from pipeline.verify.score import spread

PROMPTS = 16
# servers asked at the same time
_TOGETHER = 8
State = Literal["passed", "failed", "unanswered"]


@dataclass(frozen=True)
class Service:
    """A name that stands for servers of one engine: its URL without ``/v1``, and the names the fine-tune may be served under."""

    url: str
    engine: str
    names: tuple[str, ...]
    key: str = ""


@dataclass(frozen=True)
class Replica:
    """One address: whether it is this fine-tune, what was found, or why it did not answer."""

    address: str
    state: State
    checks: tuple[Check, ...] = ()
    reason: str = ""

    @property
    def words(self) -> str:
        """What is wrong with it; empty when nothing is."""
        return self.reason or "; ".join(f"{c.id}: {c.detail}" for c in self.checks if c.status == "failed")


@dataclass(frozen=True)
class _Asked:
    run: RunFolder
    service: Service
    material: Material
    reference: Reference
    plan: Plan
    dtype: str


def addresses(url: str) -> list[str]:
    """Every address that the host of a URL stands for (A and AAAA records); EnvironmentFailure when it is not known."""
    parts = urlsplit(url)
    try:
        host, port = parts.hostname or "", parts.port or {"https": 443}.get(parts.scheme, 80)
        if parts.scheme not in ("http", "https") or not host:
            raise ValueError(url)
    except ValueError:
        raise InputError(f"{url!r} is not a URL", remedy="write http://host:port") from None
    try:
        known = {str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except OSError as error:
        raise EnvironmentFailure(f"the name {host} is not known here ({error.strerror or error})") from None
    # this machine under two names
    return sorted(known - ({"::1"} if "127.0.0.1" in known else set()))


def ask(
    run: RunFolder, service: Service, prompts: int = PROMPTS, dtype: str = "", progress: Callable[[str], None] = lambda _: None
) -> list[Replica]:
    """Ask every address behind a service and judge it; writes ``certificate/replicas.json``.

    ``dtype`` is the number type that they compute in (default: that of the run's certificate for this engine).
    """
    if not run.probes.is_file():
        remedy = f"granite-pipeline certify --run {run.name}"
        raise InputError(f"run {run.name} has no reference distributions to compare with", remedy=remedy)
    if dtype and dtype not in NUMBER_TYPES:
        raise InputError(f"no number type {dtype!r}", remedy="use " + ", ".join(NUMBER_TYPES))
    there, reference = addresses(service.url), Reference.from_json(read_json(run.probes))
    numbers = sorted({probe.row for probe in reference.held_out})
    rows = tuple(numbers[i] for i in spread(len(numbers), prompts))
    plan = Plan(rows, 1, reference)
    asked = _Asked(run, service, read_material(run), reference, plan, dtype or certified_dtype(run, service.engine))

    def one(address: str) -> Replica:
        found = _ask_one(asked, address)
        progress(f"{address}: {found.state}")
        return found

    progress(f"{len(there)} addresses behind {service.url}: {', '.join(there)}")
    with ThreadPoolExecutor(_TOGETHER) as pool:
        found = list(pool.map(one, there))
    write_json(run.replicas, to_json(asked.run, service, found, asked.dtype))
    return found


def certified_dtype(run: RunFolder, engine: str) -> str:
    """The number type that an engine computed in when it was certified; "unknown" (bounded as bfloat16) when it was not."""
    declared = engines.get(engine).served_dtype(())
    evidence = run.certificate / f"evidence-{engine}.json"
    return str(read_json(evidence).get("dtype", declared)) if evidence.is_file() else declared


def _ask_one(asked: _Asked, address: str) -> Replica:
    service = asked.service
    with at_address(service.url, address):
        try:
            model = wait_for(_served_as(service))
            if not model:
                return Replica(address, "failed", reason=f"serves nothing under the name {' or '.join(service.names)}")
            endpoint = Endpoint(service.engine, service.url, model, api_key=service.key)
            evidence = wait_for(interrogate(endpoint, asked.run, asked.material, asked.plan))
        except PipelineError as error:
            return Replica(address, "unanswered" if _silent(error) else "failed", reason=error.message)
    checks = tuple(said(replace(evidence, dtype=asked.dtype), asked.reference, asked.material))
    state: State = "failed" if any(check.status == "failed" for check in checks) else "passed"
    return Replica(address, state, checks)


def _silent(error: PipelineError) -> bool:
    """Whether a server was not there, not ready or not to be asked, rather than another one."""
    if isinstance(error, Refused):
        return error.status >= 500 or error.status in (401, 403, 429)
    return isinstance(error, Unanswered)


async def _served_as(service: Service) -> str:
    """The name under which a server has the fine-tune: the first known one that it lists, else the only one there is."""
    async with open_async(service.url, service.key) as client:
        answer = await get_async(client, "/v1/models", f"{service.engine}:")
    try:
        listed = [str(entry["id"]) for entry in answer["data"]]
    except (KeyError, TypeError):
        raise EngineError(f"{service.engine}: /v1/models has no list of models") from None
    known = next((name for name in service.names if name in listed), "")
    return known or (listed[0] if len(listed) == 1 else "")


def to_json(run: RunFolder, service: Service, found: Sequence[Replica], dtype: str) -> dict[str, Any]:
    """``replicas.json``."""
    about: dict[str, Any] = {"run": run.name, "url": service.url, "engine": service.engine, "dtype": dtype}
    about |= {"created_at": datetime.now(UTC).isoformat(timespec="seconds"), "certificate": _certificate_id(run.certificate_file)}
    about["passed"] = bool(found) and all(one.state == "passed" for one in found)
    return {**about, "replicas": [clean(asdict(one)) for one in found]}


def _certificate_id(path: Path) -> str | None:
    return read(path)[1] if path.is_file() else None


def require_all(run: RunFolder, found: Sequence[Replica]) -> None:
    """Raise VerificationFailed naming each address that is not this fine-tune, else EnvironmentFailure for those that were silent."""
    others = [one for one in found if one.state == "failed"]
    silent = [one for one in found if one.state == "unanswered"]
    lines = "\n".join(f"{one.address}: {one.words}" for one in (*others, *silent))
    if others:
        named = ", ".join(one.address for one in others)
        remedy = "take it out of the service, and start it again from this run's files"
        raise VerificationFailed(f"{named}: not the fine-tune of run {run.name}", evidence=lines, remedy=remedy)
    if silent:
        named = ", ".join(one.address for one in silent)
        raise EnvironmentFailure(f"{named}: no answer", evidence=lines, remedy="look into that server's log, then ask again")
