"""Any OpenAI-compatible URL: nothing is launched; the server belongs to someone else (TGI, a hosted vLLM, a vendor)."""

from __future__ import annotations

import httpx

from pipeline.engines.base import Availability, Launch, OpenAiRequests
from pipeline.errors import EngineError, InputError
from pipeline.planning.plan import Memory, Plan, Request
from pipeline.prompts.conversation import Conversation, Prompt

_REMEDY = "set OPENAI_COMPATIBLE_BASE_URL to the running server"


class OpenAiCompatible(OpenAiRequests):
    """A server reached by URL only."""

    name = "openai"
    default_port = 0

    def available(self) -> Availability:
        """Never launched from here; always usable where a URL is given."""
        return Availability(True)

    def plan(self, request: Request) -> Plan:
        """An empty plan: the server's flags are its owner's."""
        model = request.model
        if request.overrides:
            raise InputError(
                "--set does nothing for an OpenAI-compatible URL", remedy="change the settings where that server is started"
            )
        warning = "nothing is launched: the flags of this server are its owner's"
        return Plan(
            "openai",
            True,
            (),
            (),
            model.dtype,
            model.quantization,
            1,
            model.shape.max_positions,
            0,
            Memory(),
            warnings=(warning,),
        )

    def launch(self, plan: Plan, request: Request, *, host: str, port: int) -> Launch:
        """Always raises EngineError: there is nothing to start."""
        raise EngineError("an OpenAI-compatible server is not started from here", remedy=_REMEDY)

    def prompt(self, client: httpx.Client, model: str, conversation: Conversation) -> Prompt:
        """Always raises EngineError: the OpenAI API has no way to ask for the rendered prompt."""
        raise EngineError(
            "the OpenAI API does not tell the rendered prompt", remedy="compare prompts with the vllm, llamacpp or ollama engine"
        )
