"""What every engine file provides; the supervisor and the checks know engines only through this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from pipeline.errors import EngineError
from pipeline.plan import Plan, Request

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Launch:
    """A server process to start: its argv, the variables added to the environment, and where it answers."""

    engine: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    url: str
    ready_path: str
    model: str
    start_timeout: float = 600.0


@dataclass(frozen=True)
class Availability:
    """Whether an engine can be started here; when not, why and the command that changes it."""

    usable: bool
    version: str | None = None
    reason: str = ""
    remedy: str = ""


class Engine(Protocol):
    """One inference engine. ``plan`` and ``launch`` are pure; the rest asks the machine or a running server."""

    name: str
    default_port: int

    def available(self) -> Availability:
        """Look for the program or package, without starting it."""
        ...

    def plan(self, request: Request) -> Plan:
        """Choose flags for this model, hardware and purpose, each with its reason."""
        ...

    def launch(self, plan: Plan, request: Request, *, host: str, port: int) -> Launch:
        """Turn a feasible plan into the process to start."""
        ...

    async def prompt_tokens(
        self, client: httpx.AsyncClient, model: str, messages: Sequence[Message], tools: Sequence[Message] | None
    ) -> list[int] | str:
        """What the engine feeds the model for these messages: token IDs, or the rendered text where it tells no IDs.

        ``client`` has the server's base URL (without ``/v1``).
        """
        ...


def require_feasible(plan: Plan) -> None:
    """Raise EngineError with the numbers and the alternatives when a plan was refused."""
    if not plan.feasible:
        raise EngineError(
            f"{plan.engine} cannot serve this model on this machine",
            evidence="\n".join(plan.warnings),
            remedy="; or ".join(plan.alternatives) or "use a larger machine",
        )


async def ask(client: httpx.AsyncClient, path: str, body: Mapping[str, Any]) -> Any:
    """POST JSON to a running server and return its JSON; raises EngineError with the server's own words."""
    try:
        answer = await client.post(path, json=dict(body))
        answer.raise_for_status()
        return answer.json()
    except httpx.HTTPStatusError as error:
        raise EngineError(f"POST {path} answered {error.response.status_code}", evidence=error.response.text[:2000]) from None
    except (httpx.HTTPError, ValueError) as error:
        raise EngineError(f"POST {path} failed: {error!r}") from None
