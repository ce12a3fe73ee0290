"""What every engine file provides; the supervisor and the checks know engines only through this."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from pipeline.errors import EngineError
from pipeline.model.toolcalls import MARKS, Call
from pipeline.planning.plan import Plan, Request
from pipeline.prompts.conversation import Conversation, Prompt

Body = dict[str, Any]


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

    @property
    def ours(self) -> bool:
        """True when what is started is a module of this package, for this interpreter; any other program has its own packages."""
        return self.argv[1:2] == ("-m",) and self.argv[2].startswith("pipeline.")


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
    # forms of tool calls (``pipeline.model.toolcalls``) that the engine finds in an answer
    call_forms: tuple[str, ...]

    def available(self) -> Availability:
        """Look for the program or package, without starting it."""
        ...

    def plan(self, request: Request) -> Plan:
        """Choose flags for this model, hardware and purpose, each with its reason."""
        ...

    def launch(self, plan: Plan, request: Request, *, host: str, port: int) -> Launch:
        """Turn a feasible plan into the process to start."""
        ...

    def prompt(self, client: httpx.Client, model: str, conversation: Conversation) -> Prompt:
        """What the engine feeds the model for this conversation; ``client`` has the server's base URL (without ``/v1``).

        Raises ModelError when the chat template refuses it, NotApplicable when the API cannot say it, EngineError when
        the engine does not tell its prompts or does not answer.
        """
        ...

    def schema_requests(self, body: Body, schema: Body) -> list[tuple[str, Body]]:
        """(path, body) of every way this engine has to answer a chat request by a JSON schema."""
        ...

    def force_call(self, body: Body, call: Call) -> Body | None:
        """A chat request with ``tools`` changed so that the engine makes the model write a call; None where it cannot."""
        ...


class OpenAiRequests:
    """Structured output and tool calls as OpenAI's API has them; engines that differ override."""

    call_forms: tuple[str, ...] = tuple(MARKS)

    def schema_requests(self, body: Body, schema: Body) -> list[tuple[str, Body]]:
        """``response_format`` with a JSON schema."""
        wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
        return [("/v1/chat/completions", body | {"response_format": wanted})]

    def force_call(self, body: Body, call: Call) -> Body | None:
        """``tool_choice`` required."""
        return body | {"tool_choice": "required"}


def require_feasible(plan: Plan) -> None:
    """Raise EngineError with the numbers and the alternatives when a plan was refused."""
    if not plan.feasible:
        raise EngineError(
            f"{plan.engine} cannot serve this model on this machine",
            evidence="\n".join(plan.warnings),
            remedy="; or ".join(plan.alternatives) or "use a larger machine",
        )


def openai_body(conversation: Conversation) -> dict[str, Any]:
    """The conversation as OpenAI's chat API carries it; documents go to the chat template by its keyword arguments."""
    body: dict[str, Any] = {"messages": [_openai_message(message) for message in conversation.messages]}
    if conversation.tools:
        body["tools"] = list(conversation.tools)
    if conversation.documents:
        body["chat_template_kwargs"] = {"documents": list(conversation.documents)}
    return body


def _openai_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's form: call arguments are a JSON string."""
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    made = []
    for call in calls:
        arguments = call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        made.append({**call, "function": {**call["function"], "arguments": text}})
    return {**message, "tool_calls": made}
