"""Any OpenAI-compatible URL: nothing is launched; the server belongs to someone else (TGI, a hosted vLLM, a vendor)."""

from __future__ import annotations

import httpx

from pipeline.engines.base import Engine, Launch
from pipeline.errors import EngineError, InputError
from pipeline.machine.hardware import Hardware
from pipeline.planning.plan import Memory, Plan, Request
from pipeline.prompts.conversation import Conversation, Prompt

_REMEDY = "set OPENAI_COMPATIBLE_BASE_URL to the running server"


class OpenAiCompatible(Engine):
    """A server reached by URL only."""

    name = "openai"
    title = "OpenAI-compatible"
    serves = "url"
    prefix = "OPENAI_COMPATIBLE"
    key_variable = "OPENAI_COMPATIBLE_API_KEY"
    default_model = ""

    def advice(self, hardware: Hardware, users: int) -> str:
        """It is for machines that hold no model."""
        return f"a server elsewhere is not needed: this machine can serve {users} itself"

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
